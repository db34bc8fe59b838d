"""How a prior took shape: by hand, against the network itself, and in a prior that is made and read."""

from __future__ import annotations

import json
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import FRAMES, OTHER_PROMPT, PROMPT, SIZE, edit_metadata, metadata_with, read_json

from step_skip.errors import InputError
from step_skip.generate import formation, run
from step_skip.generate.formation import record_branch_distance
from step_skip.infer.steps import choose_start_step
from step_skip.method.formation import (
    DEFAULT_TEXT_SHARE,
    moving_part,
    part_distances,
    still_part,
    text_left,
    text_moves,
)
from step_skip.models.loading import load_pipeline
from step_skip.models.weights import LoadOptions, weight_files
from step_skip.pipeline.hooks import ForwardCounter
from step_skip.pipeline.run import run_full
from step_skip.pipeline.settings import RunSettings
from step_skip.prior.prior import Prior, context_file

SIGMAS = (1.0, 0.75, 0.25)


@pytest.fixture(scope="module")
def load(model_dir):
    """The small model's pipeline, in a dtype."""

    def load(dtype):
        options = LoadOptions("tiny", "cpu", dtype, model_dir=model_dir)
        return load_pipeline(options, weight_files(options))

    return load


# --- by hand ------------------------------------------------------------------------------------------------


def test_text_moves_and_what_is_left_of_them():
    moves = text_moves([8.0, 4.0, 2.0], sigmas=SIGMAS, cfg_scale=5.0)
    assert moves == [10.0, 10.0, 2.5]  # 5 x (0.25 x 8, 0.5 x 4, 0.25 x 2)
    assert text_left(moves) == pytest.approx([12.5 / 22.5, 2.5 / 22.5, 0.0])
    assert text_left([3.0]) == [0.0]


def test_still_and_moving_part():
    latents = torch.tensor([1.0, 2.0, 6.0]).reshape(1, 1, 3, 1, 1)
    assert still_part(latents).flatten().tolist() == [3.0]
    assert moving_part(latents).flatten().tolist() == [-2.0, -1.0, 3.0]


def test_relative_distances_are_one_at_nothing_and_zero_at_the_end():
    clean = torch.tensor([1.0, 2.0, 6.0]).reshape(1, 1, 3, 1, 1)
    estimates = [0 * clean, clean.mean() + 0 * clean, 0.5 * clean, clean]
    record = part_distances(estimates, clean)
    assert record["still_distances"] == pytest.approx([1, 0, 0.5, 0])
    assert record["moving_distances"] == pytest.approx([1, 1, 0.5, 0])


