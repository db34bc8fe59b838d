"""Describe what run_metadata.json may hold: one schema, checked once, when the file is read.

The file may come from an untrusted source. So every entry that this program uses is here with its type, range
and length, and code that uses it later need not check it again. Entries that are not here are kept as they
are: a later version may add some. A new entry is a line in `Metadata` with a default, since older priors lack
it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, ValidationError, model_validator

from step_skip.errors import InputError
from step_skip.files.bounds import LIMITS, MAX_PIXELS, MAX_STEPS, is_number, short
from step_skip.files.schema import (
    Count,
    Few,
    FileName,
    Name,
    NotNegative,
    PerFile,
    PerStep,
    Positive,
    Record,
    Recorded,
    Seconds,
    Sha256,
    TensorShape,
    Text,
    describe_error,
    first_error,
    in_range,
    must,
)
from step_skip.models.families import DEFAULT_FAMILY, FAMILIES
from step_skip.models.lora import RecordedLora

METADATA_FILE = "run_metadata.json"
CALLED = {"lora": "a LoRA", "files": "the SHA-256 of {}", "shapes": "the shape of {}"}  # in errors

KnownFamily = Annotated[
    str, AfterValidator(must(f"one of {', '.join(FAMILIES)}", lambda name: name in FAMILIES))
]


class RecordedImage(Record):
    """An image the prior was made from, as it was given; the entries are images.Picture's."""

    name: Name
    size: PerStep[Count]
    box: PerStep[int]
    fit: Literal["crop", "pad", "stretch"]
    background: Annotated[
        str, AfterValidator(must("a colour, #rrggbb", lambda text: re.fullmatch("#[0-9a-f]{6}", text)))
    ]
    sha256: Sha256 | None = None  # of its file


class Formation(Record):
    """How the prior took shape (steps.py), one number a step."""

    branch_distances: PerStep[NotNegative] | None = None
    text_moves: PerStep[NotNegative] | None = None


# the entries that a prior of the pull request's scripts records; everything else in it goes unread
SCHEDULE = (
    *("run_id", "num_inference_steps", "scheduler_timesteps", "scheduler_sigmas", "denoising_strength"),
    *("sigma_shift", "height", "width", "num_frames"),
)
# the entries that every prior of version 1 records
REQUIRED = (
    *SCHEDULE,
    *("status", "files", "shapes", "model", "model_fingerprint", "prompt", "negative_prompt", "cfg_scale"),
    *("start_step", "fps", "dtype", "tiled", "seed", "versions"),
)


