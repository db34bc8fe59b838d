"""Command lines as text: the one that runs, and the one that makes a clip again.

The second is written beside the clip, with everything else that made it, and into the video. Its own
metadata, which ffprobe shows: the prompt is the title, the command line the description, prompt, seed and
settings as JSON the comment.
"""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final

from step_skip.compute import OFF
from step_skip.experts import choose_guidance, experts_of
from step_skip.lora import lora_text, parse_recorded_loras
from step_skip.models import model_defaults
from step_skip.prior import Prior

METHODS: Final = {"resume": "start_step", "differential": "steps", "sigmas": "sigmas"}  # and the flag of each
# what stands in a video's own metadata: all that decides it, nothing of the machine or the time it took
EMBEDDED = (
    "prompt",
    "negative_prompt",
    "seed",
    "model",
    "prior_run_id",
    "prior_prompt",
    "prior_image",
    "num_inference_steps",
    "method",
    "start_step",
    "steps_run",
    "sigmas",
    "forwards",
    "cfg_scale",
    "sigma_shift",
    "height",
    "width",
    "num_frames",
    "fps",
    "lora",
    "skip_cache",
    "tea_cache_l1_thresh",
    "tea_cache_model_id",
    "command",
)
MAX_EMBEDDED_BYTES = 2**15  # ffmpeg takes them as an argument, whose length systems limit


def own_command(words: Iterable[object]) -> str:
    """The script that runs, with these words, as a shell takes it."""
    script = Path(sys.argv[0])
    start = ["python", sys.argv[0]] if script.suffix == ".py" else [script.name]
    return shlex.join([*start, *map(str, words)])


def quote_prompt(words: list[str], prompts: list[str]) -> list[str]:
    """A command line's words, with the prompts after --prompt as one."""
    begin = words.index("--prompt") + 1
    return [*words[:begin], " ".join(prompts), *words[begin + len(prompts) :]]


def flags_of(report: Mapping[str, Any], prior: Prior) -> dict[str, Any]:
    """What a clip was asked for beyond what its prior gives by itself, by flag; its steps as they ran.

    Raises:
        KeyError, TypeError: the report is no clip's.
    """
    m, defaults = prior.metadata, model_defaults(report["model"])
    steps, sigmas = report["steps_run"], report.get("sigmas")
    method = METHODS[report["method"]]
    flags = {"prompt": report["prompt"], method: report["steps_run" if method == "steps" else method]}
    experts = experts_of(steps, sigmas, prior)
    usual = choose_guidance(
        prior, cfg_scale=None, cfg_scale_2=None, default=defaults.cfg_scale, experts=experts
    )
    for name, default in (
        ("negative_prompt", m.get("negative_prompt")),
        ("cfg_scale", list(usual) if isinstance(usual, tuple) else usual),
        ("fps", m.get("fps", defaults.fps)),
        ("skip_cache", None),
        ("tea_cache_l1_thresh", None),
        ("tea_cache_model_id", ""),
        ("model_dir", None),
    ):
        given = report.get(name)
        given = list(given) if isinstance(given, tuple) else given
        if given not in (None, default):
            flags[name] = given
    if (tiled := report.get("tiled", True)) != m.get("tiled", True):
        flags["vae_tiling"] = "on" if tiled else "off"
    for name in ("quantize", "compile"):
        if (given := report.get(name)) != m.get(name):
            flags[name] = given or OFF
    if prior.is_legacy:
        flags |= {name: report[name] for name in ("image", "model")}
    if (loras := report.get("lora", [])) != m.get("lora", []):
        flags["lora"] = [lora_text(lora) for lora in parse_recorded_loras(loras)]
    return flags


def command_of(report: Mapping[str, Any], prior: Prior) -> str:
    """The command line that makes a clip again, for a shell."""
    words = ["python", "infer_from_prior.py", "--prior_dir", str(prior.directory)]
    for name, value in flags_of(report, prior).items():
        values = [str(each) for each in value] if isinstance(value, list) else [str(value)]
        if len(values) == 1 and values[0].startswith("-"):
            words.append(f"--{name}={values[0]}")
        else:
            words += [f"--{name}", *values]
    return shlex.join(words)


def video_tags(report: Mapping[str, Any]) -> dict[str, str]:
    """A video's own metadata, by MP4's names, but for what is too long; the prior is named, not its place."""
    told = {name: report[name] for name in EMBEDDED if report.get(name) is not None}
    words = shlex.split(report["command"])
    place = words.index("--prior_dir") + 1
    told["command"] = shlex.join([*words[:place], Path(words[place]).name, *words[place + 1 :]])
    tags = {
        "title": report["prompt"][:200],
        "description": told["command"],
        "comment": json.dumps(told, ensure_ascii=False),
    }
    plain = {name: text.replace("\0", "").encode(errors="replace") for name, text in tags.items()}
    return {name: text.decode() for name, text in plain.items() if len(text) <= MAX_EMBEDDED_BYTES}
