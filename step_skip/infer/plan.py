"""One video to make from a prior, as data: every choice, and what has to be read for it.

Choices and a prior's metadata go in, a `Plan` comes out. Nothing is loaded and nothing shared: any machine
that has the prior can run it. Which steps it runs is chosen in plan_steps.py.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Set
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar

from step_skip.errors import InputError
from step_skip.infer.choices import Choices, check_choices
from step_skip.infer.steps import choose_steps
from step_skip.method.formation import AutoStep
from step_skip.method.steps import locate_sigma
from step_skip.models.compute import inherited
from step_skip.models.families import Defaults
from step_skip.models.lora import RecordedLora, check_lora_experts, describe_loras, lora_entries
from step_skip.models.memory import in_tiles
from step_skip.models.weights import cache_components, model_defaults
from step_skip.pipeline.settings import RunSettings, check_tea_cache_experts, choose_cheaper
from step_skip.prior.prior import (
    Prior,
    choose_guidance,
    context_file,
    experts_of,
    identity_file,
    latents_before_file,
    noise_pred_file,
    noise_pred_nega_file,
    recorded_settings,
    step_file,
    step_ranges,
)

if TYPE_CHECKING:
    from PIL.Image import Image


T = TypeVar("T")


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """One clip to make from a prior: every choice, nothing loaded."""

    method: str  # "resume": all steps after start_step; "differential": a few chosen; "sigmas": its own
    start_step: int | None  # None for a differential resume; with sigmas the one before they begin, or -1
    steps_to_run: list[int]
    sigmas: tuple[float, ...] | None  # of "sigmas", whose steps are places in these
    prompt: str
    negative_prompt: str
    cfg_scale: float | tuple[float, ...]  # for all steps, or one for each
    skip_cache: int | None
    tea_cache_l1_thresh: float | None
    tea_cache_model_id: str
    lora: list[RecordedLora]
    fps: float
    image: Path | Image | None  # an older prior needs it, others only compare it with their own
    model: str
    dtype: str | None  # None: the one an older prior's latents are in
    quantize: str | None = None
    compile: str | None = None
    tiled: bool | None = None  # None: as the prior's own video
    auto: AutoStep | None = None  # where start_step comes from, if it was left to the prior
    knows_nega: bool = False  # the first step's negative branch is the prior's own, and read
    closeness: float | None = None  # in dB: the first step chooses the shortest path expected to reach it
    paths: tuple[tuple[int, ...], ...] | None = None  # likewise: to choose among; steps_to_run is the longest
    nearest_of: tuple[str, ...] | None = None  # run ids of the priors of which the first step chooses one
    choices: Choices | None = None  # what it was made from

    @property
    def steps_to_read(self) -> list[int]:
        """The steps of the prior that a differential resume may follow."""
        paths = self.paths or [self.steps_to_run]
        return sorted(set(itertools.chain(*paths))) if self.method == "differential" else []

    @property
    def texts(self) -> list[str]:
        """The prompts that have to be encoded; without guidance the negative one is not used."""
        if not self.steps_to_run:
            return []
        return [self.prompt] if self.cfg_scale == 1 else [self.prompt, self.negative_prompt]

    @property
    def first_cfg_scale(self) -> float:
        """Of the first step that runs."""
        return self.cfg_scale[0] if isinstance(self.cfg_scale, tuple) else self.cfg_scale

    @property
    def forwards(self) -> int:
        """Network evaluations; the most, where the first one decides how many."""
        steps = len(self.steps_to_run)
        scales = self.cfg_scale if isinstance(self.cfg_scale, tuple) else (self.cfg_scale,) * steps
        return sum(1 if scale == 1 else 2 for scale in scales) - self.knows_nega


_PLAN: Final = tuple(field.name for field in dataclasses.fields(Plan))
_SETTINGS: Final = tuple(field.name for field in dataclasses.fields(RunSettings))


def make_plan(
    choices: Choices, prior: Prior, *, defaults_of: Callable[[str, Path | None], Defaults] = model_defaults
) -> Plan:
    """Take from the prior what the command line left open, and refuse what contradicts it.

    Args:
        choices: of one video.
        defaults_of: the defaults of a model; for many videos they are looked up once.

    Raises:
        InputError: with the flag, the prior's value and what to do.
    """
    check_choices(choices, prior)
    model = choices.model or prior.metadata.model or "I2V-480P"
    defaults = defaults_of(model, choices.model_dir)

    m = prior.metadata
    steps = choose_steps(choices, prior)
    experts = experts_of(steps.steps_to_run, steps.sigmas, prior)
    check_tea_cache_experts(choices.tea_cache_l1_thresh, experts)
    recorded = m.lora  # their files are opened only when a model is to be loaded
    given_loras = [each.lora for each in recorded] if choices.lora is None else choices.lora
    check_lora_experts(given_loras, experts=len(prior.family.experts))
    cheaper = choose_cheaper(
        model,
        skip_cache=choices.skip_cache,
        tea_cache_l1_thresh=choices.tea_cache_l1_thresh,
        tea_cache_model_id=choices.tea_cache_model_id,
    )
    plan = Plan(
        method=steps.method,
        start_step=steps.start_step,
        steps_to_run=steps.steps_to_run,
        sigmas=steps.sigmas,
        auto=steps.auto,
        paths=steps.paths,
        closeness=steps.closeness,
        skip_cache=cheaper.skip_cache,
        tea_cache_l1_thresh=cheaper.tea_cache_l1_thresh,
        tea_cache_model_id=cheaper.tea_cache_model_id,
        lora=recorded if choices.lora is None else describe_loras(choices.lora),
        quantize=inherited(choices.quantize, m.quantize),
        compile=inherited(choices.compile, m.compile),
        tiled=choose_tiling(choices, prior, model),
        prompt=first_given(choices.prompt, m.prompt, ""),
        negative_prompt=first_given(choices.negative_prompt, m.negative_prompt, defaults.negative_prompt),
        cfg_scale=choose_guidance(
            prior,
            cfg_scale=choices.cfg_scale,
            cfg_scale_2=choices.cfg_scale_2,
            default=defaults.cfg_scale,
            experts=experts,
        ),
        fps=first_given(choices.fps, m.fps, defaults.fps),
        image=choices.image,
        model=model,
        dtype=choices.dtype or m.dtype,
        choices=choices,
    )
    if knows_first_nega(plan, prior):
        plan = dataclasses.replace(plan, knows_nega=True)
    check_kept(plan, prior)
    return plan


def first_given(given: T | None, recorded: T | None, default: T) -> T:
    """Return the value that was given, else the recorded one, else the default."""
    known = default if recorded is None else recorded
    return known if given is None else given


def check_kept(plan: Plan, prior: Prior) -> None:
    """Refuse steps that were taken out of a pruned prior.

    Raises:
        InputError: with those that are left.
    """
    if prior.kept_steps is not None and not all(map(prior.has, input_files(plan, prior))):
        raise InputError(
            f"{prior.directory} keeps only steps {step_ranges(prior.kept_steps)}, and this needs others; "
            "choose among them with --steps, or make the prior again"
        )


def knows_first_nega(plan: Plan, prior: Prior) -> bool:
    """Return whether the prior evaluated the first step's negative branch: same latents, text and network."""
    return (
        prior.keeps_nega
        and plan.method in ("differential", "resume")
        and bool(plan.steps_to_run)
        and plan.first_cfg_scale != 1
        and plan.negative_prompt == prior.metadata.negative_prompt
        and plan.lora == prior.metadata.lora
        and (plan.quantize, plan.compile) == (prior.metadata.quantize, prior.metadata.compile)
        and plan.skip_cache is plan.tea_cache_l1_thresh is None
        and prior.has(noise_pred_nega_file(plan.steps_to_run[0]))
    )


