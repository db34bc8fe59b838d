"""What a differential resume's first evaluation tells: the nearest prior, and how near its clip will come.

Priors of one image, size, seed and model begin at the same noise. The new prompt's first velocity there is
evaluated anyway; how far it is from each prior's own says which of them to follow, and how much there is to
change. A few steps bring a clip the nearer to a full run the less there is, by FIT:

    predicted PSNR to the full run, dB = a - b * log10(apart),   a, b by the number of steps

    apart = root mean square of new velocity - prior's velocity, over all of the latents

A prior that was made of a clip has that clip's own distance to a full run, and what follows it has both; the
errors are taken to be independent, so their squares add up.

FIT is fitted to the embedded model's clips by benchmarks/bank.py; docs/bank.md shows how far off it is. Of
another model the order holds, the numbers only say what as much change meant there.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    import torch

    from step_skip.differential import Trajectory

FIT: Final[Mapping[int, tuple[float, float]]] = {
    1: (28.6, 12.8),
    2: (34.2, 10.9),
    3: (38.2, 9.3),
    4: (41.4, 7.7),
    6: (45.5, 5.8),
}
MOST = 50.0  # dB; no prediction is above, the prior's own clip's neither: who could see it?
CLOSENESS: Final[Mapping[str, float]] = {"draft": 34.0, "good": 38.0, "best": 42.0}  # dB
DEFAULT_CLOSENESS: Final = "good"


def velocities_apart(new: torch.Tensor, old: torch.Tensor) -> float:
    """How far a new velocity is from a prior's: root mean square; [B, C, T, H, W], both."""
    return float((new.float() - old.to(new.device).float()).square().mean().sqrt())


def predicted_closeness(apart: float, num_steps: int, *, own: float = math.inf) -> float:
    """The PSNR to a full run, in dB, that so many steps are expected to reach; at most MOST.

    Args:
        own: of the prior's own clip, likewise; a full run's is infinite.
    """
    if apart == 0:
        return min(MOST, own)
    a, b = FIT[max(number for number in FIT if number <= num_steps)]
    followed = min(MOST, a - b * math.log10(apart))
    return -10 * math.log10(10 ** (-followed / 10) + 10 ** (-own / 10))


def fewest_steps(apart: float, numbers: Iterable[int], closeness: float, *, own: float = math.inf) -> int:
    """The fewest of these steps that are expected to reach a closeness, else the most; numbers: few first."""
    numbers = list(numbers)
    reach = (n for n in numbers if predicted_closeness(apart, n, own=own) >= closeness)
    return next(reach, numbers[-1])


@dataclass
class FirstLook:
    """The paths a run may follow, and what its first velocity tells of them.

    Args:
        paths: of each prior that begins here one trajectory by number of steps, few first.
        closeness: in dB; the fewest steps that are expected to reach it are taken, else the most.
        own: of each prior that of its own clip, in dB; (): all are full runs.
    """

    paths: Sequence[Mapping[int, Trajectory]]
    closeness: float = math.inf
    own: Sequence[float] = ()
    apart: list[float] | None = None  # of each prior, once the first velocity is known
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
        ranks = [
            (apart == 0, predicted_closeness(apart, most, own=own), -apart)
            for apart, own in zip(self.apart, self.own, strict=True)
        ]
        self.nearest = nearest = ranks.index(max(ranks))
        path = self.paths[nearest]
        self.num_steps = fewest_steps(self.apart[nearest], path, self.closeness, own=self.own[nearest])
        return path[self.num_steps]

    def describe(self) -> dict[str, Any]:
        """For a result's JSON; empty where nothing is predicted: the run began further down the path."""
        if self.apart is None or self.num_steps is None or self.first.steps[0] != 0:
            return {}
        apart, own = self.apart[self.nearest], self.own[self.nearest]
        predicted = predicted_closeness(apart, self.num_steps, own=own)
        return {"apart": apart, "predicted_closeness": predicted}
