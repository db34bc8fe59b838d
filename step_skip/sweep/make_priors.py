"""Make many priors; a single prior is a batch of one.

    plan_batch    plans the priors, and finds those that exist
    check_batch   runs the checks that need no weights: it decodes images and looks at priors that have begun
    make_batch    makes the missing priors on a machine: this process or a cluster

A prior that fails doesn't stop the others. This module doesn't import Ray; the caller passes a cluster in.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from step_skip.errors import JOB_ERRORS, InputError, RunError
from step_skip.files.writing import check_folder, locked
from step_skip.generate.choices import PriorChoices
from step_skip.generate.generate import generate_prior
from step_skip.generate.pictures import read_pictures
from step_skip.generate.resume import check_finishable, finish_prior, read_resumable
from step_skip.media.images import Picture
from step_skip.method.steps import recommended_num_steps
from step_skip.models.compute import check_compute
from step_skip.models.families import FAMILIES, MODELS
from step_skip.models.loading import Model, load_logged, loaded_first
from step_skip.models.lora import distilled_hint
from step_skip.models.machine import pick_device
from step_skip.models.memory import check_download, log_memory_of_modes
from step_skip.models.weights import LoadOptions, cache_components, model_defaults
from step_skip.pipeline.settings import RunSettings
from step_skip.prior.prior import END_IMAGE_FILE, IMAGE_FILE, Prior, bytes_of_steps
from step_skip.sweep.priors import PriorJob, bytes_of, forwards_of, make_jobs, plan_jobs
from step_skip.sweep.progress import Progress, each_warning_once

if TYPE_CHECKING:
    from collections.abc import Mapping

    from PIL.Image import Image

    from step_skip.pipeline.schedulers import ProgressCallback

    ReadVideo = Callable[[RunSettings], list[Image] | None]

log = logging.getLogger(__name__)


# --- planning the priors ------------------------------------------------------------------------------------


@dataclass(kw_only=True)
class Batch:
    """The requested priors, and the options of the model that makes them."""

    jobs: list[PriorJob]
    options: LoadOptions
    family: str
    output_dir: Path
    is_here: bool  # the priors are made in this process, not on a cluster

    @property
    def is_single(self) -> bool:
        """Whether a single prior is requested; its error is raised unchanged."""
        return len(self.jobs) == 1

    @property
    def missing(self) -> list[PriorJob]:
        """The priors that are still to be made and have no error so far."""
        return [job for job in self.jobs if not job.exists and job.error is None]

    @property
    def existing(self) -> int:
        """The number of priors that exist already."""
        return sum(job.exists for job in self.jobs)


def plan_batch(
    images: Sequence[Path],
    prompts: Sequence[str],
    choices: PriorChoices,
    *,
    options: LoadOptions,
    family: str,
    output_dir: Path,
    end_images: Sequence[Path] = (),
    seeds: Sequence[int] = (0,),
    run_ids: Sequence[str] = (),
    parameters: Mapping[str, str] | None = None,
    is_here: bool = True,
) -> Batch:
    """Plan a prior of every image, seed and prompt, and find those that exist. No weights are loaded.

    Args:
        images, prompts, end_images, seeds, run_ids: see `make_jobs`.
        options: the options to load the model with; device None: CUDA if available.
        parameters: the fingerprints of the parameters of a custom pipeline, which has no files.
        is_here: the priors are made in this process, not on a cluster, whose devices aren't known yet.

    Raises:
        InputError: a choice is invalid, or no prior can be made.
    """
    jobs = make_jobs(images, prompts, choices, end_images=end_images, seeds=seeds, run_ids=run_ids)
    if len({job.images.get(IMAGE_FILE) for job in jobs}) == 1:
        read_images(jobs[0], options, family)
    if parameters is None:
        device = pick_device(options.model, options.device) if is_here else "cpu"
        options = dataclasses.replace(options, device=device)
    check_compute(vram=options.vram, quantize=options.quantize, compile=options.compile)
    jobs = plan_jobs(jobs, options, family, output_dir, parameters=parameters)
    report_unusable(jobs, [job for job in jobs if not job.exists])
    return Batch(jobs=jobs, options=options, family=family, output_dir=output_dir, is_here=is_here)


def check_batch(batch: Batch, *, read_video: ReadVideo | None = None) -> None:
    """Run the checks that need no weights, and note the error of a prior in its job.

    Args:
        read_video: see `make_batch`.

    Raises:
        InputError: no prior can be made, or the output folder isn't writable.
    """
    missing = batch.missing
    if not missing:
        return
    check_folder(batch.output_dir, sum(map(bytes_of, missing)))
    if read_video is not None:
        read_video(missing[0].prior.settings)
    check_begun_priors(missing, batch.options, batch.family, is_here=batch.is_here)
    report_unusable(batch.jobs, missing)


def report_unusable(jobs: Sequence[PriorJob], looked_at: Sequence[PriorJob]) -> None:
    """Log the errors of the priors that were looked at.

    Raises:
        InputError: no prior at all can be made; the first one's error.
    """
    if errors := [job.error for job in jobs if job.error is not None]:
        if len(errors) == len(jobs):
            raise errors[0]
        for text in dict.fromkeys(describe_failure(job) for job in looked_at if job.error is not None):
            log.warning(text)


def check_begun_priors(jobs: Sequence[PriorJob], options: LoadOptions, family: str, *, is_here: bool) -> None:
    """Check whether each prior that has begun can be finished here.

    If none can, images are decoded until one of a new prior is usable.
    """
    begun = [job for job in jobs if job.directory is not None]
    for job in begun:
        try:
            check_begun(job, options.device if is_here else None)
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
    """Refuse to finish a prior that another process writes, or that would come out different here.

    Args:
        device: the device to finish the prior on; None: a cluster, which finishes no prior.

    Raises:
        InputError: names the reason and an alternative.
    """
    if job.directory is None:
        return
    if device is None:
        raise InputError(f"{job.directory} is incomplete, and a cluster can't finish it: run without --ray")
    with locked(job.directory):
        try:
            check_finishable(read_resumable(job.directory), device)
        except InputError as error:
            raise InputError(
                f"{job.directory} can't be finished here: remove it (prior_utils.py rm) or give another "
                f"--run_id; {error}"
            ) from error


def read_images(job: PriorJob, options: LoadOptions, family: str) -> None:
    """Decode the images of a prior to the model's input size, unless that was done.

    Raises:
        InputError: an image can't be used.
    """
    if job.pictures is None:
        given = {file: job.images.get(file) for file in (IMAGE_FILE, END_IMAGE_FILE)}
        defaults = model_defaults(options.model, options.model_dir)
        _, job.pictures = read_pictures(given, job.choices, defaults=defaults, family=FAMILIES[family])


def take_images(job: PriorJob, options: LoadOptions, family: str) -> tuple[PriorChoices, dict[str, Picture]]:
    """Return a prior's choices, with the size of its images, and the images, which the job releases.

    Raises:
        InputError: see `read_images`.
    """
    read_images(job, options, family)
    pictures, job.pictures = job.pictures or {}, None
    if IMAGE_FILE not in pictures:
        return job.choices, pictures
    image = pictures[IMAGE_FILE].image
    return dataclasses.replace(job.choices, width=image.width, height=image.height), pictures


# --- making the missing priors ------------------------------------------------------------------------------


class OnPrior(Protocol):
    """A callback that receives each prior and the number of steps that ran."""

    def __call__(self, prior: Prior, steps_run: int) -> object: ...


@dataclass(kw_only=True)
class PriorRun:
    """The priors that are made together, and the callbacks of their run."""

    jobs: list[PriorJob]
    options: LoadOptions  # with the size of the largest prior
    family: str
    components: list[str]
    output_dir: Path
    is_single: bool
    read_video: ReadVideo | None = None
    on_begin: Callable[[Path], object] | None = None
    on_made: OnPrior | None = None
    callback: ProgressCallback | None = None

    def input_video(self, job: PriorJob) -> list[Image] | None:
        """Return the frames that a prior starts from; None: it starts from noise."""
        return None if self.read_video is None else self.read_video(job.prior.settings)


class PriorMachine(Protocol):
    """A machine that makes priors: this process (`PriorProcess`) or `cluster.priors.PriorCluster`."""

    def device_of(self, options: LoadOptions) -> str:
        """Return the device that the model of a batch will run on, "cuda" for example."""

    def make(self, run: PriorRun) -> None:
        """Make the priors of a run; the error of one of several is noted in its job."""


def make_batch(
    batch: Batch,
    machine: PriorMachine,
    *,
    read_video: ReadVideo | None = None,
    on_begin: Callable[[Path], object] | None = None,
    on_made: OnPrior | None = None,
    callback: ProgressCallback | None = None,
) -> None:
    """Make the missing priors and finish those that have begun; errors are noted in the jobs.

    Args:
        read_video: returns the frames that a prior starts from, in the prior's size.
        on_begin: called with each prior's folder once `generate_prior.py --resume` could finish it.
        on_made: called with each prior that is finished.
        callback: called after each step.

    Raises:
        InputError, RunError: the error of the only prior; or weights are missing or can't be downloaded.
    """
    missing = batch.missing
    if not missing:
        return
    device = machine.device_of(batch.options)
    options, components = what_to_load(missing, dataclasses.replace(batch.options, device=device))
    run = PriorRun(
        jobs=missing,
        options=options,
        family=batch.family,
        components=components,
        output_dir=batch.output_dir,
        is_single=batch.is_single,
        read_video=read_video,
        on_begin=on_begin,
        on_made=on_made,
        callback=callback,
    )
    machine.make(run)


def what_to_load(jobs: Sequence[PriorJob], options: LoadOptions) -> tuple[LoadOptions, list[str]]:
    """Return options with the size of the largest prior, and the components that the priors need."""
    prior = jobs[0].prior
    if prior.settings.cfg_scale != 1 and (hint := distilled_hint(options.loras)):
        log.info(hint)
    largest = max((job.prior.settings.size for job in jobs), key=math.prod)
    options = dataclasses.replace(options, size=largest, tiled=all(job.prior.settings.tiled for job in jobs))
    return options, [*prior.family.components, *cache_components(prior.settings.skip_cache)]


def log_cost(batch: Batch) -> None:
    """Log the cost of the missing priors, the number that exist, and the cost of each new prompt."""
    to_do = batch.missing
    if batch.is_single and batch.existing:
        log.info("the prior exists with the same choices, and no file is missing: nothing to do")
    elif not batch.is_single or not to_do:
        size = sum(map(bytes_of, to_do)) / 1e9
        log.info(f"{len(to_do)} priors to make, at most {size:.1f} GB; {batch.existing} exist already")
    if not to_do:
        return
    prior = to_do[0].prior
    steps, forwards = prior.num_inference_steps, forwards_of(prior, whole=True)
    chosen = recommended_num_steps(steps)
    each = chosen if forwards == steps else 2 * chosen - 1
    log.info(
        f"{len(to_do)} x {steps} steps, {forwards} forwards and about {bytes_of_steps(prior) / 1e6:.0f} MB "
        f"each; a new prompt then takes {each} forwards, and prior_utils.py prune makes a prior smaller"
    )


def log_what_a_batch_takes(batch: Batch) -> None:
    """Log the expected cost of the missing priors: disk, memory, parts to load, files to download.

    Raises:
        InputError: the folder isn't writable, or has too little space.
    """
    if missing := batch.missing:
        check_folder(batch.output_dir, sum(map(bytes_of, missing)))
        options, components = what_to_load(missing, batch.options)
        if not batch.is_here and options.model in MODELS:
            options = dataclasses.replace(options, device="cuda")
        check_download(options, components)
        log_memory_of_modes(options, loaded_first(components))


# --- in this process ----------------------------------------------------------------------------------------


@dataclass
class PriorProcess:
    """A machine that makes priors one after the other in this process.

    Args:
        model: a loaded model to use; None: it is loaded when needed.
    """

    model: Model | None = None

    def device_of(self, options: LoadOptions) -> str:
        """Return the device of the batch; see `PriorMachine`."""
        return options.device

    def make(self, run: PriorRun) -> None:
        """Load the model, unless one was given, and make the priors; see `PriorMachine`."""
        model = self.model or load_logged(run.options, run.components, by_expert=True)
        if run.is_single:
            make_one(run.jobs[0], model, run)
            return
        with each_warning_once(), Progress("prior", len(run.jobs), cost=sum(map(cost_of, run.jobs))) as bar:
            for job in run.jobs:
                cost = cost_of(job)
                with noting_error(job):
                    make_one(job, model, run)
                bar.add(cost)


@contextlib.contextmanager
def noting_error(job: PriorJob) -> Iterator[None]:
    """Note an error as the reason why a prior can't be made, and continue."""
    try:
        yield
    except JOB_ERRORS as error:
        traceback.clear_frames(error.__traceback__)  # release the tensors in them for the next prior
        job.error = error
        log.warning(describe_failure(job))


