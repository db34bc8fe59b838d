"""The run that makes a prior, from wherever it stands: nothing yet, some steps whole, only a video left.

`what_is_left` looks at what the metadata names and is whole; `run` does the rest and saves each part as it
comes (prior_writer.py). What was lost since it was recorded is made again, and has to come out the same.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import command_line as cli
import formation
import prior_utils
import wan_models
from prior_utils import Clock, InputError, Prior
from prior_writer import PriorWriter

if TYPE_CHECKING:
    import torch
    from diffsynth.pipelines.wan_video import WanVideoPipeline
    from PIL.Image import Image

    from wan_pipeline import Conditioning, RunResult, Step


@dataclass(frozen=True, kw_only=True)
class Left:
    """What a prior lacks yet."""

    start_step: int | None  # the last whole step; -1: only noise and conditioning are there; None: neither
    last_step: int  # the one to end with
    damaged: frozenset[str]
    videos: dict[str, int | None]  # and the step whose denoised estimate each shows; None: the clean latents
    skip_cache: int | None  # as the steps run

    @property
    def steps(self) -> range:
        """The steps that are left to run."""
        return range(0 if self.start_step is None else self.start_step + 1, self.last_step + 1)

    @property
    def components(self) -> list[str]:
        """The parts of the model that are needed."""
        cache = wan_models.cache_components(self.skip_cache)
        if self.start_step is None:
            return [*wan_models.COMPONENTS, *cache]
        if self.steps:
            return ["dit", "vae", *cache]
        return ["vae"] if self.videos else []


# --- what there is, what there should be --------------------------------------------------------------------


def start_files(metadata: Mapping[str, Any]) -> dict[str, str]:
    """The file of the initial latents and of each field of Conditioning."""
    files = {
        "latents": prior_utils.INITIAL_LATENTS_FILE,
        "y": "y.pt",
        "clip_feature": "clip_feature.pt",
        "context_posi": prior_utils.context_file(metadata["prompt"]),
    }
    if metadata["cfg_scale"] != 1:
        files["context_nega"] = prior_utils.context_file(metadata["negative_prompt"])
    return files


def video_files(metadata: Mapping[str, Any], last_step: int) -> dict[str, int | None]:
    """The videos of a prior that ends with `last_step`; one stopped early shows what that step points at."""
    stopped = last_step < metadata["num_inference_steps"] - 1
    estimates = range(last_step + 1) if metadata["save_decoded_videos"] else [last_step] * stopped
    videos = {prior_utils.denoised_file(step): step for step in estimates}
    return videos if stopped else {prior_utils.OUTPUT_FILE: None} | videos


def what_is_left(prior: Prior) -> Left:
    """Compare what the prior should hold with what it does, every recorded file by its checksum."""
    m = prior.metadata
    damaged = prior_utils.damaged_files(prior)
    for problem in damaged.values():
        cli.warn(problem.rsplit(";", 1)[0])
    whole = m["files"].keys() - damaged.keys()
    last_step = prior.num_inference_steps - 1
    if m["status"] == "running" and m["stop_after"] is not None:
        last_step = m["stop_after"]
    videos = {name: step for name, step in video_files(m, last_step).items() if name not in whole}
    start_step = None
    if whole.issuperset(start_files(m).values()):
        start_step = min(prior_utils.leading_steps(whole, prior.num_inference_steps) - 1, last_step)
        if start_step < last_step and (m.get("skip_cache") or m.get("tea_cache_l1_thresh")):
            start_step = -1  # a step uses again what earlier ones left in memory
    return Left(
        start_step=start_step,
        last_step=last_step,
        damaged=frozenset(damaged),
        videos=videos,
        skip_cache=m.get("skip_cache"),
    )


# --- whether it can go on here ------------------------------------------------------------------------------


def check_resumable(prior: Prior) -> None:
    """Refuse a prior that doesn't record all that an undisturbed run depends on.

    Raises:
        InputError: an older format.
    """
    try:
        prior_utils.check_progress(prior)
    except InputError as error:
        raise InputError(f"{prior.directory} cannot be resumed: {error}") from error
    if prior.metadata["model"] not in wan_models.MODEL_NAMES:
        raise InputError(
            f"the prior was begun with the model {prior.metadata['model']!r}, which this version doesn't know"
        )


def check_same_machine(prior: Prior, device: str) -> None:
    """Refuse to go on where the remaining steps would differ from an undisturbed run's in the last bits.

    Raises:
        InputError: other versions, another device, or on a CPU another number of threads.
    """
    names = ["torch", "diffsynth", "device_name"] + ["num_threads"] * (device == "cpu")
    for name, now, then in cli.not_as_then(prior.metadata, device, names):
        raise InputError(
            f"{name} is {now} here and was {then!r} when {prior.directory} was begun, so "
            "the rest would differ from an undisturbed run's; resume it where it was, or make it again"
        )


def read_own_image(prior: Prior) -> Image:
    """The input image as the model saw it, from the prior itself, to begin a run again.

    Raises:
        InputError: it is damaged, or the run began with a video, too, which the prior doesn't hold.
    """
    prior_utils.check_files(prior, [prior_utils.IMAGE_FILE])
    if prior.metadata["denoising_strength"] < 1:
        raise InputError(
            f"{prior.directory} was interrupted before the noised input video was saved: make it again"
        )
    sizes = {"width": prior.metadata["width"], "height": prior.metadata["height"]}
    return cli.read_image(
        prior.directory / prior_utils.IMAGE_FILE, **sizes, label="the prior's image", exact=True
    )


# --- the run ------------------------------------------------------------------------------------------------


def run(
    writer: PriorWriter,
    left: Left,
    *,
    pipe: WanVideoPipeline | None,
    image: Image | None,
    input_video: list[Image] | None,
    clock: Clock,
) -> None:
    """Run what is left and declare the prior complete, or stopped.

    Args:
        pipe: with the components that are left to use; None where none are.
        image: of the video's size; needed where start_step is None, as is input_video where there is one.
    """
    m = writer.metadata
    frames = []
    if left.steps:
        result = run_steps(writer, left, pipe=pipe, image=image, input_video=input_video)
        clock.include(result.seconds)
        frames = result.frames
    save_videos(writer, left, pipe=pipe, frames=frames, clock=clock)
    clock.seconds["denoise"] = sum(m["seconds_per_step"])
    known = {"forwards": sum(m["forwards_per_step"]), "seconds": clock.seconds}
    if left.last_step < m["num_inference_steps"] - 1:
        writer.finish("stopped", **known)
        return
    formation.save(writer)
    latents = prior_utils.load_latents(writer.prior, prior_utils.step_file(left.last_step))
    writer.finish("complete", stop_after=None, latents_sha256=prior_utils.sha256_tensor(latents), **known)


def run_steps(
    writer: PriorWriter,
    left: Left,
    *,
    pipe: WanVideoPipeline,
    image: Image | None,
    input_video: list[Image] | None,
) -> RunResult:
    """Run the steps that are left, saving each as it comes."""
    from wan_pipeline import run_from, run_full

    m, settings = writer.metadata, writer.prior.settings
    ends = {
        "stop_after": left.last_step if left.last_step < settings.num_inference_steps - 1 else None,
        "on_step": lambda step: save_step(writer, step),
    }
    if left.start_step is None:
        return run_full(
            pipe,
            settings,
            prompt=m["prompt"],
            negative_prompt=m["negative_prompt"],
            input_image=image,
            input_video=input_video,
            on_start=lambda latents, conditioning: save_start(writer, latents, conditioning),
            **ends,
        )
    latents, conditioning = load_start(writer.prior)
    if left.start_step >= 0:
        latents = prior_utils.load_latents(writer.prior, prior_utils.step_file(left.start_step))
    return run_from(
        pipe, settings, start_step=left.start_step, latents=latents, conditioning=conditioning, **ends
    )


def save_start(writer: PriorWriter, latents: torch.Tensor, conditioning: Conditioning) -> None:
    """Save what a resumed run needs in place of image, image encoder and text encoder."""
    tensors = {"latents": latents, **vars(conditioning)}
    for field, name in start_files(writer.metadata).items():
        if tensors[field] is not None:
            writer.save_tensor(name, tensors[field])
    writer.write_metadata()


def load_start(prior: Prior) -> tuple[torch.Tensor, Conditioning]:
    """The initial latents, [B, C, T, H, W], and the conditioning, as they were saved."""
    from wan_pipeline import Conditioning

    tensors = {"context_nega": None}
    for field, name in start_files(prior.metadata).items():
        tensors[field] = prior_utils.load_conditioning(prior, name)
    return tensors.pop("latents"), Conditioning(**tensors)


def save_step(writer: PriorWriter, step: Step) -> None:
    """Save the latents after a step and its guided velocity, then say in the metadata that it is whole."""
    writer.save_tensor(prior_utils.noise_pred_file(step.index), step.noise_pred)
    writer.save_tensor(prior_utils.step_file(step.index), step.latents)
    formation.record_step(writer.metadata, step)
    writer.record(step.index, seconds_per_step=step.seconds, forwards_per_step=step.forwards)
    writer.write_metadata()


def save_videos(
    writer: PriorWriter, left: Left, *, pipe: WanVideoPipeline, frames: list[Image], clock: Clock
) -> None:
    """Save the videos that are left, of the prior's own the frames if they are decoded already.

    Done after the run, so that the network never has to make room for the VAE between two steps.
    """
    from tqdm import tqdm

    from wan_pipeline import decode

    prior = writer.prior
    for name, step in tqdm(left.videos.items(), desc="videos", unit="video", disable=len(left.videos) < 2):
        if step is not None:
            frames = decode(pipe, prior_utils.load_denoised(prior, step), tiled=prior.settings.tiled)
            clock.add("decode_estimates")
        elif not frames:
            last = prior_utils.load_latents(prior, prior_utils.step_file(left.last_step))
            frames = decode(pipe, last, tiled=prior.settings.tiled)
            clock.add("decode")
        writer.save(name, functools.partial(cli.write_video, frames, fps=prior.metadata["fps"]))
        writer.write_metadata()
        clock.add("save")
