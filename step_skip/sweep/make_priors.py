"""Priors made one after the other on a loaded model, or gone on with; one that fails doesn't stop others."""

from __future__ import annotations

import dataclasses
import functools
import logging
import math
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from step_skip.errors import JOB_ERRORS, InputError, RunError
from step_skip.files.writing import locked
from step_skip.generate.choices import PriorChoices
from step_skip.generate.generate import generate_prior
from step_skip.generate.pictures import read_pictures
from step_skip.generate.resume import finish, read_begun
from step_skip.media.images import Picture
from step_skip.models.families import FAMILIES
from step_skip.models.loading import Model
from step_skip.models.lora import distilled_hint
from step_skip.models.weights import LoadOptions, cache_components, model_defaults
from step_skip.pipeline.settings import RunSettings
from step_skip.prior.prior import END_IMAGE_FILE, IMAGE_FILE, Prior
from step_skip.sweep.priors import PriorJob, forwards_of
from step_skip.sweep.progress import Progress, each_warning_once

if TYPE_CHECKING:
    from PIL.Image import Image

    from step_skip.pipeline.schedulers import ProgressCallback

    ReadVideo = Callable[[RunSettings], list[Image] | None]
    OnPrior = Callable[[Prior, int], object]

log = logging.getLogger(__name__)


def what_to_load(jobs: Sequence[PriorJob], options: LoadOptions) -> tuple[LoadOptions, list[str]]:
    """What to load for these priors: options with the size that takes most memory, and components."""
    prior = jobs[0].prior
    if prior.settings.cfg_scale != 1 and (hint := distilled_hint(options.loras)):
        log.info(hint)
    largest = max((job.prior.settings.size for job in jobs), key=math.prod)
    options = dataclasses.replace(options, size=largest, tiled=all(job.prior.settings.tiled for job in jobs))
    return options, [*prior.family.components, *cache_components(prior.settings.skip_cache)]


def read_images(job: PriorJob, options: LoadOptions, family: str) -> None:
    """Decode the images of a prior as the model will see them, unless that was done.

    Raises:
        InputError: one can't be used.
    """
    if job.pictures is None:
        given = {file: job.images.get(file) for file in (IMAGE_FILE, END_IMAGE_FILE)}
        defaults = model_defaults(options.model, options.model_dir)
        _, job.pictures = read_pictures(given, job.choices, defaults=defaults, family=FAMILIES[family])


def take_images(job: PriorJob, options: LoadOptions, family: str) -> tuple[PriorChoices, dict[str, Picture]]:
    """The images of a prior and its choices with their size; the job keeps none. See `read_images`."""
    read_images(job, options, family)
    pictures, job.pictures = job.pictures or {}, None
    if IMAGE_FILE not in pictures:
        return job.choices, pictures
    image = pictures[IMAGE_FILE].image
    return dataclasses.replace(job.choices, width=image.width, height=image.height), pictures


def check_first(
    jobs: Sequence[PriorJob], options: LoadOptions, family: str, *, on_cluster: bool = False
) -> None:
    """Before any weights are loaded, look whether each that has begun can be gone on with.

    If none can, images are decoded until there is a prior that can be made.
    """
    begun = [job for job in jobs if job.directory is not None]
    for job in begun:
        try:
            check_begun(job, None if on_cluster else options.device)
        except InputError as error:
            job.error = error
    if any(job.error is None for job in begun):
        return
    for job in jobs:
        try:
            if job.error is None:
                read_images(job, options, family)
                return
        except InputError as error:
            job.error = error


def check_begun(job: PriorJob, device: str | None) -> None:
    """Refuse to go on with a prior that another process writes, or that would come out otherwise here.

    Args:
        device: to go on with; None: those of a cluster, where none is gone on with.

    Raises:
        InputError: with what can be done instead.
    """
    if job.directory is None:
        return
    if device is None:
        raise InputError(f"{job.directory} isn't whole, and a cluster finishes none: do it without --ray")
    with locked(job.directory):
        try:
            read_begun(job.directory, device)
        except InputError as error:
            raise InputError(
                f"{job.directory} can't be finished here: remove it (prior_utils.py rm) or give another "
                f"--run_id; {error}"
            ) from error


