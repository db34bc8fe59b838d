"""One video to make from a prior, as data: every choice, and what has to be read for it.

Flags and a prior's metadata go in, a `Plan` comes out. Nothing is loaded and nothing shared: any machine that
has the prior can run it.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
from collections.abc import Iterable, Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import command_line as cli
import contexts
import formation
import lora
import prior_utils
import tensor_file
import wan_models
from formation import AutoStep
from prior_utils import InputError, Prior, RunSettings

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image

IDENTITY_FILES = ("y.pt", "clip_feature.pt")
SCHEDULE_FLAGS = ("num_inference_steps", "denoising_strength", "sigma_shift")


@dataclass(frozen=True, kw_only=True)
class Plan:
    """One video to make from a prior: every choice, nothing loaded."""

    method: str  # "resume": all steps after start_step; "differential": a few chosen steps
    start_step: int | None  # None for a differential resume
    steps_to_run: list[int]
    sigmas: tuple[float, ...] | None  # None: the prior's schedule; else the steps are places in these
    prompt: str
    negative_prompt: str
    cfg_scale: float | tuple[float, ...]  # for all steps, or one for each
    skip_cache: int | None
    tea_cache_l1_thresh: float | None
    tea_cache_model_id: str
    lora: list[dict[str, Any]]  # as lora.describe
    fps: float
    image: Path | None  # an older prior needs it, others only compare it with their own
    model: str
    dtype: str | None  # None: the one an older prior's latents are in
    auto: AutoStep | None = None  # where start_step comes from, if it was left to the prior

    @property
    def texts(self) -> list[str]:
        """The prompts that have to be encoded; without guidance the negative one is not used."""
        if not self.steps_to_run:
            return []
        return [self.prompt] if self.cfg_scale == 1 else [self.prompt, self.negative_prompt]

    @property
    def forwards(self) -> int:
        """Network evaluations."""
        if isinstance(self.cfg_scale, tuple):
            return sum(1 if scale == 1 else 2 for scale in self.cfg_scale)
        return len(self.steps_to_run) * (1 if self.cfg_scale == 1 else 2)


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """What a prior's plans need besides the model: checked, then loaded, the rest encoded, in that order."""

    prior_files: dict[str, str]  # SHA-256 by name
    image: Image | None
    image_sha256: str | None
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)  # by file name
    contexts: dict[str, torch.Tensor] = field(default_factory=dict)  # by prompt


def make_plan(args: argparse.Namespace, prior: Prior) -> Plan:
    """Take from the prior what the command line left open, and refuse what contradicts it.

    Args:
        args: flags of infer_from_prior.py, with at most one prompt and one start_step.

    Raises:
        InputError: with the flag, the prior's value and what to do.
    """
    check_flags(args, prior)
    model = args.model or prior.metadata.get("model", "I2V-480P")
    if model not in wan_models.MODEL_NAMES:
        raise InputError(f"the prior was made with the model {model!r}, which this version doesn't know")
    defaults = wan_models.model_defaults(model, args.model_dir)
    given = {name: value for name, value in vars(args).items() if value is not None}
    chosen = {**dataclasses.asdict(defaults), **prior.metadata, **given}
    steps = choose_steps(args, prior)
    given_loras = lora.recorded(prior.metadata.get("lora", [])) if args.lora is None else args.lora
    return Plan(
        **steps,
        **cli.cheaper_settings(args, model),
        lora=lora.describe(given_loras),
        prompt=chosen["prompt"],
        negative_prompt=chosen["negative_prompt"],
        cfg_scale=guidance(chosen["cfg_scale"], len(steps["steps_to_run"])),
        fps=chosen["fps"],
        image=args.image,
        model=model,
        dtype=args.dtype or prior.metadata.get("dtype"),
    )


