"""The folder of a new prior: its name, and that no other has it."""

from __future__ import annotations

import itertools
import re
import time
from collections.abc import Collection, Iterator
from pathlib import Path

from step_skip.files import InputError
from step_skip.schema import METADATA_FILE

TIME_FORMAT = "%Y%m%d_%H%M%S"


def check_run_id(output_dir: Path, run_id: str | None, *, but_priors: bool = False) -> None:
    """Refuse a run id that is taken, or that is no part of a file's name.

    Args:
        but_priors: let one pass that a prior has: it may be the one that is asked for.

    Raises:
        InputError: it is.
    """
    if run_id is not None and not re.fullmatch(r"[\w.-]+", run_id, flags=re.ASCII):
        raise InputError(f"--run_id {run_id!r}: use letters, digits, . _ and - only")
    if run_id is None or (but_priors and (output_dir / f"run_{run_id}" / METADATA_FILE).exists()):
        return
    if (output_dir / f"run_{run_id}").exists():
        raise InputError(
            f"{output_dir / f'run_{run_id}'} exists and is never overwritten; "
            "choose another --run_id, remove it, or finish it with --resume"
        )


def free_run_id(output_dir: Path, name: str, *, taken: Collection[str]) -> str:
    """An id from a name, "" for the date and time, that neither a folder nor one of these has."""
    wanted = name or time.strftime(TIME_FORMAT)
    return next(
        each for each in numbered(wanted) if each not in taken and not (output_dir / f"run_{each}").exists()
    )


def numbered(run_id: str) -> Iterator[str]:
    """It, and then run_id_2, run_id_3 ..."""
    yield run_id
    yield from (f"{run_id}_{number}" for number in itertools.count(2))


def create_run_dir(output_dir: Path, run_id: str | None, *, name: str = "") -> tuple[Path, str]:
    """Make an empty `run_<id>` below `output_dir`; without an id, one from a name that is still free.

    Args:
        name: an id that another may have; "": the date and time.

    Raises:
        InputError: the id is taken, or the folder can't be written.
    """
    check_run_id(output_dir, run_id)
    candidates = numbered(run_id or name or time.strftime(TIME_FORMAT))
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        while True:
            candidate = next(candidates)
            directory = output_dir / f"run_{candidate}"
            try:
                directory.mkdir()  # fails where it exists, also when two runs try at once
                return directory, candidate
            except FileExistsError:
                check_run_id(output_dir, run_id)
    except OSError as error:
        raise InputError(
            f"cannot write to {output_dir}: {error.strerror}; name a folder that can be written"
        ) from error
