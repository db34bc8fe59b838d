"""Warn before a clip is made: of what differs from the prior, and of a prompt that comes in too late."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from step_skip.infer.plan import Plan
from step_skip.method.steps import is_late
from step_skip.models.compute import OFF
from step_skip.models.embedded import warn_of_embedded
from step_skip.models.families import MODELS
from step_skip.models.lora import summarize_loras
from step_skip.models.machine import differences_since
from step_skip.models.weights import LoadOptions
from step_skip.prior.prior import Prior

log = logging.getLogger(__name__)


def warn_before_run(
    clips: Iterable[tuple[Plan, Prior]], options: LoadOptions, *, is_here: bool = True
) -> None:
    """Warn, of each thing once, before the clips of these plans are made.

    Args:
        options: of the model they are made on.
        is_here: they are made in this process; else each machine warns of what differs there.
    """
    firsts: dict[Path, tuple[Plan, Prior]] = {}  # what is the same for all clips of a prior
    texts: dict[str, Prior] = {}
    late: list[tuple[int, Prior]] = []
    for plan, prior in clips:
        firsts.setdefault(prior.directory, (plan, prior))
        texts |= dict.fromkeys(plan.texts, prior)
        if (step := late_start(plan, prior)) is not None:
            late.append((step, prior))
    doubts: list[str] = []
    for plan, prior in firsts.values():
        doubts += doubts_of(plan, prior, device=options.device) if is_here else ()
        doubts += what_differs(plan, prior)
    for doubt in dict.fromkeys(doubts):
        log.warning(doubt)
    if late:
        warn_of_old_motion(*min(late, key=lambda each: each[0]))
    warn_of_words(texts, options)


def what_differs(plan: Plan, prior: Prior) -> Iterator[str]:
    """Yield how the prior was made in another way, so that its own prompt won't give its own video."""
    own, given = (summarize_loras(each) for each in (prior.metadata.lora, plan.lora))
    if own != given:
        yield f"runs with {given}, and the prior was made with {own}: a mix of two models, as asked for"
    for name in ("quantize", "compile"):
        then, now = getattr(prior.metadata, name) or OFF, getattr(plan, name) or OFF
        if then != now:
            yield (
                f"runs with --{name} {now}, and the prior was made with {then}: its own prompt gives nearly "
                "its own video"
            )
    if prior.metadata.lora and plan.model in MODELS and not prior.metadata.vram:
        yield (
            "the prior doesn't record its --vram: with low, an earlier version added LoRAs while it ran, and "
            "the last bits differ"
        )
    if plan.tiled is not None:
        yield "decodes with another --vae_tiling than the prior: the same latents, nearly the same frames"
    for name in ("skip_cache", "tea_cache_l1_thresh"):
        value = getattr(prior.metadata, name)
        if value is not None and value != getattr(plan, name):
            yield (
                f"the prior was made with --{name} {value}, which is not inherited; give it, too, to have "
                "steps as cheap, and without it the prior's own prompt gives nearly the prior's video"
            )


def warn_of_words(texts: Mapping[str, Prior], options: LoadOptions) -> None:
    """Warn of what the embedded model doesn't understand of prompts that are not their priors' own.

    Args:
        texts: each with the prior that it is for.
    """
    new = (
        text
        for text, prior in texts.items()
        if text not in (prior.metadata.prompt, prior.metadata.negative_prompt)
    )
    warn_of_embedded(options, new)


# Clips of the embedded model that showed the new motion, resumed after 6 of 10, by the prior's kind; a full
# run: 100%. From benchmarks/results/promise/headline.md.
OBEYED_AFTER_6 = {"prompted": "23% (20% if its prior holds still)", "neutral": "69%"}


def warn_of_old_motion(start_step: int, prior: Prior) -> None:
    """Warn that a new prompt comes in after this step, too late to be obeyed: motion is settled early."""
    kind = prior.metadata.prior_kind
    obeyed = OBEYED_AFTER_6.get(kind, OBEYED_AFTER_6["prompted"])
    advice = "make the prior again" if prior.is_legacy else "leave --start_step out"
    log.warning(
        f"resuming after step {start_step} of {prior.num_inference_steps} is late for a new motion: "
        f"after 6 of 10, {obeyed} of the embedded model's clips obeyed a new prompt, 100% in a full run; "
        f"{advice} to have it obeyed in as many steps"
    )


def late_start(plan: Plan, prior: Prior) -> int | None:
    """Return the step after which a plan brings a new prompt in, if most of the motion is settled by then."""
    step = plan.start_step
    if step is None or plan.prompt == prior.metadata.prompt:
        return None
    return step if is_late(step, prior.num_inference_steps) else None


def doubts_of(plan: Plan, prior: Prior, *, device: str) -> Iterator[str]:
    """Yield what could not be checked, and what differs from when the prior was made and may change bits."""
    if prior.is_legacy:
        yield (
            f"{prior.directory} is of an older format, so these could not be checked: model "
            f"({plan.model} assumed), weights, image, prompts, cfg_scale, seed, checksums, "
            "versions, device"
        )
        return
    names = ("torch", "diffsynth", "device_name", "attention")
    differ = [
        f"{name} {now} (then {then!r})"
        for name, now, then in differences_since(prior.metadata.machine, device, names)
    ]
    if differ:
        yield f"not as when the prior was made: {', '.join(differ)}; the result may differ in the last bits"
