"""How a prior took shape: by hand, against the network itself, and in a prior that is made and read."""

from __future__ import annotations

import types

import numpy as np
import pytest
import torch
from helpers import FRAMES, OTHER_PROMPT, PROMPT, SIZE, read_json

import formation
import prior_run
import wan_models
from prior_utils import RunSettings, context_file
from wan_pipeline import ForwardCounter, run_full

SIGMAS = (1.0, 0.75, 0.25)


@pytest.fixture(scope="module")
def load(model_dir):
    """The small model's pipeline, in a dtype."""

    def load(dtype):
        options = wan_models.LoadOptions("tiny", "cpu", dtype, model_dir=model_dir)
        return wan_models.load_pipeline(options, wan_models.weight_files(options))

    return load


# --- by hand ------------------------------------------------------------------------------------------------


def test_text_moves_and_what_is_left_of_them():
    moves = formation.text_moves([8.0, 4.0, 2.0], sigmas=SIGMAS, cfg_scale=5.0)
    assert moves == [10.0, 10.0, 2.5]  # 5 x (0.25 x 8, 0.5 x 4, 0.25 x 2)
    assert formation.text_left(moves) == pytest.approx([12.5 / 22.5, 2.5 / 22.5, 0.0])
    assert formation.text_left([3.0]) == [0.0]


def test_still_and_moving_part():
    latents = torch.tensor([1.0, 2.0, 6.0]).reshape(1, 1, 3, 1, 1)
    assert formation.still(latents).flatten().tolist() == [3.0]
    assert formation.moving(latents).flatten().tolist() == [-2.0, -1.0, 3.0]


def test_relative_distances_are_one_at_nothing_and_zero_at_the_end():
    clean = torch.tensor([1.0, 2.0, 6.0]).reshape(1, 1, 3, 1, 1)
    estimates = [0 * clean, clean.mean() + 0 * clean, 0.5 * clean, clean]
    record = formation.distances(estimates, clean)
    assert record["still_distances"] == pytest.approx([1, 0, 0.5, 0])
    assert record["moving_distances"] == pytest.approx([1, 1, 0.5, 0])