def make_one(job: PriorJob, model: Model, run: PriorRun) -> None:
    """Make a prior, or finish the prior that has begun."""
    if job.directory is not None:
        job.pictures = None
        prior, steps = finish_prior(job.directory, model, on_begin=run.on_begin, callback=run.callback)
    else:
        choices, pictures = take_images(job, model.options, model.family)
        prior = generate_prior(
            model,
            pictures.get(IMAGE_FILE),
            job.prompt,
            end_image=pictures.get(END_IMAGE_FILE),
            output_dir=run.output_dir,
            run_id=job.run_id,
            input_video=run.input_video(job),
            on_begin=run.on_begin,
            callback_on_step_end=run.callback,
            **dataclasses.asdict(choices),
        )
        job.directory, steps = prior.directory, len(prior.metadata.seconds_per_step)
    if run.on_made is not None:
        run.on_made(prior, steps or 0)


def describe_failure(job: PriorJob) -> str:
    """Describe in one line why a prior can't be made."""
    text = " ".join(str(job.error).split())[:200] or type(job.error).__name__
    return text if job.name in text else f"{job.name} failed: {text}"


def cost_of(job: PriorJob) -> int:
    """Return the cost of a prior's run relative to others: forwards times pixels."""
    settings = job.prior.settings
    return forwards_of(job.prior) * settings.height * settings.width * settings.num_frames


def report_failed_priors(jobs: Sequence[PriorJob], *, folder: Path | None) -> None:
    """Report the number of priors that could not be made; each error was logged when it occurred.

    Args:
        folder: the folder of the other priors; None: none was made, as in a dry run.

    Raises:
        RunError: some priors could not be made; for a single prior, its own error.
    """
    if len(jobs) == 1 and jobs[0].error is not None:
        raise jobs[0].error
    failed = sum(job.error is not None for job in jobs)
    if failed:
        others = f"; the others are in {folder}; the same command tries only these again" if folder else ""
        raise RunError(f"{failed} of {len(jobs)} priors failed, see above{others}")
