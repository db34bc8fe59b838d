"""How a clip takes shape, step by step, and how much influence its text has left.

While a prior is made, guidance compares two velocities at every step: with the prompt and with the negative
one. Their difference is how the text moves the latents:

    text_moves[i] = cfg_scale * |sigma_{i+1} - sigma_i| * ||noise_pred_posi - noise_pred_nega||

Every step's denoised estimate is compared with the clean latents it led to, in two parts: the still one (the
mean over time: who and where) and the moving one (what remains: what happens). Each has a relative distance,
1 where nothing is there yet and 0 where it has formed. No network evaluation is spent on any of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
DEFAULT_TEXT_SHARE = 0.6  # what about 9 of 10 new prompts need to be obeyed: benchmarks/results/auto_step


def part_distances(estimates: Iterable[torch.Tensor], clean: torch.Tensor) -> dict[str, list[float] | None]:
    """How far both parts of every denoised estimate are from those of the clean latents, [B, C, T, H, W]."""
    pairs = [
        [relative_distance(part(each), part(clean)) for part in (still_part, moving_part)]
        for each in estimates
    ]
    still_distances, moving_distances = map(list, zip(*pairs, strict=True))
    return {
        "still_distances": still_distances,
        "moving_distances": moving_distances if clean.shape[2] > 1 else None,
    }


def text_moves(
    branch_distances: Sequence[float], *, sigmas: Sequence[float], cfg_scale: float | Sequence[float]
) -> list[float]:
    """How far the text moves the latents at each step; sigmas as DiffSynth's, without the closing 0."""
    scales = cfg_scale if isinstance(cfg_scale, Sequence) else [cfg_scale] * len(sigmas)
    return [
        scale * abs(after - before) * distance
        for scale, before, after, distance in zip(
            scales, sigmas, [*sigmas[1:], 0.0], branch_distances, strict=True
        )
    ]


def still_part(latents: torch.Tensor) -> torch.Tensor:
    """The mean over time. [B, C, T, H, W] -> [B, C, 1, H, W]"""
    return latents.mean(2, keepdim=True)


def moving_part(latents: torch.Tensor) -> torch.Tensor:
    """What is left of the latents without their mean over time. [B, C, T, H, W], both"""
    return latents - still_part(latents)


def relative_distance(estimate: torch.Tensor, final: torch.Tensor) -> float:
    """||estimate - final|| / ||final||: 1 for an estimate of zeros, 0 for the final one."""
    return float((estimate - final).norm() / final.norm())


# --- what is left to say ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class AutoStep:
    """The start step that `--start_step auto` stands for in one prior."""

    step: int
    text_left: float  # share of the text's say that is left after it
    text_share: float  # the least that was asked for
    measured: bool  # False: by the schedule alone

    def __str__(self) -> str:
        about, how = ("", "") if self.measured else ("about ", ", by the schedule: its two prompts are alike")
        return f"step {self.step}, {about}{self.text_left:.2f} of the text's say left{how}"


def text_left(moves: Sequence[float]) -> list[float]:
    """The share of the text's say that is left after each step: what it still moves over all it moves."""
    total = sum(moves) or 1.0  # too small for a float
    return [sum(moves[step + 1 :]) / total for step in range(len(moves))]


def say_left(moves: Sequence[float], *, sigmas: Sequence[float]) -> tuple[list[float], bool]:
    """The share left after each step, and whether it was measured.

    Where prompt and negative prompt are alike (a neutral prior of a model without a negative prompt) both
    branches are one and nothing is measured. Then the distance is taken to be proportional to sigma, as it
    nearly is for the embedded model's prompts.
    """
    if any(moves):
        return text_left(moves), True
    return text_left(text_moves(sigmas, sigmas=sigmas, cfg_scale=1.0)), False


def latest_step(left: Sequence[float], text_share: float) -> int | None:
    """The latest step that leaves at least this share, if any does."""
    return max((step for step, share in enumerate(left) if share >= text_share), default=None)
