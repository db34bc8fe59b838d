"""Run what is missing of a prior, from wherever it stands.

`what_is_left` compares the files that the metadata names with those that are complete: nothing yet, some
steps, all but a video. `run_what_is_left` runs what is left and saves each part as it comes. A file that was
lost since it was recorded is made again, and must have the recorded SHA-256.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from step_skip.files.tensors import sha256_tensor
from step_skip.generate.formation import record_branch_distance, save_formation
from step_skip.media.videos import write_video
from step_skip.models.families import Family
from step_skip.models.loading import Model
from step_skip.models.memory import peak_memory
from step_skip.models.weights import cache_components
from step_skip.pipeline.results import Clock, RunResult
from step_skip.prior.files import damaged_files, load_conditioning, load_denoised, load_latents
from step_skip.prior.prior import (
    INITIAL_LATENTS_FILE,
    OUTPUT_FILE,
    Prior,
    context_file,
    denoised_file,
    identity_file,
    leading_steps,
    noise_pred_file,
    noise_pred_nega_file,
    step_file,
)
from step_skip.prior.schema import Metadata
from step_skip.prior.writer import PriorWriter

if TYPE_CHECKING:
    import torch
    from diffsynth.pipelines.wan_video import WanVideoPipeline
    from PIL.Image import Image

    from step_skip.pipeline.conditioning import Conditioning
    from step_skip.pipeline.schedulers import ProgressCallback, Step

log = logging.getLogger(__name__)


# --- what is complete, and what is left --------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Left:
    """What a prior lacks yet."""

    start_step: int | None  # the last whole step; -1: only noise and conditioning are there; None: neither
    last_step: int  # the one to end with
    damaged: frozenset[str]
    videos: dict[str, int | None]  # and the step whose denoised estimate each shows; None: the clean latents
    family: Family
    experts: Sequence[str]  # the networks that take the steps that are left, in their order
    skip_cache: int | None  # as the steps run

    @property
    def steps(self) -> range:
        """The steps that are left to run."""
        return range(0 if self.start_step is None else self.start_step + 1, self.last_step + 1)

    @property
    def components(self) -> list[str]:
        """The parts of the model that are needed."""
        cache = cache_components(self.skip_cache)
        if self.start_step is None:
            return [*self.family.components, *cache]
        if self.steps:
            return [*self.experts, "vae", *cache]
        return ["vae"] if self.videos else []


def start_files(prior: Prior) -> dict[str, str]:
    """Return the names of the files of the initial latents and of each tensor of Conditioning."""
    prompt, negative_prompt = prior.texts
    files = {
        "latents": INITIAL_LATENTS_FILE,
        **{name: identity_file(name) for name in prior.identity_names},
        "context_posi": context_file(prompt),
    }
    if set(prior.guidance) != {1}:
        files["context_nega"] = context_file(negative_prompt)
    return files


def video_files(metadata: Metadata, last_step: int) -> dict[str, int | None]:
    """Return the videos of a prior that ends with `last_step`, each with its step; None: clean latents."""
    stopped = last_step < metadata.num_inference_steps - 1
    estimates = range(last_step + 1) if metadata.save_decoded_videos else [last_step] if stopped else []
    videos: dict[str, int | None] = {} if stopped else {OUTPUT_FILE: None}
    return videos | {denoised_file(step): step for step in estimates}


def what_is_left(prior: Prior) -> Left:
    """Compare what the prior should hold with what it does, every recorded file by its checksum."""
    m = prior.metadata
    damaged = damaged_files(prior)
    for problem in damaged.values():
        log.warning(problem.rsplit(";", 1)[0])
    whole = m.files.keys() - damaged.keys()
    last_step = prior.num_inference_steps - 1
    if m.status == "running" and m.stop_after is not None:
        last_step = m.stop_after
    videos = {name: step for name, step in video_files(m, last_step).items() if name not in whole}
    start_step = None
    if whole.issuperset(start_files(prior).values()):
        steps = leading_steps(whole, prior.num_inference_steps, nega=prior.keeps_nega)
        start_step = min(steps - 1, last_step)
        if start_step < last_step and (m.skip_cache or m.tea_cache_l1_thresh):
            start_step = -1  # a step uses again what earlier ones left in memory
    first = 0 if start_step is None else start_step + 1
    return Left(
        start_step=start_step,
        last_step=last_step,
        damaged=frozenset(damaged),
        videos=videos,
        family=prior.family,
        experts=list(dict.fromkeys(prior.expert_of(step) for step in range(first, last_step + 1))),
        skip_cache=m.skip_cache,
    )


# --- the run ------------------------------------------------------------------------------------------------


def run_what_is_left(
    writer: PriorWriter,
    left: Left,
    *,
    model: Model | None,
    start: Mapping[str, Any] | None,
    clock: Clock,
    callback: ProgressCallback | None = None,
    progress: bool = True,
) -> None:
    """Run what is left and declare the prior complete, or stopped.

    Args:
        model: with the components that are left to use; None where none are.
        start: what the pipeline begins with, images and input_video of the video's size; needed where
            start_step is None.
    """
    m = writer.metadata
    frames = []
    if left.steps:
        result = run_steps_left(writer, left, model=model, start=start, callback=callback, progress=progress)
        clock.include(result.seconds)
        frames = result.frames
    pipe = None if model is None else model.pipe
    save_videos(writer, left, pipe=pipe, frames=frames, clock=clock)
    clock.seconds["denoise"] = sum(m.seconds_per_step)
    known = {"forwards": sum(m.forwards_per_step), "seconds": clock.seconds}
    known["peak_memory"] = peak_memory(m.device)
    if left.last_step < m.num_inference_steps - 1:
        writer.finish("stopped", **known)
        return
    save_formation(writer)
    latents = load_latents(writer.prior, step_file(left.last_step))
    writer.finish("complete", stop_after=None, latents_sha256=sha256_tensor(latents), **known)


def run_steps_left(
    writer: PriorWriter,
    left: Left,
    *,
    model: Model | None,
    start: Mapping[str, Any] | None,
    callback: ProgressCallback | None,
    progress: bool,
) -> RunResult:
    """Run the steps that are left, saving each as it comes; of two experts that take turns, one by one."""
    from step_skip.pipeline.schedulers import reporting_to

    if model is None:
        raise ValueError("steps are left to run, and they need a model")
    report = reporting_to(callback, range(left.last_step + 1))

    def save_and_report(step: Step) -> None:
        save_step(writer, step)
        if report is not None:
            report(step)

    start_step, result = left.start_step, None
    parts = parts_by_expert(writer.prior, left) if model.experts else {"": left.last_step}
    for expert, last_step in parts.items():
        load_seconds = 0.0
        if expert:
            load_seconds = model.use_expert(expert)
            known = writer.metadata.parameter_fingerprint
            writer.metadata.parameter_fingerprint = known | model.parameters
        stop_after = last_step if last_step < writer.prior.num_inference_steps - 1 else None
        run = {"stop_after": stop_after, "on_step": save_and_report, "progress": progress}
        if start_step is None:
            part = run_from_beginning(writer, model.pipe, start, **run)
        else:
            part = run_from_step(writer, model.pipe, start_step, **run)
        part.seconds["load"] += load_seconds
        start_step, result = last_step, part if result is None else result.then(part)
    assert result is not None  # noqa: S101  there are steps that are left
    return result


def parts_by_expert(prior: Prior, left: Left) -> dict[str, int]:
    """Return the last step of each expert among the steps that are left, in their order."""
    return {prior.expert_of(step): step for step in left.steps}


def run_from_beginning(
    writer: PriorWriter, pipe: WanVideoPipeline, start: Mapping[str, Any] | None, **run: Any
) -> RunResult:
    """Encode what the run begins with, save it, and run from the first step on."""
    from step_skip.pipeline.run import run_full

    if start is None:
        raise ValueError("a run from its beginning needs what it begins with")
    prompt, negative_prompt = writer.prior.texts
    return run_full(
        pipe,
        writer.prior.settings,
        prompt=prompt,
        negative_prompt=negative_prompt,
        on_start=lambda latents, conditioning: save_start(writer, latents, conditioning),
        **start,
        **run,
    )


def run_from_step(writer: PriorWriter, pipe: WanVideoPipeline, start_step: int, **run: Any) -> RunResult:
    """Run on after a step that is saved; -1: from the initial latents."""
    from step_skip.pipeline.run import run_from

    prior = writer.prior
    latents, conditioning = load_start(prior)
    if start_step >= 0:
        latents = load_latents(prior, step_file(start_step))
    settings = prior.settings_after(start_step)
    return run_from(pipe, settings, start_step=start_step, latents=latents, conditioning=conditioning, **run)


def save_start(writer: PriorWriter, latents: torch.Tensor, conditioning: Conditioning) -> None:
    """Save what a resumed run needs in place of image, image encoder and text encoder."""
    tensors = {"latents": latents, **vars(conditioning), **conditioning.identity}
    for name, file in start_files(writer.prior).items():
        writer.save_tensor(file, tensors[name])
    writer.write_metadata()


def load_start(prior: Prior) -> tuple[torch.Tensor, Conditioning]:
    """Load the initial latents, [B, C, T, H, W], and the conditioning, as they were saved."""
    from step_skip.pipeline.conditioning import Conditioning

    tensors = {name: load_conditioning(prior, file) for name, file in start_files(prior).items()}
    return tensors["latents"], Conditioning(
        identity={name: tensors[name] for name in prior.identity_names},
        context_posi=tensors["context_posi"],
        context_nega=tensors.get("context_nega"),
    )


def save_step(writer: PriorWriter, step: Step) -> None:
    """Save the latents after a step and its velocities, then say in the metadata that it is whole."""
    writer.save_tensor(noise_pred_file(step.index), step.noise_pred)
    if writer.prior.keeps_nega and step.noise_pred_nega is not None:
        writer.save_tensor(noise_pred_nega_file(step.index), step.noise_pred_nega)
    writer.save_tensor(step_file(step.index), step.latents)
    if 1 not in writer.prior.guidance:  # else it isn't known of every step
        record_branch_distance(writer.metadata, step)
    writer.record(step.index, seconds_per_step=step.seconds, forwards_per_step=step.forwards)
    writer.write_metadata()


def save_videos(
    writer: PriorWriter, left: Left, *, pipe: WanVideoPipeline | None, frames: list[Image], clock: Clock
) -> None:
    """Save the videos that are left, of the prior's own the frames if they are decoded already.

    Done after the run, so that the network never has to make room for the VAE between two steps.
    """
    from tqdm import tqdm

    from step_skip.pipeline.run import decode

    prior = writer.prior
    for name, step in tqdm(left.videos.items(), desc="videos", unit="video", disable=len(left.videos) < 2):
        if step is not None:
            frames = decode(pipe, load_denoised(prior, step), tiled=prior.settings.tiled)
            clock.add("decode_estimates")
        elif not frames:
            last = load_latents(prior, step_file(left.last_step))
            frames = decode(pipe, last, tiled=prior.settings.tiled)
            clock.add("decode")
        save_video(writer, name, frames)
        writer.write_metadata()
        clock.add("save")


def save_video(writer: PriorWriter, name: str, frames: list[Image]) -> None:
    """Save frames as one of the prior's videos."""
    writer.save(name, lambda path: write_video(frames, path, fps=writer.prior.fps))