def check_flags(args: argparse.Namespace, prior: Prior) -> None:
    """Refuse flags that contradict the prior, and an older prior without what it doesn't record.

    Raises:
        InputError: with the flag, the prior's value and what to do.
    """
    for name in (*SCHEDULE_FLAGS, "model", "dtype"):
        given = getattr(args, name)
        if given is not None and given != prior.metadata.get(name, given):
            raise InputError(
                f"--{name} {given}: the prior has {prior.metadata[name]}; "
                "leave the flag out or make a prior with it"
            )
    for name in ("image", "prompt") if prior.is_legacy else ():
        if getattr(args, name) is None:
            raise InputError(f"{prior.directory} records no {name} (an older format): give --{name}")


def guidance(cfg_scale: float | list[float], num_steps: int) -> float | tuple[float, ...]:
    """One cfg_scale for all steps, or a tuple with one for each.

    Raises:
        InputError: neither one value nor as many as there are steps.
    """
    values = cfg_scale if isinstance(cfg_scale, list) else [cfg_scale]
    if len(values) not in (1, num_steps):
        raise InputError(
            f"--cfg_scale: {len(values)} values, and {num_steps} steps run; give one, or one for each step"
        )
    return values[0] if len(set(values)) == 1 else tuple(values)


def choose_steps(args: argparse.Namespace, prior: Prior) -> dict[str, Any]:
    """Method, start_step, steps_to_run and sigmas of a plan, and auto where that chose them.

    Raises:
        InputError: a step the prior doesn't have, or a prior without what a differential resume needs.
    """
    if args.sigmas is not None:
        return own_sigmas(args.sigmas, prior)
    differential = args.steps is not None or args.num_steps is not None
    if prior.is_legacy and differential:
        raise InputError(
            "--steps needs the prior's velocities, which this older format lacks; use --start_step"
        )
    if not prior.is_complete and differential:
        raise InputError(
            f"--steps needs the prior's clean latents, and {prior.directory} was stopped after step "
            f"{prior.whole_steps - 1}; use --start_step, or finish it with generate_prior.py --resume"
        )
    if args.start_step == cli.AUTO:
        auto = formation.choose_start_step(prior, args.text_share or formation.DEFAULT_TEXT_SHARE)
        return remaining_steps(auto.step, prior, num_steps=args.num_steps_after) | {"auto": auto}
    if args.start_step is not None or prior.is_legacy or not prior.is_complete:
        start_step = resolve_start_step(args.start_step, prior)
        return remaining_steps(start_step, prior, num_steps=args.num_steps_after)
    if args.num_steps_after is not None:
        raise InputError("--num_steps_after spaces anew what is left after a step: give --start_step, too")
    return {
        "method": "differential",
        "start_step": None,
        "steps_to_run": differential_steps(args, prior),
        "sigmas": None,
    }


def own_sigmas(sigmas: list[float], prior: Prior) -> dict[str, Any]:
    """A resume on sigmas of its own, from where the prior's path is at the first of them.

    Raises:
        InputError: they don't decrease, or begin where the prior holds nothing.
    """
    if any(after >= now * (1 - prior_utils.SAME_SIGMA) for now, after in itertools.pairwise(sigmas)):
        raise InputError(f"--sigmas {' '.join(map(str, sigmas))}: expected decreasing values")
    known = prior.metadata["scheduler_sigmas"]
    try:
        step, _ = prior_utils.place_on_path(sigmas[0], known)
    except ValueError:
        raise InputError(
            f"--sigmas {sigmas[0]}: the prior begins at sigma {known[0]:.6g}; begin there or below"
        ) from None
    whole = prior.whole_steps
    if sigmas[0] < (known[whole] if whole < len(known) else 0.0) * (1 - prior_utils.SAME_SIGMA):
        raise InputError(
            f"--sigmas {sigmas[0]}: {prior.directory} was stopped after step {whole - 1}; begin at "
            f"{known[whole]:.6g} or above, or finish it with generate_prior.py --resume"
        )
    if prior.is_legacy and step == 0:
        raise InputError(
            f"--sigmas {sigmas[0]}: this older format holds nothing before step 0; begin at "
            f"{known[1]:.6g} or below"
        )
    steps = list(range(len(sigmas)))
    return {"method": "resume", "start_step": step - 1, "steps_to_run": steps, "sigmas": tuple(sigmas)}


