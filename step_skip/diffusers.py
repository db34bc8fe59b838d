"""The method on diffusers' WanImageToVideoPipeline: the same mathematics, and priors in the same format.

    from step_skip.diffusers import generate_prior, infer_from_prior

    prior = generate_prior(pipe, "face.jpg", prompt="she stays still", num_inference_steps=50)
    frames = infer_from_prior(pipe, prior, prompt="she speaks").frames

Nothing of diffusers is changed. For the length of one call

    pipe.scheduler    is one of schedule.py or differential.py, as diffusers calls it (Adapted)
    pipe.transformer  has a forward hook, which sees both branches of guidance and what the network is given

and latents and prompt_embeds are arguments of the pipeline's own. It keeps its latents in float32, whatever
its network's dtype, and so does a prior made here. Checked against diffusers 0.42.1.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from step_skip.errors import InputError
from step_skip.files.tensors import sha256_tensor
from step_skip.files.writing import locked
from step_skip.generate.choices import PriorChoices, check_prior_choices
from step_skip.generate.formation import save_formation
from step_skip.generate.pictures import id_of, read_pictures
from step_skip.generate.plan import plan_prior
from step_skip.generate.run import save_start, save_step, save_video
from step_skip.infer.choices import Choices
from step_skip.infer.clip import trajectory_of
from step_skip.infer.inputs import Source, know_contexts, load_inputs
from step_skip.infer.plan import latents_files, make_plan
from step_skip.models.families import DEFAULT_FAMILY, FAMILIES
from step_skip.models.loading import OWN_PIPELINE, UNVERIFIED, fingerprint_parameters
from step_skip.models.weights import LoadOptions, model_defaults
from step_skip.pipeline.conditioning import Conditioning
from step_skip.pipeline.hooks import hooked
from step_skip.pipeline.results import Clock, RunResult
from step_skip.pipeline.run import check_finite
from step_skip.pipeline.schedulers import (
    DifferentialScheduler,
    ReportingScheduler,
    ResumableScheduler,
    Step,
    StepCallback,
)
from step_skip.prior.contexts import ContextStore
from step_skip.prior.metadata import read_prior
from step_skip.prior.pictures import read_own_image
from step_skip.prior.prior import IMAGE_FILE, OUTPUT_FILE, Prior
from step_skip.prior.schema import RecordedImage
from step_skip.prior.writer import PriorWriter, create_run_dir

if TYPE_CHECKING:
    from diffusers import WanImageToVideoPipeline
    from PIL.Image import Image

log = logging.getLogger(__name__)

FAMILY = FAMILIES[DEFAULT_FAMILY]
TEXT_TOKENS = 512  # of a prompt, as WanImageToVideoPipeline pads it
NOT_HERE = {  # of PriorChoices, what DiffSynth's pipeline alone does
    *("denoising_strength", "stop_after", "save_decoded_videos", "tiled", "cfg_scale_2"),
    *("switch_DiT_boundary", "skip_cache", "tea_cache_l1_thresh", "tea_cache_model_id"),
}


def generate_prior(
    pipe: WanImageToVideoPipeline,
    image: str | Path | Image,
    prompt: str = "",
    *,
    output_dir: str | Path = "prior_output",
    run_id: str | None = None,
    **choices: Any,
) -> Prior:
    """Make a prior: a full run of the pipeline by Euler steps, with everything kept in a folder.

    Args:
        pipe: of Wan2.1; it is left as it was found, and its own scheduler isn't used.
        image: the first frame, a path or a PIL image.
        prompt: what happens in the prior's own video; best is one that holds still.
        output_dir, run_id: the folder is `output_dir/run_<run_id>`; None: the name of the image's file.
        choices: of PriorChoices what diffusers can do: num_inference_steps, cfg_scale (its guidance_scale),
            sigma_shift, seed, negative_prompt, height, width, num_frames, fps, fit, background.

    Raises:
        InputError: a pipeline, a choice or an image that can't be used.
        RunError: latents became NaN or infinite.
    """
    check_pipeline(pipe)
    for name in choices.keys() & NOT_HERE:
        raise InputError(f"{name} is none of the choices on a pipeline of diffusers; leave it out")
    wanted = PriorChoices(**choices)
    check_prior_choices(wanted)
    options = LoadOptions(OWN_PIPELINE, str(pipe.device), "float32", vram="own")
    defaults = model_defaults(options.model, None)
    wanted, pictures = read_pictures({IMAGE_FILE: image}, wanted, defaults=defaults, family=FAMILY)
    planned = plan_prior(options, wanted, family=DEFAULT_FAMILY)
    cfg_scale = one_guidance(planned.cfg_scale or defaults.cfg_scale)
    contexts = [encode(pipe, text) for text in (prompt, planned.negative_prompt or "")]
    directory, run_id = create_run_dir(Path(output_dir), run_id, name=id_of(pictures, prompt))
    begun = {
        "run_id": run_id,
        "prompt": prompt,
        "prior_kind": "prompted" if prompt else "neutral",
        "created": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "model_fingerprint": {},
        "parameter_fingerprint": {"transformer": fingerprint_parameters(pipe.transformer)},
        "images": {name: RecordedImage(**picture.record) for name, picture in pictures.items()},
        "attention": "diffusers",
        "versions": planned.versions | {"diffusers": version("diffusers")},
    }
    with locked(directory):
        writer = PriorWriter(directory, planned.model_copy(update=begun))
        writer.save(IMAGE_FILE, pictures[IMAGE_FILE].image.save)
        result = run(
            pipe,
            writer.prior,
            ResumableScheduler(),
            contexts=contexts,
            cfg_scale=cfg_scale,
            on_start=lambda latents, conditioning: save_start(writer, latents, conditioning),
            on_step=lambda step: save_step(writer, step),
        )
        save_video(writer, OUTPUT_FILE, result.frames)
        save_formation(writer)
        known = {"forwards": result.forwards, "seconds": result.seconds}
        writer.finish("complete", latents_sha256=sha256_tensor(result.latents), **known)
    return writer.prior


def infer_from_prior(
    pipe: WanImageToVideoPipeline,
    prior: Prior | str | Path,
    prompt: str | None = None,
    *,
    negative_prompt: str | None = None,
    cfg_scale: float | None = None,
    steps: Sequence[int] | None = None,
    num_steps: int | None = None,
    start_step: int | Literal["auto"] | None = None,
) -> RunResult:
    """Make a clip of a prior's identity in a few of its steps; `frames` are PIL images. Nothing is written.

    Args:
        pipe: of Wan2.1, with the prior's weights; it is left as it was found.
        prior: of `generate_prior` here or of DiffSynth's pipeline, or its folder.
        prompt: the new motion; None: the prior's own, which gives its own latents, bit for bit, if it was
            made by this pipeline.
        negative_prompt, cfg_scale: None: the prior's.
        steps, num_steps: a differential resume at these steps, or at so many.
        start_step: a plain resume after this step instead, or "auto".

    Raises:
        InputError: a prior that is damaged or doesn't fit, or choices that contradict it.
        RunError: latents became NaN or infinite.
    """
    check_pipeline(pipe)
    prior = prior if isinstance(prior, Prior) else read_prior(Path(prior))
    if prior.image_files != [IMAGE_FILE] or prior.identity_names != list(FAMILY.conditioning):
        raise InputError(f"{prior.directory} is no prior of a Wan2.1 image-to-video model; use another one")
    choices = Choices(
        prompt=prompt,
        negative_prompt=negative_prompt,
        cfg_scale=cfg_scale,
        steps=steps,
        num_steps=num_steps,
        start_step=start_step,
    )
    plan = make_plan(choices, prior)
    if plan.paths is not None:
        raise InputError('num_steps="auto" is not to be had on a pipeline of diffusers; give a number')
    own_scale = one_guidance(plan.cfg_scale)
    source = Source(prior)
    check_transformer(pipe, prior)
    load_inputs(source, [plan])
    know_contexts(source, plan.texts, ContextStore())
    scheduler: ReportingScheduler
    if plan.start_step is None:
        scheduler = DifferentialScheduler(trajectory_of(source, plan, plan.steps_to_run), own_scale)
    else:
        scheduler = ResumableScheduler(start_step=plan.start_step)
    known, texts = source.inputs.contexts, (plan.prompt, plan.negative_prompt)
    return run(
        pipe,
        prior,
        scheduler,
        latents=source.inputs.tensors[latents_files(plan, prior)[0]],
        contexts=[known[text] if text in known else encode(pipe, text) for text in texts],
        cfg_scale=own_scale,
    )


# --- what is refused ----------------------------------------------------------------------------------------


def check_pipeline(pipe: WanImageToVideoPipeline) -> None:
    """Refuse what isn't Wan2.1 with one network that takes an image.

    Raises:
        InputError: with what was found.
    """
    network = getattr(pipe, "transformer", None)
    is_wan_21 = network is not None and getattr(network.config, "image_dim", None) is not None
    if not is_wan_21 or getattr(pipe, "transformer_2", None) is not None:
        raise InputError(
            f"{type(pipe).__name__}: expected a WanImageToVideoPipeline of Wan2.1, with one transformer that "
            "takes an encoded image; use Wan-AI/Wan2.1-I2V-14B-480P-Diffusers"
        )


def one_guidance(cfg_scale: float | Sequence[float]) -> float:
    """The guidance of all steps; what diffusers' pipeline would leave out is refused.

    Raises:
        InputError: with the value.
    """
    if isinstance(cfg_scale, Sequence) or cfg_scale < 1:
        raise InputError(f"cfg_scale {cfg_scale}: diffusers' pipeline takes one number, 1 or above")
    return cfg_scale


def check_transformer(pipe: WanImageToVideoPipeline, prior: Prior) -> None:
    """Compare the network's weights with those that made a prior; one made by DiffSynth doesn't tell.

    Raises:
        InputError: they differ.
    """
    recorded = prior.metadata.parameter_fingerprint.get("transformer", UNVERIFIED)
    found = fingerprint_parameters(pipe.transformer)
    if UNVERIFIED in (recorded, found):
        log.warning(f"unverified: nothing tells whether {prior.directory} was made with these weights")
    elif recorded != found:
        raise InputError(
            f"the transformer's weights are not those the prior was made with (fingerprint {found[:12]}, "
            f"expected {recorded[:12]}); load the right ones, with the same LoRAs, or make the prior again"
        )


# --- one call of the pipeline -------------------------------------------------------------------------------


@torch.no_grad()
def encode(pipe: WanImageToVideoPipeline, text: str) -> torch.Tensor:
    """An encoded prompt, [1, 512, 4096] for Wan2.1."""
    tokens = min(TEXT_TOKENS, pipe.tokenizer.model_max_length)
    prompt_embeds, _ = pipe.encode_prompt(text, do_classifier_free_guidance=False, max_sequence_length=tokens)
    return prompt_embeds


class Adapted:
    """A scheduler of ours as diffusers calls it."""

    order = 1  # timesteps a step, as diffusers counts them for its progress bar

    def __init__(self, scheduler: ReportingScheduler, schedule: Mapping[str, float]):
        self.scheduler = scheduler
        self.schedule = schedule

    def set_timesteps(self, num_inference_steps: int, device: str | torch.device | None = None) -> None:
        """The chosen steps of the prior's schedule."""
        shift, strength = self.schedule["sigma_shift"], self.schedule["denoising_strength"]
        self.scheduler.set_timesteps(num_inference_steps, shift=shift, denoising_strength=strength)
        self.timesteps = self.scheduler.timesteps.to(device)

    def step(
        self, noise_pred: torch.Tensor, timestep: torch.Tensor, latents: torch.Tensor, return_dict: bool
    ) -> tuple[torch.Tensor]:
        """The latents after the step, [B, C, T, H, W]."""
        return (self.scheduler.step(noise_pred, timestep, latents),)


