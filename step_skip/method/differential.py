"""Follow a prior's path in a few chosen steps with another conditioning: differential resume.

`follow` is the method, from the first step to the last; its hosts (pipeline/schedulers.py and, through it,
diffusers.py) only evaluate the network at the latents that `follow` yields.

A chosen step stands for many fine steps of the prior, so the velocity at its beginning is not the mean
velocity over it. With the velocities c and n of both guidance branches and g = c - n, the mean velocity over
the step is estimated by the same formula for the prior and for the new run:

    guess = c + (cfg_scale - 1) * decay * g + a * (c - c_before) + b * (n - n_before)

decay is the mean of |g| over the prior's fine steps relative to the first of them; the part that a change
adds to g fades by decay ** rate (`fading_rate`). a and b are the two factors that bring the prior's own guess
nearest to its mean velocity over the fine steps. The difference that remains is the residual. With
h = sigma_next - sigma and an offset d from the prior's path that starts at zero,

    residual = (x_next - x) / h - guess_prior
    d <- d + h * (guess_new - guess_prior) - h * (1 - share) * residual,      continue at x_next + d

share (0 ... 1, `share_of_residual`) is the part of the residual that applies to the new clip, too. Once the
velocities at the next chosen step are known, d is corrected (`corrected_offset`). With the prior's own prompt
both guesses are equal and the share is one: the result is the prior's own clean latents, exactly.

FlowEdit (arXiv 2412.08629) drives an edit by a difference of velocities; here one of the two is on disk. The
extrapolation from the step before is that of a linear multistep solver (Adams-Bashforth), the correction that
of a predictor-corrector method (Adams-Moulton), with coefficients fitted to the prior. docs/method.md derives
them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Trajectory:
    """A prior's path at a few chosen steps; tensors are [B, C, T, H, W]."""

    steps: Sequence[int]  # indices into the full schedule, increasing
    latents: Sequence[torch.Tensor]  # before each step, then the clean latents: len(steps) + 1 tensors
    noise_pred: Sequence[torch.Tensor]  # guided velocity of each step
    noise_pred_nega: Sequence[torch.Tensor] | None = None  # negative branch of each step; None: unknown
    cfg_scale: float | Sequence[float] = 1.0  # of the prior's run, one value or one per step
    guidance_decay: Sequence[float] | None = None  # of each step (steps.guidance_decay); None: unknown


@dataclass(frozen=True)
class Evaluation:
    """One evaluation of the network as its host sends it to `follow`; tensors are [B, C, T, H, W]."""

    latents: torch.Tensor  # input of the evaluation
    noise_pred: torch.Tensor  # guided velocity
    noise_pred_nega: torch.Tensor | None = None  # negative branch; None: unknown, or no guidance


@dataclass(frozen=True)
class Velocity:
    """A velocity and its guidance branches; if they are unknown both are the velocity itself."""

    guided: torch.Tensor
    posi: torch.Tensor
    nega: torch.Tensor
    cfg_scale: float

    @classmethod
    def split(cls, guided: torch.Tensor, nega: torch.Tensor | None, cfg_scale: float) -> Velocity:
        """Split a guided velocity nega + cfg_scale * (posi - nega) into its branches, in float32."""
        guided = guided.float()
        if nega is None:
            return cls(guided, guided, guided, 1.0)
        nega = nega.to(guided)
        return cls(guided, nega + (guided - nega) / cfg_scale, nega, cfg_scale)

    @property
    def is_split(self) -> bool:
        """Return whether the branches are known."""
        return self.posi is not self.nega

    @property
    def text(self) -> torch.Tensor:
        """Return the influence of the text: the term that guidance adds, divided by cfg_scale - 1."""
        return self.posi - self.nega

    def with_guidance(self, decay: float) -> torch.Tensor:
        """Return the velocity with the guidance term scaled by `decay`, 0 ... 1."""
        return self.posi + (self.cfg_scale - 1) * decay * self.text


@dataclass(frozen=True)
class StepStart:
    """The state of both runs at the beginning of a chosen step; tensors are [B, C, T, H, W]."""

    new: Velocity  # of the new run
    old: Velocity  # of the prior
    offset: torch.Tensor | float  # of the new run from the prior's path
    mean_old: torch.Tensor  # mean velocity of the prior over the step
    h: float  # sigma at the step's end minus sigma at its beginning; negative


# --- the method ---------------------------------------------------------------------------------------------


