"""Tensor files from a stranger: whatever they hold is refused, and nothing in them is run."""

from __future__ import annotations

import builtins
import hashlib
import io
import os
import pickle
import resource
import subprocess
import zipfile
from pathlib import Path

import pytest
import torch
from helpers import PROMPT, needed_name, record_checksum, replace_pickle

from step_skip.errors import InputError
from step_skip.files.tensors import load_safetensors, load_tensor, sha256_tensor

SHAPE = (1, 16, 3, 4, 4)  # latents of 9 frames of 32 x 32 pixels


# --- what a file holds --------------------------------------------------------------------------------------


class Code:
    """A pickle that runs code when it is loaded."""

    def __init__(self, proof: Path):
        self.proof = proof

    def __reduce__(self):
        return os.mkdir, (str(self.proof),)


def pickled_code(path: Path) -> None:
    """An archive as torch.save lays it out, whose pickle makes a folder."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(Code(path.parent.parent / "code_was_run"), 2))
        archive.writestr("archive/version", "3\n")


def compressed(path: Path) -> None:
    """A zip bomb: little on disk, much in memory."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(10**7))


def spoiled(value: float) -> torch.Tensor:
    latents = torch.zeros(SHAPE)
    latents[0, 3, 2, 1, 0] = value
    return latents


BAD_TENSORS = {
    "text": (lambda path: path.write_text("not a tensor"), "not a tensor file"),
    "code": (pickled_code, "nothing in it was run"),
    "bare pickle with code": (
        lambda path: path.write_bytes(pickle.dumps(Code(path.parent.parent / "code_was_run"))),
        "not a tensor file",
    ),
    "compressed": (compressed, "compressed"),
    "list": (lambda path: torch.save([1, 2, 3], path), "holds a list, expected a tensor"),
    "dict": (
        lambda path: torch.save({"latents": torch.zeros(SHAPE)}, path),
        "holds a dict, expected a tensor",
    ),
    "number": (lambda path: torch.save(1.5, path), "holds a float, expected a tensor"),
    "sparse": (lambda path: torch.save(torch.zeros(SHAPE).to_sparse(), path), "expected a tensor"),
    "meta": (lambda path: torch.save(torch.zeros(SHAPE, device="meta"), path), "step_0006.pt"),
    "nan": (lambda path: torch.save(spoiled(float("nan")), path), "NaN or infinite"),
    "inf": (lambda path: torch.save(spoiled(float("-inf")), path), "NaN or infinite"),
    "shape": (lambda path: torch.save(torch.zeros(1, 16, 3, 4, 6), path), "shape [1, 16, 3, 4, 6], expected"),
    "no shape": (lambda path: torch.save(torch.tensor(1.0), path), "shape [], expected [1, 16, 3, 4, 4]"),
    "dtype": (lambda path: torch.save(torch.zeros(SHAPE, dtype=torch.float64), path), "dtype float64"),
    "integers": (lambda path: torch.save(torch.zeros(SHAPE, dtype=torch.int32), path), "dtype int32"),
    "bfloat16": (
        lambda path: torch.save(torch.zeros(SHAPE, dtype=torch.bfloat16), path),
        "dtype bfloat16, expected float32",
    ),
    "expanded": (lambda path: torch.save(torch.zeros(1).expand(SHAPE), path), "not contiguous"),
    "huge": (lambda path: torch.save(torch.zeros(10**6), path), "expected at most"),
}


@pytest.mark.parametrize("kind", BAD_TENSORS)
def test_files_that_hold_something_else(prior_copy, infer, refused, tmp_path, kind):
    """The checksum agrees here: what the file holds is looked at, too."""
    write, words = BAD_TENSORS[kind]
    path = prior_copy / "step_0006.pt"
    path.unlink()
    write(path)
    record_checksum(prior_copy, path.name)
    refused(lambda: infer(prior_copy), path.name, words)
    assert not (tmp_path / "code_was_run").exists()


def test_the_pickles_with_code_do_run_where_they_are_trusted(tmp_path):
    """Shows that the test above can fail."""
    pickle.loads(pickle.dumps(Code(tmp_path / "code_was_run")))
    assert (tmp_path / "code_was_run").exists()


