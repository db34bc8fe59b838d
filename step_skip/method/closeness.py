"""What a differential resume's first evaluation tells: the nearest prior, and how near its clip will come.

Priors of one image, size, seed and model begin at the same noise. The new prompt's first velocity there is
evaluated anyway; how far it is from each prior's own says which of them to follow, and how much there is to
change. A few steps bring a clip the nearer to a full run the less there is and the less guidance adds to it:

    predicted PSNR to the full run, dB = a - b * log10(apart) - c * log10(cfg_scale),   by steps: FIT

    apart = root mean square of new velocity - prior's velocity, over all of the latents

A prior that was made of a clip has that clip's own distance to a full run, and what follows it has both; the
errors are taken to be independent, so their squares add up.

FIT is fitted to the embedded model's clips by benchmarks/bank.py; docs/bank.md shows how far off it is. Of
another model the order holds, the numbers only say what as much change meant there.
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
MOST_CLOSENESS = 50.0  # dB; no prediction is above, the prior's own clip's neither: who could see it?
CLOSENESS: Final[Mapping[str, float]] = {"draft": 34.0, "good": 38.0, "best": 42.0}  # dB
DEFAULT_CLOSENESS: Final = "good"


def velocities_apart(new: torch.Tensor, old: torch.Tensor) -> float:
    """How far a new velocity is from a prior's: root mean square; [B, C, T, H, W], both."""
    return float((new.float() - old.to(new.device).float()).square().mean().sqrt())


def predicted_closeness(
    apart: float, num_steps: int, *, cfg_scale: float = 1.0, own: float = math.inf
) -> float:
    """The PSNR to a full run, in dB, that so many steps are expected to reach; at most MOST.

    Args:
        cfg_scale: of the new run's first step.
        own: of the prior's own clip, likewise; a full run's is infinite.
    """
    if apart == 0:
        return min(MOST_CLOSENESS, own)
    a, b, c = FIT[max(number for number in FIT if number <= num_steps)]
    followed = min(MOST_CLOSENESS, a - b * math.log10(apart) - c * math.log10(cfg_scale))
    return -10 * math.log10(10 ** (-followed / 10) + 10 ** (-own / 10))


def fewest_steps(
    apart: float, numbers: Iterable[int], closeness: float, *, cfg_scale: float = 1.0, own: float = math.inf
) -> int:
    """The fewest of these steps that are expected to reach a closeness, else the most; numbers: few first."""
    numbers = list(numbers)
    predicted = {n: predicted_closeness(apart, n, cfg_scale=cfg_scale, own=own) for n in numbers}
    reach = (n for n in numbers if predicted[n] >= closeness)
    return next(reach, numbers[-1])


@dataclass
class FirstLook:
    """The paths a run may follow, and what its first velocity tells of them.

    Args:
        paths: of each prior that begins here one trajectory by number of steps, few first.
        closeness: in dB; the fewest steps that are expected to reach it are taken, else the most.
        cfg_scale: of the run's first step.
        own: of each prior that of its own clip, in dB; (): all are full runs.
    """

    paths: Sequence[Mapping[int, Trajectory]]
    closeness: float = math.inf
    cfg_scale: float = 1.0
    own: Sequence[float] = ()
    apart: list[float] = field(default_factory=list)  # of each prior, once the first velocity is known
    nearest: int = 0  # likewise: the place of the prior that is followed
    num_steps: int | None = None  # likewise

    def __post_init__(self):
        self.own = self.own or [math.inf] * len(self.paths)

    @property
    def first(self) -> Trajectory:
        """The path to begin on: all have the same first step."""
        return self.paths[0][max(self.paths[0])]

    @property
    def differ_in_length(self) -> bool:
        """Whether the number of steps is chosen, too."""
        return len(self.paths[0]) > 1

    def choose(self, noise_pred: torch.Tensor) -> Trajectory:
        """The path to follow from the first velocity on, [B, C, T, H, W]."""
        self.apart = [
            velocities_apart(noise_pred, next(iter(each.values())).noise_pred[0]) for each in self.paths
        ]
        most = max(self.paths[0])
        ranks = [(apart == 0, self.predicted(place, most), -apart) for place, apart in enumerate(self.apart)]
        self.nearest = nearest = ranks.index(max(ranks))
        path, apart, own = self.paths[nearest], self.apart[nearest], self.own[nearest]
        self.num_steps = fewest_steps(apart, path, self.closeness, cfg_scale=self.cfg_scale, own=own)
        return path[self.num_steps]

    def predicted(self, place: int, num_steps: int) -> float:
        """How near so many steps along a prior's path are expected to come, in dB; once `apart` is known."""
        return predicted_closeness(
            self.apart[place], num_steps, cfg_scale=self.cfg_scale, own=self.own[place]
        )

    def describe(self) -> dict[str, Any]:
        """For a result's JSON; empty where nothing is predicted: the run began further down the path."""
        if self.num_steps is None or self.first.steps[0] != 0:
            return {}
        predicted = self.predicted(self.nearest, self.num_steps)
        return {"apart": self.apart[self.nearest], "predicted_closeness": predicted}
