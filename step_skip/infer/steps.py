"""Which steps one video runs: what was chosen, or the prior recommends, held against what the prior has.

The arithmetic of steps and sigmas is in steps.py.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

from step_skip.errors import InputError
from step_skip.infer.choices import AUTO
from step_skip.infer.schema import ClipReport
from step_skip.method.closeness import CLOSENESS, DEFAULT_CLOSENESS, FIT
from step_skip.method.formation import DEFAULT_TEXT_SHARE, AutoStep, influence_left, latest_step
from step_skip.method.steps import (
    SAME_SIGMA,
    locate_sigma,
    recommended_num_steps,
    recommended_start_step,
    tail_sigmas,
)
from step_skip.prior.prior import Prior, number_of_steps, step_ranges, usual_steps
from step_skip.prior.schema import FORMATION_KEY

if TYPE_CHECKING:
    from step_skip.infer.choices import Choices
MORE: Final = (1, 2, 3, 4, 6, 8, 12, 16, 25, 50)  # numbers of steps, of which the next is "more steps"


@dataclass(frozen=True, kw_only=True)
class ChosenSteps:
    """The steps of a plan; the fields are those of `infer.plan.Plan`."""

    method: str
    start_step: int | None
    steps_to_run: list[int]
    sigmas: tuple[float, ...] | None = None
    auto: AutoStep | None = None
    paths: tuple[tuple[int, ...], ...] | None = None
    closeness: float | None = None


def choose_steps(choices: Choices, prior: Prior) -> ChosenSteps:
    """Choose the steps that run.

    Raises:
        InputError: a step the prior doesn't have, or a prior without what a differential resume needs.
    """
    if prior.is_of_clip and (choices.sigmas, choices.start_step) != (None, None):
        raise InputError(
            f"{prior.directory} was made of a clip, and has only the steps it took: leave --start_step and "
            "--sigmas out"
        )
    if choices.sigmas is not None:
        return custom_sigmas(choices.sigmas, prior)
    differential = choices.steps is not None or choices.num_steps is not None
    if choices.closeness is not None and choices.num_steps != AUTO:
        raise InputError("--closeness is what --num_steps auto goes by: give that, too")
    if prior.is_legacy and differential:
        raise InputError(
            "--steps needs the prior's velocities, which this older format lacks; use --start_step"
        )
    if not prior.is_complete and differential:
        raise InputError(
            f"--steps needs the prior's clean latents, and {prior.directory} was stopped after step "
            f"{prior.whole_steps - 1}; use --start_step, or finish it with generate_prior.py --resume"
        )
    if choices.start_step == AUTO:
        auto = choose_start_step(prior, choices.text_share or DEFAULT_TEXT_SHARE)
        return replace(remaining_steps(auto.step, prior, num_steps=choices.num_steps_after), auto=auto)
    resumes = not differential and (prior.metadata.start_step_chosen or prior.is_legacy)
    if resumes or choices.start_step is not None or not prior.is_complete:
        start_step = resolve_start_step(choices.start_step, prior)
        return remaining_steps(start_step, prior, num_steps=choices.num_steps_after)
    if choices.num_steps_after is not None:
        raise InputError("--num_steps_after spaces anew what is left after a step: give --start_step, too")
    paths = auto_paths(choices, prior) if choices.num_steps == AUTO else None
    return ChosenSteps(
        method="differential",
        start_step=None,
        steps_to_run=differential_steps(choices, prior) if paths is None else list(paths[-1]),
        paths=paths,
        closeness=None if paths is None else choices.closeness or CLOSENESS[DEFAULT_CLOSENESS],
    )


def more_steps(report: ClipReport) -> dict[str, int] | None:
    """Return the choice that gives a clip more steps; None: there are no more, or its sigmas are custom."""
    if report.method == "differential":
        more = next((number for number in MORE if number > len(report.steps_run)), math.inf)
        most = report.num_inference_steps if report.prior_steps is None else report.prior_steps
        return {"num_steps": int(more)} if more <= most else None
    if report.method == "resume" and report.start_step:
        return {"start_step": report.start_step // 2}
    return None


def auto_paths(choices: Choices, prior: Prior) -> tuple[tuple[int, ...], ...]:
    """Return the paths among which the first evaluation chooses, few steps first.

    Raises:
        InputError: what runs in two parts can't have them, or the prior has none of them.
    """
    for name in ("skip_cache", "tea_cache_l1_thresh"):
        if getattr(choices, name) is not None:
            raise InputError(
                f"--num_steps auto and --{name} can't be had together: give --num_steps a number"
            )
    if isinstance(choices.cfg_scale, Sequence) and len(choices.cfg_scale) > 1:
        raise InputError("--num_steps auto: give one --cfg_scale; how many steps run is not known before")
    if len(prior.family.experts) > 1:
        raise InputError("--num_steps auto: a model of two experts can't; give --num_steps a number")
    return tuple(tuple(usual_steps(prior, number)) for number in FIT if number <= number_of_steps(prior))


def custom_sigmas(sigmas: Sequence[float], prior: Prior) -> ChosenSteps:
    """Return the steps of a resume on custom sigmas, from where the prior's path is at the first of them.

    Raises:
        InputError: they don't decrease, or begin where the prior holds nothing.
    """
    if sigmas[-1] <= 0 or any(after >= now * (1 - SAME_SIGMA) for now, after in itertools.pairwise(sigmas)):
        raise InputError(f"--sigmas {' '.join(map(str, sigmas))}: expected decreasing values above 0")
    known = prior.metadata.scheduler_sigmas
    try:
        step, _ = locate_sigma(sigmas[0], known)
    except ValueError:
        raise InputError(
            f"--sigmas {sigmas[0]}: the prior begins at sigma {known[0]:.6g}; begin there or below"
        ) from None
    whole = prior.whole_steps
    if sigmas[0] < (known[whole] if whole < len(known) else 0.0) * (1 - SAME_SIGMA):
        raise InputError(
            f"--sigmas {sigmas[0]}: {prior.directory} was stopped after step {whole - 1}; begin at "
            f"{known[whole]:.6g} or above, or finish it with generate_prior.py --resume"
        )
    if prior.is_legacy and step == 0:
        raise InputError(
            f"--sigmas {sigmas[0]}: this older format holds nothing before step 0; begin at "
            f"{known[1]:.6g} or below"
        )
    steps = list(range(len(sigmas)))
    return ChosenSteps(method="sigmas", start_step=step - 1, steps_to_run=steps, sigmas=tuple(sigmas))


def remaining_steps(start_step: int, prior: Prior, *, num_steps: int | None) -> ChosenSteps:
    """Return the steps of a resume after a step: those that are left, or so many others.

    Raises:
        InputError: none are left.
    """
    steps = list(range(start_step + 1, prior.num_inference_steps))
    if num_steps is None or num_steps == len(steps):
        return ChosenSteps(method="resume", start_step=start_step, steps_to_run=steps)
    if not steps:
        raise InputError(f"--num_steps_after {num_steps}: step {start_step} is the prior's last")
    m = prior.metadata
    begin = min(m.scheduler_sigmas[start_step + 1], 1.0)  # not compared with the scheduler's yet
    return ChosenSteps(
        method="sigmas",
        start_step=start_step,
        steps_to_run=list(range(num_steps)),
        sigmas=tuple(tail_sigmas(begin, num_steps, sigma_shift=m.sigma_shift)),
    )


def resolve_start_step(choice: int | None, prior: Prior) -> int:
    """Return the step that a --start_step means; None: the prior's recommendation, or its last step.

    Raises:
        InputError: the prior has no such step.
    """
    total = prior.num_inference_steps
    last = total - 1 if prior.is_complete else prior.whole_steps - 1
    if choice is None and prior.is_complete:
        own = prior.metadata.start_step
        return recommended_start_step(total) if own is None else own
    if choice is not None and not 0 <= choice <= last:
        raise InputError(f"--start_step {choice}: the prior has steps 0 to {last}")
    return last if choice is None else choice


def differential_steps(choices: Choices, prior: Prior) -> list[int]:
    """Return the steps of a differential resume: those given, or the usual ones of so many.

    Raises:
        InputError: the prior has no such steps.
    """
    total, most = prior.num_inference_steps, number_of_steps(prior)
    num_steps = min(recommended_num_steps(total), most) if choices.num_steps is None else choices.num_steps
    if not 1 <= int(num_steps) <= most:
        kept = "" if prior.kept_steps is None else f" left, {step_ranges(prior.kept_steps)}"
        raise InputError(f"--num_steps {num_steps}: {prior.directory} has only {most} steps{kept}")
    steps = list(choices.steps or usual_steps(prior, int(num_steps)))
    if sorted(set(steps)) != steps or not 0 <= steps[0] <= steps[-1] < total:
        raise InputError(f"--steps {steps}: expected increasing steps between 0 and {total - 1}")
    return steps


def choose_start_step(prior: Prior, text_share: float = DEFAULT_TEXT_SHARE) -> AutoStep:
    """Choose the latest step after which at least `text_share` (0 ... 1) of the text's influence remains.

    Raises:
        InputError: the prior doesn't say what the text had to say, or no step leaves as much.
    """
    left, measured = influence_left(read_text_moves(prior), sigmas=prior.metadata.scheduler_sigmas)
    step = latest_step(left, text_share)
    if step is None:
        raise InputError(
            f"--text_share {text_share:g}: {left[0]:.2f} of the text's say is left after step 0 of "
            f"{prior.directory}; ask for less, or leave --start_step out"
        )
    return AutoStep(step, left[step], text_share, measured)


def read_text_moves(prior: Prior) -> list[float]:
    """Read the prior's text_moves, one number for each step.

    Raises:
        InputError: it has none, or what it has is none.
    """
    instead = "name a step instead of auto, or make the prior again"
    if not prior.is_complete:
        raise InputError(
            f"--start_step auto: {prior.directory} was stopped after step {prior.whole_steps - 1}, and only "
            "a whole run tells what is left to say; name a step, or finish it with generate_prior.py --resume"
        )
    if FORMATION_KEY not in prior.metadata.model_fields_set:
        raise InputError(
            f"--start_step auto: {prior.directory} records no {FORMATION_KEY}, it is older; {instead}"
        )
    if 1 in prior.guidance:
        raise InputError(
            f"--start_step auto: {prior.directory} was made with --cfg_scale 1, where the text's say is not "
            f"measured; {instead} with guidance"
        )
    moves = prior.metadata.formation.text_moves or []
    steps = prior.num_inference_steps
    if len(moves) != steps:
        raise InputError(
            f"--start_step auto: {prior.directory} lacks the {steps} text_moves of its "
            f"{FORMATION_KEY}; {instead}"
        )
    return moves
