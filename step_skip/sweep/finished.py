"""Find the clips that exist: complete, and made by the choices of their jobs. No tensor or frame is read.

Two assumptions make this fast. The SHA-256 that a prior's checksummed metadata records of a file is taken to
be right; and an .mp4 that has the size recorded in its JSON, and isn't newer than it, is taken to be the file
that the JSON describes. Any other .mp4 is hashed. No new clip relies on these assumptions: the files of a
prior are hashed before it is used (infer/inputs.py).
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
from collections.abc import Collection
from pathlib import Path

from step_skip.errors import InputError
from step_skip.files.reading import sha256_file
from step_skip.infer.inputs import check_inputs
from step_skip.infer.plan import settings_of
from step_skip.infer.report import describe_settings
from step_skip.infer.schema import ClipReport, parse_report, read_report_entries
from step_skip.media.videos import video_bytes
from step_skip.sweep.clips import Group, Job
from step_skip.sweep.outputs import free_path, is_taken, names_from


def find_existing(groups: Collection[Group]) -> dict[Path, Exception]:
    """Mark each job whose clip exists.

    Returns:
        The errors of older priors, by clip; these record no SHA-256, so that their files are read.

    Raises:
        InputError: the only prior is such a prior with an error.
    """
    failed: dict[Path, Exception] = {}
    names: dict[Path, set[str]] = {}  # the names of the files in each folder
    for group in groups:
        folder = group.jobs[0].folder
        if folder not in names:
            names[folder] = set(os.listdir(folder)) if folder.is_dir() else set()  # noqa: PTH208  half the time
        try:
            if group.prior.is_legacy:
                check_inputs(group, group.plans)
            for job in group.jobs:
                job.exists = f"{job.name}.json" in names[folder] and is_finished(job, group)
        except InputError as error:
            if len(groups) == 1:
                raise
            failed |= {job.path: error for job in group.jobs}
    return failed


def is_finished(job: Job, group: Group) -> bool:
    """Return whether the clip is complete and, by its JSON, the same as this job would make."""
    try:  # the folder may come from an untrusted source
        found = read_report_entries(job.report_path)
        expected = json.loads(json.dumps(describe_settings(group, job.plan)))  # tuples become lists
        same = all(found[name] == value for name, value in expected.items())
        if not same:
            return False
        report = parse_report(found, job.report_path.name, required=("video_sha256",))
        saved = not job.save_prior or (report.saved_prior is not None and Path(report.saved_prior).is_dir())
        return saved and is_whole(job, report)
    except (InputError, KeyError):
        return False


def is_whole(job: Job, report: ClipReport) -> bool:
    """Return whether an .mp4 is the file that its JSON describes, by size and time or by its SHA-256."""
    try:
        video, beside = os.lstat(job.path), os.lstat(job.report_path)
    except OSError:
        return False
    if video.st_size == report.video_bytes and video.st_mtime_ns <= beside.st_mtime_ns:
        return not job.path.is_symlink()
    most = 4 * video_bytes(settings_of(job.plan, job.prior).size) + 2**22
    return report.video_sha256 == sha256_file(job.path, most=most)


def settle_single(group: Group, *, output: Path | None, overwrite: bool) -> None:
    """Name a single clip: after the same clip if it exists, else as --output, else by the next free name.

    Raises:
        InputError: another file has the name of --output.
    """
    [job] = group.jobs
    if output is None:
        before = itertools.takewhile(is_taken, names_from(job.path))
        finished = (
            name
            for name in before
            if is_finished(dataclasses.replace(job, folder=name.parent, name=name.stem), group)
        )
        job.path = next(finished, None) or free_path(job.path)
    elif is_taken(output) and not overwrite and not is_finished(job, group):
        taken = output if os.path.lexists(output) else job.report_path
        raise InputError(f"--output: {taken} exists; choose another name or add --overwrite")
