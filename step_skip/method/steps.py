"""Which steps of a schedule a resume runs, and how sigmas are spaced; numbers in, numbers out."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

DENSER, DENSER_FEW, FEW = 1.7, 2.0, 3  # to the end; for up to FEW steps of a differential resume; 1: evenly
LATE_SHARE = 0.5  # share of the schedule after which a resumed run rarely changes the motion
SAME_SIGMA = 1e-6  # relative; sigmas are float32 and come by way of text


def guidance_decay(
    branch_distances: Sequence[float], steps: Sequence[int], *, sigmas: Sequence[float]
) -> list[float]:
    """How guidance fades over each chosen step: the mean of the fine steps' branch distances over the first.

    A chosen step reaches to the next one, the last to the end; the mean is weighted by how far sigma goes.

    Args:
        branch_distances: of every fine step, the norm of noise_pred_posi - noise_pred_nega.
        sigmas: of every fine step, without the closing 0.
    """
    ends, decays = [*sigmas, 0.0], []
    for step, end in itertools.pairwise([*steps, len(sigmas)]):
        mean = sum((ends[i] - ends[i + 1]) * branch_distances[i] for i in range(step, end))
        first = (ends[step] - ends[end]) * branch_distances[step]
        decays.append(mean / first if first else 1.0)
    return decays


# --- places in a schedule -----------------------------------------------------------------------------------


def recommended_start_step(num_inference_steps: int) -> int:
    """The step to resume from unless told otherwise: 6 of 10, and the same share of other schedules."""
    return min(num_inference_steps * 6 // 10, num_inference_steps - 1)


def is_late(start_step: int, num_inference_steps: int) -> bool:
    """Whether a run resumed after this step rarely shows a new motion; after the last it reads no prompt."""
    return LATE_SHARE * num_inference_steps <= start_step < num_inference_steps - 1


def recommended_num_steps(num_inference_steps: int) -> int:
    """How many steps a differential resume runs by default: 3 of 10, 2 of 4, and 4 where there are many."""
    return max(1 if num_inference_steps < 4 else 2, min(4, round(0.3 * num_inference_steps)))


def spread_steps(num_inference_steps: int, num_steps: int) -> list[int]:
    """The steps of a differential resume: 0 6 9 for 3 of 10, and the same places of other schedules.

    They are denser to the end, where sigma falls fast: step i of n is 1 - (1 - i / n) ** DENSER of the way,
    with a higher power where few run. Both powers are what came nearest to the full run on the embedded
    model, on identities that are not among the measured ones.
    """
    power = DENSER_FEW if num_steps <= FEW else DENSER
    steps = (round((1 - (1 - i / num_steps) ** power) * num_inference_steps) for i in range(num_steps))
    room = range(num_inference_steps - num_steps, num_inference_steps)  # for those that follow
    return [min(max(i, step), last) for i, (step, last) in enumerate(zip(steps, room, strict=True))]


def tail_sigmas(sigma: float, num_steps: int, *, sigma_shift: float) -> list[float]:
    """Sigmas of so many steps from `sigma` to 0, spaced as FlowMatchScheduler("Wan") spaces a full run."""
    even = sigma / (sigma_shift - (sigma_shift - 1) * sigma)  # what the shift makes sigma of
    places = [even * (1 - i / num_steps) for i in range(num_steps)]
    return [sigma, *(sigma_shift * s / (1 + (sigma_shift - 1) * s) for s in places[1:])]


def place_on_path(sigma: float, sigmas: Sequence[float]) -> tuple[int, float]:
    """The step in which a run passes `sigma`, and how far into it: 0 where it begins, below 1.

    Args:
        sigmas: the run's, decreasing, without the closing 0.

    Raises:
        ValueError: the run begins below it, or it isn't above 0.
    """
    if not 0 < sigma <= sigmas[0] * (1 + SAME_SIGMA):
        raise ValueError(f"{sigma:g} is not between 0 and {sigmas[0]:.6g}")
    step = max(i for i, begin in enumerate(sigmas) if sigma <= begin * (1 + SAME_SIGMA))
    begin, end = sigmas[step], [*sigmas, 0.0][step + 1]
    return step, 0.0 if sigma >= begin * (1 - SAME_SIGMA) else (begin - sigma) / (begin - end)


def nearest_steps(steps: Sequence[int], kept: Sequence[int]) -> list[int]:
    """As many of the steps that are kept, increasing, each the nearest that the others leave."""
    chosen: list[int] = []
    for place, step in enumerate(steps):
        first = kept.index(chosen[-1]) + 1 if chosen else 0
        possible = kept[first : len(kept) - (len(steps) - place) + 1]
        chosen.append(min(possible, key=lambda each: abs(each - step)))
    return chosen