def remaining_steps(start_step: int, prior: Prior, *, num_steps: int | None) -> dict[str, Any]:
    """A resume after a step, in the steps that are left or in so many others.

    Raises:
        InputError: none are left.
    """
    steps = list(range(start_step + 1, prior.num_inference_steps))
    if num_steps in (None, len(steps)):
        return {"method": "resume", "start_step": start_step, "steps_to_run": steps, "sigmas": None}
    if not steps:
        raise InputError(f"--num_steps_after {num_steps}: step {start_step} is the prior's last")
    m = prior.metadata
    begin = m["scheduler_sigmas"][start_step + 1]
    return {
        "method": "resume",
        "start_step": start_step,
        "steps_to_run": list(range(num_steps)),
        "sigmas": tuple(prior_utils.tail_sigmas(begin, num_steps, sigma_shift=m["sigma_shift"])),
    }


def resolve_start_step(choice: int | None, prior: Prior) -> int:
    """The step of this prior that a --start_step means; None: the prior's recommendation, or its last step.

    Raises:
        InputError: the prior has no such step.
    """
    total = prior.num_inference_steps
    last = total - 1 if prior.is_complete else prior.whole_steps - 1
    if choice is None and prior.is_complete:
        return prior.metadata.get("start_step", prior_utils.recommended_start_step(total))
    if choice is not None and choice > last:
        raise InputError(f"--start_step {choice}: the prior has steps 0 to {last}")
    return last if choice is None else choice


def differential_steps(args: argparse.Namespace, prior: Prior) -> list[int]:
    """The steps of a differential resume: those given, or so many at their places in the schedule.

    Raises:
        InputError: the prior has no such steps.
    """
    total = prior.num_inference_steps
    num_steps = args.num_steps or prior_utils.recommended_num_steps(total)
    if num_steps > total:
        raise InputError(f"--num_steps {num_steps}: the prior has only {total} steps")
    steps = args.steps or prior_utils.spread_steps(total, num_steps)
    if sorted(set(steps)) != steps or steps[-1] >= total:
        raise InputError(f"--steps {steps}: expected increasing steps between 0 and {total - 1}")
    return steps


def run_settings(plan: Plan, prior: Prior) -> RunSettings:
    """The prior's settings, and of the plan what it decides itself."""
    names = {field.name for field in dataclasses.fields(RunSettings)}
    own = {name: value for name, value in vars(plan).items() if name in names}
    recorded = {name: value for name, value in prior.metadata.items() if name in names}
    return RunSettings(**{**recorded, **own})


def latents_files(plan: Plan, prior: Prior) -> list[str]:
    """The latents a plan starts from; for a differential resume those before each step, and the clean.

    Two where it starts between them, on the straight line the prior took.
    """
    if plan.method == "resume":
        begin = prior_utils.latents_before_file(plan.start_step + 1)
        return [begin, prior_utils.step_file(plan.start_step + 1)] if part_of_step(plan, prior) else [begin]
    last = prior_utils.step_file(prior.num_inference_steps - 1)
    return [*map(prior_utils.latents_before_file, plan.steps_to_run), last]


def part_of_step(plan: Plan, prior: Prior) -> float:
    """How far into the step after start_step a resume on its own sigmas begins, 0 ... 1."""
    if plan.sigmas is None:
        return 0.0
    return prior_utils.place_on_path(plan.sigmas[0], prior.metadata["scheduler_sigmas"])[1]


def velocity_files(plan: Plan) -> list[str]:
    """The prior's velocities a plan needs: those of the steps of a differential resume."""
    return [] if plan.method == "resume" else list(map(prior_utils.noise_pred_file, plan.steps_to_run))


