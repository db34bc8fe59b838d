"""Make the clips of a sweep; a single clip is a sweep of one.

    plan_sweep   plans and names the clips, and finds those that exist
    make_sweep   makes the missing clips: for each set of weights it checks all inputs, then a machine (this
                 process or a cluster) loads the model and makes the clips
    ClipRun      makes the clips of one loaded model, one after the other

A clip that fails doesn't stop the others. This module imports neither Ray nor the page; the caller passes
both in.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import math
import traceback
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from tqdm import tqdm

from step_skip.errors import JOB_ERRORS, InputError, RunError, TakenError
from step_skip.files.writing import check_folder
from step_skip.infer.as_prior import check_clip_prior
from step_skip.infer.choices import Choices
from step_skip.infer.clip import Clip, make_clip, run_plan
from step_skip.infer.inputs import (
    encode_identity,
    encode_new,
    encode_text,
    load_inputs,
    release_inputs,
    unknown_texts,
)
from step_skip.infer.measures import describe_measures
from step_skip.infer.plan import needed_components, settings_of
from step_skip.infer.warnings import warn_before_run
from step_skip.media.videos import video_bytes
from step_skip.models.families import MODELS
from step_skip.models.loading import Model, load_logged, loaded_first
from step_skip.models.lora import describe_loras, distilled_hint, find_recorded_loras, loras_of
from step_skip.models.lora_file import Lora
from step_skip.models.machine import pick_device
from step_skip.models.memory import check_download, describe_peak, log_memory_of_modes, peak_memory
from step_skip.models.weights import (
    COMPONENTS,
    ENCODERS,
    EXPERTS,
    SKIP_BRANCH,
    LoadOptions,
    model_defaults,
)
from step_skip.pipeline.results import Clock
from step_skip.prior.checks import check_fingerprint, check_model
from step_skip.prior.contexts import ContextStore
from step_skip.prior.preview import check_own_preview, check_previewable, preview_to
from step_skip.prior.prior import Prior, bytes_of_prior, experts_of
from step_skip.sweep.clips import Group, Job, all_jobs, by_weights, make_groups
from step_skip.sweep.cost import components_to_load, expected_seconds_of_each, summarize_jobs
from step_skip.sweep.finished import find_existing, settle_single
from step_skip.sweep.outputs import free_path, sweep_folder
from step_skip.sweep.progress import (
    describe_seconds,
    log_auto,
    log_what_runs,
    report_failed_clips,
    warn_of_left_out,
)

if TYPE_CHECKING:
    from PIL.Image import Image

    from step_skip.pipeline.run import Pause

    OnMade = Callable[[Path, Sequence[Image]], object]
    Page = Callable[[Path, Sequence[str]], contextlib.AbstractContextManager[OnMade]]

log = logging.getLogger(__name__)


# --- planning the clips -------------------------------------------------------------------------------------


@dataclass(kw_only=True)
class Sweep:
    """The requested clips, and the errors so far."""

    groups: list[Group]
    left_out: dict[Path, Exception]  # the errors of priors that can't be used, by folder
    failed: dict[Path, Exception] = field(default_factory=dict)  # errors by clip
    is_single: bool  # one clip that isn't in a sweep's folder; its error is raised unchanged

    @property
    def jobs(self) -> list[Job]:
        """The jobs of all groups, in order."""
        return all_jobs(self.groups)

    @property
    def folder(self) -> Path:
        """The folder of all clips."""
        return self.groups[0].jobs[0].folder

    @property
    def names(self) -> list[str]:
        """The names of the clips, in the requested order."""
        return [f"{job.name}.mp4" for job in self.jobs]

    @property
    def existing(self) -> int:
        """The number of clips that exist already."""
        return sum(job.exists for job in self.jobs)

    @property
    def contexts(self) -> Path | None:
        """The folder that stores encoded prompts for several priors; None: each prior stores its own."""
        several = len({id(group.prior) for group in self.groups}) > 1
        return self.folder if several and not self.is_single else None

    @property
    def missing(self) -> list[Group]:
        """The groups with only those clips that are still to be made."""
        failed = self.failed
        left = [
            [job for job in group.jobs if not (job.exists or (failed and job.path in failed))]
            for group in self.groups
        ]
        return [replace(group, jobs=jobs) for group, jobs in zip(self.groups, left, strict=True) if jobs]


def plan_sweep(
    directories: Iterable[Path],
    choices: Collection[Choices],
    *,
    output: Path | None = None,
    output_dir: Path | None = None,
    overwrite: bool = False,
    is_sweep: bool = False,
    nearest: bool = False,
    preview: bool = False,
    save_prior: bool = False,
    any_model: bool = False,
) -> Sweep:
    """Plan every prior with every choice, and find the clips that exist. No tensor is read.

    Args:
        directories: the folders of the priors.
        choices: the choices of each clip.
        output: the name of a single clip; None: one in the prior's outputs folder.
        output_dir: the folder of a sweep; None: one in the first prior's outputs folder.
        overwrite: make a clip even if it exists.
        is_sweep: put the clips into a folder of their own, even a single one.
        nearest: let each clip follow the nearest of the priors that begin alike.
        preview: write a moving preview beside each clip while it is made.
        save_prior: also save the single clip as a prior.
        any_model: accept priors of custom pipelines, whose model has no name here.

    Raises:
        InputError: no prior can be used, or the output doesn't fit the number of clips.
    """
    groups, left_out = make_groups(
        directories,
        choices,
        output=output,
        output_dir=output_dir,
        overwrite=overwrite,
        is_sweep=is_sweep,
        nearest=nearest,
        any_model=any_model,
    )
    jobs = all_jobs(groups)
    is_single = not is_sweep and len(jobs) == 1 and not left_out
    sweep = Sweep(groups=groups, left_out=left_out, is_single=is_single)
    warn_of_left_out(left_out)
    for job in jobs if preview else ():
        check_previewable(job.prior)
        job.preview = True
    if save_prior:
        if not is_single:
            raise InputError(
                "--save_prior is for one clip, not for a sweep: leave it out, or ask for one clip"
            )
        check_clip_prior(jobs[0].plan, jobs[0].prior)
        check_folder(jobs[0].prior.directory.parent, bytes_of_prior(jobs[0].prior))
        jobs[0].save_prior = True
    log_auto(groups)
    if is_single:
        settle_single(groups[0], output=output, overwrite=overwrite)
        if preview and output is not None and not overwrite:
            check_own_preview(output.with_suffix(".webp"))
    if not overwrite:
        sweep.failed = find_existing(groups)
    return sweep


# --- making the missing clips -------------------------------------------------------------------------------


class Machine(Protocol):
    """A machine that makes clips: this process (`ThisProcess`) or a cluster (`cluster.clips.ClipCluster`)."""

    model: Model | None  # a loaded model; None: each set of weights is loaded when it is needed
    is_here: bool  # the device belongs to this process

    def device_of(self, model: str) -> str:
        """Return the device that a model will run on, "cuda" for example.

        Raises:
            InputError: the device does not exist.
        """

    def make(
        self,
        groups: Sequence[Group],
        options: LoadOptions,
        *,
        contexts: Path | None,
        on_made: OnMade | None,
    ) -> dict[Path, Exception]:
        """Make the clips of groups that need the same weights; return the errors by clip.

        Args:
            contexts: the folder that stores encoded prompts for all; None: each prior stores its own.
            on_made: called with the path and the frames of each clip that is written.

        Raises:
            InputError: weights are missing, or no prior was made with them.
            RunError: weights could not be downloaded.
        """


def make_sweep(
    sweep: Sweep,
    machine: Machine,
    *,
    vram: str = "auto",
    model_dir: Path | None = None,
    recorded_loras: bool = False,
    page: Page | None = None,
) -> None:
    """Make the missing clips, one set of weights after the other, and report the failures.

    Args:
        vram, model_dir: see `LoadOptions`; ignored if the machine's model is loaded already.
        recorded_loras: find the LoRAs that the priors record, which may have moved, and check them.
        page: updates the page of the sweep's folder; see `page.page.running_page`.

    Raises:
        InputError, RunError: the error of a single clip; for a sweep, no clip can be made or, at the end,
            some clips failed.
    """
    missing = sweep.missing
    batches = by_weights(missing) if machine.model is None else [missing] if missing else []
    if sweep.is_single and sweep.existing:
        log.info("the clip exists with the same choices and is complete: nothing to do")
    is_announced = False
    for batch in batches:
        try:
            options, unusable = prepare(batch, machine, vram, model_dir, recorded_loras=recorded_loras)
            sweep.failed |= unusable
            usable = [group for group in batch if group.jobs[0].path not in unusable]
            if not is_announced:
                check_folder(sweep.folder, bytes_of_clips(missing))
                log_what_runs(missing, existing=None if sweep.is_single else sweep.existing)
                is_announced = True
            with page_of(sweep, page) as on_made:
                sweep.failed |= machine.make(usable, options, contexts=sweep.contexts, on_made=on_made)
        except (InputError, RunError) as error:
            if len(batches) == 1:
                raise
            sweep.failed |= {job.path: error for job in all_jobs(batch)}
    if not missing and sweep.existing:
        with page_of(sweep, page):
            pass
    if sweep.is_single and sweep.failed:
        raise next(iter(sweep.failed.values()))
    if not sweep.is_single:
        report_failed_clips(sweep.failed, len(sweep.jobs), folder=sweep.folder, left_out=sweep.left_out)


@contextlib.contextmanager
def page_of(sweep: Sweep, page: Page | None) -> Iterator[OnMade | None]:
    """Lock a sweep's folder and keep its page up to date; a single clip has neither folder nor page."""
    if sweep.is_single:
        yield None
        return
    with sweep_folder(sweep.folder):
        if page is None:
            yield None
            return
        with page(sweep.folder, sweep.names) as on_made:
            yield on_made


