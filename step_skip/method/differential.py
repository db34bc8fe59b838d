"""Differential resume: follow a prior's path in a few chosen steps, with another conditioning.

`follow` is the method, from the first step to the last; what hosts it (the schedulers of `pipeline`, the
bridge to diffusers) only evaluates the network where `follow` asks for it.

A chosen step stands for many fine steps of the prior, and the velocity where it begins isn't what moves the
latents over it. With the velocities c and n of both guidance branches and g = c - n, the mean velocity over
the step is guessed in the same way for the prior and for the new run:

    guess = c + (cfg_scale - 1) * decay * g + a * (c - c_before) + b * (n - n_before)

decay is the mean of |g| over the prior's fine steps relative to the first of them; what a change adds to g
fades by decay ** rate (`fading_rate`). a and b are the two factors by which the prior's own guess comes
nearest to what its fine steps did. What that guess still misses is the residual. With h = sigma_next - sigma
and an offset d from the prior's path that starts at zero,

    residual = (x_next - x) / h - guess_prior
    d <- d + h * (guess_new - guess_prior) - h * (1 - share) * residual,      continue at x_next + d

share (0 ... 1, `share_of_residual`) says how far the new clip can be expected to do as the prior did. Once
the velocities at the next chosen step are known, too, d is corrected (`corrected_offset`). With the prior's
own prompt both guesses are the same and the share is one: the result is the prior's own, exactly.

FlowEdit (arXiv 2412.08629) drives an edit by a difference of velocities; here one of the two is on disk. The
guess from the step before is that of a linear multistep solver (Adams-Bashforth), the correction that of a
predictor-corrector (Adams-Moulton), with coefficients that the prior teaches. docs/method.md derives them.
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
    latents: Sequence[torch.Tensor]  # before each of the steps, then the clean ones: one more than steps
    noise_pred: Sequence[torch.Tensor]  # the guided velocity of each of the steps
    noise_pred_nega: Sequence[torch.Tensor] | None = None  # its negative branch's; None: not known
    cfg_scale: float | Sequence[float] = 1.0  # of the prior's run, or one for each of the steps
    guidance_decay: Sequence[float] | None = None  # of each step (steps.guidance_decay); None: not known


@dataclass(frozen=True)
class Evaluation:
    """One evaluation of the network as its host sends it to `follow`; tensors are [B, C, T, H, W]."""

    latents: torch.Tensor  # it was evaluated at
    noise_pred: torch.Tensor  # the guided velocity
    noise_pred_nega: torch.Tensor | None = None  # its negative branch; None: not known, or no guidance


@dataclass(frozen=True)
class Velocity:
    """A velocity and its guidance branches; where they are not known both are the velocity itself."""

    guided: torch.Tensor
    posi: torch.Tensor
    nega: torch.Tensor
    cfg_scale: float

    @classmethod
    def split(cls, guided: torch.Tensor, nega: torch.Tensor | None, cfg_scale: float) -> Velocity:
        """Return, in float32, the branches of a guided velocity nega + cfg_scale * (posi - nega)."""
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
        """Return the influence of the text: what guidance adds to the positive branch, per cfg_scale - 1."""
        return self.posi - self.nega

    def with_guidance(self, decay: float) -> torch.Tensor:
        """Return the velocity with a part (0 ... 1) of what guidance adds to the positive branch."""
        return self.posi + (self.cfg_scale - 1) * decay * self.text


@dataclass(frozen=True)
class StepStart:
    """The state of both runs where a chosen step begins; tensors are [B, C, T, H, W]."""

    new: Velocity
    old: Velocity  # the prior's
    offset: torch.Tensor | float  # of the new run from the prior's path
    mean_old: torch.Tensor  # the prior's mean velocity over the step
    h: float  # sigma at the step's end minus sigma at its beginning, below 0


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
    """Follow a prior's path in its chosen steps, spending each on what the new conditioning changes.

    A generator, because the loop over the steps belongs to whoever evaluates the network. It yields the
    latents at which the network is to be evaluated, is sent each evaluation, and yields the clean latents
    last:

        clip = follow(path, sigmas, cfg_scale)
        latents = next(clip)
        for step in path.steps:
            latents = clip.send(Evaluation(latents, *velocity(latents, sigmas[step])))

    Args:
        path: the prior's path at the chosen steps.
        sigmas: of all steps of the prior's schedule, decreasing, without the closing 0.
        cfg_scale: the new run's, or one for each chosen step.
        choose: given the first velocity, [B, C, T, H, W], returns the path to go on with; it begins at the
            same step and latents. None: the same.
        rate_of, correct, extrapolate, share_of: other functions in place of `fading_rate`,
            `corrected_offset`, `extrapolated` and `share_of_residual`, to measure what each is worth.
    """
    rate_of, correct = rate_of or fading_rate, correct or corrected_offset
    extrapolate, share_of = extrapolate or extrapolated, share_of or share_of_residual
    offset: torch.Tensor | float = 0.0  # float32: bfloat16 would lose small differences
    before: StepStart | None = None  # the chosen step before this one
    denoised_before: tuple[torch.Tensor, torch.Tensor] | None = None  # new and prior's, at that step
    rate: float | None = None
    latents, place = path.latents[0], 0
    while place < len(path.steps):
        seen = yield latents
        if place == 0 and choose is not None:
            path = choose(seen.noise_pred)
        ends = [*(sigmas[step] for step in path.steps), 0.0]
        sigma, h = ends[place], ends[place + 1] - ends[place]
        here, there = (path.latents[i].to(seen.latents.device).float() for i in (place, place + 1))
        new, old = velocities(path, place, seen, cfg_scale)

        # The velocities at both ends of the step before are known now: correct where it has led.
        if before is not None:
            offset = correct(offset, before, new, old, sigma=sigma)

        # Guess how the mean velocities over this step differ, and what the prior's own guess misses.
        decay = path.guidance_decay[place] if path.guidance_decay else 1.0
        rate = rate_of(new, old) if rate is None else rate
        lasting = (new.cfg_scale - 1) * (decay**rate - decay)
        guess_old, mean_old = old.with_guidance(decay), (there - here) / h
        change = new.with_guidance(decay) - guess_old + lasting * (new.text - old.text)
        residual = mean_old - guess_old
        if before is not None:
            change, residual, _ = extrapolate(change, residual, before, new, old)

        # Follow the prior's residual as far as both clips have been doing the same.
        denoised = seen.latents.float() - sigma * new.guided, here - sigma * old.guided
        is_last = place == len(path.steps) - 1
        share = share_of(h * residual, denoised, denoised_before, per_position=is_last)

        before, denoised_before = StepStart(new, old, offset, mean_old, h), denoised
        moved: torch.Tensor = offset + h * (change - (1 - share) * residual)
        latents = torch.where(moved == 0, there, there + moved).to(seen.latents.dtype)  # keeps a -0.0
        offset = moved
        place += 1
    yield latents


# --- its parts ----------------------------------------------------------------------------------------------


def velocities(
    path: Trajectory, place: int, seen: Evaluation, cfg_scale: float | Sequence[float]
) -> tuple[Velocity, Velocity]:
    """Return the new run's velocity at a chosen step and the prior's, split where both can be."""
    old_nega = None if path.noise_pred_nega is None else path.noise_pred_nega[place]
    known = seen.noise_pred_nega is not None and old_nega is not None
    new = Velocity.split(seen.noise_pred, seen.noise_pred_nega if known else None, value_at(cfg_scale, place))
    old = path.noise_pred[place].to(seen.noise_pred.device)
    return new, Velocity.split(old, old_nega if known else None, value_at(path.cfg_scale, place))


def value_at(values: float | Sequence[float], place: int) -> float:
    """Return the value for a step; a scalar applies to all steps."""
    return values[place] if isinstance(values, Sequence) else values


def fading_rate(new: Velocity, old: Velocity) -> float:
    """Return how fast a change of guidance fades, relative to how fast the prior's guidance did: 0 ... 1.

    The branches come to agree as the picture shows what the prompt asks for. Where the prior's text acted, in
    the same positions, a change fades with it; elsewhere it lasts. With the squared norms over the channels
    of the change and of the prior's text, position by position,

        rate = min(1, overlap * max(1, r)),   overlap: the cosine of the two,   r = |c_new - c_old| / |g_old|

    at the first chosen step; 1 where nothing changes or the text did nothing.
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
    """Return the offset where a step begins, corrected by the velocities at both ends of the step before.

    With the velocities v, c and n where that step began, and c_end and n_end where this one does, both runs'
    mean velocity over it is guessed as

        guess = v + a * (c_end - c) + b * (n_end - n)

    with the a and b that come nearest to what the prior did, and d_end = d + h * (guess_new - guess_old). But
    c_end and n_end were evaluated at an offset with the error e that is to be found. If the clean latents
    that the prompt asks for stay, c_end is off by e / sigma; those of the negative branch go with what they
    see, so n_end isn't. Then d_end is off by h * a * e / sigma, and with the sign of h

        e = (offset - d_end) / (1 - h * a / sigma)

    They don't stay entirely, so this corrects too little rather than too much. [B, C, T, H, W]

    Args:
        start: of the step before.
        new, old: the velocities where this step begins.
        sigma: where this step begins.
    """
    change, residual = start.new.guided - start.old.guided, start.mean_old - start.old.guided
    change, _, factors = extrapolated(change, residual, start, new, old)
    error = offset - (start.offset + start.h * change)
    pull = factors[0] if new.is_split else sum(factors)
    return offset - error / max(1.0, 1 - start.h * pull / sigma)


