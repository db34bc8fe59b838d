"""Many videos at once, as data: every prior x prompt x start step is a job of its own.

A job knows its prior, its plan and where its video goes, and shares nothing with the others. Names are made
from the choices, so the same command means the same files: what is there and whole is not made again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import itertools
import json
import os
import re
import statistics
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from step_skip.bank import gather_banks, plan_for_bank
from step_skip.contexts import is_context_known, load_context
from step_skip.families import MODEL_NAMES
from step_skip.files import InputError, dtype_name, folder_inside, locked, read_file, sha256_file
from step_skip.images import read_as_before, read_own_image
from step_skip.media import video_bytes
from step_skip.metadata import MAX_METADATA_BYTES, read_prior
from step_skip.models import COMPONENTS
from step_skip.plan import (
    Choices,
    Plan,
    conditioning_files,
    input_files,
    latents_files,
    make_plan,
    needed_components,
    nega_files,
    settings_of,
    velocity_files,
)
from step_skip.prior import (
    IMAGE_FILE,
    METADATA_FILE,
    OUTPUT_FILE,
    Prior,
    check_files,
    check_way,
    context_file,
    load_conditioning,
    load_latents,
)

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image

MAX_NAME_BYTES = 255  # of a file name, on every usual file system


@dataclass
class Job:
    """One video of a sweep; a single video is a sweep of one."""

    prior: Prior
    plan: Plan
    path: Path  # the .mp4; of a single video the next free name where another run has taken it
    overwrite: bool = True  # what has the name by then
    preview: bool = False  # a .webp beside it shows what each step points at

    @property
    def report_path(self) -> Path:
        """The JSON file beside the video."""
        return self.path.with_suffix(".json")


@dataclass(kw_only=True)
class Inputs:
    """What a prior's plans need besides the model: `read_inputs` checks it, then it is loaded or encoded."""

    prior_files: dict[str, str] = field(default_factory=dict)  # SHA-256 by name
    image: Image | None = None
    image_sha256: str | None = None
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)  # by file name
    contexts: dict[str, torch.Tensor] = field(default_factory=dict)  # by prompt


@dataclass
class Group:
    """A prior with the videos to make from it, and what they need of it."""

    prior: Prior
    jobs: list[Job]
    inputs: Inputs = field(default_factory=Inputs)  # empty until they are checked
    others: Sequence[Group] = ()  # of a bank: its other priors, with the same jobs (bank.py)

    @property
    def members(self) -> list[Group]:
        """It and the others."""
        return [self, *self.others]

    @property
    def plans(self) -> list[Plan]:
        return [job.plan for job in self.jobs]


def all_jobs(groups: Iterable[Group]) -> list[Job]:
    """The jobs of all priors, in order."""
    return [job for group in groups for job in group.jobs]


# --- from choices to jobs -----------------------------------------------------------------------------------


def make_groups(
    directories: Iterable[Path],
    choices: Collection[Choices],
    *,
    output: Path | None = None,
    output_dir: Path | None = None,
    overwrite: bool = False,
    is_sweep: bool = False,
    nearest: bool = False,
) -> list[Group]:
    """Every prior with the videos that were chosen, each with its place; the same video once.

    Args:
        directories: the priors'.
        output: of a single video; None: a name in the prior's outputs folder.
        output_dir: of a sweep; None: one in the first prior's outputs folder.
        is_sweep: put them into a folder of their own even where there is only one.
        nearest: let each video follow the nearest of the priors that begin alike.

    Raises:
        InputError: see `read_prior`, `make_plan` and `check_output`; priors that need different models; or an
            output that doesn't fit what is asked for.
    """
    priors = [read_prior(directory) for directory in dict.fromkeys(directories)]
    banks = gather_banks(priors) if nearest else [[prior] for prior in priors]
    plans = [(bank[0], plan_for_bank(plan, bank)) for bank in banks for plan in make_plans(bank[0], choices)]
    check_one_model(plans)
    if len(plans) > 1 or is_sweep:
        if output is not None:
            raise InputError(f"--output names one video, and this makes {len(plans)}; use --output_dir")
        paths, overwrite = sweep_paths(plans, output_dir), True  # what isn't whole is made again
    else:
        [(prior, plan)] = plans
        if output is not None:
            check_output(output, prior)
        paths = [output or folder_inside(prior.directory, "outputs") / f"{video_name(plan)}.mp4"]
    jobs = [Job(prior, plan, path, overwrite) for (prior, plan), path in zip(plans, paths, strict=True)]
    return [make_group(bank, [job for job in jobs if job.prior is bank[0]]) for bank in banks]


