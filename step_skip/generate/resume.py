"""Finish a prior that was interrupted, stopped or damaged, as the run that was begun would have."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from step_skip.errors import InputError
from step_skip.files.writing import check_folder, locked
from step_skip.generate.generate import pipeline_images
from step_skip.generate.plan import bytes_needed
from step_skip.generate.run import Left, run_what_is_left, what_is_left
from step_skip.models.families import MODEL_NAMES
from step_skip.models.loading import Model, load_logged
from step_skip.models.lora import find_recorded_loras
from step_skip.models.machine import differences_since, pick_device
from step_skip.models.weights import LoadOptions, model_defaults
from step_skip.pipeline.results import Clock
from step_skip.pipeline.settings import CHEAPER_NAMES, choose_cheaper
from step_skip.prior.checks import check_fingerprint, check_model, check_progress
from step_skip.prior.files import check_files
from step_skip.prior.metadata import read_run
from step_skip.prior.pictures import read_own_image
from step_skip.prior.prior import Prior
from step_skip.prior.writer import PriorWriter

if TYPE_CHECKING:
    from PIL.Image import Image

    from step_skip.pipeline.schedulers import ProgressCallback

log = logging.getLogger(__name__)


def finish_prior(
    directory: Path,
    model: Model | None = None,
    *,
    device: str | None = None,
    vram: str = "auto",
    model_dir: Path | None = None,
    on_begin: Callable[[Path], object] | None = None,
    callback: ProgressCallback | None = None,
) -> tuple[Prior, int | None]:
    """Run what is left of a prior, and make again what was damaged.

    Args:
        directory: the prior's folder.
        model: to run on; None: the one that the prior records is loaded, where it is needed.
        device, vram, model_dir: of a model that is loaded; device None: the one the prior was begun on.
        on_begin: called with the folder once all that can be checked before the run is checked.
        callback: called after each step.

    Returns:
        The prior, and how many steps ran; None: it was complete and undamaged.

    Raises:
        InputError: it can't be finished as the run that was begun would have.
        RunError: latents became NaN or infinite, or weights could not be fetched.
    """
    read_resumable(directory)  # what is wrong with the folder comes before its lock
    with locked(directory):
        prior = read_resumable(directory)
        left = what_is_left(prior)
        if prior.is_complete and not left.damaged and not left.components:
            log.info(f"{directory} is complete and undamaged: nothing to do")
            return prior, None
        if model is None:
            device = pick_device(prior.metadata.model, device or prior.metadata.device)
        else:
            device = model.options.device
        check_finishable(prior, device)
        check_folder(directory, bytes_needed(prior, videos=len(left.videos)))
        start = read_own_images(prior) if left.start_step is None else None
        log.info(f"{len(left.steps)} of {prior.num_inference_steps} steps are left to run")
        clock = Clock()
        if model is not None:
            check_model(model, prior)
        elif left.components:
            model = load_recorded(prior, left, device=device, vram=vram, model_dir=model_dir)
        clock.add("load")
        clock.include(prior.metadata.seconds)
        if on_begin is not None:
            on_begin(directory)
        writer = PriorWriter(directory, prior.metadata)
        run_what_is_left(writer, left, model=model, start=start, clock=clock, callback=callback)
        return writer.prior, len(left.steps)


def load_recorded(prior: Prior, left: Left, *, device: str, vram: str, model_dir: Path | None) -> Model:
    """Load the parts of the model that are needed for what is left, as the prior records it.

    Raises:
        InputError: weights or LoRAs that are missing, or are not those that the prior was begun with.
        RunError: weights that could not be fetched.
    """
    m, settings = prior.metadata, prior.settings
    loras = find_recorded_loras(m.lora)
    options = LoadOptions(
        model=m.model,
        device=device,
        dtype=m.dtype or model_defaults(m.model, model_dir).dtype,
        vram=vram,
        model_dir=model_dir,
        loras=loras,
        quantize=m.quantize,
        compile=m.compile,
        size=settings.size,
        tiled=settings.tiled,
    )

    def check(found: Mapping[str, str]) -> None:
        check_fingerprint(prior, found)

    return load_logged(options, left.components, check=check, by_expert=True)


# --- whether it can go on here ------------------------------------------------------------------------------


def read_resumable(directory: Path) -> Prior:
    """Read a prior that is to be finished.

    Raises:
        InputError: it lacks what an undisturbed run depends on, or says something impossible.
    """
    try:
        prior = read_run(directory)
        check_progress(prior)
        model = prior.metadata.model
        if model not in MODEL_NAMES:
            raise InputError(f"it was begun with the model {model!r}, which this version doesn't know")
        choose_cheaper(model, **{name: getattr(prior.metadata, name) for name in CHEAPER_NAMES})
    except InputError as error:
        raise InputError(f"{directory} cannot be resumed: {error}") from error
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


def check_same_machine(prior: Prior, device: str) -> None:
    """Refuse to go on where the remaining steps would differ from an undisturbed run's in the last bits.

    Raises:
        InputError: other versions, another device, or on a CPU another number of threads.
    """
    threads = ["num_threads"] if device == "cpu" else []
    names = ["torch", "diffsynth", "device_name", "attention", *threads]
    for name, now, then in differences_since(prior.metadata.machine, device, names):
        raise InputError(
            f"{name} is {now} here and was {then!r} when {prior.directory} was begun, so "
            "the rest would differ from an undisturbed run's; resume it where it was, or make it again"
        )


def read_own_images(prior: Prior) -> dict[str, Image]:
    """Read the images as the model saw them, to begin a run again; by the pipeline's names.

    Raises:
        InputError: one is damaged, or the run began with a video, too, which the prior doesn't hold.
    """
    if prior.metadata.denoising_strength < 1:
        raise InputError(
            f"{prior.directory} was interrupted before the noised input video was saved: make it again"
        )
    return pipeline_images({name: read_own_image(prior, name) for name in prior.image_files})
