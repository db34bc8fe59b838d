"""Log the work ahead, its progress, its cost and its failures."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from tqdm import tqdm

from step_skip.errors import RunError
from step_skip.prior.prior import Prior
from step_skip.sweep.clips import Group, all_jobs
from step_skip.sweep.cost import summarize_jobs

log = logging.getLogger(__name__)


def log_auto(groups: Sequence[Group]) -> None:
    """Log the step that `auto` chose for each prior."""
    for group in groups:
        chosen = [plan.auto for plan in group.plans if plan.auto is not None]
        if chosen:
            log.info(f"{f'{group.prior.directory}: ' if len(groups) > 1 else ''}auto: {chosen[0]}")


def log_what_runs(groups: Sequence[Group], *, existing: int | None) -> None:
    """Log the clips that will be made or, for a single clip, its steps.

    Args:
        existing: the number of clips of a sweep that exist; None: a single clip.
    """
    jobs = all_jobs(groups)
    if existing is not None:
        log.info(f"{summarize_jobs(jobs)}; {existing} exist already")
        return
    [job] = jobs
    total, running = job.prior.num_inference_steps, len(job.plan.steps_to_run)
    if job.plan.sigmas is not None:
        log.info(f"runs {running} steps from sigma {job.plan.sigmas[0]:.3f}; the prior's run took {total}")
        return
    log.info(
        f"runs {running} of {total} steps, skips {total - running}"
        if running
        else f"step {job.plan.start_step} is the last: nothing left to run, decodes only"
    )


class Progress:
    """A progress bar over many jobs, with the number of finished jobs, their rate and the time left."""

    def __init__(self, what: str, number: int, *, cost: float):
        layout = "{desc}{percentage:3.0f}%|{bar}| {elapsed}<{remaining}{postfix}"
        self.what, self.number, self.done = what, number, 0
        self.bar = tqdm(total=cost, smoothing=0, bar_format=layout, disable=number == 1)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()

    def add(self, cost: float) -> None:
        """Count one more job as done."""
        self.done += 1
        minutes = max(self.bar.format_dict["elapsed"], 1e-9) / 60
        self.bar.set_description(f"{self.what} {self.done} of {self.number}", refresh=False)
        self.bar.set_postfix_str(f"{self.done / minutes:.1f} a minute", refresh=False)
        self.bar.update(cost)


@contextlib.contextmanager
def each_warning_once() -> Iterator[None]:
    """Log each warning only once while many jobs run."""
    logged: set[str] = set()

    def is_new(record: logging.LogRecord) -> bool:
        message = record.getMessage()
        is_new = record.levelno < logging.WARNING or message not in logged
        logged.add(message)
        return is_new

    handlers = logging.getLogger("step_skip").handlers
    for handler in handlers:
        handler.addFilter(is_new)
    try:
        yield
    finally:
        for handler in handlers:
            handler.removeFilter(is_new)


def describe_seconds(seconds: Mapping[str, float], *, prior: Prior | None = None) -> str:
    """Describe the seconds of a run by phase.

    Args:
        prior: the prior of a clip; the seconds of its own run are added for comparison.
    """
    beside = ""
    if prior is not None and (recorded := prior.metadata.seconds_per_step):
        beside = f" (the prior's run: {sum(recorded):.1f} s)"
    parts = [f"network {seconds.get('denoise', 0.0):.1f} s{beside}"]
    parts += [f"{name} {seconds[name]:.1f} s" for name in ("encode", "decode", "load") if name in seconds]
    return f"{sum(seconds.values()):.1f} s: {', '.join(parts)}"


def warn_of_left_out(left_out: Mapping[Path, Exception]) -> None:
    """Warn of the priors that can't be used."""
    for directory, error in left_out.items():
        log.warning(f"left out: {_one_line(error, naming=directory)}")


def report_failed_clips(
    failed: Mapping[Path, Exception], total: int, *, folder: Path, left_out: Mapping[Path, Exception]
) -> None:
    """Report the clips that a sweep could not make; an error that several clips share is logged once.

    Raises:
        RunError: a clip failed, or a prior was left out.
    """
    clips: dict[int, list[Path]] = {}  # the clips of each error, by its id
    for path, error in failed.items():
        clips.setdefault(id(error), []).append(path)
    for path, *others in clips.values():
        more = f" and {len(others)} others" if others else ""
        log.warning(f"{path.name}{more} failed: {_one_line(failed[path])}")
    parts = [f"{len(failed)} of {total} clips failed"] if failed else []
    parts += [f"{len(left_out)} priors were left out"] if left_out else []
    if parts:
        raise RunError(
            f"{' and '.join(parts)}, see above; the others are in {folder}; the same command tries only "
            "these again"
        )


def _one_line(error: Exception, *, naming: Path | None = None) -> str:
    """Return an error's message in one line, preceded by the folder unless the message names it."""
    text = " ".join(str(error).split())[:200] or type(error).__name__
    return text if naming is None or str(naming) in text else f"{naming}: {text}"
