"""--like: what made a clip, read from beside it or from within, as flags that were not given."""

from __future__ import annotations

import argparse
import json
import re
import subprocess
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from step_skip import cli, cli_machine
from step_skip.command import METHODS, flags_of
from step_skip.files import InputError, read_file
from step_skip.metadata import MAX_METADATA_BYTES, read_prior
from step_skip.prior import METADATA_FILE


def take_over(args: argparse.Namespace, given: Collection[str]) -> None:
    """Fill in what infer_from_prior.py's command line leaves open with what made the clip of --like.

    Args:
        given: the flags on the command line; one that chooses the steps stands for all that do.

    Raises:
        InputError: no clip, one that says something impossible, or its prior isn't where it was.
    """
    report = read_clip(args.like)
    where = f"--like {args.like}"
    if "--prior_dir" not in given:
        args.prior_dir = [find_prior(report, args.like)]
    try:
        flags = flags_of(report, read_prior(args.prior_dir[0]))
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{where} is no clip of infer_from_prior.py: it lacks {error}") from error
    if {f"--{name}" for name in (*cli.METHOD_FLAGS, "num_steps_after")} & set(given):
        flags = {name: value for name, value in flags.items() if name not in METHODS.values()}
    if {"--prompt", "--prompts_file"} & set(given):
        del flags["prompt"]
    for name, value in flags.items():
        if f"--{name}" not in given:
            setattr(args, "tiled" if name == "vae_tiling" else name, _as_given(name, value, where))


def _as_given(name: str, value: Any, where: str) -> Any:
    """A value in the form that argparse would give the flag's."""
    kinds = {
        "fps": cli.limited("fps", float),
        "skip_cache": cli.period,
        "tea_cache_l1_thresh": cli.positive_float,
        "tea_cache_model_id": cli.utf8_text,
        "model": cli.utf8_text,
        "model_dir": cli.utf8_path,
        "image": cli.utf8_path,
        "lora": cli.lora_strengths,
        "vae_tiling": cli_machine.tiling,
        "quantize": cli.utf8_text,
        "compile": cli.utf8_text,
    }
    if name not in kinds:
        taken = cli.read_override(name, value, where)
        return [taken] if name == "prompt" else taken
    try:
        return [kinds[name](each) for each in value] if name == "lora" else kinds[name](str(value))
    except (ValueError, argparse.ArgumentTypeError) as error:
        raise InputError(f"{where}: {name} is {value!r} ({error}); correct it") from error


def read_clip(path: Path) -> dict[str, Any]:
    """What is written beside a clip, or, of an .mp4 without a .json, in it.

    Raises:
        InputError: neither is.
    """
    beside = path.with_suffix(".json")
    if path.suffix == ".mp4" and not beside.is_file():
        text = read_comment(path)
    else:
        if not beside.is_file():
            raise InputError(f"--like {path} is not a file; name a clip's .json or .mp4")
        text = read_file(beside, most=MAX_METADATA_BYTES).decode(errors="replace")
    try:
        report = json.loads(text)
    except (ValueError, RecursionError):
        report = None
    if not isinstance(report, dict):
        raise InputError(f"--like {path} says nothing of how it was made; name a clip's .json or .mp4")
    return report


def read_comment(path: Path) -> str:
    """The comment in a video's own metadata; "" where there is none.

    Raises:
        InputError: no such file.
    """
    import imageio_ffmpeg

    if not path.is_file():
        raise InputError(f"--like {path} is not a file; name a clip's .json or .mp4")
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-f", "mp4", "-i", path.absolute()]
    found = subprocess.run(  # noqa: S603  imageio's own ffmpeg, and no shell
        [*command, "-f", "ffmetadata", "-"], capture_output=True, stdin=subprocess.DEVNULL
    )
    comment = re.search(rb"^comment=((?:[^\\\n]|\\.)*)", found.stdout, flags=re.MULTILINE | re.DOTALL)
    return (
        ""
        if comment is None
        else re.sub(rb"\\(.)", rb"\1", comment[1], flags=re.DOTALL).decode("utf-8", "replace")
    )


def find_prior(report: Mapping[str, Any], path: Path) -> Path:
    """The prior that a clip was made from: where it was, or where the clip lies in its outputs.

    Raises:
        InputError: it is in neither place.
    """
    recorded = report.get("prior_dir")
    places = [Path(recorded)] if isinstance(recorded, str) else []
    for place in (*places, *path.absolute().parents[1:3]):
        if (place / METADATA_FILE).is_file():
            return place
    raise InputError(f"--like {path}: its prior is not at {recorded or 'hand'}; name it with --prior_dir")
