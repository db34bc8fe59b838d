"""Follow the nearest of several priors of one identity: a bank.

Priors of the same image, size, seed, schedule and model begin at the same latents and see the same besides
their prompts. So a new prompt's first velocity, evaluated once, can be compared with each prior's own
(method/closeness.py); to choose the nearest costs nothing.
"""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Iterable, Sequence

from step_skip.errors import InputError
from step_skip.infer.choices import Choices
from step_skip.infer.plan import Plan, make_plan
from step_skip.pipeline.settings import SCHEDULE_FLAGS
from step_skip.prior.prior import INITIAL_LATENTS_FILE, Prior, identity_file

log = logging.getLogger(__name__)

SHARED = (
    *SCHEDULE_FLAGS,
    *("height", "width", "num_frames", "fps", "cfg_scale", "cfg_scale_2", "switch_DiT_boundary"),
    *("model", "family", "dtype", "lora", "negative_prompt", "model_fingerprint", "keeps_nega"),
    *("quantize", "compile"),
)


def gather_banks(priors: Iterable[Prior]) -> list[list[Prior]]:
    """Put the priors together that begin alike, in order; one that begins like no other stays alone.

    Raises:
        InputError: one that records no beginning, of an older format or stopped early.
    """
    banks: dict[str, list[Prior]] = {}
    for prior in priors:
        banks.setdefault(describe_beginning(prior), []).append(prior)
    if len(banks) > 1:
        sizes = ", ".join(str(len(bank)) for bank in banks.values())
        log.info(
            f"--nearest: {len(banks)} identities or settings, with {sizes} priors; each goes its own way"
        )
    return list(banks.values())


def check_one_bank(priors: Sequence[Prior]) -> None:
    """Refuse priors that don't begin alike.

    Raises:
        InputError: naming two of them, and what differs.
    """
    if not priors:
        raise InputError("no prior was given; name at least one")
    if len(priors) == 1:
        return
    banks = gather_banks(priors)
    if len(banks) > 1:
        one, other = (json.loads(describe_beginning(bank[0])) for bank in banks[:2])
        differ = next(name for name in one.keys() | other.keys() if one.get(name) != other.get(name))
        raise InputError(
            f"{banks[0][0].directory} and {banks[1][0].directory} differ in {differ}, and the nearest is "
            "found only among priors of one image, size, seed, schedule and model"
        )


def describe_beginning(prior: Prior) -> str:
    """Return as text what priors share that differ only in their prompt.

    Raises:
        InputError: it is of an older format, or was stopped early.
    """
    if prior.is_legacy or not prior.is_complete:
        why = "is of an older format" if prior.is_legacy else "was stopped early"
        raise InputError(f"--nearest: {prior.directory} {why}; give whole priors, or leave the flag out")
    recorded = prior.metadata.recorded()
    files = (INITIAL_LATENTS_FILE, *map(identity_file, prior.identity_names))
    same = {name: recorded.get(name) for name in SHARED} | {
        name: recorded["files"].get(name) for name in files
    }
    return json.dumps(same, sort_keys=True)


def narrowed(bank: Sequence[Prior]) -> Prior:
    """Return the first prior of a bank, with only the steps that all of them keep.

    Raises:
        InputError: there are none.
    """
    first = bank[0]
    if all(prior.kept_steps == first.kept_steps for prior in bank):
        return first
    every = range(first.num_inference_steps)
    steps = (every if prior.kept_steps is None else prior.kept_steps for prior in bank)
    common = sorted(set.intersection(*map(set, steps)))
    if not common:
        raise InputError(f"--nearest: {first.directory} and the others keep no step in common; name others")
    return Prior(first.directory, first.metadata.model_copy(update={"kept_steps": common}))


def plan_clip(choices: Choices, bank: Sequence[Prior]) -> Plan:
    """Plan one clip of a prior or a bank; see `make_plan` and `plan_for_bank`."""
    return plan_for_bank(make_plan(choices, narrowed(bank)), bank)


def plan_for_bank(plan: Plan, bank: Sequence[Prior]) -> Plan:
    """Return the plan of a bank's first prior as a plan for the whole bank.

    Raises:
        InputError: it doesn't begin where the priors do.
    """
    if len(bank) == 1:
        return plan
    if plan.method != "differential" or plan.steps_to_run[0] != 0:
        raise InputError(
            "--nearest compares priors by the first step: leave --start_step and --sigmas out, and let "
            "--steps begin with 0"
        )
    return dataclasses.replace(plan, nearest_of=tuple(prior.metadata.run_id for prior in bank))
