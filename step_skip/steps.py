"""Which steps to run: their places in a schedule, and what a prior's own formation says of them.

When a prior's clip takes shape, step by step, and how much of it the text has yet to say, is its formation.

While a prior is made, guidance compares two velocities at every step: with the prompt and with the negative
one. Their difference is how the text moves the latents:

    text_moves[i] = cfg_scale * |sigma_{i+1} - sigma_i| * ||noise_pred_posi - noise_pred_nega||

Once it is made, every step's denoised estimate is compared with the clean latents it led to, in two parts:
the still one (the mean over time: who and where) and the moving one (the rest: what happens). Each has a
relative distance, 1 where nothing is there yet and 0 where it has formed.

No network evaluation is spent on any of it. It lies in the prior's metadata under "formation", and as a
picture in formation.png. From it `--start_step auto` chooses where to resume: after the latest step that
leaves a given share of the text's say.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from step_skip.files import InputError
from step_skip.prior import Prior, load_denoised, load_latents, step_file

if TYPE_CHECKING:
    import torch

    from step_skip.metadata import PriorWriter
    from step_skip.schedule import Step

log = logging.getLogger(__name__)

FORMATION_KEY = "formation"  # in a prior's metadata
FORMATION_FILE = "formation.png"
DEFAULT_TEXT_SHARE = 0.6  # what about 9 of 10 new prompts need to be obeyed: benchmarks/results/auto_step
DENSER, DENSER_FEW, FEW = 1.7, 2.0, 3  # to the end; for up to FEW steps of a differential resume; 1: evenly
LATE = 0.5  # share of the schedule after which a resumed run rarely changes the motion
SAME_SIGMA = 1e-6  # relative; sigmas are float32 and come by way of text


# --- while a prior is made ----------------------------------------------------------------------------------


def record_branch_distance(metadata: dict[str, Any], step: Step) -> None:
    """Note how far the guidance branches were apart; a step that runs again replaces what it said before."""
    if step.branch_distance is not None:
        distances = metadata.setdefault(FORMATION_KEY, {}).setdefault("branch_distances", [])
        distances[step.index :] = [step.branch_distance]


def save_formation(writer: PriorWriter) -> None:
    """Add the record to a prior whose steps are all saved, and draw it; it is whole without the picture."""
    writer.metadata[FORMATION_KEY] = record = measure_formation(writer.prior)
    try:
        writer.save(FORMATION_FILE, lambda path: draw_formation(writer.prior, record, path))
    except Exception as error:  # whatever a plotting library and its fonts may raise
        log.warning(f"no {FORMATION_FILE} ({type(error).__name__}: {error}); the prior is whole without it")


def draw_formation(prior: Prior, record: Mapping[str, Any], path: Path) -> None:
    """Draw the record, with what `--start_step auto` makes of it."""
    from step_skip.formation import plot_formation

    left, measured, auto = None, False, None
    if record["text_moves"] is not None:
        left, measured = say_left(record["text_moves"], sigmas=prior.metadata["scheduler_sigmas"])
        auto = latest_step(left, DEFAULT_TEXT_SHARE)
    plot_formation(prior, record, path, left=left, measured=measured, share=DEFAULT_TEXT_SHARE, auto=auto)


def measure_formation(prior: Prior) -> dict[str, list[float] | None]:
    """The whole record of a prior whose steps are all saved; one number a step in every list.

    Returns:
        branch_distances and text_moves: None where cfg_scale is 1; still_distances; moving_distances: None
        where the clip is a single latent frame.
    """
    import torch

    metadata, sigmas = prior.metadata, prior.metadata["scheduler_sigmas"]
    branches, moves = metadata.get(FORMATION_KEY, {}).get("branch_distances"), None
    if branches is not None:
        moves = text_moves(branches, sigmas=sigmas, cfg_scale=prior.guidance)
    clean = load_latents(prior, step_file(len(sigmas) - 1)).float()
    steps = range(len(sigmas))
    estimates = (load_denoised(prior, step, dtype=torch.float32) for step in steps)
    return {"branch_distances": branches, "text_moves": moves, **part_distances(estimates, clean)}


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


def choose_start_step(prior: Prior, text_share: float = DEFAULT_TEXT_SHARE) -> AutoStep:
    """The latest step after which at least `text_share` (0 ... 1) of the text's say is left.

    Raises:
        InputError: the prior doesn't say what the text had to say, or no step leaves as much.
    """
    left, measured = say_left(read_text_moves(prior), sigmas=prior.metadata["scheduler_sigmas"])
    step = latest_step(left, text_share)
    if step is None:
        raise InputError(
            f"--text_share {text_share:g}: {left[0]:.2f} of the text's say is left after step 0 of "
            f"{prior.directory}; ask for less, or leave --start_step out"
        )
    return AutoStep(step, left[step], text_share, measured)


def latest_step(left: Sequence[float], text_share: float) -> int | None:
    """The latest step that leaves at least this share, if any does."""
    return max((step for step, share in enumerate(left) if share >= text_share), default=None)


def read_text_moves(prior: Prior) -> list[float]:
    """The prior's text_moves, one number a step.

    Raises:
        InputError: it has none, or what it has is none.
    """
    instead = "name a step instead of auto, or make the prior again"
    if not prior.is_complete:
        raise InputError(
            f"--start_step auto: {prior.directory} was stopped after step {prior.whole_steps - 1}, and only "
            "a whole run tells what is left to say; name a step, or finish it with generate_prior.py --resume"
        )
    if FORMATION_KEY not in prior.metadata:
        raise InputError(
            f"--start_step auto: {prior.directory} records no {FORMATION_KEY}, it is older; {instead}"
        )
    if 1 in prior.guidance:
        raise InputError(
            f"--start_step auto: {prior.directory} was made with --cfg_scale 1, where the text's say is not "
            f"measured; {instead} with guidance"
        )
    moves = prior.metadata[FORMATION_KEY].get("text_moves") or []
    steps = prior.num_inference_steps
    if len(moves) != steps:
        raise InputError(
            f"--start_step auto: {prior.directory} lacks the {steps} text_moves of its "
            f"{FORMATION_KEY}; {instead}"
        )
    return moves


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
    return LATE * num_inference_steps <= start_step < num_inference_steps - 1


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