def bytes_of_clips(groups: Iterable[Group]) -> int:
    """Return a safe upper bound of the clips' size on disk, in bytes."""
    sizes = ((len(group.jobs), settings_of(group.jobs[0].plan, group.prior).size) for group in groups)
    return sum(number * video_bytes(size) for number, size in sizes) + 2**20


def prepare(
    groups: Sequence[Group],
    machine: Machine,
    vram: str,
    model_dir: Path | None,
    *,
    recorded_loras: bool,
) -> tuple[LoadOptions, dict[Path, Exception]]:
    """Run all checks that need no weights, and log the warnings.

    Args:
        groups: groups that need the same weights.

    Returns:
        The options to load the model with, and the errors of the first priors, by clip.

    Raises:
        InputError: the device, the LoRAs or all priors can't be used.
    """
    jobs = all_jobs(groups)
    device = machine.device_of(jobs[0].plan.model)
    loras = find_loras(groups) if recorded_loras else loras_of(jobs[0].plan.lora)
    dtype, failed = check_first_prior(groups)
    if machine.model is None:
        options = load_options(
            groups, device=device, dtype=dtype, vram=vram, model_dir=model_dir, loras=loras
        )
    else:
        options = machine.model.options
    warn_before_run(((job.plan, job.prior) for job in jobs), options, is_here=machine.is_here)
    new_loras = not recorded_loras and any(job.plan.cfg_scale != 1 for job in jobs)
    if new_loras and (hint := distilled_hint(loras)):
        log.info(hint)
    return options, failed


