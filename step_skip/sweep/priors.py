"""Plan many priors: every combination of image, seed and prompt is a job.

No image is decoded and no weights are loaded. A job holds paths and choices, so that a folder of any size
fits into memory. Existing priors are looked up by name and then compared by image file (its bytes), prompt,
seed, settings and weights.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import logging
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, TypeVar

from step_skip.errors import InputError
from step_skip.files.names import id_from_name
from step_skip.files.reading import sha256_file
from step_skip.generate.choices import PriorChoices, choose_size
from step_skip.generate.plan import bytes_needed, plan_prior
from step_skip.media.images import Picture, files_of, hex_colour, image_size
from step_skip.models.families import FAMILIES
from step_skip.models.weights import (
    LoadOptions,
    cache_components,
    fingerprint_files,
    model_defaults,
    weight_files,
)
from step_skip.prior.metadata import read_run
from step_skip.prior.prior import END_IMAGE_FILE, IMAGE_FILE, LABELS, Prior
from step_skip.prior.schema import METADATA_FILE, Metadata
from step_skip.prior.writer import check_run_id

log = logging.getLogger(__name__)
T = TypeVar("T")
BEGUN, PRUNED, WHOLE = range(3)  # how much of a prior exists, judged by the names of its files
Found = tuple[Path, int]  # a prior's folder, and one of these states

# Entries that are known before a run and that differ between machines or runs.
MACHINE_ENTRIES: Final = frozenset(("device", "device_name", "num_threads", "attention", "versions", "vram"))
TIME_NAME = re.compile(r"\d{8}_\d{6}")  # the run id of a prior whose name yields no usable characters


@dataclass(slots=True, eq=False)
class PriorJob:
    """One prior to make."""

    images: dict[str, Path]  # by the prior's file names
    prompt: str
    choices: PriorChoices
    run_id: str | None = None  # the requested id; None: named after the image or, without one, the prompt
    planned: Prior | None = None  # a prior with the metadata that is known before the run
    directory: Path | None = None  # the prior's folder, once it has begun
    exists: bool = False  # the prior is complete, or pruned
    error: Exception | None = None  # the reason why the prior can't be made
    pictures: dict[str, Picture] | None = None  # the decoded images, if they were decoded

    @property
    def name(self) -> str:
        """The path of the image or, without one, the prompt."""
        return str(self.images.get(IMAGE_FILE, self.prompt))

    @property
    def base(self) -> str:
        """The run id that the prior gets if no other prior has it."""
        image = self.images.get(IMAGE_FILE)
        return id_from_name(self.prompt if image is None else image.stem)

    @property
    def prior(self) -> Prior:
        """The planned prior.

        Raises:
            ValueError: the job was not planned.
        """
        if self.planned is None:
            raise ValueError("the job was not planned")
        return self.planned


def make_jobs(
    images: Sequence[Path],
    prompts: Sequence[str],
    choices: PriorChoices,
    *,
    end_images: Sequence[Path] = (),
    seeds: Sequence[int] = (0,),
    run_ids: Sequence[str] = (),
) -> list[PriorJob]:
    """Return a job for each image, seed and prompt, in this order.

    Args:
        images: files and folders of images; empty for a model that takes none.
        prompts: all of them for each image; if there are as many as files, and no folder: one for each file.
        end_images: one for all images, or one for each.
        run_ids: one for each job, or empty.

    Raises:
        InputError: a file is missing, an id is given twice, or the numbers of values don't match.
    """
    files: list[Path | None] = [file for path in images for file in files_of(path)]
    paired = 1 < len(prompts) == len(files) and not any(path.is_dir() for path in images)
    if paired:
        log.info(
            "as many prompts as files: each file gets one; to give each file all, name the files' folder"
        )
    of_each = [[prompt] for prompt in prompts] if paired else [prompts] * max(len(files), 1)
    ends = for_each("--end_image", end_images, max(len(files), 1), "image")
    jobs = [
        PriorJob(
            {name: path for name, path in ((IMAGE_FILE, file), (END_IMAGE_FILE, end)) if path is not None},
            prompt,
            replace(choices, seed=seed),
        )
        for file, end, texts in zip(files or [None], ends, of_each, strict=True)
        for seed in dict.fromkeys(seeds)
        for prompt in dict.fromkeys(texts)
    ]
    what = "image" if len(jobs) == len(files) > 1 else "prompt" if len(jobs) == len(prompts) else "prior"
    for job, run_id in zip(jobs, for_each("--run_id", run_ids, len(jobs), what, all_one=False), strict=True):
        job.run_id = run_id
    for run_id in run_ids:
        if run_ids.count(run_id) > 1:
            raise InputError(f"--run_id {run_id}: given twice; every prior needs its own")
    return jobs


def for_each(
    flag: str, values: Sequence[T], number: int, what: str, *, all_one: bool = True
) -> Sequence[T | None]:
    """Return one value for each of `number` things: None for all, the same for all, or the given values.

    Raises:
        InputError: the number of values doesn't match.
    """
    if not values:
        return [None] * number
    if len(values) == 1 and all_one:
        return [values[0]] * number
    if len(values) != number:
        raise InputError(f"{flag}: {len(values)} for {number} {what}s; give one for each {what}")
    return values


# --- planning -----------------------------------------------------------------------------------------------


def plan_jobs(
    jobs: Sequence[PriorJob],
    options: LoadOptions,
    family: str,
    output_dir: Path,
    *,
    parameters: Mapping[str, str] | None = None,
) -> list[PriorJob]:
    """Find the prior of each job that exists or has begun, and plan the others.

    An image that can't be used is noted as the job's error.

    Args:
        parameters: the fingerprints of the parameters of a custom pipeline, which has no files.

    Returns:
        The jobs, without repetitions of the same prior.

    Raises:
        InputError: see `plan_prior`; or another prior has the run id.
    """
    plan = functools.cache(lambda choices: plan_prior(options, choices, family=family))
    defaults = model_defaults(options.model, options.model_dir)
    choices = jobs[0].choices
    expected = shared_metadata(plan(choices), choices, any_size=defaults.any_size)
    if parameters is not None:
        expected["parameter_fingerprint"] = parameters
    known = Known(output_dir, choices, expected, lambda: local_weights(options, family, choices))
    jobs = known.find(jobs)
    size = functools.cache(image_size)
    for job in jobs:
        try:
            sized = choices
            for file, path in job.images.items() if not job.exists else ():
                found = size(path, label=LABELS[file])
                sized = choose_size(sized, found, defaults=defaults, family=FAMILIES[family])
        except InputError as error:
            job.error = error
            continue
        planned = plan(sized).model_copy(update={"seed": job.choices.seed})
        job.planned = Prior(Path(job.name), planned)
        job.choices = replace(  # the sizes that were given, rounded as the model needs
            job.choices,
            height=planned.height if choices.height else job.choices.height,
            width=planned.width if choices.width else job.choices.width,
            num_frames=planned.num_frames if choices.num_frames else job.choices.num_frames,
        )
    return jobs


def shared_metadata(planned: Metadata, choices: PriorChoices, *, any_size: bool) -> dict[str, Any]:
    """Return the metadata, as read from JSON, that all priors of a batch share: no image, prompt or seed.

    Args:
        planned: the planned metadata of one prior.
        any_size: the size may follow the image.
    """
    left_out = {*MACHINE_ENTRIES, "seed"}
    if any_size and (choices.width, choices.height) == (None, None):
        left_out |= {"width", "height"}
    if choices.tiled == "auto":  # resolved by the size
        left_out |= {"tiled"}
    kept = {name: value for name, value in planned.recorded().items() if name not in left_out}
    # only a prior made from a clip records an expected closeness
    return json.loads(json.dumps(kept)) | {"expected_closeness": None}


def local_weights(options: LoadOptions, family: str, choices: PriorChoices) -> Mapping[str, str]:
    """Return the fingerprints of weights in a local folder; empty for weights that are downloaded.

    Raises:
        InputError: some weights are missing.
    """
    if options.model != "tiny" and options.model_dir is None:
        return {}
    components = [*FAMILIES[family].components, *cache_components(choices.skip_cache)]
    return fingerprint_files(weight_files(options, components))


class Known:
    """The existing priors in a folder that match a batch; each is read once.

    Args:
        choices: the choices of the batch.
        expected: the metadata that all priors of the batch share.
        weights: returns the fingerprints of the batch's weights; called if a prior has that metadata.
    """

    def __init__(
        self,
        folder: Path,
        choices: PriorChoices,
        expected: Mapping[str, Any],
        weights: Callable[[], Mapping[str, str]],
    ):
        self.folder, self.choices, self.expected = folder, choices, expected
        self.weights = functools.cache(weights)
        self.names: dict[str, list[str]] = {}  # names of folders, by the id they may be numbered copies of
        self.found: dict[str, dict[object, Found]] = {}  # priors by that id, then by their key
        self.sha256 = functools.cache(sha256_file)
        for name in sorted(os.listdir(folder)) if folder.is_dir() else ():  # noqa: PTH208  half the time
            if name.startswith("run_"):
                for base in dict.fromkeys(bases_of(name.removeprefix("run_"))):
                    self.names.setdefault(base, []).append(name)

    def find(self, jobs: Iterable[PriorJob]) -> list[PriorJob]:
        """Note each job's prior if it exists or has begun; return the jobs without repetitions.

        Raises:
            InputError: another prior has the run id.
        """
        taken, kept, pruned = set(), [], []
        for job in jobs:
            key = None if self.choices.denoising_strength < 1 else self.key_of_job(job)
            if key is not None and (found := self.look_up(job, key)) is not None:
                job.directory, state = found
                job.exists = state != BEGUN
                pruned += [job.directory] if state == PRUNED else []
            elif job.run_id is not None:
                check_run_id(self.folder, job.run_id)
            if job.run_id is None and key is not None:
                if (job.base, key) in taken:
                    continue
                taken.add((job.base, key))
            kept.append(job)
        if pruned:
            log.info(
                f"{len(pruned)} of the existing priors were pruned, for example {pruned[0]}; "
                "give another --run_id to make a complete one"
            )
        return kept

    def look_up(self, job: PriorJob, key: object) -> Found | None:
        """Look up the prior of a job, under the requested id or else under any numbered one."""
        if job.run_id is not None:
            return self.read([f"run_{job.run_id}"]).get(key)
        if job.base not in self.found:
            self.found[job.base] = self.read(self.names.get(job.base, ()))
        return self.found[job.base].get(key)

    def read(self, names: Iterable[str]) -> dict[object, Found]:
        """Read the matching priors in these folders, by key; of several with a key, the most complete."""
        found: dict[object, Found] = {}
        for name in names:
            with contextlib.suppress(InputError):  # the folder is damaged or not a prior
                if (self.folder / name / METADATA_FILE).exists():
                    prior = read_run(self.folder / name)
                    if self.is_alike(prior):
                        key, state = key_of_prior(prior), state_of(prior)
                        if key not in found or found[key][1] < state:
                            found[key] = prior.directory, state
        return found

    def is_alike(self, prior: Prior) -> bool:
        """Return whether a prior has the settings of the batch and, as far as known, its weights."""
        recorded = prior.metadata.recorded()
        return all(recorded.get(name) == value for name, value in self.expected.items()) and all(
            prior.metadata.model_fingerprint.get(name) == digest for name, digest in self.weights().items()
        )

    def key_of_job(self, job: PriorJob) -> object:
        """Return the key of a job: prompt, seed and images; None: an image can't be read."""
        colour = hex_colour(self.choices.background)
        try:
            images = [
                (file, self.sha256(path), self.choices.fit, colour) for file, path in job.images.items()
            ]
        except InputError:
            return None
        return job.prompt, job.choices.seed, tuple(images)


