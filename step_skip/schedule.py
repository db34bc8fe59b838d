"""The schedulers: where DiffSynth's schedule is cut, and how a step advances.

    ReportingScheduler      runs only some steps of the schedule and reports each
    ResumableScheduler      those after start_step
    SigmasScheduler         a schedule of its own
    DifferentialScheduler   a few chosen ones, spent on what the new prompt changes

Checked against diffsynth 2.1.12, diffsynth/diffusion/flow_match.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffsynth.diffusion import FlowMatchScheduler

from step_skip.metadata import check_schedule
from step_skip.prior import SCHEDULE_FLAGS, Prior


@dataclass(frozen=True)
class Step:
    """One Euler step as the scheduler took it; tensors are [B, C, T, H, W]."""

    index: int  # 0 ... num_inference_steps - 1
    sigma: float  # noise level of latents_before
    latents_before: torch.Tensor
    noise_pred: torch.Tensor  # guided velocity, noise - sample
    latents: torch.Tensor  # at the next sigma
    branch_distance: float | None = None  # norm of noise_pred_posi - noise_pred_nega; None without guidance
    forwards: int = 0  # network evaluations it took
    seconds: float = 0.0

    @property
    def denoised(self) -> torch.Tensor:
        """The clean latents this step points at: latents - sigma * noise_pred."""
        return self.latents_before - self.sigma * self.noise_pred


StepCallback = Callable[[Step], object]
ProgressCallback = Callable[[int, int, torch.Tensor], object]  # step, steps, denoised [B, C, T, H, W]


def reporting_to(callback: ProgressCallback | None, steps: Sequence[int]) -> StepCallback | None:
    """A step callback that tells a user's own which of these steps has run, and what it points at."""
    if callback is None:
        return None
    return lambda step: callback(step.index, len(steps), step.denoised)


@dataclass(frozen=True)
class Trajectory:
    """A prior's own path at a few chosen steps; tensors are [B, C, T, H, W]."""

    steps: Sequence[int]  # increasing
    latents: Sequence[torch.Tensor]  # before each of the steps, then the clean ones: one more than steps
    noise_pred: Sequence[torch.Tensor]  # the guided velocity of each of the steps


class Stopped(Exception):
    """Leaves the pipeline's loop after the last step that was asked for."""


class ReportingScheduler(FlowMatchScheduler):
    """FlowMatchScheduler("Wan") that runs only some steps of the schedule and reports each one it takes.

    Args:
        keep: from the number of steps to the indices of those to run, in order.
        stop_after: the step whose report ends the run early; the steps after it stay in the schedule,
            because its latents are at the sigma of the next one.

    first_frame_latents: [B, C, 1, H, W] of a model that fuses its first frame into the latents. The pipeline
    puts it back after each step, when the step is reported already; so it doesn't move in a step, either.
    """

    timesteps: torch.Tensor
    sigmas: torch.Tensor

    def __init__(self, keep: Callable[[int], Sequence[int]], *, stop_after: int | None = None):
        super().__init__("Wan")
        self.keep = keep
        self.stop_after = stop_after
        self.on_step: StepCallback | None = None
        self.first_frame_latents: torch.Tensor | None = None

    def set_timesteps(self, num_inference_steps: int = 100, **kwargs: Any) -> None:
        """Compute the full schedule, then keep the chosen steps of it."""
        super().set_timesteps(num_inference_steps, **kwargs)
        self.steps = list(self.keep(num_inference_steps))
        # DiffSynth looks a step's place up in timesteps and reads its sigma there: both are cut alike.
        self.timesteps, self.sigmas = self.timesteps[self.steps], self.sigmas[self.steps]

    def step(self, model_output: torch.Tensor, timestep: torch.Tensor, sample: torch.Tensor, **kwargs: Any):
        """Advance from this timestep and report the step."""
        place = int(torch.argmin((self.timesteps - timestep.cpu()).abs()))
        first = self.first_frame_latents
        if first is not None:
            model_output = torch.cat([torch.zeros_like(model_output[:, :, :1]), model_output[:, :, 1:]], 2)
        latents = self.advance(place, model_output, timestep, sample)
        if first is not None:
            latents[:, :, :1] = first
        if self.on_step is not None:
            self.on_step(Step(self.steps[place], float(self.sigmas[place]), sample, model_output, latents))
        if self.steps[place] == self.stop_after:
            raise Stopped
        return latents

    def advance(
        self, place: int, model_output: torch.Tensor, timestep: torch.Tensor, sample: torch.Tensor
    ) -> torch.Tensor:
        """DiffSynth's own Euler step to the next kept sigma, after the last one to 0."""
        return super().step(model_output, timestep, sample)


class ResumableScheduler(ReportingScheduler):
    """Leaves out the steps up to and with `start_step`."""

    def __init__(self, *, start_step: int = -1, stop_after: int | None = None):
        super().__init__(lambda steps: range(start_step + 1, steps), stop_after=stop_after)


