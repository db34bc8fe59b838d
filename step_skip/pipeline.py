"""Run DiffSynth's WanVideoPipeline from any step, see every step, change none of its source.

`WanVideoPipeline.__call__` reads three plain attributes; `hooked` puts ours in their place for one call:

    scheduler  one of schedule.py
    units      run_full appends a unit that hands out the conditioning; run_from replaces every unit that
               would load an encoder by one that puts the prior's latents and conditioning in place
    model_fn   ForwardCounter: counts network evaluations, sees how far both guidance branches are apart;
               around it what makes steps cheaper (cheaper.py)

Checked against diffsynth 2.1.12, diffsynth/pipelines/wan_video.py.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from diffsynth.diffusion.base_pipeline import PipelineUnit
from diffsynth.pipelines.wan_video import (
    WanVideoPipeline,
    WanVideoUnit_ImageEmbedderCLIP,
    WanVideoUnit_ImageEmbedderVAE,
    WanVideoUnit_PromptEmbedder,
)
from PIL import Image
from tqdm import tqdm

from step_skip.cheaper import LEFT_TO_MODEL_FN, BlockCounter, GuidanceByStep, TellTeaCache, skip_cache
from step_skip.conditioning import check_conditioning
from step_skip.differential import DifferentialScheduler, Trajectory
from step_skip.families import FAMILIES
from step_skip.files import RunError
from step_skip.prior import RunSettings
from step_skip.results import Clock, RunResult
from step_skip.schedule import (
    ReportingScheduler,
    ResumableScheduler,
    SigmasScheduler,
    Step,
    StepCallback,
    Stopped,
)

IDENTITY_NAMES = sorted({name for family in FAMILIES.values() for name in family.conditioning})
FUSED = "first_frame_latents"  # of those, the one that is a part of the latents
TILING = {"tile_size": (30, 52), "tile_stride": (15, 26)}  # latents; WanVideoPipeline's own defaults


@dataclass(frozen=True, kw_only=True)
class Conditioning:
    """What the network sees besides latents and timestep, in the pipeline's dtype.

    identity: what it sees of the images, by the pipeline's names; families.py has their shapes.
    context_posi and context_nega: [1, 512, 4096] for Wan. context_nega is None where cfg_scale is 1.
    """

    identity: Mapping[str, torch.Tensor]
    context_posi: torch.Tensor
    context_nega: torch.Tensor | None

    def to(self, device: str | torch.device) -> Conditioning:
        """The same tensors on `device`."""
        return Conditioning(
            identity={name: tensor.to(device) for name, tensor in self.identity.items()},
            context_posi=self.context_posi.to(device),
            context_nega=None if self.context_nega is None else self.context_nega.to(device),
        )


StartCallback = Callable[[torch.Tensor, Conditioning], None]


# --- hooks --------------------------------------------------------------------------------------------------


class ForwardCounter:
    """A model_fn that counts the network evaluations of a run, and keeps both branches of the step that runs.

    WanVideoPipeline calls it with positive=True and then, where cfg_scale isn't 1, with positive=False.

    Args:
        known_nega: the first negative branch, where it is known already: it isn't evaluated. [B, C, T, H, W]
    """

    def __init__(self, model_fn: Callable[..., torch.Tensor], *, known_nega: torch.Tensor | None = None):
        self.model_fn = model_fn
        self.known_nega = known_nega
        self.forwards = 0
        self.noise_pred_posi: torch.Tensor | None = None
        self.noise_pred_nega: torch.Tensor | None = None  # None until it was asked for

    def __call__(self, **kwargs: Any) -> torch.Tensor:
        if kwargs.get("positive", True):
            self.noise_pred_posi, self.noise_pred_nega = self.evaluate(**kwargs), None
            return self.noise_pred_posi
        if self.known_nega is None:
            self.noise_pred_nega = self.evaluate(**kwargs)
        else:
            self.noise_pred_nega, self.known_nega = self.known_nega.to(kwargs["latents"].device), None
        return self.noise_pred_nega

    def evaluate(self, **kwargs: Any) -> torch.Tensor:
        """One network evaluation; a first frame that is fused into the latents doesn't move."""
        self.forwards += 1
        noise_pred = self.model_fn(**kwargs)
        if not kwargs.get("fuse_vae_embedding_in_latents"):
            return noise_pred
        return torch.cat([torch.zeros_like(noise_pred[:, :, :1]), noise_pred[:, :, 1:]], 2)

    @property
    def branch_distance(self) -> float | None:
        """Norm of the difference of both branches; None where there is only one."""
        if self.noise_pred_posi is None or self.noise_pred_nega is None:
            return None
        return float(torch.linalg.vector_norm(self.noise_pred_posi.float() - self.noise_pred_nega.float()))


