"""A clip made again: found by the same command, made by its own, or with some flags changed."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest
from helpers import OTHER_PROMPT, PROMPT, read_json

from step_skip.infer.report import read_comment

ODD_PROMPT = '--like "this"; she = speaks \\ #é\nlouder'


# --- the same command again ---------------------------------------------------------------------------------


@pytest.mark.parametrize("place", [(), ("--output", "clip.mp4")])
def test_the_same_command_finds_its_clip(prior_copy, infer, loads, tmp_path, monkeypatch, place):
    monkeypatch.chdir(tmp_path)
    flags = ("--prompt", OTHER_PROMPT, "--num_steps", 1, *place)
    first = infer(prior_copy, *flags)
    loaded = len(loads)
    again = infer(prior_copy, *flags)
    assert again.path == first.path
    assert "exists with the same choices" in again.err
    assert len(loads) == loaded


def test_what_is_damaged_or_another_is_no_clip_of_this_command(prior_copy, infer):
    flags = ("--prompt", OTHER_PROMPT, "--num_steps", 1)
    first = infer(prior_copy, *flags).path
    first.write_bytes(first.read_bytes() + b"x")
    second = infer(prior_copy, *flags)
    assert second.path.name == f"{first.stem}_2.mp4"
    third = infer(prior_copy, *flags)
    assert third.path == second.path and "exists with the same choices" in third.err
    assert infer(prior_copy, "--prompt", OTHER_PROMPT, "--num_steps", 2).path not in (first, second.path)


def test_another_clip_is_still_not_replaced(prior_copy, infer, tmp_path):
    path = tmp_path / "clip.mp4"
    infer(prior_copy, "--prompt", OTHER_PROMPT, "--num_steps", 1, "--output", path)
    outcome = infer(prior_copy, "--prompt", OTHER_PROMPT, "--num_steps", 2, "--output", path)
    assert outcome.code == 2 and "clip.mp4 exists" in outcome.error
    again = infer(prior_copy, "--prompt", OTHER_PROMPT, "--num_steps", 1, "--output", path, "--overwrite")
    assert again.code == 0 and "exists with the same choices" not in again.err


# --- what is written ----------------------------------------------------------------------------------------


@pytest.fixture
def clip(prior_copy, infer, tmp_path):
    """A clip with something of its own in every flag that is taken over."""
    flags = ("--steps", 0, 4, "--cfg_scale", 3, 1, "--negative_prompt", "wobbly", "--fps", 4)
    return infer(prior_copy, "--prompt", ODD_PROMPT, *flags, "--output", tmp_path / "clip.mp4")


def test_the_command_in_the_json_makes_the_clip(clip, run, prior_copy, tmp_path):
    words = shlex.split(clip.report["command"])
    assert words[:4] == ["python", "infer_from_prior.py", "--prior_dir", str(prior_copy)]
    again = run("infer_from_prior", *words[2:], "--output", tmp_path / "again.mp4")
    assert again.report["latents_sha256"] == clip.report["latents_sha256"]
    assert again.path.read_bytes() == clip.path.read_bytes()
    for name in ("prompt", "negative_prompt", "cfg_scale", "steps_run", "fps", "command"):
        assert again.report[name] == clip.report[name]


def test_the_json_names_the_priors_prompt_and_image(clip):
    assert clip.report["prior_prompt"] == PROMPT
    assert clip.report["prior_image"] == "identity.png"


def test_the_video_says_how_it_was_made(clip):
    comment = json.loads(read_comment(clip.path))
    report = clip.report
    assert comment["prompt"] == ODD_PROMPT
    for name in ("seed", "negative_prompt", "cfg_scale", "steps_run", "height", "prior_run_id"):
        assert comment[name] == report[name]
    prior = Path(report["prior_dir"])
    command = report["command"].replace(str(prior), prior.name)
    assert comment["command"] == command.replace(f" --model_dir {report['model_dir']}", "")
    assert report["model_dir"] not in read_comment(clip.path)
    assert "seconds" not in comment and "device_name" not in comment


def test_a_prompt_beyond_what_a_video_takes_is_left_to_the_json(prior_copy, infer, tmp_path):
    (tmp_path / "prompts.txt").write_text("x" * 200_000)
    flags = ("--prompts_file", tmp_path / "prompts.txt", "--num_steps", 1, "--output_dir", tmp_path / "out")
    assert infer(prior_copy, *flags).code == 0
    [video] = (tmp_path / "out").glob("*.mp4")
    assert read_comment(video) == ""


# --- --like -------------------------------------------------------------------------------------------------


def like(run, path, *flags):
    """infer_from_prior.py --like, with nothing else of the clip."""
    return run("infer_from_prior", "--like", path, *flags)


@pytest.mark.parametrize("suffix", [".json", ".mp4"])
def test_like_makes_the_clip_again(clip, run, tmp_path, suffix):
    again = like(run, clip.path.with_suffix(suffix), "--output", tmp_path / "again.mp4")
    assert again.report["latents_sha256"] == clip.report["latents_sha256"]
    assert again.path.read_bytes() == clip.path.read_bytes()


def test_like_a_video_that_lost_its_json(clip, run, prior_copy, model_dir, tmp_path):
    alone = clip.path.rename(tmp_path / "alone.mp4")
    outcome = like(run, alone)
    assert outcome.code == 2 and "name it with --prior_dir" in outcome.error
    flags = ("--prior_dir", prior_copy, "--model_dir", model_dir, "--output", tmp_path / "again.mp4")
    again = like(run, alone, *flags)
    assert again.report["latents_sha256"] == read_json(tmp_path / "clip.json")["latents_sha256"]


def test_like_with_some_flags_changed(clip, run, tmp_path):
    path = clip.path.with_suffix(".json")
    other = like(run, path, "--prompt", OTHER_PROMPT, "--output", tmp_path / "other.mp4").report
    assert (other["prompt"], other["steps_run"], other["cfg_scale"]) == (OTHER_PROMPT, [0, 4], [3.0, 1.0])
    flags = ("--num_steps", 1, "--cfg_scale", 2, "--output", tmp_path / "fewer.mp4")
    fewer = like(run, path, *flags).report
    assert (fewer["prompt"], fewer["steps_run"], fewer["cfg_scale"]) == (ODD_PROMPT, [0], 2.0)
    assert (fewer["negative_prompt"], fewer["fps"]) == ("wobbly", 4)


@pytest.mark.parametrize(
    "flags",
    [
        ("--start_step", 7, "--vae_tiling", "off"),
        ("--sigmas", 0.9, 0.5),
        ("--start_step", "auto"),
        ("--num_steps", "auto"),
    ],
)
def test_like_a_clip_of_each_method(prior_copy, infer, run, tmp_path, flags):
    clip = infer(prior_copy, "--prompt", OTHER_PROMPT, *flags, "--output", tmp_path / "clip.mp4")
    again = like(run, clip.path, "--output", tmp_path / "again.mp4")
    assert again.report["latents_sha256"] == clip.report["latents_sha256"]
    assert again.report["tiled"] == clip.report["tiled"]


def test_like_a_clip_of_an_older_version_and_format(older_prior, infer, run, image, tmp_path):
    flags = ("--model", "tiny", "--image", image, "--prompt", OTHER_PROMPT, "--output", tmp_path / "clip.mp4")
    clip = infer(older_prior, *flags)
    report = {name: value for name, value in clip.report.items() if name != "command"}
    clip.path.with_suffix(".json").write_text(json.dumps(report))
    again = like(run, clip.path, "--output", tmp_path / "again.mp4")
    assert again.report["latents_sha256"] == report["latents_sha256"]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "clip.json is missing"),
        ("no JSON", "cannot be read"),
        ("[]", "is not a clip's JSON"),
        ("{}", "it lacks 'prompt'"),
        ('{"prior_dir": "HERE"}', "it lacks 'prompt'"),
        (
            '{"prior_dir": "HERE", "model": "tiny", "prompt": 3, "method": "resume", "start_step": 7, '
            '"steps_run": [8, 9], "lora": []}',
            "prompt = 3, expected",
        ),
        (
            '{"prior_dir": "HERE", "model": "tiny", "prompt": "", "method": "resume", "start_step": "x", '
            '"steps_run": [8, 9], "lora": []}',
            "start_step = 'x', expected",
        ),
    ],
)
def test_what_is_no_clip(prior_copy, run, refused, tmp_path, content, words):
    path = tmp_path / "clip.json"
    if content is not None:
        path.write_text(content.replace("HERE", str(prior_copy)))
    refused(lambda: like(run, path), "--like", words)


def test_neither_a_prior_nor_a_clip(run, refused):
    refused(lambda: run("infer_from_prior", "--prompt", "she speaks"), "--prior_dir, or --like")
