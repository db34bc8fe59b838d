"""Finish a prior that was interrupted, stopped or damaged, as the run that was begun would have."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from step_skip.errors import InputError
from step_skip.files.writing import locked
from step_skip.generate.generate import pipeline_images
from step_skip.generate.run import Left, run_what_is_left, what_is_left
from step_skip.models.families import MODEL_NAMES
from step_skip.models.loading import Model
from step_skip.models.machine import differences_since
from step_skip.pipeline.results import Clock
from step_skip.pipeline.settings import CHEAPER_NAMES, choose_cheaper
from step_skip.prior.checks import check_model, check_progress
from step_skip.prior.files import check_files
from step_skip.prior.metadata import read_run
from step_skip.prior.pictures import read_own_image
from step_skip.prior.prior import Prior
from step_skip.prior.writer import PriorWriter

if TYPE_CHECKING:
    from PIL.Image import Image

    from step_skip.pipeline.schedulers import ProgressCallback


# --- whether it can go on here ------------------------------------------------------------------------------


def read_resumable(directory: Path) -> Prior:
    """Read a prior that is to be finished.

    Raises:
        InputError: it lacks what an undisturbed run depends on, or says something impossible.
    """
    try:
        prior = read_run(directory)
        check_progress(prior)
        model = prior.metadata["model"]
        if model not in MODEL_NAMES:
            raise InputError(f"it was begun with the model {model!r}, which this version doesn't know")
        choose_cheaper(model, **{name: prior.metadata[name] for name in CHEAPER_NAMES})
    except InputError as error:
        raise InputError(f"{directory} cannot be resumed: {error}") from error
    return prior


def check_same_machine(prior: Prior, device: str) -> None:
    """Refuse to go on where the remaining steps would differ from an undisturbed run's in the last bits.

    Raises:
        InputError: other versions, another device, or on a CPU another number of threads.
    """
    threads = ["num_threads"] if device == "cpu" else []
    names = ["torch", "diffsynth", "device_name", "attention", *threads]
    for name, now, then in differences_since(prior.metadata, device, names):
        raise InputError(
            f"{name} is {now} here and was {then!r} when {prior.directory} was begun, so "
            "the rest would differ from an undisturbed run's; resume it where it was, or make it again"
        )


def read_own_images(prior: Prior) -> dict[str, Image]:
    """The images as the model saw them, from the prior itself, to begin a run again; by the pipeline's names.

    Raises:
        InputError: one is damaged, or the run began with a video, too, which the prior doesn't hold.
    """
    if prior.metadata["denoising_strength"] < 1:
        raise InputError(
            f"{prior.directory} was interrupted before the noised input video was saved: make it again"
        )
    return pipeline_images({name: read_own_image(prior, name) for name in prior.image_files})


def finish(
    directory: Path,
    model: Model,
    *,
    on_begin: Callable[[Path], object] | None,
    callback: ProgressCallback | None,
) -> tuple[Prior, int]:
    """Finish a prior that was interrupted; returns it and how many steps ran.

    Raises:
        InputError: it can't be finished as the run that was begun would have.
    """
    with locked(directory):
        prior = read_begun(directory, model.options.device)
        check_model(model, prior)
        left = what_is_left(prior)
        start = read_own_images(prior) if left.start_step is None else None
        if on_begin is not None:
            on_begin(directory)
        made = go_on(prior, left, model=model, start=start, clock=Clock(), callback=callback)
    return made, len(left.steps)


def read_begun(directory: Path, device: str) -> Prior:
    """Read a prior that is to be finished on a device, or that lacks something.

    Raises:
        InputError: it can't be, as far as can be told without a model.
    """
    prior = read_resumable(directory)
    check_finishable(prior, device)
    return prior


def check_finishable(prior: Prior, device: str) -> None:
    """Refuse to finish a prior that lacks what can't be made again, or would come out otherwise here.

    Raises:
        InputError: with what it is.
    """
    from step_skip.prior.checks import check_installed_schedule

    if prior.is_complete:
        check_files(prior, prior.image_files)
    check_same_machine(prior, device)
    check_installed_schedule(prior)


def go_on(
    prior: Prior,
    left: Left,
    *,
    model: Model | None,
    start: Mapping[str, Any] | None,
    clock: Clock,
    callback: ProgressCallback | None = None,
) -> Prior:
    """Run what is left of a prior whose folder is locked; see `run_what_is_left`."""
    clock.include(prior.metadata.get("seconds", {}))
    writer = PriorWriter(prior.directory, dict(prior.metadata))
    run_what_is_left(writer, left, model=model, start=start, clock=clock, callback=callback)
    return writer.prior
