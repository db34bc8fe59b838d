"""Names of files and folders, made from texts."""

from __future__ import annotations

import itertools
import re
import unicodedata
from collections.abc import Iterator

MAX_NAME_BYTES = 255  # of a file name, on every usual file system


def slug(text: str) -> str:
    """A text's words in any script, as a part of a file name of at most 60 bytes."""
    words = re.sub(r"\W+", "-", text.lower()).strip("-")
    words = words.encode()[:60].decode(errors="ignore").strip("-")  # never half a character
    return words or ("prompt" if text else "no-prompt")


def numbered(run_id: str) -> Iterator[str]:
    """It, and then run_id_2, run_id_3 ..."""
    yield run_id
    yield from (f"{run_id}_{number}" for number in itertools.count(2))


def id_from_name(name: str) -> str:
    """A run id of at most 40 of a name's letters and digits, as far as they are ASCII; "" of others."""
    letters = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode().lower()
    return re.sub(r"[^a-z0-9]+", "_", letters)[:40].strip("_")
