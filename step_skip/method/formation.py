"""Measure how a clip takes shape, step by step, and how much influence its text still has.

While a prior is made, guidance evaluates two velocities at every step: with the prompt and with the negative
prompt. Their difference moves the latents towards the text, by the distance

    text_moves[i] = cfg_scale * |sigma_{i+1} - sigma_i| * ||noise_pred_posi - noise_pred_nega||

Every step's denoised estimate is compared with the final clean latents, in two parts: the still part (the
mean over time: who and where) and the moving part (the difference from that mean: what happens). Each has a
relative distance, 1 before anything has formed and 0 when it has. None of this needs a network evaluation.

`part_distances` and `text_moves` measure a run; `influence_left` and `latest_step` choose the step
that `--start_step auto` stands for.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
DEFAULT_TEXT_SHARE = 0.6  # at this share about 9 of 10 new prompts are obeyed: benchmarks/results/auto_step


def part_distances(estimates: Iterable[torch.Tensor], clean: torch.Tensor) -> dict[str, list[float] | None]:
    """Return the relative distances of both parts of each denoised estimate to the clean latents' parts.

    Args:
        estimates: the denoised estimate of each step, [B, C, T, H, W].
        clean: the final latents, [B, C, T, H, W].

    Returns:
        still_distances and moving_distances, one value per step; moving_distances is None for a single frame.
    """
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
    """Return the distance by which the text moves the latents at each step; see the module's docstring.

    Args:
        branch_distances: ||noise_pred_posi - noise_pred_nega|| of each step.
        sigmas: DiffSynth's, without the closing 0.
        cfg_scale: one value, or one per step.
    """
    scales = cfg_scale if isinstance(cfg_scale, Sequence) else [cfg_scale] * len(sigmas)
    return [
        scale * abs(after - before) * distance
        for scale, before, after, distance in zip(
            scales, sigmas, [*sigmas[1:], 0.0], branch_distances, strict=True
        )
    ]


def still_part(latents: torch.Tensor) -> torch.Tensor:
    """Return the mean over time. [B, C, T, H, W] -> [B, C, 1, H, W]"""
    return latents.mean(2, keepdim=True)


def moving_part(latents: torch.Tensor) -> torch.Tensor:
    """Subtract the latents' mean over time. [B, C, T, H, W] -> [B, C, T, H, W]"""
    return latents - still_part(latents)


def relative_distance(estimate: torch.Tensor, final: torch.Tensor) -> float:
    """Return ||estimate - final|| / ||final||: 1 for an estimate of zeros, 0 for the final latents."""
    return float((estimate - final).norm() / final.norm())


# --- remaining text influence -------------------------------------------------------------------------------


@dataclass(frozen=True)
class AutoStep:
    """The start step that `--start_step auto` stands for in one prior."""

    step: int
    text_left: float  # share of the text influence that remains after the step
    text_share: float  # smallest share that was asked for
    measured: bool  # False: estimated from the schedule alone

    def __str__(self) -> str:
        if self.measured:
            return f"step {self.step}, {self.text_left:.2f} of the text influence remains"
        return (
            f"step {self.step}, about {self.text_left:.2f} of the text influence remains, estimated from the "
            "schedule: the prior's two prompts are alike"
        )


def text_left(moves: Sequence[float]) -> list[float]:
    """Return the share of the text influence that remains after each step.

    Args:
        moves: `text_moves` of each step.
    """
    total = sum(moves) or 1.0  # the sum may underflow to 0
    return [sum(moves[step + 1 :]) / total for step in range(len(moves))]


def influence_left(moves: Sequence[float], *, sigmas: Sequence[float]) -> tuple[list[float], bool]:
    """Return the share of the text influence that remains after each step, and whether it was measured.

    If prompt and negative prompt are alike (a neutral prior of a model without a negative prompt) both
    branches are equal and nothing is measured. Then the branches' distance is assumed to be proportional to
    sigma, as it nearly is for the embedded model's prompts.

    Args:
        moves: `text_moves` of each step.
        sigmas: of each step, without the closing 0.
    """
    if any(moves):
        return text_left(moves), True
    return text_left(text_moves(sigmas, sigmas=sigmas, cfg_scale=1.0)), False


def latest_step(left: Sequence[float], text_share: float) -> int | None:
    """Return the latest step after which at least `text_share` remains, or None if there is none."""
    return max((step for step, share in enumerate(left) if share >= text_share), default=None)
