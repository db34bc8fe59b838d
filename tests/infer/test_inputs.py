"""What a clip is made from: the prior's image and settings, said again or another."""

from __future__ import annotations

import torch
from conftest import save_image
from helpers import FRAMES, PROMPT, SIZE, read_json, record_checksum

SHAPE = (1, 16, 3, 4, 4)  # latents of 9 frames of 32 x 32 pixels


# --- the image ----------------------------------------------------------------------------------------------


def test_another_image_than_the_prior(prior_copy, infer, refused, tmp_path):
    other = save_image(tmp_path / "other.png", shade=201)
    refused(lambda: infer(prior_copy, "--image", other), "other.png is not the image", "leave the flag out")


def test_the_same_image_again_is_fine(prior, infer, image, tmp_path):
    outcome = infer(prior, "--image", image, "--output", tmp_path / "video.mp4")
    assert outcome.report["latents_sha256"] == read_json(prior / "run_metadata.json")["latents_sha256"]


def test_a_bad_image_of_the_priors_own_is_called_so(prior_copy, infer, refused, image):
    own = prior_copy / "input_image.png"
    own.write_bytes(b"not a picture")
    record_checksum(prior_copy, own.name)
    refused(lambda: infer(prior_copy, "--image", image), f"the prior's image {own} is not an image")


# --- settings and files -------------------------------------------------------------------------------------


def test_what_the_prior_fixes_may_be_said_and_fps_is_free(prior, infer, tmp_path):
    flags = ("--start_step", 9, "--seed", 0, "--num_frames", FRAMES, "--height", SIZE, "--fps", 4)
    report = infer(prior, *flags, "--output", tmp_path / "slow.mp4").report
    own = infer(prior, "--start_step", 9, "--output", tmp_path / "own.mp4").report
    assert (report["fps"], own["fps"]) == (4, 8)
    assert report["latents_sha256"] == own["latents_sha256"]


def test_an_older_priors_file_that_is_swapped(older_prior, infer, image, monkeypatch):
    """It records no sums: what was seen first has to be what is loaded."""
    from step_skip.infer import inputs

    read, path = inputs.read_inputs, older_prior / "step_0006.pt"

    def swap_after(*given):
        inputs = read(*given)
        torch.save(torch.zeros(SHAPE), path)
        return inputs

    monkeypatch.setattr("step_skip.infer.inputs.read_inputs", swap_after)
    outcome = infer(older_prior, "--model", "tiny", "--image", image, "--prompt", PROMPT)
    assert outcome.code == 2 and "step_0006.pt is damaged: its SHA-256" in outcome.error
