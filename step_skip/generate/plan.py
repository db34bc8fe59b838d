"""Plan one prior: check every choice, and compute the metadata it begins with.

Nothing is loaded. infer/plan.py does the same for a clip.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from step_skip.errors import InputError
from step_skip.files.schema import describe_error
from step_skip.generate.choices import PriorChoices, check_prior_choices
from step_skip.media.videos import video_bytes
from step_skip.method.steps import recommended_start_step
from step_skip.models.families import FAMILIES, expert_of, round_sizes
from step_skip.models.lora import check_lora_experts, describe_loras
from step_skip.models.machine import describe_machine, installed_versions
from step_skip.models.memory import in_tiles
from step_skip.models.weights import LoadOptions, model_defaults
from step_skip.pipeline.settings import (
    CHEAPER_NAMES,
    SCHEDULE_FLAGS,
    check_distinct,
    check_tea_cache_experts,
    choose_cheaper,
)
from step_skip.prior.prior import Prior, bytes_of_prior
from step_skip.prior.schema import Metadata

log = logging.getLogger(__name__)
DIFFSYNTH_BOUNDARY = 0.875  # WanVideoPipeline's own switch_DiT_boundary, for a pipeline of the user's own


def plan_prior(options: LoadOptions, choices: PriorChoices, *, family: str) -> Metadata:
    """Return the metadata that is known before a run, except for the prompt: settings, schedule, machine.

    Args:
        family: of FAMILIES.

    Raises:
        InputError: a choice that can't be used, or a schedule that can't be resumed.
    """
    from step_skip.pipeline.schedulers import compute_schedule
    from step_skip.pipeline.settings import TILING

    check_prior_choices(choices)
    defaults = dataclasses.asdict(model_defaults(options.model, options.model_dir))
    given = {name: value for name, value in dataclasses.asdict(choices).items() if value is not None}
    chosen = {**dataclasses.asdict(choices), **defaults, **given}
    wanted = {name: chosen[name] for name in ("height", "width", "num_frames")}
    sizes = round_sizes(**wanted, family=FAMILIES[family])
    if sizes != wanted:
        size = f"{sizes['width']} x {sizes['height']} pixels, {sizes['num_frames']} frames"
        log.info(f"size rounded up to {size}, as the model needs")
    cheaper = choose_cheaper(options.model, **{name: chosen[name] for name in CHEAPER_NAMES})
    schedule = {name: chosen[name] for name in SCHEDULE_FLAGS}
    timesteps, sigmas = compute_schedule(**schedule)
    check_distinct(timesteps)
    of_experts = choose_experts(choices, chosen, family)
    check_lora_experts(options.loras, experts=len(FAMILIES[family].experts))
    boundary = of_experts.get("switch_DiT_boundary")
    check_tea_cache_experts(cheaper.tea_cache_l1_thresh, {expert_of(each, boundary) for each in timesteps})
    names = ("cfg_scale", "seed", "negative_prompt", "fps", "stop_after", "save_decoded_videos")
    entries = {
        **schedule,
        **sizes,
        **{name: chosen[name] for name in names},
        **of_experts,
        **dataclasses.asdict(cheaper),
        "keeps_nega": 1 not in (chosen["cfg_scale"], of_experts.get("cfg_scale_2")) and not cheaper.is_used,
        "scheduler_timesteps": timesteps,
        "scheduler_sigmas": sigmas,
        "start_step": given.get("start_step", recommended_start_step(len(sigmas))),
        "start_step_chosen": "start_step" in given,
        "model": options.model,
        "family": family,
        "lora": describe_loras(options.loras),
        "dtype": options.dtype,
        **{name: getattr(options, name) for name in ("vram", "quantize", "compile")},
        "tiled": in_tiles(choices.tiled, options.model, sizes, model_dir=options.model_dir),
        **TILING,
        **describe_machine(options.device),
        "versions": installed_versions(),
    }
    try:
        return Metadata.model_validate(entries)
    except ValidationError as error:
        raise InputError(f"a prior can't be made so: it {describe_error(error)}") from error


def choose_experts(choices: PriorChoices, chosen: Mapping[str, Any], family: str) -> dict[str, Any]:
    """Return what is recorded of two experts: the boundary between them, and the second one's guidance.

    Args:
        chosen: the choices, with the model's defaults.

    Raises:
        InputError: the model has one network.
    """
    names = ("switch_DiT_boundary", "cfg_scale_2")
    if len(FAMILIES[family].experts) == 1:
        for name in names:
            if getattr(choices, name) is not None:
                raise InputError(
                    f"--{name} is of a model with two experts, and this one has one: leave it out"
                )
        return {}
    follows = choices.cfg_scale is not None and choices.cfg_scale_2 is None
    boundary = chosen["switch_DiT_boundary"] or DIFFSYNTH_BOUNDARY
    return {"switch_DiT_boundary": boundary, "cfg_scale_2": None if follows else chosen["cfg_scale_2"]}


def bytes_needed(prior: Prior, *, videos: int) -> int:
    """Return a safe upper bound of what a prior takes on disk, in bytes."""
    return bytes_of_prior(prior) + videos * video_bytes(prior.settings.size)
