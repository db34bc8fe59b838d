"""Run DiffSynth's WanVideoPipeline from any step and report every step, without changing its source.

`WanVideoPipeline.__call__` reads three plain attributes, which are replaced for one call (pipeline/hooks.py):

    scheduler  a scheduler of pipeline/schedulers.py
    units      run_full appends a unit that reports the conditioning; the other runs replace every unit that
               would load an encoder by one that sets the prior's latents and conditioning
    model_fn   ForwardCounter, which counts network evaluations and measures the distance of the guidance
               branches; pipeline/cheaper.py wraps it

`run_full` runs all steps, `run_from` those after a step, `run_differential` those of a prior's path and
`run_on_sigmas` custom sigmas. Checked against diffsynth 2.1.12, diffsynth/pipelines/wan_video.py.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
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

from step_skip.errors import RunError
from step_skip.method.closeness import FirstLook
from step_skip.pipeline.cheaper import (
    LEFT_TO_MODEL_FN,
    BlockCounter,
    GuidanceByStep,
    SetTeaCacheSteps,
    skip_cache,
)
from step_skip.pipeline.conditioning import Conditioning, StartCallback, check_conditioning
from step_skip.pipeline.hooks import CheckExperts, ForwardCounter, ReplaceStart, ReportStart, hooked
from step_skip.pipeline.results import Clock, RunResult
from step_skip.pipeline.schedulers import (
    DifferentialScheduler,
    Part,
    ReportingScheduler,
    ResumableScheduler,
    SigmasScheduler,
    Step,
    StepCallback,
    Stopped,
)
from step_skip.pipeline.settings import TILING, RunSettings

# --- encoding and decoding ----------------------------------------------------------------------------------


@torch.no_grad()
def encode_prompt(pipe: WanVideoPipeline, text: str) -> torch.Tensor:
    """Encode a prompt as the pipeline does: [1, 512, 4096] for Wan2.1, in the pipeline's dtype."""
    return WanVideoUnit_PromptEmbedder().process(pipe, prompt=text, positive=True)["context"]


@torch.no_grad()
def encode_image(pipe: WanVideoPipeline, image: Image.Image, *, num_frames: int) -> dict[str, torch.Tensor]:
    """Encode the input image as the pipeline does; return y and clip_feature.

    Args:
        image: RGB, already of the clip's size.
        num_frames: number of frames of the clip.
    """
    size = {"input_image": image, "end_image": None, "height": image.height, "width": image.width}
    clip = WanVideoUnit_ImageEmbedderCLIP().process(pipe, **size)
    vae = WanVideoUnit_ImageEmbedderVAE().process(pipe, **size, num_frames=num_frames, tiled=True, **TILING)
    return {**vae, **clip}


