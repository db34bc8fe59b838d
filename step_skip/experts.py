"""Two experts, one for high noise and one for low: which of them takes a step, and how each is guided.

WanVideoPipeline has them as `dit` and `dit2`, and goes over to the second below `switch_DiT_boundary`. Where
there is one network, `dit`, it takes every step.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Collection, Sequence

from step_skip.families import expert_of
from step_skip.files import InputError
from step_skip.prior import Prior, one_or_each


def experts_of(steps: Sequence[int], sigmas: Sequence[float] | None, prior: Prior) -> list[str]:
    """The network that takes each step of a run: "dit", or of two experts "dit2" for the less noisy ones.

    Args:
        steps: of the prior's schedule; where there are sigmas, places in these.
    """
    if sigmas is None:
        return [prior.expert_of(step) for step in steps]
    boundary = prior.metadata.get("switch_DiT_boundary")
    return [expert_of(_float32(1000 * _float32(sigma)), boundary) for sigma in sigmas]


def _float32(value: float) -> float:
    """As the scheduler has it, whose sigmas and timesteps are float32."""
    return struct.unpack("f", struct.pack("f", value))[0]


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


def choose_guidance(
    prior: Prior,
    *,
    cfg_scale: float | Sequence[float] | None,
    cfg_scale_2: float | None,
    default: float,
    experts: Sequence[str],
) -> float | tuple[float, ...]:
    """One cfg_scale for all steps that run, or a tuple of one for each; two experts may have their own.

    Args:
        cfg_scale, cfg_scale_2: as chosen; None: the prior's, the second only where the first isn't chosen.
        default: of an older prior, which records none.
        experts: of the steps that run.

    Raises:
        InputError: neither one value nor as many as there are steps, or a second one without a use.
    """
    m = prior.metadata
    first = m.get("cfg_scale", default) if cfg_scale is None else cfg_scale
    values = list(first) if isinstance(first, Sequence) else [first]
    second = m.get("cfg_scale_2") if cfg_scale is None and cfg_scale_2 is None else cfg_scale_2
    given = values if second is None else [*values, second]
    if not all(isinstance(value, int | float) and 0 < value < math.inf for value in given):
        raise InputError(f"--cfg_scale {first}: expected numbers above 0")
    if len(values) not in (1, len(experts)):
        raise InputError(
            f"--cfg_scale: {len(values)} values, and {len(experts)} steps run; give one, or one for each step"
        )
    if cfg_scale_2 is not None and m.get("switch_DiT_boundary") is None:
        raise InputError("--cfg_scale_2 is of two experts' second, and this model has one: leave it out")
    if cfg_scale_2 is not None and len(values) > 1:
        raise InputError("--cfg_scale has a value for each step already: leave --cfg_scale_2 out")
    if second is None or not experts:
        return one_or_each(values)
    return one_or_each([values[0] if expert == "dit" else second for expert in experts])
