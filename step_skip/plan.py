"""One video to make from a prior, as data: every choice, and what has to be read for it.

Choices and a prior's metadata go in, a `Plan` comes out. Nothing is loaded and nothing shared: any machine
that has the prior can run it. Which steps it runs is chosen in plan_steps.py.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

from step_skip.compute import inherited
from step_skip.experts import check_tea_cache_experts, choose_guidance, experts_of
from step_skip.families import Defaults
from step_skip.files import InputError
from step_skip.lora import Lora, check_lora_experts, describe_loras, parse_recorded_loras
from step_skip.memory import in_tiles
from step_skip.models import (
    cache_components,
    model_defaults,
    published_name,
)
from step_skip.plan_steps import choose_steps
from step_skip.prior import (
    SCHEDULE_FLAGS,
    Prior,
    RunSettings,
    context_file,
    identity_file,
    latents_before_file,
    noise_pred_file,
    noise_pred_nega_file,
    ranges,
    step_file,
)
from step_skip.steps import AutoStep, place_on_path

if TYPE_CHECKING:
    from PIL.Image import Image

CHEAPER_NAMES = ("skip_cache", "tea_cache_l1_thresh", "tea_cache_model_id")
FIXED: Final = ("seed", "num_frames", "height", "width")  # by the prior's latents


@dataclass(frozen=True, kw_only=True, slots=True)
class Choices:
    """What somebody asks of one video; None: as in the prior, or the default. The names are the flags'."""

    prompt: str | None = None
    negative_prompt: str | None = None
    cfg_scale: float | Sequence[float] | None = None  # one, or one for each step that runs
    cfg_scale_2: float | None = None  # of the second of two experts; None: cfg_scale, if that is given
    start_step: int | Literal["auto"] | None = None  # a step, or AUTO
    steps: Sequence[int] | None = None
    num_steps: int | Literal["auto"] | None = None
    closeness: float | None = None  # with num_steps AUTO: to a full run, PSNR in dB
    sigmas: Sequence[float] | None = None
    num_steps_after: int | None = None  # with start_step
    text_share: float | None = None  # with start_step AUTO
    skip_cache: int | None = None
    tea_cache_l1_thresh: float | None = None
    tea_cache_model_id: str | None = None
    lora: Sequence[Lora] | None = None
    quantize: str | None = None  # compute.OFF: not what the prior was made with
    compile: str | None = None  # likewise
    tiled: bool | Literal["auto"] | None = None  # decoded in tiles; AUTO: if whole frames take too much
    fps: float | None = None
    image: Path | Image | None = None  # an older prior needs it; others only compare it with their own
    model: str | None = None  # this and what follows has to be the prior's
    model_dir: Path | None = None
    dtype: str | None = None
    num_inference_steps: int | None = None
    denoising_strength: float | None = None
    sigma_shift: float | None = None
    seed: int | None = None
    num_frames: int | None = None
    height: int | None = None
    width: int | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """One video to make from a prior: every choice, nothing loaded."""

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
    lora: list[dict[str, Any]]  # as describe_loras
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
    model = choices.model or prior.metadata.get("model", "I2V-480P")
    defaults = defaults_of(model, choices.model_dir)

    def chosen(name: str) -> Any:
        given = getattr(choices, name)
        return prior.metadata.get(name, getattr(defaults, name, None)) if given is None else given

    steps = choose_steps(choices, prior)
    experts = experts_of(steps["steps_to_run"], steps["sigmas"], prior)
    check_tea_cache_experts(choices.tea_cache_l1_thresh, experts)
    recorded = prior.metadata.get("lora", [])  # its files are opened only when a model is to be loaded
    given_loras = parse_recorded_loras(recorded) if choices.lora is None else choices.lora
    check_lora_experts(given_loras, experts=len(prior.family.experts))
    entries: dict[str, Any] = dict(
        **steps,
        **choose_cheaper(
            model,
            skip_cache=choices.skip_cache,
            tea_cache_l1_thresh=choices.tea_cache_l1_thresh,
            tea_cache_model_id=choices.tea_cache_model_id,
        ),
        lora=recorded if choices.lora is None else describe_loras(choices.lora),
        quantize=inherited(choices.quantize, prior.metadata.get("quantize")),
        compile=inherited(choices.compile, prior.metadata.get("compile")),
        tiled=choose_tiling(choices, prior, model),
        prompt=chosen("prompt"),
        negative_prompt=chosen("negative_prompt"),
        cfg_scale=choose_guidance(
            prior,
            cfg_scale=choices.cfg_scale,
            cfg_scale_2=choices.cfg_scale_2,
            default=defaults.cfg_scale,
            experts=experts,
        ),
        fps=chosen("fps"),
        image=choices.image,
        model=model,
        dtype=choices.dtype or prior.metadata.get("dtype"),
        choices=choices,
    )
    plan = Plan(**entries)
    if knows_first_nega(plan, prior):
        plan = Plan(**entries, knows_nega=True)
    check_kept(plan, prior)
    return plan


