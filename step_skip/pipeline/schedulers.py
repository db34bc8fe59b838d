"""Schedule runs of WanVideoPipeline: schedulers that run chosen steps and report each of them.

    ReportingScheduler      FlowMatchScheduler("Wan") with chosen steps and a callback for each of them
    ResumableScheduler      the steps after a start step
    SigmasScheduler         custom sigmas
    DifferentialScheduler   the steps of a prior's path, by method.differential.follow
    Part                    some of another scheduler's steps, for one of several calls

Checked against diffsynth 2.1.12, diffsynth/diffusion/flow_match.py.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from diffsynth.diffusion import FlowMatchScheduler

from step_skip.method.differential import Evaluation, Trajectory, follow


@dataclass(frozen=True)
class Step:
    """One step of a scheduler; tensors are [B, C, T, H, W]."""

    index: int  # 0 ... num_inference_steps - 1
    sigma: float  # noise level of latents_before
    latents_before: torch.Tensor
    noise_pred: torch.Tensor  # guided velocity, noise - sample
    latents: torch.Tensor  # at the next sigma
    noise_pred_nega: torch.Tensor | None = None  # velocity of the negative branch; None without guidance
    branch_distance: float | None = None  # norm of noise_pred_posi - noise_pred_nega; None without guidance
    forwards: int = 0  # network evaluations of the step
    seconds: float = 0.0  # duration of the step

    @property
    def denoised(self) -> torch.Tensor:
        """Return the estimate of the clean latents at this step: latents_before - sigma * noise_pred."""
        return self.latents_before - self.sigma * self.noise_pred

    def on_cpu(self) -> Step:
        """Return the step with its tensors on the CPU."""
        nega = None if self.noise_pred_nega is None else self.noise_pred_nega.cpu()
        before, after = self.latents_before.cpu(), self.latents.cpu()
        noise_pred = self.noise_pred.cpu()
        return replace(
            self, latents_before=before, noise_pred=noise_pred, latents=after, noise_pred_nega=nega
        )


StepCallback = Callable[[Step], object]
# Called with the step, the number of steps and the denoised latents, [B, C, T, H, W].
ProgressCallback = Callable[[int, int, torch.Tensor], object]


def reporting_to(callback: ProgressCallback | None, steps: Sequence[int]) -> StepCallback | None:
    """Return a step callback that calls a user's callback with step, number of steps and denoised latents.

    Args:
        callback: the user's; None: there is none, and None is returned.
        steps: the steps that run.
    """
    if callback is None:
        return None
    return lambda step: callback(step.index, len(steps), step.denoised)


class Stopped(Exception):
    """A signal that leaves the pipeline's loop after the last requested step."""


class ReportingScheduler(FlowMatchScheduler):
    """A FlowMatchScheduler("Wan") that runs only some steps of the schedule and reports each of them.

    Args:
        keep: returns the indices of the steps to run, in order, given the number of steps.
        stop_after: the step after whose report the run ends early; the steps after it stay in the schedule,
            because its latents are at the sigma of the next one.

    first_frame_latents: [B, C, 1, H, W] for a model that fuses its first frame into the latents, else None.
    The pipeline restores it only after a step has been reported, so each step sets it, too.
    """

    timesteps: torch.Tensor
    sigmas: torch.Tensor

    def __init__(self, keep: Callable[[int], Sequence[int]], *, stop_after: int | None = None):
        super().__init__("Wan")
        self.keep = keep
        self.stop_after = stop_after
        self.on_step: StepCallback | None = None
        self.noise_pred_nega: Callable[[], torch.Tensor | None] = lambda: None  # of the current step
        self.first_frame_latents: torch.Tensor | None = None

    def set_timesteps(self, num_inference_steps: int = 100, **kwargs: Any) -> None:
        """Compute the full schedule, then keep only the chosen steps."""
        super().set_timesteps(num_inference_steps, **kwargs)
        self.schedule = self.timesteps, self.sigmas
        self.cut_schedule()

    def cut_schedule(self) -> None:
        """Reduce timesteps and sigmas to the chosen steps of the full schedule."""
        timesteps, sigmas = self.schedule
        self.steps = list(self.keep(len(timesteps)))
        # DiffSynth finds a step's index in timesteps and reads its sigma there, so both are cut alike.
        self.timesteps, self.sigmas = timesteps[self.steps], sigmas[self.steps]

    @property
    def timesteps_to_run(self) -> list[float]:
        """Return the timesteps (0 ... 1000) up to the last step that runs."""
        last = self.steps.index(self.stop_after) if self.stop_after in self.steps else len(self.steps) - 1
        return self.timesteps[: last + 1].tolist()

    def step(self, model_output: torch.Tensor, timestep: torch.Tensor, sample: torch.Tensor, **kwargs: Any):
        """Advance from a timestep and report the step; return the latents at the next sigma.

        Args:
            model_output: guided velocity, [B, C, T, H, W].
            sample: latents at the timestep, [B, C, T, H, W].
        """
        index = int(torch.argmin((self.timesteps - timestep.cpu()).abs()))
        latents = self.advance(index, model_output, timestep, sample)
        if self.first_frame_latents is not None:
            latents[:, :, :1] = self.first_frame_latents
        if self.on_step is not None:
            step, sigma, nega = self.steps[index], float(self.sigmas[index]), self.noise_pred_nega()
            self.on_step(Step(step, sigma, sample, model_output, latents, noise_pred_nega=nega))
        if self.steps[index] == self.stop_after:
            raise Stopped
        return latents

    def advance(
        self, index: int, model_output: torch.Tensor, timestep: torch.Tensor, sample: torch.Tensor
    ) -> torch.Tensor:
        """Take DiffSynth's Euler step to the next kept sigma, or to 0 from the last one.

        Args:
            index: of the step among those that run.
            model_output, sample: [B, C, T, H, W]; see `step`.
        """
        return super().step(model_output, timestep, sample)