def follow(
    path: Trajectory,
    sigmas: Sequence[float],
    cfg_scale: float | Sequence[float] = 1.0,
    *,
    choose: Callable[[torch.Tensor], Trajectory] | None = None,
    rate_of: Callable[..., float] | None = None,
    correct: Callable[..., torch.Tensor | float] | None = None,
    extrapolate: Callable[..., tuple[torch.Tensor, torch.Tensor, list[float]]] | None = None,
    share_of: Callable[..., torch.Tensor | float] | None = None,
) -> Generator[torch.Tensor, Evaluation, None]:
    """Follow a prior's path in its chosen steps, with each evaluation spent on the change of conditioning.

    This is a generator, because the caller evaluates the network and owns the loop over the steps. It yields
    the latents at which the network is to be evaluated, receives each evaluation, and yields the clean
    latents last:

        clip = follow(path, sigmas, cfg_scale)
        latents = next(clip)
        for step in path.steps:
            latents = clip.send(Evaluation(latents, *velocity(latents, sigmas[step])))

    Args:
        path: the prior's path at the chosen steps.
        sigmas: of all steps of the prior's schedule, decreasing, without the closing 0.
        cfg_scale: guidance of the new run, one value or one per chosen step.
        choose: given the first velocity, [B, C, T, H, W], returns the path to continue with, which begins at
            the same step and latents. None: `path`.
        rate_of, correct, extrapolate, share_of: replacements of `fading_rate`, `corrected_offset`,
            `extrapolated` and `share_of_residual`, for ablations.

    Yields:
        Latents [B, C, T, H, W] in the dtype of the evaluations.
    """
    rate_of, correct = rate_of or fading_rate, correct or corrected_offset
    extrapolate, share_of = extrapolate or extrapolated, share_of or share_of_residual
    offset: torch.Tensor | float = 0.0  # float32, because bfloat16 would lose small differences
    before: StepStart | None = None  # the previous chosen step
    denoised_before: tuple[torch.Tensor, torch.Tensor] | None = None  # the new run's and the prior's, there
    rate: float | None = None
    latents, index = path.latents[0], 0
    while index < len(path.steps):
        evaluation = yield latents
        if index == 0 and choose is not None:
            path = choose(evaluation.noise_pred)
        ends = [*(sigmas[step] for step in path.steps), 0.0]
        sigma, h = ends[index], ends[index + 1] - ends[index]
        here, there = (path.latents[i].to(evaluation.latents.device).float() for i in (index, index + 1))
        new, old = velocities(path, index, evaluation, cfg_scale)

        # The velocities at both ends of the previous step are known now: correct its offset.
        if before is not None:
            offset = correct(offset, before, new, old, sigma=sigma)

        # Estimate the difference of the mean velocities over this step, and the prior's residual.
        decay = path.guidance_decay[index] if path.guidance_decay else 1.0
        rate = rate_of(new, old) if rate is None else rate
        lasting = (new.cfg_scale - 1) * (decay**rate - decay)
        guess_old, mean_old = old.with_guidance(decay), (there - here) / h
        change = new.with_guidance(decay) - guess_old + lasting * (new.text - old.text)
        residual = mean_old - guess_old
        if before is not None:
            change, residual, _ = extrapolate(change, residual, before, new, old)

        # Follow the prior's residual as far as both clips have moved alike.
        denoised = evaluation.latents.float() - sigma * new.guided, here - sigma * old.guided
        is_last = index == len(path.steps) - 1
        share = share_of(h * residual, denoised, denoised_before, per_position=is_last)

        before, denoised_before = StepStart(new, old, offset, mean_old, h), denoised
        moved: torch.Tensor = offset + h * (change - (1 - share) * residual)
        # Where nothing moved `there` is taken as it is, because adding 0 would turn a -0.0 into 0.0.
        latents = torch.where(moved == 0, there, there + moved).to(evaluation.latents.dtype)
        offset = moved
        index += 1
    yield latents


# --- parts of the method ------------------------------------------------------------------------------------


def velocities(
    path: Trajectory, index: int, evaluation: Evaluation, cfg_scale: float | Sequence[float]
) -> tuple[Velocity, Velocity]:
    """Return the new run's and the prior's velocity at a chosen step, split if both branches are known."""
    old_nega = None if path.noise_pred_nega is None else path.noise_pred_nega[index]
    known = evaluation.noise_pred_nega is not None and old_nega is not None
    new = Velocity.split(
        evaluation.noise_pred, evaluation.noise_pred_nega if known else None, value_at(cfg_scale, index)
    )
    old = path.noise_pred[index].to(evaluation.noise_pred.device)
    return new, Velocity.split(old, old_nega if known else None, value_at(path.cfg_scale, index))


def value_at(values: float | Sequence[float], index: int) -> float:
    """Return the value for a step; a scalar applies to all steps."""
    return values[index] if isinstance(values, Sequence) else values


def fading_rate(new: Velocity, old: Velocity) -> float:
    """Return the rate at which a change of guidance fades, relative to that of the prior's guidance: 0 ... 1.

    The branches converge once the picture shows the prompt. A change at the positions where the prior's text
    acted fades with it; elsewhere it lasts. With the squared norms over the channels of the change and of the
    prior's text influence, position by position,

        rate = min(1, overlap * max(1, r)),   overlap: the cosine of the two,   r = |c_new - c_old| / |g_old|

    at the first chosen step; 1 if nothing changes or the prior's text has no influence. docs/method.md
    derives it.
    """
    changes, acts = (each.square().sum(1).flatten() for each in (new.posi - old.posi, old.text))
    lengths = float(changes.norm() * acts.norm())
    if not lengths:
        return 1.0
    larger = math.sqrt(max(1.0, float(changes.sum() / acts.sum())))
    return min(1.0, larger * float(changes @ acts) / lengths)


