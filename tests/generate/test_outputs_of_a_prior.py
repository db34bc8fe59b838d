"""What a prior's run shows: sizes that were rounded, and videos of its steps."""

from __future__ import annotations

import shutil
from types import SimpleNamespace

import pytest
from helpers import read_json, video_frames


def test_rounded_sizes_are_recorded(generate, image):
    flags = ("--height", 20, "--width", 33, "--num_frames", 4, "--num_inference_steps", 1)
    outcome = generate("--image", image, *flags)
    metadata = read_json(outcome.path / "run_metadata.json")
    assert (metadata["height"], metadata["width"], metadata["num_frames"]) == (32, 48, 5)
    assert outcome.err.count("48 x 32 pixels, 5 frames") == 1
    assert "cropped to its centre, 32 x 21" in outcome.err
    assert len(video_frames(outcome.path / "output_full.mp4")) == 5


def test_decoded_videos_are_of_the_denoised_estimates(make_prior, prior):
    """One per step; of the last step the estimate is the result itself."""
    import numpy as np

    decoded = make_prior("--save_decoded_videos")
    assert sorted(path.name for path in decoded.glob("denoised_*.mp4")) == [
        f"denoised_{step:04d}.mp4" for step in range(10)
    ]
    last, full = (video_frames(decoded / name) for name in ("denoised_0009.mp4", "output_full.mp4"))
    assert np.abs(np.subtract(last, full, dtype=float)).max() <= 3
    metadata = [read_json(folder / "run_metadata.json") for folder in (decoded, prior)]
    assert metadata[0]["latents_sha256"] == metadata[1]["latents_sha256"]
    assert metadata[0]["seconds"]["decode_estimates"] > 0


def test_every_decoded_video_counts(generate, refused, image, monkeypatch):
    """--save_decoded_videos writes ten more."""
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    flags = ("--image", image, "--height", 1024, "--width", 1024)
    one = refused(lambda: generate(*flags), "expected at least")
    eleven = refused(lambda: generate(*flags, "--save_decoded_videos"), "expected at least")
    needed = [int(error.split("expected at least ")[1].split(" MiB")[0]) for error in (one, eleven)]
    video = 9 * 1024 * 1024 * 3 / 4 / 2**20
    assert needed[1] - needed[0] == pytest.approx(10 * video, abs=1)