class Part:
    """Some steps of another scheduler for one call of the pipeline; other calls run its other steps.

    The state that the other scheduler keeps between steps is kept between the calls as well.

    Args:
        scheduler: the other scheduler.
        indices: of the steps among those that the other scheduler runs.
        is_last: False: leave the pipeline's loop after these steps, because others follow.
    """

    def __init__(self, scheduler: ReportingScheduler, indices: slice, *, is_last: bool):
        self.scheduler = scheduler
        self.indices = indices
        self.is_last = is_last
        self.on_step: StepCallback | None = None
        self.noise_pred_nega: Callable[[], torch.Tensor | None] = lambda: None
        self.first_frame_latents: torch.Tensor | None = None

    @property
    def timesteps(self) -> torch.Tensor:
        """Return the timesteps of this part, over which the pipeline loops."""
        return self.scheduler.timesteps[self.indices]

    @property
    def timesteps_to_run(self) -> list[float]:
        """Return the timesteps of this part, 0 ... 1000."""
        return self.timesteps.tolist()

    def set_timesteps(self, *args: Any, **kwargs: Any) -> None:
        """Set the timesteps of the other scheduler."""
        self.scheduler.set_timesteps(*args, **kwargs)

    def step(self, model_output: torch.Tensor, timestep: torch.Tensor, sample: torch.Tensor, **kwargs: Any):
        """Take the step with the other scheduler; see `ReportingScheduler.step`."""
        for name in ("on_step", "noise_pred_nega", "first_frame_latents"):
            setattr(self.scheduler, name, getattr(self, name))
        latents = self.scheduler.step(model_output, timestep, sample, **kwargs)
        if timestep == self.timesteps[-1] and not self.is_last:
            raise Stopped
        return latents


class ResumableScheduler(ReportingScheduler):
    """A scheduler that runs only the steps after `start_step`; -1: all steps."""

    def __init__(self, *, start_step: int = -1, stop_after: int | None = None):
        super().__init__(lambda steps: range(start_step + 1, steps), stop_after=stop_after)


class SigmasScheduler(ReportingScheduler):
    """A scheduler that runs custom sigmas, decreasing and above 0, instead of the settings' schedule."""

    def __init__(self, sigmas: Sequence[float]):
        super().__init__(range)
        self.custom = torch.tensor(sigmas)
        self.set_timesteps_fn = lambda **_: (self.custom, self.custom * self.num_train_timesteps)

    def set_timesteps(self, num_inference_steps: int = 100, **kwargs: Any) -> None:
        """Set the custom sigmas; `num_inference_steps` is ignored."""
        super().set_timesteps(len(self.custom), **kwargs)


def compute_schedule(
    *, num_inference_steps: int, denoising_strength: float, sigma_shift: float
) -> tuple[list[float], list[float]]:
    """Return timesteps (0 ... 1000) and sigmas (0 ... 1) of all steps, by the installed scheduler."""
    scheduler = ResumableScheduler()
    scheduler.set_timesteps(num_inference_steps, denoising_strength=denoising_strength, shift=sigma_shift)
    return scheduler.timesteps.tolist(), scheduler.sigmas.tolist()


class DifferentialScheduler(ReportingScheduler):
    """A scheduler that runs the steps of a prior's path by `method.differential.follow`.

    Args:
        trajectory: the prior's path.
        cfg_scale: guidance of the new run, one value or one per step.
        choose: given the first velocity, [B, C, T, H, W], returns the path to continue with, which begins at
            the same step and latents; None: `trajectory`.
        parts: replacements of the functions of `follow`, by the names of its arguments.
    """

    def __init__(
        self,
        trajectory: Trajectory,
        cfg_scale: float | Sequence[float] = 1.0,
        *,
        choose: Callable[[torch.Tensor], Trajectory] | None = None,
        **parts: Any,
    ):
        super().__init__(lambda _: self.trajectory.steps)
        self.trajectory = trajectory
        self.choose = choose or (lambda noise_pred: trajectory)
        self.cfg_scale, self.parts = cfg_scale, parts
        self.clip: Generator[torch.Tensor, Evaluation, None] | None = None  # created by the first step

    def advance(
        self, index: int, model_output: torch.Tensor, timestep: torch.Tensor, sample: torch.Tensor
    ) -> torch.Tensor:
        """Send the evaluation to `follow` and return the latents at which it continues."""
        if self.clip is None:
            sigmas = self.schedule[1].tolist()
            self.clip = follow(self.trajectory, sigmas, self.cfg_scale, choose=self.choose_path, **self.parts)
            next(self.clip)
        return self.clip.send(Evaluation(sample, model_output, self.noise_pred_nega()))

    def choose_path(self, noise_pred: torch.Tensor) -> Trajectory:
        """Choose the path by the first velocity, and cut the schedule to its steps."""
        self.trajectory = self.choose(noise_pred)
        self.cut_schedule()
        return self.trajectory
