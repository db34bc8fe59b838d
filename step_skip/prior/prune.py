"""Remove from a prior what chosen steps don't need: a prior of 50 steps is large, a clip follows a few."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Sequence
from pathlib import Path

from step_skip.errors import InputError
from step_skip.files.writing import locked
from step_skip.method.closeness import FIT
from step_skip.prior.metadata import read_prior
from step_skip.prior.prior import (
    Prior,
    latents_before_file,
    number_of_steps,
    step_file,
    step_files,
    step_ranges,
    usual_steps,
)
from step_skip.prior.writer import PriorWriter

OF_A_STEP = re.compile(r"(step|noise_pred|noise_pred_nega)_\d+\.pt")


def steps_to_keep(prior: Prior, *, num_steps: Sequence[int] | None, steps: Sequence[int] | None) -> list[int]:
    """Return the steps that differential resumes of these numbers of steps follow, or the given steps.

    Args:
        num_steps: None: as many as `--num_steps auto` chooses among.

    Raises:
        InputError: the prior hasn't so many, or has none of these.
    """
    total = prior.num_inference_steps
    if steps is not None:
        if not set(steps) <= set(range(total)):
            raise InputError(f"--steps {steps}: {prior.directory} has steps 0 to {total - 1}")
        return sorted(set(steps))
    most = number_of_steps(prior)
    numbers = [number for number in FIT if number <= most] if num_steps is None else num_steps
    if max(numbers) > most:
        raise InputError(f"--num_steps {max(numbers)}: {prior.directory} has only {most} steps")
    return sorted({step for number in numbers for step in usual_steps(prior, number)})


def files_to_remove(prior: Prior, steps: Sequence[int]) -> dict[str, int]:
    """Return the files that no differential resume at these steps reads, and the bytes of each.

    Raises:
        InputError: a prior that isn't whole, is of an older format, or lacks one of the steps already.
    """
    if prior.is_legacy or not prior.is_complete:
        raise InputError(
            f"{prior.directory} isn't whole, or of an older format; only whole priors are pruned"
        )
    needed = {step_file(prior.num_inference_steps - 1)}
    for step in steps:
        _, *velocities = step_files(step, nega=prior.keeps_nega)
        needed |= {latents_before_file(step), *velocities}
    lacking = sorted(name for name in needed if not prior.has(name))
    if lacking:
        raise InputError(
            f"{prior.directory} keeps only steps {step_ranges(prior.kept_steps or [])} "
            f"and lacks {lacking[0]}; keep some of these"
        )
    extra = [name for name in prior.metadata.files if OF_A_STEP.fullmatch(name) and name not in needed]
    paths = {name: prior.directory / name for name in extra}
    return {name: path.lstat().st_size if path.exists() else 0 for name, path in paths.items()}


def prune_prior(
    directory: Path, *, num_steps: Sequence[int] | None, steps: Sequence[int] | None, dry_run: bool = False
) -> dict[str, int]:
    """Remove what differential resumes at these steps don't read; the metadata first, so that it stays true.

    Returns:
        The files that are gone, or would be, and the bytes of each.

    Raises:
        InputError: see `steps_to_keep` and `files_to_remove`.
    """
    read_prior(directory)  # says what is wrong with the folder before it is locked
    with contextlib.nullcontext() if dry_run else locked(directory):
        prior = read_prior(directory)
        kept = steps_to_keep(prior, num_steps=num_steps, steps=steps)
        extra = files_to_remove(prior, kept)
        if dry_run:
            return extra
        m = prior.metadata
        files = {name: value for name, value in m.files.items() if name not in extra}
        shapes = {name: value for name, value in m.shapes.items() if name not in extra}
        metadata = m.model_copy(update={"kept_steps": kept, "files": files, "shapes": shapes})
        PriorWriter(directory, metadata).write_metadata()
        for path in directory.iterdir():
            if OF_A_STEP.fullmatch(path.name) and path.name not in files:
                path.unlink()  # one of an interrupted prune before, too
    return extra
