"""Many videos on one loaded model: only the parts that they need, and of two experts one after the other."""

from __future__ import annotations

import functools
import itertools
import logging
import math
import traceback
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from tqdm import tqdm

from step_skip.errors import JOB_ERRORS, InputError, TakenError
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
from step_skip.models.loading import Model, load_told
from step_skip.models.lora_file import Lora
from step_skip.models.memory import describe_peak, peak_memory
from step_skip.models.weights import COMPONENTS, ENCODERS, EXPERTS, SKIP_BRANCH, LoadOptions
from step_skip.pipeline.results import Clock
from step_skip.prior.checks import check_fingerprint
from step_skip.prior.contexts import ContextStore
from step_skip.prior.preview import preview_to
from step_skip.prior.prior import experts_of
from step_skip.sweep.clips import Group, Job, all_jobs
from step_skip.sweep.cost import expected_seconds_of_each
from step_skip.sweep.outputs import free_path
from step_skip.sweep.progress import describe_seconds

if TYPE_CHECKING:
    from PIL.Image import Image

    from step_skip.pipeline.run import Pause

    OnMade = Callable[[Path, Sequence[Image]], None]

log = logging.getLogger(__name__)


class Savable(Protocol):
    """A video that was made here (`infer.Clip`), or on another machine (`cluster.MadeClip`)."""

    frames: list[Image]
    forwards: int
    seconds: dict[str, float]
    report: dict[str, Any]

    def save(self, path: Path, *, overwrite: bool = False) -> object: ...


def load_options(
    groups: Sequence[Group],
    *,
    device: str,
    dtype: str,
    vram: str,
    model_dir: Path | None,
    loras: tuple[Lora, ...],
) -> LoadOptions:
    """What to load for these jobs; the size is that of the one that takes most memory."""
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


def check_first(groups: Sequence[Group]) -> tuple[str, dict[Path, Exception]]:
    """Check the schedule, files and tensors of the first prior, before any weights are loaded.

    Returns:
        The dtype of its latents; and by video what is wrong with priors before it that can't be used.

    Raises:
        InputError: none can: the first one's.
    """
    failed: dict[Path, Exception] = {}
    for group in groups:
        try:
            return read_group(group), failed
        except InputError as error:
            failed |= {job.path: error for job in group.jobs}
            release_inputs(group)
    raise next(iter(failed.values()))


def read_group(group: Group) -> str:
    """Read what a prior or a bank gives to its videos, checked, and return the dtype of its latents.

    Raises:
        InputError: its schedule differs, or see `load_inputs`.
    """
    from step_skip.prior.checks import check_installed_schedule

    check_installed_schedule(group.prior)
    return load_inputs(group, group.plans)


def run_jobs(
    groups: Sequence[Group],
    *,
    options: LoadOptions,
    contexts: Path | None = None,
    on_made: OnMade | None = None,
) -> dict[Path, Exception]:
    """Load a model and make every video; one that fails doesn't stop the others.

    Args:
        groups: of priors that need the same weights, see `by_weights`.
        contexts: the folder that keeps encoded prompts for all; None: each prior its own.
        on_made: called with each video's path and frames once it is written.

    Returns:
        The errors of the videos that could not be made.

    Raises:
        InputError: weights that are missing, or are those that no prior was made with.
        RunError: weights that could not be fetched.
    """
    from step_skip.models.loading import release

    clock, store = Clock(), ContextStore(contexts)
    failed: dict[Path, Exception] = {}

    def check(found: Mapping[str, str]) -> None:
        failed.update(check_weights(groups, found))

    model = load_told(options, components_of(groups, store), check=check, by_expert=True)
    usable = [group for group in groups if group.jobs[0].path not in failed]
    clock.add("load")
    for group in usable:
        for text in unknown_texts(group, group.texts, store):
            encode_text(group.prior, text, model, store)
        encode_identity(group, group.plans, model)
    release(model.pipe, ENCODERS)
    clock.add("encode")
    number = len(all_jobs(usable))
    shared = {phase: clock.seconds[phase] / number for phase in ("load", "encode")}
    failed |= make_all(usable, model, store, shared, on_made)
    log.info(describe_peak(peak_memory(options.device)))
    return failed


def components_of(groups: Sequence[Group], store: ContextStore) -> list[str]:
    """The parts of the model that jobs need."""
    needed: set[str] = set()
    for group in groups:
        known = set(group.texts).difference(unknown_texts(group, group.texts, store))
        needed |= {name for plan in group.plans for name in needed_components(plan, group.prior, known=known)}
    return [name for name in (*COMPONENTS, SKIP_BRANCH) if name in needed]


def check_weights(groups: Sequence[Group], found: Mapping[str, str]) -> dict[Path, Exception]:
    """Compare weights with those of every prior; by video what is wrong with priors of others.

    Raises:
        InputError: none was made with these.
    """
    failed: dict[Path, Exception] = {}
    for group in groups:
        try:
            check_fingerprint(group.prior, found)
        except InputError as error:
            failed |= {job.path: error for job in group.jobs}
    if failed.keys() >= {group.jobs[0].path for group in groups}:
        raise next(iter(failed.values()))
    return failed


