"""Choosing a differential resume's steps by the prior's own path: tried, measured, not shipped.

Between two steps that run, the new clip's path is straight but for its share of the prior's bend. What it
loses is larger where the prior's path bends more, so of all choices of n steps that begin with step 0 one can
take that whose squared bends sum to the least:

    bend(a, b) = x_b - x_a - (sigma_b - sigma_a) * v_a        a, b: neighbours in the choice, or the clean end
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def best_steps(
    latents: Sequence[torch.Tensor], noise_pred: Sequence[torch.Tensor], sigmas: Sequence[float]
) -> list[list[int]]:
    """The choice of 1, 2, 3 ... steps of a path.

    Args:
        latents: before every step and the clean ones, [B, C, T, H, W] each.
        noise_pred: of every step.
        sigmas: of all of them, the clean end's with it.
    """
    return choose(
        [squared_bends(latents[step:], each, sigmas[step:]) for step, each in enumerate(noise_pred)]
    )


def squared_bends(
    latents: Sequence[torch.Tensor], noise_pred: torch.Tensor, sigmas: Sequence[float]
) -> list[float]:
    """How far a path leaves the straight step that its first velocity points along, squared, at every place.

    Args:
        latents: the path from the step on, [B, C, T, H, W] each, the clean ones last.
        noise_pred: the step's velocity, like them.
        sigmas: of all of them.
    """
    begin, velocity = latents[0].float(), noise_pred.float()
    return [
        float((each.float() - begin - (sigma - sigmas[0]) * velocity).square().sum())
        for each, sigma in zip(latents, sigmas, strict=True)
    ]


def choose(squared: Sequence[Sequence[float]]) -> list[list[int]]:
    """For 1, 2, 3 ... steps the choice whose bends sum to the least, by dynamic programming.

    Args:
        squared: for every step the squared bends from there to itself, the steps after it and the end.
    """
    total = len(squared)
    reached = {end: (squared[0][end], [0]) for end in range(1, total + 1)}  # by the place: cost and steps
    table = [reached[total][1]]
    for number in range(2, total + 1):
        reached = {
            end: min(
                (cost + squared[step][end - step], [*steps, step])
                for step, (cost, steps) in reached.items()
                if step < end
            )
            for end in range(number, total + 1)
        }
        table.append(reached[total][1])
    return table