def choose_tiling(choices: Choices, prior: Prior, model: str) -> bool | None:
    """Return whether the clip is decoded in tiles; None: as the prior's own video."""
    if choices.tiled is None:
        return None
    tiled = in_tiles(choices.tiled, model, prior.metadata.sizes, model_dir=choices.model_dir)
    return None if tiled == prior.metadata.tiled else tiled


def settings_of(plan: Plan, prior: Prior) -> RunSettings:
    """Return the settings of a clip's run: the prior's, and those that the plan decides itself."""
    recorded = recorded_settings(prior)
    own = {name: getattr(plan, name) for name in _SETTINGS if name in _PLAN}
    if plan.tiled is None:
        del own["tiled"]
    return RunSettings(**{**recorded, **own})


def describe_choices(plan: Plan) -> dict[str, Any]:
    """Return the entries of a plan that decide the clip, as its JSON has them."""
    entries = {name: getattr(plan, name) for name in _PLAN}
    for name in ("image", "auto", "knows_nega", "choices"):  # none of them changes the latents
        del entries[name]
    entries["lora"] = lora_entries(plan.lora)
    steps = entries.pop("steps_to_run")
    if plan.paths is None:  # else the run decides
        entries["steps_run"] = steps
    return {name: value for name, value in entries.items() if value is not None or name == "start_step"}


