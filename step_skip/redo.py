"""--redo_below: the clips of a sweep that came out worst, planned once more in more steps."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterable
from typing import Any, Final

from step_skip.bank import plan_clip
from step_skip.files import InputError
from step_skip.page_clips import read_report
from step_skip.places import slug, video_name
from step_skip.plan_steps import CHOOSE_STEPS, more_steps
from step_skip.schema import is_number
from step_skip.sweep import Group, Job, all_jobs, make_group

log = logging.getLogger(__name__)

MEASURE: Final = "identity"  # of a clip's JSON, by which it is told (docs/measures.md)


def worse_groups(groups: Iterable[Group], *, below: float) -> list[Group]:
    """The clips whose measure is below, as jobs in more steps; those that can't have more are told.

    A clip that isn't there, or was made before there were measures, is left as it is.
    """
    groups = list(groups)
    taken = {job.path for job in all_jobs(groups)}
    found = []
    for group in groups:
        jobs = {job.path: job for each in group.jobs if (job := in_more_steps(group, each, below=below))}
        if jobs := {path: job for path, job in jobs.items() if path not in taken}:
            taken |= jobs.keys()
            found.append(make_group([member.prior for member in group.members], list(jobs.values())))
    return found


def in_more_steps(group: Group, job: Job, *, below: float) -> Job | None:
    """The same clip in more steps; None: it came out, or there is no such clip."""
    try:
        report = read_report(job.report_path)
        if not (is_number(report.get(MEASURE)) and report[MEASURE] < below):
            return None
        more = more_steps(report)
        if more is None or job.plan.choices is None:
            raise InputError("it has no more steps")
        steps: dict[str, Any] = {**dict.fromkeys(CHOOSE_STEPS), **more}
        choices = dataclasses.replace(job.plan.choices, **steps)
        bank = [member.prior for member in group.members]
        plan = plan_clip(choices, bank)
    except InputError as error:
        if job.report_path.exists():
            log.warning(f"{job.path.name} is not made again: {error}")
        return None
    name = f"{slug(group.prior.metadata['run_id'])}_{video_name(plan)}"
    return dataclasses.replace(job, plan=plan, name=name, made=False)
