"""Log what a prior took, and print the commands that continue from it."""

from __future__ import annotations

import argparse
import contextlib
import logging
import shlex
from collections.abc import Iterator
from pathlib import Path

from step_skip.errors import RunError
from step_skip.method.steps import recommended_num_steps
from step_skip.models.memory import describe_peak
from step_skip.models.weights import ROOT
from step_skip.prior.prior import Prior, denoised_file
from step_skip.prior.schema import METADATA_FILE
from step_skip.sweep.progress import describe_seconds

log = logging.getLogger(__name__)


@contextlib.contextmanager
def logging_how_to_resume(
    args: argparse.Namespace, begun: list[Path], *, several: bool = False
) -> Iterator[None]:
    """If a run that has begun is cut short, log the command that resumes it.

    Args:
        begun: the folders of the priors that have begun; the last one is the current one.
        several: several priors are made, which the same command resumes.
    """
    try:
        yield
    except RunError:  # a resumed run would fail again
        raise
    except BaseException:
        if begun and (begun[-1] / METADATA_FILE).exists():
            again = command_line(args, "generate_prior.py", "--resume", begun[-1])
            log.info(f"every complete step is saved; resume with: {'the same command' if several else again}")
        raise


def log_prior(args: argparse.Namespace, prior: Prior, steps_run: int, *, briefly: bool = False) -> None:
    """Log what a prior took and, unless `briefly`, the commands that make clips from it."""
    m, directory = prior.metadata, prior.directory
    steps = m.num_inference_steps
    resumed = f'{command_line(args, "infer_from_prior.py", "--prior_dir", directory)} --prompt "..."'
    cost = f"{steps_run} steps, {m.forwards} forwards, {describe_seconds(m.seconds)}"
    log.info(f"{directory}: {cost}; {describe_peak(m.peak_memory)}")
    if briefly:
        return
    if m.status == "stopped":
        preview = directory / denoised_file(prior.whole_steps - 1)
        log.info(f"Stopped after step {prior.whole_steps - 1} of {steps}; denoised estimate: {preview}")
        log.info("To finish it with a new prompt:")
        log.info(f"  {resumed}")
        log.info("Or with its own prompt, as in an uninterrupted run:")
        log.info(f"  {command_line(args, 'generate_prior.py', '--resume', directory)}")
        return
    start_step, num_steps = m.start_step or 0, recommended_num_steps(steps)
    differential = f" --num_steps {num_steps}" if m.start_step_chosen else ""
    log.info(f"A new prompt in {num_steps} of {steps} steps:")
    log.info(f"  {resumed}{differential}")
    log.info(f"Or resumed after step {start_step}, {steps - start_step - 1} of {steps} steps:")
    log.info(f"  {resumed} --start_step {start_step}")


def command_line(args: argparse.Namespace, name: str, *words: object) -> str:
    """Return a command line of a script for the current folder, with the same model folder and device."""
    script = ROOT / name
    if script.is_relative_to(Path.cwd()):
        script = script.relative_to(Path.cwd())
    parts: list[object] = ["python", script, *words]
    for flag, default in (("model_dir", None), ("device", None), ("vram", "auto")):
        if getattr(args, flag) != default:
            parts += [f"--{flag}", getattr(args, flag)]
    return shlex.join(map(str, parts))
