"""Prompts that were encoded after a prior was made: kept in its folder's `contexts/`, no part of it.

A sweep of several priors keeps them once, in its own folder's `contexts/`, for its own videos alone.
Anybody may have put a file there. So it is looked at as a stranger's before its values are read.
"""

from __future__ import annotations

import hashlib
import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING

from step_skip.errors import InputError
from step_skip.files.bounds import MAX_CONTEXT_BYTES
from step_skip.files.reading import read_file
from step_skip.files.tensors import dtype_name, load_safetensors, sha256_tensor
from step_skip.files.writing import folder_inside, replacing
from step_skip.prior.prior import Prior, context_file

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

log = logging.getLogger(__name__)

CONTEXTS_FOLDER = "contexts"


class ContextStore:
    """The contexts of one run, each in memory and on the disk once.

    Args:
        folder: the one they are kept in, a sweep's; None: each in its own prior.
    """

    def __init__(self, folder: Path | None = None):
        self.folder = folder
        self._encoded: dict[str, torch.Tensor] = {}  # by text: what this process encoded is for any prior
        self._loaded: dict[Path, torch.Tensor | None] = {}  # what a folder kept is not

    def get(self, prior: Prior, text: str) -> torch.Tensor | None:
        """Return the context of a text for a prior, as the text encoder gave it; None: it must be encoded."""
        path = kept_context_path(prior, text, self.folder)
        if path not in self._loaded:
            self._loaded[path] = load_context(prior, text, self.folder)
        return self._loaded[path]

    def encode(self, prior: Prior, text: str, encode: Callable[[str], torch.Tensor]) -> torch.Tensor:
        """Encode a text that `get` doesn't know, and keep its context for the next run.

        A folder that can't be written to only costs that.
        """
        if text not in self._encoded:
            self._encoded[text] = encode(text)
        path = kept_context_path(prior, text, self.folder)
        if self._loaded.get(path) is None:
            self._loaded[path] = self._encoded[text]
            try:
                save_context(prior, text, self._encoded[text], self.folder)
            except (OSError, InputError) as error:
                why = error.strerror if isinstance(error, OSError) else error
                log.warning(f"cannot keep the encoded prompt in {self.folder or prior.directory} ({why})")
        return self._encoded[text]


def kept_context_path(prior: Prior, text: str, folder: Path | None = None) -> Path:
    """Return where the context of a text is kept; one name per text, text encoder and dtype.

    Args:
        folder: in which `contexts/` lies; None: the prior's.
    """
    content = "\0".join([str(text_encoder_of(prior)), str(prior.metadata.dtype), text])
    name = f"{hashlib.sha256(content.encode()).hexdigest()[:16]}.safetensors"
    return (folder or prior.directory) / CONTEXTS_FOLDER / name


def text_encoder_of(prior: Prior) -> str | None:
    """Return the fingerprint of the text encoder of a prior's contexts; an older prior records none."""
    return prior.metadata.model_fingerprint.get("text_encoder")


def is_context_known(prior: Prior, text: str, folder: Path | None = None) -> bool:
    """Return whether a context of this text exists, the prior's own or a kept one; its content isn't read."""
    return prior.has(context_file(text)) or is_context_kept(prior, text, folder)


def is_context_kept(prior: Prior, text: str, folder: Path | None = None) -> bool:
    """Return whether a file of this text's context exists; neither it nor its folder may be a link."""
    file = kept_context_path(prior, text, folder)
    return not file.parent.is_symlink() and not file.is_symlink() and file.is_file()


def load_context(prior: Prior, text: str, folder: Path | None = None) -> torch.Tensor | None:
    """Load the kept context of a text, as the text encoder gave it, on the CPU; None: it has to be encoded.

    The file may come from an untrusted source. So its size is bounded, and it must have the shape and dtype
    of the prior's own prompt, before its values are read.
    """
    import torch

    if text_encoder_of(prior) is None or not is_context_kept(prior, text, folder):
        return None
    try:
        content = read_file(kept_context_path(prior, text, folder), most=MAX_CONTEXT_BYTES)
        context = load_safetensors(content)["context"]
    except Exception:  # whatever safetensors and torch raise for what is none
        return None
    own = prior.metadata.shapes.get(context_file(prior.texts[0]))  # every text is padded to it
    alike = (list(context.shape), dtype_name(context)) == (own, prior.metadata.dtype)
    if not alike or not torch.isfinite(context).all():
        return None
    return context if content == _context_bytes(prior, text, context) else None


def save_context(prior: Prior, text: str, context: torch.Tensor, folder: Path | None = None) -> None:
    """Keep a context in its prior or a sweep's folder, whole or not at all; two processes may do so at once.

    Not kept: NaN or infinite values, and what nothing could tell the text encoder of later.

    Raises:
        InputError: the folder is a link.
        OSError: it can't be written.
    """
    import torch

    if text_encoder_of(prior) is None or not torch.isfinite(context).all():
        return
    home = folder_inside(folder or prior.directory, CONTEXTS_FOLDER)
    target = home / kept_context_path(prior, text, folder).name
    content = _context_bytes(prior, text, context.cpu().contiguous())
    target.parent.mkdir(exist_ok=True)
    with replacing(target) as temporary:
        temporary.write_bytes(content)


def _context_bytes(prior: Prior, text: str, context: torch.Tensor) -> bytes:
    """Return the bytes of a kept context's file."""
    import safetensors.torch

    return safetensors.torch.save({"context": context}, _context_header(prior, text, context))


def _context_header(prior: Prior, text: str, context: torch.Tensor) -> dict[str, str]:
    """Return the header's one entry: safetensors writes several in any order, but files must be equal."""
    entries = {
        "text": text,
        "text_encoder": text_encoder_of(prior),
        "dtype": dtype_name(context),
        "shape": list(context.shape),
        "sha256": sha256_tensor(context),
    }
    return {"context": json.dumps(entries, ensure_ascii=False)}