def make_group(bank: Sequence[Prior], jobs: list[Job]) -> Group:
    """A prior, or a bank of them, with the videos to make from it."""
    first, *others = bank
    return Group(first, jobs, others=[Group(prior, jobs) for prior in others])


def make_plans(prior: Prior, choices: Iterable[Choices]) -> list[Plan]:
    """The plans of one prior, each once: the same step may be named and chosen by `auto`."""
    plans: dict[str, Plan] = {}
    for each in choices:
        plan = make_plan(each, prior)
        name = video_name(plan)
        if plan.auto or name not in plans:
            plans[name] = plan
    return list(plans.values())


def check_one_model(plans: list[tuple[Prior, Plan]]) -> None:
    """Refuse a model this version doesn't know, and priors of different models, weights or dtypes.

    Raises:
        InputError: with what differs.
    """
    first, first_plan = plans[0]
    if first_plan.model not in MODEL_NAMES:
        raise InputError(
            f"the prior was made with the model {first_plan.model!r}, which this version doesn't know; a "
            "prior of a pipeline of your own is used from Python (docs/python.md)"
        )
    for prior, plan in plans:
        for name, one, other in (
            ("model", first_plan.model, plan.model),
            ("dtype", first_plan.dtype, plan.dtype),
            ("lora", first_plan.lora, plan.lora),
            ("quantize", first_plan.quantize, plan.quantize),
            ("compile", first_plan.compile, plan.compile),
            ("model_fingerprint", recorded_weights(first), recorded_weights(prior)),
        ):
            if one != other:
                raise InputError(
                    f"{first.directory} and {prior.directory} differ in {name}, and a sweep loads one model; "
                    "sweep them apart"
                )


def recorded_weights(prior: Prior) -> list[str] | None:
    """The fingerprints of the components that every prior uses; an older one records none."""
    recorded = prior.metadata.get("model_fingerprint")
    return None if recorded is None else [recorded.get(name) for name in COMPONENTS]


# --- where the videos go ------------------------------------------------------------------------------------


def sweep_paths(plans: list[tuple[Prior, Plan]], folder: Path | None) -> list[Path]:
    """Where the videos of a sweep go; without a folder into one named after all choices.

    Raises:
        InputError: a folder that is a prior, or priors of one name.
    """
    named: dict[str, Prior] = {}
    for prior, plan in plans:
        name = f"{slug(prior.metadata['run_id'])}_{video_name(plan)}.mp4"
        if name in named:
            same = f"{named[name].directory} and {prior.directory}"
            raise InputError(f"{same} have the same run_id; sweep them apart")
        named[name] = prior
    if folder is None:
        digest = hashlib.sha256("\n".join(named).encode()).hexdigest()[:8]
        folder = folder_inside(plans[0][0].directory, "outputs", f"sweep_{digest}")
    if (folder / METADATA_FILE).exists():
        raise InputError(f"--output_dir {folder} is a prior; name another folder")
    check_way(folder)
    return [folder / name for name in named]


@contextlib.contextmanager
def sweep_folder(folder: Path) -> Iterator[None]:
    """Make a sweep's folder and keep other writers out; what a killed one left half-written is cleared away.

    Raises:
        InputError: another process is at it, or it can't be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with locked(folder):
            yield
    finally:
        with contextlib.suppress(OSError):  # not empty: something was made
            folder.rmdir()


def check_output(path: Path, prior: Prior) -> None:
    """Refuse an --output that no video can have; the prior's own files are never replaced.

    Raises:
        InputError: with what is in the way.
    """
    if path.suffix != ".mp4":
        raise InputError(f"--output {path}: expected a name that ends in .mp4")
    check_way(path.parent)
    report = path.with_suffix(".json")
    if len(report.name.encode()) > MAX_NAME_BYTES:
        raise InputError(
            f"--output: a name of {len(path.name.encode())} bytes is too long; use a shorter one"
        )
    own = {METADATA_FILE, OUTPUT_FILE, *prior.metadata.get("files", {})}
    inside = path.parent.exists() and path.parent.samefile(prior.directory)
    if inside and own & {path.name.lower(), report.name.lower()}:  # some file systems ignore case
        raise InputError(f"--output {path} would replace a file of the prior itself; choose another name")
    for each in (path, report):
        if each.is_dir():
            raise InputError(f"--output: {each} is a folder; choose another name")


def settle_single(group: Group, *, output: Path | None, overwrite: bool) -> None:
    """Give a single video its place: where it is made already, else --output or the next free name.

    Raises:
        InputError: something else has the name that --output asks for.
    """
    [job] = group.jobs
    if output is None:
        before = itertools.takewhile(is_taken, names_from(job.path))
        made = (name for name in before if is_made(dataclasses.replace(job, path=name), group))
        job.path = next(made, None) or free_path(job.path)
    elif is_taken(output) and not overwrite and not is_made(job, group):
        taken = output if os.path.lexists(output) else job.report_path
        raise InputError(f"--output: {taken} exists; choose another name or add --overwrite")


def free_path(path: Path) -> Path:
    """This name or, where a video or a JSON file has it, the next: name_2.mp4 ..."""
    return next(name for name in names_from(path) if not is_taken(name))


def names_from(path: Path) -> Iterator[Path]:
    """name.mp4, name_2.mp4 ..."""
    return (path.with_stem(f"{path.stem}_{again}") if again > 1 else path for again in itertools.count(1))


def is_taken(path: Path) -> bool:
    """Whether something has a video's name, or that of the JSON file beside it."""
    return os.path.lexists(path) or os.path.lexists(path.with_suffix(".json"))


