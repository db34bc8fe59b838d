"""Whatever is wrong is found before the model is loaded: exit 2, one line, nothing changed on disk."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import build_model, save_image
from helpers import PROMPT, SIZE, edit_metadata, read_json, record_checksum

from step_skip.media.images import fit_image, open_image

SHAPE = (1, 16, 3, 4, 4)  # latents of 9 frames of 32 x 32 pixels
NOT_UTF8 = "\udcff\udcfe"  # how Python hands over the bytes ff fe from a shell


# --- flags of generate_prior.py -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--num_inference_steps", 0), ["--num_inference_steps", "above 0"]),
        (("--num_inference_steps", "ten"), ["--num_inference_steps", "'ten'"]),
        (("--num_inference_steps", 10001), ["10001", "at most 10000"]),
        (("--start_step", 10), ["--start_step 10", "steps 0 to 9"]),
        (("--start_step", -1), ["--start_step", "below 0"]),
        (("--cfg_scale", "nan"), ["--cfg_scale", "above 0"]),
        (("--cfg_scale", "inf"), ["--cfg_scale", "above 0"]),
        (("--cfg_scale", 0), ["--cfg_scale", "above 0"]),
        (("--sigma_shift", -5), ["--sigma_shift", "above 0"]),
        (("--sigma_shift", 1e9), ["steps 0 and 1", "--sigma_shift"]),
        (("--denoising_strength", 0.6), ["--denoising_strength 0.6", "--input_video"]),
        (("--denoising_strength", 1.5), ["--denoising_strength", "above 1"]),
        (("--seed", -1), ["--seed", "range 0 to"]),
        (("--seed", 2**64), ["--seed", "range 0 to"]),
        (("--height", 0), ["--height", "range 1 to 16384"]),
        (("--height", 10**9, "--width", 10**9), ["--height", "range 1 to 16384"]),
        (("--num_frames", 10**6), ["--num_frames", "range 1 to 4097"]),
        (("--fps", 1e9), ["--fps", "range"]),
        (("--run_id", "../elsewhere"), ["--run_id '../elsewhere'", "letters"]),
        (("--run_id", ""), ["--run_id", "letters"]),
        (("--prompt", NOT_UTF8), ["--prompt", "not valid UTF-8"]),
        (("--negative_prompt", NOT_UTF8), ["--negative_prompt", "not valid UTF-8"]),
        (("--output_dir", f"priors_{NOT_UTF8}"), ["--output_dir", "not valid UTF-8"]),
        (("--device", "gpu"), ["--device gpu", "cpu, cuda"]),
        (("--device", "meta"), ["--device meta", "cpu, cuda"]),
        (("--dtype", "int8"), ["--dtype", "int8", "bfloat16"]),
        (("--model", "I2V-14B"), ["--model", "I2V-480P"]),
        (("--no_such\nflag", "1"), ["unrecognized", "--no_such"]),
        (("--prom", PROMPT), ["unrecognized", "--prom"]),
        (("--download_example",), ["--download_example", "not allowed with", "--image"]),
    ],
)
def test_flags_of_generate(generate, refused, image, flags, words):
    refused(lambda: generate("--image", image, *flags), *words)


def test_no_image_at_all(generate, refused):
    refused(generate, "--image is missing: tiny needs a first frame")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu(generate, prior, infer, refused, image, tmp_path):
    refused(lambda: generate("--image", image, "--device", "cuda"), "no CUDA GPU", "--device cpu")
    refused(lambda: infer(prior, "--device", "cuda:1", "--output", tmp_path / "a.mp4"), "no CUDA GPU")


def test_a_gpu_that_is_not_there(generate, refused, image, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    refused(lambda: generate("--image", image, "--device", "cuda:3"), "--device cuda:3", "cuda:0")


def test_taken_run_id(generate, refused, image, tmp_path):
    (tmp_path / "priors" / "run_mine").mkdir(parents=True)
    refused(lambda: generate("--image", image, "--run_id", "mine"), "run_mine exists", "--run_id")


# --- images and videos --------------------------------------------------------------------------------------


def truncated_image(path: Path) -> Path:
    whole = save_image(path.with_suffix(".jpg"), size=(256, 256)).read_bytes()
    path.write_bytes(whole[: len(whole) // 3])
    path.with_suffix(".jpg").unlink()
    return path


def bomb(path: Path) -> Path:
    """A PNG of 60000 x 60000 pixels in a few hundred bytes."""
    import struct
    import zlib

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(100)))
    )
    return path


def written(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


BAD_IMAGES = {
    "missing": (lambda path: path, "is not a file"),
    "folder": (lambda path: path.mkdir() or path, "holds no picture"),
    "empty": (lambda path: written(path, b""), "not an image"),
    "text": (lambda path: written(path, b"not a picture, just text"), "not an image"),
    "truncated": (truncated_image, "cannot be read"),
    "bomb": (bomb, "cannot be read"),
    "tiny": (lambda path: save_image(path, size=(15, 400)), "15 x 400 pixels, expected 16"),
    "long name": (lambda path: path.with_name("a" * 300), "too long"),
}


@pytest.mark.parametrize("kind", BAD_IMAGES)
def test_images_that_cannot_be_used(generate, refused, tmp_path, kind):
    make, words = BAD_IMAGES[kind]
    path = make(tmp_path / "picture.png")
    refused(lambda: generate("--image", path), words)


@pytest.mark.parametrize("damage", ["flip", "cut"])
def test_damaged_images_are_refused_or_read_never_a_traceback(tmp_path, damage):
    from step_skip.errors import InputError

    outcomes = set()
    for suffix in ("png", "jpg", "webp", "gif", "tiff", "bmp"):
        whole = save_image(tmp_path / f"whole.{suffix}", size=(64, 64)).read_bytes()
        for place in range(0, len(whole), max(1, len(whole) // 40)):
            flipped = whole[:place] + bytes([whole[place] ^ 0xFF]) + whole[place + 1 :]
            path = written(tmp_path / f"bad.{suffix}", flipped if damage == "flip" else whole[:place])
            try:
                outcomes.add(fit_image(open_image(path), width=SIZE, height=SIZE).size)
            except InputError as error:
                outcomes.add("refused")
                assert str(path) in str(error)
    assert outcomes == {(SIZE, SIZE), "refused"}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "is not a file"),
        (b"", "not a video"),
        (b"\0\0\0\x20ftypisom not a video at all", "not a video"),
    ],
)
def test_videos_that_cannot_be_used(generate, refused, image, tmp_path, content, words):
    path = tmp_path / "clip.mp4"
    if content is not None:
        path.write_bytes(content)
    flags = ("--image", image, "--denoising_strength", 0.5, "--input_video", path)
    refused(lambda: generate(*flags), "--input_video", words)


def test_a_video_that_is_too_short(prior, generate, refused, image):
    flags = ("--denoising_strength", 0.5, "--input_video", prior / "output_full.mp4", "--num_frames", 13)
    refused(lambda: generate("--image", image, *flags), "has 9 frames, expected 13", "--num_frames")


def test_a_video_that_would_not_be_used(prior, generate, refused, image):
    flags = ("--input_video", prior / "output_full.mp4")
    refused(lambda: generate("--image", image, *flags), "--input_video", "--denoising_strength")


# --- flags of infer_from_prior.py ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--start_step", 10), ["--start_step 10", "steps 0 to 9"]),
        (("--start_step", -1), ["--start_step", "below 0"]),
        (("--num_inference_steps", 20), ["--num_inference_steps 20", "the prior has 10"]),
        (("--denoising_strength", 0.5), ["--denoising_strength 0.5", "the prior has 1.0"]),
        (("--sigma_shift", 3), ["--sigma_shift 3", "the prior has 5.0"]),
        (("--model", "I2V-480P"), ["--model I2V-480P", "the prior has tiny"]),
        (("--dtype", "bfloat16"), ["--dtype bfloat16", "the prior has float32"]),
        (("--seed", 3), ["--seed is fixed by the prior: 0, not 3", "generate_prior.py --seed 3"]),
        (("--num_frames", 33), ["--num_frames is fixed by the prior: 9, not 33"]),
        (("--height", 64, "--width", SIZE), ["--height is fixed by the prior: 32, not 64"]),
        (("--fps", 0), ["--fps", "range"]),
        (("--cfg_scale", "nan"), ["--cfg_scale", "above 0"]),
        (("--prompt", NOT_UTF8), ["--prompt", "not valid UTF-8"]),
        (("--output", f"{NOT_UTF8}.mp4"), ["--output", "not valid UTF-8"]),
        (("--output", "video.avi"), ["--output video.avi", ".mp4"]),
        (("--output", "a" * 300 + ".mp4"), ["304 bytes is too long"]),
        (("--output", "a" * 251 + ".mp4"), ["255 bytes is too long"]),  # for the .json beside it
        (("--overwrite",), ["--overwrite", "give --output"]),
        (("--image", "nowhere.png"), ["nowhere.png is not a file"]),
        (("--steps", 3, 2), ["--steps", "increasing"]),
        (("--steps", 2, 2), ["--steps", "increasing"]),
        (("--steps", 2, 10), ["--steps", "between 0 and 9"]),
        (("--num_steps", 11), ["--num_steps 11", "10 steps"]),
        (("--steps", 2, "--start_step", 6), ["--start_step", "not allowed with"]),
    ],
)
def test_flags_of_infer(prior_copy, infer, refused, flags, words):
    refused(lambda: infer(prior_copy, *flags), *words)


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


def test_other_weights(prior_copy, run, refused, tmp_path):
    (tmp_path / "other").mkdir()
    other = build_model(tmp_path / "other", seed=1)
    command = ("infer_from_prior", "--prior_dir", prior_copy, "--model_dir", other)
    refused(lambda: run(*command), "dit weights are not those", "--model_dir")


def test_weights_without_a_recorded_fingerprint(prior_copy, infer, refused):
    edit_metadata(prior_copy, model_fingerprint={})
    refused(lambda: infer(prior_copy), "dit weights are not those")


@pytest.mark.parametrize(
    "missing", ["dit.safetensors", "vae.safetensors", "config.json", "tokenizer/tokenizer.json"]
)
def test_an_incomplete_model_folder(generate, refused, image, model_dir, tmp_path, missing):
    folder = shutil.copytree(model_dir, tmp_path / "model")
    (folder / missing).unlink()
    error = refused(lambda: generate("--image", image, "--model_dir", folder), str(folder), "--model_dir")
    assert missing in error or missing.split(".")[0] in error


@pytest.mark.parametrize("damaged", ["dit.safetensors", "tokenizer/tokenizer.json", "config.json"])
def test_a_damaged_model_folder_is_one_line_too(generate, image, model_dir, tmp_path, damaged):
    folder = shutil.copytree(model_dir, tmp_path / "model")
    (folder / damaged).write_bytes((folder / damaged).read_bytes()[:100])
    outcome = generate("--image", image, "--model_dir", folder)
    assert outcome.code == 2
    assert str(folder) in outcome.error
    assert not (tmp_path / "priors").exists()


def test_weights_that_do_not_fit_leave_no_folder(prior_copy, run, model_dir, tmp_path):
    folder = shutil.copytree(model_dir, tmp_path / "model")
    config = read_json(folder / "config.json")
    config["dit"]["num_layers"] += 1
    (folder / "config.json").write_text(json.dumps(config))
    outcome = run("infer_from_prior", "--prior_dir", prior_copy, "--model_dir", folder)
    assert outcome.code == 2
    assert "do not fit" in outcome.error
    assert not (prior_copy / "outputs").exists()


# --- priors that are none, or not whole ---------------------------------------------------------------------


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
        ({"model_fingerprint": {"dit": 7}}, ["model_fingerprint['dit'] = 7", "string"]),
        ({"parameter_fingerprint": "x"}, ["parameter_fingerprint = 'x'", "dict"]),
        ({"run_id": "x" * 1001}, ["run_id = 'xxx", "at most 1000 characters"]),
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


@pytest.mark.parametrize("name", ["y.pt", "clip_feature.pt", "context"])
@pytest.mark.parametrize("change", ["wide", "batch", "flat", "long", "scalar"])
def test_conditioning_of_another_shape_whose_sums_agree(prior_copy, infer, name, change):
    """Only the weights can tell: so they are loaded, and no step is run."""
    path = prior_copy / needed_name(prior_copy, name)
    tensor = torch.load(path, weights_only=True)
    tensor = {
        "wide": lambda: torch.cat([tensor, tensor], 1 if tensor.ndim == 5 else 2),
        "batch": lambda: torch.cat([tensor, tensor]),
        "flat": lambda: tensor[0].clone(),
        "long": lambda: (
            torch.zeros(1, 5000, tensor.shape[2]) if tensor.ndim == 3 else tensor[:, :, :-1].clone()
        ),
        "scalar": lambda: torch.zeros(1)[0].clone(),
    }[change]()
    torch.save(tensor, path)
    shapes = read_json(prior_copy / "run_metadata.json")["shapes"]
    edit_metadata(prior_copy, shapes=shapes | {path.name: list(tensor.shape)})
    record_checksum(prior_copy, path.name)
    outcome = infer(prior_copy)
    assert outcome.code == 2
    assert f"has shape {list(tensor.shape)}, expected [1, " in outcome.error
    assert not (prior_copy / "outputs").exists()


@pytest.mark.parametrize("key", ["scheduler_sigmas", "scheduler_timesteps"])
@pytest.mark.parametrize("place", [0, 4, 9])
def test_one_altered_entry_of_the_schedule(prior_copy, infer, refused, key, place):
    values = read_json(prior_copy / "run_metadata.json")[key]
    values[place] *= 1.0001
    edit_metadata(prior_copy, **{key: values})
    refused(lambda: infer(prior_copy), f"{key}[{place}]", "installed scheduler gives", "make the prior again")


@pytest.mark.parametrize("changes", [{"sigma_shift": 5.001}, {"denoising_strength": 0.999}])
def test_a_schedule_of_other_settings(prior_copy, infer, refused, changes):
    edit_metadata(prior_copy, **changes)
    refused(lambda: infer(prior_copy), "installed scheduler gives")


@pytest.mark.parametrize("name", ["y.pt", "clip_feature.pt"])
def test_a_prior_without_its_identity(prior_copy, infer, refused, name):
    files = read_json(prior_copy / "run_metadata.json")["files"]
    del files[name]
    edit_metadata(prior_copy, files=files)
    refused(lambda: infer(prior_copy), f"lists no {name}", "incomplete")


# --- damaged files ------------------------------------------------------------------------------------------

NEEDED = ["step_0006.pt", "y.pt", "clip_feature.pt"]


def needed_name(prior: Path, name: str) -> str:
    return next(path.name for path in prior.glob("context_*.pt")) if name == "context" else name


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


class Code:
    """A pickle that runs code when it is loaded."""

    def __init__(self, proof: Path):
        self.proof = proof

    def __reduce__(self):
        return os.mkdir, (str(self.proof),)


def pickled_code(path: Path) -> None:
    """An archive as torch.save lays it out, whose pickle makes a folder."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(Code(path.parent.parent / "code_was_run"), 2))
        archive.writestr("archive/version", "3\n")