def state_of(prior: Prior) -> int:
    """Return how much of a prior exists; a complete prior that lacks files counts as BEGUN.

    Raises:
        InputError: a draft or a pruned prior lacks files; this is also logged.
    """
    m = prior.metadata
    lacking = sorted(m.files.keys() - set(os.listdir(prior.directory)))  # noqa: PTH208  half the time
    is_pruned = prior.kept_steps is not None
    if lacking and (is_pruned or m.status == "stopped"):
        what = "was pruned" if is_pruned else "is a draft"
        remedy = "prior_utils.py rm removes it" if is_pruned else "generate_prior.py --resume finishes it"
        problem = (
            f"{prior.directory} {what} and lacks {lacking[0]}, so it doesn't count as existing; {remedy}"
        )
        log.warning(problem)
        raise InputError(problem)
    if lacking or m.status == "running":
        return BEGUN
    return PRUNED if is_pruned else WHOLE


def bases_of(run_id: str) -> Iterator[str]:
    """Yield the ids that this one may be a numbered copy of, itself included; "" for a date and time."""
    yield run_id
    first, _, number = run_id.rpartition("_")
    if number.isdecimal():
        yield first
    for each in (run_id, first):
        if TIME_NAME.fullmatch(each):
            yield ""


def key_of_prior(prior: Prior) -> object:
    """Return the key of a prior: prompt, seed and images; see `Known.key_of_job`."""
    images = prior.metadata.images.items()
    sources = [(file, each.sha256, each.fit, each.background) for file, each in images]
    return prior.metadata.prompt, prior.metadata.seed, tuple(sources)