def test_a_single_latent_frame_has_no_moving_part():
    assert formation.distances([torch.ones(1, 16, 1, 2, 2)], torch.ones(1, 16, 1, 2, 2)) == {
        "still_distances": [0.0],
        "moving_distances": None,
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_branches_are_compared_in_float32_and_handed_on_as_they_are(dtype):
    """Two bfloat16 numbers near 256 differ by 2; 4096 such differences have a norm of 128, exactly."""
    outputs = {True: torch.full((4096,), 258.0, dtype=dtype), False: torch.full((4096,), 256.0, dtype=dtype)}
    counter = ForwardCounter(lambda positive: outputs[positive])
    assert counter(positive=True) is outputs[True]
    assert counter.branch_distance is None
    assert counter(positive=False) is outputs[False]
    assert float(counter.branch_distance) == 128.0
    assert counter.forwards == 2
    counter(positive=True)
    assert counter.branch_distance is None  # a step's own, never the last one's


def test_a_step_that_runs_again_replaces_what_was_recorded_from_there():
    metadata = {}
    for index, distance in ((0, 1.0), (1, 2.0), (2, 3.0), (1, 4.0)):
        formation.record_step(metadata, types.SimpleNamespace(index=index, branch_distance=distance))
    assert metadata == {"formation": {"branch_distances": [1.0, 4.0]}}


# --- in a prior ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-4), ("bfloat16", 0.02)])
def test_what_is_recorded_is_what_the_network_says(make_prior, load, dtype, tolerance):
    """Both branches asked again at the saved latents, by the network alone."""
    prior = make_prior("--dtype", dtype)
    metadata, pipe = read_json(prior / "run_metadata.json"), load(dtype)
    saved = {path.name: torch.load(path, weights_only=True) for path in prior.glob("*.pt")}
    sigmas = [*metadata["scheduler_sigmas"], 0.0]
    for step in (0, 4, 9):
        inputs = {
            "dit": pipe.dit,
            "latents": saved[f"step_{step - 1:04d}.pt" if step else "initial_latents.pt"],
            "timestep": torch.tensor([metadata["scheduler_timesteps"][step]], dtype=pipe.torch_dtype),
            "y": saved["y.pt"],
            "clip_feature": saved["clip_feature.pt"],
        }
        with torch.no_grad():
            posi, nega = (
                pipe.model_fn(**inputs, context=saved[context_file(text)]).double()
                for text in (PROMPT, "Still.")
            )
        distance = (posi - nega).square().sum().sqrt().item()
        record = metadata["formation"]
        assert record["branch_distances"][step] == pytest.approx(distance, rel=tolerance)
        moved = 5.0 * (sigmas[step] - sigmas[step + 1]) * distance
        assert record["text_moves"][step] == pytest.approx(moved, rel=tolerance)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_recording_changes_no_bit(load, image, dtype):
    """The same frames as the pipeline gives with nothing of ours in it."""
    from PIL import Image

    settings = RunSettings(
        num_inference_steps=3,
        denoising_strength=1.0,
        sigma_shift=5.0,
        cfg_scale=5.0,
        height=SIZE,
        width=SIZE,
        num_frames=FRAMES,
        seed=0,
    )
    inputs = {"prompt": PROMPT, "negative_prompt": "Still.", "input_image": Image.open(image)}
    pipe, seen = load(dtype), []
    frames = run_full(pipe, settings, **inputs, on_step=seen.append).frames
    assert all(step.branch_distance > 0 for step in seen)
    bare = pipe(**inputs, **settings.pipeline_inputs, tile_size=(30, 52), tile_stride=(15, 26))
    assert len(frames) == len(bare) == FRAMES
    assert all(np.array_equal(a, b) for a, b in zip(frames, bare, strict=True))


def test_a_prior_holds_one_number_a_step_and_ends_at_itself(prior):
    record = read_json(prior / "run_metadata.json")["formation"]
    assert set(record) == {"branch_distances", "text_moves", "still_distances", "moving_distances"}
    assert all(len(numbers) == 10 and min(numbers) >= 0 for numbers in record.values())
    assert record["still_distances"][-1] < 1e-5 < record["still_distances"][0]
    assert record["moving_distances"][-1] < 1e-5 < record["moving_distances"][0]


def test_without_guidance_the_text_has_no_record(make_prior):
    prior = make_prior("--cfg_scale", "1")
    record = read_json(prior / "run_metadata.json")["formation"]
    assert record["branch_distances"] is record["text_moves"] is None
    assert len(record["moving_distances"]) == 10
    assert (prior / "formation.png").exists()


@pytest.mark.parametrize(
    "flags", [(), ("--cfg_scale", "1"), ("--num_frames", "1"), ("--num_inference_steps", "1")]
)
def test_the_picture_is_one(make_prior, flags):
    from PIL import Image

    prior = make_prior(*flags)
    with Image.open(prior / "formation.png") as picture:
        assert picture.format == "PNG"
        assert len(picture.convert("RGB").getcolors(2**24)) > 10  # not an empty page
    assert "formation.png" in read_json(prior / "run_metadata.json")["files"]


def test_a_picture_that_fails_costs_no_prior(generate, infer, image, monkeypatch, tmp_path):
    def fail(*_):
        raise ImportError("No module named 'matplotlib'")

    monkeypatch.setattr(formation, "plot", fail)
    outcome = generate("--image", image, "--num_inference_steps", 2, "--prompt", PROMPT)
    prior = outcome.path
    assert "warning: no formation.png (ImportError: No module named 'matplotlib')" in outcome.err
    metadata = read_json(prior / "run_metadata.json")
    assert metadata["status"] == "complete"
    assert "formation.png" not in metadata["files"]
    assert not (prior / "formation.png").exists()
    assert len(metadata["formation"]["text_moves"]) == 2
    flags = ("--start_step", 0, "--prompt", OTHER_PROMPT, "--output", tmp_path / "video.mp4")
    assert infer(prior, *flags).code == 0


def test_the_record_grows_with_the_steps(generate, image, monkeypatch):
    """So that a run that is killed and goes on has the numbers of all its steps."""
    seen, save_step = [], prior_run.save_step

    def spy(writer, step):
        save_step(writer, step)
        seen.append(read_json(writer.directory / "run_metadata.json")["formation"]["branch_distances"])

    monkeypatch.setattr(prior_run, "save_step", spy)
    prior = generate("--image", image, "--num_inference_steps", 3, "--prompt", PROMPT).path
    record = read_json(prior / "run_metadata.json")["formation"]["branch_distances"]
    assert seen == [record[:1], record[:2], record]
