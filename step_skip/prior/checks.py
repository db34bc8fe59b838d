"""Check that a prior fits: the schedule, the weights, and what a run that goes on needs."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping, Sequence

from step_skip.errors import InputError
from step_skip.models.loading import UNVERIFIED, Model
from step_skip.models.weights import ENCODERS
from step_skip.prior.prior import Prior, step_ranges
from step_skip.prior.schema import METADATA_FILE

log = logging.getLogger(__name__)


def check_fingerprint(prior: Prior, found: Mapping[str, str]) -> None:
    """Compare the weights, by component, with those the prior was made with.

    A prior made without Skip-Cache records no skip_branch: it used none, so any will do.

    Raises:
        InputError: they differ.
    """
    for component, digest in () if prior.is_legacy else found.items():
        recorded = prior.metadata.model_fingerprint.get(component)
        if recorded != digest and (component, recorded) != ("skip_branch", None):
            raise InputError(
                f"the {component} weights are not those the prior was made with (fingerprint {digest[:12]}, "
                f"expected {str(recorded)[:12]}); name the right ones with --model_dir or make the prior "
                "again"
            )


def check_model(model: Model, prior: Prior) -> None:
    """Compare the weights with those a prior was made with: by their files, else by their values.

    Raises:
        InputError: they differ.
    """
    if model.fingerprint and prior.metadata.model_fingerprint:
        check_fingerprint(prior, model.fingerprint)
        return
    recorded, found = prior.metadata.parameter_fingerprint, model.parameters
    known = {name for name in found if UNVERIFIED not in (recorded.get(name, UNVERIFIED), found[name])}
    for name in sorted(known - set(ENCODERS)):  # what they made of image and prompts is on disk
        if recorded[name] != found[name]:
            raise InputError(
                f"the {name} weights are not those the prior was made with (fingerprint "
                f"{found[name][:12]}, expected {recorded[name][:12]}); load the right ones, with the "
                "same LoRAs, or make the prior again"
            )
    if not known & {"dit", "dit2"}:
        log.warning(f"unverified: nothing tells whether {prior.directory} was made with these weights")


# what a run that goes on needs of the one before, and the earliest priors of version 1 lack
PROGRESS_KEYS = (
    "stop_after",
    "save_decoded_videos",
    "device",
    "seconds_per_step",
    "forwards_per_step",
    "skip_cache",
    "tea_cache_l1_thresh",
    "tea_cache_model_id",
    "lora",
)


# --- whether a run can go on --------------------------------------------------------------------------------


def check_progress(prior: Prior) -> None:
    """Check what a run that goes on needs of the one before.

    Raises:
        InputError: an older format, which lacks it, or an entry that says something impossible.
    """
    if prior.is_legacy:
        raise InputError("its format is an older one, which records no settings; make it again")
    m = prior.metadata
    if prior.kept_steps is not None:
        raise InputError(f"it keeps only steps {step_ranges(prior.kept_steps)}; make it again")
    for key in PROGRESS_KEYS:
        if key not in m.model_fields_set:
            raise InputError(f"{METADATA_FILE} lacks {key!r}; it is older, or was edited: make it again")
    lists: dict[str, Sequence[float]] = {
        "seconds_per_step": m.seconds_per_step,
        "forwards_per_step": m.forwards_per_step,
    }
    if m.formation.branch_distances is not None:
        lists["branch_distances"] = m.formation.branch_distances
    for key, values in lists.items():
        if len(values) < prior.whole_steps:
            raise InputError(f"{METADATA_FILE} has no number for each step in {key}; make it again")


def check_schedule(prior: Prior, *, timesteps: Iterable[float], sigmas: Iterable[float]) -> None:
    """Compare every timestep and sigma the installed scheduler computes with those the prior recorded.

    Args:
        timesteps: of the full schedule, num_inference_steps values in 0 ... 1000.
        sigmas: likewise, in 0 ... 1; DiffSynth leaves out the closing 0.

    Raises:
        InputError: they differ, so the latents are not at the noise level the scheduler would assume.
    """
    m = prior.metadata
    for key, recorded, given in (
        ("scheduler_timesteps", m.scheduler_timesteps, timesteps),
        ("scheduler_sigmas", m.scheduler_sigmas, sigmas),
    ):
        computed = list(given)
        if len(recorded) != len(computed):
            raise InputError(
                f"{key}: the prior has {len(recorded)} entries, the installed scheduler {len(computed)}"
            )
        for step, (old, new) in enumerate(zip(recorded, computed, strict=True)):
            if not math.isclose(old, new, rel_tol=1e-6, abs_tol=1e-9):
                raise InputError(
                    f"{key}[{step}]: the prior has {old:.6f}, the installed scheduler gives {new:.6f}; "
                    f"use diffsynth {m.versions.get('diffsynth', 'as it was then')} "
                    "or make the prior again"
                )


def check_installed_schedule(prior: Prior) -> None:
    """Recompute the schedule with the installed scheduler and compare every value.

    Raises:
        InputError: they differ.
    """
    from step_skip.pipeline.schedulers import compute_schedule

    timesteps, sigmas = compute_schedule(**prior.schedule_settings)
    check_schedule(prior, timesteps=timesteps, sigmas=sigmas)
