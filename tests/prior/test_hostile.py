"""Priors made by somebody else take no more memory than their own would, and lead nowhere outside."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import resource
import signal
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from helpers import edit_metadata, read_json, record_checksum, replace_pickle
from PIL import Image

# --- bombs --------------------------------------------------------------------------------------------------


FORKED = multiprocessing.get_context("forkserver")  # its processes begin with these imports made
FORKED.set_forkserver_preload(
    ["torch", "step_skip.pipeline.run", "infer_from_prior", "step_skip.cli.flags", __name__]
)


def limited_run(argv, cwd, *, mebibytes):
    """infer_from_prior.py up to the loading of the model, with this much memory above what imports take."""
    process = FORKED.Process(target=run_limited, args=([*map(str, argv)], cwd, mebibytes))
    process.start()
    process.join(timeout=600)
    out, err = ((cwd / name).read_text() for name in ("out", "err"))
    return subprocess.CompletedProcess(argv, process.exitcode, out, err)


def run_limited(argv: list[str], cwd: Path, mebibytes: int) -> None:
    """What `limited_run` runs in a process of its own."""
    import infer_from_prior
    from step_skip.cli.terminal import run_script

    os.chdir(cwd)
    for descriptor, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT), descriptor)
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + mebibytes * 2**20,) * 2)
    sys.argv = ["infer_from_prior.py", *argv]
    run_script(infer_from_prior.main)


def claiming(path: Path, numel: int) -> None:
    """A file of a few KB whose pickle says that its storage has so many values."""
    with zipfile.ZipFile(path) as archive:
        content = archive.read(next(name for name in archive.namelist() if name.endswith("/data.pkl")))
    true, claim = (pickle.dumps(count, 2)[2:-1] for count in (16 * 3 * 4 * 4, numel))
    assert true in content
    replace_pickle(path, content.replace(true, claim, 1))  # the first one: others are strides


def zip_bomb(path: Path) -> None:
    with (
        zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive,
        archive.open("archive/data.pkl", "w") as file,
    ):
        for _ in range(2**10):
            file.write(bytes(2**20))


def stored_bomb(path: Path) -> None:
    """Says it is stored, and large; a hole, which costs no disk."""
    with path.open("wb") as file:
        file.truncate(2**32)


def image_bomb(path: Path) -> None:
    """Below what Pillow refuses, and half a GiB when decoded."""

    Image.new("RGB", (13000, 13000)).save(path)


def deep_json(path: Path) -> None:
    path.write_text('{"run_id": ' + "[" * 900 + "]" * 900 + "}")


def sparse_json(path: Path) -> None:
    with path.open("r+b") as file:
        file.truncate(2**30)


BOMBS = {
    "4 TB claimed": ("step_0006.pt", lambda path: claiming(path, 2**40), "make the prior again"),
    "zip bomb": ("step_0006.pt", zip_bomb, "compressed"),
    "stored bomb": ("step_0006.pt", stored_bomb, "expected at most"),
    "image bomb": ("input_image.png", image_bomb, "13000 x 13000 pixels, expected 32 x 32"),
    "deep json": ("run_metadata.json", deep_json, "nested deeper"),
    "1 GB of metadata": ("run_metadata.json", sparse_json, "too large"),
}


@pytest.mark.parametrize("kind", BOMBS)
def test_bombs_under_a_memory_limit(prior_copy, model_dir, image, tmp_path, kind):
    name, make, words = BOMBS[kind]
    make(prior_copy / name)
    if name != "run_metadata.json" and kind != "stored bomb":
        record_checksum(prior_copy, name)
    argv = ("--prior_dir", prior_copy, "--model_dir", model_dir, "--start_step", 6, "--image", image)
    ended = limited_run(argv, tmp_path, mebibytes=200)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert "Traceback" not in ended.stderr and words in ended.stderr.splitlines()[-1]


def test_the_memory_limit_is_one(prior_copy, model_dir, image, tmp_path):
    """Shows that the test above can fail: this image is the user's own, and decoded."""
    image_bomb(tmp_path / "large.png")
    argv = ("--prior_dir", prior_copy, "--model_dir", model_dir, "--image", tmp_path / "large.png")
    ended = limited_run(argv, tmp_path, mebibytes=200)
    assert ended.returncode == 2
    assert "large.png cannot be read (MemoryError)" in ended.stderr.splitlines()[-1]


# --- paths, links and pipes ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["../../secret.pt", "/etc/passwd", "..", "a/b.pt", "..\\x.pt", "."])
def test_no_path_leaves_the_prior(prior_copy, infer, run, refused, model_dir, name):
    files = read_json(prior_copy / "run_metadata.json")["files"]
    edit_metadata(prior_copy, files=files | {name: "0" * 64})
    refused(lambda: infer(prior_copy), "not inside the prior")
    refused(lambda: run("infer_from_prior", "--prior_dir", prior_copy, "--verify"), "not inside the prior")
    command = ("generate_prior", "--resume", prior_copy, "--model_dir", model_dir)
    refused(lambda: run(*command), "not inside the prior")


@pytest.mark.parametrize("name", ["step_0006.pt", "y.pt", "run_metadata.json"])
def test_no_link_leaves_the_prior(prior_copy, infer, refused, tmp_path, name):
    (prior_copy / name).rename(tmp_path / "elsewhere")
    (prior_copy / name).symlink_to(tmp_path / "elsewhere")
    refused(lambda: infer(prior_copy), name, "symbolic link")


def test_a_pipe_is_no_file(prior_copy, infer, refused):
    """Reading one would wait forever."""
    for name in ("step_0006.pt", "run_metadata.json"):
        (prior_copy / name).unlink()
        os.mkfifo(prior_copy / name)
        signal.alarm(60)
        outcome = infer(prior_copy)
        signal.alarm(0)
        assert outcome.code == 2 and name in outcome.error
