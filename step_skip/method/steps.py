"""Choose the steps of a schedule that a resume runs, and space sigmas; all on plain numbers.

`recommended_start_step`, `recommended_num_steps` and `spread_steps` give the defaults; `nearest_steps` maps
steps to those that a pruned prior keeps; `tail_sigmas` and `locate_sigma` serve custom sigmas.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

# Exponents of `spread_steps`: 1 is even spacing, larger values are denser towards the end. DENSER_FEW applies
# to FEW steps or fewer.
DENSER, DENSER_FEW, FEW = 1.7, 2.0, 3
LATE_SHARE = 0.5  # share of the schedule after which a resumed run rarely changes the motion
SAME_SIGMA = 1e-6  # relative tolerance, since sigmas are float32 and pass through text


def guidance_decay(
    branch_distances: Sequence[float], steps: Sequence[int], *, sigmas: Sequence[float]
) -> list[float]:
    """Return the decay of guidance over each chosen step: its mean branch distance relative to its first one.

    A chosen step extends to the next one, the last to the end of the schedule. The mean is over its fine
    steps, weighted by their change of sigma.

    Args:
        branch_distances: of every fine step, the norm of noise_pred_posi - noise_pred_nega.
        steps: the chosen steps, increasing indices into the fine steps.
        sigmas: of every fine step, without the closing 0.
    """
    ends, decays = [*sigmas, 0.0], []
    for step, end in itertools.pairwise([*steps, len(sigmas)]):
        mean = sum((ends[i] - ends[i + 1]) * branch_distances[i] for i in range(step, end))
        first = (ends[step] - ends[end]) * branch_distances[step]
        decays.append(mean / first if first else 1.0)
    return decays


# --- steps of a schedule ------------------------------------------------------------------------------------


def recommended_start_step(num_inference_steps: int) -> int:
    """Return the default step to resume after: 6 of 10, and the same share of other schedules."""
    return min(num_inference_steps * 6 // 10, num_inference_steps - 1)


def is_late(start_step: int, num_inference_steps: int) -> bool:
    """Return whether a run resumed after this step rarely shows a new motion.

    Not late is the last step, after which no step runs and no prompt is read.
    """
    return LATE_SHARE * num_inference_steps <= start_step < num_inference_steps - 1


def recommended_num_steps(num_inference_steps: int) -> int:
    """Return the default number of steps of a differential resume: 3 of 10, 2 of 4, and at most 4."""
    return max(1 if num_inference_steps < 4 else 2, min(4, round(0.3 * num_inference_steps)))


def spread_steps(num_inference_steps: int, num_steps: int) -> list[int]:
    """Return the steps of a differential resume: 0 6 9 for 3 of 10, and the same shares of other schedules.

    They are denser towards the end, where sigma falls fast: step i of n is at the share 1 - (1 - i / n) **
    DENSER of the schedule, with a higher exponent if few steps run. Both exponents are those that came
    nearest to the full run on the embedded model, on identities that are not among the measured ones.
    """
    power = DENSER_FEW if num_steps <= FEW else DENSER
    steps = (round((1 - (1 - i / num_steps) ** power) * num_inference_steps) for i in range(num_steps))
    latest = range(num_inference_steps - num_steps, num_inference_steps)  # leaves room for the later steps
    return [min(max(i, step), last) for i, (step, last) in enumerate(zip(steps, latest, strict=True))]


def tail_sigmas(sigma: float, num_steps: int, *, sigma_shift: float) -> list[float]:
    """Return the sigmas of `num_steps` steps from `sigma` to 0, without the closing 0.

    They are spaced as FlowMatchScheduler("Wan") of DiffSynth spaces a full run: evenly before the shift
    s -> shift * s / (1 + (shift - 1) * s).
    """
    even = sigma / (sigma_shift - (sigma_shift - 1) * sigma)  # sigma before the shift
    unshifted = [even * (1 - i / num_steps) for i in range(num_steps)]
    return [sigma, *(sigma_shift * s / (1 + (sigma_shift - 1) * s) for s in unshifted[1:])]


def locate_sigma(sigma: float, sigmas: Sequence[float]) -> tuple[int, float]:
    """Return the step in which a run passes `sigma`, and the share of the step before it: 0 <= share < 1.

    Args:
        sigmas: of the run, decreasing, without the closing 0.

    Raises:
        ValueError: sigma is not above 0, or above the first of the run.
    """
    if not 0 < sigma <= sigmas[0] * (1 + SAME_SIGMA):
        raise ValueError(f"{sigma:g} is not between 0 and {sigmas[0]:.6g}")
    step = max(i for i, begin in enumerate(sigmas) if sigma <= begin * (1 + SAME_SIGMA))
    begin, end = sigmas[step], [*sigmas, 0.0][step + 1]
    return step, 0.0 if sigma >= begin * (1 - SAME_SIGMA) else (begin - sigma) / (begin - end)


def nearest_steps(steps: Sequence[int], kept: Sequence[int]) -> list[int]:
    """Map each step to the nearest kept step, strictly increasing; `kept` has at least as many as `steps`."""
    chosen: list[int] = []
    for index, step in enumerate(steps):
        first = kept.index(chosen[-1]) + 1 if chosen else 0
        possible = kept[first : len(kept) - (len(steps) - index) + 1]
        chosen.append(min(possible, key=lambda each: abs(each - step)))
    return chosen
