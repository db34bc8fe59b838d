"""Differential resume: a prior's path, followed in a few chosen steps, and what the new prompt changes.

A chosen step stands for many fine ones of the prior, and the velocity where it begins isn't what moves the
latents over it. With the velocities c and n of both guidance branches, g = c - n, the mean velocity over the
step is guessed alike for the prior and for the new run:

    guess = c + (cfg_scale - 1) * decay * g + a * (c - c_before) + b * (n - n_before)

decay is the mean of |g| over the prior's fine steps to the first of them; what a change adds to g fades by
decay ** rate (`fading_rate`). a and b are the two numbers by which the prior's own guess comes nearest to
what its fine steps did. What it still misses is the rest. With h = sigma_next - sigma and an offset d from
the prior's path that starts at zero,

    rest = (x_next - x) / h - guess_prior
    d <- d + h * (guess_new - guess_prior) - h * (1 - share) * rest,      go on at x_next + d

share (0 ... 1, `share_of_rest`) says where the new clip can be expected to do as the prior did. Once the
velocities at the next chosen step are known, too, d is corrected (`corrected_offset`). With the prior's own
prompt both guesses are the same and the share is one: the result is the prior's own, exactly.

FlowEdit (arXiv 2412.08629) drives an edit by a difference of velocities; here one of the two is on disk. The
guess from the step before is a linear multistep solver's (Adams-Bashforth), the correction a predictor-
corrector's (Adams-Moulton), with coefficients that the prior teaches. docs/method.md derives them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from step_skip.schedule import ReportingScheduler


@dataclass(frozen=True)
class Trajectory:
    """A prior's own path at a few chosen steps; tensors are [B, C, T, H, W]."""

    steps: Sequence[int]  # increasing
    latents: Sequence[torch.Tensor]  # before each of the steps, then the clean ones: one more than steps
    noise_pred: Sequence[torch.Tensor]  # the guided velocity of each of the steps
    noise_pred_nega: Sequence[torch.Tensor] | None = None  # its negative branch's; None: not known
    cfg_scale: float | Sequence[float] = 1.0  # that it was guided by, or one for each step
    guidance_decay: Sequence[float] | None = None  # of each step (steps.guidance_decay); None: unknown


@dataclass(frozen=True)
class Velocity:
    """A velocity and its guidance branches; where they are not known both are the velocity itself."""

    guided: torch.Tensor
    posi: torch.Tensor
    nega: torch.Tensor
    cfg_scale: float

    @classmethod
    def split(cls, guided: torch.Tensor, nega: torch.Tensor | None, cfg_scale: float) -> Velocity:
        """In float32, from the guided velocity nega + cfg_scale * (posi - nega)."""
        guided = guided.float()
        if nega is None:
            return cls(guided, guided, guided, 1.0)
        nega = nega.to(guided)
        return cls(guided, nega + (guided - nega) / cfg_scale, nega, cfg_scale)

    @property
    def is_split(self) -> bool:
        """Whether its branches are known."""
        return self.posi is not self.nega

    @property
    def text(self) -> torch.Tensor:
        """How the prompt moves it: what guidance adds to the positive branch, by cfg_scale - 1."""
        return self.posi - self.nega

    def with_guidance(self, decay: float) -> torch.Tensor:
        """The velocity with `decay` (0 ... 1) of what guidance adds to the positive branch."""
        return self.posi + (self.cfg_scale - 1) * decay * self.text

    def moves_since(self, before: Velocity) -> tuple[torch.Tensor, torch.Tensor]:
        """How both branches have moved since an earlier velocity."""
        return self.posi - before.posi, self.nega - before.nega


@dataclass(frozen=True)
class Start:
    """Where a step begins: both runs' velocities, the new run's offset, the prior's mean velocity over it.

    Tensors are [B, C, T, H, W].
    """

    new: Velocity
    old: Velocity
    offset: torch.Tensor | float
    mean_old: torch.Tensor


