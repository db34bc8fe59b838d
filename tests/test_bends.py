"""The benchmark's choice of steps by a path's bends: by hand, and against all choices there are."""

from __future__ import annotations

import itertools
import sys

import pytest
import torch
from helpers import ROOT

sys.path.append(str(ROOT / "benchmarks"))

from bends import best_steps, choose, squared_bends


def test_bends_worked_by_hand():
    path = [torch.tensor(each).view(1, 2, 1, 1, 1) for each in ((0.0, 8.0), (1.0, 6.0), (5.0, 3.0))]
    velocity = torch.tensor([-2.0, 4.0]).view(1, 2, 1, 1, 1)
    # straight on, from sigma 1 over 0.5 to 0: (0, 8), (1, 6), (2, 4)
    assert squared_bends(path, velocity, [1.0, 0.5, 0.0]) == [0, 0, 9 + 1]


@pytest.mark.parametrize("total", [1, 2, 3, 7, 10])
def test_of_all_choices_the_cheapest(total):
    generator = torch.Generator().manual_seed(total)
    squared = [torch.rand(total + 1 - step, generator=generator).tolist() for step in range(total)]

    def cost(steps):
        return sum(squared[a][b - a] for a, b in itertools.pairwise([*steps, total]))

    for number, chosen in enumerate(choose(squared), 1):
        others = ((0, *rest) for rest in itertools.combinations(range(1, total), number - 1))
        assert cost(chosen) == pytest.approx(min(map(cost, others)))
        assert chosen[0] == 0 and len(chosen) == number and chosen == sorted(set(chosen))


def test_a_path_that_bends_late_is_run_late():
    """Straight for six steps of ten, then round a part of a circle."""
    angles = torch.tensor([0.0] * 7 + [0.4, 0.8, 1.2])
    velocities = [torch.stack([angle.cos(), angle.sin()]).view(1, 2, 1, 1, 1) for angle in angles]
    path = list(
        itertools.accumulate(velocities, lambda at, v: at - 0.1 * v, initial=torch.zeros(1, 2, 1, 1, 1))
    )
    assert best_steps(path, velocities, [1 - step / 10 for step in range(11)])[3] == [0, 7, 8, 9]
