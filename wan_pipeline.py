"""Run DiffSynth's WanVideoPipeline from any step, see every step, change none of its source.

`WanVideoPipeline.__call__` reads three plain attributes; `hooked` puts ours in their place for one call:

    scheduler  ReportingScheduler: runs only some steps of the schedule and reports each;
               ResumableScheduler those after start_step, DifferentialScheduler a few chosen ones,
               SigmasScheduler a schedule of its own
    units      run_full appends a unit that hands out the conditioning; run_from replaces every unit that
               would load an encoder by one that puts the prior's latents and conditioning in place
    model_fn   ForwardCounter: counts network evaluations, sees how far both guidance branches are apart;
               around it what makes steps cheaper (cheaper_steps.py, skip_cache.py)

Checked against diffsynth 2.1.12, diffsynth/pipelines/wan_video.py and diffsynth/diffusion/flow_match.py.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from diffsynth.diffusion import FlowMatchScheduler
from diffsynth.diffusion.base_pipeline import PipelineUnit
from diffsynth.pipelines.wan_video import (
    WanVideoPipeline,
    WanVideoUnit_ImageEmbedderCLIP,
    WanVideoUnit_ImageEmbedderVAE,
    WanVideoUnit_PromptEmbedder,
)
from PIL import Image
from tqdm import tqdm

from cheaper_steps import LEFT_TO_MODEL_FN, BlockCounter, GuidanceByStep, TellTeaCache
from prior_utils import Clock, RunError, RunSettings
from skip_cache import skip_cache

TILING = {"tile_size": (30, 52), "tile_stride": (15, 26)}  # latents; WanVideoPipeline's own defaults


@dataclass(frozen=True, kw_only=True)
class Conditioning:
    """What the network sees besides latents and timestep, in the pipeline's dtype.

    Shapes for Wan2.1-I2V: y [1, 20, T, H, W] (mask and encoded image), clip_feature [1, 257, 1280],
    context_posi and context_nega [1, 512, 4096]. context_nega is None where cfg_scale is 1.
    """

    y: torch.Tensor | None
    clip_feature: torch.Tensor | None
    context_posi: torch.Tensor
    context_nega: torch.Tensor | None

    def to(self, device: str | torch.device) -> Conditioning:
        """The same tensors on `device`."""
        tensors = {f.name: getattr(self, f.name) for f in fields(self)}
        return Conditioning(**{name: None if t is None else t.to(device) for name, t in tensors.items()})


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


@dataclass
class RunResult:
    """What a run made and what it cost."""

    frames: list[Image.Image]  # none where the run was stopped early
    latents: torch.Tensor  # after its last step, [B, C, T, H, W]
    steps: list[int]  # indices of the steps that ran
    forwards: int  # network evaluations
    block_evaluations: int = 0  # of transformer blocks; a full forward runs all of them
    seconds: dict[str, float] = field(default_factory=dict)  # by phase: encode, denoise, ...
    seconds_per_step: list[float] = field(default_factory=list)


StepCallback = Callable[[Step], None]
StartCallback = Callable[[torch.Tensor, Conditioning], None]


@dataclass(frozen=True)
class Trajectory:
    """A prior's own path at a few chosen steps; tensors are [B, C, T, H, W]."""

    steps: Sequence[int]  # increasing
    latents: Sequence[torch.Tensor]  # before each of the steps, then the clean ones: one more than steps
    noise_pred: Sequence[torch.Tensor]  # the guided velocity of each of the steps


class _Stopped(Exception):
    """Leaves the pipeline's loop after the last step that was asked for."""