@pytest.mark.parametrize("name", ["y.pt", "clip_feature.pt", "context"])
@pytest.mark.parametrize("kind", ["code", "list", "shape", "no shape"])
def test_conditioning_that_holds_something_else(prior_copy, infer, refused, tmp_path, name, kind):
    write, words = BAD_TENSORS[kind]
    words = words.removesuffix("[1, 16, 3, 4, 4]")
    path = prior_copy / needed_name(prior_copy, name)
    path.unlink()
    write(path)
    record_checksum(prior_copy, path.name)
    refused(lambda: infer(prior_copy), path.name, words)
    assert not (tmp_path / "code_was_run").exists()


@pytest.mark.parametrize("name", ["y.pt", "clip_feature.pt", "context"])
@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda tensor: tensor * float("nan"), "NaN or infinite"),
        (lambda tensor: tensor.bfloat16(), "dtype bfloat16, expected float32"),
        (lambda tensor: tensor[..., :-1].clone(), "has shape"),
        (lambda tensor: tensor[0], "has shape"),
    ],
)
def test_conditioning_that_is_almost_right(prior_copy, infer, refused, name, spoil, words):
    path = prior_copy / needed_name(prior_copy, name)
    torch.save(spoil(torch.load(path, weights_only=True)), path)
    record_checksum(prior_copy, path.name)
    refused(lambda: infer(prior_copy), path.name, words)


@pytest.mark.parametrize("kind", sorted(set(BAD_TENSORS) - {"bfloat16"}))
def test_an_older_prior_that_holds_something_else(older_prior, infer, refused, image, tmp_path, kind):
    write, words = BAD_TENSORS[kind]
    (older_prior / "step_0006.pt").unlink()
    write(older_prior / "step_0006.pt")
    command = ("--model", "tiny", "--image", image, "--prompt", PROMPT)
    refused(lambda: infer(older_prior, *command), "step_0006.pt", words)
    assert not (tmp_path / "code_was_run").exists()


@pytest.mark.parametrize(
    "name", ["noise_pred_0006.pt", "noise_pred_nega_0006.pt", "step_0005.pt", "step_0009.pt"]
)
def test_differential_resume_looks_at_its_files_too(prior_copy, infer, refused, name):
    torch.save(spoiled(float("nan")), prior_copy / name)
    refused(lambda: infer(prior_copy, "--num_steps", 3), name, "is damaged")
    record_checksum(prior_copy, name)
    refused(lambda: infer(prior_copy, "--num_steps", 3), name, "NaN or infinite")


# --- code and claims ----------------------------------------------------------------------------------------


def gadget(function, *arguments):
    class Gadget:
        def __reduce__(self):
            return function, arguments

    return Gadget()


GADGETS = {
    "system": lambda proof: gadget(os.system, f"touch {proof}"),
    "popen": lambda proof: gadget(subprocess.Popen, ["touch", str(proof)]),
    "eval": lambda proof: gadget(builtins.eval, f"open({str(proof)!r}, 'w')"),
    "exec": lambda proof: gadget(builtins.exec, f"open({str(proof)!r}, 'w')"),
    "open": lambda proof: gadget(io.open, str(proof), "w"),
    "getattr": lambda proof: gadget(builtins.getattr, Path(proof), "touch"),
    "torch.load": lambda proof: gadget(torch.load, str(proof)),
    "bytearray": lambda proof: gadget(builtins.bytearray, 2**40),
}


@pytest.mark.parametrize("protocol", [0, 2, 4])
@pytest.mark.parametrize("kind", GADGETS)
def test_code_in_a_tensor_file(prior_copy, infer, refused, tmp_path, kind, protocol):
    proof, path = tmp_path / "code_was_run", prior_copy / "step_0006.pt"
    replace_pickle(path, pickle.dumps(GADGETS[kind](proof), protocol))
    record_checksum(prior_copy, path.name)
    refused(lambda: infer(prior_copy), path.name, "nothing in it was run")
    assert not proof.exists()


