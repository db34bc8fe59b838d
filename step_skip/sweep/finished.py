"""Which videos are there already: whole, and by the choices that a job has. No tensor and no video is read.

What is trusted for that: the sums that a prior's sealed metadata records of its files, and that a video of
the size its JSON records, and no newer than that, is the one the JSON was written for. Another is hashed.
Nothing is used on such grounds: before a prior gives anything to a video, its files are hashed (inputs.py).
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
from collections.abc import Collection
from pathlib import Path
from typing import Any

from step_skip.errors import InputError
from step_skip.files.bounds import MAX_METADATA_BYTES
from step_skip.files.reading import read_file, sha256_file
from step_skip.infer.inputs import check_inputs
from step_skip.infer.plan import settings_of
from step_skip.infer.report import describe_settings
from step_skip.media.videos import video_bytes
from step_skip.sweep.clips import Group, Job
from step_skip.sweep.outputs import free_path, is_taken, names_from


def find_made(groups: Collection[Group]) -> dict[Path, Exception]:
    """Note of each job whether its video is there.

    Returns:
        By video what is wrong with older priors, which record no sums, so that their files are read.

    Raises:
        InputError: the same, of the only prior.
    """
    failed: dict[Path, Exception] = {}
    names: dict[Path, set[str]] = {}  # what there is in each folder
    for group in groups:
        folder = group.jobs[0].folder
        if folder not in names:
            names[folder] = set(os.listdir(folder)) if folder.is_dir() else set()  # noqa: PTH208  half the time
        try:
            if group.prior.is_legacy:
                check_inputs(group, group.plans)
            for job in group.jobs:
                job.made = f"{job.name}.json" in names[folder] and is_made(job, group)
        except InputError as error:
            if len(groups) == 1:
                raise
            failed |= {job.path: error for job in group.jobs}
    return failed


def is_made(job: Job, group: Group) -> bool:
    """Whether the video is there and whole, and its JSON says it is the one this job would make."""
    try:  # the folder may be anybody's
        found = json.loads(read_file(job.report_path, most=MAX_METADATA_BYTES))
        expected = json.loads(json.dumps(describe_settings(group, job.plan)))  # tuples become lists
        same = all(found[name] == value for name, value in expected.items())
        saved = not job.save_prior or Path(found["saved_prior"]).is_dir()
        return same and saved and is_whole(job, found)
    except (ValueError, TypeError, KeyError, RecursionError):
        return False


def is_whole(job: Job, report: dict[str, Any]) -> bool:
    """Whether a video is the one its JSON was written for: by size and time, else by its SHA-256."""
    try:
        video, beside = os.lstat(job.path), os.lstat(job.report_path)
    except OSError:
        return False
    if video.st_size == report.get("video_bytes") and video.st_mtime_ns <= beside.st_mtime_ns:
        return not job.path.is_symlink()
    most = 4 * video_bytes(settings_of(job.plan, job.prior).size) + 2**22
    return report["video_sha256"] == sha256_file(job.path, most=most)


def settle_single(group: Group, *, output: Path | None, overwrite: bool) -> None:
    """Give a single video its place: where it is made already, else --output or the next free name.

    Raises:
        InputError: something else has the name that --output asks for.
    """
    [job] = group.jobs
    if output is None:
        before = itertools.takewhile(is_taken, names_from(job.path))
        made = (
            name
            for name in before
            if is_made(dataclasses.replace(job, folder=name.parent, name=name.stem), group)
        )
        job.path = next(made, None) or free_path(job.path)
    elif is_taken(output) and not overwrite and not is_made(job, group):
        taken = output if os.path.lexists(output) else job.report_path
        raise InputError(f"--output: {taken} exists; choose another name or add --overwrite")