def compressed(path: Path) -> None:
    """A zip bomb: little on disk, much in memory."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(10**7))


def spoiled(value: float) -> torch.Tensor:
    latents = torch.zeros(SHAPE)
    latents[0, 3, 2, 1, 0] = value
    return latents


BAD_TENSORS = {
    "text": (lambda path: path.write_text("not a tensor"), "not a tensor file"),
    "code": (pickled_code, "nothing in it was run"),
    "bare pickle with code": (
        lambda path: path.write_bytes(pickle.dumps(Code(path.parent.parent / "code_was_run"))),
        "not a tensor file",
    ),
    "compressed": (compressed, "compressed"),
    "list": (lambda path: torch.save([1, 2, 3], path), "holds a list, expected a tensor"),
    "dict": (
        lambda path: torch.save({"latents": torch.zeros(SHAPE)}, path),
        "holds a dict, expected a tensor",
    ),
    "number": (lambda path: torch.save(1.5, path), "holds a float, expected a tensor"),
    "sparse": (lambda path: torch.save(torch.zeros(SHAPE).to_sparse(), path), "expected a tensor"),
    "meta": (lambda path: torch.save(torch.zeros(SHAPE, device="meta"), path), "step_0006.pt"),
    "nan": (lambda path: torch.save(spoiled(float("nan")), path), "NaN or infinite"),
    "inf": (lambda path: torch.save(spoiled(float("-inf")), path), "NaN or infinite"),
    "shape": (lambda path: torch.save(torch.zeros(1, 16, 3, 4, 6), path), "shape [1, 16, 3, 4, 6], expected"),
    "no shape": (lambda path: torch.save(torch.tensor(1.0), path), "shape [], expected [1, 16, 3, 4, 4]"),
    "dtype": (lambda path: torch.save(torch.zeros(SHAPE, dtype=torch.float64), path), "dtype float64"),
    "integers": (lambda path: torch.save(torch.zeros(SHAPE, dtype=torch.int32), path), "dtype int32"),
    "bfloat16": (
        lambda path: torch.save(torch.zeros(SHAPE, dtype=torch.bfloat16), path),
        "dtype bfloat16, expected float32",
    ),
    "expanded": (lambda path: torch.save(torch.zeros(1).expand(SHAPE), path), "not contiguous"),
    "huge": (lambda path: torch.save(torch.zeros(10**6), path), "expected at most"),
}


@pytest.mark.parametrize("kind", BAD_TENSORS)
def test_files_that_hold_something_else(prior_copy, infer, refused, tmp_path, kind):
    """The checksum agrees here: what the file holds is looked at, too."""
    write, words = BAD_TENSORS[kind]
    path = prior_copy / "step_0006.pt"
    path.unlink()
    write(path)
    record_checksum(prior_copy, path.name)
    refused(lambda: infer(prior_copy), path.name, words)
    assert not (tmp_path / "code_was_run").exists()


def test_a_family_whose_network_sees_no_image(prior_copy, infer):
    """Likewise: by the metadata there is no y, and the weights take one."""
    edit_metadata(prior_copy, family="T2V")
    outcome = infer(prior_copy)
    assert outcome.code == 2
    assert "the prior has no y, and these weights take one" in outcome.error


def test_the_pickles_with_code_do_run_where_they_are_trusted(tmp_path):
    """Shows that the test above can fail."""
    pickle.loads(pickle.dumps(Code(tmp_path / "code_was_run")))
    assert (tmp_path / "code_was_run").exists()


@pytest.mark.parametrize("name", ["y.pt", "clip_feature.pt", "context"])
@pytest.mark.parametrize("kind", ["code", "list", "shape", "no shape"])
def test_conditioning_that_holds_something_else(prior_copy, infer, refused, tmp_path, name, kind):
    write, words = BAD_TENSORS[kind]
    words = words.removesuffix("[1, 16, 3, 4, 4]")
    path = prior_copy / needed_name(prior_copy, name)
    path.unlink()
    write(path)
    record_checksum(prior_copy, path.name)
    refused(lambda: infer(prior_copy), path.name, words)
    assert not (tmp_path / "code_was_run").exists()


@pytest.mark.parametrize("name", ["y.pt", "clip_feature.pt", "context"])
@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda tensor: tensor * float("nan"), "NaN or infinite"),
        (lambda tensor: tensor.bfloat16(), "dtype bfloat16, expected float32"),
        (lambda tensor: tensor[..., :-1].clone(), "has shape"),
        (lambda tensor: tensor[0], "has shape"),
    ],
)
def test_conditioning_that_is_almost_right(prior_copy, infer, refused, name, spoil, words):
    path = prior_copy / needed_name(prior_copy, name)
    torch.save(spoil(torch.load(path, weights_only=True)), path)
    record_checksum(prior_copy, path.name)
    refused(lambda: infer(prior_copy), path.name, words)


@pytest.mark.parametrize(
    "name", ["noise_pred_0006.pt", "noise_pred_nega_0006.pt", "step_0005.pt", "step_0009.pt"]
)
def test_differential_resume_looks_at_its_files_too(prior_copy, infer, refused, name):
    torch.save(spoiled(float("nan")), prior_copy / name)
    refused(lambda: infer(prior_copy, "--num_steps", 3), name, "is damaged")
    record_checksum(prior_copy, name)
    refused(lambda: infer(prior_copy, "--num_steps", 3), name, "NaN or infinite")


def test_any_damage_to_a_tensor_file_is_an_input_error(prior_copy):
    """A prior of an older format has no checksums: the reader meets the damage itself."""
    from step_skip.errors import InputError
    from step_skip.files.tensors import load_tensor

    path = prior_copy / "step_0006.pt"
    whole = path.read_bytes()
    refusals = 0
    for place in range(0, len(whole), 7):
        for content in (whole[:place], whole[:place] + bytes([whole[place] ^ 0xFF]) + whole[place + 1 :]):
            path.write_bytes(content)
            try:
                load_tensor(path, shape=SHAPE, dtype="float32")
            except InputError:
                refusals += 1
    assert refusals > len(whole) // 7  # every cut at least


# --- where the output goes ----------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["below a file", "in /proc"])
def test_outputs_that_cannot_be_written(generate, prior, infer, refused, image, tmp_path, place):
    (tmp_path / "file").write_text("text")
    folder = Path("/proc/nowhere") if place == "in /proc" else tmp_path / "file" / "folder"
    refused(lambda: generate("--image", image, "--output_dir", folder), f"cannot write to {folder}", "name a")
    refused(lambda: infer(prior, "--output", folder / "video.mp4"), f"cannot write to {folder}", "name a")


def test_a_full_disk_is_seen_before_the_run(
    generate, prior_copy, infer, refused, image, tmp_path, monkeypatch
):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    refused(lambda: generate("--image", image), "0 MiB free", "free some space")
    refused(lambda: infer(prior_copy), "0 MiB free", "free some space")


def test_every_decoded_video_counts(generate, refused, image, monkeypatch):
    """--save_decoded_videos writes ten more."""
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    flags = ("--image", image, "--height", 1024, "--width", 1024)
    one = refused(lambda: generate(*flags), "this needs")
    eleven = refused(lambda: generate(*flags, "--save_decoded_videos"), "this needs")
    needed = [int(error.split("this needs ")[1].split(";")[0]) for error in (one, eleven)]
    video = 9 * 1024 * 1024 * 3 / 4 / 2**20
    assert needed[1] - needed[0] == pytest.approx(10 * video, abs=1)


@pytest.mark.parametrize("taken", ["video.mp4", "video.json"])
def test_nothing_is_overwritten_unasked(prior, infer, refused, tmp_path, taken):
    (tmp_path / taken).write_text("precious")
    refused(lambda: infer(prior, "--output", tmp_path / "video.mp4"), f"{taken} exists", "--overwrite")
    assert infer(prior, "--output", tmp_path / "video.mp4", "--overwrite").code == 0
    assert (tmp_path / taken).read_bytes() != b"precious"


@pytest.mark.parametrize("name", ["run_metadata.mp4", "output_full.mp4", "RUN_METADATA.mp4"])
def test_the_priors_own_files_are_never_replaced(prior_copy, infer, refused, tmp_path, name):
    (tmp_path / "link").symlink_to(prior_copy)
    for folder in (prior_copy, tmp_path / "link", prior_copy / ".." / prior_copy.name):
        for flags in ((), ("--overwrite",)):
            refused(lambda f=folder, o=flags: infer(prior_copy, "--output", f / name, *o), "the prior itself")


def test_an_output_that_is_a_folder(prior, infer, refused, tmp_path):
    (tmp_path / "video.mp4").mkdir()
    command = ("--output", tmp_path / "video.mp4", "--overwrite")
    refused(lambda: infer(prior, *command), "video.mp4 is a folder")


# --- priors of the pull request's scripts -------------------------------------------------------------------


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


@pytest.mark.parametrize("kind", sorted(set(BAD_TENSORS) - {"bfloat16"}))
def test_an_older_prior_that_holds_something_else(older_prior, infer, refused, image, tmp_path, kind):
    write, words = BAD_TENSORS[kind]
    (older_prior / "step_0006.pt").unlink()
    write(older_prior / "step_0006.pt")
    command = ("--model", "tiny", "--image", image, "--prompt", PROMPT)
    refused(lambda: infer(older_prior, *command), "step_0006.pt", words)
    assert not (tmp_path / "code_was_run").exists()


def test_an_older_prior_of_which_steps_are_missing(older_prior, infer, refused, image):
    (older_prior / "step_0006.pt").unlink()
    command = ("--model", "tiny", "--image", image, "--prompt", PROMPT)
    refused(lambda: infer(older_prior, *command), "step_0006.pt is missing")


def test_the_error_line_is_one_line_whatever_the_prior_says(prior_copy, infer, refused):
    edit_metadata(prior_copy, model="tiny\nall is well\x1b[2J")
    assert "\x1b" not in refused(lambda: infer(prior_copy), "tiny")


def test_metadata_in_other_words_of_json_is_read(prior_copy, infer):
    metadata = read_json(prior_copy / "run_metadata.json")
    (prior_copy / "run_metadata.json").write_text(json.dumps(metadata, indent=7, ensure_ascii=True))
    assert infer(prior_copy).report["latents_sha256"] == metadata["latents_sha256"]
