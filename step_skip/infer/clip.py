"""Make one clip: run a plan along its prior, and keep the result."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from step_skip.errors import InputError
from step_skip.files.reading import sha256_file
from step_skip.files.writing import check_free, write_json
from step_skip.infer.as_prior import Walk, save_clip_prior
from step_skip.infer.inputs import Source
from step_skip.infer.measures import measures_of
from step_skip.infer.plan import Plan, latents_files, nega_files, part_of_step, settings_of
from step_skip.infer.report import describe_clip, video_tags
from step_skip.media.videos import write_video
from step_skip.method.closeness import FirstLook
from step_skip.method.steps import guidance_decay
from step_skip.models.loading import Model
from step_skip.pipeline.results import RunResult
from step_skip.prior.prior import (
    Prior,
    identity_file,
    latents_before_file,
    noise_pred_file,
    noise_pred_nega_file,
    step_file,
)

if TYPE_CHECKING:
    import torch
    from diffsynth.pipelines.wan_video import WanVideoPipeline
    from PIL.Image import Image

    from step_skip.method.differential import Trajectory
    from step_skip.pipeline.conditioning import Conditioning
    from step_skip.pipeline.run import Pause
    from step_skip.pipeline.schedulers import ProgressCallback


@dataclass
class Clip:
    """A video made from a prior, and how."""

    frames: list[Image]
    latents: torch.Tensor  # clean, [B, C, T, H, W]
    forwards: int  # network evaluations
    seconds: dict[str, float]  # by phase: load, encode, denoise, decode ...
    report: dict[str, Any]  # all that is needed to make it again, and its measures (measures.py)
    walk: Walk | None = None  # what it takes to make it a prior; of a differential resume

    def save(self, path: str | Path, *, overwrite: bool = False) -> Path:
        """Write the .mp4, then beside it the .json that says that it is whole, and how it was made.

        Raises:
            TakenError: one of both exists, and may not be replaced.
            InputError: the name doesn't end in .mp4.
            DiskError: whatever the disk refused.
        """
        path = Path(path)
        if path.suffix != ".mp4":
            raise InputError(f"{path}: expected a name that ends in .mp4")
        if not overwrite:
            check_free(path, path.with_suffix(".json"))
        path.parent.mkdir(parents=True, exist_ok=True)
        begin = time.perf_counter()
        fps, tags = self.report["fps"], video_tags(self.report)
        write_video(self.frames, path, fps=fps, overwrite=overwrite, tags=tags)
        self.seconds["save"] = time.perf_counter() - begin
        write_json(path.with_suffix(".json"), self.report_of(path), overwrite=overwrite)
        return path

    def save_prior(self, output_dir: str | Path, *, run_id: str | None = None) -> Prior:
        """Make it a prior for its variations: `output_dir/run_<id>`, which keeps the few steps it took.

        Raises:
            InputError: no differential resume from the first step on, or one with caches or guidance by step;
                the run id is taken, or the folder can't be written.
        """
        if self.walk is None:
            raise InputError("only a clip of a differential resume (num_steps, steps) can be made a prior")
        return save_clip_prior(
            self.walk,
            Path(output_dir),
            frames=self.frames,
            report=self.report,
            seconds=self.seconds,
            run_id=run_id,
        )

    def report_of(self, path: Path) -> dict[str, Any]:
        """Return the JSON to write beside the .mp4 of the clip."""
        made = {"video_sha256": sha256_file(path), "video_bytes": path.stat().st_size}
        return self.report | {"seconds": self.seconds} | made


# --- one clip -----------------------------------------------------------------------------------------------


def make_clip(
    source: Source,
    plan: Plan,
    model: Model,
    *,
    callback: ProgressCallback | None = None,
    progress: bool = True,
    pause: Pause | None = None,
) -> Clip:
    """Run a plan of a prior whose inputs are complete, or what is left of it after a pause."""
    result = run_plan(source, plan, model.pipe, callback=callback, progress=progress, pause=pause)
    report = describe_clip(source, plan, model, result)
    begin = time.perf_counter()
    report |= measures_of(result.frames)
    return Clip(
        result.frames,
        result.latents,
        result.forwards,
        result.seconds | {"measure": time.perf_counter() - begin},
        report,
        walk_of(source, plan, result),
    )


def walk_of(source: Source, plan: Plan, result: RunResult) -> Walk | None:
    """Return what it takes to make the clip of a differential resume a prior; None for other clips."""
    if result.first_look is None:
        return None
    followed = source.members[result.first_look.nearest].prior
    return Walk(followed, plan, result.path, conditioning_of(plan, source))


def run_plan(
    source: Source,
    plan: Plan,
    pipe: WanVideoPipeline,
    *,
    callback: ProgressCallback | None = None,
    progress: bool = True,
    pause: Pause | None = None,
) -> RunResult:
    """Run the plan's steps: after one of the prior's, differentially, or on sigmas of their own.

    Args:
        pause: to run the steps of one expert, and in another call those of the other.
    """
    from step_skip.pipeline.run import run_differential, run_from, run_on_sigmas
    from step_skip.pipeline.schedulers import reporting_to

    prior, tensors = source.prior, source.inputs.tensors
    settings = settings_of(plan, prior)
    latents = [tensors[name] for name in latents_files(plan, prior)]
    on_step = reporting_to(callback, plan.steps_to_run)
    negas = [tensors[name] for name in nega_files(plan, prior)]
    known_nega = negas[0] if plan.knows_nega else None
    if plan.sigmas is not None:
        return run_on_sigmas(
            pipe,
            settings,
            sigmas=plan.sigmas,
            latents=between(latents[0], latents[-1], part_of_step(plan, prior)),
            conditioning=conditioning_of(plan, source),
            on_step=on_step,
            progress=progress,
            pause=pause,
        )
    if plan.start_step is not None:
        return run_from(
            pipe,
            settings,
            start_step=plan.start_step,
            latents=latents[0],
            conditioning=conditioning_of(plan, source) if plan.steps_to_run else None,
            known_nega=known_nega,
            on_step=on_step,
            progress=progress,
            pause=pause,
        )
    return run_differential(
        pipe,
        settings,
        paths=first_look(source, plan),
        conditioning=conditioning_of(plan, source),
        known_nega=known_nega,
        on_step=on_step,
        progress=progress,
        pause=pause,
    )


def first_look(source: Source, plan: Plan) -> FirstLook:
    """Return the paths that a differential resume may take, of a prior or of each prior of a bank."""
    paths = [tuple(plan.steps_to_run)] if plan.paths is None else plan.paths
    trajectories = [
        {len(steps): trajectory_of(member, plan, steps) for steps in paths} for member in source.members
    ]
    return FirstLook(
        trajectories,
        closeness=math.inf if plan.closeness is None else plan.closeness,
        cfg_scale=plan.first_cfg_scale,
        own=[member.prior.metadata.expected_closeness or math.inf for member in source.members],
    )


def trajectory_of(source: Source, plan: Plan, steps: Sequence[int]) -> Trajectory:
    """Return a prior's own path at these of its steps."""
    from step_skip.method.differential import Trajectory

    prior, tensors = source.prior, source.inputs.tensors
    last = step_file(prior.num_inference_steps - 1)
    latents = [tensors[name] for name in (*map(latents_before_file, steps), last)]
    velocities = [tensors[noise_pred_file(step)] for step in steps]
    known = prior.keeps_nega and plan.cfg_scale != 1
    negas = [tensors[noise_pred_nega_file(step)] for step in steps] if known else []
    return Trajectory(steps, latents, velocities, **guidance_of(prior, steps, negas))


