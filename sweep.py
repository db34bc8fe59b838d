"""Many videos from one command line, as data: every prior x prompt x start step is a job of its own.

A job knows its prior, its plan and where its video goes, and shares nothing with the others. Names are made
from the choices, so the same command means the same files: what is there and whole is not made again.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import hashlib
import itertools
import json
import re
import statistics
from collections.abc import Collection, Iterable, Iterator, Mapping, Sized
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import command_line as cli
import contexts
import plan as planning
import prior_utils
import wan_models
from plan import Inputs, Plan
from prior_utils import InputError, Prior
from prior_writer import locked

METHOD_FLAGS = ("start_step", "steps", "num_steps", "sigmas")
OVERRIDES = {  # what a JSON line of --prompts_file may set, and the type of each value
    "prompt": cli.utf8_text,
    "negative_prompt": cli.utf8_text,
    "cfg_scale": cli.positive_float,
    "start_step": cli.start_steps,
    "steps": cli.non_negative_int,
    "num_steps": cli.positive_int,
    "sigmas": cli.strength,
}
LISTS = ("cfg_scale", "start_step", "steps", "sigmas")  # of those, what may be a list
MAX_PROMPTS_BYTES = 16 * 2**20
MAX_NAME_BYTES = 255  # of a file name, on every usual file system


@dataclass(frozen=True)
class Job:
    """One video of a sweep; a single video is a sweep of one."""

    prior: Prior
    plan: Plan
    path: Path  # the .mp4

    @property
    def report_path(self) -> Path:
        """The JSON file beside the video."""
        return self.path.with_suffix(".json")


def by_prior(jobs: Iterable[Job]) -> dict[Path, list[Job]]:
    """The jobs of each prior, by its folder, in order."""
    groups: dict[Path, list[Job]] = {}
    for job in jobs:
        groups.setdefault(job.prior.directory, []).append(job)
    return groups


# --- from flags to plans ------------------------------------------------------------------------------------


def make_plans(args: argparse.Namespace) -> list[tuple[Prior, Plan]]:
    """The cross product of priors, prompts and start steps, each plan once.

    Raises:
        InputError: see `read_prior`, `read_prompts` and `make_plan`.
    """
    lines = [{"prompt": prompt} for prompt in args.prompt or ()]
    if args.prompts_file is not None:
        lines += read_prompts(args.prompts_file)
    plans = []
    for directory in dict.fromkeys(args.prior_dir):
        prior = prior_utils.read_prior(directory)
        of_this: dict[str, Plan] = {}
        for flags in flags_of_each(args, lines or [{}]):
            plan = planning.make_plan(flags, prior)
            if plan.auto or video_name(plan) not in of_this:  # the same step, named or chosen
                of_this[video_name(plan)] = plan
        plans += [(prior, plan) for plan in of_this.values()]
    check_one_model(plans)
    return plans


def check_one_model(plans: list[tuple[Prior, Plan]]) -> None:
    """Refuse priors of different models, weights or dtypes: a sweep loads one.

    Raises:
        InputError: with two that differ.
    """
    first, first_plan = plans[0]
    for prior, plan in plans:
        for name, one, other in (
            ("model", first_plan.model, plan.model),
            ("dtype", first_plan.dtype, plan.dtype),
            ("lora", first_plan.lora, plan.lora),
            ("model_fingerprint", weights(first), weights(prior)),
        ):
            if one != other:
                raise InputError(
                    f"{first.directory} and {prior.directory} differ in {name}, and a sweep loads one model; "
                    "sweep them apart"
                )


def weights(prior: Prior) -> list[str] | None:
    """The fingerprints of the components that every prior uses; an older one records none."""
    recorded = prior.metadata.get("model_fingerprint")
    return None if recorded is None else [recorded.get(name) for name in wan_models.COMPONENTS]


def flags_of_each(
    args: argparse.Namespace, lines: Iterable[Mapping[str, Any]]
) -> Iterator[argparse.Namespace]:
    """The flags of one video each: a line's entries before the command line's, one start step at a time."""
    for line in lines:
        flags = vars(args) | {"prompt": None}
        if line.keys() & set(METHOD_FLAGS):
            flags |= dict.fromkeys(METHOD_FLAGS)
        flags |= line
        for start_step in itertools.chain(*flags["start_step"] or [[None]]):
            yield argparse.Namespace(**{**flags, "start_step": start_step})


def read_prompts(path: Path) -> list[dict[str, Any]]:
    """The prompts of a file, one per line; a line that begins with { is a JSON object of OVERRIDES.

    Raises:
        InputError: with the line that is wrong.
    """
    if not path.is_file():
        raise InputError(f"--prompts_file {path} is not a file; name a text file, one prompt per line")
    if path.stat().st_size > MAX_PROMPTS_BYTES:
        raise InputError(f"--prompts_file {path} is over {MAX_PROMPTS_BYTES} bytes; name a smaller file")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(
            f"--prompts_file {path} is not UTF-8 text ({error.reason}); save it as UTF-8"
        ) from error
    numbered = [(number, line.strip()) for number, line in enumerate(text.split("\n"), 1)]
    prompts = [
        read_overrides(line, f"--prompts_file {path}, line {number}")
        if line.startswith("{")
        else {"prompt": line}
        for number, line in numbered
        if line
    ]
    if not prompts:
        raise InputError(f"--prompts_file {path} holds no prompt; write one per line")
    return prompts


def read_overrides(line: str, where: str) -> dict[str, Any]:
    """What one JSON line sets, as the flags of the same names would.

    Raises:
        InputError: no JSON object, an unknown key, or a value the flag wouldn't take.
    """
    try:
        given = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where} begins with {{ and is not valid JSON ({error}); correct it") from error
    if unknown := given.keys() - OVERRIDES.keys():
        raise InputError(
            f"{where} has the key {sorted(unknown)[0]!r}, expected some of {', '.join(OVERRIDES)}"
        )
    if len(given.keys() & set(METHOD_FLAGS)) > 1:
        raise InputError(f"{where} has more than one of {', '.join(METHOD_FLAGS)}; leave one")
    return {name: read_override(name, value, where) for name, value in given.items()}


def read_override(name: str, value: Any, where: str) -> Any:
    """One value of a JSON line, in the form that argparse gives the flag's.

    Raises:
        InputError: the flag wouldn't take it.
    """
    kind, many = OVERRIDES[name], name in LISTS
    values = value if many and isinstance(value, list) and value else [value]
    try:
        if kind is cli.utf8_text and not isinstance(value, str):
            raise ValueError("not a text")
        taken = [kind(str(each)) for each in values]
    except (ValueError, argparse.ArgumentTypeError) as error:
        raise InputError(f"{where}: {name} is {value!r} ({error}); write what --{name} would take") from error
    return taken if many else taken[0]


# --- where the videos go ------------------------------------------------------------------------------------


def make_jobs(args: argparse.Namespace) -> list[Job]:
    """The videos a command line asks for, each with its place.

    Raises:
        InputError: see `make_plans` and `check_output`; or an output that doesn't fit what is asked for.
    """
    plans = make_plans(args)
    if is_sweep(args, plans):
        return sweep_jobs(args, plans)
    [(prior, plan)] = plans
    if args.output is not None:
        check_output(args.output, prior, overwrite=args.overwrite)
    return [Job(prior, plan, args.output or free_output(plan, prior))]


def is_sweep(args: argparse.Namespace, plans: Sized) -> bool:
    """Whether the videos go into a folder of their own: several, or what may become several."""
    return len(plans) > 1 or args.prompts_file is not None or args.output_dir is not None


def sweep_jobs(args: argparse.Namespace, plans: list[tuple[Prior, Plan]]) -> list[Job]:
    """The jobs of a sweep; their folder is --output_dir, or one named after all choices.

    Raises:
        InputError: --output, a folder that is a prior, or priors of one name.
    """
    if args.output is not None:
        raise InputError(f"--output names one video, and this makes {len(plans)}; use --output_dir")
    named: dict[str, tuple[Prior, Plan]] = {}
    for prior, plan in plans:
        name = f"{slug(prior.metadata['run_id'])}_{video_name(plan)}.mp4"
        if name in named:
            same = f"{named[name][0].directory} and {prior.directory}"
            raise InputError(f"{same} have the same run_id; sweep them apart")
        named[name] = prior, plan
    folder = args.output_dir
    if folder is None:
        digest = hashlib.sha256("\n".join(named).encode()).hexdigest()[:8]
        folder = prior_utils.folder_inside(plans[0][0].directory, "outputs", f"sweep_{digest}")
    if (folder / prior_utils.METADATA_FILE).exists():
        raise InputError(f"--output_dir {folder} is a prior; name another folder")
    return [Job(prior, plan, folder / name) for name, (prior, plan) in named.items()]


@contextlib.contextmanager
def own_folder(folder: Path) -> Iterator[None]:
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


def check_output(path: Path, prior: Prior, *, overwrite: bool) -> None:
    """Refuse an --output that no video can have; nothing is replaced unasked, the prior's own files never.

    Raises:
        InputError: with what is in the way.
    """
    if path.suffix != ".mp4":
        raise InputError(f"--output {path}: expected a name that ends in .mp4")
    report = path.with_suffix(".json")
    if len(report.name.encode()) > MAX_NAME_BYTES:
        raise InputError(
            f"--output: a name of {len(path.name.encode())} bytes is too long; use a shorter one"
        )
    own = {prior_utils.METADATA_FILE, prior_utils.OUTPUT_FILE, *prior.metadata.get("files", {})}
    inside = path.parent.exists() and path.parent.samefile(prior.directory)
    if inside and own & {path.name.lower(), report.name.lower()}:  # some file systems ignore case
        raise InputError(f"--output {path} would replace a file of the prior itself; choose another name")
    taken = [each for each in (path, report) if each.exists()]
    if taken and not overwrite:
        raise InputError(f"--output: {taken[0]} exists; choose another name or add --overwrite")
    if any(each.is_dir() for each in taken):
        raise InputError(f"--output: {taken[0]} is a folder; choose another name")


def free_output(plan: Plan, prior: Prior) -> Path:
    """A name in the prior's outputs folder that tells steps and prompt, and that nothing has yet."""
    stem, again = video_name(plan), 1
    path = prior_utils.folder_inside(prior.directory, "outputs") / f"{stem}.mp4"
    while path.exists() or path.with_suffix(".json").exists():
        again += 1
        path = path.with_name(f"{stem}_{again}.mp4")
    return path


def video_name(plan: Plan) -> str:
    """A file name, without suffix, that tells steps and prompt, and differs for every choice."""
    if plan.sigmas is not None:
        start = f"sigma{plan.sigmas[0]:.3f}-{len(plan.sigmas)}steps"
    elif plan.method == "resume":
        start = f"step{plan.start_step:02d}"
    elif len(plan.steps_to_run) <= 6:
        start = "steps" + "-".join(map(str, plan.steps_to_run))
    else:
        start = f"{len(plan.steps_to_run)}steps"
    digest = hashlib.sha256(json.dumps(choices(plan)).encode()).hexdigest()[:8]
    return f"{start}_{slug(plan.prompt)}_{digest}"


def slug(text: str) -> str:
    """A text's words in any script, as a part of a file name of at most 60 bytes."""
    words = re.sub(r"\W+", "-", text.lower()).strip("-")
    words = words.encode()[:60].decode(errors="ignore").strip("-")  # never half a character
    return words or ("prompt" if text else "no-prompt")


# --- what is made already -----------------------------------------------------------------------------------


def choices(plan: Plan) -> dict[str, Any]:
    """A plan's entries that decide the video, as they stand in a result's JSON; the image has a checksum."""
    entries = dataclasses.asdict(plan)
    del entries["image"], entries["auto"]
    entries["steps_run"] = entries.pop("steps_to_run")
    return {name: value for name, value in entries.items() if value is not None or name == "start_step"}


def settings(job: Job, inputs: Inputs) -> dict[str, Any]:
    """The entries of a result's JSON that decide the video."""
    names = planning.input_files(job.plan, job.prior)
    return {
        "prior_run_id": job.prior.metadata["run_id"],
        "prior_files": {name: inputs.prior_files[name] for name in names},
        "image_sha256": inputs.image_sha256,
        **dataclasses.asdict(planning.run_settings(job.plan, job.prior)),
        **choices(job.plan),
    }


def is_made(job: Job, inputs: Inputs) -> bool:
    """Whether the video is there and whole, and its JSON says it is the one this job would make."""
    try:
        found = json.loads(job.report_path.read_text(encoding="utf-8"))
        expected = json.loads(json.dumps(settings(job, inputs)))  # tuples become lists, for example
        same = all(found[name] == value for name, value in expected.items())
        return same and found["video_sha256"] == prior_utils.sha256_file(job.path)
    except (OSError, ValueError, TypeError, KeyError):
        return False


# --- what it will cost --------------------------------------------------------------------------------------


def expected_seconds(job: Job) -> float | None:
    """Denoising and decoding, from what the prior's own run took; None: it recorded nothing to go by."""
    recorded = job.prior.metadata
    try:
        per_step = statistics.median(recorded["seconds_per_step"])
        decode = recorded["seconds"].get("decode", 0.0)
        per_forward = per_step / (1 if recorded["cfg_scale"] == 1 else 2)
        return per_forward * job.plan.forwards + decode
    except (KeyError, TypeError, AttributeError, ValueError):
        return None


def components(jobs: Iterable[Job]) -> list[str]:
    """The parts of the model that jobs will load, as far as names tell: nothing is read."""
    needed = set()
    for job in jobs:
        known = {text for text in job.plan.texts if contexts.is_known(job.prior, text)}
        needed |= set(planning.needed_components(job.plan, job.prior, known=known))
    return [name for name in wan_models.COMPONENTS if name in needed]


def describe(job: Job, *, made: bool) -> str:
    """A job as one line of JSON: its choices, what they cost, and whether the video is there already."""
    data = {
        "video": str(job.path),
        "prior_dir": str(job.prior.directory),
        **choices(job.plan),
        "forwards": job.plan.forwards,
        "expected_seconds": expected_seconds(job),
        "made": made,
    }
    return json.dumps(data, ensure_ascii=False)


def summarize(jobs: Collection[Job]) -> str:
    """What jobs cost together, for people: videos, forwards, seconds."""
    forwards, seconds = sum(job.plan.forwards for job in jobs), [expected_seconds(job) for job in jobs]
    time = "time unknown" if None in seconds else f"about {sum(seconds):.0f} s after loading and encoding"
    return f"{len(jobs)} videos, {forwards} forwards, {time}"