def corrected_offset(
    offset: torch.Tensor | float, start: StepStart, new: Velocity, old: Velocity, *, sigma: float
) -> torch.Tensor | float:
    """Return the offset at a step's beginning, corrected by the velocities at both ends of the previous step.

    With the velocities v, c and n at the beginning of the previous step, and c_end and n_end at its end, both
    runs' mean velocity over it is estimated as

        guess = v + a * (c_end - c) + b * (n_end - n)

    with the a and b that come nearest to the prior's mean velocity, and d_end = d + h * (guess_new -
    guess_old). But c_end and n_end were evaluated at an offset that has the unknown error e. If the clean
    latents that the prompt asks for don't depend on the offset, c_end is off by e / sigma; those of the
    negative branch follow its input, so n_end is right. Then d_end is off by h * a * e / sigma, and with the
    sign of h

        e = (offset - d_end) / (1 - h * a / sigma)

    The positive branch's clean latents do depend on the offset a little, so this corrects too little rather
    than too much.

    Args:
        offset: the new run's offset from the prior's path, [B, C, T, H, W].
        start: the beginning of the previous step.
        new, old: the velocities of both runs at the beginning of this step.
        sigma: noise level at the beginning of this step.
    """
    change, residual = start.new.guided - start.old.guided, start.mean_old - start.old.guided
    change, _, factors = extrapolated(change, residual, start, new, old)
    error = offset - (start.offset + start.h * change)
    pull = factors[0] if new.is_split else sum(factors)
    return offset - error / max(1.0, 1 - start.h * pull / sigma)


def extrapolated(
    change: torch.Tensor, residual: torch.Tensor, start: StepStart, new: Velocity, old: Velocity
) -> tuple[torch.Tensor, torch.Tensor, list[float]]:
    """Return change and residual, [B, C, T, H, W], extrapolated by the deltas of both branches since `start`.

    The factors of the deltas, returned third, are those that leave the prior the smallest residual.
    """
    new_deltas = new.posi - start.new.posi, new.nega - start.new.nega
    old_deltas = old.posi - start.old.posi, old.nega - start.old.nega
    factors = nearest_sum(old_deltas, residual)
    for factor, of_new, of_old in zip(factors, new_deltas, old_deltas, strict=True):
        change, residual = change + factor * (of_new - of_old), residual - factor * of_old
    return change, residual, factors


def share_of_residual(
    residual: torch.Tensor,
    denoised: tuple[torch.Tensor, torch.Tensor],
    denoised_before: tuple[torch.Tensor, torch.Tensor] | None,
    *,
    per_position: bool,
) -> torch.Tensor:
    """Return the share of the prior's residual to follow, frame by frame: [B, 1, T, 1, 1], 0 ... 1.

    Both denoised estimates have moved since the previous step; at the first step, since the still picture,
    which is the prior's first frame. As far as they moved alike the new clip follows the prior. With the
    deltas m,

        share = max(0, 1 - |m_new - m_old|^2 / (|m_new|^2 + |m_old|^2 + |residual|^2)),   norms over a frame

    Args:
        residual: of the latents over the step; all tensors are [B, C, T, H, W].
        denoised: the new run's and the prior's estimate, latents - sigma * noise_pred.
        denoised_before: both estimates at the previous step; None at the first step.
        per_position: take the norms over the channels alone and return [B, 1, T, H, W]; for the last step,
            which no later step corrects.
    """
    new, old = denoised
    new_before, old_before = denoised_before or (old[:, :, :1], old[:, :, :1])
    deltas = new - new_before, old - old_before
    over = (1,) if per_position else (1, 3, 4)
    distance = (deltas[0] - deltas[1]).square().sum(over, keepdim=True)
    total = sum(each.square().sum(over, keepdim=True) for each in (*deltas, residual))
    return torch.where(distance > 0, 1 - distance / total, 1.0).clamp(min=0)


def nearest_sum(parts: Sequence[torch.Tensor], target: torch.Tensor) -> list[float]:
    """Return the factors with which the sum of the parts is nearest to the target, by least squares.

    Parts that are zero get the factor 0; equal parts get equal factors.
    """
    columns = torch.stack([part.flatten() for part in parts])  # [parts, elements]
    gram, products = (columns @ columns.T).double().cpu(), (columns @ target.flatten()).double().cpu()
    return (torch.linalg.pinv(gram, rtol=1e-9, hermitian=True) @ products).tolist()