class Seen:
    """A forward hook on the network: what it was given and gave in this step, the negative branch second."""

    def __init__(self):
        self.given: list[dict[str, torch.Tensor]] = []
        self.gave: list[torch.Tensor] = []

    def __call__(self, network: torch.nn.Module, args: tuple, given: dict, gave: tuple[torch.Tensor]) -> None:
        self.given.append(given)
        self.gave.append(gave[0])

    @property
    def noise_pred_nega(self) -> torch.Tensor | None:
        """The velocity of the negative branch, [B, C, T, H, W] in float32; None without guidance."""
        return self.gave[1].float() if len(self.gave) > 1 else None

    @property
    def branch_distance(self) -> float | None:
        """Norm of the difference of both branches; None without guidance."""
        nega = self.noise_pred_nega
        return None if nega is None else float(torch.linalg.vector_norm(self.gave[0].float() - nega))

    @property
    def conditioning(self) -> Conditioning:
        """What the network sees besides latents, in float32."""
        contexts = [given["encoder_hidden_states"].float() for given in self.given]
        y = self.given[0]["hidden_states"][:, self.gave[0].shape[1] :]  # behind the latents
        clip_feature = self.given[0]["encoder_hidden_states_image"]
        return Conditioning(
            identity={"y": y.float(), "clip_feature": clip_feature.float()},
            context_posi=contexts[0],
            context_nega=contexts[1] if len(contexts) > 1 else None,
        )