class DifferentialScheduler(ReportingScheduler):
    """Runs the trajectory's steps, each spent on what the new prompt changes of the prior's path.

    Args:
        trajectory: the prior's.
        cfg_scale: the new run's, or one for each step.
        choose: given the first velocity, [B, C, T, H, W], the trajectory to go on with, which begins at the
            same step and latents; None: the same.
    """

    def __init__(
        self,
        trajectory: Trajectory,
        cfg_scale: float | Sequence[float] = 1.0,
        *,
        choose: Callable[[torch.Tensor], Trajectory] | None = None,
    ):
        super().__init__(lambda _: self.trajectory.steps)
        self.trajectory = trajectory
        self.cfg_scale = cfg_scale
        self.choose = choose
        self.offset: torch.Tensor | float = 0.0  # float32: in bfloat16 small differences would be lost
        self.rate: float | None = None  # fading_rate, once the first velocity is known
        self.before: Start | None = None  # of the step before
        self.estimates: tuple[torch.Tensor, torch.Tensor] | None = None  # new and old, at the step before

    def advance(
        self, place: int, model_output: torch.Tensor, timestep: torch.Tensor, sample: torch.Tensor
    ) -> torch.Tensor:
        """Correct the offset, add what the new prompt changes ahead, and go on at the next chosen step."""
        if place == 0 and self.choose is not None:
            self.trajectory = self.choose(model_output)
            self.cut_schedule()
        sigma, ahead = float(self.sigmas[place]), self.ahead(place)
        here, there = (self.trajectory.latents[i].to(sample.device).float() for i in (place, place + 1))
        new, old = self.velocities(place, model_output)
        start = Start(new, old, self.corrected_offset(place, new, old), mean_old=(there - here) / ahead)
        change, rest = self.change_and_rest(place, new, old, mean_old=start.mean_old)
        estimates = {"new": sample.float() - sigma * new.guided, "old": here - sigma * old.guided}
        share = self.share_of_rest(place, ahead * rest, **estimates)
        offset: torch.Tensor = start.offset + ahead * (change - (1 - share) * rest)
        self.offset, self.before = offset, start
        return torch.where(offset == 0, there, there + offset).to(sample.dtype)  # keeps a -0.0

    def ahead(self, place: int) -> float:
        """From a step's sigma to the next chosen step's, after the last to 0: below 0."""
        sigmas = [*self.sigmas.tolist(), 0.0]
        return sigmas[place + 1] - sigmas[place]

    def velocities(self, place: int, model_output: torch.Tensor) -> tuple[Velocity, Velocity]:
        """The new run's velocity at a step and the prior's, with branches where both of them are known."""
        path, nega = self.trajectory, self.noise_pred_nega()
        known = nega is not None and path.noise_pred_nega is not None
        old_nega = path.noise_pred_nega[place] if known and path.noise_pred_nega is not None else None
        old = path.noise_pred[place].to(model_output.device)
        return (
            Velocity.split(model_output, nega if known else None, value_at(self.cfg_scale, place)),
            Velocity.split(old, old_nega, value_at(path.cfg_scale, place)),
        )

    def change_and_rest(
        self, place: int, new: Velocity, old: Velocity, *, mean_old: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """How the two guesses of the mean velocity over a step differ, and what the prior's one misses.

        Args:
            mean_old: the prior's true mean velocity over the step. [B, C, T, H, W], like the returned
        """
        decay = self.trajectory.guidance_decay[place] if self.trajectory.guidance_decay else 1.0
        if self.rate is None:
            self.rate = fading_rate(new, old)
        lasts = (new.cfg_scale - 1) * (decay**self.rate - decay)
        guess_old = old.with_guidance(decay)
        change = new.with_guidance(decay) - guess_old + lasts * (new.text - old.text)
        rest = mean_old - guess_old
        if self.before is not None:
            change, rest, _ = with_moves(change, rest, self.before, new, old)
        return change, rest

    def corrected_offset(self, place: int, new: Velocity, old: Velocity) -> torch.Tensor | float:
        """The offset where a step begins, made again from the velocities at both ends of the step before.

        With the velocities v, c and n where that step began, and c_end and n_end where this one does, both
        runs' mean velocity over it is guessed as

            guess = v + a * (c_end - c) + b * (n_end - n)

        with the a and b that come nearest to what the prior did, and d_end = d + h * (guess_new - guess_old).
        But c_end and n_end were evaluated at an offset that is off by the e that is looked for. If the clean
        latents that the prompt asks for stay, c_end is off by e / sigma; those of the negative branch go with
        what they see, so n_end isn't. Then d_end is off by h * a * e / sigma, and with the sign of h

            e = (offset - d_end) / (1 - h * a / sigma)

        They don't stay entirely, so this corrects too little rather than too much. [B, C, T, H, W]
        """
        if self.before is None:
            return self.offset
        start, behind, sigma = self.before, self.ahead(place - 1), float(self.sigmas[place])
        change, rest = start.new.guided - start.old.guided, start.mean_old - start.old.guided
        change, _, factors = with_moves(change, rest, start, new, old)
        off = self.offset - (start.offset + behind * change)
        pull = factors[0] if new.is_split else sum(factors)
        return self.offset - off / max(1.0, 1 - behind * pull / sigma)

    def share_of_rest(
        self, place: int, rest: torch.Tensor, *, new: torch.Tensor, old: torch.Tensor
    ) -> torch.Tensor | float:
        """How much of the prior's rest to follow, frame by frame: [B, 1, T, 1, 1], 0 ... 1.

        Both denoised estimates have moved since the step before, at the first step since the picture at rest,
        the prior's first frame. As far as they moved alike the new clip follows the prior: with the moves m,

            share = max(0, 1 - |m_new - m_old|^2 / (|m_new|^2 + |m_old|^2 + |rest|^2)),    norms over a frame

        After the last step, where nothing is mended any more, position by position: [B, 1, T, H, W].

        Args:
            rest: of the latents over the step, [B, C, T, H, W], like
            new, old: the new run's and the prior's denoised estimate, latents - sigma * noise_pred.
        """
        before_new, before_old = self.estimates or (old[:, :, :1], old[:, :, :1])
        self.estimates = new, old
        moves = new - before_new, old - before_old
        over = (1,) if place == len(self.trajectory.steps) - 1 else (1, 3, 4)
        apart = (moves[0] - moves[1]).square().sum(over, keepdim=True)
        all_moves = sum(each.square().sum(over, keepdim=True) for each in (*moves, rest))
        return torch.where(apart > 0, 1 - apart / all_moves, 1.0).clamp(min=0)


def value_at(values: float | Sequence[float], place: int) -> float:
    """Of one value for all steps, or one for each, a step's."""
    return values[place] if isinstance(values, Sequence) else values


def fading_rate(new: Velocity, old: Velocity) -> float:
    """How fast what a change adds to guidance fades, to how fast the prior's guidance did: 0 ... 1.

    The branches come to agree as the picture shows what the prompt asks for. Where the prior's text acted, in
    the same positions, a change fades with it; elsewhere it lasts. With the squared norms over the channels
    of the change and of the prior's text, position by position,

        rate = min(1, overlap * max(1, r)),   overlap: the cosine of the two,   r = |c_new - c_old| / |g_old|

    where the run begins; 1 where nothing changes or the text did nothing.
    """
    changes, acts = (each.square().sum(1).flatten() for each in (new.posi - old.posi, old.text))
    lengths = float(changes.norm() * acts.norm())
    if not lengths:
        return 1.0
    larger = math.sqrt(max(1.0, float(changes.sum() / acts.sum())))
    return min(1.0, larger * float(changes @ acts) / lengths)


def with_moves(
    change: torch.Tensor, rest: torch.Tensor, start: Start, new: Velocity, old: Velocity
) -> tuple[torch.Tensor, torch.Tensor, list[float]]:
    """How two guesses differ and what the prior's misses, with the moves of both branches since a start.

    The factors of the moves, also returned, are those that leave the least missed. [B, C, T, H, W]
    """
    new_moves, old_moves = new.moves_since(start.new), old.moves_since(start.old)
    factors = nearest_sum(old_moves, rest)
    for factor, of_new, of_old in zip(factors, new_moves, old_moves, strict=True):
        change, rest = change + factor * (of_new - of_old), rest - factor * of_old
    return change, rest, factors


def nearest_sum(parts: Sequence[torch.Tensor], target: torch.Tensor) -> list[float]:
    """The factors of the parts whose sum is nearest to the target: least squares, 0 where it can't tell."""
    columns = torch.stack([part.flatten() for part in parts])  # [parts, elements]
    gram, products = (columns @ columns.T).double().cpu(), (columns @ target.flatten()).double().cpu()
    return (torch.linalg.pinv(gram, rtol=1e-9, hermitian=True) @ products).tolist()