# --- what a plan needs --------------------------------------------------------------------------------------


def latents_files(plan: Plan, prior: Prior) -> list[str]:
    """Return the files of the latents a plan needs; a differential resume needs those before each step.

    A resume on custom sigmas may need two, to begin on the straight line between them.
    """
    if plan.start_step is None:  # a differential resume
        last = step_file(prior.num_inference_steps - 1)
        return list(dict.fromkeys([*map(latents_before_file, plan.steps_to_read), last]))
    begin = latents_before_file(plan.start_step + 1)
    return [begin, step_file(plan.start_step + 1)] if part_of_step(plan, prior) else [begin]


def part_of_step(plan: Plan, prior: Prior) -> float:
    """Return how far into the step after start_step a resume on custom sigmas begins, 0 ... 1."""
    if plan.sigmas is None:
        return 0.0
    return locate_sigma(plan.sigmas[0], prior.metadata.scheduler_sigmas)[1]


def velocity_files(plan: Plan) -> list[str]:
    """Return the files of the prior's velocities that a differential resume needs."""
    return list(map(noise_pred_file, plan.steps_to_read))


def nega_files(plan: Plan, prior: Prior) -> list[str]:
    """Return the files of the prior's velocities of the negative branch that a plan needs."""
    if plan.method == "differential" and prior.keeps_nega and plan.cfg_scale != 1:
        return list(map(noise_pred_nega_file, plan.steps_to_read))
    return [noise_pred_nega_file(plan.steps_to_run[0])] if plan.knows_nega else []


def conditioning_files(plan: Plan, prior: Prior) -> list[str]:
    """Return the files of the prior's conditioning that a plan needs and the prior has."""
    if prior.is_legacy or not plan.steps_to_run:
        return []
    names = dict.fromkeys(map(context_file, plan.texts))
    return [*map(identity_file, prior.identity_names), *filter(prior.has, names)]


def input_files(plan: Plan, prior: Prior) -> list[str]:
    """Return all files of the prior that a plan needs."""
    tensors = [*latents_files(plan, prior), *velocity_files(plan), *nega_files(plan, prior)]
    return [*tensors, *conditioning_files(plan, prior)]


def needed_components(plan: Plan, prior: Prior, *, known: Set[str]) -> list[str]:
    """Return the parts of the model a plan needs: encoders only for what is not encoded already.

    Args:
        known: the prompts whose contexts are there.
    """
    if not plan.steps_to_run:
        return ["vae"]
    experts = dict.fromkeys(experts_of(plan.steps_to_run, plan.sigmas, prior))
    components = [*experts, "vae", *cache_components(plan.skip_cache)]
    if not known >= set(plan.texts):
        components.append("text_encoder")
    if prior.is_legacy:
        components.append("image_encoder")
    return components
