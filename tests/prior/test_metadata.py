"""Metadata that is none, that says something impossible, or that is not what was written is refused."""

from __future__ import annotations

import json

import pytest
from helpers import PROMPT, edit_metadata, read_json

# --- no metadata --------------------------------------------------------------------------------------------


NOT_UTF8 = "\udcff\udcfe"  # how Python hands over the bytes ff fe from a shell


def test_no_prior_there(infer, refused, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("text")
    refused(lambda: infer(tmp_path / "nowhere"), "is not a folder", "generate_prior.py")
    refused(lambda: infer(tmp_path / "file"), "is not a folder", "generate_prior.py")
    refused(lambda: infer(tmp_path / "empty"), "holds no run_metadata.json", "generate_prior.py")
    refused(lambda: infer(tmp_path / ("a" * 300)), "too long")
    refused(lambda: infer(tmp_path / NOT_UTF8), "--prior_dir", "not valid UTF-8")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "not valid JSON"),
        (b'{"run_id": "x", ', "not valid JSON"),
        (b"[1, 2]", "holds a list, expected a JSON object"),
        (b"null", "holds a NoneType, expected a JSON object"),
        (b"{}", "lacks 'run_id'"),
        (b'{"run_id": "\xff\xfe"}', "not UTF-8"),
        (b"[" * 100_000, "not valid JSON"),
        (b'{"seed": ' + b"9" * 5000 + b"}", "not valid JSON"),
    ],
)
def test_metadata_that_is_no_metadata(prior_copy, infer, refused, content, words):
    (prior_copy / "run_metadata.json").write_bytes(content)
    refused(lambda: infer(prior_copy), "run_metadata.json", words)


def test_metadata_far_too_large(prior_copy, infer, refused):
    with (prior_copy / "run_metadata.json").open("r+b") as file:
        file.truncate(2**25)  # a hole: costs no disk
    refused(lambda: infer(prior_copy), "run_metadata.json", "too large")


