"""Writing: where nothing can be written, under which name, and what a link in the way leads to."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import secrets
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from helpers import OTHER_PROMPT, listing, read_json

from step_skip.errors import TakenError
from step_skip.files.writing import locked, replacing, write_json
from step_skip.prior.contexts import kept_context_path
from step_skip.prior.metadata import read_prior

# --- where the output goes ----------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["below a file", "in /proc"])
def test_outputs_that_cannot_be_written(generate, prior, infer, refused, image, tmp_path, place):
    (tmp_path / "file").write_text("text")
    folder = Path("/proc/nowhere") if place == "in /proc" else tmp_path / "file" / "folder"
    refused(lambda: generate("--image", image, "--output_dir", folder), f"cannot write to {folder}", "name a")
    refused(lambda: infer(prior, "--output", folder / "video.mp4"), f"cannot write to {folder}", "name a")


def test_a_full_disk_is_seen_before_the_run(
    generate, prior_copy, infer, refused, image, tmp_path, monkeypatch
):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    refused(lambda: generate("--image", image), "0 MiB free", "free some space")
    refused(lambda: infer(prior_copy), "0 MiB free", "free some space")


# --- a name is taken when the file is whole -----------------------------------------------------------------


def test_replacing_leaves_the_old_file_when_writing_fails(tmp_path):
    (tmp_path / "file.json").write_text("old")
    with pytest.raises(RuntimeError), replacing(tmp_path / "file.json") as temporary:
        temporary.write_text("half of the n")
        raise RuntimeError
    assert listing(tmp_path) == {"file.json": hashlib.sha256(b"old").hexdigest()}


def test_of_many_writers_one_gets_the_name(tmp_path):
    from concurrent.futures import ThreadPoolExecutor

    def write(number):
        try:
            write_json(tmp_path / "one.json", {"number": number}, overwrite=False)
        except TakenError:
            return None
        return number

    with ThreadPoolExecutor(8) as pool:
        winners = [number for number in pool.map(write, range(40)) if number is not None]
    assert len(winners) == 1 and read_json(tmp_path / "one.json")["number"] == winners[0]
    assert set(listing(tmp_path)) == {"one.json"}


# --- links in the way of what is written --------------------------------------------------------------------


@pytest.fixture
def precious(tmp_path):
    """A file of the user's that no prior may change."""
    path = tmp_path / "profile"
    path.write_text("export PATH")
    return path


def test_links_under_guessable_temporary_names_are_not_followed(prior_copy, infer, precious, tmp_path):
    """A forged prior may hold links under any name it can foresee, wherever something will be written."""

    prior = read_prior(prior_copy)
    names = [kept_context_path(prior, OTHER_PROMPT).name, "output.json", "output.mp4", "index.html"]
    for folder in (prior_copy, prior_copy / "contexts", prior_copy / "outputs"):
        folder.mkdir(exist_ok=True)
        for name in names:
            for number in (os.getpid(), *range(os.getpid() + 1, os.getpid() + 50)):
                (folder / f".tmp_{number}_{name}").symlink_to(precious)
            (folder / name).symlink_to(precious)
    outcome = infer(prior_copy, "--prompt", OTHER_PROMPT)
    assert outcome.code == 0, outcome.err
    assert precious.read_text() == "export PATH"
    assert not kept_context_path(prior, OTHER_PROMPT).is_symlink()  # replaced, not followed


def test_a_temporary_name_is_never_one_that_is_there(tmp_path, precious, monkeypatch):
    monkeypatch.setattr(secrets, "token_hex", lambda _: "0" * 16)
    (tmp_path / f".tmp_{'0' * 16}_file.json").symlink_to(precious)
    with pytest.raises(OSError, match="exists"):
        write_json(tmp_path / "file.json", {})
    assert precious.read_text() == "export PATH"


@pytest.mark.parametrize("kind", ["link", "fifo"])
def test_what_was_put_in_place_of_the_temporary_file_is_not_taken(tmp_path, precious, kind):
    words = {"link": "symbolic links", "fifo": "another program"}[kind]
    with (
        pytest.raises(OSError, match=words),
        replacing(tmp_path / "file.json") as temporary,
    ):
        temporary.unlink()
        temporary.symlink_to(precious) if kind == "link" else os.mkfifo(temporary)
    assert not (tmp_path / "file.json").exists()
    assert precious.read_text() == "export PATH"


# --- one writer of a folder ---------------------------------------------------------------------------------


def test_only_our_own_leftovers_are_cleared_away(tmp_path):

    for name in (".tmp_thesis.tex", ".tmp_0123456789abcdef_step_0001.pt", ".tmp_77_step_0001.pt", "a.pt"):
        (tmp_path / name).write_text("text")
    (tmp_path / ".tmp_78_folder").mkdir()
    with locked(tmp_path):
        pass
    assert set(listing(tmp_path)) == {".tmp_thesis.tex", ".tmp_78_folder", "a.pt"}


def test_a_file_system_without_locks_is_said_to_be_one(tmp_path, monkeypatch, caplog):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with locked(tmp_path):
        pass
    assert "locks don't work" in caplog.text
