"""Priors by name: what they are called, and list, show and rm."""

from __future__ import annotations

import shutil

import pytest
from helpers import PROMPT, edit_metadata

from step_skip.files.names import id_from_name
from step_skip.prior.writer import create_run_dir


@pytest.mark.parametrize(
    ("name", "run_id"),
    [
        ("mila", "mila"),
        ("IMG 0123 (1)", "img_0123_1"),
        ("Zoë", "zoe"),
        ("../../etc", "etc"),
        ("名前", ""),
        ("x" * 300, "x" * 40),
    ],
)
def test_an_id_is_made_of_a_name(name, run_id):
    assert id_from_name(name) == run_id


def test_the_same_name_is_numbered(tmp_path):
    made = [create_run_dir(tmp_path, None, name="mila")[0].name for _ in range(3)]
    assert made == ["run_mila", "run_mila_2", "run_mila_3"]


def test_a_prior_is_named_after_its_image_or_its_prompt(generate, make, image):
    assert generate("--image", image, "--num_inference_steps", 1).path.name == "run_identity"
    other = generate("--image", image, "--num_inference_steps", 1, "--seed", 1)
    assert other.path.name == "run_identity_2"
    outcome = make("T2V", "--num_inference_steps", 1)
    assert outcome.path.name == "run_the_portrait_moves_left"


@pytest.fixture
def kept(prior, tmp_path):
    """A folder with a prior, a clip made from it, and a folder that is none."""
    folder = shutil.copytree(prior, tmp_path / "kept" / "run_mila")
    (folder / "outputs" / "sweep_1").mkdir(parents=True)
    (folder / "outputs" / "sweep_1" / "clip.mp4").write_bytes(bytes(2_000_000))
    (tmp_path / "kept" / "notes").mkdir()
    return folder


def test_list(run, kept, monkeypatch):
    [head, row] = run("prior_utils", "list", kept.parent).out.splitlines()
    assert head.split() == ["name", "prompt", "steps", "size", "clips"]
    assert row.startswith(f"run_mila  {PROMPT}")
    assert row.split()[-4:][0] == "10" and row.endswith("MB  1")
    assert float(row.split()[-3]) > 2
    assert run("prior_utils", "list", kept).out.splitlines()[1] == row
    (kept.parent / "prior_output").mkdir()
    monkeypatch.chdir(kept.parent)
    assert run("prior_utils", "list").out == "no prior there\n"


def test_a_damaged_or_unfinished_prior_is_listed_or_told(run, kept):
    edit_metadata(kept, status="running", prompt="a\nb" + "c" * 60)
    outcome = run("prior_utils", "list", kept.parent)
    assert f"a b{'c' * 34}...  10 of 10" in outcome.out
    (kept / "run_metadata.json").write_text("{")
    outcome = run("prior_utils", "list", kept.parent)
    assert outcome.out == "no prior there\n" and "run_mila cannot be read" in outcome.err


def test_show(run, kept):
    out = run("prior_utils", "show", kept).out
    for line in (f"prompt        {PROMPT}", "image         identity.png", "made from it  clips: 1"):
        assert line in out
    assert str(kept / "input_image.png") in out and str(kept / "outputs" / "sweep_1" / "clip.mp4") in out


def test_rm_asks_first(run, kept):
    outcome = run("prior_utils", "rm", kept)
    assert "would remove" in outcome.err and "clips made from it: 1" in outcome.err and "--yes" in outcome.err
    assert kept.exists()
    outcome = run("prior_utils", "rm", kept, "--yes")
    assert outcome.code == 0 and not kept.exists()
    assert (kept.parent / "notes").exists()


def test_rm_takes_priors_only(run, kept, tmp_path):
    (tmp_path / "link").symlink_to(kept)
    for folder in (kept.parent / "notes", kept.parent, tmp_path / "link", tmp_path / "nowhere"):
        outcome = run("prior_utils", "rm", kept, folder, "--yes")
        assert (
            outcome.code == 2 and "is not a prior" in outcome.error and "nothing was removed" in outcome.error
        )
    assert kept.exists()


def test_rm_leaves_a_prior_alone_that_is_written(run, kept):
    from step_skip.files.writing import locked

    with locked(kept):
        outcome = run("prior_utils", "rm", kept, "--yes")
    assert outcome.code == 2 and kept.exists()


def test_priors_are_verified_as_before(run, kept):
    assert "files are whole" in run("prior_utils", kept).err