class Metadata(Record):
    """What a prior records. Entries with a default were added later, or are not recorded by older priors.

    A planned prior has those that are known before its run. A prior of the pull request's scripts, of the
    older format, has those of SCHEDULE alone.
    """

    num_inference_steps: Annotated[int, in_range(1, MAX_STEPS)]
    scheduler_timesteps: PerStep[Any]  # floats; `check_schedule` looks at each
    scheduler_sigmas: PerStep[Any]
    denoising_strength: Annotated[Positive, AfterValidator(must("at most 1", lambda value: value <= 1))]
    sigma_shift: Positive
    height: Annotated[int, in_range(*LIMITS["height"])]
    width: Annotated[int, in_range(*LIMITS["width"])]
    num_frames: Annotated[int, in_range(*LIMITS["num_frames"])]
    run_id: FileName = ""
    format_version: int | None = None  # None: the older format
    status: Literal["running", "stopped", "complete"] = "running"
    files: PerFile[Sha256] = {}
    shapes: PerFile[TensorShape] = {}
    model: Name = ""
    family: KnownFamily = DEFAULT_FAMILY
    model_fingerprint: Few[dict[str, Name]] = {}
    prompt: Recorded[Text] = None
    negative_prompt: Recorded[Text] = None
    cfg_scale: Recorded[Positive] = None
    start_step: Recorded[int] = None
    fps: Recorded[Annotated[Positive, in_range(*LIMITS["fps"])]] = None
    dtype: Recorded[Literal["bfloat16", "float16", "float32"]] = None
    tiled: bool = True
    seed: Recorded[Annotated[int, in_range(*LIMITS["seed"])]] = None
    versions: Few[dict[str, Name]] = {}
    created: Name = ""
    prior_kind: Name = ""
    parameter_fingerprint: Few[dict[str, Name]] = {}
    lora: Few[list[RecordedLora]] = []
    images: Few[dict[str, RecordedImage]] = {}  # by file
    formation: Formation = Formation()
    start_step_chosen: bool = False
    stop_after: int | None = None
    save_decoded_videos: bool = False
    keeps_nega: bool = False
    kept_steps: PerStep[Count] | None = None  # of a prior that was pruned, or made of a clip
    expected_closeness: Positive | None = None  # of one that was made of a clip, dB
    cfg_scale_2: Positive | None = None  # of two experts, as the next
    switch_DiT_boundary: (
        Annotated[Positive, AfterValidator(must("at most 1", lambda value: value <= 1))] | None
    ) = None
    skip_cache: Annotated[int, in_range(2, MAX_STEPS)] | None = None
    tea_cache_l1_thresh: Positive | None = None
    tea_cache_model_id: Name = ""
    vram: Name = ""
    quantize: Literal["fp8"] | None = None
    compile: Name | None = None
    attention: Name = ""
    peak_memory: Few[dict[str, Count | None]] = {}
    device: Name = ""
    device_name: Name = ""
    num_threads: Count = 0
    latents_sha256: Sha256 = ""
    forwards: Count = 0
    forwards_per_step: PerStep[Count] = []
    seconds: Few[dict[str, Seconds]] = {}
    seconds_per_step: PerStep[Seconds] = []

    @property
    def sizes(self) -> dict[str, int]:
        """Height and width in pixels, and the number of frames."""
        return {"height": self.height, "width": self.width, "num_frames": self.num_frames}

    @property
    def machine(self) -> dict[str, Any]:
        """What is recorded of the machine and the versions that made it, by name."""
        names = ("device", "device_name", "num_threads", "attention")
        return self.versions | {name: getattr(self, name) for name in names if name in self.model_fields_set}

    @model_validator(mode="after")
    def check_schedule(self) -> Metadata:
        for key in ("scheduler_timesteps", "scheduler_sigmas"):
            values = getattr(self, key)
            numbers = sum(map(is_number, values))
            if not len(values) == numbers == self.num_inference_steps:
                raise ValueError(
                    f"has {numbers} finite numbers among {len(values)} entries in {key}, expected "
                    f"{self.num_inference_steps}; make the prior again"
                )
        if self.height * self.width * self.num_frames > MAX_PIXELS:
            raise ValueError(
                f"has {self.num_frames} frames of {self.height} x {self.width} pixels, expected at most "
                f"{MAX_PIXELS} pixels together"
            )
        return self

    @model_validator(mode="after")
    def check_steps(self) -> Metadata:
        if self.start_step is not None and not 0 <= self.start_step < self.num_inference_steps:
            raise ValueError(f"has start_step = {short(self.start_step)}, beyond its own steps")
        if self.stop_after is not None and not 0 <= self.stop_after < self.num_inference_steps:
            raise ValueError(f"has stop_after = {short(self.stop_after)}, expected a step; make it again")
        kept = self.kept_steps
        if kept is not None and not (
            kept and sorted(set(kept)) == kept and kept[-1] < self.num_inference_steps
        ):
            raise ValueError(f"has kept_steps = {short(kept)}, expected some of its steps; make it again")
        return self

    @model_validator(mode="after")
    def check_names(self) -> Metadata:
        for name in self.files:
            if Path(name).name != name or name in (".", "..") or "\\" in name:
                raise ValueError(f"names the file {short(name)}, which is not inside the prior; don't use it")
            if not re.fullmatch(r"\w[\w.-]{0,254}", name, flags=re.ASCII):
                raise ValueError(f"names the file {short(name)}, as no prior's is called; don't use it")
            if name.endswith(".pt") and name not in self.shapes:
                raise ValueError(f"has None as the shape of {name}; make the prior again")
        return self


def read_entries(entries: Mapping[str, Any], *, is_legacy: bool) -> Metadata:
    """Check metadata, as JSON gave it, against the schema, and return it.

    Args:
        is_legacy: it is of the older format; entries that it doesn't define go unread.

    Raises:
        InputError: an entry is missing, or has a value that can't be; names the first.
    """
    for name in SCHEDULE if is_legacy else REQUIRED:
        if name not in entries:
            raise InputError(
                f"{METADATA_FILE} lacks {name!r}; it was not written by generate_prior.py, or was edited"
            )
    if is_legacy:
        entries = {name: entries[name] for name in SCHEDULE}
    try:
        return Metadata.model_validate(entries)
    except ValidationError as error:
        path, value, expected = first_error(error)
        if path and (path[0] == "lora" or (path[0] in CALLED and path[1:])):
            called = CALLED[str(path[0])].format(*path[1:])
            problem = f"has {value} as {called}, expected {expected}; make the prior again"
        else:
            problem = describe_error(error)
        raise InputError(f"{METADATA_FILE} {problem}") from error


FORMATION_KEY = "formation"  # in a prior's metadata
FORMATION_FILE = "formation.png"
