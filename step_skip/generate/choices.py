"""What a user chooses for one prior; checked before anything heavy is imported."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

from step_skip.errors import InputError
from step_skip.files.bounds import LIMITS, MAX_PIXELS, MAX_STEPS, is_number
from step_skip.media.images import FITS, check_colour
from step_skip.models.families import FAMILIES, MODELS, Defaults, Family


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


# --- the video's size ---------------------------------------------------------------------------------------


def choose_size(
    choices: PriorChoices, size: tuple[int, int], *, defaults: Defaults, family: Family
) -> PriorChoices:
    """Choose the size that isn't given: the image's aspect ratio at the model's area, as Wan's scripts do.

    A model that was made for one size keeps it.

    Args:
        size: of the image, width and height.
    """
    if not defaults.any_size or (choices.width, choices.height) != (None, None):
        return choices
    area, multiple = defaults.width * defaults.height, 2 * family.spatial_factor

    def side(own: int, other: int) -> int:
        rounded = math.isqrt(area * own // other) // multiple * multiple
        return min(max(rounded, multiple), LIMITS["width"][1])

    width, height = size
    return replace(choices, width=side(width, height), height=side(height, width))