def video_name(plan: Plan) -> str:
    """A file name, without suffix, that tells steps and prompt, and differs for every choice."""
    if plan.closeness is not None:
        start = f"close{plan.closeness:g}"
    elif plan.sigmas is not None:
        start = f"sigma{plan.sigmas[0]:.3f}-{len(plan.sigmas)}steps"
    elif plan.method == "resume":
        start = f"step{plan.start_step:02d}"
    elif len(plan.steps_to_run) <= 6:
        start = "steps" + "-".join(map(str, plan.steps_to_run))
    else:
        start = f"{len(plan.steps_to_run)}steps"
    start = f"nearest-{start}" if plan.nearest_of else start
    digest = hashlib.sha256(json.dumps(describe_choices(plan)).encode()).hexdigest()[:8]
    return f"{start}_{slug(plan.prompt)}_{digest}"


def slug(text: str) -> str:
    """A text's words in any script, as a part of a file name of at most 60 bytes."""
    words = re.sub(r"\W+", "-", text.lower()).strip("-")
    words = words.encode()[:60].decode(errors="ignore").strip("-")  # never half a character
    return words or ("prompt" if text else "no-prompt")


# --- what a prior gives -----------------------------------------------------------------------------------


def read_all_inputs(groups: Iterable[Group]) -> None:
    """Check every file that the plans need, and read the images; no tensor is loaded yet.

    Raises:
        InputError: something is missing, damaged, or not the prior's.
    """
    for group in groups:
        for member in group.members:
            member.inputs = read_inputs(member)


def read_inputs(group: Group) -> Inputs:
    """The same for one prior."""
    image = group.plans[0].image
    names = dict.fromkeys(name for plan in group.plans for name in input_files(plan, group.prior))
    return Inputs(
        prior_files=check_files(group.prior, names),
        image=None if image is None else read_identity_image(image, group.prior),
        image_sha256=None if image is None else sha256_image(image),
    )


def sha256_image(image: Path | Image) -> str:
    """SHA-256 of an image's file, or of its pixels where it has none, in hex."""
    return sha256_file(image) if isinstance(image, Path) else hashlib.sha256(image.tobytes()).hexdigest()


def load_all_inputs(group: Group) -> str:
    """Load every tensor that the plans of a prior or a bank need, each once, and the contexts it knows.

    Returns:
        The latents' dtype, "bfloat16" for example.

    Raises:
        InputError: a file holds something else, or not in --dtype.
    """
    for other in group.others:
        load_inputs(other)
        group.inputs.contexts |= other.inputs.contexts
    return load_inputs(group)


def load_inputs(group: Group) -> str:
    """The same for one prior."""
    prior, inputs = group.prior, group.inputs
    for plan in group.plans:
        latents = [*latents_files(plan, prior), *velocity_files(plan), *nega_files(plan, prior)]
        for name in latents:  # as they were when `read_inputs` looked at them
            if name not in inputs.tensors:
                inputs.tensors[name] = load_latents(prior, name, sha256=inputs.prior_files[name])
        for name in conditioning_files(plan, prior):
            if name not in inputs.tensors:
                inputs.tensors[name] = load_conditioning(prior, name)
        found = dtype_name(inputs.tensors[latents[0]])
        if plan.dtype not in (None, found):
            raise InputError(f"--dtype {plan.dtype}: the prior's latents are {found}; leave the flag out")
        for text in plan.texts:
            own = inputs.tensors.get(context_file(text))
            context = load_context(prior, text) if own is None else own
            if context is not None:
                inputs.contexts[text] = context
    return found


