"""Encoded prompts that a prior has met since it was made: `contexts/<key>.safetensors`, one each, by content.

The prior's own prompts are among the files that run_metadata.json lists with their checksums, and nothing
changes that file afterwards. A context that came later vouches for itself: its header holds the text, the
text encoder's fingerprint and the tensor's SHA-256. What is not as it should be is encoded again.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING

import prior_utils
import tensor_file
from prior_utils import Prior

if TYPE_CHECKING:
    import torch

FOLDER = "contexts"


def encoder(prior: Prior) -> str | None:
    """The fingerprint of the text encoder that a prior's contexts come from; an older prior records none."""
    return prior.metadata.get("model_fingerprint", {}).get("text_encoder")


def path(prior: Prior, text: str) -> Path:
    """Where the context of a text is kept; one name per text, text encoder and dtype."""
    content = "\0".join([str(encoder(prior)), str(prior.metadata.get("dtype")), text])
    return prior.directory / FOLDER / f"{hashlib.sha256(content.encode()).hexdigest()[:16]}.safetensors"


def is_known(prior: Prior, text: str) -> bool:
    """Whether a prior has a context of this text, its own or a kept one; its content isn't looked at."""
    return prior.has(prior_utils.context_file(text)) or is_kept(prior, text)


def is_kept(prior: Prior, text: str) -> bool:
    """Whether a file of this text's context is in the prior; neither it nor its folder may be a link."""
    file = path(prior, text)
    return not file.parent.is_symlink() and not file.is_symlink() and file.is_file()


def load(prior: Prior, text: str) -> torch.Tensor | None:
    """The kept context of a text, as the text encoder gave it, on the CPU; None: it has to be encoded."""
    from safetensors import SafetensorError, safe_open

    if encoder(prior) is None or not is_kept(prior, text):
        return None
    try:
        with safe_open(path(prior, text), framework="pt") as file:
            header, context = file.metadata(), file.get_tensor("context")
    except (SafetensorError, OSError):
        return None
    return context if header == _header(prior, text, context) else None


def save(prior: Prior, text: str, context: torch.Tensor) -> None:
    """Keep a context in its prior, whole or not at all; two processes may do so at once.

    Not kept: NaN or infinite values, and what nothing could tell the text encoder of later.

    Raises:
        InputError: the folder is a link.
        OSError: it can't be written.
    """
    import safetensors.torch
    import torch

    if encoder(prior) is None or not torch.isfinite(context).all():
        return
    target = prior_utils.folder_inside(prior.directory, FOLDER) / path(prior, text).name
    context = context.cpu().contiguous()
    content = safetensors.torch.save({"context": context}, _header(prior, text, context))
    target.parent.mkdir(exist_ok=True)
    with prior_utils.replacing(target) as temporary:
        temporary.write_bytes(content)


def _header(prior: Prior, text: str, context: torch.Tensor) -> dict[str, str]:
    """One entry, because safetensors writes several in any order, and the same context is the same file."""
    entries = {
        "text": text,
        "text_encoder": encoder(prior),
        "dtype": tensor_file.dtype_name(context),
        "shape": list(context.shape),
        "sha256": prior_utils.sha256_tensor(context),
    }
    return {"context": json.dumps(entries, ensure_ascii=False)}