def extrapolated(
    change: torch.Tensor, residual: torch.Tensor, start: StepStart, new: Velocity, old: Velocity
) -> tuple[torch.Tensor, torch.Tensor, list[float]]:
    """Return change and residual with the deltas of both branches since a step's start added.

    The factors of the deltas, returned third, are those that leave the prior the least residual.
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
    """Return how much of the prior's residual to follow, frame by frame: [B, 1, T, 1, 1], 0 ... 1.

    Both denoised estimates have moved since the step before; at the first step, since the picture at rest,
    the prior's first frame. As far as they moved alike the new clip follows the prior: with the deltas m,

        share = max(0, 1 - |m_new - m_old|^2 / (|m_new|^2 + |m_old|^2 + |residual|^2)),   norms over a frame

    Args:
        residual: of the latents over the step, [B, C, T, H, W], as all that follow.
        denoised: the new run's and the prior's estimate, latents - sigma * noise_pred.
        denoised_before: at the step before; None: at the first step.
        per_position: take the norms over the channels alone, [B, 1, T, H, W]: after the last step, where
            no later step corrects anything.
    """
    new, old = denoised
    new_before, old_before = denoised_before or (old[:, :, :1], old[:, :, :1])
    deltas = new - new_before, old - old_before
    over = (1,) if per_position else (1, 3, 4)
    distance = (deltas[0] - deltas[1]).square().sum(over, keepdim=True)
    total = sum(each.square().sum(over, keepdim=True) for each in (*deltas, residual))
    return torch.where(distance > 0, 1 - distance / total, 1.0).clamp(min=0)


def nearest_sum(parts: Sequence[torch.Tensor], target: torch.Tensor) -> list[float]:
    """Return the factors of the parts whose sum is nearest to the target, by least squares.

    Parts that are zero have the factor 0; parts that are alike share theirs.
    """
    columns = torch.stack([part.flatten() for part in parts])  # [parts, elements]
    gram, products = (columns @ columns.T).double().cpu(), (columns @ target.flatten()).double().cpu()
    return (torch.linalg.pinv(gram, rtol=1e-9, hermitian=True) @ products).tolist()
