"""What a user chooses for one clip, and which choices the prior has made already."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

from step_skip.errors import InputError
from step_skip.models.compute import OFF
from step_skip.models.lora_file import Lora
from step_skip.models.weights import LoadOptions
from step_skip.pipeline.settings import SCHEDULE_FLAGS
from step_skip.prior.prior import Prior

if TYPE_CHECKING:
    from PIL.Image import Image

AUTO: Final = "auto"  # --start_step by the prior, --num_steps by the clip, --vae_tiling by sizes
FIXED: Final = ("seed", "num_frames", "height", "width")  # by the prior's latents


@dataclass(frozen=True, kw_only=True, slots=True)
class Choices:
    """What somebody asks of one video; None: as in the prior, or the default. The names are the flags'."""

    prompt: str | None = None
    negative_prompt: str | None = None
    cfg_scale: float | Sequence[float] | None = None  # one, or one for each step that runs
    cfg_scale_2: float | None = None  # of the second of two experts; None: cfg_scale, if that is given
    start_step: int | Literal["auto"] | None = None  # a step, or AUTO
    steps: Sequence[int] | None = None
    num_steps: int | Literal["auto"] | None = None
    closeness: float | None = None  # with num_steps AUTO: to a full run, PSNR in dB
    sigmas: Sequence[float] | None = None
    num_steps_after: int | None = None  # with start_step
    text_share: float | None = None  # with start_step AUTO
    skip_cache: int | None = None
    tea_cache_l1_thresh: float | None = None
    tea_cache_model_id: str | None = None
    lora: Sequence[Lora] | None = None
    quantize: str | None = None  # compute.OFF: not what the prior was made with
    compile: str | None = None  # likewise
    tiled: bool | Literal["auto"] | None = None  # decoded in tiles; AUTO: if whole frames take too much
    fps: float | None = None
    image: Path | Image | None = None  # an older prior needs it; others only compare it with their own
    model: str | None = None  # this and what follows has to be the prior's
    model_dir: Path | None = None
    dtype: str | None = None
    num_inference_steps: int | None = None
    denoising_strength: float | None = None
    sigma_shift: float | None = None
    seed: int | None = None
    num_frames: int | None = None
    height: int | None = None
    width: int | None = None


def choices_on(options: LoadOptions, **choices: Any) -> Choices:
    """Return the choices of a clip on a model that was loaded, or will be, with these options."""
    if isinstance(choices.get("image"), str):
        choices["image"] = Path(choices["image"])
    return Choices(
        **choices,
        lora=options.loras,
        quantize=options.quantize or OFF,
        compile=options.compile or OFF,
        dtype=options.dtype,
    )


def check_choices(choices: Choices, prior: Prior) -> None:
    """Refuse flags that contradict the prior, and an older prior without what it doesn't record.

    Raises:
        InputError: with the flag, the prior's value and what to do.
    """
    for name in (*SCHEDULE_FLAGS, "model", "dtype"):
        given, own = getattr(choices, name), getattr(prior.metadata, name) or None
        if None not in (given, own) and given != own:
            raise InputError(
                f"--{name} {given}: the prior has {own}; leave the flag out or make a prior with it"
            )
    for name in FIXED:
        given, own = getattr(choices, name), getattr(prior.metadata, name)
        if given is not None and own is not None and given != own:
            raise InputError(
                f"--{name} is fixed by the prior: {own}, not {given}; for another make another prior, with "
                f"generate_prior.py --{name} {given}"
            )
    if choices.image is not None and not prior.is_legacy and not prior.image_files:
        raise InputError(f"--image: {prior.directory} was made without an image; leave the flag out")
    for name in ("image", "prompt") if prior.is_legacy else ():
        if getattr(choices, name) is None:
            raise InputError(f"{prior.directory} records no {name} (an older format): give --{name}")