# --- entries ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"status": "running"}, ["unfinished", "10 of 10 steps", "interrupted"]),
        ({"status": "whole"}, ["status = 'whole'", "complete"]),
        ({"format_version": 2}, ["format_version 2", "expected 1"]),
        ({"format_version": None}, ["format_version None", "expected 1"]),
        ({"status": ...}, ["lacks 'status'"]),
        ({"scheduler_sigmas": ...}, ["lacks 'scheduler_sigmas'"]),
        ({"prompt": ...}, ["lacks 'prompt'"]),
        ({"num_inference_steps": "10"}, ["num_inference_steps = '10'", "int"]),
        ({"num_inference_steps": True}, ["num_inference_steps = True", "int"]),
        ({"num_inference_steps": 10.0}, ["num_inference_steps = 10.0", "int"]),
        ({"num_inference_steps": 0}, ["num_inference_steps = 0", "1 to 10000"]),
        ({"num_inference_steps": -3}, ["num_inference_steps = -3", "1 to 10000"]),
        ({"num_inference_steps": 11}, ["scheduler_timesteps", "expected 11"]),
        ({"num_inference_steps": 10**12}, ["num_inference_steps", "1 to 10000"]),
        ({"scheduler_sigmas": [1.0] * 9 + [float("nan")]}, ["9 finite numbers", "expected 10"]),
        ({"scheduler_sigmas": [1.0] * 9 + ["0.5"]}, ["9 finite numbers", "expected 10"]),
        ({"scheduler_sigmas": [1.0] * 9 + [10**400]}, ["9 finite numbers", "expected 10"]),
        ({"scheduler_timesteps": {}}, ["scheduler_timesteps", "list"]),
        ({"denoising_strength": float("nan")}, ["denoising_strength = nan", "above 0"]),
        ({"denoising_strength": 2.0}, ["denoising_strength = 2.0", "at most 1"]),
        ({"sigma_shift": "5"}, ["sigma_shift = '5'", "a number"]),
        ({"sigma_shift": 10**400}, ["sigma_shift", "above 0"]),
        ({"cfg_scale": float("inf")}, ["cfg_scale = inf", "above 0"]),
        ({"cfg_scale": None}, ["cfg_scale = None", "a number"]),
        ({"height": -32}, ["height = -32", "1 to 16384"]),
        ({"width": 10**9}, ["width = 1000000000", "1 to 16384"]),
        ({"width": 64}, ["step_0006.pt", "has shape [1, 16, 3, 4, 4]", "expected [1, 16, 3, 4, 8]"]),
        ({"num_frames": 10**6}, ["num_frames", "1 to 4097"]),
        ({"fps": 0}, ["fps = 0", "above 0"]),
        ({"fps": 1e12}, ["fps", "0.1 to 1000"]),
        ({"seed": -1}, ["seed = -1", "0 to"]),
        ({"seed": 2**70}, ["seed", "0 to"]),
        ({"seed": None}, ["seed = None", "int"]),
        ({"tiled": 1}, ["tiled = 1", "bool"]),
        ({"prompt": ["a", "b"]}, ["prompt = ['a', 'b']", "str"]),
        ({"prompt": "\ud800"}, ["prompt", "UTF-8"]),
        ({"negative_prompt": None}, ["negative_prompt = None", "str"]),
        ({"dtype": "int8"}, ["dtype = 'int8'", "bfloat16"]),
        ({"dtype": "bfloat16"}, ["step_0006.pt", "dtype float32", "expected bfloat16"]),
        ({"model": "I2V-14B"}, ["'I2V-14B'", "doesn't know"]),
        ({"family": 7}, ["family = 7", "string"]),
        ({"family": "TI2V"}, ["first_frame_latents.pt", "is missing"]),
        ({"start_step": 10}, ["start_step = 10"]),
        ({"start_step": -1}, ["start_step = -1"]),
        ({"files": []}, ["files = []", "dict"]),
        ({"files": {}}, ["lists no step_0000.pt", "incomplete"]),
        ({"files": {"../step_0000.pt": "0" * 64}}, ["'../step_0000.pt'", "not inside the prior"]),
        ({"files": {"/etc/passwd": "0" * 64}}, ["'/etc/passwd'", "not inside the prior"]),
        ({"files": {"..": "0" * 64}}, ["'..'", "not inside the prior"]),
        ({"files": {"step_0000.pt": 7}}, ["7 as the SHA-256 of step_0000.pt"]),
        ({"files": {"step_0000.pt": "zz"}}, ["'zz' as the SHA-256 of step_0000.pt"]),
        ({"shapes": ...}, ["lacks 'shapes'"]),
        ({"shapes": {}}, ["None as the shape of", ".pt"]),
        ({"shapes": {"initial_latents.pt": [1, -16, 3]}}, ["[1, -16, 3] as the shape of initial_latents.pt"]),
        ({"shapes": {"initial_latents.pt": [True]}}, ["[True] as the shape of initial_latents.pt"]),
        ({"model_fingerprint": "x"}, ["model_fingerprint = 'x'", "dict"]),
        ({"run_id": "../../victim"}, ["run_id = '../../victim'", "letters, digits"]),
        ({"run_id": "a\0b"}, ["run_id = 'a\\x00b'", "letters, digits"]),
        ({"run_id": ".."}, ["run_id = '..'", "letters, digits"]),
        ({"model_fingerprint": {"dit": 7}}, ["model_fingerprint['dit'] = 7", "string"]),
        ({"parameter_fingerprint": "x"}, ["parameter_fingerprint = 'x'", "dict"]),
        ({"run_id": "x" * 1001}, ["run_id = 'xxx", "expected 1 to 200 letters, digits"]),
        ({"height": 16384, "width": 16384, "num_frames": 4097}, ["4097 frames", "pixels together"]),
        (
            {"files": {f"step_{i:04d}.pt": "" for i in range(100_001)}},
            ["files = {", "at most 100000 entries"],
        ),
        ({"files": {"a\x1b[2J.pt": "0" * 64}}, ["'a\\x1b[2J.pt'", "as no prior's is called"]),
        ({"files": {".lock": "0" * 64}}, ["'.lock'", "as no prior's is called"]),
        ({"seconds_per_step": [0.1] * 9 + [10**400]}, ["seconds_per_step[9]", "a number from 0 on"]),
        ({"seconds_per_step": [0.1] * 9 + [float("nan")]}, ["seconds_per_step[9] = nan"]),
        ({"seconds_per_step": [-5.0] * 10}, ["seconds_per_step[0] = -5.0"]),
        ({"seconds_per_step": [1e10] * 10}, ["seconds_per_step[0] = 10000000000.0", "0 to 1000000000.0"]),
        ({"seconds_per_step": "x" * 10}, ["seconds_per_step = 'xxxxxxxxxx'", "list"]),
        ({"seconds": {"decode": 10**400}}, ["seconds['decode'] = 1000", "a number from 0 on"]),
        ({"seconds": {"decode": float("nan")}}, ["seconds['decode'] = nan"]),
        ({"seconds": {"load": "x"}}, ["seconds['load'] = 'x'"]),
        ({"seconds": [1]}, ["seconds = [1]", "dict"]),
        ({"lora": {}}, ["{} as a LoRA", "list"]),
        ({"lora": [7]}, ["7 as a LoRA", "a JSON object"]),
        ({"lora": [{"path": 3, "alpha": 1.0, "sha256": "0" * 64}]}, ["3 as a LoRA", "string"]),
        ({"lora": [{"path": "a", "alpha": 10**400, "sha256": "0" * 64}]}, ["as a LoRA", "a number"]),
        ({"lora": [{"path": "a", "alpha": 1.0}]}, ["as a LoRA", "one with sha256"]),
        ({"lora": [{}] * 101}, ["as a LoRA", "at most 100 entries"]),
        ({"prior_kind": ["prompted"]}, ["prior_kind = ['prompted']", "string"]),
        ({"formation": {"branch_distances": {}}}, ["formation['branch_distances'] = {}", "list"]),
        ({"forwards_per_step": [2.5] * 10}, ["forwards_per_step[0] = 2.5", "integer"]),
        ({"skip_cache": 1}, ["skip_cache = 1", "2 to"]),
        ({"device_name": {}}, ["device_name = {}", "string"]),
        ({"versions": {"torch": [2]}}, ["versions['torch'] = [2]", "string"]),
        ({"versions": []}, ["versions = []", "dict"]),
    ],
)
def test_metadata_that_says_something_impossible(prior_copy, infer, refused, changes, words):
    edit_metadata(prior_copy, **changes)
    refused(lambda: infer(prior_copy), *words)


