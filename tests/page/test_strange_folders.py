"""Pages of folders from a stranger: what is no clip is told, and nothing is waited for or followed."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import pytest
from helpers import OTHER_PROMPT, PROMPT, ROOT, edit_metadata, listing, record_checksum, run_as_user
from PIL import Image

from step_skip.media.videos import write_video


@pytest.mark.parametrize("kind", ["link", "other", "long"])
def test_a_priors_film_that_is_not_its_own_is_not_shown(prior_copy, infer, run, tmp_path, kind):

    own = prior_copy / "output_full.mp4"
    frames = [Image.new("RGB", (16, 16))] * (40 if kind == "long" else 9)
    own.rename(tmp_path / "own.mp4")
    write_video(frames, tmp_path / "other.mp4", fps=8)
    if kind == "link":
        own.symlink_to(tmp_path / "own.mp4")
    else:
        own.write_bytes((tmp_path / "other.mp4").read_bytes())
    if kind == "long":
        record_checksum(prior_copy, own.name)
    folder = infer(prior_copy, "--prompt", PROMPT, OTHER_PROMPT, "--start_step", 9).path
    text = (folder / "index.html").read_text()
    words = {"link": "is a symbolic link", "other": "is damaged", "long": "over 9 frames, expected 9"}[kind]
    assert words in text
    assert 'output_full.mp4"' not in text  # nothing to play
    assert run("step_skip.page.__main__", folder).code == 0


def test_a_sweeps_folder_from_a_stranger(prior, infer, run, tmp_path):
    """What is in it is made again, or told on the page; none of it is waited for or followed."""
    flags = ("--prompt", PROMPT, OTHER_PROMPT, "--start_step", "4-9", "--output_dir", tmp_path / "sweep")
    folder = infer(prior, *flags).path
    whole = listing(folder)
    (tmp_path / "elsewhere").write_text("precious")
    laid = {
        "brackets": lambda path: path.write_text("[" * 100_000),
        "deep": lambda path: path.write_text("[" * 900 + "]" * 900),
        "fifo": os.mkfifo,
        "link": lambda path: path.symlink_to(tmp_path / "elsewhere"),
        "sparse": lambda path: os.truncate(os.fspath(path), 2**36),
        "folder": Path.mkdir,
    }
    for suffix in (".json", ".mp4"):
        videos = sorted(folder.glob("*.mp4"))[:: 1 if suffix == ".mp4" else -1][: len(laid)]
        for video, (kind, lay) in zip(videos, laid.items(), strict=True):
            path = video.with_suffix(suffix)
            if kind != "sparse":
                path.unlink()
            lay(path)
    signal.alarm(100)
    assert run("step_skip.page.__main__", folder).code == 0
    outcome = infer(prior, *flags)
    signal.alarm(0)
    assert (outcome.code, "2 of 12 clips failed" in outcome.error) == (1, True), outcome.err
    found = {name: digest for name, digest in listing(folder).items() if "/" not in name}
    laid_over = [path for path in folder.iterdir() if path.is_dir() and path.name != "page"]
    made = {name for name, digest in found.items() if name.endswith(".mp4") and digest == whole.get(name)}
    # the video whose JSON is a folder is made, and not said to be
    assert len(made) == 11 and len(laid_over) == 2
    assert (tmp_path / "elsewhere").read_text() == "precious"


def test_a_link_in_place_of_a_sweeps_folder_has_no_page(prior_copy, infer, run, tmp_path):
    sweep = prior_copy / "outputs" / "sweep"
    infer(prior_copy, "--start_step", 9, "--output_dir", sweep).path.rename(tmp_path / "elsewhere")
    sweep.symlink_to(tmp_path / "elsewhere")
    before = listing(tmp_path)
    outcome = run("step_skip.page.__main__", sweep)
    assert outcome.code == 2 and "sweep is a symbolic link" in outcome.error
    assert listing(tmp_path) == before


# --- the folder itself --------------------------------------------------------------------------------------


ENTRIES = (
    [ROOT / "prior_utils.py", "page", "."],
    [ROOT / "prior_utils.py", "list", "."],
    [ROOT / "generate_prior.py", "--image", "nothing.png"],
    [ROOT / "infer_from_prior.py", "--prior_dir", "."],
    ["-P", "-m", "step_skip.page", "."],
)


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: str(entry[0]).rpartition("/")[2])
def test_no_code_in_the_folder_runs(entry, tmp_path):
    """Each command is started inside a folder whose modules have the names of others."""
    if entry[0] == "-P" and sys.version_info < (3, 11):
        pytest.skip("python -P came with Python 3.11")
    for name in ("html", "json", "argparse", "logging", "torch", "numpy", "sitecustomize"):
        (tmp_path / f"{name}.py").write_text("open('ran', 'w')")
    (tmp_path / "step_skip").mkdir()
    (tmp_path / "step_skip" / "__init__.py").write_text("open('ran', 'w')")
    paths = {"PYTHONPATH": str(ROOT)} if entry[0] == "-P" else {}
    ended = run_as_user(*map(str, entry), cwd=tmp_path, env=os.environ | paths)
    assert ended.returncode in (0, 2), ended.stderr
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["index.html", "contact_sheet.png", "page/order.json"])
def test_a_file_of_somebody_elses_is_never_replaced(prior_copy, infer, run, refused, tmp_path, name):
    folder = tmp_path / "s"
    (folder / "page").mkdir(parents=True)
    (folder / name).write_text("mine")
    sweep = ("--prompt", PROMPT, OTHER_PROMPT, "--num_steps", 1, "--output_dir", folder)
    refused(lambda: infer(prior_copy, *sweep), name, "move it")
    (folder / name).rename(tmp_path / "kept")
    assert infer(prior_copy, *sweep).code == 0
    (tmp_path / "kept").replace(folder / name)
    if name != "contact_sheet.png":  # beside a page of ours an unmarked sheet is one of an earlier version
        outcome = run("step_skip.page.__main__", folder)
        assert outcome.code == 2 and name in outcome.error and "move it" in outcome.error
        assert (folder / name).read_text() == "mine"


def test_a_preview_replaces_only_a_preview(prior_copy, infer, refused, tmp_path):
    asked = ("--prompt", OTHER_PROMPT, "--num_steps", 1, "--output", tmp_path / "mila.mp4", "--preview")
    (tmp_path / "mila.webp").write_bytes(b"mine")
    refused(lambda: infer(prior_copy, *asked), "mila.webp", "no preview")
    (tmp_path / "mila.webp").unlink()
    assert infer(prior_copy, *asked).code == 0
    (tmp_path / "mila.mp4").unlink()
    (tmp_path / "mila.json").unlink()
    assert infer(prior_copy, *asked).code == 0  # its own of the run before


def test_a_run_id_of_a_forged_prior_names_nothing_outside(prior_copy, run, refused, model_dir):
    edit_metadata(prior_copy, run_id="mila/../../victim/pwned")
    again = ("--prior_dir", prior_copy, "--model_dir", model_dir, "--prompt", OTHER_PROMPT, "--save_prior")
    refused(lambda: run("infer_from_prior", *again), "run_id", "letters, digits")
    refused(lambda: run("prior_utils", "export", prior_copy), "run_id", "letters, digits")