def find_loras(groups: Sequence[Group]) -> tuple[Lora, ...]:
    """Return the LoRAs that priors record, and describe them in the plans as they are now.

    Raises:
        InputError: see `find_recorded_loras`.
    """
    loras = find_recorded_loras(groups[0].jobs[0].plan.lora)
    described = describe_loras(loras)
    for job in all_jobs(groups):
        if job.plan.lora != described:
            job.plan = replace(job.plan, lora=described)
    return loras


def check_first_prior(groups: Sequence[Group]) -> tuple[str, dict[Path, Exception]]:
    """Check the schedule, files and tensors of the first prior, before any weights are loaded.

    Returns:
        The dtype of the latents of the first usable prior, and the errors of those before it, by clip.

    Raises:
        InputError: no prior can be used; the first one's error.
    """
    failed: dict[Path, Exception] = {}
    for group in groups:
        try:
            return load_inputs(group, group.plans), failed
        except InputError as error:
            failed |= {job.path: error for job in group.jobs}
            release_inputs(group)
    raise next(iter(failed.values()))


def load_options(
    groups: Sequence[Group],
    *,
    device: str,
    dtype: str,
    vram: str,
    model_dir: Path | None,
    loras: tuple[Lora, ...],
) -> LoadOptions:
    """Return the options to load a model for these clips with; their size is that of the largest clip."""
    plan = groups[0].jobs[0].plan
    settings = [settings_of(group.jobs[0].plan, group.prior) for group in groups]
    return LoadOptions(
        model=plan.model,
        device=device,
        dtype=dtype,
        vram=vram,
        model_dir=model_dir,
        loras=loras,
        quantize=plan.quantize,
        compile=plan.compile,
        size=max((each.size for each in settings), key=math.prod),
        tiled=all(each.tiled for each in settings),
    )


