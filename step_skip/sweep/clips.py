"""Plan many clips: every combination of prior, prompt and start step is a job.

A job holds its prior, its plan and the name of its clip; jobs share nothing that changes. Names are derived
from the choices, so the same command names the same files, and clips that exist are not made again
(sweep/finished.py). Only metadata is read here, and a million jobs fit into memory.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from step_skip.errors import InputError
from step_skip.files.names import slug
from step_skip.files.writing import folder_inside
from step_skip.infer.bank import describe_beginning, gather_banks, narrowed, plan_for_bank
from step_skip.infer.choices import AUTO, Choices
from step_skip.infer.inputs import Source, texts_of
from step_skip.infer.plan import Plan, make_plan
from step_skip.models.families import MODEL_NAMES
from step_skip.models.lora import lora_entries
from step_skip.models.weights import model_defaults
from step_skip.prior.files import check_way
from step_skip.prior.metadata import SEAL, read_prior
from step_skip.prior.prior import Prior
from step_skip.prior.schema import FORMATION_KEY, METADATA_FILE
from step_skip.sweep.outputs import check_output, clip_name

# Entries of a prior's metadata that no plan depends on; a plan depends only on the names of its files.
NEVER_PLANNED: Final = {
    *("run_id", "created", "seconds", "seconds_per_step", "forwards_per_step", "images", "latents_sha256"),
    *("peak_memory", "files", FORMATION_KEY, SEAL),
}


@dataclass(slots=True)
class Job:
    """One clip of a sweep."""

    prior: Prior
    plan: Plan
    folder: Path = Path()
    name: str = ""  # of the clip, without .mp4; a single clip takes the next free name
    overwrite: bool = True  # replace a file with the same name
    preview: bool = False  # write a .webp beside the clip with the denoised estimate of each step
    save_prior: bool = False  # also save the clip as a prior (infer/as_prior.py)
    exists: bool = False  # the clip exists and is complete (sweep/finished.py)

    @property
    def path(self) -> Path:
        """The .mp4 file."""
        return self.folder / f"{self.name}.mp4"

    @path.setter
    def path(self, path: Path) -> None:
        self.folder, self.name = path.parent, path.stem

    @property
    def report_path(self) -> Path:
        """The JSON file beside the clip."""
        return self.folder / f"{self.name}.json"


@dataclass(kw_only=True)
class Group(Source):
    """A source with the clips to make from it on the same weights."""

    jobs: list[Job]

    @property
    def plans(self) -> list[Plan]:
        """The plans of all jobs."""
        return [job.plan for job in self.jobs]

    @property
    def texts(self) -> list[str]:
        """The prompts of all plans, each once."""
        return texts_of(self.plans)


def all_jobs(groups: Iterable[Group]) -> list[Job]:
    """Return the jobs of all groups, in order."""
    return [job for group in groups for job in group.jobs]


def by_weights(groups: Iterable[Group]) -> list[list[Group]]:
    """Return the groups in lists of those whose clips need the same weights."""
    alike: dict[str, list[Group]] = {}
    for group in groups:
        plan = group.jobs[0].plan
        weights = (plan.model, plan.dtype, lora_entries(plan.lora), plan.quantize, plan.compile)
        alike.setdefault(json.dumps(weights), []).append(group)
    return list(alike.values())


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
    any_model: bool = False,
) -> tuple[list[Group], dict[Path, Exception]]:
    """Plan every prior with every choice, and name the clips; each clip occurs once.

    Args:
        directories: the folders of the priors.
        output: the name of a single clip; None: one in the prior's outputs folder.
        output_dir: the folder of a sweep; None: one in the first prior's outputs folder.
        overwrite: replace the file that has the name of --output.
        is_sweep: put the clips into a folder of their own even if there is only one.
        nearest: let each clip follow the nearest of the priors that begin alike.
        any_model: accept priors of custom pipelines, whose model has no name here.

    Returns:
        The groups, and the errors of the priors that are left out, by folder.

    Raises:
        InputError: no prior can be used (the first one's error, see `read_prior` and `make_plan`); or
            the output doesn't fit the number of clips.
    """
    banks, left_out = read_banks(directories, nearest=nearest)
    known: dict[str, dict[str, Plan]] = {}
    planned: list[tuple[list[Prior], dict[str, Plan]]] = []
    for bank in banks:
        try:
            planned.append((bank, plan_bank(bank, choices, known, any_model=any_model)))
        except InputError as error:
            left_out |= {prior.directory: error for prior in bank}
    if not planned:
        raise next(iter(left_out.values()))
    number = sum(len(plans) for _, plans in planned)
    if number > 1 or is_sweep or left_out:
        if output is not None:
            raise InputError(f"--output names one clip, but {number} are to be made; use --output_dir")
        return sweep_groups(planned, output_dir), left_out
    [([prior, *others], plans)] = planned
    [(name, plan)] = plans.items()
    if output is not None:
        check_output(output, prior)
    path = output or folder_inside(prior.directory, "outputs") / f"{name}.mp4"
    return [make_group([prior, *others], [Job(prior, plan, path.parent, path.stem, overwrite)])], left_out


def read_banks(
    directories: Iterable[Path], *, nearest: bool
) -> tuple[list[list[Prior]], dict[Path, Exception]]:
    """Read the priors and return them, in banks if `nearest`, and the errors of the others by folder."""
    priors: list[Prior] = []
    left_out: dict[Path, Exception] = {}
    for directory in dict.fromkeys(directories):
        try:
            prior = read_prior(directory)
            if nearest:
                describe_beginning(prior)
            priors.append(prior)
        except InputError as error:
            if nearest:  # which prior is the nearest depends on all of them
                raise
            left_out[directory] = error
    return gather_banks(priors) if nearest else [[prior] for prior in priors], left_out


def plan_bank(
    bank: Sequence[Prior],
    choices: Collection[Choices],
    known: dict[str, dict[str, Plan]],
    *,
    any_model: bool,
) -> dict[str, Plan]:
    """Return the plans of a prior or a bank, by name.

    Args:
        known: the plans so far, by `deciding_entries`; equal plans are shared.

    Raises:
        InputError: see `make_plan`; or the model has no name in this version.
    """
    prior = narrowed(bank)
    key = deciding_entries(prior, choices)
    if key not in known:
        known[key] = make_plans(prior, choices)
    plans = known[key]
    model = next(iter(plans.values())).model
    if model not in MODEL_NAMES and not any_model:
        raise InputError(
            f"the prior was made with the model {model!r}, which this version doesn't know; use a "
            "prior of a custom pipeline from Python (docs/python.md)"
        )
    if len(bank) == 1:
        return plans
    return {clip_name(each): each for each in (plan_for_bank(plan, bank) for plan in plans.values())}


def deciding_entries(prior: Prior, choices: Iterable[Choices]) -> str:
    """Return all metadata of a prior that its plans depend on, as text."""
    entries: dict[str, Any] = prior.metadata.model_dump(exclude_unset=True, exclude=NEVER_PLANNED)
    entries["files"] = sorted(prior.metadata.files)
    if any(each.start_step == AUTO for each in choices):
        entries[FORMATION_KEY] = prior.metadata.formation.recorded()
    return json.dumps(entries, sort_keys=True)


def make_plans(prior: Prior, choices: Iterable[Choices]) -> dict[str, Plan]:
    """Return the plans of one prior by name, each once; `auto` may choose a step that is also given."""
    plans: dict[str, Plan] = {}
    defaults_of = functools.cache(model_defaults)
    for each in choices:
        plan = make_plan(each, prior, defaults_of=defaults_of)
        name = clip_name(plan)
        if plan.auto or name not in plans:
            plans[name] = plan
    return plans


def make_group(bank: Sequence[Prior], jobs: list[Job]) -> Group:
    """Return the group of a prior, or of a bank of priors, with the clips to make from it."""
    source = Source.of(bank)
    return Group(prior=source.prior, others=source.others, jobs=jobs)


def sweep_groups(planned: Sequence[tuple[list[Prior], dict[str, Plan]]], folder: Path | None) -> list[Group]:
    """Return the groups of a sweep; without a folder its clips go into a folder named after all choices.

    Raises:
        InputError: the folder is a prior, or two priors have the same run_id.
    """
    named: dict[str, list[tuple[Prior, dict[str, Plan]]]] = {}
    prefixes = [slug(bank[0].metadata.run_id) for bank, _ in planned]
    for prefix, ([prior, *_], plans) in zip(prefixes, planned, strict=True):
        for other, its_plans in named.setdefault(prefix, []):
            if plans.keys() & its_plans.keys():
                same = f"{other.directory} and {prior.directory}"
                raise InputError(f"{same} have the same run_id; sweep them separately")
        named[prefix].append((prior, plans))
    pairs = list(zip(prefixes, planned, strict=True))
    if folder is None:
        digest = digest_of_lines(f"{prefix}_{name}.mp4" for prefix, (_, plans) in pairs for name in plans)
        folder = folder_inside(planned[0][0][0].directory, "outputs", f"sweep_{digest[:8]}")
    if (folder / METADATA_FILE).exists():
        raise InputError(f"--output_dir {folder} is a prior; name another folder")
    check_way(folder)
    return [
        group
        for prefix, (bank, plans) in pairs
        for group in groups_by_lora(
            bank, (Job(bank[0], plan, folder, f"{prefix}_{name}") for name, plan in plans.items())
        )
    ]


def groups_by_lora(bank: Sequence[Prior], jobs: Iterable[Job]) -> Iterator[Group]:
    """Yield a group for each strength of the LoRAs, since each strength needs its own weights."""
    for _, alike in itertools.groupby(jobs, key=lambda job: lora_entries(job.plan.lora)):
        yield make_group(bank, list(alike))


def digest_of_lines(lines: Iterable[str]) -> str:
    """Return the SHA-256 of lines of text, in hex, without joining them in memory."""
    digest = hashlib.sha256()
    for number, line in enumerate(lines):
        digest.update(f"\n{line}".encode() if number else line.encode())
    return digest.hexdigest()
