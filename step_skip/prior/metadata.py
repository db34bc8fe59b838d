"""Read and check run_metadata.json."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from step_skip.errors import InputError
from step_skip.files.bounds import MAX_METADATA_BYTES, MAX_METADATA_DEPTH, short
from step_skip.files.reading import is_deeper, read_file
from step_skip.models.families import FAMILIES, round_sizes
from step_skip.prior.prior import Prior, step_files
from step_skip.prior.schema import METADATA_FILE, read_entries

FORMAT_VERSION = 1
SEAL = "metadata_sha256"  # the checksum of all other entries


def read_prior(directory: Path) -> Prior:
    """Read a prior's metadata and check its form; no tensor is read and torch isn't imported.

    Raises:
        InputError: no prior there, an unfinished one, or metadata that says something impossible.
    """
    prior = read_run(directory)
    if not prior.is_legacy and prior.metadata.status == "running":
        raise InputError(
            f"{directory} is unfinished ({prior.whole_steps} of {prior.num_inference_steps} steps are "
            "whole): generate_prior.py was interrupted or is still running; wait for it, or finish the prior "
            f"with generate_prior.py --resume {directory}"
        )
    return prior


def read_run(directory: Path) -> Prior:
    """Read a prior's metadata like `read_prior`, also of an unfinished prior."""
    entries = _read_entries(directory / METADATA_FILE)
    is_legacy = "format_version" not in entries and SEAL not in entries
    if not is_legacy:
        if entries.get("format_version") != FORMAT_VERSION:
            raise InputError(
                f"{directory} has format_version {short(entries.get('format_version'))}, "
                f"expected {FORMAT_VERSION}; use the version of the program that wrote it"
            )
        _check_seal(directory, entries)
    metadata = read_entries(entries, is_legacy=is_legacy)
    rounded = round_sizes(**metadata.sizes, family=FAMILIES[metadata.family])
    if rounded != metadata.sizes:  # other writers may record what was asked for
        metadata = metadata.model_copy(update=rounded)
    prior = Prior(directory, metadata)
    if not prior.is_legacy:
        _check_whole_steps(prior)
    return prior


def _read_entries(path: Path) -> dict[str, Any]:
    try:
        if not path.parent.is_dir():
            raise InputError(
                f"{path.parent} is not a folder; a prior is a run_<id> folder of generate_prior.py"
            )
        is_there = path.is_file()
    except OSError as error:  # a name too long, a folder that may not be looked into
        raise InputError(f"cannot read {path.parent}: {error.strerror}; name a prior") from error
    if not is_there:
        raise InputError(
            f"{path.parent} holds no {METADATA_FILE}; a prior is a run_<id> folder of generate_prior.py"
        )
    content = read_file(path, most=MAX_METADATA_BYTES)
    try:
        metadata = json.loads(content.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text ({error.reason}); make the prior again") from error
    except (ValueError, RecursionError) as error:  # JSONDecodeError, or an integer of thousands of digits
        raise InputError(
            f"{path} is not valid JSON ({error}); it was cut off or edited: make the prior again"
        ) from error
    if not isinstance(metadata, dict):
        raise InputError(
            f"{path} holds a {type(metadata).__name__}, expected a JSON object; make the prior again"
        )
    if is_deeper(metadata, MAX_METADATA_DEPTH):
        raise InputError(f"{path} is nested deeper than {MAX_METADATA_DEPTH} levels; make the prior again")
    return metadata


def sealed(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Return metadata with its own SHA-256, over all other entries, in any order and layout."""
    entries = {key: value for key, value in metadata.items() if key != SEAL}
    text = json.dumps(entries, sort_keys=True)
    return entries | {SEAL: hashlib.sha256(text.encode()).hexdigest()}


def _check_seal(directory: Path, metadata: Mapping[str, Any]) -> None:
    if metadata.get(SEAL) != sealed(metadata)[SEAL]:
        raise InputError(
            f"{directory / METADATA_FILE} was edited or damaged: its entries are not those it was written "
            "with; copy the prior again or make it again"
        )


def _check_whole_steps(prior: Prior) -> None:
    """Refuse a prior whose status promises more steps than it lists files of."""
    m = prior.metadata
    needed = {"complete": m.num_inference_steps, "stopped": 1, "running": 0}
    steps = range(needed[m.status]) if prior.kept_steps is None else ()  # a pruned one: see make_plan
    for step in steps:
        for name in step_files(step):
            if name not in m.files:
                raise InputError(f"{METADATA_FILE} lists no {name}; the prior is incomplete: make it again")