def check_kept(plan: Plan, prior: Prior) -> None:
    """Refuse steps that were taken out of a pruned prior.

    Raises:
        InputError: with those that are left.
    """
    if prior.kept_steps is not None and not all(map(prior.has, input_files(plan, prior))):
        raise InputError(
            f"{prior.directory} keeps only steps {ranges(prior.kept_steps)}, and this needs others; "
            "choose among them with --steps, or make the prior again"
        )


def knows_first_nega(plan: Plan, prior: Prior) -> bool:
    """Whether the first step's negative branch is one the prior evaluated: same latents, text and network."""
    return (
        prior.keeps_nega
        and plan.method in ("differential", "resume")
        and bool(plan.steps_to_run)
        and plan.first_cfg_scale != 1
        and plan.negative_prompt == prior.metadata["negative_prompt"]
        and plan.lora == prior.metadata.get("lora", [])
        and (plan.quantize, plan.compile) == (prior.metadata.get("quantize"), prior.metadata.get("compile"))
        and plan.skip_cache is plan.tea_cache_l1_thresh is None
        and prior.has(noise_pred_nega_file(plan.steps_to_run[0]))
    )


def choose_tiling(choices: Choices, prior: Prior, model: str) -> bool | None:
    """Whether the video is decoded in tiles; None: as the prior's own."""
    if choices.tiled is None:
        return None
    tiled = in_tiles(choices.tiled, model, prior.metadata, model_dir=choices.model_dir)
    return None if tiled == prior.metadata.get("tiled", True) else tiled


def check_choices(choices: Choices, prior: Prior) -> None:
    """Refuse flags that contradict the prior, and an older prior without what it doesn't record.

    Raises:
        InputError: with the flag, the prior's value and what to do.
    """
    for name in (*SCHEDULE_FLAGS, "model", "dtype"):
        given = getattr(choices, name)
        if given is not None and given != prior.metadata.get(name, given):
            raise InputError(
                f"--{name} {given}: the prior has {prior.metadata[name]}; "
                "leave the flag out or make a prior with it"
            )
    for name in FIXED:
        given, own = getattr(choices, name), prior.metadata.get(name)
        if given is not None and own is not None and given != own:
            raise InputError(
                f"--{name} is fixed by the prior: {own}, not {given}; for another make another prior, with "
                f"generate_prior.py --{name} {given}"
            )
    if choices.image is not None and not prior.is_legacy and not prior.image_files:
        raise InputError(f"--image: {prior.directory} was made without an image; leave the flag out")
    for name in ("image", "prompt") if prior.is_legacy else ():
        if getattr(choices, name) is None:
            raise InputError(f"{prior.directory} records no {name} (an older format): give --{name}")