def read_identity_image(image: Path | Image, prior: Prior) -> Image:
    """Read --image and compare it with the image the prior was made from, where the prior holds it.

    Raises:
        InputError: it can't be read, or is another.
    """
    found = read_as_before(image, prior)
    if not prior.is_legacy:
        own = prior.directory / IMAGE_FILE
        if found.tobytes() != read_own_image(prior, IMAGE_FILE).tobytes():
            raise InputError(
                f"--image {image} is not the image the prior was made from ({own}); "
                "leave the flag out, or make a prior of this image"
            )
    return found


# --- what is made already -----------------------------------------------------------------------------------


def describe_choices(plan: Plan) -> dict[str, Any]:
    """A plan's entries that decide the video, as they stand in a result's JSON; the image has a checksum."""
    entries = dataclasses.asdict(plan)
    del entries["image"], entries["auto"], entries["knows_nega"]  # none of them changes the latents
    steps = entries.pop("steps_to_run")
    if plan.paths is None:  # else the run decides
        entries["steps_run"] = steps
    return {name: value for name, value in entries.items() if value is not None or name == "start_step"}


def describe_settings(group: Group, plan: Plan) -> dict[str, Any]:
    """The entries of a result's JSON that decide the video."""
    inputs, settings = group.inputs, dataclasses.asdict(settings_of(plan, group.prior))
    if settings["switch_DiT_boundary"] is None:  # one network: as it was before there were two
        del settings["switch_DiT_boundary"]
    own = {} if group.others else {"prior_run_id": group.prior.metadata["run_id"]}
    return {
        **own,
        "prior_files": describe_files(group, plan),
        "image_sha256": inputs.image_sha256,
        **settings,
        **describe_choices(plan),
    }


def describe_files(group: Group, plan: Plan) -> dict[str, str]:
    """The SHA-256 of every file of the prior that a plan needs; of a bank's by run id and name."""
    return {
        f"{member.prior.metadata['run_id']}/{name}" if group.others else name: member.inputs.prior_files[name]
        for member in group.members
        for name in input_files(plan, member.prior)
    }


def is_made(job: Job, group: Group) -> bool:
    """Whether the video is there and whole, and its JSON says it is the one this job would make."""
    expected = json.loads(json.dumps(describe_settings(group, job.plan)))  # tuples become lists, for example
    most = 4 * video_bytes(settings_of(job.plan, job.prior)) + 2**22
    try:  # the folder may be anybody's
        found = json.loads(read_file(job.report_path, most=MAX_METADATA_BYTES))
        same = all(found[name] == value for name, value in expected.items())
        return same and found["video_sha256"] == sha256_file(job.path, most=most)
    except (ValueError, TypeError, KeyError, RecursionError):
        return False


# --- what it will cost --------------------------------------------------------------------------------------


def expected_seconds(job: Job) -> float | None:
    """Denoising and decoding, from what the prior's own run took; None: it recorded nothing to go by."""
    recorded = job.prior.metadata
    if not recorded.get("seconds_per_step"):
        return None
    per_step = statistics.median(recorded["seconds_per_step"])
    per_forward = per_step / (1 if recorded["cfg_scale"] == 1 else 2)
    return per_forward * job.plan.forwards + recorded.get("seconds", {}).get("decode", 0.0)


def expected_seconds_of_each(jobs: Collection[Job]) -> list[float] | None:
    """What each job will take; None: of some nothing is known."""
    known = [seconds for job in jobs if (seconds := expected_seconds(job)) is not None]
    return known if len(known) == len(jobs) else None


def components_to_load(jobs: Iterable[Job]) -> list[str]:
    """The parts of the model that jobs will load, as far as names tell: nothing is read."""
    needed = set()
    for job in jobs:
        known = {text for text in job.plan.texts if is_context_known(job.prior, text)}
        needed |= set(needed_components(job.plan, job.prior, known=known))
    return [name for name in COMPONENTS if name in needed]


def describe_job(job: Job, *, made: bool) -> str:
    """A job as one line of JSON: its choices, what they cost, and whether the video is there already."""
    data = {
        "video": str(job.path),
        "prior_dir": str(job.prior.directory),
        **describe_choices(job.plan),
        "forwards": job.plan.forwards,
        "expected_seconds": expected_seconds(job),
        "made": made,
    }
    return json.dumps(data, ensure_ascii=False)


def summarize_jobs(jobs: Collection[Job]) -> str:
    """What jobs cost together, for people: videos, forwards, seconds."""
    forwards, seconds = sum(job.plan.forwards for job in jobs), expected_seconds_of_each(jobs)
    time = "time unknown" if seconds is None else f"about {sum(seconds):.0f} s after loading and encoding"
    return f"{len(jobs)} videos, {forwards} forwards, {time}"