class SigmasScheduler(ReportingScheduler):
    """Runs these sigmas, decreasing and above 0, whatever schedule the settings would give."""

    def __init__(self, sigmas: Sequence[float]):
        super().__init__(range)
        self.own = torch.tensor(sigmas)
        self.set_timesteps_fn = lambda **_: (self.own, self.own * self.num_train_timesteps)

    def set_timesteps(self, num_inference_steps: int = 100, **kwargs: Any) -> None:
        """Take the sigmas; the number of steps is theirs."""
        super().set_timesteps(len(self.own), **kwargs)


class DifferentialScheduler(ReportingScheduler):
    """Follows a prior's trajectory at a few chosen steps and integrates only what the new prompt changes.

    With the prior's latents x_i and guided velocity v_i at sigma_i, `next` the next chosen step or the clean
    end, h = sigma_next - sigma_i, and an offset d that starts at zero,

        d <- d + h * (v_new(x_i + d, sigma_i) - v_i) - (1 - share) * bend,      go on at x_next + d

    where bend = x_next - x_i - h * v_i is what the prior's own fine steps did beyond one straight step, and
    share (0 ... 1, `share_of_bend`) says where the new clip can be expected to do the same. With the prior's
    own prompt the bracket is zero and the share one, so the result is the prior's own, exactly. (FlowEdit,
    arXiv 2412.08629, drives an edit by the same difference of velocities; here one of the two is already on
    disk. The share is ours; docs/method.md derives it.)
    """

    def __init__(self, trajectory: Trajectory):
        super().__init__(lambda _: trajectory.steps)
        self.trajectory = trajectory
        self.offset: torch.Tensor | float = 0.0  # float32: in bfloat16 small differences would be lost
        self.estimates: tuple[torch.Tensor, torch.Tensor] | None = None  # new and old, at the step before

    def advance(
        self, place: int, model_output: torch.Tensor, timestep: torch.Tensor, sample: torch.Tensor
    ) -> torch.Tensor:
        """Add what the new prompt changes to the offset and go on at the next chosen step."""
        sigmas = [*self.sigmas.tolist(), 0.0]
        sigma, ahead = sigmas[place], sigmas[place + 1] - sigmas[place]
        path = self.trajectory
        here, there, old = (
            tensor.to(sample.device).float()
            for tensor in (path.latents[place], path.latents[place + 1], path.noise_pred[place])
        )
        new = model_output.float()
        bend = there - here - ahead * old
        share = self.share_of_bend(bend, new=sample.float() - sigma * new, old=here - sigma * old)
        offset: torch.Tensor = self.offset + ahead * (new - old) - (1 - share) * bend
        self.offset = offset
        return torch.where(offset == 0, there, there + offset).to(sample.dtype)  # keeps a -0.0

    def share_of_bend(
        self, bend: torch.Tensor, *, new: torch.Tensor, old: torch.Tensor
    ) -> torch.Tensor | float:
        """How much of the prior's bend to follow, position by position: [B, 1, T, H, W], 0 ... 1.

        Both denoised estimates have moved since the step before, at the first step since the picture at rest,
        the prior's first frame. Where they moved alike the new clip follows the prior: with the moves m,

            share = max(0, 1 - |m_new - m_old|^2 / (|m_new|^2 + |m_old|^2 + |bend|^2)),   norms over channels

        Args:
            bend: [B, C, T, H, W], like
            new, old: the new run's and the prior's denoised estimate, latents - sigma * noise_pred.
        """
        before_new, before_old = self.estimates or (old[:, :, :1], old[:, :, :1])
        self.estimates = new, old
        moves = new - before_new, old - before_old
        apart = (moves[0] - moves[1]).square().sum(1, keepdim=True)
        all_moves = sum(each.square().sum(1, keepdim=True) for each in (*moves, bend))
        return torch.where(apart > 0, 1 - apart / all_moves, 1.0).clamp(min=0)


def compute_schedule(
    *, num_inference_steps: int, denoising_strength: float, sigma_shift: float
) -> tuple[list[float], list[float]]:
    """Timesteps (0 ... 1000) and sigmas (0 ... 1) of all steps, by the installed scheduler."""
    scheduler = ResumableScheduler()
    scheduler.set_timesteps(num_inference_steps, denoising_strength=denoising_strength, shift=sigma_shift)
    return scheduler.timesteps.tolist(), scheduler.sigmas.tolist()


def check_installed_schedule(prior: Prior) -> None:
    """Recompute the schedule with the installed scheduler and compare every value.

    Raises:
        InputError: they differ.
    """

    timesteps, sigmas = compute_schedule(**{name: prior.metadata[name] for name in SCHEDULE_FLAGS})
    check_schedule(prior, timesteps=timesteps, sigmas=sigmas)
