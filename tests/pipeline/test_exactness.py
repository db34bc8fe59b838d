"""The contract: a resumed run ends in the full run's latents, bit for bit, and costs what is left."""

from __future__ import annotations

import pytest
import torch
from helpers import FRAMES, OTHER_PROMPT, PROMPT, SIZE, read_json


@pytest.fixture(scope="session")
def video(tmp_path_factory):
    """A clip for --input_video."""
    import imageio
    import numpy as np

    path = tmp_path_factory.mktemp("video") / "clip.mp4"
    with imageio.get_writer(path, fps=8) as writer:
        for i in range(FRAMES):
            writer.append_data(np.full((SIZE, SIZE, 3), 20 * i, np.uint8))
    return path


def full_sha256(prior):
    return read_json(prior / "run_metadata.json")["latents_sha256"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("step", range(10))
def test_own_prompt_is_exact_from_every_step(make_prior, infer, tmp_path, step, dtype):
    prior = make_prior("--dtype", dtype)
    outcome = infer(prior, "--start_step", step, "--output", tmp_path / "video.mp4")
    assert outcome.report["latents_sha256"] == full_sha256(prior)
    assert outcome.report["dtype"] == dtype
    assert outcome.report["steps_run"] == list(range(step + 1, 10))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("step", [0, 6, 8])
def test_another_prompt_gives_another_video(make_prior, infer, tmp_path, step, dtype):
    prior = make_prior("--dtype", dtype)
    outcome = infer(prior, "--start_step", step, "--prompt", OTHER_PROMPT, "--output", tmp_path / "video.mp4")
    assert outcome.report["latents_sha256"] != full_sha256(prior)


def test_another_negative_prompt_or_guidance_gives_another_video(prior, infer, tmp_path):
    for flags in (("--negative_prompt", OTHER_PROMPT), ("--cfg_scale", 3)):
        outcome = infer(prior, *flags, "--output", tmp_path / f"{flags[0][2:]}.mp4")
        assert outcome.report["latents_sha256"] != full_sha256(prior)


def test_own_prompt_typed_again_is_the_own_prompt(prior, infer, tmp_path):
    outcome = infer(prior, "--prompt", PROMPT, "--output", tmp_path / "video.mp4")
    assert outcome.report["latents_sha256"] == full_sha256(prior)


@pytest.mark.parametrize(
    ("flags", "steps"),
    [
        (("--num_inference_steps", "1"), [0]),
        (("--num_inference_steps", "3"), [0, 1, 2]),
        (("--num_inference_steps", "25"), [0, 14, 23]),
        (("--cfg_scale", "1"), [0, 6]),
        (("--sigma_shift", "1"), [0, 6]),
        (("--sigma_shift", "12.5", "--seed", "7"), [3, 8]),
        (("--height", "48", "--width", "32", "--num_frames", "5"), [4]),
        (("--num_frames", "1"), [4]),
    ],
)
def test_other_schedules_and_sizes_are_exact(make_prior, infer, tmp_path, flags, steps):
    prior = make_prior(*flags)
    for step in steps:
        outcome = infer(prior, "--start_step", step, "--output", tmp_path / f"{step}.mp4")
        assert outcome.report["latents_sha256"] == full_sha256(prior)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("flags", [("--num_steps", 3), ("--steps", 0), ("--steps", *range(10))])
@pytest.mark.parametrize("num_frames", ["5", "1"])  # 1: a picture, whose moves are all from itself
def test_differential_resume_is_exact_too(make_prior, infer, tmp_path, flags, num_frames, dtype):
    prior = make_prior("--dtype", dtype, "--num_frames", num_frames)
    outcome = infer(prior, *flags, "--output", tmp_path / "video.mp4")
    assert outcome.report["latents_sha256"] == full_sha256(prior)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_prior_that_starts_from_a_video_is_exact(make_prior, infer, tmp_path, video, dtype):
    prior = make_prior("--denoising_strength", "0.6", "--input_video", str(video), "--dtype", dtype)
    assert read_json(prior / "run_metadata.json")["scheduler_sigmas"][0] == pytest.approx(3 / 3.4)
    for flags in (("--start_step", 0), ("--start_step", 6), ("--start_step", 9), ("--num_steps", 3)):
        outcome = infer(prior, *flags, "--output", tmp_path / f"{flags[-1]}.mp4")
        assert outcome.report["latents_sha256"] == full_sha256(prior)


def test_the_saved_steps_are_the_run(prior, make_prior, video):
    """Step by step: latents after = latents before + velocity x (next sigma - sigma), from the noise on."""
    sigmas = [*read_json(prior / "run_metadata.json")["scheduler_sigmas"], 0]
    latents = torch.load(prior / "initial_latents.pt", weights_only=True)
    for step in range(10):
        velocity = torch.load(prior / f"noise_pred_{step:04d}.pt", weights_only=True)
        latents = latents + velocity * (torch.tensor(sigmas[step + 1]) - torch.tensor(sigmas[step]))
        saved = torch.load(prior / f"step_{step:04d}.pt", weights_only=True)
        assert torch.allclose(latents, saved, atol=1e-5)
        latents = saved


@pytest.mark.parametrize(
    ("flags", "forwards", "components"),
    [
        (("--prompt", OTHER_PROMPT), 5, {"dit", "vae", "text_encoder"}),
        (("--prompt", OTHER_PROMPT, "--cfg_scale", 1), 3, {"dit", "vae", "text_encoder"}),
        ((), 5, {"dit", "vae"}),
        (("--cfg_scale", 1), 3, {"dit", "vae"}),
        (("--cfg_scale", 1, "--negative_prompt", OTHER_PROMPT), 3, {"dit", "vae"}),
    ],
)
def test_resuming_at_6_of_10_costs_three_steps(prior, infer, loads, tmp_path, flags, forwards, components):
    outcome = infer(prior, *flags, "--output", tmp_path / "video.mp4")
    assert outcome.report["start_step"] == 6
    assert outcome.report["steps_run"] == [7, 8, 9]
    assert outcome.report["forwards"] == forwards
    assert set(outcome.report["components_loaded"]) == components
    assert [set(call) for call in loads] == [components]
    assert "runs 3 of 10 steps, skips 7" in outcome.err
    assert "3/3" in outcome.err  # the progress bar counts the steps that run


@pytest.fixture
def calls(monkeypatch):
    """Calls of the encoders and of the network, by name."""
    from diffsynth.models.wan_video_dit import WanModel
    from diffsynth.models.wan_video_image_encoder import WanImageEncoder
    from diffsynth.models.wan_video_text_encoder import WanTextEncoder
    from diffsynth.models.wan_video_vae import WanVideoVAE

    counted = dict.fromkeys(("vae", "clip", "text", "dit"), 0)
    watched = {
        "vae": (WanVideoVAE, "encode"),
        "clip": (WanImageEncoder, "encode_image"),
        "text": (WanTextEncoder, "forward"),
        "dit": (WanModel, "unpatchify"),  # once per forward, whoever drives the blocks
    }

    def count(name, original):
        def wrapper(*args, **kwargs):
            counted[name] += 1
            return original(*args, **kwargs)

        return wrapper

    for name, (owner, method) in watched.items():
        monkeypatch.setattr(owner, method, count(name, getattr(owner, method)))
    return counted


def test_a_full_run_encodes_everything_once(generate, image, calls):
    outcome = generate("--image", image, "--num_inference_steps", 2)
    assert outcome.code == 0, outcome.err
    assert calls == {"vae": 1, "clip": 1, "text": 2, "dit": 4}


def test_a_resumed_run_encodes_only_the_new_prompt(prior, infer, calls, tmp_path):
    assert infer(prior, "--prompt", OTHER_PROMPT, "--output", tmp_path / "video.mp4").code == 0
    assert calls == {"vae": 0, "clip": 0, "text": 1, "dit": 5}


def test_the_last_step_only_decodes(prior, infer, calls, loads, tmp_path):
    outcome = infer(prior, "--start_step", 9, "--prompt", OTHER_PROMPT, "--output", tmp_path / "video.mp4")
    assert outcome.report["steps_run"] == []
    assert outcome.report["forwards"] == 0
    assert outcome.report["components_loaded"] == ["vae"]
    assert loads == [["vae"]]
    assert calls == {"vae": 0, "clip": 0, "text": 0, "dit": 0}
    assert "decodes only" in outcome.err


def test_nothing_of_the_image_is_read_when_resuming(prior_copy, infer, tmp_path):
    (prior_copy / "input_image.png").unlink()
    assert infer(prior_copy, "--output", tmp_path / "video.mp4").code == 0
