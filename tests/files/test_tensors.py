"""Tensor files from a stranger: whatever they hold is refused, and nothing in them is run."""

from __future__ import annotations

import builtins
import hashlib
import io
import os
import pickle
import subprocess
import zipfile
from pathlib import Path

import pytest
import torch
from helpers import PROMPT, needed_name, record_checksum, replace_pickle

from step_skip.errors import InputError
from step_skip.files.tensors import load_tensor, sha256_tensor

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
