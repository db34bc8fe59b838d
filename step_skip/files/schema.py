"""Types for JSON that may come from an untrusted source, checked by pydantic when it is read.

Each type bounds what it accepts, and its errors name what was expected. Numbers keep their JSON type: an int
isn't made a float, so that text made from them stays the same.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, PlainValidator, ValidationError

from step_skip.files.bounds import MAX_FILE_NAME, MAX_NAME, MAX_STEPS, is_number, is_utf8, short
from step_skip.files.names import FILE_NAME

T = TypeVar("T")


def must(expected: str, holds: Callable[[Any], bool]) -> Callable[[Any], Any]:
    """Return a check for pydantic, whose error names what was expected."""

    def check(value: Any) -> Any:
        if not holds(value):
            raise ValueError(expected)
        return value

    return check


def in_range(least: float, most: float) -> AfterValidator:
    """Return a check that a number lies in a range, both ends included."""
    return AfterValidator(must(f"{least} to {most}", lambda value: least <= value <= most))


def at_most(entries: int) -> BeforeValidator:
    """Return a check of the length of a list or an object, made before its entries are looked at."""
    return BeforeValidator(
        must(
            f"at most {entries} entries",
            lambda value: not isinstance(value, list | dict) or len(value) <= entries,
        )
    )


def is_shape(value: list) -> bool:
    """Return whether a list can be the shape of a tensor."""
    return len(value) <= 8 and all(type(size) is int and 0 < size < 2**31 for size in value)


Text = Annotated[str, AfterValidator(must("text that is UTF-8", is_utf8))]
Name = Annotated[
    Text, AfterValidator(must(f"at most {MAX_NAME} characters", lambda text: len(text) <= MAX_NAME))
]
# A name that becomes a part of a file's name: one component of a path, on any system.
FileName = Annotated[
    Text,
    AfterValidator(
        must(
            f"1 to {MAX_FILE_NAME} letters, digits, . _ and -",
            lambda text: re.fullmatch(FILE_NAME, text, flags=re.ASCII) and len(text) <= MAX_FILE_NAME,
        )
    ),
]
Number = Annotated[float, PlainValidator(must("a number", is_number))]  # an int stays one
Positive = Annotated[
    float, PlainValidator(must("a number above 0", lambda value: is_number(value) and value > 0))
]
NotNegative = Annotated[
    float, PlainValidator(must("a number from 0 on", lambda value: is_number(value) and value >= 0))
]
Seconds = Annotated[NotNegative, in_range(0, 1e9)]
Count = Annotated[int, in_range(0, 2**63 - 1)]
Sha256 = Annotated[
    str, AfterValidator(must("64 hex digits", lambda text: re.fullmatch("[0-9a-f]{64}", text)))
]
TensorShape = Annotated[list, AfterValidator(must("sizes above 0", is_shape))]
PerStep = Annotated[list[T], at_most(MAX_STEPS)]
PerFile = Annotated[dict[str, T], at_most(10 * MAX_STEPS)]
Few = Annotated[T, at_most(100)]
# An entry that a record may lack: None stands for its absence, and null in the JSON is refused.
if TYPE_CHECKING:
    from typing import Optional as Recorded
else:
    Recorded = Annotated[T, "not null"]


class Record(BaseModel):
    """A JSON object: its types are JSON's own, nothing is converted, and unknown entries are kept."""

    model_config = ConfigDict(strict=True, extra="allow")

    def recorded(self) -> dict[str, Any]:
        """Return the entries that are recorded, as JSON has them; not those that have a default only."""
        return self.model_dump(exclude_unset=True)


def describe_error(error: ValidationError) -> str:
    """Describe the first of pydantic's errors: what was found, and what was expected."""
    path, value, expected = first_error(error)
    where = "".join(f"[{short(part)}]" for part in path[1:])
    return f"has {path[0]}{where} = {value}, expected {expected}" if path else expected


def first_error(error: ValidationError) -> tuple[tuple[int | str, ...], str, str]:
    """Return where the first of pydantic's errors is, what was found there, and what was expected.

    An error of a record as a whole is nowhere: its text says what was found, too.
    """
    first = error.errors(include_url=False)[0]
    path, raised = first["loc"], first.get("ctx", {}).get("error")
    if raised is not None:
        return path, short(first["input"]), str(raised)
    if first["type"] == "missing":
        return path[:-1], short(first["input"]), f"one with {path[-1]}"
    expected = {"model_type": "a JSON object"}.get(
        first["type"], first["msg"].removeprefix("Input should be ")
    )
    return path, short(first["input"]), expected