class ReportStart(PipelineUnit):
    """Last unit of a full run: hands out the initial latents and the conditioning."""

    def __init__(self, on_start: StartCallback):
        super().__init__(take_over=True)
        self.on_start = on_start

    def process(self, pipe: WanVideoPipeline, inputs_shared: dict, inputs_posi: dict, inputs_nega: dict):
        """Report; the inputs go on unchanged."""
        guided, latents = inputs_shared["cfg_scale"] != 1, inputs_shared["latents"]
        made = {name: inputs_shared.get(name) for name in IDENTITY_NAMES}
        conditioning = Conditioning(
            identity={name: tensor.to(latents.dtype) for name, tensor in made.items() if tensor is not None},
            context_posi=inputs_posi["context"],
            context_nega=inputs_nega["context"] if guided else None,
        )
        pipe.scheduler.first_frame_latents = conditioning.identity.get(FUSED)
        self.on_start(latents, conditioning)
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
        inputs_shared.update(conditioning.identity)
        if FUSED in conditioning.identity:
            inputs_shared["fuse_vae_embedding_in_latents"] = True
        pipe.scheduler.first_frame_latents = conditioning.identity.get(FUSED)
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


# --- encoding and decoding ----------------------------------------------------------------------------------


@torch.no_grad()
def encode_prompt(pipe: WanVideoPipeline, text: str) -> torch.Tensor:
    """Encode a prompt as the pipeline would: [1, 512, 4096] for Wan2.1, in its dtype."""
    return WanVideoUnit_PromptEmbedder().process(pipe, prompt=text, positive=True)["context"]


@torch.no_grad()
def encode_image(pipe: WanVideoPipeline, image: Image.Image, *, num_frames: int) -> dict[str, torch.Tensor]:
    """Encode the input image, already of the video's size, as the pipeline would: y, clip_feature."""
    size = {"input_image": image, "end_image": None, "height": image.height, "width": image.width}
    clip = WanVideoUnit_ImageEmbedderCLIP().process(pipe, **size)
    vae = WanVideoUnit_ImageEmbedderVAE().process(pipe, **size, num_frames=num_frames, tiled=True, **TILING)
    return {**vae, **clip}


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


# --- runs ---------------------------------------------------------------------------------------------------


def run_full(
    pipe: WanVideoPipeline,
    settings: RunSettings,
    *,
    prompt: str,
    negative_prompt: str,
    input_image: Image.Image | None = None,
    end_image: Image.Image | None = None,
    input_video: list[Image.Image] | None = None,
    stop_after: int | None = None,
    on_start: StartCallback | None = None,
    on_step: StepCallback | None = None,
    progress: bool = True,
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
        progress,
        prompt=prompt,
        negative_prompt=negative_prompt,
        input_image=input_image,
        end_image=end_image,
        input_video=input_video,
    )


