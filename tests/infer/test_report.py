"""The report beside a clip: how to make it again, and what its result depends on."""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path

import pytest
from helpers import OTHER_PROMPT, edit_metadata, read_json

from step_skip.infer.schema import find_prior, read_report


def test_the_report_says_how_to_make_the_video_again(prior, infer, tmp_path):
    first = infer(prior, "--prompt", OTHER_PROMPT, "--cfg_scale", 3, "--output", tmp_path / "a.mp4").report
    flags = [(f"--{name}", first[name]) for name in ("start_step", "prompt", "negative_prompt", "cfg_scale")]
    again = infer(Path(first["prior_dir"]), *sum(flags, ()), "--output", tmp_path / "b.mp4").report
    known = {"components_loaded", "model_fingerprint"}  # it knows the prompt now
    cost = {"seconds", "seconds_per_step", "peak_memory", *known}
    assert {k: v for k, v in first.items() if k not in cost} == {
        k: v for k, v in again.items() if k not in cost
    }
    assert set(first["seconds"]) == {"load", "encode", "denoise", "decode", "measure", "save"}
    assert len(first["seconds_per_step"]) == 3


def test_the_report_names_what_the_result_depends_on(prior, infer, image, model_dir, tmp_path):
    metadata = read_json(prior / "run_metadata.json")
    outcome = infer(prior, "--image", image, "--output", tmp_path / "video.mp4")
    report = outcome.report
    same = ("device", "device_name", "num_threads", "versions", "lora", "model", "dtype")
    assert {key: report[key] for key in same} == {key: metadata[key] for key in same}
    assert (report["model_dir"], report["vram"]) == (str(model_dir), "plain")
    assert report["model_fingerprint"] == {
        name: metadata["model_fingerprint"][name] for name in report["components_loaded"]
    }
    assert report["prior_files"] == {name: metadata["files"][name] for name in report["prior_files"]}
    assert set(report["prior_files"]) >= {"step_0006.pt", "y.pt", "clip_feature.pt"}
    assert report["image"] == str(image)
    assert report["image_sha256"] == hashlib.sha256(image.read_bytes()).hexdigest()
    assert "warning" not in outcome.err


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"device_name": "another GPU"}, "(then 'another GPU')"),
        ({"device_name": ...}, "(then None)"),
        ({"versions": {"torch": "1.13", "diffsynth": "2.0"}}, "(then '1.13'), diffsynth "),
    ],
)
def test_another_machine_or_version_is_a_warning(prior_copy, infer, changes, words):
    edit_metadata(prior_copy, **changes)
    outcome = infer(prior_copy, "--start_step", 9)
    warnings = [line for line in outcome.err.splitlines() if line.startswith("warning: ")]
    assert (outcome.code, len(warnings)) == (0, 1)
    assert words in warnings[0] and "the last bits" in warnings[0]


def test_paths_that_are_no_utf8_can_be_written_down(prior, infer, image, tmp_path):
    odd = tmp_path / os.fsdecode(b"me \xff.png")
    odd.write_bytes(image.read_bytes())
    outcome = infer(prior, "--start_step", 9, "--image", odd, "--output", tmp_path / "video.mp4")
    assert outcome.report["image"] == str(odd)


# --- the prior of a clip ------------------------------------------------------------------------------------


@pytest.fixture
def moved(prior, make_prior, infer, tmp_path):
    """A prior with a clip, moved; where it was, another prior of its name was made since."""
    own = shutil.copytree(prior, tmp_path / "before" / "run_a", ignore=shutil.ignore_patterns("outputs"))
    infer(own, "--prompt", OTHER_PROMPT, "--output_dir", own / "outputs" / "s")
    shutil.move(tmp_path / "before", tmp_path / "after")
    shutil.copytree(make_prior("--seed", "5", "--run_id", "other"), own)
    return tmp_path / "after" / "run_a"


def test_page_and_like_find_the_same_prior_after_a_move(moved, run):
    [clip] = (moved / "outputs" / "s").glob("*.mp4")
    assert find_prior(read_report(clip.with_suffix(".json")), clip) == moved
    again = run("infer_from_prior", "--like", clip, "--output", moved.parent / "again.mp4")
    assert again.report["latents_sha256"] == read_json(clip.with_suffix(".json"))["latents_sha256"]
    page = run("step_skip.page.__main__", clip.parent).path
    [kept] = (page.parent / "page").glob("prior_*.mp4")
    assert kept.read_bytes() == (moved / "output_full.mp4").read_bytes()


def test_a_sweep_moved_with_the_priors_beside_it_finds_each(moved, make_prior):
    """The clips lie in the first prior's folder; of the others only the names are recorded."""
    [clip] = (moved / "outputs" / "s").glob("*.mp4")
    report = read_report(clip.with_suffix(".json"))
    second = shutil.copytree(make_prior("--seed", "1", "--run_id", "second"), moved.parent / "run_second")
    of_second = report.model_copy(update={"prior_dir": "/gone/run_second", "prior_run_id": "second"})
    assert find_prior(of_second, clip) == second
    gone = report.model_copy(update={"prior_dir": "/gone/run_third", "prior_run_id": "third"})
    assert find_prior(gone, clip) == Path("/gone/run_third")