class ReportingScheduler(FlowMatchScheduler):
    """FlowMatchScheduler("Wan") that runs only some steps of the schedule and reports each one it takes.

    Args:
        keep: from the number of steps to the indices of those to run, in order.
        stop_after: the step whose report ends the run early; the steps after it stay in the schedule,
            because its latents are at the sigma of the next one.
    """

    def __init__(self, keep: Callable[[int], Sequence[int]], *, stop_after: int | None = None):
        super().__init__("Wan")
        self.keep = keep
        self.stop_after = stop_after
        self.on_step: StepCallback | None = None

    def set_timesteps(self, num_inference_steps: int = 100, **kwargs: Any) -> None:
        """Compute the full schedule, then keep the chosen steps of it."""
        super().set_timesteps(num_inference_steps, **kwargs)
        self.steps = list(self.keep(num_inference_steps))
        # DiffSynth looks a step's place up in timesteps and reads its sigma there: both are cut alike.
        self.timesteps, self.sigmas = self.timesteps[self.steps], self.sigmas[self.steps]

    def step(self, model_output: torch.Tensor, timestep: torch.Tensor, sample: torch.Tensor, **kwargs: Any):
        """Advance from this timestep and report the step."""
        place = int(torch.argmin((self.timesteps - timestep.cpu()).abs()))
        latents = self.advance(place, model_output, timestep, sample)
        if self.on_step is not None:
            self.on_step(Step(self.steps[place], float(self.sigmas[place]), sample, model_output, latents))
        if self.steps[place] == self.stop_after:
            raise _Stopped
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
        values = torch.tensor(sigmas)
        self.set_timesteps_fn = lambda **_: (values, values * self.num_train_timesteps)

    def set_timesteps(self, num_inference_steps: int = 100, **kwargs: Any) -> None:
        """Take the sigmas; the number of steps is theirs."""
        super().set_timesteps(len(self.set_timesteps_fn()[0]), **kwargs)


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
        self.offset = self.offset + ahead * (new - old) - (1 - share) * bend
        return torch.where(self.offset == 0, there, there + self.offset).to(sample.dtype)  # keeps a -0.0

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


class ForwardCounter:
    """A model_fn that counts its calls, the network evaluations of a run, and compares the two branches.

    WanVideoPipeline calls it with positive=True and then, where cfg_scale isn't 1, with positive=False.
    """

    def __init__(self, model_fn: Callable[..., torch.Tensor]):
        self.model_fn = model_fn
        self.forwards = 0
        self.noise_pred_posi: torch.Tensor | None = None
        self.branch_distance: torch.Tensor | None = None  # of the step that runs; a scalar, on the device

    def __call__(self, **kwargs: Any) -> torch.Tensor:
        self.forwards += 1
        noise_pred = self.model_fn(**kwargs)
        if kwargs.get("positive", True):
            self.noise_pred_posi, self.branch_distance = noise_pred, None
        else:
            difference = self.noise_pred_posi.float() - noise_pred.float()
            self.noise_pred_posi, self.branch_distance = None, torch.linalg.vector_norm(difference)
        return noise_pred


class ReportStart(PipelineUnit):
    """Last unit of a full run: hands out the initial latents and the conditioning."""

    def __init__(self, on_start: StartCallback):
        super().__init__(take_over=True)
        self.on_start = on_start

    def process(self, pipe: WanVideoPipeline, inputs_shared: dict, inputs_posi: dict, inputs_nega: dict):
        """Report; the inputs go on unchanged."""
        guided = inputs_shared["cfg_scale"] != 1
        conditioning = Conditioning(
            y=inputs_shared.get("y"),
            clip_feature=inputs_shared.get("clip_feature"),
            context_posi=inputs_posi["context"],
            context_nega=inputs_nega["context"] if guided else None,
        )
        self.on_start(inputs_shared["latents"], conditioning)
        return inputs_shared, inputs_posi, inputs_nega


class ReplaceStart(PipelineUnit):
    """Last unit of a resumed run: puts the prior's latents and conditioning in place."""

    def __init__(self, latents: torch.Tensor, conditioning: Conditioning):
        super().__init__(take_over=True)
        self.latents = latents
        self.conditioning = conditioning

    def process(self, pipe: WanVideoPipeline, inputs_shared: dict, inputs_posi: dict, inputs_nega: dict):
        """Replace; tensors move to the pipeline's device, their dtype stays."""
        conditioning = self.conditioning.to(pipe.device)
        inputs_shared["latents"] = self.latents.to(pipe.device)
        for name in ("y", "clip_feature"):
            if getattr(conditioning, name) is not None:
                inputs_shared[name] = getattr(conditioning, name)
        inputs_posi["context"] = conditioning.context_posi
        if conditioning.context_nega is not None:
            inputs_nega["context"] = conditioning.context_nega
        return inputs_shared, inputs_posi, inputs_nega


