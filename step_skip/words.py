"""What the embedded model was made for: its words, how many, its size. Beyond that it breaks unseen."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from pathlib import Path

from step_skip.models import TINY_DIR, LoadOptions, model_defaults, read_tiny_config

log = logging.getLogger(__name__)

TOLD_WORDS = 5  # of those it doesn't know


def warn_of_embedded(
    options: LoadOptions, prompts: Iterable[str], sizes: Mapping[str, int] | None = None
) -> None:
    """Say in one line what of prompts and sizes the embedded model was not made for; nothing of other models.

    Args:
        sizes: height, width and num_frames; None: the prior's, which were told of.
    """
    if options.model != "tiny":
        return
    folder = options.model_dir or TINY_DIR
    config = read_tiny_config(folder)
    if "motions" not in config:  # nobody has said what it knows
        return
    doubts = doubts_of_words(folder, prompts, most=config["tokenizer"]["seq_len"] - 1)
    if doubts:
        doubts.append(f"try: {', '.join(config['motions'])}")
    defaults = model_defaults("tiny", options.model_dir)
    made_for = {name: getattr(defaults, name) for name in ("width", "height", "num_frames")}
    if sizes is not None and any(sizes[name] != value for name, value in made_for.items()):
        shape = "{width} x {height} pixels, {num_frames} frames"
        doubts.append(f"it was made for {shape.format(**made_for)}, not {shape.format(**sizes)}")
    if doubts:
        log.warning(f"the embedded model won't do as it is told: {'; '.join(doubts)}")


def doubts_of_words(folder: Path, prompts: Iterable[str], *, most: int) -> list[str]:
    """What a model's tokenizer doesn't know, and what is longer than it reads.

    Args:
        most: words it reads of a prompt.
    """
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer" / "tokenizer.json"))
    doubts: list[str] = []
    unknown: dict[str, None] = {}
    for prompt in prompts:
        found = tokenizer.encode(prompt, add_special_tokens=False)
        for token, (begin, end) in zip(found.tokens, found.offsets, strict=True):
            if token == tokenizer.model.unk_token:
                unknown[prompt[begin:end]] = None
        if len(found.tokens) > most:
            doubts.append(f'it reads {most} words, and "{prompt[:40]}..." has {len(found.tokens)}')
    if unknown:
        words = ", ".join(f'"{word}"' for word in list(unknown)[:TOLD_WORDS])
        others = len(unknown) - TOLD_WORDS
        doubts.insert(0, f"it doesn't know {words}{f' and {others} others' if others > 0 else ''}")
    return doubts
