"""Files of a prior that are damaged are refused where they are needed, and told by --verify."""

from __future__ import annotations

import pytest
import torch
from helpers import PROMPT, needed_name, record_checksum

SHAPE = (1, 16, 3, 4, 4)  # latents of 9 frames of 32 x 32 pixels


# --- refused where they are needed --------------------------------------------------------------------------


NEEDED = ["step_0006.pt", "y.pt", "clip_feature.pt"]


@pytest.mark.parametrize("name", [*NEEDED, "context"])
@pytest.mark.parametrize("damage", ["missing", "empty", "truncated", "flipped", "symlink", "folder"])
def test_damaged_files(prior_copy, infer, refused, tmp_path, name, damage):
    path = prior_copy / needed_name(prior_copy, name)
    content = path.read_bytes()
    path.unlink()
    if damage == "symlink":
        (tmp_path / "elsewhere.pt").write_bytes(content)
        path.symlink_to(tmp_path / "elsewhere.pt")
    elif damage == "folder":
        path.mkdir()
    elif damage != "missing":
        middle = len(content) // 2
        flipped = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
        path.write_bytes({"empty": b"", "truncated": content[:middle], "flipped": flipped}[damage])
    words = {"missing": "is missing", "folder": "is missing", "symlink": "symbolic link"}
    refused(lambda: infer(prior_copy), path.name, words.get(damage, "is damaged"))


@pytest.mark.parametrize("name", ["step_0006.pt", "y.pt"])
def test_a_file_that_is_swapped_after_its_sum_was_taken(prior_copy, infer, refused, monkeypatch, name):
    """What is loaded is what the sum is of, so that the JSON never records another."""
    from step_skip.files import reading

    check, path = reading.check_sha256, prior_copy / name
    torch.save(torch.load(path, weights_only=True) * 2, prior_copy.parent / "other.pt")

    def swap_after(checked, *sums):
        check(checked, *sums)
        if checked == path and (prior_copy.parent / "other.pt").exists():
            (prior_copy.parent / "other.pt").rename(path)

    monkeypatch.setattr("step_skip.prior.files.check_sha256", swap_after)
    outcome = infer(prior_copy)
    assert outcome.code == 2 and f"{name} is damaged: its SHA-256" in outcome.error


# --- --verify -----------------------------------------------------------------------------------------------


@pytest.fixture
def verify(run):
    return lambda *priors: run("infer_from_prior", "--verify", "--prior_dir", *priors)


def test_whole_priors_are_said_to_be_so(prior, prior_copy, verify, loads):
    outcome = verify(prior, prior_copy)
    assert (outcome.code, outcome.out) == (0, f"{prior}\n{prior_copy}\n")
    assert outcome.err.count("38 of 38 files are whole; it can be resumed after steps 0-9") == 2
    assert not loads


def test_damage_is_told_file_by_file(prior_copy, verify, infer):
    (prior_copy / "step_0003.pt").unlink()
    (prior_copy / "output_full.mp4").write_bytes(b"half")
    torch.save(torch.zeros(SHAPE) * float("nan"), prior_copy / "step_0008.pt")
    record_checksum(prior_copy, "step_0008.pt")
    outcome = verify(prior_copy)
    assert (outcome.code, outcome.out) == (2, "")
    for words in ("step_0003.pt is missing", "output_full.mp4 is damaged", "step_0008.pt holds NaN"):
        assert words in outcome.err
    assert "35 of 38 files are whole; it can be resumed after steps 0-2, 4-7, 9" in outcome.err
    assert "3 files are damaged" in outcome.error
    assert infer(prior_copy, "--start_step", 6).code == 0  # as was said
    assert infer(prior_copy, "--start_step", 3).code == 2


def test_a_damaged_negative_branch_is_missed_by_the_step_before(prior_copy, verify, infer):
    (prior_copy / "noise_pred_nega_0003.pt").unlink()
    assert "37 of 38 files are whole; it can be resumed after steps 0-1, 3-9" in verify(prior_copy).err
    assert infer(prior_copy, "--start_step", 2).code == 2


def test_a_prior_without_its_identity_is_said_to_be_useless(prior_copy, verify):
    (prior_copy / "y.pt").unlink()
    assert "can't be resumed" in verify(prior_copy).err


def test_drafts_and_older_priors_are_verified_too(make_prior, older_prior, verify):
    draft = make_prior("--stop_after", "3")
    assert "it can be resumed after steps 0-3" in verify(draft).err
    assert "10 of 10 files are whole" in verify(older_prior).err


def test_verify_stands_alone(prior, run, refused):
    command = ("infer_from_prior", "--verify", "--prior_dir", prior, "--prompt", PROMPT)
    refused(lambda: run(*command), "--verify only checks priors", "--prompt")


def test_verify_looks_at_every_prior(prior, prior_copy, run, tmp_path):
    """Also at those after one that can't be read."""
    (tmp_path / "no_prior").mkdir()
    (prior_copy / "step_0004.pt").unlink()
    outcome = run("infer_from_prior", "--verify", "--prior_dir", tmp_path / "no_prior", prior_copy, prior)
    assert outcome.code == 2
    assert "1 of 3 priors cannot be read and 1 files are damaged" in outcome.error
    assert "no_prior holds no run_metadata.json" in outcome.err
    assert "it can be resumed after steps 0-3, 5-9" in outcome.err
    assert f"{prior}: " in outcome.err
