"""Run jobs with one loaded model: encode what is new, let the encoders go, then make one video after another.

Jobs and their inputs in, videos with a JSON file each out; the command line is not known here.
"""

from __future__ import annotations

import dataclasses
import sys
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

import command_line as cli
import contexts
import prior_utils
import sweep
import wan_models
from lora import check_loras
from plan import (
    IDENTITY_FILES,
    Inputs,
    latents_files,
    needed_components,
    part_of_step,
    run_settings,
    velocity_files,
)
from prior_utils import Clock, InputError
from sweep import Job
from wan_models import LoadOptions

if TYPE_CHECKING:
    import torch
    from diffsynth.pipelines.wan_video import WanVideoPipeline

    from wan_pipeline import Conditioning, RunResult

ENCODERS = ("text_encoder", "image_encoder")
JOB_ERRORS = (InputError, RuntimeError, MemoryError, OSError)  # RunError and torch's own are RuntimeErrors


@dataclass(frozen=True)
class Model:
    """The loaded components and what they are."""

    pipe: WanVideoPipeline
    options: LoadOptions
    fingerprint: Mapping[str, str]  # by component


def run_jobs(
    jobs: Sequence[Job], inputs: Mapping[Path, Inputs], *, options: LoadOptions
) -> dict[Path, Exception]:
    """Make every video; one that fails doesn't stop the others.

    Args:
        inputs: of each prior, by its folder, loaded.

    Returns:
        The errors of the videos that could not be made.

    Raises:
        InputError: weights that are missing, or are not those the priors were made with.
        RunError: weights that could not be fetched.
    """
    clock = Clock()
    model = load_model(jobs, inputs, options)
    clock.add("load")
    encode(jobs, inputs, pipe=model.pipe)
    clock.add("encode")
    shared = {phase: clock.seconds[phase] / len(jobs) for phase in ("load", "encode")}
    costs = [sweep.expected_seconds(job) for job in jobs]
    if None in costs:
        costs = [job.plan.forwards + 1 for job in jobs]
    failed: dict[Path, Exception] = {}
    bar_format = "{desc}{percentage:3.0f}%|{bar}| {elapsed}<{remaining}"
    with tqdm(total=sum(costs), smoothing=0, bar_format=bar_format, disable=len(jobs) == 1) as bar:
        for number, (job, cost) in enumerate(zip(jobs, costs, strict=True), 1):
            bar.set_description(f"video {number} of {len(jobs)}", refresh=False)
            try:
                run_job(job, inputs[job.prior.directory], model=model, shared=shared)
            except JOB_ERRORS as error:
                traceback.clear_frames(error.__traceback__)  # they hold tensors the next video needs room for
                failed[job.path] = error
            bar.update(cost)
    return failed


def load_model(jobs: Sequence[Job], inputs: Mapping[Path, Inputs], options: LoadOptions) -> Model:
    """Load the components the jobs need, and no others.

    Raises:
        InputError, RunError: see `run_jobs`.
    """
    known = {text for each in inputs.values() for text in each.contexts}
    needed = {name for job in jobs for name in needed_components(job.plan, job.prior, known=known)}
    options = dataclasses.replace(options, vram=wan_models.pick_vram(options))
    files = wan_models.weight_files(options, [name for name in wan_models.ALL_COMPONENTS if name in needed])
    for note in check_loras(options.loras, files.get("dit", [])):
        cli.warn(note)
    fingerprint = wan_models.fingerprint(files)
    for group in sweep.by_prior(jobs).values():
        prior_utils.check_fingerprint(group[0].prior, fingerprint)
    return Model(wan_models.load_pipeline(options, files), options, fingerprint)


# --- encoding -----------------------------------------------------------------------------------------------


def encode(jobs: Sequence[Job], inputs: Mapping[Path, Inputs], *, pipe: WanVideoPipeline) -> None:
    """Complete the inputs with what no prior holds, each prompt encoded once, and release the encoders."""
    from wan_pipeline import encode_image, release

    found = {text: context for each in inputs.values() for text, context in each.contexts.items()}
    for job in jobs:
        own, metadata = inputs[job.prior.directory], job.prior.metadata
        for text in job.plan.texts:
            if text not in own.contexts:
                own.contexts[text] = context_of(text, found, pipe)
                keep_context(job, text, own.contexts[text])
        if job.prior.is_legacy and job.plan.steps_to_run and not own.tensors.keys() & set(IDENTITY_FILES):
            identity = encode_image(pipe, own.image, num_frames=metadata["num_frames"])
            own.tensors.update((f"{name}.pt", tensor) for name, tensor in identity.items())
    release(pipe, ENCODERS)


def context_of(text: str, found: dict[str, torch.Tensor], pipe: WanVideoPipeline) -> torch.Tensor:
    """The context that another prior of the sweep knows or that was encoded before; else encode it now."""
    from wan_pipeline import encode_prompt

    if text not in found:
        found[text] = encode_prompt(pipe, text)
    return found[text]


