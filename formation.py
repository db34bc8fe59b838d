"""When a prior's clip takes shape, step by step, and how much of it the text has yet to say.

While a prior is made, guidance compares two velocities at every step: with the prompt and with the negative
one. Their difference is how the text moves the latents:

    text_moves[i] = cfg_scale * |sigma_{i+1} - sigma_i| * ||noise_pred_posi - noise_pred_nega||

Once it is made, every step's denoised estimate is compared with the clean latents it led to, in two parts:
the still one (the mean over time: who and where) and the moving one (the rest: what happens). Each has a
relative distance, 1 where nothing is there yet and 0 where it has formed.

No network evaluation is spent on any of it. It lies in the prior's metadata under "formation", and as a
picture in formation.png.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import command_line as cli
import prior_utils

if TYPE_CHECKING:
    import torch

    from prior_utils import PriorWriter
    from wan_pipeline import Step

KEY = "formation"  # in a prior's metadata
PLOT_FILE = "formation.png"
CURVES = (
    ("still_distances", "still part formed (who, where)", "#7f8c8d"),
    ("moving_distances", "moving part formed (what happens)", "#2471a3"),
)


# --- while a prior is made ----------------------------------------------------------------------------------


def record_step(metadata: dict[str, Any], step: Step) -> None:
    """Note how far the guidance branches were apart; a step that runs again replaces what it said before."""
    if step.branch_distance is not None:
        distances = metadata.setdefault(KEY, {}).setdefault("branch_distances", [])
        distances[step.index :] = [step.branch_distance]


def save(writer: PriorWriter) -> None:
    """Add the record to a prior whose steps are all saved, and draw it; it is whole without the picture."""
    writer.metadata[KEY] = record = measure(writer.directory, writer.metadata)
    try:
        writer.save(PLOT_FILE, lambda path: plot(record, path))
    except Exception as error:  # whatever a plotting library and its fonts may raise
        cli.warn(f"no {PLOT_FILE} ({type(error).__name__}: {error}); the prior is whole without it")


def measure(directory: Path, metadata: Mapping[str, Any]) -> dict[str, list[float] | None]:
    """The whole record of a prior whose steps are all saved; one number a step in every list.

    Returns:
        branch_distances and text_moves: None where cfg_scale is 1; still_distances; moving_distances: None
        where the clip is a single latent frame.
    """
    sigmas = metadata["scheduler_sigmas"]
    branches, moves = metadata.get(KEY, {}).get("branch_distances"), None
    if branches is not None:
        moves = text_moves(branches, sigmas=sigmas, cfg_scale=metadata["cfg_scale"])
    clean = _load(directory, metadata, prior_utils.step_file(len(sigmas) - 1))
    estimates = (_denoised(directory, metadata, step) for step in range(len(sigmas)))
    return {"branch_distances": branches, "text_moves": moves, **distances(estimates, clean)}


def distances(estimates: Iterable[torch.Tensor], clean: torch.Tensor) -> dict[str, list[float] | None]:
    """How far both parts of every denoised estimate are from those of the clean latents, [B, C, T, H, W]."""
    pairs = [
        (relative_distance(still(each), still(clean)), relative_distance(moving(each), moving(clean)))
        for each in estimates
    ]
    still_distances, moving_distances = map(list, zip(*pairs, strict=True))
    return {
        "still_distances": still_distances,
        "moving_distances": moving_distances if clean.shape[2] > 1 else None,
    }


def text_moves(
    branch_distances: Sequence[float], *, sigmas: Sequence[float], cfg_scale: float
) -> list[float]:
    """How far the text moves the latents at each step; sigmas as DiffSynth's, without the closing 0."""
    return [
        cfg_scale * abs(after - before) * distance
        for before, after, distance in zip(sigmas, [*sigmas[1:], 0.0], branch_distances, strict=True)
    ]


def still(latents: torch.Tensor) -> torch.Tensor:
    """The mean over time. [B, C, T, H, W] -> [B, C, 1, H, W]"""
    return latents.mean(2, keepdim=True)


def moving(latents: torch.Tensor) -> torch.Tensor:
    """What is left of the latents without their mean over time. [B, C, T, H, W], both"""
    return latents - still(latents)


def relative_distance(estimate: torch.Tensor, final: torch.Tensor) -> float:
    """||estimate - final|| / ||final||: 1 for an estimate of zeros, 0 for the final one."""
    return float((estimate - final).norm() / final.norm())


def _denoised(directory: Path, metadata: Mapping[str, Any], step: int) -> torch.Tensor:
    """The clean latents a step points at, in float32. [B, C, T, H, W]"""
    latents = _load(directory, metadata, prior_utils.latents_before_file(step))
    noise_pred = _load(directory, metadata, prior_utils.noise_pred_file(step))
    return latents - metadata["scheduler_sigmas"][step] * noise_pred


def _load(directory: Path, metadata: Mapping[str, Any], name: str) -> torch.Tensor:
    return prior_utils.load_tensor(directory / name, shape=tuple(metadata["shapes"][name])).float()


# --- what is left to say ------------------------------------------------------------------------------------


def text_left(moves: Sequence[float]) -> list[float]:
    """The share of the text's say that is left after each step: what it still moves over all it moves."""
    total = sum(moves)
    return [sum(moves[step + 1 :]) / total for step in range(len(moves))]


# --- one glance to choose by --------------------------------------------------------------------------------


def plot(record: Mapping[str, Any], path: Path) -> None:
    """Draw how far both parts have formed, and what the text has yet to say, over the steps."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    axes = figure.subplots()
    for key, label, colour in CURVES:
        if record[key] is not None:
            formed = [1 - distance for distance in record[key]]
            axes.plot(formed, "o-", color=colour, label=label)
    if record["text_moves"] and sum(record["text_moves"]):
        axes.plot(
            text_left(record["text_moves"]), "s--", color="#c0392b", label="the text's say that is left"
        )
    steps = range(len(record["still_distances"]))
    axes.set(xlabel="after step", ylabel="share", xlim=(-0.3, len(steps) - 0.7), ylim=(-0.03, 1.03))
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.3)
    axes.legend(loc="best")
    figure.savefig(path, dpi=120)
