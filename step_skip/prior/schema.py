"""What run_metadata.json may say: one schema, checked once, when it is read.

Anybody may have written it. So every entry that this program uses is here with its type, range and length,
and what uses it later need not look again. Entries that are not here are left alone: a later version may add
some. One that it adds is a line in `Metadata`, with a default, since older priors lack it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, ValidationError, model_validator

from step_skip.errors import InputError
from step_skip.files.bounds import LIMITS, MAX_NAME, MAX_PIXELS, MAX_STEPS, is_number, is_utf8, short
from step_skip.models.families import DEFAULT_FAMILY, FAMILIES

T = TypeVar("T")

METADATA_FILE = "run_metadata.json"
CALLED = {"lora": "a LoRA", "files": "the SHA-256 of {}", "shapes": "the shape of {}"}  # in errors
EXPECTED = {"model_type": "a JSON object"}  # by pydantic's type of error


def _must(expected: str, holds: Callable[[Any], bool]) -> Callable[[Any], Any]:
    """A check for pydantic; the error says what was expected."""

    def check(value: Any) -> Any:
        if not holds(value):
            raise ValueError(expected)
        return value

    return check


def _between(least: float, most: float) -> AfterValidator:
    return AfterValidator(_must(f"{least} to {most}", lambda value: least <= value <= most))


def _at_most(entries: int) -> BeforeValidator:
    """For a list or an object: looked at before its entries are, each of which may cost an error."""
    return BeforeValidator(
        _must(
            f"at most {entries} entries",
            lambda value: not isinstance(value, list | dict) or len(value) <= entries,
        )
    )


def _is_shape(value: list) -> bool:
    return len(value) <= 8 and all(type(size) is int and 0 < size < 2**31 for size in value)


Text = Annotated[str, AfterValidator(_must("text that is UTF-8", is_utf8))]
Name = Annotated[
    Text, AfterValidator(_must(f"at most {MAX_NAME} characters", lambda text: len(text) <= MAX_NAME))
]
Number = Annotated[float, BeforeValidator(_must("a number", is_number))]
Positive = Annotated[
    float, BeforeValidator(_must("a number above 0", lambda value: is_number(value) and value > 0))
]
NotNegative = Annotated[
    float, BeforeValidator(_must("a number from 0 on", lambda value: is_number(value) and value >= 0))
]
Seconds = Annotated[NotNegative, _between(0, 1e9)]
Count = Annotated[int, _between(0, 2**63 - 1)]
Sha256 = Annotated[
    str, AfterValidator(_must("64 hex digits", lambda text: re.fullmatch("[0-9a-f]{64}", text)))
]
KnownFamily = Annotated[
    str, AfterValidator(_must(f"one of {', '.join(FAMILIES)}", lambda name: name in FAMILIES))
]
TensorShape = Annotated[list, AfterValidator(_must("sizes above 0", _is_shape))]
PerStep = Annotated[list[T], _at_most(MAX_STEPS)]
PerFile = Annotated[dict[str, T], _at_most(10 * MAX_STEPS)]
Few = Annotated[T, _at_most(100)]


class Record(BaseModel):
    """A part of the metadata: JSON's own types, nothing converted, and entries of other versions."""

    model_config = ConfigDict(strict=True, extra="allow")


class RecordedLora(Record):
    """A LoRA the prior was made with."""

    path: Name
    alpha: Number
    sha256: Sha256
    expert: Literal["dit", "dit2"] | None = None


class RecordedImage(Record):
    """An image the prior was made from, as it was given; the entries are images.Picture's."""

    name: Name
    size: PerStep[Count]
    box: PerStep[int]
    fit: Literal["crop", "pad", "stretch"]
    background: Annotated[
        str, AfterValidator(_must("a colour, #rrggbb", lambda text: re.fullmatch("#[0-9a-f]{6}", text)))
    ]
    sha256: Sha256 | None = None  # of its file


class Formation(Record):
    """How the prior took shape (steps.py), one number a step."""

    branch_distances: PerStep[NotNegative] | None = None
    text_moves: PerStep[NotNegative] | None = None


class Schedule(Record):
    """What a prior of the pull request's scripts records; everything else in it goes unread."""

    run_id: Name
    num_inference_steps: Annotated[int, _between(1, MAX_STEPS)]
    scheduler_timesteps: PerStep[Any]
    scheduler_sigmas: PerStep[Any]
    denoising_strength: Annotated[Positive, AfterValidator(_must("at most 1", lambda value: value <= 1))]
    sigma_shift: Positive
    height: Annotated[int, _between(*LIMITS["height"])]
    width: Annotated[int, _between(*LIMITS["width"])]
    num_frames: Annotated[int, _between(*LIMITS["num_frames"])]

    @model_validator(mode="after")
    def check_schedule(self) -> Schedule:
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


class Metadata(Schedule):
    """What a prior of version 1 records; what has a default was added later, and may be absent."""

    status: Literal["running", "stopped", "complete"]
    files: PerFile[Sha256]
    shapes: PerFile[TensorShape]
    model: Name
    family: KnownFamily = DEFAULT_FAMILY
    model_fingerprint: Few[dict[str, Name]]
    prompt: Text
    negative_prompt: Text
    cfg_scale: Positive
    start_step: int
    fps: Annotated[Positive, _between(*LIMITS["fps"])]
    dtype: Literal["bfloat16", "float16", "float32"]
    tiled: bool
    seed: Annotated[int, _between(*LIMITS["seed"])]
    versions: Few[dict[str, Name]]
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
        Annotated[Positive, AfterValidator(_must("at most 1", lambda value: value <= 1))] | None
    ) = None
    skip_cache: Annotated[int, _between(2, MAX_STEPS)] | None = None
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

    @model_validator(mode="after")
    def check_steps(self) -> Metadata:
        if not 0 <= self.start_step < self.num_inference_steps:
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


def check_entries(metadata: Mapping[str, Any], schema: type[Record]) -> None:
    """Hold metadata, as JSON gave it, against its schema.

    Raises:
        InputError: an entry that is missing or can't be; the first.
    """
    try:
        schema.model_validate(metadata)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise InputError(f"{METADATA_FILE} {_tell(first)}") from error


def _tell(error: Mapping[str, Any]) -> str:
    """One of pydantic's errors in this program's words."""
    place, value, raised = error["loc"], short(error["input"]), error.get("ctx", {}).get("error")
    if not place:  # a validator of the whole has said it all
        return str(raised)
    missing = error["type"] == "missing"
    if missing and len(place) == 1:
        return f"lacks {place[0]!r}; it was not written by generate_prior.py, or was edited"
    expected = raised or EXPECTED.get(error["type"], error["msg"].removeprefix("Input should be "))
    expected = f"one with {place[-1]}" if missing else expected
    if place[0] == "lora" or (place[0] in CALLED and place[1:]):
        called = CALLED[place[0]].format(*place[1:])
        return f"has {value} as {called}, expected {expected}; make the prior again"
    where = "".join(f"[{short(part)}]" for part in place[1:])
    return f"has {place[0]}{where} = {value}, expected {expected}"


FORMATION_KEY = "formation"  # in a prior's metadata
FORMATION_FILE = "formation.png"
