"""Describe the JSON beside a clip: one schema, checked once, when the file is read. Find the clip's prior.

The file may come from an untrusted source, like a prior's metadata (prior/schema.py). Only the entries that
this program uses are kept.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, ValidationError

from step_skip.errors import InputError
from step_skip.files.bounds import LIMITS, MAX_METADATA_DEPTH, MAX_REPORT_BYTES, MAX_STEPS
from step_skip.files.reading import is_deeper, read_file
from step_skip.files.schema import (
    Count,
    Few,
    FileName,
    Name,
    Number,
    PerStep,
    Positive,
    Record,
    Recorded,
    Seconds,
    Sha256,
    Text,
    describe_error,
    in_range,
)
from step_skip.models.lora import RecordedLora
from step_skip.prior.metadata import read_run
from step_skip.prior.schema import METADATA_FILE

# the entries that a clip's page shows, and those by which --like makes a clip again
ON_PAGE = (
    *("prior_dir", "prior_run_id", "method", "start_step", "steps_run", "prompt", "num_inference_steps"),
    *("num_frames", "fps", "forwards", "seconds"),
)
TO_REPEAT = ("prompt", "method", "steps_run", "model")


class ClipReport(Record):
    """The JSON of a clip; of an older version it may lack any entry. The page keeps the same of a prior."""

    model_config = ConfigDict(strict=True, extra="ignore")

    prior_dir: Name = ""
    prior_run_id: FileName = ""
    run_id: FileName = ""  # of a prior that the page keeps
    method: Literal["resume", "differential", "sigmas"] | None = None
    start_step: Annotated[int, in_range(-1, MAX_STEPS)] | None = None
    steps_run: PerStep[Annotated[int, in_range(0, MAX_STEPS)]] = []
    sigmas: PerStep[Positive] | None = None
    prior_steps: Count | None = None
    prompt: Recorded[Text] = None
    negative_prompt: Text | None = None
    model: Name = ""
    dtype: Name | None = None
    device_name: Name = ""
    width: Annotated[int, in_range(*LIMITS["width"])] | None = None
    height: Annotated[int, in_range(*LIMITS["height"])] | None = None
    num_frames: Recorded[Annotated[int, in_range(*LIMITS["num_frames"])]] = None
    fps: Recorded[Annotated[Positive, in_range(*LIMITS["fps"])]] = None
    num_inference_steps: Annotated[int, in_range(0, MAX_STEPS)] = 0
    sigma_shift: Positive | None = None
    denoising_strength: Positive | None = None
    seed: Annotated[int, in_range(*LIMITS["seed"])] | None = None
    cfg_scale: Number | PerStep[Number] | None = None
    skip_cache: Count | None = None
    tea_cache_l1_thresh: Positive | None = None
    tea_cache_model_id: Name | None = None
    lora: Few[list[RecordedLora]] = []
    tiled: bool = True
    quantize: Name | None = None
    compile: Name | None = None
    model_dir: Name | None = None
    image: str | None = None  # a path of any bytes
    nearest_of: Few[list[Name]] | None = None
    forwards: Count = 0
    seconds: Few[dict[str, Seconds]] | None = None
    command: Text = ""
    identity: Number | None = None
    movement: Number | None = None
    flicker: Number | None = None
    predicted_closeness: Number | None = None
    saved_prior: Name | None = None
    video_sha256: Sha256 | None = None
    video_bytes: Count | None = None


def read_report(path: Path, *, required: Iterable[str] = ON_PAGE) -> ClipReport:
    """Read and check the JSON beside a clip.

    Raises:
        InputError: it is missing, is no clip's JSON, lacks an entry, or has one that can't be.
    """
    return parse_report(read_report_entries(path), path.name, required=required)


def read_report_entries(path: Path) -> dict[str, Any]:
    """Read the JSON beside a clip, without a look at its entries.

    Raises:
        InputError: it is missing, too large, or no JSON object.
    """
    if not path.is_file():
        raise InputError(f"{path.name} is missing; copy the clip again, with its .json")
    return parse_entries(read_file(path, most=MAX_REPORT_BYTES), path.name)


def parse_entries(content: bytes, name: str) -> dict[str, Any]:
    """Parse the JSON of a clip.

    Args:
        name: of its file, for errors.

    Raises:
        InputError: it is no JSON object, or nested too deeply.
    """
    try:
        entries = json.loads(content.decode(errors="replace"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{name} cannot be read ({str(error)[:80]}); copy the clip again") from error
    if not isinstance(entries, dict) or is_deeper(entries, MAX_METADATA_DEPTH):
        raise InputError(f"{name} is not a clip's JSON; name one that infer_from_prior.py wrote")
    return entries


def parse_report(entries: Mapping[str, Any], name: str, *, required: Iterable[str]) -> ClipReport:
    """Check the entries of a clip's JSON.

    Args:
        name: of its file, for errors.
        required: the entries that it must have.

    Raises:
        InputError: it lacks one, or has one that can't be.
    """
    for each in required:
        if each not in entries:
            raise InputError(f"{name} is not a clip's JSON: it lacks {each!r}")
    try:
        report = ClipReport.model_validate(entries)
    except ValidationError as error:
        raise InputError(f"{name} is not a clip's JSON: it {describe_error(error)}") from error
    if report.method in ("resume", "sigmas") and report.start_step is None:
        raise InputError(f"{name} was edited: a resume without a start_step")
    return report


# --- the prior ----------------------------------------------------------------------------------------------


def find_prior(report: ClipReport, clip: Path) -> Path:
    """Find the prior that a clip was made from.

    A prior is moved or copied as a folder, often with its clips inside or together with other priors. So the
    folders around the clip come first: another prior may have been made at the recorded path since. A folder
    counts if its prior has the recorded run id.

    Args:
        clip: its .mp4 or .json.

    Returns:
        The prior's folder; the recorded one where no prior is found.
    """
    for directory in places_of_prior(report, clip):
        if (directory / METADATA_FILE).is_file() and has_run_id(directory, report.prior_run_id):
            return directory
    return Path(report.prior_dir)


def places_of_prior(report: ClipReport, clip: Path) -> Iterator[Path]:
    """Yield the folders that may be a clip's prior, the nearest first."""
    around = clip.absolute().parents[1:3]  # of its outputs folder, or of a sweep's folder in that
    yield from around
    recorded = Path(report.prior_dir)
    if recorded.name not in ("", ".."):
        yield from (parent.with_name(recorded.name) for parent in around if parent.name)  # beside them
        yield recorded


def has_run_id(directory: Path, run_id: str) -> bool:
    """Return whether a prior has a run id; "": any prior has."""
    try:
        return not run_id or read_run(directory).metadata.run_id == run_id
    except InputError:
        return False
