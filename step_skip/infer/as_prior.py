"""A clip as a prior for its variations.

The clip of a differential resume is a path, too, with latents and velocities at the few steps it took. Saved
in a prior's format it can be followed like one that was pruned to these steps, and what is near to it takes
fewer of them than it took. It comes as near to a full run as the clip did, not nearer.

Between these steps there is nothing: it is not resumed after a step, and how guidance fades over a step is
what the prior that it followed says of that.
"""

from __future__ import annotations

import functools
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from step_skip.errors import InputError
from step_skip.files.tensors import sha256_tensor
from step_skip.files.writing import locked
from step_skip.infer.plan import Plan
from step_skip.media.videos import write_video
from step_skip.prior.files import check_files, read_own_file
from step_skip.prior.prior import (
    MADE_OF_CLIP,
    OUTPUT_FILE,
    Prior,
    context_file,
    identity_file,
    latents_before_file,
    noise_pred_file,
    noise_pred_nega_file,
    step_file,
)
from step_skip.prior.schema import FORMATION_KEY, Metadata
from step_skip.prior.writer import PriorWriter, create_run_dir

if TYPE_CHECKING:
    from PIL.Image import Image

    from step_skip.pipeline.conditioning import Conditioning
    from step_skip.pipeline.schedulers import Step

# Entries of the followed prior's metadata that hold for its own run alone.
NOT_TAKEN_OVER: Final = frozenset(
    ("run_id", "status", "files", "shapes", "metadata_sha256", FORMATION_KEY, "seconds_per_step")
) | {"peak_memory", "start_step_chosen"}
FROM_REPORT: Final = (  # the clip's own, by the same names
    *("prompt", "negative_prompt", "fps", "tiled", "lora", "dtype", "forwards"),
    *("device", "device_name", "num_threads", "attention", "vram", "versions", "latents_sha256"),
    *("peak_memory", "seconds_per_step"),
)


@dataclass(frozen=True)
class Walk:
    """How a clip came about along the prior that it followed."""

    prior: Prior
    plan: Plan
    steps: Sequence[Step]  # on the CPU
    conditioning: Conditioning


def check_clip_prior(plan: Plan, prior: Prior) -> None:
    """Refuse what can't be made a prior: a path that begins late, or isn't as its own prompt would run it.

    Raises:
        InputError: saying why; or an image of the followed prior is damaged, which the new one takes over.
    """
    can = "a clip can be made a prior"
    if plan.method != "differential" or plan.steps_to_run[0] != 0:
        raise InputError(
            f"{can} if it is a differential resume from step 0 on: leave --start_step and --sigmas out, and "
            "begin --steps with 0"
        )
    if (plan.skip_cache, plan.tea_cache_l1_thresh) != (None, None):
        raise InputError(f"{can} without --skip_cache and TeaCache, with which its steps are not its own")
    guidance_by_expert(plan, prior)
    check_files(prior, prior.image_files)


def guidance_by_expert(plan: Plan, prior: Prior) -> dict[str, float]:
    """Return the cfg_scale of each expert that ran; a single network is "dit".

    Raises:
        InputError: it differs from step to step of one of them.
    """
    scales = plan.cfg_scale
    each = scales if isinstance(scales, tuple) else (scales,) * len(plan.steps_to_run)
    found: dict[str, float] = {}
    for step, scale in zip(plan.steps_to_run, each, strict=True):
        if found.setdefault(prior.expert_of(step), scale) != scale:
            raise InputError("a clip can be made a prior if all its steps have one --cfg_scale")
    return found


def save_clip_prior(
    walk: Walk,
    output_dir: Path,
    *,
    frames: list[Image],
    report: Mapping[str, Any],
    seconds: Mapping[str, float],
    run_id: str | None = None,
) -> Prior:
    """Write `output_dir/run_<id>`, in the format of a pruned prior (prior.py, prune.py).

    Raises:
        InputError: see `check_clip_prior`; the run id is taken, or the folder can't be written.
    """
    check_clip_prior(walk.plan, walk.prior)
    directory, run_id = create_run_dir(output_dir, run_id, name=walk.prior.metadata.run_id)
    writer = PriorWriter(
        directory, describe_walk(walk, report, seconds).model_copy(update={"run_id": run_id})
    )
    try:
        with locked(directory):
            for name in walk.prior.image_files:
                content = read_own_file(walk.prior, name)
                writer.save(name, functools.partial(Path.write_bytes, data=content))
            for name, tensor in tensors_of(walk).items():
                writer.save_tensor(name, tensor)
            writer.save(OUTPUT_FILE, functools.partial(write_video, frames, fps=report["fps"]))
            writer.finish("complete")
    except BaseException:
        shutil.rmtree(directory, ignore_errors=True)  # nothing could finish it
        raise
    return writer.prior


def describe_walk(walk: Walk, report: Mapping[str, Any], seconds: Mapping[str, float]) -> Metadata:
    """Return the metadata of a clip as a prior, without its files and its run id."""
    own, recorded = report, walk.prior.metadata
    inherited = {name: value for name, value in recorded.recorded().items() if name not in NOT_TAKEN_OVER}
    guidance = guidance_by_expert(walk.plan, walk.prior)
    inherited["cfg_scale"] = guidance.get("dit", recorded.cfg_scale)
    if "dit2" in guidance:
        inherited["cfg_scale_2"] = guidance["dit2"]
    entries = {
        **inherited,
        **{name: own[name] for name in FROM_REPORT if own.get(name) is not None},
        "quantize": walk.plan.quantize,
        "compile": walk.plan.compile,
        **{"skip_cache": None, "tea_cache_l1_thresh": None, "tea_cache_model_id": ""},
        "created": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "prior_kind": MADE_OF_CLIP,
        "followed": recorded.run_id,
        "expected_closeness": own["predicted_closeness"],
        "kept_steps": [step.index for step in walk.steps],
        "keeps_nega": all(step.noise_pred_nega is not None for step in walk.steps),
        "forwards_per_step": [step.forwards for step in walk.steps],
        "latents_sha256": sha256_tensor(walk.steps[-1].latents),
        "seconds": dict(seconds),
        FORMATION_KEY: {"branch_distances": recorded.formation.branch_distances},
    }
    return Metadata.model_validate(entries)


def tensors_of(walk: Walk) -> dict[str, Any]:
    """Return every tensor of the prior by its file: the path, the contexts and the identity."""
    plan, conditioning = walk.plan, walk.conditioning
    files = {context_file(plan.prompt): conditioning.context_posi}
    if conditioning.context_nega is not None:
        files[context_file(plan.negative_prompt)] = conditioning.context_nega
    files |= {identity_file(name): tensor for name, tensor in conditioning.identity.items()}
    for step in walk.steps:
        files[latents_before_file(step.index)] = step.latents_before
        files[noise_pred_file(step.index)] = step.noise_pred
        if step.noise_pred_nega is not None:
            files[noise_pred_nega_file(step.index)] = step.noise_pred_nega
    files[step_file(walk.prior.num_inference_steps - 1)] = walk.steps[-1].latents
    return files