# --- cost ---------------------------------------------------------------------------------------------------


def bytes_of(job: PriorJob) -> int:
    """Return an upper bound of the size of a job's prior on disk, in bytes."""
    prior = job.prior
    estimates = prior.num_inference_steps if prior.metadata.save_decoded_videos else 0
    return bytes_needed(prior, videos=1 + estimates)


def forwards_of(prior: Prior, *, whole: bool = False) -> int:
    """Return the number of network evaluations of a planned run.

    Args:
        whole: count the whole run even if it will be stopped early.
    """
    last_step = None if whole else prior.metadata.stop_after
    guidance = prior.guidance[: None if last_step is None else last_step + 1]
    return sum(1 if scale == 1 else 2 for scale in guidance)


def describe_prior_job(job: PriorJob) -> str:
    """Return a job as one line of JSON: its settings, their cost, and its prior if that exists."""
    data: dict[str, Any] = {"name": job.name, "prompt": job.prompt}
    if job.error is None:
        prior = job.prior
        data |= {
            **dataclasses.asdict(prior.settings),
            "model": prior.metadata.model,
            "forwards": forwards_of(prior),
            "bytes_at_most": bytes_of(job),
            "prior_dir": None if job.directory is None else str(job.directory),
            "made": job.exists,
        }
    else:
        data["error"] = str(job.error)
    return json.dumps(data, ensure_ascii=False)
