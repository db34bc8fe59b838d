"""TODO"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from diffsynth.diffusion import FlowMatchScheduler

from step_skip.method.differential import Evaluation, Trajectory, follow


@dataclass(frozen=True)
class Step:
    """One Euler step as the scheduler took it; tensors are [B, C, T, H, W]."""

    index: int  # 0 ... num_inference_steps - 1
    sigma: float  # noise level of latents_before
    latents_before: torch.Tensor
    noise_pred: torch.Tensor  # guided velocity, noise - sample
    latents: torch.Tensor  # at the next sigma
    noise_pred_nega: torch.Tensor | None = None  # velocity of the negative branch; None without guidance
    branch_distance: float | None = None  # norm of noise_pred_posi - noise_pred_nega; likewise
    forwards: int = 0  # network evaluations it took
    seconds: float = 0.0

    @property
    def denoised(self) -> torch.Tensor:
        """The clean latents this step points at: latents - sigma * noise_pred."""
        return self.latents_before - self.sigma * self.noise_pred

    def on_cpu(self) -> Step:
        """The same step with its tensors on the CPU."""
        nega = None if self.noise_pred_nega is None else self.noise_pred_nega.cpu()
        before, after = self.latents_before.cpu(), self.latents.cpu()
        noise_pred = self.noise_pred.cpu()
        return replace(
            self, latents_before=before, noise_pred=noise_pred, latents=after, noise_pred_nega=nega
        )


StepCallback = Callable[[Step], object]
ProgressCallback = Callable[[int, int, torch.Tensor], object]  # step, steps, denoised [B, C, T, H, W]


def reporting_to(callback: ProgressCallback | None, steps: Sequence[int]) -> StepCallback | None:
    """A step callback that tells a user's own which of these steps has run, and what it points at."""
    if callback is None:
        return None
    return lambda step: callback(step.index, len(steps), step.denoised)


class Stopped(Exception):
    """Leaves the pipeline's loop after the last step that was asked for."""


class ReportingScheduler(FlowMatchScheduler):
    """FlowMatchScheduler("Wan") that runs only some steps of the schedule and reports each one it takes.

    Args:
        keep: from the number of steps to the indices of those to run, in order.
        stop_after: the step whose report ends the run early; the steps after it stay in the schedule,
            because its latents are at the sigma of the next one.

    first_frame_latents: [B, C, 1, H, W] of a model that fuses its first frame into the latents. The pipeline
    puts it back after each step, when the step is reported already; so each step keeps it, too.
    """

    timesteps: torch.Tensor
    sigmas: torch.Tensor

    def __init__(self, keep: Callable[[int], Sequence[int]], *, stop_after: int | None = None):
        super().__init__("Wan")
        self.keep = keep
        self.stop_after = stop_after
        self.on_step: StepCallback | None = None
        self.noise_pred_nega: Callable[[], torch.Tensor | None] = lambda: None  # of the step that runs
        self.first_frame_latents: torch.Tensor | None = None

    def set_timesteps(self, num_inference_steps: int = 100, **kwargs: Any) -> None:
        """Compute the full schedule, then keep the chosen steps of it."""
        super().set_timesteps(num_inference_steps, **kwargs)
        self.schedule = self.timesteps, self.sigmas
        self.cut_schedule()

    def cut_schedule(self) -> None:
        """Keep the chosen steps of the full schedule."""
        timesteps, sigmas = self.schedule
        self.steps = list(self.keep(len(timesteps)))
        # DiffSynth looks a step's place up in timesteps and reads its sigma there: both are cut alike.
        self.timesteps, self.sigmas = timesteps[self.steps], sigmas[self.steps]

    @property
    def timesteps_to_run(self) -> list[float]:
        """0 ... 1000, up to the one that is to run last."""
        last = self.steps.index(self.stop_after) if self.stop_after in self.steps else len(self.steps) - 1
        return self.timesteps[: last + 1].tolist()

    def step(self, model_output: torch.Tensor, timestep: torch.Tensor, sample: torch.Tensor, **kwargs: Any):
        """Advance from this timestep and report the step."""
        place = int(torch.argmin((self.timesteps - timestep.cpu()).abs()))
        latents = self.advance(place, model_output, timestep, sample)
        if self.first_frame_latents is not None:
            latents[:, :, :1] = self.first_frame_latents
        if self.on_step is not None:
            step, sigma, nega = self.steps[place], float(self.sigmas[place]), self.noise_pred_nega()
            self.on_step(Step(step, sigma, sample, model_output, latents, noise_pred_nega=nega))
        if self.steps[place] == self.stop_after:
            raise Stopped
        return latents

    def advance(
        self, place: int, model_output: torch.Tensor, timestep: torch.Tensor, sample: torch.Tensor
    ) -> torch.Tensor:
        """DiffSynth's own Euler step to the next kept sigma, after the last one to 0."""
        return super().step(model_output, timestep, sample)


class Part:
    """Some steps of another scheduler, for one call of the pipeline; the others come in other calls.

    What the other keeps from one step to the next it keeps from one call to the next.

    Args:
        places: of the steps among those that the other runs.
        is_last: False: leave the pipeline's loop after them, because others follow.
    """

    def __init__(self, scheduler: ReportingScheduler, places: slice, *, is_last: bool):
        self.scheduler = scheduler
        self.places = places
        self.is_last = is_last
        self.on_step: StepCallback | None = None
        self.noise_pred_nega: Callable[[], torch.Tensor | None] = lambda: None
        self.first_frame_latents: torch.Tensor | None = None

    @property
    def timesteps(self) -> torch.Tensor:
        """Those of the part: what the pipeline runs through."""
        return self.scheduler.timesteps[self.places]

    @property
    def timesteps_to_run(self) -> list[float]:
        """0 ... 1000."""
        return self.timesteps.tolist()

    def set_timesteps(self, *args: Any, **kwargs: Any) -> None:
        """As the other does."""
        self.scheduler.set_timesteps(*args, **kwargs)

    def step(self, model_output: torch.Tensor, timestep: torch.Tensor, sample: torch.Tensor, **kwargs: Any):
        """The other's step, at its place in the whole."""
        for name in ("on_step", "noise_pred_nega", "first_frame_latents"):
            setattr(self.scheduler, name, getattr(self, name))
        latents = self.scheduler.step(model_output, timestep, sample, **kwargs)
        if timestep == self.timesteps[-1] and not self.is_last:
            raise Stopped
        return latents


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


def compute_schedule(
    *, num_inference_steps: int, denoising_strength: float, sigma_shift: float
) -> tuple[list[float], list[float]]:
    """Timesteps (0 ... 1000) and sigmas (0 ... 1) of all steps, by the installed scheduler."""
    scheduler = ResumableScheduler()
    scheduler.set_timesteps(num_inference_steps, denoising_strength=denoising_strength, shift=sigma_shift)
    return scheduler.timesteps.tolist(), scheduler.sigmas.tolist()


class DifferentialScheduler(ReportingScheduler):
    """Runs the steps of a prior's path by `method.differential.follow`.

    Args:
        trajectory: the prior's path.
        cfg_scale: the new run's, or one for each step.
        choose: given the first velocity, [B, C, T, H, W], returns the path to go on with, which begins at
            the same step and latents; None: the same.
        parts: other functions in place of those of `follow`, by its names for them.
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
        self.clip: Generator[torch.Tensor, Evaluation, None] | None = None  # begun by the first step

    def advance(
        self, place: int, model_output: torch.Tensor, timestep: torch.Tensor, sample: torch.Tensor
    ) -> torch.Tensor:
        """Return the latents at which `follow` continues."""
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