@pytest.mark.parametrize("name", ["y.pt", "clip_feature.pt"])
def test_a_prior_without_its_identity(prior_copy, infer, refused, name):
    files = read_json(prior_copy / "run_metadata.json")["files"]
    del files[name]
    edit_metadata(prior_copy, files=files)
    refused(lambda: infer(prior_copy), f"lists no {name}", "incomplete")


def test_the_error_line_is_one_line_whatever_the_prior_says(prior_copy, infer, refused):
    edit_metadata(prior_copy, model="tiny\nall is well\x1b[2J")
    assert "\x1b" not in refused(lambda: infer(prior_copy), "tiny")


# --- what is read all the same ------------------------------------------------------------------------------


def test_entries_that_a_later_version_added_are_left_alone(prior_copy, infer):
    """Nothing that is unknown may stop a prior of this format from loading."""
    later = {"boundary": 0.875, "precision": "int4", "kernel": {"name": "sage"}, "lists": [[1]], "none": None}
    edit_metadata(prior_copy, **later)
    sha256 = read_json(prior_copy / "run_metadata.json")["latents_sha256"]
    assert infer(prior_copy).report["latents_sha256"] == sha256


def test_entries_that_the_first_priors_lack(prior_copy, infer):
    """Only what version 1 began with is asked for."""
    later = ["lora", "formation", "stop_after", "save_decoded_videos", "device", "device_name", "num_threads"]
    later += ["seconds", "seconds_per_step", "forwards", "forwards_per_step", "latents_sha256", "prior_kind"]
    later += ["skip_cache", "tea_cache_l1_thresh", "tea_cache_model_id", "parameter_fingerprint", "created"]
    later += ["family", "vram", "attention", "quantize", "compile", "peak_memory"]
    edit_metadata(prior_copy, **dict.fromkeys(later, ...))
    outcome = infer(prior_copy, "--dry_run")
    assert outcome.code == 0 and '"expected_seconds": null' in outcome.out
    assert infer(prior_copy).code == 0


def test_metadata_in_other_words_of_json_is_read(prior_copy, infer):
    metadata = read_json(prior_copy / "run_metadata.json")
    (prior_copy / "run_metadata.json").write_text(json.dumps(metadata, indent=7, ensure_ascii=True))
    assert infer(prior_copy).report["latents_sha256"] == metadata["latents_sha256"]


# --- metadata that was changed ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"cfg_scale": 5.0', '"cfg_scale": 4.0'),
        (PROMPT, "The portrait moves lest."),
        ('"seed": 0', '"seed": 1'),
    ],
)
def test_metadata_that_is_sound_and_not_what_was_written(prior_copy, infer, refused, old, new):
    path = prior_copy / "run_metadata.json"
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    refused(lambda: infer(prior_copy), "was edited or damaged", "copy the prior again")


def test_a_damaged_prior_never_passes_for_an_older_one(prior_copy, infer, refused, image):
    path = prior_copy / "run_metadata.json"
    path.write_text(path.read_text().replace("format_version", "format_versioo"))
    refused(lambda: infer(prior_copy, "--image", image, "--prompt", PROMPT), "format_version None")