def run(
    pipe: WanImageToVideoPipeline,
    prior: Prior,
    scheduler: ReportingScheduler,
    *,
    contexts: Sequence[torch.Tensor],
    cfg_scale: float,
    latents: torch.Tensor | None = None,
    on_start: Callable[[torch.Tensor, Conditioning], object] | None = None,
    on_step: StepCallback | None = None,
) -> RunResult:
    """Call the pipeline with a scheduler of ours and a prior's image and settings.

    Args:
        contexts: of prompt and negative prompt.
        latents: to begin with, [B, C, T, H, W]; None: noise of the prior's seed.
        on_start: gets the initial latents and the conditioning, on_step each step.

    Raises:
        RunError: latents became NaN or infinite; names the step.
    """
    m, seen, clock = prior.metadata, Seen(), Clock()
    result = RunResult([], torch.empty(0) if latents is None else latents, [], 0, seconds=clock.seconds)

    def report(step: Step) -> None:
        check_finite(step)
        seconds, forwards = clock.add("denoise" if result.steps else "encode"), len(seen.gave)
        if on_start is not None and not result.steps:
            on_start(step.latents_before, seen.conditioning)
        if on_step is not None:
            cost = replace(step, forwards=forwards, seconds=seconds, branch_distance=seen.branch_distance)
            on_step(replace(cost, noise_pred=step.noise_pred.float()))
        result.steps.append(step.index)
        result.seconds_per_step.append(seconds)
        result.forwards += forwards
        result.latents = step.latents
        seen.given.clear()
        seen.gave.clear()
        clock.add("save")

    scheduler.on_step, scheduler.noise_pred_nega = report, lambda: seen.noise_pred_nega
    hook = pipe.transformer.register_forward_hook(seen, with_kwargs=True)
    try:
        with hooked(pipe, scheduler=Adapted(scheduler, prior.schedule_settings)):
            result.frames = pipe(
                image=read_own_image(prior, IMAGE_FILE),
                prompt_embeds=contexts[0],
                negative_prompt_embeds=contexts[1],
                guidance_scale=cfg_scale,
                num_inference_steps=m.num_inference_steps,
                latents=latents,
                generator=torch.Generator().manual_seed(m.seed or 0),
                **m.sizes,
                output_type="pil",
            ).frames[0]
    finally:
        hook.remove()
    clock.add("decode")
    return result
