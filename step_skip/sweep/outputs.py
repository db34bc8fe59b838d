"""Name clips after their choices, lock a sweep's folder, and refuse to replace other files."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
from collections.abc import Iterator
from pathlib import Path

from step_skip.errors import InputError
from step_skip.files.names import MAX_NAME_BYTES, slug
from step_skip.files.writing import locked
from step_skip.infer.plan import Plan, describe_choices
from step_skip.prior.files import check_way
from step_skip.prior.prior import OUTPUT_FILE, Prior
from step_skip.prior.schema import METADATA_FILE


@contextlib.contextmanager
def sweep_folder(folder: Path) -> Iterator[None]:
    """Make a sweep's folder, lock it, and remove the temporary files that a killed run left.

    Raises:
        InputError: another process writes to the folder, or it isn't writable.
    """
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with locked(folder):
            yield
    finally:
        with contextlib.suppress(OSError):  # the folder isn't empty
            folder.rmdir()


def check_output(path: Path, prior: Prior) -> None:
    """Refuse an --output that isn't a valid path for a clip, or that would replace a file of the prior.

    Raises:
        InputError: states the reason.
    """
    if path.suffix != ".mp4":
        raise InputError(f"--output {path}: expected a name that ends in .mp4")
    check_way(path.parent)
    report = path.with_suffix(".json")
    if len(report.name.encode()) > MAX_NAME_BYTES:
        raise InputError(
            f"--output: a name of {len(path.name.encode())} bytes is too long; use a shorter one"
        )
    own = {METADATA_FILE, OUTPUT_FILE, *prior.metadata.files}
    inside = path.parent.exists() and path.parent.samefile(prior.directory)
    if inside and own & {path.name.lower(), report.name.lower()}:  # some file systems ignore case
        raise InputError(f"--output {path} would replace a file of the prior itself; choose another name")
    for each in (path, report):
        if each.is_dir():
            raise InputError(f"--output: {each} is a folder; choose another name")


def free_path(path: Path) -> Path:
    """Return this name or, if a file has it, the next that is free: name_2.mp4 ..."""
    return next(name for name in names_from(path) if not is_taken(name))


def names_from(path: Path) -> Iterator[Path]:
    """Yield name.mp4, name_2.mp4 ..."""
    return (path.with_stem(f"{path.stem}_{again}") if again > 1 else path for again in itertools.count(1))


def is_taken(path: Path) -> bool:
    """Return whether a file has a clip's name, or that of the JSON file beside it."""
    return os.path.lexists(path) or os.path.lexists(path.with_suffix(".json"))


def clip_name(plan: Plan) -> str:
    """Return a file name without suffix: steps, prompt, and a digest that differs for every choice."""
    if plan.closeness is not None:
        start = f"close{plan.closeness:g}"
    elif plan.sigmas is not None:
        start = f"sigma{plan.sigmas[0]:.3f}-{len(plan.sigmas)}steps"
    elif plan.method == "resume":
        start = f"step{plan.start_step:02d}"
    elif len(plan.steps_to_run) <= 6:
        start = "steps" + "-".join(map(str, plan.steps_to_run))
    else:
        start = f"{len(plan.steps_to_run)}steps"
    start = f"nearest-{start}" if plan.nearest_of else start
    strengths = [lora.alpha for lora in plan.lora]
    if any(strength != 1 for strength in strengths):
        start += "_lora" + "-".join(f"{strength:g}" for strength in strengths)
    digest = hashlib.sha256(json.dumps(describe_choices(plan)).encode()).hexdigest()[:8]
    return f"{start}_{slug(plan.prompt)}_{digest}"