def choose_cheaper(
    model: str,
    *,
    skip_cache: int | None,
    tea_cache_l1_thresh: float | None,
    tea_cache_model_id: str | None,
) -> dict[str, Any]:
    """skip_cache and TeaCache as RunSettings has them.

    Raises:
        InputError: both at once, or a model without coefficients.
    """
    if tea_cache_l1_thresh is None:
        if tea_cache_model_id:
            raise InputError("--tea_cache_model_id says nothing without --tea_cache_l1_thresh: give both")
        return {"skip_cache": skip_cache, "tea_cache_l1_thresh": None, "tea_cache_model_id": ""}
    if skip_cache is not None:
        raise InputError("--skip_cache and --tea_cache_l1_thresh save the same work: give one of them")
    from step_skip.cheaper import check_tea_cache_model_id

    model_id = tea_cache_model_id or published_name(model)
    check_tea_cache_model_id(model_id)
    return {"skip_cache": None, "tea_cache_l1_thresh": tea_cache_l1_thresh, "tea_cache_model_id": model_id}


def settings_of(plan: Plan, prior: Prior) -> RunSettings:
    """The prior's settings, and of the plan what it decides itself."""
    recorded = {name: prior.metadata[name] for name in _SETTINGS if name in prior.metadata}
    own = {name: getattr(plan, name) for name in _SETTINGS if name in _PLAN}
    if plan.tiled is None:
        del own["tiled"]
    return RunSettings(**{**recorded, **own})


def describe_choices(plan: Plan) -> dict[str, Any]:
    """A plan's entries that decide the video, as they stand in a result's JSON; the image has a checksum."""
    entries = {name: getattr(plan, name) for name in _PLAN}
    for name in ("image", "auto", "knows_nega", "choices"):  # none of them changes the latents
        del entries[name]
    steps = entries.pop("steps_to_run")
    if plan.paths is None:  # else the run decides
        entries["steps_run"] = steps
    return {name: value for name, value in entries.items() if value is not None or name == "start_step"}


# --- what a plan needs --------------------------------------------------------------------------------------


def latents_files(plan: Plan, prior: Prior) -> list[str]:
    """The latents a plan starts from; for a differential resume those before each step, and the clean.

    Two where it starts between them, on the straight line the prior took.
    """
    if plan.start_step is None:  # a differential resume
        last = step_file(prior.num_inference_steps - 1)
        return list(dict.fromkeys([*map(latents_before_file, plan.steps_to_read), last]))
    begin = latents_before_file(plan.start_step + 1)
    return [begin, step_file(plan.start_step + 1)] if part_of_step(plan, prior) else [begin]


def part_of_step(plan: Plan, prior: Prior) -> float:
    """How far into the step after start_step a resume on its own sigmas begins, 0 ... 1."""
    if plan.sigmas is None:
        return 0.0
    return place_on_path(plan.sigmas[0], prior.metadata["scheduler_sigmas"])[1]


def velocity_files(plan: Plan) -> list[str]:
    """The prior's velocities a plan needs: those of the steps of a differential resume."""
    return list(map(noise_pred_file, plan.steps_to_read))


def nega_files(plan: Plan, prior: Prior) -> list[str]:
    """The prior's velocities of the negative branch that a plan needs."""
    if plan.method == "differential" and prior.keeps_nega and plan.cfg_scale != 1:
        return list(map(noise_pred_nega_file, plan.steps_to_read))
    return [noise_pred_nega_file(plan.steps_to_run[0])] if plan.knows_nega else []


def conditioning_files(plan: Plan, prior: Prior) -> list[str]:
    """The prior's conditioning a plan needs; contexts of other prompts are not there."""
    if prior.is_legacy or not plan.steps_to_run:
        return []
    names = dict.fromkeys(map(context_file, plan.texts))
    return [*map(identity_file, prior.identity_names), *filter(prior.has, names)]


def input_files(plan: Plan, prior: Prior) -> list[str]:
    """The prior's files a plan needs."""
    tensors = [*latents_files(plan, prior), *velocity_files(plan), *nega_files(plan, prior)]
    return [*tensors, *conditioning_files(plan, prior)]


def needed_components(plan: Plan, prior: Prior, *, known: Set[str]) -> list[str]:
    """The parts of the model a plan needs: encoders only for what is not encoded already.

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
