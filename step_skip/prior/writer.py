"""Write a prior, file by file, into a folder of its own.

A crash, a full disk or a second writer never leaves a prior that looks complete and is not: the metadata name
a file only after it is complete and on the disk (`replacing`), and a step only when its latents and its
velocity both are. So whatever stops a run, what the metadata name is complete, and a run goes on after the
last step they name.
"""

from __future__ import annotations

import io
import re
import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from step_skip.errors import InputError, RunError
from step_skip.files.bounds import MAX_FILE_NAME, short
from step_skip.files.names import FILE_NAME, numbered
from step_skip.files.reading import sha256_file
from step_skip.files.writing import replacing, write_json
from step_skip.prior.metadata import FORMAT_VERSION, sealed
from step_skip.prior.prior import Prior
from step_skip.prior.schema import METADATA_FILE, Metadata

if TYPE_CHECKING:
    import torch


# --- writing ------------------------------------------------------------------------------------------------


class PriorWriter:
    """Writes a prior file by file, in any order and as often as it takes.

    Args:
        directory: the prior's folder.
        metadata: of a new prior without files, of an interrupted one with those it has already.
    """

    def __init__(self, directory: Path, metadata: Metadata):
        self.directory = directory
        self.metadata = metadata.model_copy(
            update={
                "format_version": FORMAT_VERSION,
                "status": metadata.status,
                "files": dict(metadata.files),
                "shapes": dict(metadata.shapes),
            }
        )

    @property
    def prior(self) -> Prior:
        """What is written so far."""
        return Prior(self.directory, self.metadata)

    def write_metadata(self) -> None:
        """Bring the metadata on disk up to date."""
        write_json(self.directory / METADATA_FILE, sealed(self.metadata.recorded()))

    def save_tensor(self, name: str, tensor: torch.Tensor) -> None:
        """Save one tensor as it is (no change of dtype) and record its checksum and shape."""
        import torch

        # By way of memory: on a full disk write_bytes raises OSError, torch.save something of its own.
        content = io.BytesIO()
        torch.save(tensor.detach().cpu().contiguous().clone(), content)
        self.save(name, lambda path: path.write_bytes(content.getbuffer()))
        self.metadata.shapes[name] = list(tensor.shape)

    def save(self, name: str, write: Callable[[Path], object]) -> None:
        """Let `write(path)` make the file `name`, then record its checksum.

        Raises:
            RunError: the prior had this file, it was lost, and what was made in its place is another.
        """
        with replacing(self.directory / name) as temporary:
            write(temporary)
            digest = sha256_file(temporary)
            if self.metadata.files.get(name, digest) != digest:
                raise RunError(
                    f"{self.directory / name} came out other than the prior records it, so it was not "
                    "replaced; make the prior again"
                )
        self.metadata.files[name] = digest

    def record(self, step: int, **values: object) -> None:
        """Keep a value of a step under each name, in a list with one for every step so far."""
        for name, value in values.items():
            setattr(self.metadata, name, [*getattr(self.metadata, name)[:step], value])

    def finish(self, status: str, **metadata: Any) -> None:
        """Add what is known only at the end and declare the prior "complete" or "stopped"."""
        for name, value in (metadata | {"status": status}).items():
            setattr(self.metadata, name, value)
        self.write_metadata()


TIME_FORMAT = "%Y%m%d_%H%M%S"


def check_run_id(output_dir: Path, run_id: str | None, *, but_priors: bool = False) -> None:
    """Refuse a run id that is taken, or that is no part of a file's name.

    Args:
        but_priors: let one pass that a prior has: it may be the one that is asked for.

    Raises:
        InputError: it is.
    """
    if run_id is not None and not (
        re.fullmatch(FILE_NAME, run_id, flags=re.ASCII) and len(run_id) <= MAX_FILE_NAME
    ):
        raise InputError(
            f"--run_id {short(run_id)}: use letters, digits, . _ and - only, at most {MAX_FILE_NAME}"
        )
    if run_id is None or (but_priors and (output_dir / f"run_{run_id}" / METADATA_FILE).exists()):
        return
    if (output_dir / f"run_{run_id}").exists():
        raise InputError(
            f"{output_dir / f'run_{run_id}'} exists and is never overwritten; "
            "choose another --run_id, remove it, or finish it with --resume"
        )


def free_run_id(output_dir: Path, name: str, *, taken: Collection[str]) -> str:
    """Return a run id after a name, "" for the date and time, that is not taken."""
    wanted = name or time.strftime(TIME_FORMAT)
    return next(
        each for each in numbered(wanted) if each not in taken and not (output_dir / f"run_{each}").exists()
    )


def create_run_dir(output_dir: Path, run_id: str | None, *, name: str = "") -> tuple[Path, str]:
    """Make an empty `run_<id>` below `output_dir`; without an id, one from a name that is still free.

    Args:
        name: an id that another may have; "": the date and time.

    Raises:
        InputError: the id is taken, or the folder can't be written.
    """
    check_run_id(output_dir, run_id)
    wanted = run_id or name or time.strftime(TIME_FORMAT)
    if not re.fullmatch(FILE_NAME, wanted, flags=re.ASCII):
        raise InputError(f"{short(wanted)} is no name for a prior: use letters, digits, . _ and - only")
    candidates = numbered(wanted)
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
