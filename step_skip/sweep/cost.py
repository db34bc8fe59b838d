"""Estimate the cost of clips: forwards, seconds and parts of the model. Only file names are read."""

from __future__ import annotations

import json
import statistics
from collections.abc import Collection, Iterable
from pathlib import Path

from step_skip.infer.plan import describe_choices, needed_components
from step_skip.models.weights import COMPONENTS
from step_skip.prior.contexts import is_context_known
from step_skip.sweep.clips import Group, Job


def expected_seconds(job: Job) -> float | None:
    """Return the seconds of denoising and decoding, estimated from the prior's run; None: not recorded."""
    recorded = job.prior.metadata
    if not recorded.seconds_per_step:
        return None
    per_step = statistics.median(recorded.seconds_per_step)
    per_forward = per_step / (1 if recorded.cfg_scale == 1 else 2)
    return per_forward * job.plan.forwards + recorded.seconds.get("decode", 0.0)


def expected_seconds_of_each(jobs: Collection[Job]) -> list[float] | None:
    """Return the expected seconds of each job; None: they are unknown for at least one."""
    known = [seconds for job in jobs if (seconds := expected_seconds(job)) is not None]
    return known if len(known) == len(jobs) else None


def components_to_load(groups: Iterable[Group], folder: Path | None) -> list[str]:
    """Return the parts of the model that jobs will load, as far as file names show.

    Args:
        folder: the sweep's folder, which stores encoded prompts; None: each prior stores its own.
    """
    needed: set[str] = set()
    seen: set[int] = set()  # the ids of plans, which several priors may share
    for group in groups:
        texts = group.texts
        if "text_encoder" in needed or all(is_context_known(group.prior, text, folder) for text in texts):
            known = set(texts)
        else:
            known = set()
        for plan in group.plans:
            if id(plan) not in seen or not known:
                needed |= set(needed_components(plan, group.prior, known=known))
            seen.add(id(plan))
    return [name for name in COMPONENTS if name in needed]


def describe_clip_job(job: Job) -> str:
    """Return a job as one line of JSON: its choices, their cost, and whether the clip exists."""
    model_dir = None if job.plan.choices is None else job.plan.choices.model_dir
    data = {
        "video": str(job.path),
        "prior_dir": str(job.prior.directory),
        "image": None if job.plan.image is None else str(job.plan.image),
        "model_dir": None if model_dir is None else str(model_dir),
        **describe_choices(job.plan),
        "forwards": job.plan.forwards,
        "expected_seconds": expected_seconds(job),
        "made": job.exists,
    }
    return json.dumps(data, ensure_ascii=False)


def summarize_jobs(jobs: Collection[Job]) -> str:
    """Summarize the cost of all jobs together: clips, forwards, seconds."""
    forwards, seconds = sum(job.plan.forwards for job in jobs), expected_seconds_of_each(jobs)
    time = "time unknown" if seconds is None else f"about {sum(seconds):.0f} s after loading and encoding"
    return f"{len(jobs)} clips, {forwards} forwards, {time}"
