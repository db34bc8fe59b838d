"""--like: what made a clip, read from beside it or from within, as flags that were not given."""

from __future__ import annotations

import argparse
from collections.abc import Collection
from typing import Any

from step_skip.cli import flags, prompts
from step_skip.errors import InputError
from step_skip.infer.report import STEP_FLAGS, flags_of, read_clip
from step_skip.infer.schema import find_prior
from step_skip.prior.metadata import read_prior
from step_skip.prior.schema import METADATA_FILE


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
        if not (args.prior_dir[0] / METADATA_FILE).is_file():
            place = report.prior_dir or "the folder of the clip"
            raise InputError(f"{where}: its prior is not at {place}; name it with --prior_dir")
    flags = flags_of(report, read_prior(args.prior_dir[0]))
    if {f"--{name}" for name in (*prompts.METHOD_FLAGS, "num_steps_after")} & set(given):
        flags = {name: value for name, value in flags.items() if name not in STEP_FLAGS.values()}
    if {"--prompt", "--prompts_file"} & set(given):
        del flags["prompt"]
    for name, value in flags.items():
        if f"--{name}" not in given:
            setattr(args, "tiled" if name == "vae_tiling" else name, _as_given(name, value, where))


def _as_given(name: str, value: Any, where: str) -> Any:
    """A value in the form that argparse would give the flag's."""
    kinds = {
        "fps": flags.limited("fps", float),
        "skip_cache": flags.period,
        "tea_cache_l1_thresh": flags.positive_float,
        "tea_cache_model_id": flags.utf8_text,
        "model": flags.utf8_text,
        "model_dir": flags.utf8_path,
        "image": flags.utf8_path,
        "lora": flags.lora_strengths,
        "vae_tiling": flags.tiling,
        "quantize": flags.utf8_text,
        "compile": flags.utf8_text,
    }
    if name not in kinds:
        taken = prompts.read_override(name, value, where)
        return [taken] if name == "prompt" else taken
    try:
        return [kinds[name](each) for each in value] if name == "lora" else kinds[name](str(value))
    except (ValueError, argparse.ArgumentTypeError) as error:
        raise InputError(f"{where}: {name} is {value!r} ({error}); correct it") from error