@contextlib.contextmanager
def hooked(pipe: WanVideoPipeline, **attributes: Any) -> Iterator[None]:
    """Give the pipeline other attributes (scheduler, units, model_fn) for the length of a `with`."""
    before = {name: getattr(pipe, name) for name in attributes}
    for name, value in attributes.items():
        setattr(pipe, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(pipe, name, value)


def compute_schedule(
    *, num_inference_steps: int, denoising_strength: float, sigma_shift: float
) -> tuple[list[float], list[float]]:
    """Timesteps (0 ... 1000) and sigmas (0 ... 1) of all steps, by the installed scheduler."""
    scheduler = ResumableScheduler()
    scheduler.set_timesteps(num_inference_steps, denoising_strength=denoising_strength, shift=sigma_shift)
    return scheduler.timesteps.tolist(), scheduler.sigmas.tolist()


@torch.no_grad()
def encode_prompt(pipe: WanVideoPipeline, text: str) -> torch.Tensor:
    """Encode a prompt as the pipeline would: [1, 512, 4096] for Wan2.1, in its dtype."""
    return WanVideoUnit_PromptEmbedder().process(pipe, prompt=text, positive=True)["context"]


@torch.no_grad()
def encode_image(pipe: WanVideoPipeline, image: Image.Image, *, num_frames: int) -> dict[str, torch.Tensor]:
    """Encode the input image, already of the video's size, as the pipeline would: y and clip_feature."""
    size = {"input_image": image, "end_image": None, "height": image.height, "width": image.width}
    clip = WanVideoUnit_ImageEmbedderCLIP().process(pipe, **size)
    vae = WanVideoUnit_ImageEmbedderVAE().process(pipe, **size, num_frames=num_frames, tiled=True, **TILING)
    return {"y": vae.get("y"), "clip_feature": clip.get("clip_feature")}


def release(pipe: WanVideoPipeline, names: Iterable[str]) -> None:
    """Let go of components that are not needed any more, to make room on the device."""
    for name in names:
        setattr(pipe, name, None)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@torch.no_grad()
def decode(pipe: WanVideoPipeline, latents: torch.Tensor, *, tiled: bool) -> list[Image.Image]:
    """Decode clean latents [1, C, T, H, W] to frames, between or after runs."""
    pipe.load_models_to_device(["vae"])
    video = pipe.vae.decode(latents.to(pipe.device), device=pipe.device, tiled=tiled, **TILING)
    frames = pipe.vae_output_to_video(video)
    pipe.load_models_to_device([])
    return frames


def run_full(
    pipe: WanVideoPipeline,
    settings: RunSettings,
    *,
    prompt: str,
    negative_prompt: str,
    input_image: Image.Image,
    input_video: list[Image.Image] | None = None,
    stop_after: int | None = None,
    on_start: StartCallback | None = None,
    on_step: StepCallback | None = None,
) -> RunResult:
    """Run every step, or those up to `stop_after`, which decodes nothing.

    `on_start` gets the initial latents and the conditioning, `on_step` each step.

    Raises:
        RunError: latents became NaN or infinite; names the step.
    """
    clock = Clock()

    def report_start(latents: torch.Tensor, conditioning: Conditioning) -> None:
        clock.add("encode")
        if on_start is not None:
            on_start(latents, conditioning)
        clock.add("save")

    return _call(
        pipe,
        settings,
        clock,
        ResumableScheduler(stop_after=stop_after),
        [*pipe.units, ReportStart(report_start)],
        on_step,
        prompt=prompt,
        negative_prompt=negative_prompt,
        input_image=input_image,
        input_video=input_video,
    )


def run_from(
    pipe: WanVideoPipeline,
    settings: RunSettings,
    *,
    start_step: int,
    latents: torch.Tensor,
    conditioning: Conditioning | None,
    stop_after: int | None = None,
    on_step: StepCallback | None = None,
) -> RunResult:
    """Run only the steps after `start_step`, from the latents after it; -1: all, from the initial latents.

    No unit that would load an encoder runs, so the pipeline needs only its DiT and VAE. After the last step
    nothing is left to run: the latents are decoded, without DiT, and only then conditioning may be None.
    Where a later step `stop_after` is given it is the last to run, and nothing is decoded.

    Raises:
        RunError: latents became NaN or infinite; names the step.
    """
    if start_step == settings.num_inference_steps - 1:
        clock = Clock()
        frames = decode(pipe, latents, tiled=settings.tiled)
        clock.add("decode")
        return RunResult(frames, latents, [], 0, seconds=clock.seconds)
    if conditioning is None:
        raise ValueError(f"steps after {start_step} are left to run, and they need a conditioning")
    scheduler = ResumableScheduler(start_step=start_step, stop_after=stop_after)
    return run_scheduler(
        pipe, settings, scheduler=scheduler, latents=latents, conditioning=conditioning, on_step=on_step
    )


def run_differential(
    pipe: WanVideoPipeline,
    settings: RunSettings,
    *,
    trajectory: Trajectory,
    conditioning: Conditioning,
    on_step: StepCallback | None = None,
) -> RunResult:
    """Run only the trajectory's steps, spent on what the new conditioning changes (DifferentialScheduler).

    Raises:
        RunError: latents became NaN or infinite; names the step.
    """
    latents, scheduler = trajectory.latents[0], DifferentialScheduler(trajectory)
    return run_scheduler(
        pipe, settings, scheduler=scheduler, latents=latents, conditioning=conditioning, on_step=on_step
    )


def run_on_sigmas(
    pipe: WanVideoPipeline,
    settings: RunSettings,
    *,
    sigmas: Sequence[float],
    latents: torch.Tensor,
    conditioning: Conditioning,
    on_step: StepCallback | None = None,
) -> RunResult:
    """Run these sigmas, decreasing, from latents at the first of them; the steps are places in them.

    Raises:
        RunError: latents became NaN or infinite; names the step.
    """
    scheduler = SigmasScheduler(sigmas)
    return run_scheduler(
        pipe, settings, scheduler=scheduler, latents=latents, conditioning=conditioning, on_step=on_step
    )


def run_scheduler(
    pipe: WanVideoPipeline,
    settings: RunSettings,
    *,
    scheduler: ReportingScheduler,
    latents: torch.Tensor,
    conditioning: Conditioning,
    on_step: StepCallback | None = None,
) -> RunResult:
    """Run the steps the scheduler keeps, from these latents, without any unit that would load an encoder.

    Raises:
        RunError: latents became NaN or infinite; names the step.
    """
    units = [unit for unit in pipe.units if not unit.onload_model_names]
    units.append(ReplaceStart(latents, conditioning))
    return _call(pipe, settings, Clock(), scheduler, units, on_step)


def _call(
    pipe: WanVideoPipeline,
    settings: RunSettings,
    clock: Clock,
    scheduler: ReportingScheduler,
    units: list[PipelineUnit],
    on_step: StepCallback | None,
    **inputs: Any,
) -> RunResult:
    """Call the pipeline with this scheduler, these units, counters and what makes the steps cheaper."""
    counter, blocks = ForwardCounter(pipe.model_fn), BlockCounter()
    result = RunResult([], torch.empty(0), [], 0, seconds=clock.seconds)

    def report_step(step: Step) -> None:
        _check_finite(step)  # waits for the device, so that the time below is the step's own
        seconds, forwards = clock.add("denoise"), counter.forwards - result.forwards
        result.seconds_per_step.append(seconds)
        result.steps.append(step.index)
        result.forwards += forwards
        result.latents = step.latents
        if on_step is not None:
            distance = None if counter.branch_distance is None else float(counter.branch_distance)
            on_step(replace(step, branch_distance=distance, forwards=forwards, seconds=seconds))
        clock.add("save")

    scheduler.on_step = report_step
    progress = functools.partial(tqdm, desc="denoise", unit="step", leave=None)  # leave: unless below another
    inputs |= settings.pipeline_inputs | TILING | {"progress_bar_cmd": progress}
    with (
        blocks.counting(pipe),
        _cheaper(pipe, settings, inputs, units, counter) as (units, model_fn),
        hooked(pipe, scheduler=scheduler, units=units, model_fn=model_fn),
        contextlib.suppress(_Stopped),
    ):
        result.frames = pipe(**inputs)
    clock.add("decode")
    result.block_evaluations = blocks.evaluations
    return result


@contextlib.contextmanager
def _cheaper(
    pipe: WanVideoPipeline,
    settings: RunSettings,
    inputs: dict[str, Any],
    units: list[PipelineUnit],
    model_fn: ForwardCounter,
) -> Iterator[tuple[list[PipelineUnit], Callable[..., torch.Tensor]]]:
    """The units and the model_fn of a run, with Skip-Cache, TeaCache and guidance by step where asked for."""
    guided_steps = None
    with contextlib.ExitStack() as stack:
        if settings.skip_cache is not None:
            model_fn = stack.enter_context(skip_cache(pipe, every=settings.skip_cache, model_fn=model_fn))
        if isinstance(settings.cfg_scale, tuple):
            model_fn, inputs["cfg_scale"] = GuidanceByStep(model_fn, settings.cfg_scale), LEFT_TO_MODEL_FN
            guided_steps = sum(scale != 1 for scale in settings.cfg_scale)
        if settings.tea_cache_l1_thresh is not None:
            units = [TellTeaCache(guided_steps), *units]
        yield units, model_fn


def _check_finite(step: Step) -> None:
    if not torch.isfinite(step.latents).all():
        raise RunError(
            f"latents became NaN or infinite at step {step.index} (sigma {step.sigma:.3f}); stopped there. "
            "Try another --dtype, a lower --cfg_scale, or check the weights"
        )