def make_all(
    groups: Sequence[Group],
    model: Model,
    store: ContextStore,
    shared: Mapping[str, float],
    on_made: OnMade | None = None,
) -> dict[Path, Exception]:
    """Make every video on a loaded model; of two experts the first takes its steps of all, then the second.

    Args:
        shared: each video's share of the seconds that loading and encoding took.

    Returns:
        The errors of the videos that could not be made.
    """
    jobs = all_jobs(groups)
    costs = expected_seconds_of_each(jobs) or [job.plan.forwards + 1 for job in jobs]
    failed: dict[Path, Exception] = {}
    pauses: dict[Path, Pause] = {}
    bar_format = "{desc}{percentage:3.0f}%|{bar}| {elapsed}<{remaining}"
    with tqdm(total=sum(costs), smoothing=0, bar_format=bar_format, disable=len(jobs) == 1) as bar:
        for expert in model.experts or [None]:
            if expert is not None:
                shared = {**shared, "load": shared["load"] + model.use_expert(expert) / len(jobs)}
            numbered = zip(itertools.count(1), costs, strict=False)
            for group in groups:
                paths = [path for job in group.jobs if (path := job.path) not in failed]
                attempt(functools.partial(get_ready, group, model, store), paths, failed, model)
                for job, (number, cost) in zip(group.jobs, numbered, strict=False):
                    bar.set_description(f"video {number} of {len(jobs)}", refresh=False)
                    share = share_of_expert(group, job, expert)
                    if share and job.path not in failed:
                        run = functools.partial(run_job, group, job, model=model, shared=shared)
                        run = functools.partial(run, expert=expert, pauses=pauses, on_made=on_made)
                        attempt(run, [job.path], failed, model)
                    bar.update(cost * share)
                release_inputs(group)
    return failed


def get_ready(group: Group, model: Model, store: ContextStore) -> None:
    """Read and complete what a prior gives to its videos."""
    read_group(group)
    encode_new(group, group.plans, model, store)


def attempt(
    action: Callable[[], None], paths: Collection[Path], failed: dict[Path, Exception], model: Model
) -> None:
    """Do something for these videos; where it fails, that is why they can't be made."""
    from step_skip.models.loading import release

    try:
        if paths:
            action()
    except JOB_ERRORS as error:
        traceback.clear_frames(error.__traceback__)  # they hold tensors the next needs room for
        failed.update(dict.fromkeys(paths, error))
        release(model.pipe, ())


def share_of_expert(group: Group, job: Job, expert: str | None) -> float:
    """The share of a video's steps that an expert takes; None: that there is one network."""
    experts = experts_of(job.plan.steps_to_run, job.plan.sigmas, group.prior)
    if expert is None or not experts:
        return float(expert in (None, EXPERTS[0]))
    return experts.count(expert) / len(experts)


def run_job(
    group: Group,
    job: Job,
    *,
    model: Model,
    shared: Mapping[str, float],
    expert: str | None,
    pauses: dict[Path, Pause],
    on_made: OnMade | None = None,
) -> None:
    """Make one video and write it, or run the steps of its first expert.

    Args:
        shared: this video's share of the seconds that loading and encoding took.
        expert: the one that is loaded, if there are two that take turns.
        pauses: by video, of those that have begun.
    """
    from step_skip.pipeline.run import Pause

    experts = experts_of(job.plan.steps_to_run, job.plan.sigmas, group.prior)
    pause, callback = pauses.pop(job.path, None), None
    if job.preview:
        job.path.parent.mkdir(parents=True, exist_ok=True)
        callback = preview_to(job.prior, job.path.with_suffix(".webp"))
    if pause is None and expert is not None and len(set(experts)) > 1:
        pauses[job.path] = pause = Pause(experts.count(expert))
        run_plan(group, job.plan, model.pipe, callback=callback, pause=pause)
        return
    clip = make_clip(group, job.plan, model, callback=callback, pause=pause)
    clip.seconds |= shared
    error = save_prior_of(clip) if job.save_prior else None
    save_clip(clip, job, on_made)
    if error is not None:
        raise error


def save_prior_of(clip: Clip) -> Exception | None:
    """Make a clip a prior, beside the one it followed; returns what went wrong: no clip is lost over it."""
    followed = Path(clip.report["prior_dir"])
    try:
        if clip.report["apart"] == 0:
            saved = followed
            log.info(f"{followed}: its own prompt, and so the clip's prior already")
        else:
            saved = clip.save_prior(followed.parent).directory
            log.info(f"{saved}: the clip as a prior")
    except JOB_ERRORS as error:
        return error
    clip.report["saved_prior"] = str(saved.absolute())
    return None


def save_clip(clip: Savable, job: Job, on_made: OnMade | None) -> None:
    """Write a video in its job's place, and say what it cost."""
    while True:
        try:
            clip.save(job.path, overwrite=job.overwrite)
            break
        except TakenError:  # by another run, meanwhile: no clip is lost
            job.path = free_path(job.path)
    log.info(f"{job.path}: {clip.forwards} forwards, {describe_seconds(clip.seconds, prior=job.prior)}")
    if told := describe_measures(clip.report):
        log.info(", ".join(told))
    if on_made is not None:
        on_made(job.path, clip.frames)
