"""Command lines as text: the one that runs, and others to copy."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterable
from pathlib import Path


def own_command(words: Iterable[object]) -> str:
    """The script that runs, with these words, as a shell takes it."""
    script = Path(sys.argv[0])
    start = ["python", sys.argv[0]] if script.suffix == ".py" else [script.name]
    return shlex.join([*start, *map(str, words)])


def quote_prompt(words: list[str], prompts: list[str]) -> list[str]:
    """A command line's words, with the prompts after --prompt as one."""
    begin = words.index("--prompt") + 1
    return [*words[:begin], " ".join(prompts), *words[begin + len(prompts) :]]