def run_from(
    pipe: WanVideoPipeline,
    settings: RunSettings,
    *,
    start_step: int,
    latents: torch.Tensor,
    conditioning: Conditioning | None,
    known_nega: torch.Tensor | None = None,
    stop_after: int | None = None,
    on_step: StepCallback | None = None,
    progress: bool = True,
) -> RunResult:
    """Run only the steps after `start_step`, from the latents after it; -1: all, from the initial latents.

    No unit that would load an encoder runs, so the pipeline needs only its DiT and VAE. After the last step
    nothing is left to run: the latents are decoded, without DiT, and only then conditioning may be None.
    Where a later step `stop_after` is given it is the last to run, and nothing is decoded. `known_nega`, the
    first step's velocity of the negative branch, is not evaluated then.

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
    return run_scheduler(
        pipe,
        settings,
        scheduler=ResumableScheduler(start_step=start_step, stop_after=stop_after),
        latents=latents,
        conditioning=conditioning,
        known_nega=known_nega,
        on_step=on_step,
        progress=progress,
    )


def run_differential(
    pipe: WanVideoPipeline,
    settings: RunSettings,
    *,
    trajectory: Trajectory,
    conditioning: Conditioning,
    known_nega: torch.Tensor | None = None,
    on_step: StepCallback | None = None,
    progress: bool = True,
) -> RunResult:
    """Run only the trajectory's steps, spent on what the new conditioning changes (DifferentialScheduler).

    Raises:
        RunError: latents became NaN or infinite; names the step.
    """
    return run_scheduler(
        pipe,
        settings,
        scheduler=DifferentialScheduler(trajectory, settings.cfg_scale),
        latents=trajectory.latents[0],
        conditioning=conditioning,
        known_nega=known_nega,
        on_step=on_step,
        progress=progress,
    )


def run_on_sigmas(
    pipe: WanVideoPipeline,
    settings: RunSettings,
    *,
    sigmas: Sequence[float],
    latents: torch.Tensor,
    conditioning: Conditioning,
    on_step: StepCallback | None = None,
    progress: bool = True,
) -> RunResult:
    """Run these sigmas, decreasing, from latents at the first of them; the steps are places in them.

    Raises:
        RunError: latents became NaN or infinite; names the step.
    """
    return run_scheduler(
        pipe,
        settings,
        scheduler=SigmasScheduler(sigmas),
        latents=latents,
        conditioning=conditioning,
        on_step=on_step,
        progress=progress,
    )


def run_scheduler(
    pipe: WanVideoPipeline,
    settings: RunSettings,
    *,
    scheduler: ReportingScheduler,
    latents: torch.Tensor,
    conditioning: Conditioning,
    known_nega: torch.Tensor | None = None,
    on_step: StepCallback | None = None,
    progress: bool = True,
) -> RunResult:
    """Run the steps the scheduler keeps, from these latents, without any unit that would load an encoder.

    Raises:
        InputError: a conditioning that doesn't fit the latents or the weights.
        RunError: latents became NaN or infinite; names the step.
    """
    check_conditioning({**vars(conditioning), **conditioning.identity}, dit=pipe.dit, latents=latents)
    units = [unit for unit in pipe.units if not unit.onload_model_names]
    units.append(ReplaceStart(latents, conditioning))
    return _call(pipe, settings, Clock(), scheduler, units, on_step, progress, known_nega=known_nega)


def _call(
    pipe: WanVideoPipeline,
    settings: RunSettings,
    clock: Clock,
    scheduler: ReportingScheduler,
    units: list[PipelineUnit],
    on_step: StepCallback | None,
    progress: bool,
    *,
    known_nega: torch.Tensor | None = None,
    **inputs: Any,
) -> RunResult:
    """Call the pipeline with this scheduler, these units, counters and what makes the steps cheaper."""
    counter, blocks = ForwardCounter(pipe.model_fn, known_nega=known_nega), BlockCounter()
    result = RunResult([], torch.empty(0), [], 0, seconds=clock.seconds)

    def report_step(step: Step) -> None:
        _check_finite(step)  # waits for the device, so that the time below is the step's own
        seconds, forwards = clock.add("denoise"), counter.forwards - result.forwards
        result.seconds_per_step.append(seconds)
        result.steps.append(step.index)
        result.forwards += forwards
        result.latents = step.latents
        if on_step is not None:
            distance = counter.branch_distance
            on_step(replace(step, branch_distance=distance, forwards=forwards, seconds=seconds))
        clock.add("save")

    scheduler.on_step, scheduler.noise_pred_nega = report_step, lambda: counter.noise_pred_nega
    bar = functools.partial(tqdm, desc="denoise", unit="step", leave=None, disable=not progress)
    inputs |= settings.pipeline_inputs | TILING | {"progress_bar_cmd": bar}
    with (
        blocks.counting(pipe),
        _cheaper(pipe, settings, inputs, units, counter) as (inputs, units, model_fn),
        hooked(pipe, scheduler=scheduler, units=units, model_fn=model_fn),
        contextlib.suppress(Stopped),
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
    model_fn: Callable[..., torch.Tensor],
) -> Iterator[tuple[dict[str, Any], list[PipelineUnit], Callable[..., torch.Tensor]]]:
    """Inputs, units and model_fn of a run, with Skip-Cache, TeaCache and guidance by step if asked for."""
    guided_steps = None
    with contextlib.ExitStack() as stack:
        if settings.skip_cache is not None:
            model_fn = stack.enter_context(skip_cache(pipe, every=settings.skip_cache, model_fn=model_fn))
        if isinstance(settings.cfg_scale, tuple):
            model_fn = GuidanceByStep(model_fn, settings.cfg_scale)
            inputs = inputs | {"cfg_scale": LEFT_TO_MODEL_FN}
            guided_steps = sum(scale != 1 for scale in settings.cfg_scale)
        if settings.tea_cache_l1_thresh is not None:
            units = [TellTeaCache(guided_steps), *units]
        yield inputs, units, model_fn


def _check_finite(step: Step) -> None:
    if not torch.isfinite(step.latents).all():
        raise RunError(
            f"latents became NaN or infinite at step {step.index} (sigma {step.sigma:.3f}); stopped there. "
            "Try another --dtype, a lower --cfg_scale, or check the weights"
        )
