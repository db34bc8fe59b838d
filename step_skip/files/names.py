"""Derive names of files and folders from texts: `slug`, `numbered`, `id_from_name`."""

from __future__ import annotations

import itertools
import re
import unicodedata
from collections.abc import Iterator

FILE_NAME = r"[\w.-]*[\w-][\w.-]*"  # ASCII: one component of a path, on any system, and not "." or ".."
MAX_NAME_BYTES = 255  # length of a file name on every usual file system


def slug(text: str) -> str:
    """Return a text's words, in any script, joined by hyphens: at most 60 bytes for a file name."""
    words = re.sub(r"\W+", "-", text.lower()).strip("-")
    words = words.encode()[:60].decode(errors="ignore").strip("-")  # drops a character that is cut in two
    return words or ("prompt" if text else "no-prompt")


def numbered(run_id: str) -> Iterator[str]:
    """Yield run_id, run_id_2, run_id_3, ..."""
    yield run_id
    yield from (f"{run_id}_{number}" for number in itertools.count(2))


def id_from_name(name: str) -> str:
    """Return a run id of a name's ASCII letters and digits, at most 40 characters; "" if it has none."""
    letters = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode().lower()
    return re.sub(r"[^a-z0-9]+", "_", letters)[:40].strip("_")
