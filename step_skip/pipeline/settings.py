"""Hold the settings of one run that determine its schedule, shape and cost, and check some of them."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from step_skip.errors import InputError
from step_skip.models.weights import published_name

SCHEDULE_FLAGS = ("num_inference_steps", "denoising_strength", "sigma_shift")  # they determine the schedule


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """The settings of a run, named as the arguments of WanVideoPipeline.

    cfg_scale: one value for all steps, or a tuple with one for each step that runs.
    skip_cache: not an argument of WanVideoPipeline; one step in `skip_cache` runs all blocks
        (pipeline/cheaper.py). None: all steps do.
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
    switch_DiT_boundary: float | None = None  # 0 ... 1; below it the second of two experts runs

    @property
    def size(self) -> tuple[int, int, int]:
        """Return height and width in pixels, and number of frames."""
        return self.height, self.width, self.num_frames

    @property
    def pipeline_inputs(self) -> dict[str, Any]:
        """Return the arguments for WanVideoPipeline."""
        left_out = ["skip_cache", *(["switch_DiT_boundary"] if self.switch_DiT_boundary is None else [])]
        return {name: value for name, value in vars(self).items() if name not in left_out}


def one_or_each(values: Sequence[float]) -> float | tuple[float, ...]:
    """Return a single value if all values are equal, else a tuple of them."""
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
        InputError: both are given, or TeaCache has no coefficients for the model.
    """
    if tea_cache_l1_thresh is None:
        if tea_cache_model_id:
            raise InputError("--tea_cache_model_id has no effect without --tea_cache_l1_thresh: give both")
        return Cheaper(skip_cache=skip_cache)
    if skip_cache is not None:
        raise InputError("--skip_cache and --tea_cache_l1_thresh save the same work: give one of them")
    from step_skip.pipeline.cheaper import check_tea_cache_model_id

    model_id = tea_cache_model_id or published_name(model)
    check_tea_cache_model_id(model_id)
    return Cheaper(tea_cache_l1_thresh=tea_cache_l1_thresh, tea_cache_model_id=model_id)


def check_tea_cache_experts(tea_cache_l1_thresh: float | None, experts: Collection[str]) -> None:
    """Check that TeaCache runs with one expert only: it would reuse an update of one expert in the other.

    Args:
        experts: the experts of the steps that run.

    Raises:
        InputError: TeaCache is on and two experts run.
    """
    if tea_cache_l1_thresh is not None and len(set(experts)) > 1:
        raise InputError(
            "--tea_cache_l1_thresh: these steps need both experts, and TeaCache would reuse an update of the "
            "first in the second; use --skip_cache, or run steps of one expert alone"
        )


TILING = {"tile_size": (30, 52), "tile_stride": (15, 26)}  # latents; WanVideoPipeline's own defaults


def check_distinct(timesteps: list[float]) -> None:
    """Check that timesteps decrease strictly, because the scheduler finds a step by its timestep.

    Args:
        timesteps: of all steps, 0 ... 1000.

    Raises:
        InputError: two steps share a timestep; the message names them.
    """
    for step, (now, after) in enumerate(zip(timesteps, timesteps[1:], strict=False)):
        if not after < now:
            raise InputError(
                f"steps {step} and {step + 1} of this schedule are both at timestep {now:.6g}, expected "
                "decreasing ones; use a --sigma_shift nearer to 5 or a smaller --num_inference_steps"
            )
