"""Make videos from priors: encode what is new, run the steps of a plan, keep the clip.

`infer_from_prior` makes one, on a pipeline that is loaded. `run_jobs` makes many, loads the model itself, and
only the parts it needs. Both end in `make_clip`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from step_skip.bank import check_one_bank, plan_clip
from step_skip.clip_prior import Walk, save_clip_prior
from step_skip.closeness import FirstLook
from step_skip.command import command_of, video_tags
from step_skip.compute import OFF
from step_skip.contexts import ContextStore
from step_skip.families import MODELS
from step_skip.files import InputError, check_free, sha256_file, sha256_tensor, write_json
from step_skip.inputs import know_contexts, load_inputs
from step_skip.loading import Model, describe_machine, installed_versions, model_of
from step_skip.lora import summarize_loras
from step_skip.made import describe_settings
from step_skip.measures import measures_of
from step_skip.media import write_video
from step_skip.memory import peak_memory
from step_skip.metadata import read_prior
from step_skip.models import COMPONENTS, LoadOptions
from step_skip.plan import (
    Choices,
    Plan,
    latents_files,
    nega_files,
    part_of_step,
    settings_of,
)
from step_skip.plan_steps import number_of_steps
from step_skip.prior import (
    Prior,
    identity_file,
    latents_before_file,
    noise_pred_file,
    noise_pred_nega_file,
    step_file,
)
from step_skip.results import RunResult
from step_skip.steps import FORMATION_KEY, guidance_decay
from step_skip.sweep import Group, Job, make_group
from step_skip.words import warn_of_embedded

if TYPE_CHECKING:
    import torch
    from diffsynth.pipelines.wan_video import WanVideoPipeline
    from PIL.Image import Image

    from step_skip.differential import Trajectory
    from step_skip.hooks import Conditioning
    from step_skip.pipeline import Pause
    from step_skip.schedule import ProgressCallback

log = logging.getLogger(__name__)


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
        return save_clip_prior(self, self.walk, Path(output_dir), run_id=run_id)

    def report_of(self, path: Path) -> dict[str, Any]:
        """What is written beside the .mp4 that was made of it."""
        made = {"video_sha256": sha256_file(path), "video_bytes": path.stat().st_size}
        return self.report | {"seconds": self.seconds} | made


def infer_from_prior(
    pipe: WanVideoPipeline | Model,
    prior: Prior | str | Path | Sequence[Prior | str | Path],
    prompt: str | None = None,
    *,
    negative_prompt: str | None = None,
    cfg_scale: float | Sequence[float] | None = None,
    cfg_scale_2: float | None = None,
    steps: Sequence[int] | None = None,
    num_steps: int | Literal["auto"] | None = None,
    closeness: float | None = None,
    start_step: int | Literal["auto"] | None = None,
    num_steps_after: int | None = None,
    text_share: float | None = None,
    sigmas: Sequence[float] | None = None,
    skip_cache: int | None = None,
    tea_cache_l1_thresh: float | None = None,
    tea_cache_model_id: str | None = None,
    tiled: bool | Literal["auto"] | None = None,
    fps: float | None = None,
    image: str | Path | Image | None = None,
    callback_on_step_end: ProgressCallback | None = None,
    progress: bool = True,
) -> Clip:
    """Make a video of a prior's identity in a few of its steps. Nothing is written but kept contexts.

    Args:
        pipe: any WanVideoPipeline, or what `load` gives; it is left as it was found.
        prior: what `generate_prior` returned, or its folder; of several that begin alike the nearest.
        prompt: the new motion; None: the prior's own prompt, which gives the prior's own video, bit for bit.
        negative_prompt, cfg_scale: None: the prior's; cfg_scale may have one value for each step that runs.
        cfg_scale_2: of two experts the low-noise one's.
        steps, num_steps: a differential resume at these steps, or at so many; the default is 3 of 10.
        closeness: with num_steps "auto": to a full run, in dB; as few steps as are expected to reach it.
        start_step: a resume after this step instead, or "auto" (with text_share, 0 ... 1).
        num_steps_after: with start_step: in so many steps to the end.
        sigmas: a schedule of its own instead (1 is noise), begun on the prior's path.
        skip_cache, tea_cache_l1_thresh, tea_cache_model_id: cheaper steps.
        tiled: False decodes whole frames, True in tiles, "auto" by sizes; None: as the prior's own video was.
        image: only a prior of the pull request's scripts needs it.
        callback_on_step_end: called after each step with (step, steps, denoised).
        progress: show progress bars.

    Raises:
        InputError: a prior that is damaged or doesn't fit, or choices that contradict it.
        RunError: latents became NaN or infinite.
    """
    from step_skip.schedule import check_installed_schedule

    model = model_of(pipe)
    given = [prior] if isinstance(prior, Prior | str | Path) else prior
    bank = [each if isinstance(each, Prior) else read_prior(Path(each)) for each in given]
    check_one_bank(bank)
    choices = Choices(
        prompt=prompt,
        negative_prompt=negative_prompt,
        cfg_scale=cfg_scale,
        cfg_scale_2=cfg_scale_2,
        steps=steps,
        num_steps=num_steps,
        closeness=closeness,
        start_step=start_step,
        num_steps_after=num_steps_after,
        text_share=text_share,
        sigmas=sigmas,
        skip_cache=skip_cache,
        tea_cache_l1_thresh=tea_cache_l1_thresh,
        tea_cache_model_id=tea_cache_model_id,
        fps=fps,
        image=Path(image) if isinstance(image, str) else image,
        lora=model.options.loras,
        quantize=model.options.quantize or OFF,
        compile=model.options.compile or OFF,
        tiled=tiled,
        dtype=model.options.dtype,
    )
    plan = plan_clip(choices, bank)
    group = make_group(bank, [Job(bank[0], plan)])
    with contextlib.redirect_stdout(sys.stderr):
        check_installed_schedule(group.prior)
        load_inputs(group)
        model.check(group.prior)
        for difference in what_differs(group):
            log.warning(difference)
        warn_of_words([group], model.options)
        begin = time.perf_counter()
        encode_new(group, model, ContextStore())
        encoded = time.perf_counter() - begin
        clip = make_clip(group, group.plans[0], model, callback=callback_on_step_end, progress=progress)
        clip.seconds["encode"] = encoded
        return clip


def what_differs(group: Group) -> Iterator[str]:
    """Where the prior was made in another way, so that its own prompt won't give its own video."""
    plan, prior = group.jobs[0].plan, group.prior
    own, given = (summarize_loras(each) for each in (prior.metadata.get("lora", []), plan.lora))
    if own != given:
        yield f"runs with {given}, and the prior was made with {own}: a mix of two models, as asked for"
    for name in ("quantize", "compile"):
        then, now = prior.metadata.get(name) or OFF, getattr(plan, name) or OFF
        if then != now:
            yield (
                f"runs with --{name} {now}, and the prior was made with {then}: its own prompt gives nearly "
                "its own video"
            )
    if prior.metadata.get("lora") and plan.model in MODELS and "vram" not in prior.metadata:
        yield (
            "the prior doesn't record its --vram: with low, an earlier version added LoRAs while it ran, and "
            "the last bits differ"
        )
    if plan.tiled is not None:
        yield "decodes with another --vae_tiling than the prior: the same latents, nearly the same frames"
    for name in ("skip_cache", "tea_cache_l1_thresh"):
        value = prior.metadata.get(name)
        if value is not None and value != getattr(plan, name):
            yield (
                f"the prior was made with --{name} {value}, which is not taken over; give it, too, to have "
                "steps as cheap, and without it the prior's own prompt gives nearly the prior's video"
            )


