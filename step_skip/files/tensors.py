"""Load .pt files of exactly one tensor (`load_tensor`) and headers of safetensors files (`read_header`).

An untrusted .pt file is checked as an archive before torch reads it: stored, not compressed, no larger than
expected, and with a pickle that names only the globals torch.save names for a tensor. Then torch reads it
with weights_only=True. The size of a safetensors header is checked before it is parsed.
"""

from __future__ import annotations

import hashlib
import io
import math
import pickletools
import re
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from step_skip.errors import InputError
from step_skip.files.bounds import MAX_HEADER_BYTES, MAX_PICKLE_BYTES, MAX_TENSOR_BYTES
from step_skip.files.reading import check_sha256, read_file

if TYPE_CHECKING:
    import torch

DTYPES = ("bfloat16", "float16", "float32")


def sha256_tensor(tensor: torch.Tensor) -> str:
    """Return the SHA-256 of a tensor's contiguous bytes in its own dtype, in hex."""
    import torch

    flat = tensor.detach().cpu().contiguous().flatten()
    return hashlib.sha256(flat.view(torch.uint8).numpy().tobytes()).hexdigest()


def dtype_name(tensor: torch.Tensor) -> str:
    """Return a tensor's dtype as the command line and the metadata name it: "bfloat16", for example."""
    return str(tensor.dtype).removeprefix("torch.")


# --- safetensors files --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Header:
    """The header of a safetensors file: shapes and dtypes by the tensors' keys, and the file's metadata."""

    shapes: Mapping[str, Sequence[int]]
    dtypes: Mapping[str, str]  # "BF16", for example
    metadata: Mapping[str, str]


def read_header(path: Path, *, what: str) -> Header:
    """Read the header of a safetensors file; safetensors checks that the tensors fill the file without gaps.

    Args:
        what: description of the file for error messages, "--lora" for example.

    Raises:
        InputError: there is no such file, or it is not a safetensors file.
    """
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise InputError(f"{what} {path} is not a file; name a .safetensors file")
    try:
        with path.open("rb") as opened:
            size = int.from_bytes(opened.read(8), "little")  # the format begins with the header's size
        if size > MAX_HEADER_BYTES:
            raise SafetensorError(f"a header of {size} bytes")
        with safe_open(path, framework="numpy") as file:
            slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118
            return Header(
                {key: each.get_shape() for key, each in slices.items()},
                {key: each.get_dtype() for key, each in slices.items()},
                file.metadata() or {},
            )
    except (SafetensorError, OSError) as error:
        raise InputError(
            f"{what} {path} is not a safetensors file that can be read ({str(error)[:80]}); "
            "download it again, or convert it"
        ) from error


BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}
# Globals in the pickle that torch.save writes for a tensor.
TENSOR_GLOBALS = re.compile(r"torch\._utils _rebuild_tensor_v2|collections OrderedDict|torch \w+Storage")


def load_tensor(
    path: Path, *, shape: tuple[int, ...], dtype: str | None = None, sha256: str | None = None
) -> torch.Tensor:
    """Load the one tensor of a .pt file; nothing else in the file is ever unpickled.

    The file is read once: the checksum is computed over the same bytes that become the tensor.

    Args:
        shape: expected shape; also bounds the bytes that are read into memory.
        dtype: expected dtype, "bfloat16" for example; None: any of DTYPES.
        sha256: expected SHA-256 of the file, in hex; None: unknown.

    Raises:
        InputError: not a tensor, wrong shape or dtype, NaN or infinite values, or a pickle with code in it.
    """
    largest = min(math.prod(shape) * 4, MAX_TENSOR_BYTES)
    content = read_file(path, most=largest + 2**20)
    if sha256 is not None:
        check_sha256(path, hashlib.sha256(content).hexdigest(), sha256)
    stored = _check_archive(content, path, largest=largest)
    tensor = _unpickle(content, path)
    _check_tensor(tensor, path, shape=shape, stored=stored, dtypes=DTYPES if dtype is None else (dtype,))
    return tensor


def _unpickle(content: bytes, path: Path) -> Any:
    import torch

    try:
        return torch.load(io.BytesIO(content), weights_only=True, map_location="cpu")
    except Exception as error:  # torch raises UnpicklingError, RuntimeError, EOFError ... for bad files
        raise InputError(
            f"{path} is not a tensor file ({_first_line(error)}); nothing in it was run; make the prior again"
        ) from error


def _check_tensor(
    tensor: Any, path: Path, *, shape: tuple[int, ...], stored: int, dtypes: tuple[str, ...]
) -> None:
    import torch

    if not isinstance(tensor, torch.Tensor) or tensor.layout != torch.strided or tensor.is_meta:
        raise InputError(
            f"{path} holds a {type(tensor).__name__}, expected a tensor with its data; make the prior again"
        )
    if tuple(tensor.shape) != shape:
        raise InputError(
            f"{path} has shape {list(tensor.shape)}, expected {list(shape)}; make the prior again"
        )
    dtype = dtype_name(tensor)
    if dtype not in dtypes:
        raise InputError(f"{path} has dtype {dtype}, expected {' or '.join(dtypes)}; make the prior again")
    if tensor.untyped_storage().nbytes() > stored:  # torch would read past the end of the data
        raise InputError(f"{path} claims more values than it holds; make the prior again")
    if not tensor.is_contiguous():
        raise InputError(
            f"{path} holds a tensor that is not contiguous, expected a contiguous one; make the prior again"
        )
    if not torch.isfinite(tensor).all():
        raise InputError(f"{path} holds NaN or infinite values; make the prior again")


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:120]}"


def _check_archive(content: bytes, path: Path, *, largest: int) -> int:
    """Reject an archive that torch.save would not write for a tensor; return the bytes of stored values."""
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            entries = archive.infolist()
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
                raise InputError(
                    f"{path} is a compressed archive, expected an uncompressed one; don't use it"
                )
            size = sum(entry.file_size for entry in entries)
            if size > largest + 2**20:
                raise InputError(f"{path} holds {size} bytes, expected at most {largest}; don't use it")
            _check_pickle(_read_pickle(archive), path)
    except InputError:
        raise
    except Exception as error:  # zipfile raises BadZipFile, struct.error, ValueError ... for bad files
        raise InputError(
            f"{path} is not a tensor file ({_first_line(error)}); it is truncated or of another kind: "
            "copy the prior again or make it again"
        ) from error
    return max((entry.file_size for entry in entries if re.search(r"/data/\d+$", entry.filename)), default=0)


def _read_pickle(archive: zipfile.ZipFile) -> bytes:
    [entry] = [entry for entry in archive.infolist() if entry.filename.endswith("/data.pkl")]
    if entry.file_size > MAX_PICKLE_BYTES:
        raise ValueError(f"a pickle of {entry.file_size} bytes")
    return archive.read(entry)


def _check_pickle(content: bytes, path: Path) -> None:
    """Reject a pickle that names any global but TENSOR_GLOBALS."""
    for opcode, argument, _ in pickletools.genops(content):
        named = opcode.name in ("GLOBAL", "INST", "STACK_GLOBAL")
        if named and not TENSOR_GLOBALS.fullmatch(str(argument)):
            raise InputError(
                f"{path} holds {str(argument)[:60]!r}, expected a tensor; nothing in it was run, don't use it"
            )
