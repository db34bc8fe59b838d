"""Tensor files: .pt files with one tensor and nothing else, and headers of safetensors files.

A .pt file may be untrusted, so torch.load never sees it. Its archive and its pickle are parsed here, as far
as torch.save writes them for one tensor, and checked before the values are read. The size of a safetensors
header is checked before it is parsed.
"""

from __future__ import annotations

import hashlib
import math
import pickletools
import re
import struct
import sys
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from step_skip.errors import InputError
from step_skip.files.bounds import (
    MAX_DIRECTORY_BYTES,
    MAX_HEADER_BYTES,
    MAX_PICKLE_BYTES,
    MAX_SMALL_HEADER_BYTES,
    MAX_TENSOR_BYTES,
    short,
)
from step_skip.files.reading import check_sha256, read_file

if TYPE_CHECKING:
    import torch

DTYPES = ("bfloat16", "float16", "float32")


def sha256_tensor(tensor: torch.Tensor) -> str:
    """SHA-256 of a tensor's contiguous bytes in its own dtype, in hex."""
    import torch

    flat = tensor.detach().cpu().contiguous().flatten()
    return hashlib.sha256(flat.view(torch.uint8).numpy().tobytes()).hexdigest()


def dtype_name(tensor: torch.Tensor) -> str:
    """A tensor's dtype as the command line and the metadata say it: "bfloat16", for example."""
    return str(tensor.dtype).removeprefix("torch.")


# --- safetensors files --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Header:
    """What a safetensors file says of its tensors, by key, and of itself."""

    shapes: Mapping[str, Sequence[int]]
    dtypes: Mapping[str, str]  # "BF16", for example
    metadata: Mapping[str, str]


def read_header(path: Path, *, what: str) -> Header:
    """Read a safetensors file's header. safetensors checks that the tensors fill the file, without gaps.

    Raises:
        InputError: no such file; `what` says which was wanted.
    """
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise InputError(f"{what} {path} is not a file; name a .safetensors file")
    try:
        with path.open("rb") as opened:
            size = int.from_bytes(opened.read(8), "little")  # as the format begins
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
            "fetch it again, or convert it"
        ) from error


def load_safetensors(content: bytes) -> dict[str, torch.Tensor]:
    """Load a safetensors file's tensors; a header too large for a few tensors is not parsed.

    Raises:
        ValueError: the header is too large.
        SafetensorError: it is something else.
    """
    from safetensors.torch import load

    size = int.from_bytes(content[:8], "little")
    if size > MAX_SMALL_HEADER_BYTES:
        raise ValueError(f"a header of {size} bytes")
    return load(content)


# --- .pt files ----------------------------------------------------------------------------------------------

BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}
# what a pickle of torch.save calls for one tensor
REBUILD, HOOKS = "torch._utils _rebuild_tensor_v2", "collections OrderedDict"
TENSOR_GLOBALS = re.compile(rf"{re.escape(REBUILD)}|{HOOKS}|torch \w+Storage", flags=re.ASCII)
# the dtypes of torch's storages; only DTYPES are read, the others are named in messages
STORAGES = {
    "torch FloatStorage": "float32",
    "torch HalfStorage": "float16",
    "torch BFloat16Storage": "bfloat16",
    "torch DoubleStorage": "float64",
    "torch LongStorage": "int64",
    "torch IntStorage": "int32",
    "torch ShortStorage": "int16",
    "torch CharStorage": "int8",
    "torch ByteStorage": "uint8",
    "torch BoolStorage": "bool",
}
OTHER_OBJECTS = {  # what a pickle that begins so holds
    "EMPTY_LIST": "a list",
    "EMPTY_DICT": "a dict",
    "BINFLOAT": "a float",
    "NONE": "None",
}
DESCRIPTOR_BYTES = 24  # at most, of the descriptor that torch writes behind an entry's data
ENCRYPTED = 1  # in an entry's flags


class _Name(str):
    """A global that a pickle names; never imported."""


@dataclass(frozen=True)
class _Storage:
    dtype: str
    key: str  # names the entry data/<key>
    numel: int