@torch.no_grad()
def decode(pipe: WanVideoPipeline, latents: torch.Tensor, *, tiled: bool) -> list[Image.Image]:
    """Decode clean latents, [1, C, T, H, W], to frames; not to be called during a run."""
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
    """Run every step, or those up to `stop_after` without decoding.

    Args:
        input_image, end_image, input_video: of the clip's size.
        stop_after: index of the last step that runs; None: all steps run.
        on_start: called with the initial latents and the conditioning.
        on_step: called with each step.
        progress: show a progress bar.

    Raises:
        RunError: latents became NaN or infinite; the message names the step.
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
    pause: Pause | None = None,
) -> RunResult:
    """Run only the steps after `start_step`, from the latents after it.

    No unit that would load an encoder runs, so the pipeline needs only its DiT and VAE. After the last step
    no step remains: the latents are only decoded, without a DiT.

    Args:
        start_step: index of a step; -1: run all steps, from the initial latents.
        latents: after that step, [B, C, T, H, W].
        conditioning: may be None only if `start_step` is the last step.
        known_nega: the first step's velocity of the negative branch, which is then not evaluated.
        stop_after: index of the last step that runs, after which nothing is decoded; None: all steps run.
        on_step: called with each step.
        progress: show a progress bar.
        pause: split the run into two calls, see `Pause`.

    Raises:
        RunError: latents became NaN or infinite; the message names the step.
    """
    if start_step == settings.num_inference_steps - 1:
        clock = Clock()
        frames = decode(pipe, latents, tiled=settings.tiled)
        clock.add("decode")
        return RunResult(frames, latents, [], 0, seconds=clock.seconds)
    if conditioning is None:
        raise ValueError(f"conditioning is None, and the steps after {start_step} need one")
    return run_scheduler(
        pipe,
        settings,
        scheduler=ResumableScheduler(start_step=start_step, stop_after=stop_after),
        latents=latents,
        conditioning=conditioning,
        known_nega=known_nega,
        on_step=on_step,
        progress=progress,
        pause=pause,
    )


def run_differential(
    pipe: WanVideoPipeline,
    settings: RunSettings,
    *,
    paths: FirstLook,
    conditioning: Conditioning,
    known_nega: torch.Tensor | None = None,
    on_step: StepCallback | None = None,
    progress: bool = True,
    pause: Pause | None = None,
) -> RunResult:
    """Run only the steps of a path by differential resume (DifferentialScheduler).

    If there are several paths the first velocity chooses one. If they differ in length, the pipeline is
    called a second time for the remaining steps.

    Args:
        paths: the paths to choose from.
        conditioning, known_nega, on_step, progress, pause: see `run_from`.

    Raises:
        RunError: latents became NaN or infinite; the message names the step.
    """
    path: list[Step] = []

    def keep(step: Step) -> None:
        path.append(step.on_cpu())
        if on_step is not None:
            on_step(step)

    trajectory = paths.first
    scheduler = DifferentialScheduler(trajectory, settings.cfg_scale, choose=paths.choose)
    # If the paths differ in length the first call runs one step, which chooses the path.
    calls = [Pause(1)] * 2 if paths.differ_in_length else [pause]
    for each in calls:
        result = run_scheduler(
            pipe,
            settings,
            scheduler=scheduler,
            latents=trajectory.latents[0],
            conditioning=conditioning,
            known_nega=known_nega,
            on_step=keep,
            progress=progress,
            pause=each,
        )
    result.first_look = result.first_look or paths
    result.path += path
    return result


def run_on_sigmas(
    pipe: WanVideoPipeline,
    settings: RunSettings,
    *,
    sigmas: Sequence[float],
    latents: torch.Tensor,
    conditioning: Conditioning,
    on_step: StepCallback | None = None,
    progress: bool = True,
    pause: Pause | None = None,
) -> RunResult:
    """Run custom sigmas from latents at the first of them; steps are reported by their index in `sigmas`.

    Args:
        sigmas: decreasing and above 0, without the closing 0.
        latents: [B, C, T, H, W].
        conditioning, on_step, progress, pause: see `run_from`.

    Raises:
        RunError: latents became NaN or infinite; the message names the step.
    """
    return run_scheduler(
        pipe,
        settings,
        scheduler=SigmasScheduler(sigmas),
        latents=latents,
        conditioning=conditioning,
        on_step=on_step,
        progress=progress,
        pause=pause,
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
    pause: Pause | None = None,
) -> RunResult:
    """Run the steps that a scheduler keeps, from given latents, without any unit that would load an encoder.

    Raises:
        InputError: the conditioning doesn't fit the latents or the weights.
        RunError: latents became NaN or infinite; the message names the step.
    """

    def call(latents: torch.Tensor, settings: RunSettings, scheduler: ReportingScheduler | Part) -> RunResult:
        units = [unit for unit in pipe.units if not unit.onload_model_names]
        units.append(ReplaceStart(latents, conditioning))
        known = known_nega if pause is None or pause.result is None else None  # it belongs to the first step
        return _call(pipe, settings, Clock(), scheduler, units, on_step, progress, known_nega=known)

    network = pipe.dit if pipe.dit is not None else pipe.dit2
    check_conditioning({**vars(conditioning), **conditioning.identity}, dit=network, latents=latents)
    if pause is None:
        return call(latents, settings, scheduler)
    return pause.run(call, latents, settings, scheduler)


@dataclass
class Pause:
    """A run in two calls of the pipeline, so that its two experts are never loaded at the same time.

    The first run with it takes the steps of the first expert and decodes nothing, the second run takes the
    remaining steps.

    Args:
        num_steps: number of steps of the first expert.
    """

    num_steps: int
    scheduler: ReportingScheduler | None = None  # set by the first call
    result: RunResult | None = None  # set by the first call

    def run(
        self,
        call: Callable[[torch.Tensor, RunSettings, ReportingScheduler | Part], RunResult],
        latents: torch.Tensor,
        settings: RunSettings,
        scheduler: ReportingScheduler,
    ) -> RunResult:
        """Run the next of the two calls; the second returns the result of both.

        Args:
            call: runs the pipeline from latents, with settings and a scheduler.
            latents: of the first call; the second continues with the result of the first.
            scheduler: of the first call; the second continues with it.
        """
        before, is_last = self.result, self.result is not None
        indices = slice(self.num_steps, None) if is_last else slice(self.num_steps)
        if isinstance(settings.cfg_scale, tuple):
            settings = replace(settings, cfg_scale=settings.cfg_scale[indices])
        self.scheduler = self.scheduler or scheduler
        part = Part(self.scheduler, indices, is_last=is_last)
        result = call(latents if before is None else before.latents, settings, part)
        self.result = result if before is None else before.then(result)
        return self.result


def _call(
    pipe: WanVideoPipeline,
    settings: RunSettings,
    clock: Clock,
    scheduler: ReportingScheduler | Part,
    units: list[PipelineUnit],
    on_step: StepCallback | None,
    progress: bool,
    *,
    known_nega: torch.Tensor | None = None,
    **inputs: Any,
) -> RunResult:
    """Call the pipeline with a scheduler, units and counters, and with Skip-Cache or TeaCache if chosen."""
    counter, blocks = ForwardCounter(pipe.model_fn, known_nega=known_nega), BlockCounter()
    result = RunResult([], torch.empty(0), [], 0, seconds=clock.seconds)

    def report_step(step: Step) -> None:
        check_finite(step)  # synchronises with the device, so that the time below is that of the step
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
    units = [*units, CheckExperts(settings.switch_DiT_boundary)]
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
    """Yield inputs, units and model_fn of a run, with Skip-Cache, TeaCache and guidance by step if chosen."""
    guided_steps = None
    with contextlib.ExitStack() as stack:
        if settings.skip_cache is not None:
            model_fn = stack.enter_context(skip_cache(pipe, every=settings.skip_cache, model_fn=model_fn))
        if isinstance(settings.cfg_scale, tuple):
            model_fn = GuidanceByStep(model_fn, settings.cfg_scale)
            inputs = inputs | {"cfg_scale": LEFT_TO_MODEL_FN}
            guided_steps = sum(scale != 1 for scale in settings.cfg_scale)
        if settings.tea_cache_l1_thresh is not None:
            units = [SetTeaCacheSteps(guided_steps), *units]
        yield inputs, units, model_fn


def check_finite(step: Step) -> None:
    """Check that a step's latents are finite.

    Raises:
        RunError: they are not; the message names the step.
    """
    if not torch.isfinite(step.latents).all():
        raise RunError(
            f"latents became NaN or infinite at step {step.index} (sigma {step.sigma:.3f}); the run stopped: "
            "try another --dtype or a lower --cfg_scale, or check the weights"
        )