def log_what_it_takes(sweep: Sweep, *, device: str | None, vram: str, model_dir: Path | None) -> None:
    """Log the expected cost of the missing clips: time, memory, parts to load, files to download.

    Args:
        device: the device to assume; None: CUDA for a published model, even if this machine has none.
    """
    batches = by_weights(sweep.missing)
    needed = [components_to_load(batch, sweep.contexts) for batch in batches]
    loaded = ", ".join(dict.fromkeys(itertools.chain(*needed))) or "nothing"
    summary = summarize_jobs(all_jobs(sweep.missing))
    log.info(f"{summary}; {sweep.existing} exist already; would load {loaded}")
    for batch, components in zip(batches, needed, strict=True):
        plan = batch[0].jobs[0].plan
        usual = "cuda" if plan.model in MODELS else "cpu"
        options = load_options(
            batch,
            device=usual if device is None else pick_device(plan.model, device),
            dtype=plan.dtype or model_defaults(plan.model, model_dir).dtype,
            vram=vram,
            model_dir=model_dir,
            loras=loras_of(plan.lora),
        )
        check_download(options, components)
        log_memory_of_modes(options, loaded_first(components))


# --- in this process ----------------------------------------------------------------------------------------


@dataclass
class ThisProcess:
    """A machine that makes clips one after the other in this process.

    Args:
        device: the device to load models on; None: CUDA if available.
        model: a loaded model to use; None: models are loaded when needed.
    """

    device: str | None = None
    model: Model | None = None
    is_here: bool = True

    def device_of(self, model: str) -> str:
        """Return the device that a model will run on; see `Machine`."""
        return pick_device(model, self.device) if self.model is None else self.model.options.device

    def make(
        self,
        groups: Sequence[Group],
        options: LoadOptions,
        *,
        contexts: Path | None = None,
        on_made: OnMade | None = None,
    ) -> dict[Path, Exception]:
        """Load the needed parts of the model and make every clip; see `Machine`."""
        from step_skip.models.loading import release

        clock, store = Clock(), ContextStore(contexts)
        failed: dict[Path, Exception] = {}
        if self.model is None:

            def check(found: Mapping[str, str]) -> None:
                failed.update(check_weights(groups, lambda prior: check_fingerprint(prior, found)))

            model = load_logged(options, components_of(groups, store), check=check, by_expert=True)
        else:
            model = self.model
            failed.update(check_weights(groups, lambda prior: check_model(model, prior)))
        usable = [group for group in groups if group.jobs[0].path not in failed]
        clock.add("load")
        for group in usable:
            for text in unknown_texts(group, group.texts, store):
                encode_text(group.prior, text, model, store)
            encode_identity(group, group.plans, model)
        if self.model is None:
            release(model.pipe, ENCODERS)
        clock.add("encode")
        number = len(all_jobs(usable))
        share = {phase: clock.seconds[phase] / number for phase in ("load", "encode")}
        ClipRun(model, store, share, failed, on_made).make_all(usable)
        log.info(describe_peak(peak_memory(options.device)))
        return failed


def components_of(groups: Sequence[Group], store: ContextStore) -> list[str]:
    """Return the parts of the model that clips need."""
    needed: set[str] = set()
    for group in groups:
        known = set(group.texts).difference(unknown_texts(group, group.texts, store))
        needed |= {name for plan in group.plans for name in needed_components(plan, group.prior, known=known)}
    return [name for name in (*COMPONENTS, SKIP_BRANCH) if name in needed]


def check_weights(groups: Sequence[Group], check: Callable[[Prior], object]) -> dict[Path, Exception]:
    """Check the weights against every prior; return the errors of priors with other weights, by clip.

    Args:
        check: raises InputError for a prior that was made with other weights.

    Raises:
        InputError: no prior was made with these weights.
    """
    failed: dict[Path, Exception] = {}
    for group in groups:
        try:
            check(group.prior)
        except InputError as error:
            failed |= {job.path: error for job in group.jobs}
    if failed.keys() >= {group.jobs[0].path for group in groups}:
        raise next(iter(failed.values()))
    return failed