@dataclass(frozen=True)
class _Saved:
    """A tensor as its pickle describes it."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


def load_tensor(
    path: Path, *, shape: tuple[int, ...], dtype: str | None = None, sha256: str | None = None
) -> torch.Tensor:
    """Load the one tensor a .pt file of torch.save holds, on the CPU.

    The file is read once: the bytes whose sum is compared are those that become the tensor. It is read here,
    not by torch.load, so that what is checked is what is used; nothing in it is ever called.

    Args:
        shape: expected shape; also bounds what is read into memory.
        dtype: expected dtype, "bfloat16" for example; None: any of DTYPES.
        sha256: of the file, in hex; None: unknown.

    Raises:
        InputError: not a tensor, wrong shape or dtype, NaN or infinite values, or a pickle with code in it.
    """
    content = read_file(path, most=min(math.prod(shape) * 4, MAX_TENSOR_BYTES) + 2**20)
    if sha256 is not None:
        check_sha256(path, hashlib.sha256(content).hexdigest(), sha256)
    dtypes = DTYPES if dtype is None else (dtype,)
    try:
        entries = _read_archive(content, path)
        saved = _parse_pickle(bytes(entries["data.pkl"][: MAX_PICKLE_BYTES + 1]), path)
        values = entries[f"data/{saved.storage.key}"]
        _check_saved(saved, path, shape=shape, dtypes=dtypes, stored=len(values))
        tensor = _copy_values(values, saved, byteorder=bytes(entries.get("byteorder", b"little")[:16]))
    except (InputError, MemoryError):
        raise
    except Exception as error:  # struct.error, KeyError, ValueError, TypeError ... for what is something else
        raise InputError(
            f"{path} is not a tensor file ({_first_line(error)}); it was cut off or is something else: "
            "copy the prior again or make it again"
        ) from error
    if not tensor.isfinite().all():
        raise InputError(f"{path} holds NaN or infinite values; make the prior again")
    return tensor


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:120]}"


def _read_archive(content: bytes, path: Path) -> dict[str, memoryview]:
    """Return the entries of a zip archive by name, as torch.save writes it: all stored, in one folder.

    The entries follow each other from the first byte on, then come the directory and the archive's end, and
    nothing else: there is no second archive before, behind or between them.
    """
    [signature, _, size, place, comment] = struct.unpack("<4s8s2LH", content[-22:])
    directory, end = place, place + size
    if signature != b"PK\5\6" or comment or len(content) - end not in (22, 98):  # 98: with zip64's end
        raise ValueError("it does not end as one archive")
    if size > MAX_DIRECTORY_BYTES:
        raise ValueError(f"a directory of {size} bytes")
    view, found = memoryview(content), []
    while place < end:
        [signature, flags, method, crc, packed, size, *lengths, offset] = struct.unpack_from(
            "<4s4x2H4x3L3H8xL", content, place
        )
        if method:
            raise InputError(f"{path} is a compressed archive, which no prior holds; don't use it")
        if signature != b"PK\1\2" or flags & ENCRYPTED or packed != size:
            raise ValueError("an entry that torch.save does not write")
        name = content[place + 46 : place + 46 + lengths[0]]
        found.append((offset, size, crc, name))
        place += 46 + sum(lengths)
    entries: dict[str, memoryview] = {}
    place, gap = 0, 0
    for offset, size, crc, name in sorted(found):
        if not place <= offset <= place + gap:
            raise ValueError("something lies before or between its entries")
        signature, *lengths = struct.unpack_from("<4s22x2H", content, offset)
        begin = offset + 30 + sum(lengths)
        place, gap = begin + size, DESCRIPTOR_BYTES
        if signature != b"PK\3\4" or content[offset + 30 : offset + 30 + lengths[0]] != name:
            raise ValueError("an entry that is not the directory's")
        if place > directory or zlib.crc32(view[begin:place]) != crc:
            raise ValueError("an entry is damaged")
        entries[name.decode()] = view[begin:place]
    if not place <= directory <= place + gap or len(entries) < len(found):
        raise ValueError("something lies before its directory, or an entry is there twice")
    [folder] = {name.partition("/")[0] for name in entries}
    return {name.removeprefix(f"{folder}/"): entry for name, entry in entries.items()}


def _parse_pickle(content: bytes, path: Path) -> _Saved:
    """Parse the pickle of one tensor; nothing is imported or called.

    Raises:
        InputError: it has anything that torch.save does not write for one tensor.
    """

    def refusal(what: str) -> InputError:
        return InputError(f"{path} holds {what}, expected a tensor; nothing in it was run, don't use it")

    stack: list[Any] = []
    marks: list[int] = []  # places in the stack
    memo: dict[object, Any] = {}
    end = 0
    if len(content) > MAX_PICKLE_BYTES:
        raise refusal(f"a pickle of over {MAX_PICKLE_BYTES} bytes")
    for opcode, argument, place in pickletools.genops(content):
        end = (place or 0) + 1
        match opcode.name:
            case "PROTO" | "STOP":
                pass
            case "GLOBAL":
                if not TENSOR_GLOBALS.fullmatch(str(argument)):
                    raise refusal(repr(str(argument)[:60]))
                stack.append(_Name(argument))
            case "BINUNICODE" | "BININT" | "BININT1" | "BININT2" | "LONG1":
                stack.append(argument)
            case "NEWTRUE" | "NEWFALSE":
                stack.append(opcode.name == "NEWTRUE")
            case "BINPUT" | "LONG_BINPUT":
                memo[argument] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[argument])
            case "MARK":
                marks.append(len(stack))
            case "EMPTY_TUPLE":
                stack.append(())
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                count = int(opcode.name[-1])
                stack[-count:] = [tuple(stack[-count:])]
            case "TUPLE":
                begin = marks.pop()
                stack[begin:] = [tuple(stack[begin:])]
            case "BINPERSID":
                stack.append(_find_storage(stack.pop()))
            case "REDUCE":
                arguments, function = stack.pop(), stack.pop()
                stack.append(_rebuild(function, arguments))
            case other:
                raise refusal(OTHER_OBJECTS.get(other, f"a pickle with {other}"))
    if end != len(content) or len(stack) != 1 or not isinstance(stack[0], _Saved):
        raise refusal("a pickle of something else")
    return stack[0]


def _find_storage(given: Any) -> _Storage:
    """Return what a persistent id says: ("storage", type, key, device, number of values)."""
    word, kind, key, device, numel = given
    kinds = [type(each) for each in (kind, key, device, numel)]
    if word != "storage" or kinds != [_Name, str, str, int] or not re.fullmatch(r"[0-9]{1,20}", key):
        raise ValueError("no storage as torch.save writes it")
    return _Storage(STORAGES.get(kind, str(kind).split()[-1]), key, numel)


def _rebuild(function: Any, arguments: Any) -> Any:
    """Return what a call in a pickle stands for: a tensor, or its empty hooks."""
    if type(function) is not _Name or type(arguments) is not tuple:
        raise ValueError("a call that torch.save does not write")
    if function == HOOKS and arguments == ():
        return HOOKS
    if function != REBUILD:
        raise ValueError(f"a call of {function}")
    storage, offset, shape, stride, _, hooks = arguments
    numbers = [offset, *shape, *stride]
    if type(storage) is not _Storage or hooks is not HOOKS or any(type(each) is not int for each in numbers):
        raise ValueError("no tensor as torch.save writes it")
    return _Saved(storage, offset, tuple(shape), tuple(stride))


def _check_saved(
    saved: _Saved, path: Path, *, shape: tuple[int, ...], dtypes: tuple[str, ...], stored: int
) -> None:
    """Check a tensor's description, before its values are read.

    Args:
        stored: bytes of its storage.
    """
    if saved.shape != shape:
        raise InputError(
            f"{path} has shape {short(list(saved.shape))}, expected {list(shape)}; make the prior again"
        )
    storage = saved.storage
    if storage.dtype not in dtypes:
        raise InputError(
            f"{path} has dtype {storage.dtype[:40]}, expected {' or '.join(dtypes)}; make the prior again"
        )
    if not _is_contiguous(shape, saved.stride):
        raise InputError(
            f"{path} holds a tensor that is not contiguous, as no prior does; make the prior again"
        )
    claimed = max(storage.numel, saved.offset + math.prod(shape))
    if saved.offset < 0 or claimed * BYTES[storage.dtype] > stored:
        raise InputError(f"{path} claims more values than it holds; make the prior again")
    if storage.numel * BYTES[storage.dtype] < stored:
        raise InputError(f"{path} holds more values than it claims; make the prior again")


def _is_contiguous(shape: Sequence[int], stride: Sequence[int]) -> bool:
    step = 1
    for size, found in zip(reversed(shape), reversed(stride), strict=True):
        if size != 1 and found != step:
            return False
        step *= size
    return True


def _copy_values(values: memoryview, saved: _Saved, *, byteorder: bytes) -> torch.Tensor:
    """Copy a checked tensor's values out of its archive.

    Args:
        byteorder: of the machine that wrote them, b"little" or b"big".
    """
    import numpy as np
    import torch

    if byteorder not in (b"little", b"big"):
        raise ValueError(f"its byte order is {byteorder!r}")
    storage = torch.empty(len(values), dtype=torch.uint8)  # aligned as torch.load's: the same last bits
    written = storage.numpy()
    written[:] = np.frombuffer(values, np.uint8)
    if byteorder.decode() != sys.byteorder:
        written.view(f"u{BYTES[saved.storage.dtype]}").byteswap(inplace=True)
    flat = storage.view(getattr(torch, saved.storage.dtype))
    return flat[saved.offset : saved.offset + math.prod(saved.shape)].view(saved.shape)