def keep_context(job: Job, text: str, context: torch.Tensor) -> None:
    """Keep a context for the prior's next run; a prior that can't be written to only costs that."""
    try:
        contexts.save(job.prior, text, context)
    except (OSError, InputError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        cli.warn(f"cannot keep the encoded prompt in {job.prior.directory} ({why})")


# --- one video ----------------------------------------------------------------------------------------------


def run_job(job: Job, inputs: Inputs, *, model: Model, shared: Mapping[str, float]) -> None:
    """Make one video, then the JSON beside it, which says that the video is whole.

    Args:
        shared: this video's share of the seconds that loading and encoding took.
    """
    clock = Clock()
    result = make_video(job, inputs, pipe=model.pipe, clock=clock)
    clock.include(shared)
    prior_utils.write_json(job.report_path, report(job, inputs, model=model, result=result, clock=clock))
    seconds = sum(clock.seconds.values())
    tqdm.write(f"{job.path}: {result.forwards} forwards, {seconds:.1f} s", file=sys.stderr)


def make_video(job: Job, inputs: Inputs, *, pipe: WanVideoPipeline, clock: Clock) -> RunResult:
    """Run the job's steps and write its video."""
    result = run_steps(job, inputs, pipe=pipe)
    clock.include(result.seconds)
    job.path.parent.mkdir(parents=True, exist_ok=True)
    cli.write_video(result.frames, job.path, fps=job.plan.fps)
    clock.add("save")
    return result


def run_steps(job: Job, inputs: Inputs, *, pipe: WanVideoPipeline) -> RunResult:
    """Run the plan's steps, one after the other or differentially."""
    from wan_pipeline import Trajectory, run_differential, run_from, run_on_sigmas

    plan, settings = job.plan, run_settings(job.plan, job.prior)
    latents = [inputs.tensors[name] for name in latents_files(plan, job.prior)]
    conditioning = conditioning_of(job, inputs) if plan.steps_to_run else None
    if plan.sigmas is not None:
        begin = between(latents[0], latents[-1], part_of_step(plan, job.prior))
        return run_on_sigmas(pipe, settings, sigmas=plan.sigmas, latents=begin, conditioning=conditioning)
    if plan.method == "resume":
        return run_from(
            pipe, settings, start_step=plan.start_step, latents=latents[0], conditioning=conditioning
        )
    velocities = [inputs.tensors[name] for name in velocity_files(plan)]
    trajectory = Trajectory(plan.steps_to_run, latents, velocities)
    return run_differential(pipe, settings, trajectory=trajectory, conditioning=conditioning)


def between(begin: torch.Tensor, end: torch.Tensor, part: float) -> torch.Tensor:
    """Latents a part of the way from one to the other: an Euler step goes straight. All [B, C, T, H, W]"""
    return begin if part == 0 else begin.float().lerp(end.float(), part).to(begin.dtype)


def conditioning_of(job: Job, inputs: Inputs) -> Conditioning:
    """What the network sees besides latents: the prior's identity and the plan's prompts."""
    from wan_pipeline import Conditioning

    plan = job.plan
    return Conditioning(
        **{Path(name).stem: inputs.tensors[name] for name in IDENTITY_FILES},
        context_posi=inputs.contexts[plan.prompt],
        context_nega=None if plan.cfg_scale == 1 else inputs.contexts[plan.negative_prompt],
    )


def report(job: Job, inputs: Inputs, *, model: Model, result: RunResult, clock: Clock) -> dict[str, Any]:
    """Everything needed to make the video again, and what it cost."""
    plan, prior, options = job.plan, job.prior, model.options
    return {
        "prior_dir": str(prior.directory.absolute()),
        **sweep.settings(job, inputs),
        "auto": None if plan.auto is None else dataclasses.asdict(plan.auto),
        "image": None if plan.image is None else str(plan.image.absolute()),
        "model_dir": None if options.model_dir is None else str(options.model_dir.absolute()),
        "model_fingerprint": dict(model.fingerprint),
        "prior_lora": prior.metadata.get("lora", []),
        "dtype": options.dtype,
        "vram": options.vram,
        **cli.machine(options.device),
        "components_loaded": [name for name in wan_models.COMPONENTS if name in model.fingerprint],
        "steps_run": result.steps,
        "steps_skipped": prior.num_inference_steps - len(result.steps),
        "forwards": result.forwards,
        "block_evaluations": result.block_evaluations,
        "seconds": clock.seconds,
        "seconds_per_step": result.seconds_per_step,
        "latents_sha256": prior_utils.sha256_tensor(result.latents),
        "video_sha256": prior_utils.sha256_file(job.path),
        "versions": cli.versions(),
    }