def usable(jobs: Sequence[PriorJob], to_do: Sequence[PriorJob]) -> list[PriorJob]:
    """Those of the jobs to do that can be made, so far; tells of the others.

    Raises:
        InputError: there is no prior at all: the first one's error.
    """
    if errors := [job.error for job in jobs if job.error is not None]:
        if len(errors) == len(jobs):
            raise errors[0]
        for text in dict.fromkeys(describe_failure(job) for job in to_do if job.error is not None):
            log.warning(text)
    return [job for job in to_do if job.error is None]


def make_all(
    jobs: Sequence[PriorJob],
    model: Model,
    *,
    output_dir: Path,
    read_video: ReadVideo = lambda settings: None,
    on_begin: Callable[[Path], object] | None = None,
    on_made: OnPrior | None = None,
    callback: ProgressCallback | None = None,
    single: bool = False,
) -> None:
    """Make the prior of every job, or go on with it; why one can't be made is noted as its error.

    Args:
        read_video: the frames that a prior starts from, of its size, if there are any.
        on_begin: called with each prior's folder once it could be gone on with.
        on_made: called with each prior and the number of steps that ran.
        single: it was asked for alone, so that what goes wrong is raised.
    """
    run = functools.partial(
        make_one,
        model=model,
        output_dir=output_dir,
        read_video=read_video,
        on_begin=on_begin,
        on_made=on_made,
        callback=callback,
    )
    if single:
        run(jobs[0])
        return
    with each_warning_once(), Progress("prior", len(jobs), cost=sum(map(cost_of, jobs))) as progress:
        for job in jobs:
            cost = cost_of(job)
            if job.error is None:
                attempt(functools.partial(run, job), job)
            progress.add(cost)


def attempt(action: Callable[[], object], job: PriorJob) -> None:
    """Do something for a prior; where it fails, that is why it can't be made."""
    try:
        action()
    except JOB_ERRORS as error:
        traceback.clear_frames(error.__traceback__)  # they hold tensors the next needs room for
        job.error = error
        log.warning(describe_failure(job))


def describe_failure(job: PriorJob) -> str:
    """In one line why a prior can't be made."""
    text = " ".join(str(job.error).split())[:200] or type(job.error).__name__
    return text if job.name in text else f"{job.name} failed: {text}"


def cost_of(job: PriorJob) -> int:
    """What its run takes beside another's: forwards times pixels."""
    if job.error is not None:
        return 0
    settings = job.prior.settings
    return forwards_of(job.prior) * settings.height * settings.width * settings.num_frames


def make_one(
    job: PriorJob,
    model: Model,
    *,
    output_dir: Path,
    read_video: ReadVideo,
    on_begin: Callable[[Path], object] | None,
    on_made: OnPrior | None,
    callback: ProgressCallback | None,
) -> None:
    """Make a prior, or go on with the one that has begun."""
    if job.directory is not None:
        job.pictures = None
        prior, steps = finish(job.directory, model, on_begin=on_begin, callback=callback)
    else:
        choices, pictures = take_images(job, model.options, model.family)
        prior = generate_prior(
            model,
            pictures.get(IMAGE_FILE),
            job.prompt,
            end_image=pictures.get(END_IMAGE_FILE),
            output_dir=output_dir,
            run_id=job.run_id,
            input_video=read_video(job.prior.settings),
            on_begin=on_begin,
            callback_on_step_end=callback,
            **dataclasses.asdict(choices),
        )
        job.directory, steps = prior.directory, len(prior.metadata["seconds_per_step"])
    if on_made is not None:
        on_made(prior, steps)


def report_failed_priors(jobs: Sequence[PriorJob], *, folder: Path | None) -> None:
    """Tell how many of a sweep's priors could not be made; each was told of when it failed.

    Args:
        folder: where the others are; None: nowhere yet.

    Raises:
        RunError: some could not; or what is wrong with the only one.
    """
    if len(jobs) == 1 and jobs[0].error is not None:
        raise jobs[0].error
    failed = sum(job.error is not None for job in jobs)
    if failed:
        others = f"; the others are in {folder}; the same command tries only these again" if folder else ""
        raise RunError(f"{failed} of {len(jobs)} priors failed, see above{others}")
