"""Run DiffSynth's WanVideoPipeline from any step, see every step, change none of its source.

`WanVideoPipeline.__call__` reads three plain attributes. Ours are put in their place for one call (hooks.py):

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
    TellTeaCache,
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
    """Encode a prompt as the pipeline would: [1, 512, 4096] for Wan2.1, in its dtype."""
    return WanVideoUnit_PromptEmbedder().process(pipe, prompt=text, positive=True)["context"]


@torch.no_grad()
def encode_image(pipe: WanVideoPipeline, image: Image.Image, *, num_frames: int) -> dict[str, torch.Tensor]:
    """Encode the input image, already of the video's size, as the pipeline would: y, clip_feature."""
    size = {"input_image": image, "end_image": None, "height": image.height, "width": image.width}
    clip = WanVideoUnit_ImageEmbedderCLIP().process(pipe, **size)
    vae = WanVideoUnit_ImageEmbedderVAE().process(pipe, **size, num_frames=num_frames, tiled=True, **TILING)
    return {**vae, **clip}


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
    pause: Pause | None = None,
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
    """Run only a path's steps, spent on what the new conditioning changes (DifferentialScheduler).

    Where there are several paths the first velocity chooses one. Are they of different lengths, the pipeline
    is called a second time for what then follows.

    Raises:
        RunError: latents became NaN or infinite; names the step.
    """
    path: list[Step] = []

    def keep(step: Step) -> None:
        path.append(step.on_cpu())
        if on_step is not None:
            on_step(step)

    trajectory = paths.first
    scheduler = DifferentialScheduler(trajectory, settings.cfg_scale, choose=paths.choose)
    # Where the paths differ in length, the first call runs one step, by which the path is chosen.
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
    """Run the steps the scheduler keeps, from these latents, without any unit that would load an encoder.

    Raises:
        InputError: a conditioning that doesn't fit the latents or the weights.
        RunError: latents became NaN or infinite; names the step.
    """

    def call(latents: torch.Tensor, settings: RunSettings, scheduler: ReportingScheduler | Part) -> RunResult:
        units = [unit for unit in pipe.units if not unit.onload_model_names]
        units.append(ReplaceStart(latents, conditioning))
        known = known_nega if pause is None or pause.result is None else None  # of the first step
        return _call(pipe, settings, Clock(), scheduler, units, on_step, progress, known_nega=known)

    network = pipe.dit if pipe.dit is not None else pipe.dit2
    check_conditioning({**vars(conditioning), **conditioning.identity}, dit=network, latents=latents)
    if pause is None:
        return call(latents, settings, scheduler)
    return pause.run(call, latents, settings, scheduler)


@dataclass
class Pause:
    """A run in two calls of the pipeline, so that its two experts need never be loaded together.

    The first run with it takes the steps of the first expert and decodes nothing, the second run the rest.

    Args:
        place: how many steps the first expert takes.
    """

    place: int
    scheduler: ReportingScheduler | None = None  # once the first call is made, as the next
    result: RunResult | None = None

    def run(
        self,
        call: Callable[[torch.Tensor, RunSettings, ReportingScheduler | Part], RunResult],
        latents: torch.Tensor,
        settings: RunSettings,
        scheduler: ReportingScheduler,
    ) -> RunResult:
        """The next of the two; the second returns the result of both."""
        before, is_last = self.result, self.result is not None
        places = slice(self.place, None) if is_last else slice(self.place)
        if isinstance(settings.cfg_scale, tuple):
            settings = replace(settings, cfg_scale=settings.cfg_scale[places])
        self.scheduler = self.scheduler or scheduler
        part = Part(self.scheduler, places, is_last=is_last)
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
    """Call the pipeline with this scheduler, these units, counters and what makes the steps cheaper."""
    counter, blocks = ForwardCounter(pipe.model_fn, known_nega=known_nega), BlockCounter()
    result = RunResult([], torch.empty(0), [], 0, seconds=clock.seconds)

    def report_step(step: Step) -> None:
        check_finite(step)  # waits for the device, so that the time below is the step's own
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


def check_finite(step: Step) -> None:
    if not torch.isfinite(step.latents).all():
        raise RunError(
            f"latents became NaN or infinite at step {step.index} (sigma {step.sigma:.3f}); stopped there. "
            "Try another --dtype, a lower --cfg_scale, or check the weights"
        )
