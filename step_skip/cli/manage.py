"""List, show and remove the priors in folders."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path

from step_skip.cli.terminal import one_line
from step_skip.errors import InputError
from step_skip.files.writing import locked
from step_skip.media.images import crop_preview_file
from step_skip.prior.metadata import read_run
from step_skip.prior.prior import IMAGE_FILE, OUTPUT_FILE, Prior
from step_skip.prior.schema import METADATA_FILE

log = logging.getLogger(__name__)

PROMPT_WIDTH = 40  # characters of a prompt in a list


def find_priors(folders: Iterable[Path]) -> list[Path]:
    """Return the folders that are priors and, sorted by name, the priors directly inside the others.

    Raises:
        InputError: a folder does not exist.
    """
    found = []
    for folder in folders:
        if not folder.is_dir():
            raise InputError(f"{folder} is not a folder; name a prior, or a folder of priors")
        inside = sorted(path.parent for path in folder.glob(f"*/{METADATA_FILE}"))
        found += [folder] if (folder / METADATA_FILE).is_file() else inside
    return found


def list_priors(folders: Iterable[Path]) -> str:
    """Return a table of priors: name, prompt, steps, size, clips; warn of each that can't be read."""
    rows = [("name", "prompt", "steps", "size", "clips")]
    for directory in find_priors(folders):
        try:
            prior = read_run(directory)
        except InputError as error:
            log.warning(f"{directory} cannot be read: {error}")
            continue
        prompt = one_line(prior.metadata.prompt or "")
        short = prompt if len(prompt) <= PROMPT_WIDTH else f"{prompt[: PROMPT_WIDTH - 3]}..."
        rows.append(
            (directory.name, short, steps_of(prior), folder_size(directory), str(len(clips_of(directory))))
        )
    return table(rows) if len(rows) > 1 else "no prior there"


def show_prior(directory: Path) -> str:
    """Return what a prior holds, one entry per line.

    Raises:
        InputError: the prior can't be read.
    """
    prior, clips = read_run(directory), clips_of(directory)
    m, unknown = prior.metadata, "not recorded"
    shape = f"{m.width} x {m.height} pixels, {m.num_frames} frames"
    rows = [
        ("prior", str(directory)),
        ("prompt", unknown if m.prompt is None else m.prompt),
        ("image", prior.image_name or "not recorded"),
        ("model", m.model or unknown),
        ("made", m.created or unknown),
        ("steps", steps_of(prior)),
        ("video", shape),
        ("seed", unknown if m.seed is None else str(m.seed)),
        ("size", folder_size(directory)),
    ]
    for name, file in (
        ("thumbnail", IMAGE_FILE),
        ("cropped", crop_preview_file(IMAGE_FILE)),
        ("clip", OUTPUT_FILE),
    ):
        if (directory / file).is_file():
            rows.append((name, str(directory / file)))
    rows.append(("made from it", f"clips: {len(clips)}"))
    rows += [("", str(path)) for path in clips]
    return table([(name, one_line(value)) for name, value in rows])


def remove_priors(directories: Sequence[Path], *, sure: bool) -> str:
    """Remove priors with their clips and return their folders; unless `sure`, log what would be removed.

    Raises:
        InputError: a folder is not a prior's, or is being written.
    """
    for directory in directories:
        if directory.is_symlink() or not (directory / METADATA_FILE).is_file():
            raise InputError(f"{directory} is not a prior: it holds no {METADATA_FILE}; nothing was removed")
    for directory in directories:
        clips = len(clips_of(directory))
        what = f"{directory}: {folder_size(directory)}, and the clips made from it: {clips}"
        if not sure:
            log.info(f"would remove {what}")
            continue
        with locked(directory):  # no other process writes to it
            shutil.rmtree(directory)
        log.info(f"removed {what}")
    if not sure:
        log.info("nothing was removed; add --yes to remove it")
    return "\n".join(map(str, directories))


# --- entries of a table -------------------------------------------------------------------------------------


def steps_of(prior: Prior) -> str:
    """Return the number of steps that a prior holds, and "of" the total if some are missing."""
    total = prior.num_inference_steps
    if prior.kept_steps is not None:
        return f"{len(prior.kept_steps)} of {total}"
    return str(total) if prior.is_complete else f"{prior.whole_steps} of {total}"


def clips_of(directory: Path) -> list[Path]:
    """Return the clips in a prior's outputs folder."""
    return sorted((directory / "outputs").glob("**/*.mp4"))


def folder_size(directory: Path) -> str:
    """Return the size of a folder on disk, in MB; links are not followed."""
    files = (path for path in directory.rglob("*") if path.is_file() and not path.is_symlink())
    return f"{sum(path.stat().st_size for path in files) / 1e6:.1f} MB"


def table(rows: Sequence[Sequence[str]]) -> str:
    """Return rows as text, with columns separated by two spaces."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    padded = ([cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in rows)
    return "\n".join("  ".join(row).rstrip() for row in padded)