def test_a_tensor_that_claims_more_than_it_holds(prior_copy):
    """torch would read on behind the end of what is there."""
    path = prior_copy / "step_0006.pt"
    with zipfile.ZipFile(path) as archive:
        entries = {entry.filename: archive.read(entry) for entry in archive.infolist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in entries.items():
            archive.writestr(name, content[:64] if name.endswith("/data/0") else content)
    with pytest.raises(InputError, match="more values than it holds|not a tensor file"):
        load_tensor(path, shape=SHAPE, dtype="float32")


# --- damage, and sums ---------------------------------------------------------------------------------------


def test_any_damage_to_a_tensor_file_is_an_input_error(prior_copy):
    """A prior of an older format has no checksums: the reader meets the damage itself."""
    path = prior_copy / "step_0006.pt"
    whole = path.read_bytes()
    refusals = 0
    for place in range(0, len(whole), 7):
        for content in (whole[:place], whole[:place] + bytes([whole[place] ^ 0xFF]) + whole[place + 1 :]):
            path.write_bytes(content)
            try:
                load_tensor(path, shape=SHAPE, dtype="float32")
            except InputError:
                refusals += 1
    assert refusals > len(whole) // 7  # every cut at least


def test_sha256_of_a_tensor_is_that_of_its_bytes():
    assert (
        sha256_tensor(torch.tensor([1.0, -2.0]))
        == hashlib.sha256(b"\x00\x00\x80\x3f\x00\x00\x00\xc0").hexdigest()
    )
    halves = torch.tensor([1.0, -2.0], dtype=torch.bfloat16)
    assert sha256_tensor(halves) == hashlib.sha256(b"\x80\x3f\x00\xc0").hexdigest()
    transposed = torch.arange(6.0).reshape(2, 3).t()
    assert sha256_tensor(transposed) == sha256_tensor(transposed.contiguous())


# --- what is checked is what is loaded ----------------------------------------------------------------------


def saved(value: float = 2.0, **options) -> bytes:
    content = io.BytesIO()
    torch.save(torch.full(SHAPE, value), content, **options)
    return content.getvalue()


def between_entries(content: bytes) -> bytes:
    """Put bytes before the directory; the archive's end says where it is now."""
    place = content.index(b"PK\1\2")
    moved = content[:place] + b"more" * 9 + content[place:-6] + (place + 36).to_bytes(4, "little") + bytes(2)
    assert zipfile.is_zipfile(io.BytesIO(moved))
    return moved


def old_archive(*more: tuple[str, bytes], **replaced: bytes) -> bytes:
    """Return a file of these entries, as zipfile lays it out."""
    with zipfile.ZipFile(io.BytesIO(saved())) as archive:
        names = {each.filename.partition("/")[2]: each for each in archive.infolist()}
        kept = {name: archive.read(names[name]) for name in ("data.pkl", "data/0", "version")}
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        for name, old in [*kept.items(), *more]:
            archive.writestr(f"archive/{name}", replaced.get(name.partition("/")[0], old))
    return content.getvalue()


NOT_ONE_ARCHIVE = {
    "two archives": lambda: saved(1.0) + saved(),
    "an older pickle before it": lambda: saved(1.0, _use_new_zipfile_serialization=False) + saved(),
    "bytes before it": lambda: b"\0" * 64 + saved(),
    "bytes behind it": lambda: saved() + b"\0",
    "a comment": lambda: saved()[:-2] + b"\5\0" + b"hello",
    "bytes between": lambda: between_entries(saved()),
    "an entry twice": lambda: old_archive(("data/0", bytes(16 * 48 * 4))),
    "another folder": lambda: saved().replace(b"archive/version", b"another/version"),
    "another byte order": lambda: old_archive(("byteorder", b"middle")),
    "only an older pickle": lambda: saved(_use_new_zipfile_serialization=False),
    "many entries": lambda: old_archive(*((f"data/{number}", b"") for number in range(1, 400))),
    "a storage twice as large": lambda: old_archive(data=bytes(2 * 16 * 48 * 4)),
}


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("kind", NOT_ONE_ARCHIVE)
def test_a_file_that_is_not_one_archive(tmp_path, kind):
    """A reader that begins at the front and one that begins at the end would see different tensors."""
    path = tmp_path / "step_0006.pt"
    path.write_bytes(NOT_ONE_ARCHIVE[kind]())
    with pytest.raises(InputError, match="not a tensor file|holds more values|holds 'data|holds a pickle"):
        load_tensor(path, shape=SHAPE)


PICKLE_BOMBS = {
    "memo": b"\x80\x02K\0r" + b"\xff" * 4 + b".",
    "bytearray": b"\x80\x02c__builtin__\nbytearray\n" + pickle.dumps(5 * 10**9, 2)[2:-1] + b"\x85R.",
    "marks": b"\x80\x02" + b")" * 1000 + b"(t" * 1500 + b".",
    "nested": b"\x80\x02)" + b"q\0h\0\x86" * 600 + b".",
    "long": b"\x80\x02" + b"(" * 2**16 + b".",
    "digits": b"I" + b"9" * 4000 + b"\n.",
    "frame": b"\x80\x04\x95" + b"\xff" * 8 + b".",
    "string": b"\x80\x02X" + b"\xff\xff\xff\x7f.",
    "nothing": b"",
    "two": b"\x80\x02K\0.K\0.",
}


@pytest.mark.parametrize("kind", PICKLE_BOMBS)
def test_a_pickle_that_would_take_memory_or_time(tmp_path, kind):
    path = tmp_path / "step_0006.pt"
    path.write_bytes(saved())
    replace_pickle(path, PICKLE_BOMBS[kind])
    before = resource.getrusage(resource.RUSAGE_SELF)
    with pytest.raises(InputError):
        load_tensor(path, shape=SHAPE)
    after = resource.getrusage(resource.RUSAGE_SELF)
    assert after.ru_maxrss - before.ru_maxrss < 2**16  # KiB
    assert after.ru_utime - before.ru_utime < 2


def in_big_endian(tensor: torch.Tensor) -> bytes:
    return tensor.view(torch.uint8).numpy().reshape(-1, tensor.element_size())[:, ::-1].tobytes()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_layouts_of_all_versions_of_torch(tmp_path, dtype):
    """Folders, keys, devices and entries differ; the values and their alignment are those of torch.load."""
    path, tensor = tmp_path / "step_0006.pt", torch.randn(SHAPE).to(dtype)
    torch.save(tensor, path)
    with zipfile.ZipFile(path) as archive:
        pickled, values = archive.read("step_0006/data.pkl"), archive.read("step_0006/data/0")
    layouts = {
        "2.7": {"data.pkl": pickled, ".format_version": b"1", "byteorder": b"little", "data/0": values},
        "2.1": {"data.pkl": pickled, "byteorder": b"little", "data/0": values},
        "1.13": {"data.pkl": pickled, "data/0": values},
        "1.6": {
            "data.pkl": pickled.replace(b"X\1\0\0\x000", b"X\x0e\0\0\x0094236323001600"),
            "data/94236323001600": values,
        },
        "on a GPU": {"data.pkl": pickled.replace(b"X\3\0\0\0cpu", b"X\6\0\0\0cuda:0"), "data/0": values},
        "on a big machine": {"data.pkl": pickled, "byteorder": b"big", "data/0": in_big_endian(tensor)},
    }
    contents = {"as torch.save": path.read_bytes()}
    for version, entries in layouts.items():
        with zipfile.ZipFile(path, "w") as archive:
            for name, content in [*entries.items(), ("version", b"3\n")]:
                archive.writestr(f"archive/{name}", content)
        contents[version] = path.read_bytes()
    buffer = io.BytesIO()
    torch.save(torch.cat([tensor, tensor])[1:], buffer)  # a part of a larger storage
    contents["a view"] = buffer.getvalue()
    for version, content in contents.items():
        path.write_bytes(content)
        loaded = load_tensor(path, shape=SHAPE)
        assert loaded.dtype == dtype and torch.equal(loaded, tensor), version
        assert torch.equal(loaded, torch.load(path, weights_only=True, map_location="cpu")), version
        assert loaded.data_ptr() % 64 == 0


def test_torch_does_not_see_the_file(tmp_path, monkeypatch):
    path = tmp_path / "step_0006.pt"
    path.write_bytes(saved())
    monkeypatch.setattr(torch, "load", None)
    assert torch.equal(load_tensor(path, shape=SHAPE), torch.full(SHAPE, 2.0))


def test_a_safetensors_header_of_many_tensors_is_not_parsed():
    """A million empty ones in 54 MB took half a minute and 2 GB."""
    from safetensors.torch import save

    tensors = {"context": torch.ones(2, 3)}
    assert torch.equal(load_safetensors(save(tensors, {"text": "x" * 2**20}))["context"], tensors["context"])
    header = b'{"0":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}'.ljust(2**22 + 1)
    with pytest.raises(ValueError, match="a header of 4194305 bytes"):
        load_safetensors(len(header).to_bytes(8, "little") + header)
