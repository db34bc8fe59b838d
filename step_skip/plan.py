"""One video to make from a prior, as data: every choice, and what has to be read for it.

Choices and a prior's metadata go in, a `Plan` comes out. Nothing is loaded and nothing shared: any machine
that has the prior can run it. The arithmetic of steps and sigmas is at the end.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

from step_skip.closeness import CLOSENESS, DEFAULT_CLOSENESS, FIT
from step_skip.compute import inherited
from step_skip.experts import check_tea_cache_experts, choose_guidance, experts_of
from step_skip.files import InputError
from step_skip.lora import Lora, check_lora_experts, describe_loras, parse_recorded_loras
from step_skip.memory import in_tiles
from step_skip.models import (
    cache_components,
    model_defaults,
    published_name,
)
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
from step_skip.steps import (
    DEFAULT_TEXT_SHARE,
    SAME_SIGMA,
    AutoStep,
    choose_start_step,
    place_on_path,
    recommended_num_steps,
    recommended_start_step,
    spread_steps,
    tail_sigmas,
)

if TYPE_CHECKING:
    from PIL.Image import Image

CHEAPER_NAMES = ("skip_cache", "tea_cache_l1_thresh", "tea_cache_model_id")
FIXED: Final = ("seed", "num_frames", "height", "width")  # by the prior's latents
AUTO: Final = "auto"  # --start_step by the prior, --num_steps by the clip, --vae_tiling by sizes


@dataclass(frozen=True, kw_only=True)
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


@dataclass(frozen=True, kw_only=True)
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
    def forwards(self) -> int:
        """Network evaluations; the most, where the first one decides how many."""
        steps = len(self.steps_to_run)
        scales = self.cfg_scale if isinstance(self.cfg_scale, tuple) else (self.cfg_scale,) * steps
        return sum(1 if scale == 1 else 2 for scale in scales) - self.knows_nega


def make_plan(choices: Choices, prior: Prior) -> Plan:
    """Take from the prior what the command line left open, and refuse what contradicts it.

    Args:
        choices: of one video.

    Raises:
        InputError: with the flag, the prior's value and what to do.
    """
    check_choices(choices, prior)
    model = choices.model or prior.metadata.get("model", "I2V-480P")
    defaults = model_defaults(model, choices.model_dir)
    given = {name: value for name, value in vars(choices).items() if value is not None}
    chosen = {**dataclasses.asdict(defaults), **prior.metadata, **given}
    steps = choose_steps(choices, prior)
    experts = experts_of(steps["steps_to_run"], steps["sigmas"], prior)
    check_tea_cache_experts(choices.tea_cache_l1_thresh, experts)
    recorded = prior.metadata.get("lora", [])  # its files are opened only when a model is to be loaded
    given_loras = parse_recorded_loras(recorded) if choices.lora is None else choices.lora
    check_lora_experts(given_loras, experts=len(prior.family.experts))
    plan = Plan(
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
        prompt=chosen["prompt"],
        negative_prompt=chosen["negative_prompt"],
        cfg_scale=choose_guidance(
            prior,
            cfg_scale=choices.cfg_scale,
            cfg_scale_2=choices.cfg_scale_2,
            default=defaults.cfg_scale,
            experts=experts,
        ),
        fps=chosen["fps"],
        image=choices.image,
        model=model,
        dtype=choices.dtype or prior.metadata.get("dtype"),
    )
    plan = dataclasses.replace(plan, knows_nega=knows_first_nega(plan, prior))
    check_kept(plan, prior)
    return plan


def check_kept(plan: Plan, prior: Prior) -> None:
    """Refuse steps that were taken out of a pruned prior.

    Raises:
        InputError: with those that are left.
    """
    if prior.kept_steps is not None and not all(map(prior.has, input_files(plan, prior))):
        raise InputError(
            f"{prior.directory} was pruned to steps {ranges(prior.kept_steps)}, and this needs others; "
            "choose among them with --steps, or make the prior again"
        )


def knows_first_nega(plan: Plan, prior: Prior) -> bool:
    """Whether the first step's negative branch is one the prior evaluated: same latents, text and network."""
    first = plan.cfg_scale[0] if isinstance(plan.cfg_scale, tuple) else plan.cfg_scale
    return (
        prior.keeps_nega
        and plan.method in ("differential", "resume")
        and bool(plan.steps_to_run)
        and first != 1
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


def choose_steps(choices: Choices, prior: Prior) -> dict[str, Any]:
    """Method, start_step, steps_to_run and sigmas of a plan, and auto where that chose them.

    Raises:
        InputError: a step the prior doesn't have, or a prior without what a differential resume needs.
    """
    if choices.sigmas is not None:
        return own_sigmas(choices.sigmas, prior)
    differential = choices.steps is not None or choices.num_steps is not None
    if choices.closeness is not None and choices.num_steps != AUTO:
        raise InputError("--closeness is what --num_steps auto goes by: give that, too")
    if prior.is_legacy and differential:
        raise InputError(
            "--steps needs the prior's velocities, which this older format lacks; use --start_step"
        )
    if not prior.is_complete and differential:
        raise InputError(
            f"--steps needs the prior's clean latents, and {prior.directory} was stopped after step "
            f"{prior.whole_steps - 1}; use --start_step, or finish it with generate_prior.py --resume"
        )
    if choices.start_step == AUTO:
        auto = choose_start_step(prior, choices.text_share or DEFAULT_TEXT_SHARE)
        return remaining_steps(auto.step, prior, num_steps=choices.num_steps_after) | {"auto": auto}
    resumes = not differential and prior.metadata.get("start_step_chosen", prior.is_legacy)
    if resumes or choices.start_step is not None or not prior.is_complete:
        start_step = resolve_start_step(choices.start_step, prior)
        return remaining_steps(start_step, prior, num_steps=choices.num_steps_after)
    if choices.num_steps_after is not None:
        raise InputError("--num_steps_after spaces anew what is left after a step: give --start_step, too")
    paths = auto_paths(choices, prior) if choices.num_steps == AUTO else None
    return {
        "method": "differential",
        "start_step": None,
        "steps_to_run": differential_steps(choices, prior) if paths is None else list(paths[-1]),
        "sigmas": None,
        "paths": paths,
        "closeness": None if paths is None else choices.closeness or CLOSENESS[DEFAULT_CLOSENESS],
    }


def auto_paths(choices: Choices, prior: Prior) -> tuple[tuple[int, ...], ...]:
    """The paths among which the first evaluation chooses, few steps first.

    Raises:
        InputError: what runs in two parts can't have them, or the prior has none of them.
    """
    for name in ("skip_cache", "tea_cache_l1_thresh"):
        if getattr(choices, name) is not None:
            raise InputError(
                f"--num_steps auto and --{name} can't be had together: give --num_steps a number"
            )
    if isinstance(choices.cfg_scale, Sequence) and len(choices.cfg_scale) > 1:
        raise InputError("--num_steps auto: give one --cfg_scale; how many steps run is not known before")
    if len(prior.family.experts) > 1:
        raise InputError("--num_steps auto: a model of two experts can't; give --num_steps a number")
    total = prior.num_inference_steps
    paths = (tuple(spread_steps(total, number)) for number in FIT if number <= total)
    kept = [path for path in paths if prior.kept_steps is None or set(path) <= set(prior.kept_steps)]
    return tuple(kept) or (tuple(prior.kept_steps or ()),)


def own_sigmas(sigmas: Sequence[float], prior: Prior) -> dict[str, Any]:
    """A resume on sigmas of its own, from where the prior's path is at the first of them.

    Raises:
        InputError: they don't decrease, or begin where the prior holds nothing.
    """
    if sigmas[-1] <= 0 or any(after >= now * (1 - SAME_SIGMA) for now, after in itertools.pairwise(sigmas)):
        raise InputError(f"--sigmas {' '.join(map(str, sigmas))}: expected decreasing values above 0")
    known = prior.metadata["scheduler_sigmas"]
    try:
        step, _ = place_on_path(sigmas[0], known)
    except ValueError:
        raise InputError(
            f"--sigmas {sigmas[0]}: the prior begins at sigma {known[0]:.6g}; begin there or below"
        ) from None
    whole = prior.whole_steps
    if sigmas[0] < (known[whole] if whole < len(known) else 0.0) * (1 - SAME_SIGMA):
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
    return {"method": "sigmas", "start_step": step - 1, "steps_to_run": steps, "sigmas": tuple(sigmas)}


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
    begin = min(m["scheduler_sigmas"][start_step + 1], 1.0)  # not compared with the scheduler's yet
    return {
        "method": "sigmas",
        "start_step": start_step,
        "steps_to_run": list(range(num_steps)),
        "sigmas": tuple(tail_sigmas(begin, num_steps, sigma_shift=m["sigma_shift"])),
    }


def resolve_start_step(choice: int | None, prior: Prior) -> int:
    """The step of this prior that a --start_step means; None: the prior's recommendation, or its last step.

    Raises:
        InputError: the prior has no such step.
    """
    total = prior.num_inference_steps
    last = total - 1 if prior.is_complete else prior.whole_steps - 1
    if choice is None and prior.is_complete:
        return prior.metadata.get("start_step", recommended_start_step(total))
    if choice is not None and not 0 <= choice <= last:
        raise InputError(f"--start_step {choice}: the prior has steps 0 to {last}")
    return last if choice is None else choice


def differential_steps(choices: Choices, prior: Prior) -> list[int]:
    """The steps of a differential resume: those given, or so many at their places in the schedule.

    Raises:
        InputError: the prior has no such steps.
    """
    total = prior.num_inference_steps
    num_steps = recommended_num_steps(total) if choices.num_steps is None else int(choices.num_steps)
    if not 1 <= num_steps <= total:
        raise InputError(f"--num_steps {num_steps}: the prior has only {total} steps")
    steps = list(choices.steps or spread_steps(total, num_steps))
    is_chosen = choices.steps is not None or choices.num_steps is not None
    if prior.kept_steps is not None and not is_chosen and not set(steps) <= set(prior.kept_steps):
        steps = list(prior.kept_steps)
    if sorted(set(steps)) != steps or not 0 <= steps[0] <= steps[-1] < total:
        raise InputError(f"--steps {steps}: expected increasing steps between 0 and {total - 1}")
    return steps


def settings_of(plan: Plan, prior: Prior) -> RunSettings:
    """The prior's settings, and of the plan what it decides itself."""
    names = {field.name for field in dataclasses.fields(RunSettings)}
    own = {name: value for name, value in vars(plan).items() if name in names}
    if plan.tiled is None:
        del own["tiled"]
    recorded = {name: value for name, value in prior.metadata.items() if name in names}
    return RunSettings(**{**recorded, **own})


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