@dataclass
class ClipRun:
    """A run that makes clips on one loaded model and notes the error of each that fails."""

    model: Model
    store: ContextStore
    share: dict[str, float]  # each clip's share of the seconds of loading and encoding, by phase
    failed: dict[Path, Exception]
    on_made: OnMade | None = None
    pauses: dict[Path, Pause] = field(default_factory=dict)  # the states of clips that wait for an expert

    def make_all(self, groups: Sequence[Group]) -> None:
        """Make every clip; with two experts, the first runs its steps of all clips, then the second."""
        jobs = all_jobs(groups)
        costs = expected_seconds_of_each(jobs) or [job.plan.forwards + 1 for job in jobs]
        bar_format = "{desc}{percentage:3.0f}%|{bar}| {elapsed}<{remaining}"
        with tqdm(total=sum(costs), smoothing=0, bar_format=bar_format, disable=len(jobs) == 1) as bar:
            for expert in self.model.experts or [None]:
                if expert is not None:
                    self.share["load"] += self.model.use_expert(expert) / len(jobs)
                numbered = zip(itertools.count(1), costs, strict=False)
                for group in groups:
                    self.get_ready(group)
                    for job, (number, cost) in zip(group.jobs, numbered, strict=False):
                        bar.set_description(f"clip {number} of {len(jobs)}", refresh=False)
                        part = share_of_expert(group, job, expert)
                        if part and job.path not in self.failed:
                            with self.noting_errors([job.path]):
                                self.make(group, job, expert)
                        bar.update(cost * part)
                    release_inputs(group)

    @contextlib.contextmanager
    def noting_errors(self, paths: Collection[Path]) -> Iterator[None]:
        """Note an error as the reason why these clips can't be made, and continue."""
        from step_skip.models.loading import release

        try:
            yield
        except JOB_ERRORS as error:
            traceback.clear_frames(error.__traceback__)  # release the tensors in them for the next clip
            self.failed.update(dict.fromkeys(paths, error))
            release(self.model.pipe, ())

    def get_ready(self, group: Group) -> None:
        """Read the inputs that a prior provides for its clips, and encode the missing ones."""
        left = [path for job in group.jobs if (path := job.path) not in self.failed]
        with self.noting_errors(left):
            if left:
                load_inputs(group, group.plans)
                encode_new(group, group.plans, self.model, self.store)

    def make(self, group: Group, job: Job, expert: str | None) -> None:
        """Make one clip and write it, or run the steps of its first expert.

        Args:
            expert: the expert that is loaded, if the model loads its two experts in turn.
        """
        from step_skip.pipeline.run import Pause

        experts = experts_of(job.plan.steps_to_run, job.plan.sigmas, group.prior)
        pause, callback = self.pauses.pop(job.path, None), None
        if job.preview:
            job.path.parent.mkdir(parents=True, exist_ok=True)
            callback = preview_to(job.prior, job.path.with_suffix(".webp"))
        if pause is None and expert is not None and len(set(experts)) > 1:
            self.pauses[job.path] = pause = Pause(experts.count(expert))
            run_plan(group, job.plan, self.model.pipe, callback=callback, pause=pause)
            return
        clip = make_clip(group, job.plan, self.model, callback=callback, pause=pause)
        clip.seconds |= self.share
        error = save_prior_of(clip) if job.save_prior else None
        save_clip(clip, job, self.on_made)
        if error is not None:
            raise error


def share_of_expert(group: Group, job: Job, expert: str | None) -> float:
    """Return the share of a clip's steps that an expert runs; None: the model has one network."""
    experts = experts_of(job.plan.steps_to_run, job.plan.sigmas, group.prior)
    if expert is None or not experts:
        return float(expert in (None, EXPERTS[0]))
    return experts.count(expert) / len(experts)


# --- writing a clip -----------------------------------------------------------------------------------------


class Savable(Protocol):
    """A clip of this process (`infer.clip.Clip`) or of a worker (`cluster.clips.FinishedClip`)."""

    frames: list[Image]
    forwards: int
    seconds: dict[str, float]
    report: dict[str, Any]

    def save(self, path: Path, *, overwrite: bool = False) -> object: ...


def save_prior_of(clip: Clip) -> Exception | None:
    """Save a clip as a prior beside the one it followed; return the error, so that the clip is kept."""
    followed = Path(clip.report["prior_dir"])
    try:
        if clip.report["apart"] == 0:
            saved = followed
            log.info(f"{followed}: the clip has this prior's own prompt, so this is already its prior")
        else:
            saved = clip.save_prior(followed.parent).directory
            log.info(f"{saved}: the clip as a prior")
    except JOB_ERRORS as error:
        return error
    clip.report["saved_prior"] = str(saved.absolute())
    return None


def save_clip(clip: Savable, job: Job, on_made: OnMade | None) -> None:
    """Write a clip under its job's name, and log its cost and measures."""
    while True:
        try:
            clip.save(job.path, overwrite=job.overwrite)
            break
        except TakenError:  # another run has written a file with this name
            job.path = free_path(job.path)
    log.info(f"{job.path}: {clip.forwards} forwards, {describe_seconds(clip.seconds, prior=job.prior)}")
    if measures := describe_measures(clip.report):
        log.info(", ".join(measures))
    if on_made is not None:
        on_made(job.path, clip.frames)