def test_a_single_latent_frame_has_no_moving_part():
    assert part_distances([torch.ones(1, 16, 1, 2, 2)], torch.ones(1, 16, 1, 2, 2)) == {
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
    assert counter.branch_distance == 128.0
    assert counter.forwards == 2
    counter(positive=True)
    assert counter.branch_distance is None  # a step's own, never the last one's


def test_a_step_that_runs_again_replaces_what_was_recorded_from_there():
    metadata = metadata_with(sigmas=[1.0, 0.5])
    for index, distance in ((0, 1.0), (1, 2.0), (2, 3.0), (1, 4.0)):
        record_branch_distance(metadata, types.SimpleNamespace(index=index, branch_distance=distance))
    assert metadata.recorded()["formation"] == {"branch_distances": [1.0, 4.0]}


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
    def fail(*_, **__):
        raise ImportError("No module named 'matplotlib'")

    monkeypatch.setattr(formation, "draw_formation", fail)
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
    seen, save_step = [], run.save_step

    def spy(writer, step):
        save_step(writer, step)
        seen.append(read_json(writer.directory / "run_metadata.json")["formation"]["branch_distances"])

    monkeypatch.setattr(run, "save_step", spy)
    prior = generate("--image", image, "--num_inference_steps", 3, "--prompt", PROMPT).path
    record = read_json(prior / "run_metadata.json")["formation"]["branch_distances"]
    assert seen == [record[:1], record[:2], record]


# --- the step it stands for ---------------------------------------------------------------------------------


def prior_with(moves, *, sigmas=SIGMAS, cfg_scale=5.0) -> Prior:
    formation = {"text_moves": moves}
    metadata = metadata_with(sigmas=sigmas, cfg_scale=cfg_scale, formation=formation)
    return Prior(Path("prior"), metadata)


@pytest.mark.parametrize(("share", "step"), [(0.01, 2), (0.3, 2), (0.31, 1), (0.6, 1), (0.61, 0), (0.9, 0)])
def test_the_latest_step_that_leaves_enough(share, step):
    prior = prior_with([1.0, 3.0, 3.0, 3.0], sigmas=(1.0, 0.75, 0.5, 0.25))  # leaves 0.9, 0.6, 0.3 and 0
    chosen = choose_start_step(prior, share)
    assert (chosen.step, chosen.text_share, chosen.measured) == (step, share, True)
    assert chosen.text_left == pytest.approx([0.9, 0.6, 0.3][step])


def test_two_prompts_alike_leave_what_the_schedule_does():
    """Distances like the sigmas: moves of 1 x 0.25, 0.75 x 0.5 and 0.25 x 0.25."""
    chosen = choose_start_step(prior_with([0.0, 0.0, 0.0]), 0.6)
    assert (chosen.step, chosen.measured) == (0, False)
    assert chosen.text_left == pytest.approx(0.4375 / 0.6875)
    expected = "step 0, about 0.64 of the text influence remains, estimated from the schedule"
    assert str(chosen) == f"{expected}: the prior's two prompts are alike"


@pytest.mark.parametrize(
    ("moves", "words"),
    [
        (None, "lacks the 3 text_moves"),
        ([1.0, 2.0], "lacks the 3 text_moves"),
        ([8.0, 1.0, 1.0], "--text_share 0.3: 0.20 of the text's say is left after step 0"),
    ],
)
def test_what_no_step_can_be_chosen_from(moves, words):
    with pytest.raises(InputError, match=words.replace("'", ".")):
        choose_start_step(prior_with(moves), 0.3)


def test_auto_resumes_there_and_says_so(prior, infer, tmp_path):
    left = text_left(read_json(prior / "run_metadata.json")["formation"]["text_moves"])
    step = max(step for step in range(10) if left[step] >= 0.4)
    flags = ("--start_step", "auto", "--text_share", 0.4)
    auto = infer(prior, *flags, "--prompt", OTHER_PROMPT, "--output", tmp_path / "auto.mp4")
    assert f"auto: step {step}, {left[step]:.2f} of the text influence remains\n" in auto.err
    assert auto.report["start_step"] == step
    assert auto.report["steps_run"] == list(range(step + 1, 10))
    assert auto.report["auto"] == {"step": step, "text_left": left[step], "text_share": 0.4, "measured": True}
    named = infer(prior, "--start_step", step, "--prompt", OTHER_PROMPT, "--output", tmp_path / "named.mp4")
    assert named.report["latents_sha256"] == auto.report["latents_sha256"]
    assert named.report["auto"] is None
    assert "auto: " not in named.err


def test_auto_with_the_priors_own_prompt_is_exact(prior, infer, tmp_path):
    outcome = infer(prior, "--start_step", "auto", "--output", tmp_path / "video.mp4")
    assert outcome.report["latents_sha256"] == read_json(prior / "run_metadata.json")["latents_sha256"]
    assert outcome.report["auto"]["text_share"] == DEFAULT_TEXT_SHARE


def test_auto_in_a_sweep_is_each_priors_own_and_one_of_the_named_steps(
    prior_copy, make_prior, infer, tmp_path
):
    """A named step that auto would choose, too, is made once."""
    neutral = make_prior("--prompt", "", "--negative_prompt", "")
    flags = ("--prior_dir", neutral, "--start_step", "auto", "2-8", "--text_share", 0.5, "--dry_run")
    edit_metadata(prior_copy, formation={"text_moves": [1.0] * 10})  # 0.5 is left after step 4
    outcome = infer(prior_copy, *flags)
    lines = [json.loads(line) for line in outcome.out.splitlines()]
    assert sorted(line["start_step"] for line in lines) == sorted([*range(2, 9)] * 2)
    assert lines[0]["start_step"] == 4
    assert f"{prior_copy}: auto: step 4, 0.50 of the text influence remains\n" in outcome.err
    assert f"{neutral}: auto: step 6, about 0.5" in outcome.err
    assert "two prompts are alike" in outcome.err


def test_auto_in_a_prompts_file(prior, infer, tmp_path):
    (tmp_path / "prompts.txt").write_text('{"prompt": "She nods.", "start_step": "auto"}\n')
    flags = ("--prompts_file", tmp_path / "prompts.txt", "--text_share", 0.9, "--dry_run")
    outcome = infer(prior, *flags)
    left = text_left(read_json(prior / "run_metadata.json")["formation"]["text_moves"])
    step = max(step for step in range(10) if left[step] >= 0.9)
    assert f"auto: step {step}, {left[step]:.2f} of" in outcome.err
    assert json.loads(outcome.out)["start_step"] == step


def test_auto_refuses_a_prior_that_says_nothing(prior_copy, older_prior, infer, refused, image):
    flags = ("--start_step", "auto", "--prompt", PROMPT)
    edit_metadata(prior_copy, formation=...)
    words = ("records no formation, it is older", "name a step instead of auto, or make the prior again")
    refused(lambda: infer(prior_copy, *flags), *words)
    refused(lambda: infer(older_prior, *flags, "--model", "tiny", "--image", image), *words)
    for record in ({}, {"text_moves": None}, {"text_moves": [1]}):
        edit_metadata(prior_copy, formation=record)
        refused(lambda: infer(prior_copy, *flags), "lacks the 10 text_moves of its formation")
    for record in ([], "x", None):
        edit_metadata(prior_copy, formation=record)
        refused(lambda: infer(prior_copy, *flags), f"formation = {record!r}, expected a JSON object")
    for move in (float("nan"), -2.0, "2", 10**400):
        edit_metadata(prior_copy, formation={"text_moves": [1.0] * 9 + [move]})
        refused(lambda: infer(prior_copy, *flags), "formation['text_moves'][9] = ", "a number from 0 on")


def test_auto_refuses_a_prior_without_guidance(make_prior, infer, refused, loads):
    prior = make_prior("--cfg_scale", "1")
    loads.clear()  # making it loads, if it is the first here
    refused(lambda: infer(prior, "--start_step", "auto"), "--cfg_scale 1", "name a step instead of auto")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--start_step", "auto", "--text_share", 1), "--text_share 1: 0.9"),
        (("--start_step", "auto", "--text_share", 0), "argument --text_share: 0 is not a number above 0"),
        (("--start_step", "auto", "--text_share", 1.5), "argument --text_share: 1.5 is above 1"),
        (("--start_step", "auto", "--text_share", "half"), "argument --text_share"),
        (("--start_step", 3, "--text_share", 0.5), "give that, too"),
        (("--num_steps", 3, "--text_share", 0.5), "give that, too"),
        (("--start_step", "auto", "--steps", 0, 5), "not allowed with argument"),
        (("--start_step", "Auto"), "argument --start_step"),
    ],
)
def test_flags_that_auto_does_not_take(prior, infer, refused, flags, words):
    refused(lambda: infer(prior, *flags), words)