def warn_of_words(groups: Iterable[Group], options: LoadOptions) -> None:
    """Say what the embedded model doesn't understand of the prompts that are not their priors' own."""
    texts: dict[str, None] = {}
    for group in groups:
        own = {group.prior.metadata.get(name) for name in ("prompt", "negative_prompt")}
        texts |= dict.fromkeys(text for text in group.texts if text not in own)
    warn_of_embedded(options, texts)


# --- encoding -----------------------------------------------------------------------------------------------


def encode_new(group: Group, model: Model, store: ContextStore) -> None:
    """Complete a group's inputs with what its priors don't hold, each prompt encoded once.

    What one prior's folder holds is never given to another: it may come from a stranger.
    """
    for text in know_contexts(group, store):
        group.inputs.contexts[text] = encode_text(group.prior, text, model, store)
    encode_identity(group, model)


def encode_text(prior: Prior, text: str, model: Model, store: ContextStore) -> torch.Tensor:
    """A prompt's context, on the CPU: VRAM is for what runs."""
    from step_skip import pipeline

    def encode(text: str) -> torch.Tensor:
        model.require("text_encoder", f"encode {text[:40]!r}")
        return pipeline.encode_prompt(model.pipe, text).cpu()

    return store.encode(prior, text, encode)


def encode_identity(group: Group, model: Model) -> None:
    """What the network sees of an older prior's image, which holds only latents."""
    from step_skip.pipeline import encode_image

    prior, own = group.prior, group.inputs
    runs = any(plan.steps_to_run for plan in group.plans)
    if prior.is_legacy and runs and not own.encoded and own.image is not None:  # its plans name one
        model.require("image_encoder", "encode the image")
        identity = encode_image(model.pipe, own.image, num_frames=prior.metadata["num_frames"])
        own.encoded = {identity_file(name): tensor for name, tensor in identity.items()}


