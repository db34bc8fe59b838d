"""Turn the prompts and options of the command line and of --prompts_file into choices, one for each clip."""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from step_skip.cli.flags import (
    alternatives,
    closeness,
    non_negative_int,
    numbers_of_steps,
    positive_float,
    start_steps,
    strength,
    utf8_text,
)
from step_skip.errors import InputError
from step_skip.files.bounds import MAX_PROMPTS_BYTES
from step_skip.infer.choices import Choices

METHOD_FLAGS = ("start_step", "steps", "num_steps", "sigmas")
OVERRIDES = {  # the keys of a JSON line of --prompts_file, and the type of each value
    "prompt": utf8_text,
    "negative_prompt": utf8_text,
    "cfg_scale": alternatives,
    "cfg_scale_2": positive_float,
    "start_step": start_steps,
    "steps": non_negative_int,
    "num_steps": numbers_of_steps,
    "closeness": closeness,
    "sigmas": strength,
}
LISTS = ("cfg_scale", "start_step", "steps", "num_steps", "sigmas")  # the keys whose value may be a list


def read_choices(args: argparse.Namespace) -> list[Choices]:
    """Return the choices of each clip: LoRA strength x prompt x start step or number of steps x cfg_scale.

    LoRA strengths are the outermost loop, so that the weights of each are loaded once. The entries of a line
    of --prompts_file take precedence over the command line's.

    Raises:
        InputError: see `read_prompts`.
    """
    lines = [{"prompt": prompt} for prompt in args.prompt or ()]
    if args.prompts_file is not None:
        lines += read_prompts(args.prompts_file)
    names = {field.name for field in dataclasses.fields(Choices)}
    given = {name: value for name, value in vars(args).items() if name in names} | {"prompt": None}
    loras = [None] if args.lora is None else itertools.product(*args.lora)
    return [
        each
        for lora in loras
        for line in lines or [{}]
        for each in _choices_of_line(given | {"lora": lora}, line)
    ]


def _choices_of_line(given: dict[str, Any], line: dict[str, Any]) -> Iterator[Choices]:
    """Yield the choices of one line: one start step or number of steps, and one cfg_scale, at a time."""
    if line.keys() & set(METHOD_FLAGS):
        given = given | dict.fromkeys((*METHOD_FLAGS, "closeness"))
    chosen = given | line
    starts, counts = (itertools.chain(*chosen[name] or [[None]]) for name in ("start_step", "num_steps"))
    scales = itertools.product(*chosen["cfg_scale"]) if chosen["cfg_scale"] else [None]
    for start, count, scale in itertools.product(starts, counts, scales):
        each = {"start_step": start, "num_steps": count, "cfg_scale": None if scale is None else list(scale)}
        yield Choices(**{**chosen, **each})


def read_prompts(path: Path) -> list[dict[str, Any]]:
    """Return the entries of a prompts file, one per line: a prompt, or a JSON object with keys of OVERRIDES.

    A line that begins with # is a comment.

    Raises:
        InputError: names the file or line that is wrong.
    """
    if not path.is_file():
        raise InputError(f"--prompts_file {path} is not a file; name a text file, one prompt per line")
    if path.stat().st_size > MAX_PROMPTS_BYTES:
        raise InputError(
            f"--prompts_file {path} is larger than {MAX_PROMPTS_BYTES} bytes; name a smaller file"
        )
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(
            f"--prompts_file {path} is not UTF-8 text ({error.reason}); save it as UTF-8"
        ) from error
    if is_json_array(text):
        raise InputError(
            f"--prompts_file {path} is a JSON array; write one prompt per line, as text or as "
            '{"prompt": "..."}'
        )
    if "\0" in text:
        raise InputError(f"--prompts_file {path} holds zero bytes, as UTF-16 text does; save it as UTF-8")
    numbered = [(number, line.strip()) for number, line in enumerate(text.split("\n"), 1)]
    prompts = [
        read_overrides(line, f"--prompts_file {path}, line {number}")
        if line.startswith("{")
        else {"prompt": line}
        for number, line in numbered
        if line and not line.startswith("#")
    ]
    if not prompts:
        raise InputError(f"--prompts_file {path} holds no prompt; write one per line")
    return prompts


def is_json_array(text: str) -> bool:
    """Return whether the whole text is a JSON array; a prompt may begin with [, too."""
    try:
        return text.lstrip().startswith("[") and isinstance(json.loads(text), list)
    except (ValueError, RecursionError):
        return False


def read_overrides(line: str, where: str) -> dict[str, Any]:
    """Return the entries of one JSON line, parsed like the flags of the same names.

    Raises:
        InputError: the line is not a JSON object, has an unknown key, or a value that the flag refuses.
    """
    try:
        given = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where} begins with {{ but is not valid JSON ({error}); correct it") from error
    if unknown := given.keys() - OVERRIDES.keys():
        raise InputError(
            f"{where} has the unknown key {sorted(unknown)[0]!r}; use only {', '.join(OVERRIDES)}"
        )
    if len(given.keys() & set(METHOD_FLAGS)) > 1:
        raise InputError(f"{where} has more than one of {', '.join(METHOD_FLAGS)}; keep one")
    return {name: read_override(name, value, where) for name, value in given.items()}


def read_override(name: str, value: Any, where: str) -> Any:
    """Parse one value of a JSON line into the form that argparse gives the flag of that name.

    Raises:
        InputError: the flag refuses the value.
    """
    kind, many = OVERRIDES[name], name in LISTS
    values = value if many and isinstance(value, list) and value else [value]
    try:
        if kind is utf8_text and not isinstance(value, str):
            raise ValueError("not a text")
        taken = [kind(str(each)) for each in values]
    except (ValueError, argparse.ArgumentTypeError) as error:
        raise InputError(
            f"{where}: {name} is {value!r} ({error}); write a value that --{name} accepts"
        ) from error
    return taken if many else taken[0]