def conditioning_files(plan: Plan, prior: Prior) -> list[str]:
    """The prior's conditioning a plan needs; contexts of other prompts are not there."""
    if prior.is_legacy or not plan.steps_to_run:
        return []
    names = dict.fromkeys(map(prior_utils.context_file, plan.texts))
    return [*IDENTITY_FILES, *filter(prior.has, names)]


def input_files(plan: Plan, prior: Prior) -> list[str]:
    """The prior's files a plan needs."""
    return [*latents_files(plan, prior), *velocity_files(plan), *conditioning_files(plan, prior)]


def needed_components(plan: Plan, prior: Prior, *, known: Set[str]) -> list[str]:
    """The parts of the model a plan needs: encoders only for what is not encoded already.

    Args:
        known: the prompts whose contexts are there.
    """
    if not plan.steps_to_run:
        return ["vae"]
    components = ["dit", "vae", *wan_models.cache_components(plan.skip_cache)]
    if not known >= set(plan.texts):
        components.append("text_encoder")
    if prior.is_legacy:
        components.append("image_encoder")
    return components


# --- checks before anything is loaded -----------------------------------------------------------------------


def read_inputs(plans: Iterable[Plan], prior: Prior) -> Inputs:
    """Check every file that plans of one prior need, and read the image; no tensor is loaded yet.

    Raises:
        InputError: something is missing, damaged, or not the prior's.
    """
    plans = list(plans)
    path = plans[0].image
    names = dict.fromkeys(name for plan in plans for name in input_files(plan, prior))
    return Inputs(
        prior_files=prior_utils.check_files(prior, names),
        image=read_image(path, prior),
        image_sha256=None if path is None else prior_utils.sha256_file(path),
    )


def load_inputs(plans: Iterable[Plan], prior: Prior, inputs: Inputs) -> str:
    """Load every tensor that plans of one prior need, each once, and the contexts the prior knows.

    Returns:
        The latents' dtype, "bfloat16" for example.

    Raises:
        InputError: a file holds something else, or not in --dtype.
    """
    tensors, known = inputs.tensors, inputs.contexts
    for plan in plans:
        latents = [*latents_files(plan, prior), *velocity_files(plan)]
        for names, load in (
            (latents, prior_utils.load_latents),
            (conditioning_files(plan, prior), prior_utils.load_conditioning),
        ):
            tensors.update((name, load(prior, name)) for name in names if name not in tensors)
        found = tensor_file.dtype_name(tensors[latents[0]])
        if plan.dtype not in (None, found):
            raise InputError(f"--dtype {plan.dtype}: the prior's latents are {found}; leave the flag out")
        for text in plan.texts:
            own = tensors.get(prior_utils.context_file(text))
            context = contexts.load(prior, text) if own is None else own
            if context is not None:
                known[text] = context
    return found


def read_image(path: Path | None, prior: Prior) -> Image | None:
    """Read --image and compare it with the image the prior was made from, where the prior holds it.

    Raises:
        InputError: it can't be read, or is another.
    """
    if path is None:
        return None
    sizes = {"width": prior.metadata["width"], "height": prior.metadata["height"]}
    image = cli.read_image(path, **sizes)
    if not prior.is_legacy:
        prior_utils.check_files(prior, [prior_utils.IMAGE_FILE])
        own = prior.directory / prior_utils.IMAGE_FILE
        if image.tobytes() != cli.read_image(own, **sizes, label="the prior's image", exact=True).tobytes():
            raise InputError(
                f"--image {path} is not the image the prior was made from ({own}); "
                "leave the flag out, or make a prior of this image"
            )
    return image


def check_schedule(prior: Prior) -> None:
    """Recompute the schedule with the installed scheduler and compare every value.

    Raises:
        InputError: they differ.
    """
    from wan_pipeline import compute_schedule

    timesteps, sigmas = compute_schedule(**{name: prior.metadata[name] for name in SCHEDULE_FLAGS})
    prior_utils.check_schedule(prior, timesteps=timesteps, sigmas=sigmas)
