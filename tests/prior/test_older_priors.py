"""Priors of the pull request's scripts: they give what full ones give, and say what they don't record."""

from __future__ import annotations

import hashlib
import json

import pytest
from conftest import save_image
from helpers import FRAMES, OTHER_PROMPT, PROMPT, PUBLISHED_KEYS, SIZE, read_json

# --- what they give -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", [0, 6, 9])
def test_an_older_prior_gives_what_the_full_one_gives(prior, older_prior, infer, image, tmp_path, step):
    flags = ("--start_step", step, "--prompt", OTHER_PROMPT)
    full = infer(prior, *flags, "--output", tmp_path / "full.mp4").report
    outcome = infer(older_prior, "--model", "tiny", "--image", image, *flags)
    assert outcome.report["latents_sha256"] == full["latents_sha256"]
    assert outcome.report["steps_run"] == full["steps_run"]
    latents = older_prior / f"step_{step:04d}.pt"
    digest = hashlib.sha256(latents.read_bytes()).hexdigest()
    assert outcome.report["prior_files"] == {latents.name: digest}
    assert outcome.report["image_sha256"] == hashlib.sha256(image.read_bytes()).hexdigest()


def test_an_older_priors_image_is_read_once(older_prior, infer, tmp_path):
    wide = save_image(tmp_path / "wide.png", size=(2 * SIZE, SIZE))
    outcome = infer(older_prior, "--model", "tiny", "--image", wide, "--prompt", PROMPT)
    assert outcome.code == 0
    assert outcome.err.count("stretched") == 1


def test_an_older_prior_warns_of_what_could_not_be_checked(older_prior, infer, image):
    assert set(read_json(older_prior / "run_metadata.json")) == PUBLISHED_KEYS
    outcome = infer(older_prior, "--model", "tiny", "--image", image, "--prompt", PROMPT)
    warnings = [line for line in outcome.err.splitlines() if line.startswith("warning: ")]
    assert len(warnings) == 2
    assert "late for a new motion" in warnings[1] and "make the prior again" in warnings[1]
    for word in (
        "older format",
        "could not be checked",
        "model",
        "weights",
        "image",
        "cfg_scale",
        "checksums",
    ):
        assert word in warnings[0]


def test_an_older_prior_ignores_entries_of_other_types(prior, older_prior, infer, image):
    path = older_prior / "run_metadata.json"
    junk = {"start_step": "6", "files": 3, "model": [], "cfg_scale": "5", "prompt": 1, "model_fingerprint": 0}
    path.write_text(json.dumps(read_json(path) | junk))
    outcome = infer(older_prior, "--model", "tiny", "--image", image, "--prompt", PROMPT)
    assert outcome.report["latents_sha256"] == read_json(prior / "run_metadata.json")["latents_sha256"]


def test_an_older_prior_may_record_the_sizes_that_were_asked_for(older_prior, infer, image):
    path = older_prior / "run_metadata.json"
    path.write_text(json.dumps(read_json(path) | {"height": SIZE - 1, "num_frames": FRAMES - 1}))
    outcome = infer(older_prior, "--model", "tiny", "--image", image, "--prompt", PROMPT)
    assert (outcome.report["height"], outcome.report["num_frames"]) == (SIZE, FRAMES)


# --- what is refused ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ((), "give --image"),
        (("--prompt", PROMPT), "give --image"),
        (("--image", "IMAGE"), "give --prompt"),
        (("--image", "nowhere.png", "--prompt", PROMPT), "nowhere.png is not a file"),
        (("--image", "IMAGE", "--prompt", PROMPT, "--dtype", "bfloat16"), "latents are float32"),
        (("--image", "IMAGE", "--prompt", PROMPT, "--steps", 2, 5), "--start_step"),
    ],
)
def test_an_older_prior_needs_what_it_does_not_record(older_prior, infer, refused, image, flags, words):
    flags = [image if flag == "IMAGE" else flag for flag in flags]
    refused(lambda: infer(older_prior, "--model", "tiny", *flags), words)


def test_an_older_prior_of_which_steps_are_missing(older_prior, infer, refused, image):
    (older_prior / "step_0006.pt").unlink()
    command = ("--model", "tiny", "--image", image, "--prompt", PROMPT)
    refused(lambda: infer(older_prior, *command), "step_0006.pt is missing")