# --- one clip -----------------------------------------------------------------------------------------------


def make_clip(
    group: Group,
    plan: Plan,
    model: Model,
    *,
    callback: ProgressCallback | None = None,
    progress: bool = True,
    pause: Pause | None = None,
) -> Clip:
    """Run a plan of a prior whose inputs are complete, or what is left of it after a pause."""
    result = run_plan(group, plan, model.pipe, callback=callback, progress=progress, pause=pause)
    report = describe_clip(group, plan, model, result)
    begin = time.perf_counter()
    report |= measures_of(result.frames)
    return Clip(
        result.frames,
        result.latents,
        result.forwards,
        result.seconds | {"measure": time.perf_counter() - begin},
        report,
        walk_of(group, plan, result),
    )


def walk_of(group: Group, plan: Plan, result: RunResult) -> Walk | None:
    """What makes a prior of the clip of a differential resume."""
    if result.first_look is None:
        return None
    followed = group.members[result.first_look.nearest].prior
    return Walk(followed, plan, result.path, conditioning_of(plan, group))


def run_plan(
    group: Group,
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
    from step_skip.pipeline import run_differential, run_from, run_on_sigmas
    from step_skip.schedule import reporting_to

    prior, tensors = group.prior, group.inputs.tensors
    settings = settings_of(plan, prior)
    latents = [tensors[name] for name in latents_files(plan, prior)]
    on_step = reporting_to(callback, plan.steps_to_run)
    conditioning = conditioning_of(plan, group) if plan.steps_to_run else None
    negas = [tensors[name] for name in nega_files(plan, prior)]
    known_nega = negas[0] if plan.knows_nega else None
    run: Callable[..., RunResult]
    if plan.sigmas is not None:
        begin = between(latents[0], latents[-1], part_of_step(plan, prior))
        run = functools.partial(run_on_sigmas, sigmas=plan.sigmas, latents=begin)
    elif plan.start_step is not None:
        run = functools.partial(
            run_from, start_step=plan.start_step, latents=latents[0], known_nega=known_nega
        )
    else:
        run = functools.partial(run_differential, paths=first_look(group, plan), known_nega=known_nega)
    return run(pipe, settings, conditioning=conditioning, on_step=on_step, progress=progress, pause=pause)


def first_look(group: Group, plan: Plan) -> FirstLook:
    """The paths that a differential resume may take, of a prior or of each of a bank."""
    paths = [tuple(plan.steps_to_run)] if plan.paths is None else plan.paths
    trajectories = [
        {len(steps): trajectory_of(member, plan, steps) for steps in paths} for member in group.members
    ]
    return FirstLook(
        trajectories,
        closeness=math.inf if plan.closeness is None else plan.closeness,
        cfg_scale=plan.first_cfg_scale,
        own=[member.prior.metadata.get("expected_closeness") or math.inf for member in group.members],
    )


def trajectory_of(group: Group, plan: Plan, steps: Sequence[int]) -> Trajectory:
    """A prior's own path at these of its steps."""
    from step_skip.differential import Trajectory

    prior, tensors = group.prior, group.inputs.tensors
    last = step_file(prior.num_inference_steps - 1)
    latents = [tensors[name] for name in (*map(latents_before_file, steps), last)]
    velocities = [tensors[noise_pred_file(step)] for step in steps]
    known = prior.keeps_nega and plan.cfg_scale != 1
    negas = [tensors[noise_pred_nega_file(step)] for step in steps] if known else []
    return Trajectory(steps, latents, velocities, **guidance_of(prior, steps, negas))


def guidance_of(prior: Prior, steps: Sequence[int], negas: Sequence[torch.Tensor]) -> dict[str, Any]:
    """What a Trajectory says of the prior's guidance, as far as it is recorded."""
    sigmas = prior.metadata["scheduler_sigmas"]
    distances = prior.metadata.get(FORMATION_KEY, {}).get("branch_distances") or []
    if not negas or len(distances) != len(sigmas):
        return {}
    decay = guidance_decay(distances, steps, sigmas=sigmas)
    return {
        "noise_pred_nega": negas,
        "cfg_scale": [prior.guidance[step] for step in steps],
        "guidance_decay": decay,
    }


def between(begin: torch.Tensor, end: torch.Tensor, part: float) -> torch.Tensor:
    """Latents a part of the way from one to the other: an Euler step goes straight. All [B, C, T, H, W]"""
    return begin if part == 0 else begin.float().lerp(end.float(), part).to(begin.dtype)


def conditioning_of(plan: Plan, group: Group) -> Conditioning:
    """What the network sees besides latents: the prior's identity and the plan's prompts."""
    from step_skip.hooks import Conditioning

    tensors, contexts = group.inputs.tensors | group.inputs.encoded, group.inputs.contexts
    return Conditioning(
        identity={name: tensors[identity_file(name)] for name in group.prior.identity_names},
        context_posi=contexts[plan.prompt],
        context_nega=None if plan.cfg_scale == 1 else contexts[plan.negative_prompt],
    )


def describe_clip(group: Group, plan: Plan, model: Model, result: RunResult) -> dict[str, Any]:
    """Everything needed to make the video again, and what it cost."""
    look, options = result.first_look, model.options
    prior = group.members[look.nearest if look else 0].prior
    report = {
        "prior_dir": str(prior.directory.absolute()),
        "prior_prompt": prior.metadata.get("prompt"),
        "prior_image": prior.image_name,
        **describe_settings(group, plan),
        "prior_run_id": prior.metadata["run_id"],
        **(look.describe() if look else {}),
        "auto": None if plan.auto is None else dataclasses.asdict(plan.auto),
        "image": str(plan.image.absolute()) if isinstance(plan.image, Path) else None,
        "model_dir": None if options.model_dir is None else str(options.model_dir.absolute()),
        "model_fingerprint": dict(model.fingerprint),
        "prior_lora": prior.metadata.get("lora", []),
        "dtype": options.dtype,
        "vram": options.vram,
        "peak_memory": peak_memory(options.device),
        **describe_machine(options.device),
        "components_loaded": [name for name in COMPONENTS if name in model.fingerprint],
        "prior_steps": min(number_of_steps(member.prior) for member in group.members),
        "steps_run": result.steps,
        "steps_skipped": prior.num_inference_steps - len(result.steps),
        "forwards": result.forwards,
        "block_evaluations": result.block_evaluations,
        "seconds_per_step": result.seconds_per_step,
        "latents_sha256": sha256_tensor(result.latents),
        "versions": installed_versions(),
    }
    return report | {"command": command_of(report, prior)}
