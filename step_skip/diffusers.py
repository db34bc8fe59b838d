"""Make priors and clips with diffusers' WanImageToVideoPipeline, by the same method and in the same format.

    from step_skip.diffusers import generate_prior, infer_from_prior

    prior = generate_prior(pipe, "face.jpg", prompt="she stays still", num_inference_steps=50)
    frames = infer_from_prior(pipe, prior, prompt="she speaks").frames

Nothing of diffusers is changed. Within one call

    pipe.scheduler    is a scheduler of pipeline/schedulers.py with diffusers' interface (SchedulerAdapter)
    pipe.transformer  has a forward hook, which records both guidance branches and the network's inputs
                      (CallRecorder)

and latents and prompt_embeds are the pipeline's own arguments. The pipeline keeps its latents in float32,
whatever its network's dtype, and so does a prior made here. Checked against diffusers 0.42.1.
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
TEXT_TOKENS = 512  # length to which WanImageToVideoPipeline pads a prompt
UNSUPPORTED = {  # PriorChoices that only DiffSynth's pipeline supports
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
    """Make a prior: a full run of the pipeline by Euler steps, with all of its path saved in a folder.

    Args:
        pipe: of Wan2.1; its attributes are restored afterwards, and its own scheduler isn't used.
        image: the first frame, a path or a PIL image.
        prompt: motion of the prior's own clip; a still one is best.
        output_dir, run_id: the folder is `output_dir/run_<run_id>`; None: the name of the image's file.
        choices: fields of PriorChoices that diffusers supports: num_inference_steps, cfg_scale (its
            guidance_scale), sigma_shift, seed, negative_prompt, height, width, num_frames, fps, fit,
            background.

    Raises:
        InputError: the pipeline, a choice or the image can't be used.
        RunError: latents became NaN or infinite.
    """
    check_pipeline(pipe)
    for name in choices.keys() & UNSUPPORTED:
        raise InputError(f"{name} is not supported on a pipeline of diffusers; leave it out")
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
    """Make a clip of a prior's identity in a few of its steps, without writing files.

    Args:
        pipe: of Wan2.1, with the prior's weights; its attributes are restored afterwards.
        prior: made by `generate_prior` here or by DiffSynth's pipeline, or its folder.
        prompt: the new motion; None: the prior's prompt, which reproduces its latents bit for bit if it was
            made by this pipeline.
        negative_prompt, cfg_scale: None: the prior's.
        steps, num_steps: steps of a differential resume, or their number.
        start_step: a plain resume after this step instead, or "auto".

    Returns:
        The result, whose `frames` are PIL images.

    Raises:
        InputError: the prior is damaged or doesn't fit, or the choices contradict it.
        RunError: latents became NaN or infinite.
    """
    check_pipeline(pipe)
    prior = prior if isinstance(prior, Prior) else read_prior(Path(prior))
    if prior.image_files != [IMAGE_FILE] or prior.identity_names != list(FAMILY.conditioning):
        raise InputError(
            f"{prior.directory} is another kind of prior, expected one of a Wan2.1 image-to-video model; "
            "use such a prior"
        )
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
        raise InputError('num_steps="auto" is not supported on a pipeline of diffusers; give a number')
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


# --- checks -------------------------------------------------------------------------------------------------


def check_pipeline(pipe: WanImageToVideoPipeline) -> None:
    """Check that a pipeline is of Wan2.1, with one network that takes an image.

    Raises:
        InputError: it is not.
    """
    network = getattr(pipe, "transformer", None)
    is_wan_21 = network is not None and getattr(network.config, "image_dim", None) is not None
    if not is_wan_21 or getattr(pipe, "transformer_2", None) is not None:
        raise InputError(
            f"{type(pipe).__name__}: expected a WanImageToVideoPipeline of Wan2.1, with one transformer that "
            "takes an encoded image; use Wan-AI/Wan2.1-I2V-14B-480P-Diffusers"
        )


def one_guidance(cfg_scale: float | Sequence[float]) -> float:
    """Return the guidance of all steps, after a check that diffusers' pipeline applies it.

    Raises:
        InputError: there are several values, or it is below 1.
    """
    if isinstance(cfg_scale, Sequence) or cfg_scale < 1:
        raise InputError(
            f"cfg_scale {cfg_scale}: expected one number, 1 or above, on a pipeline of diffusers"
        )
    return cfg_scale


def check_transformer(pipe: WanImageToVideoPipeline, prior: Prior) -> None:
    """Check that the network's weights are those a prior was made with; warn if that is unknown.

    It is unknown for a prior made by DiffSynth's pipeline.

    Raises:
        InputError: the weights differ.
    """
    recorded = prior.metadata.parameter_fingerprint.get("transformer", UNVERIFIED)
    found = fingerprint_parameters(pipe.transformer)
    if UNVERIFIED in (recorded, found):
        log.warning(f"unverified: it is unknown whether {prior.directory} was made with these weights")
    elif recorded != found:
        raise InputError(
            f"the transformer's weights are not those the prior was made with (fingerprint {found[:12]}, "
            f"expected {recorded[:12]}); load the right ones, with the same LoRAs, or make the prior again"
        )


# --- one call of the pipeline -------------------------------------------------------------------------------


@torch.no_grad()
def encode(pipe: WanImageToVideoPipeline, text: str) -> torch.Tensor:
    """Encode a prompt: [1, 512, 4096] for Wan2.1."""
    tokens = min(TEXT_TOKENS, pipe.tokenizer.model_max_length)
    prompt_embeds, _ = pipe.encode_prompt(text, do_classifier_free_guidance=False, max_sequence_length=tokens)
    return prompt_embeds


class SchedulerAdapter:
    """A scheduler of pipeline/schedulers.py with the interface of diffusers.

    Args:
        scheduler: the scheduler.
        schedule: sigma_shift and denoising_strength of the prior.
    """

    order = 1  # timesteps per step, which diffusers needs for its progress bar

    def __init__(self, scheduler: ReportingScheduler, schedule: Mapping[str, float]):
        self.scheduler = scheduler
        self.schedule = schedule

    def set_timesteps(self, num_inference_steps: int, device: str | torch.device | None = None) -> None:
        """Set the timesteps to the scheduler's steps of the prior's schedule."""
        shift, strength = self.schedule["sigma_shift"], self.schedule["denoising_strength"]
        self.scheduler.set_timesteps(num_inference_steps, shift=shift, denoising_strength=strength)
        self.timesteps = self.scheduler.timesteps.to(device)

    def step(
        self, noise_pred: torch.Tensor, timestep: torch.Tensor, latents: torch.Tensor, return_dict: bool
    ) -> tuple[torch.Tensor]:
        """Take a step and return the latents after it; all are [B, C, T, H, W]."""
        return (self.scheduler.step(noise_pred, timestep, latents),)


class CallRecorder:
    """A forward hook that records the network's inputs and outputs in a step, the negative branch second."""

    def __init__(self):
        self.inputs: list[dict[str, torch.Tensor]] = []
        self.outputs: list[torch.Tensor] = []  # [B, C, T, H, W]

    def __call__(
        self, network: torch.nn.Module, args: tuple, inputs: dict, outputs: tuple[torch.Tensor]
    ) -> None:
        self.inputs.append(inputs)
        self.outputs.append(outputs[0])

    def clear(self) -> None:
        """Forget the calls of the step."""
        self.inputs.clear()
        self.outputs.clear()

    @property
    def noise_pred_nega(self) -> torch.Tensor | None:
        """Return the velocity of the negative branch, [B, C, T, H, W] in float32; None without guidance."""
        return self.outputs[1].float() if len(self.outputs) > 1 else None

    @property
    def branch_distance(self) -> float | None:
        """Return the norm of the branches' difference; None without guidance."""
        nega = self.noise_pred_nega
        return None if nega is None else float(torch.linalg.vector_norm(self.outputs[0].float() - nega))

    @property
    def conditioning(self) -> Conditioning:
        """Return the network's inputs besides latents and timestep, in float32."""
        contexts = [each["encoder_hidden_states"].float() for each in self.inputs]
        # hidden_states has the latents' channels first, then those of y.
        y = self.inputs[0]["hidden_states"][:, self.outputs[0].shape[1] :]
        clip_feature = self.inputs[0]["encoder_hidden_states_image"]
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
    """Call the pipeline with a scheduler of pipeline/schedulers.py and a prior's image and settings.

    Args:
        contexts: encoded prompt and negative prompt, see `encode`.
        latents: initial latents, [B, C, T, H, W]; None: noise of the prior's seed.
        on_start: called with the initial latents and the conditioning.
        on_step: called with each step.

    Raises:
        RunError: latents became NaN or infinite; the message names the step.
    """
    m, recorder, clock = prior.metadata, CallRecorder(), Clock()
    result = RunResult([], torch.empty(0) if latents is None else latents, [], 0, seconds=clock.seconds)

    def report(step: Step) -> None:
        check_finite(step)
        seconds, forwards = clock.add("denoise" if result.steps else "encode"), len(recorder.outputs)
        if on_start is not None and not result.steps:
            on_start(step.latents_before, recorder.conditioning)
        if on_step is not None:
            distance = recorder.branch_distance
            measured = replace(step, forwards=forwards, seconds=seconds, branch_distance=distance)
            on_step(replace(measured, noise_pred=step.noise_pred.float()))
        result.steps.append(step.index)
        result.seconds_per_step.append(seconds)
        result.forwards += forwards
        result.latents = step.latents
        recorder.clear()
        clock.add("save")

    scheduler.on_step, scheduler.noise_pred_nega = report, lambda: recorder.noise_pred_nega
    hook = pipe.transformer.register_forward_hook(recorder, with_kwargs=True)
    try:
        with hooked(pipe, scheduler=SchedulerAdapter(scheduler, prior.schedule_settings)):
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
