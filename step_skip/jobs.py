"""Many videos on one loaded model: only the parts that they need, and of two experts one after the other."""

from __future__ import annotations

import logging
import math
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm import tqdm

from step_skip.experts import experts_of
from step_skip.files import InputError, TakenError
from step_skip.infer import Clip, encode_new, make_clip, run_plan
from step_skip.loading import Model
from step_skip.lora import Lora
from step_skip.memory import describe_peak, peak_memory
from step_skip.models import COMPONENTS, ENCODERS, EXPERTS, SKIP_BRANCH, LoadOptions
from step_skip.plan import needed_components, settings_of
from step_skip.preview import preview_to
from step_skip.prior import check_fingerprint
from step_skip.results import Clock
from step_skip.sweep import Group, Job, all_jobs, expected_seconds_of_each, free_path
from step_skip.tell import describe_seconds, load_told

if TYPE_CHECKING:
    from PIL.Image import Image

    from step_skip.pipeline import Pause

    OnMade = Callable[[Path, Sequence[Image]], None]

log = logging.getLogger(__name__)

JOB_ERRORS = (InputError, RuntimeError, MemoryError, OSError)  # RunError and torch's own are RuntimeErrors


def load_options(
    jobs: Sequence[Job],
    *,
    device: str,
    dtype: str,
    vram: str,
    model_dir: Path | None,
    loras: tuple[Lora, ...],
) -> LoadOptions:
    """What to load for these jobs; the size is that of the one that takes most memory."""
    plan = jobs[0].plan
    settings = [settings_of(job.plan, job.prior) for job in jobs]
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


def run_jobs(
    groups: Sequence[Group], *, options: LoadOptions, on_made: OnMade | None = None
) -> dict[Path, Exception]:
    """Load a model and make every video; one that fails doesn't stop the others.

    Args:
        groups: with their inputs loaded.
        on_made: called with each video's path and frames once it is written.

    Returns:
        The errors of the videos that could not be made.

    Raises:
        InputError: weights that are missing, or are not those the priors were made with.
        RunError: weights that could not be fetched.
    """
    from step_skip.pipeline import release

    jobs, clock = all_jobs(groups), Clock()
    needed = {
        name
        for group in groups
        for plan in group.plans
        for name in needed_components(plan, group.prior, known=group.inputs.contexts.keys())
    }

    def check_all(found: Mapping[str, str]) -> None:
        for group in groups:
            check_fingerprint(group.prior, found)

    components = [name for name in (*COMPONENTS, SKIP_BRANCH) if name in needed]
    model = load_told(options, components, check=check_all, by_expert=True)
    clock.add("load")
    encode_new(groups, model)
    release(model.pipe, ENCODERS)
    clock.add("encode")
    shared = {phase: clock.seconds[phase] / len(jobs) for phase in ("load", "encode")}
    failed = make_all(groups, model, shared, on_made)
    log.info(describe_peak(peak_memory(options.device)))
    return failed


def make_all(
    groups: Sequence[Group], model: Model, shared: Mapping[str, float], on_made: OnMade | None = None
) -> dict[Path, Exception]:
    """Make every video on a loaded model; of two experts the first takes its steps of all, then the second.

    Args:
        shared: each video's share of the seconds that loading and encoding took.

    Returns:
        The errors of the videos that could not be made.
    """
    from step_skip.pipeline import release

    jobs = all_jobs(groups)
    pairs = [(group, job) for group in groups for job in group.jobs]
    costs = expected_seconds_of_each(jobs) or [job.plan.forwards + 1 for job in jobs]
    failed: dict[Path, Exception] = {}
    pauses: dict[Path, Pause] = {}
    bar_format = "{desc}{percentage:3.0f}%|{bar}| {elapsed}<{remaining}"
    with tqdm(total=sum(costs), smoothing=0, bar_format=bar_format, disable=len(jobs) == 1) as bar:
        for expert in model.experts or [None]:
            if expert is not None:
                shared = {**shared, "load": shared["load"] + model.use_expert(expert) / len(jobs)}
            for number, ((group, job), cost) in enumerate(zip(pairs, costs, strict=True), 1):
                bar.set_description(f"video {number} of {len(jobs)}", refresh=False)
                share = share_of_expert(group, job, expert)
                if not share or job.path in failed:
                    continue
                try:
                    clip = run_job(group, job, model=model, shared=shared, expert=expert, pauses=pauses)
                    if clip is not None and on_made is not None:
                        on_made(job.path, clip.frames)
                except JOB_ERRORS as error:
                    traceback.clear_frames(error.__traceback__)  # they hold tensors the next needs room for
                    failed[job.path] = error
                    release(model.pipe, ())
                bar.update(cost * share)
    return failed


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
) -> Clip | None:
    """Make one video, write and return it, or run the steps of its first expert.

    Args:
        shared: this video's share of the seconds that loading and encoding took.
        expert: the one that is loaded, if there are two that take turns.
        pauses: by video, of those that have begun.
    """
    from step_skip.pipeline import Pause

    experts = experts_of(job.plan.steps_to_run, job.plan.sigmas, group.prior)
    pause, callback = pauses.pop(job.path, None), None
    if job.preview:
        job.path.parent.mkdir(parents=True, exist_ok=True)
        callback = preview_to(job.prior, job.path.with_suffix(".webp"))
    if pause is None and expert is not None and len(set(experts)) > 1:
        pauses[job.path] = pause = Pause(experts.count(expert))
        run_plan(group, job.plan, model.pipe, callback=callback, pause=pause)
        return None
    clip = make_clip(group, job.plan, model, callback=callback, pause=pause)
    clip.seconds |= shared
    while True:
        try:
            clip.save(job.path, overwrite=job.overwrite)
            break
        except TakenError:  # by another run, meanwhile: no clip is lost
            job.path = free_path(job.path)
    log.info(f"{job.path}: {clip.forwards} forwards, {describe_seconds(clip.seconds, prior=job.prior)}")
    return clip