def guidance_of(prior: Prior, steps: Sequence[int], negas: Sequence[torch.Tensor]) -> dict[str, Any]:
    """Return the entries of a Trajectory on the prior's guidance, as far as it is recorded."""
    sigmas = prior.metadata.scheduler_sigmas
    distances = prior.metadata.formation.branch_distances or []
    if not negas or len(distances) != len(sigmas):
        return {}
    decay = guidance_decay(distances, steps, sigmas=sigmas)
    return {
        "noise_pred_nega": negas,
        "cfg_scale": [prior.guidance[step] for step in steps],
        "guidance_decay": decay,
    }


def between(begin: torch.Tensor, end: torch.Tensor, part: float) -> torch.Tensor:
    """Interpolate linearly between two latents, as an Euler step does. All [B, C, T, H, W]"""
    return begin if part == 0 else begin.float().lerp(end.float(), part).to(begin.dtype)


def conditioning_of(plan: Plan, source: Source) -> Conditioning:
    """Return what the network sees besides latents: the prior's identity and the plan's prompts."""
    from step_skip.pipeline.conditioning import Conditioning

    tensors, contexts = source.inputs.tensors | source.inputs.encoded, source.inputs.contexts
    return Conditioning(
        identity={name: tensors[identity_file(name)] for name in source.prior.identity_names},
        context_posi=contexts[plan.prompt],
        context_nega=None if plan.cfg_scale == 1 else contexts[plan.negative_prompt],
    )
