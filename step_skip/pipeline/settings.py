"""The settings of one run: what fixes its schedule, its shape and its cost."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from step_skip.errors import InputError
from step_skip.models.weights import published_name

SCHEDULE_FLAGS = ("num_inference_steps", "denoising_strength", "sigma_shift")  # what fixes it


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """What fixes the schedule, the shape and the cost of a run; the names are WanVideoPipeline's.

    cfg_scale: one for all steps, or a tuple with one for each step that runs.
    skip_cache: ours; one step in so many runs all blocks (cheaper.py), None: all do.
    """

    num_inference_steps: int
    denoising_strength: float
    sigma_shift: float
    cfg_scale: float | tuple[float, ...]
    height: int
    width: int
    num_frames: int
    tiled: bool = True
    seed: int | None = None
    skip_cache: int | None = None
    tea_cache_l1_thresh: float | None = None
    tea_cache_model_id: str = ""
    switch_DiT_boundary: float | None = None  # where the second of two experts takes over

    @property
    def size(self) -> tuple[int, int, int]:
        """Height, width (pixels) and number of frames."""
        return self.height, self.width, self.num_frames

    @property
    def pipeline_inputs(self) -> dict[str, Any]:
        """The settings that WanVideoPipeline takes."""
        left_out = ["skip_cache", *(["switch_DiT_boundary"] if self.switch_DiT_boundary is None else [])]
        return {name: value for name, value in vars(self).items() if name not in left_out}


def one_or_each(values: Sequence[float]) -> float | tuple[float, ...]:
    """One value where all are alike, else a tuple of them."""
    return values[0] if len(set(values)) == 1 else tuple(values)


CHEAPER_NAMES = ("skip_cache", "tea_cache_l1_thresh", "tea_cache_model_id")


@dataclass(frozen=True, kw_only=True)
class Cheaper:
    """What makes steps cheaper, as RunSettings has it; the fields are CHEAPER_NAMES."""

    skip_cache: int | None = None
    tea_cache_l1_thresh: float | None = None
    tea_cache_model_id: str = ""

    @property
    def is_used(self) -> bool:
        """Whether any step is made cheaper."""
        return (self.skip_cache, self.tea_cache_l1_thresh) != (None, None)


def choose_cheaper(
    model: str,
    *,
    skip_cache: int | None,
    tea_cache_l1_thresh: float | None,
    tea_cache_model_id: str | None,
) -> Cheaper:
    """Check Skip-Cache and TeaCache, and choose TeaCache's coefficients.

    Raises:
        InputError: both at once, or a model without coefficients.
    """
    if tea_cache_l1_thresh is None:
        if tea_cache_model_id:
            raise InputError("--tea_cache_model_id says nothing without --tea_cache_l1_thresh: give both")
        return Cheaper(skip_cache=skip_cache)
    if skip_cache is not None:
        raise InputError("--skip_cache and --tea_cache_l1_thresh save the same work: give one of them")
    from step_skip.pipeline.cheaper import check_tea_cache_model_id

    model_id = tea_cache_model_id or published_name(model)
    check_tea_cache_model_id(model_id)
    return Cheaper(tea_cache_l1_thresh=tea_cache_l1_thresh, tea_cache_model_id=model_id)


def check_tea_cache_experts(tea_cache_l1_thresh: float | None, experts: Collection[str]) -> None:
    """Refuse TeaCache where two experts run: it would use what one of them added in the other's step.

    Raises:
        InputError: they do.
    """
    if tea_cache_l1_thresh is not None and len(set(experts)) > 1:
        raise InputError(
            "--tea_cache_l1_thresh: these steps pass from one expert to the other, and TeaCache would carry "
            "what the first added into the second; use --skip_cache, or run steps of one expert alone"
        )


TILING = {"tile_size": (30, 52), "tile_stride": (15, 26)}  # latents; WanVideoPipeline's own defaults


def check_distinct(timesteps: list[float]) -> None:
    """Refuse a schedule in which two steps share a timestep: the scheduler finds its place by timestep.

    Raises:
        InputError: naming the steps.
    """
    for step, (now, after) in enumerate(zip(timesteps, timesteps[1:], strict=False)):
        if not after < now:
            raise InputError(
                f"steps {step} and {step + 1} of this schedule are both at timestep {now:.6g}; "
                "use a --sigma_shift nearer to 5 or a smaller --num_inference_steps"
            )
