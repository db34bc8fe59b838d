"""One prior to make, as data: every choice, checked, and the metadata it begins with.

Nothing is loaded; plan.py does the same for a video to make from a prior.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from step_skip.experts import check_tea_cache_experts
from step_skip.families import FAMILIES, MODELS, Family, expert_of
from step_skip.files import InputError
from step_skip.loading import describe_machine, installed_versions
from step_skip.lora import check_lora_experts, describe_loras
from step_skip.memory import in_tiles
from step_skip.metadata import check_distinct
from step_skip.models import LoadOptions, model_defaults
from step_skip.plan import CHEAPER_NAMES, choose_cheaper
from step_skip.prior import SCHEDULE_FLAGS, round_sizes
from step_skip.schema import LIMITS, MAX_PIXELS, MAX_STEPS, is_number
from step_skip.steps import recommended_start_step

log = logging.getLogger(__name__)

FITS = ("crop", "pad", "stretch")  # what becomes of an image of another shape than the video's
DIFFSYNTH_BOUNDARY = 0.875  # WanVideoPipeline's own switch_DiT_boundary, for a pipeline of somebody's own


@dataclass(frozen=True, kw_only=True)
class PriorChoices:
    """What somebody asks of a prior's run; None: the model's own default. The names are the flags'."""

    negative_prompt: str | None = None
    num_inference_steps: int = 10
    sigma_shift: float | None = None
    denoising_strength: float = 1.0
    cfg_scale: float | None = None
    cfg_scale_2: float | None = None  # of the second of two experts; None: cfg_scale, if that is given
    switch_DiT_boundary: float | None = None
    seed: int = 0
    height: int | None = None
    width: int | None = None
    num_frames: int | None = None
    fps: float | None = None
    fit: str = "crop"  # of FITS
    background: str = "white"  # a colour as CSS names it
    start_step: int | None = None
    stop_after: int | None = None
    save_decoded_videos: bool = False
    skip_cache: int | None = None
    tea_cache_l1_thresh: float | None = None
    tea_cache_model_id: str | None = None
    tiled: bool | Literal["auto"] = True  # decoded in tiles; auto: if whole frames take too much memory


def check_images(model: str, family: Family, *, image: bool, end_image: bool) -> None:
    """Refuse an image that a model doesn't take, and a run without one that it needs.

    Raises:
        InputError: with the flag and what to do.
    """
    for flag, given, what, needed_by in (
        ("image", image, "first frame", {name: FAMILIES[each.family].image for name, each in MODELS.items()}),
        ("end_image", end_image, "last frame", {n: FAMILIES[e.family].end_image for n, e in MODELS.items()}),
    ):
        need = getattr(family, flag)
        if given and need == "none":
            others = ", ".join(name for name, other in needed_by.items() if other != "none")
            raise InputError(
                f"--{flag}: {model} takes no {what}; leave it out, or use another --model: {others}"
            )
        if not given and need == "required":
            others = ", ".join(name for name, other in needed_by.items() if other != "required")
            raise InputError(
                f"--{flag} is missing: {model} needs a {what}; give it, or use another --model: {others}"
            )
    if end_image and not image:
        raise InputError("--end_image is a last frame, and there is no first one: give --image, too")


def check_prior_choices(choices: PriorChoices) -> None:
    """Refuse what no run could use, before anything heavy is imported.

    Raises:
        InputError: with the flag that is wrong.
    """
    steps = choices.num_inference_steps
    if not 1 <= steps <= MAX_STEPS:
        raise InputError(f"--num_inference_steps {steps}: expected 1, at most {MAX_STEPS}")
    if choices.start_step is not None and not 0 <= choices.start_step < steps:
        raise InputError(f"--start_step {choices.start_step}: this schedule has steps 0 to {steps - 1}")
    if choices.stop_after is not None and not 0 <= choices.stop_after < steps - 1:
        raise InputError(
            f"--stop_after {choices.stop_after}: expected 0 to {steps - 2}; leave it out to run all steps"
        )
    for name in ("denoising_strength", "sigma_shift", "cfg_scale", "cfg_scale_2", "switch_DiT_boundary"):
        value = getattr(choices, name)
        if value is not None and not (is_number(value) and value > 0):
            raise InputError(f"--{name} {value}: expected a number above 0")
    for name in ("denoising_strength", "switch_DiT_boundary"):
        if (getattr(choices, name) or 0) > 1:
            raise InputError(f"--{name} {getattr(choices, name)} is above 1")
    if choices.fit not in FITS:
        raise InputError(f"--fit {choices.fit}: expected one of {', '.join(FITS)}")
    check_colour(choices.background)
    for name, (least, most) in LIMITS.items():
        value = getattr(choices, name)
        if value is not None and not least <= value <= most:
            raise InputError(f"--{name} {value} is not in the range {least} to {most}")
    if math.prod(getattr(choices, name) or 1 for name in ("height", "width", "num_frames")) > MAX_PIXELS:
        raise InputError(f"--height x --width x --num_frames is above {MAX_PIXELS} pixels; make it smaller")


def check_colour(background: str) -> None:
    """Refuse what Pillow takes for no colour.

    Raises:
        InputError: it does.
    """
    from PIL import ImageColor

    try:
        ImageColor.getrgb(background)
    except ValueError:
        raise InputError(
            f"--background {background}: expected a colour as CSS names it, white or #336699 for example"
        ) from None


def plan_prior(options: LoadOptions, choices: PriorChoices, *, family: str) -> dict[str, Any]:
    """The metadata that is known before a run, but for the prompt: settings, schedule, machine.

    Args:
        family: of FAMILIES.

    Raises:
        InputError: a choice that can't be used, or a schedule that can't be resumed.
    """
    from step_skip.pipeline import TILING
    from step_skip.schedule import compute_schedule

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
    check_tea_cache_experts(cheaper["tea_cache_l1_thresh"], {expert_of(each, boundary) for each in timesteps})
    names = ("cfg_scale", "seed", "negative_prompt", "fps", "stop_after", "save_decoded_videos")
    return {
        **schedule,
        **sizes,
        **{name: chosen[name] for name in names},
        **of_experts,
        **cheaper,
        "keeps_nega": 1 not in (chosen["cfg_scale"], of_experts.get("cfg_scale_2"))
        and not any(cheaper.values()),
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


def choose_experts(choices: PriorChoices, chosen: Mapping[str, Any], family: str) -> dict[str, Any]:
    """What is recorded of two experts: where the second takes over, and its guidance if it is another.

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
