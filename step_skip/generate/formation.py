"""formation.png: how a prior's clip took shape, step by step, and where `--start_step auto` would resume."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from step_skip.errors import InputError
from step_skip.method.formation import (
    DEFAULT_TEXT_SHARE,
    influence_left,
    latest_step,
    part_distances,
    text_moves,
)
from step_skip.prior.files import load_denoised, load_latents
from step_skip.prior.preview import colours_of, draw
from step_skip.prior.prior import Prior, step_file
from step_skip.prior.schema import FORMATION_FILE, Formation

if TYPE_CHECKING:
    from PIL import Image

    from step_skip.pipeline.schedulers import Step
    from step_skip.prior.schema import Metadata
    from step_skip.prior.writer import PriorWriter

log = logging.getLogger(__name__)


# --- while a prior is made ----------------------------------------------------------------------------------


def record_branch_distance(metadata: Metadata, step: Step) -> None:
    """Record the distance of the guidance branches in a step; a step that runs again replaces its own."""
    if step.branch_distance is not None:
        known = metadata.formation.branch_distances or []
        distances = [*known[: step.index], step.branch_distance]
        metadata.formation = metadata.formation.model_copy(update={"branch_distances": distances})


def save_formation(writer: PriorWriter) -> None:
    """Add the record to a prior whose steps are all saved, and draw it; it is whole without the picture."""
    record = measure_formation(writer.prior)
    writer.metadata.formation = Formation(**record)
    try:
        writer.save(FORMATION_FILE, lambda path: draw_formation(writer.prior, record, path))
    except Exception as error:  # whatever a plotting library and its fonts may raise
        log.warning(f"no {FORMATION_FILE} ({type(error).__name__}: {error}); the prior is whole without it")


def draw_formation(prior: Prior, record: Mapping[str, Any], path: Path) -> None:
    """Draw the record, with what `--start_step auto` makes of it."""
    left, measured, auto = None, False, None
    if record["text_moves"] is not None:
        left, measured = influence_left(record["text_moves"], sigmas=prior.metadata.scheduler_sigmas)
        auto = latest_step(left, DEFAULT_TEXT_SHARE)
    plot_formation(prior, record, path, left=left, measured=measured, share=DEFAULT_TEXT_SHARE, auto=auto)


def measure_formation(prior: Prior) -> dict[str, list[float] | None]:
    """Measure the formation of a prior whose steps are all saved; every list has one number for each step.

    Returns:
        branch_distances and text_moves: None where cfg_scale is 1; still_distances; moving_distances: None
        where the clip is a single latent frame.
    """
    import torch

    sigmas = prior.metadata.scheduler_sigmas
    branches, moves = prior.metadata.formation.branch_distances, None
    if branches is not None:
        moves = text_moves(branches, sigmas=sigmas, cfg_scale=prior.guidance)
    clean = load_latents(prior, step_file(len(sigmas) - 1)).float()
    steps = range(len(sigmas))
    estimates = (load_denoised(prior, step, dtype=torch.float32) for step in steps)
    return {"branch_distances": branches, "text_moves": moves, **part_distances(estimates, clean)}


CURVES = (
    ("still_distances", "still part: who, where", "#7f8c8d"),
    ("moving_distances", "moving part: what happens", "#2471a3"),
)
TEXT = "#c0392b"
MOST_PICTURES = 10
PLAIN = {"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1}  # behind words
LOOK_FOR = (
    "Where the red line is low, a new prompt comes too late: the motion has settled. Where the blue one\n"
    "is still low, the motion is open. The pictures are what each step points at, the middle of the clip."
)


def plot_formation(
    prior: Prior,
    record: Mapping[str, Any],
    path: Path,
    *,
    left: Sequence[float] | None,
    measured: bool,
    share: float,
    auto: int | None,
) -> None:
    """Draw how far both parts have formed, and what the text has yet to say, over the steps.

    Args:
        left: the share of the text's say that is left after each step; None: unknown.
        measured: whether that is of this prior, not by the schedule alone.
        share: what `auto` wants to be left.
        auto: the step it resumes after; None: none leaves so much.
    """
    from matplotlib.figure import Figure

    steps = prior.num_inference_steps
    figure = Figure(figsize=(7.6, 5.6), layout="constrained")
    figure.suptitle("How the prior took shape, and how much the text has yet to say", fontsize="medium")
    pictures = estimates_of(prior)
    axes, below = figure.subplots(2, height_ratios=(4, 1))
    for key, label, colour in CURVES:
        if record[key] is not None:
            axes.plot([1 - distance for distance in record[key]], "o-", color=colour, label=label)
    if left is not None:
        label = "the text's say that is left" + ("" if measured else " (by the schedule)")
        axes.plot(left, "s--", color=TEXT, label=label)
        axes.axhline(share, color=TEXT, lw=0.8, alpha=0.6)
        where = f"auto resumes after step {auto}" if auto is not None else "no step leaves so much"
        note = f"--start_step auto wants {share:g} left (--text_share): {where}"
        axes.text(steps - 0.75, share + 0.015, note, color=TEXT, fontsize="x-small", ha="right", bbox=PLAIN)
        if auto is not None:
            axes.axvline(auto, color=TEXT, ls=":")
    axes.set(xlabel="after step", ylabel="share, 1 is all", xlim=(-0.7, steps - 0.3), ylim=(-0.03, 1.05))
    axes.locator_params(axis="x", integer=True, nbins=12)
    axes.grid(alpha=0.3)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, 1.14), ncols=3, frameon=False, fontsize="small")
    place_pictures(below, pictures, steps=steps)
    figure.text(0.5, -0.01, LOOK_FOR, ha="center", va="top", fontsize="small")
    figure.savefig(path, dpi=120, bbox_inches="tight")


def estimates_of(prior: Prior) -> dict[int, Image.Image]:
    """Return pictures of some denoised estimates, by step; none without an image to take the colours from."""
    last = prior.num_inference_steps - 1
    count = min(MOST_PICTURES, last + 1)
    chosen = sorted({round(place * last / max(1, count - 1)) for place in range(count)})
    try:
        colours = colours_of(prior)
    except InputError:
        return {}
    estimates = ((step, load_denoised(prior, step)) for step in chosen)
    return {
        step: draw(latents[:, :, latents.shape[2] // 2][:, :, None], colours)[0]
        for step, latents in estimates
    }


def place_pictures(axes: Any, pictures: Mapping[int, Image.Image], *, steps: int) -> None:
    """Place each picture under its step, as wide as there is room."""
    import numpy as np

    axes.axis("off")
    axes.set(xlim=(-0.7, steps - 0.3))
    width = 0.94 * (steps - 0.4) / max(1, len(pictures))
    for step, picture in pictures.items():
        left = (step - width / 2 + 0.7) / (steps + 0.4)
        inset = axes.inset_axes((left, 0, width / (steps + 0.4), 1))
        inset.imshow(np.asarray(picture))
        inset.axis("off")
