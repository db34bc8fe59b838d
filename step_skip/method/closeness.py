"""Choose the prior and the number of steps by a differential resume's first evaluation (`FirstLook`).

Priors of one image, size, seed and model begin at the same noise. The new prompt's first velocity there is
evaluated anyway; its distance to each prior's velocity tells which prior to follow and how much changes. A
few steps bring a clip closer to a full run if less changes and if guidance adds less to the change:

    predicted PSNR to the full run, dB = a - b * log10(distance) - c * log10(cfg_scale),   by steps: FIT

    distance = root mean square of new velocity - prior's velocity, over all of the latents

A prior made of a clip has that clip's error relative to a full run, and a clip that follows it has both
errors. They are assumed to be independent, so their squares add up.

FIT is fitted to the embedded model's clips by benchmarks/bank.py; docs/bank.md shows its accuracy. For
another model the order holds; the numbers are those that the same distance gave on the embedded model.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    import torch

    from step_skip.method.differential import Trajectory

FIT: Final[Mapping[int, tuple[float, float, float]]] = {
    1: (30.1, 12.5, 1.2),
    2: (36.7, 10.9, 4.0),
    3: (43.2, 8.9, 7.4),
    4: (47.3, 7.2, 8.6),
    6: (53.4, 4.4, 9.9),
}
MOST_CLOSENESS = 50.0  # dB; upper bound of predictions, since larger values are visually identical
CLOSENESS: Final[Mapping[str, float]] = {"draft": 34.0, "good": 38.0, "best": 42.0}  # dB
DEFAULT_CLOSENESS: Final = "good"


def velocity_distance(new: torch.Tensor, old: torch.Tensor) -> float:
    """Return the root mean square difference of a new velocity and a prior's, both [B, C, T, H, W]."""
    return float((new.float() - old.to(new.device).float()).square().mean().sqrt())


def predicted_closeness(
    distance: float, num_steps: int, *, cfg_scale: float = 1.0, own: float = math.inf
) -> float:
    """Return the expected PSNR to a full run, in dB, of a clip of `num_steps` steps; at most MOST_CLOSENESS.

    The formula and its source are in the module's docstring.

    Args:
        distance: `velocity_distance` of the first velocities.
        num_steps: number of steps that run.
        cfg_scale: guidance of the new run's first step.
        own: PSNR of the prior's own clip to a full run, in dB; infinite if the prior is a full run.
    """
    if distance == 0:
        return min(MOST_CLOSENESS, own)
    a, b, c = FIT[max(number for number in FIT if number <= num_steps)]
    followed = min(MOST_CLOSENESS, a - b * math.log10(distance) - c * math.log10(cfg_scale))
    return -10 * math.log10(10 ** (-followed / 10) + 10 ** (-own / 10))


def fewest_steps(
    distance: float,
    numbers: Iterable[int],
    closeness: float,
    *,
    cfg_scale: float = 1.0,
    own: float = math.inf,
) -> int:
    """Return the smallest number of steps that is expected to reach a closeness, else the largest.

    Args:
        distance, cfg_scale, own: see `predicted_closeness`.
        numbers: numbers of steps to choose from, increasing.
        closeness: PSNR to a full run, in dB.
    """
    numbers = list(numbers)
    predicted = {n: predicted_closeness(distance, n, cfg_scale=cfg_scale, own=own) for n in numbers}
    reach = (n for n in numbers if predicted[n] >= closeness)
    return next(reach, numbers[-1])


@dataclass
class FirstLook:
    """The paths a run may follow, and the path chosen by its first velocity.

    Args:
        paths: for each prior that begins at the same noise, one trajectory by number of steps, increasing.
        closeness: in dB; the smallest number of steps expected to reach it is taken, else the largest.
        cfg_scale: guidance of the run's first step.
        own: for each prior, the PSNR of its own clip to a full run, in dB; (): all priors are full runs.
    """

    paths: Sequence[Mapping[int, Trajectory]]
    closeness: float = math.inf
    cfg_scale: float = 1.0
    own: Sequence[float] = ()
    # Set by `choose`, once the first velocity is known:
    distances: list[float] = field(default_factory=list)  # velocity_distance to each prior
    nearest: int = 0  # index of the prior that is followed
    num_steps: int | None = None  # number of steps that run

    def __post_init__(self):
        self.own = self.own or [math.inf] * len(self.paths)

    @property
    def first(self) -> Trajectory:
        """Return the path on which the run begins; all paths have the same first step."""
        return self.paths[0][max(self.paths[0])]

    @property
    def differ_in_length(self) -> bool:
        """Return whether the number of steps is chosen as well."""
        return len(self.paths[0]) > 1

    def choose(self, noise_pred: torch.Tensor) -> Trajectory:
        """Choose the path to follow by the run's first velocity, [B, C, T, H, W]."""
        self.distances = [
            velocity_distance(noise_pred, next(iter(each.values())).noise_pred[0]) for each in self.paths
        ]
        most = max(self.paths[0])
        ranks = [
            (distance == 0, self.predicted(index, most), -distance)
            for index, distance in enumerate(self.distances)
        ]
        self.nearest = nearest = ranks.index(max(ranks))
        path, distance, own = self.paths[nearest], self.distances[nearest], self.own[nearest]
        self.num_steps = fewest_steps(distance, path, self.closeness, cfg_scale=self.cfg_scale, own=own)
        return path[self.num_steps]

    def predicted(self, index: int, num_steps: int) -> float:
        """Return the closeness, in dB, expected of `num_steps` steps along a prior's path, after `choose`."""
        return predicted_closeness(
            self.distances[index], num_steps, cfg_scale=self.cfg_scale, own=self.own[index]
        )

    def describe(self) -> dict[str, Any]:
        """Return the entries for a clip's JSON; empty if the run began after step 0 or has not chosen yet."""
        if self.num_steps is None or self.first.steps[0] != 0:
            return {}
        predicted = self.predicted(self.nearest, self.num_steps)
        return {"apart": self.distances[self.nearest], "predicted_closeness": predicted}
