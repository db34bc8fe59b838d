"""The prior on disk: what is written is what is read, to the bit, with every name and checksum recorded."""

from __future__ import annotations

import hashlib
import shutil
import time
from pathlib import Path

import pytest
import torch
from helpers import FRAMES, PROMPT, PUBLISHED_KEYS, SIZE, listing, metadata_with, read_json

from step_skip.errors import InputError
from step_skip.files.tensors import load_tensor, sha256_tensor
from step_skip.prior.prior import context_file
from step_skip.prior.writer import PriorWriter, create_run_dir

OWN_KEYS = {
    "format_version",
    "status",
    "files",
    "shapes",
    "model",
    "model_fingerprint",
    "lora",
    "prompt",
    "negative_prompt",
    "seed",
    "cfg_scale",
    "fps",
    "dtype",
    "tiled",
    "tile_size",
    "tile_stride",
    "start_step",
    "formation",
    "device",
    "device_name",
    "num_threads",
    "versions",
    "seconds",
    "seconds_per_step",
    "forwards",
    "latents_sha256",
}


# --- round trip ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_tensors_come_back_as_they_were(tmp_path, dtype):
    shape = (1, 16, 3, 4, 4)
    latents = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    latents.flatten()[:4] = torch.tensor([0.0, -0.0, torch.finfo(dtype).tiny, torch.finfo(dtype).max]).to(
        dtype
    )
    writer = PriorWriter(tmp_path, metadata_with(sigmas=[1.0]))
    writer.save_tensor("step_0000.pt", latents)
    name = str(dtype).removeprefix("torch.")
    back = load_tensor(tmp_path / "step_0000.pt", shape=shape, dtype=name)
    assert torch.equal(back, latents)
    assert back.dtype == dtype
    assert sha256_tensor(back) == sha256_tensor(latents)


def test_a_view_is_saved_alone_and_contiguous(tmp_path):
    whole = torch.arange(24.0).reshape(2, 3, 4)
    writer = PriorWriter(tmp_path, metadata_with(sigmas=[1.0]))
    writer.save_tensor("view.pt", whole[:, 1, ::2].t())
    back = torch.load(tmp_path / "view.pt", weights_only=True)
    assert torch.equal(back, whole[:, 1, ::2].t())
    assert back.is_contiguous()
    assert back.untyped_storage().nbytes() == 4 * back.numel()


# --- what is recorded ---------------------------------------------------------------------------------------


def test_metadata_has_every_name(prior):
    metadata = read_json(prior / "run_metadata.json")
    assert metadata.keys() >= PUBLISHED_KEYS | OWN_KEYS
    expected = {
        "run_id": prior.name.removeprefix("run_"),
        "num_inference_steps": 10,
        "denoising_strength": 1.0,
        "sigma_shift": 5.0,
        "height": SIZE,
        "width": SIZE,
        "num_frames": FRAMES,
        "status": "complete",
        "format_version": 1,
        "model": "tiny",
        "prompt": PROMPT,
        "negative_prompt": "Still.",
        "seed": 0,
        "cfg_scale": 5.0,
        "fps": 8,
        "dtype": "float32",
        "start_step": 6,
        "forwards": 20,
    }
    assert {key: metadata[key] for key in expected} == expected
    assert set(metadata["seconds"]) == {"load", "encode", "denoise", "decode", "save"}
    assert len(metadata["seconds_per_step"]) == 10
    assert set(metadata["model_fingerprint"]) == {"dit", "vae", "text_encoder", "image_encoder"}


def test_every_file_is_recorded_with_its_checksum(prior):
    files = read_json(prior / "run_metadata.json")["files"]
    assert {path.name for path in prior.iterdir()} == {"run_metadata.json", *files}
    for name, digest in files.items():
        assert hashlib.sha256((prior / name).read_bytes()).hexdigest() == digest
    kinds = ("step", "noise_pred", "noise_pred_nega")
    steps = {f"{kind}_{step:04d}.pt" for kind in kinds for step in range(10)}
    contexts = {context_file(text) for text in (PROMPT, "Still.")}
    others = {"initial_latents.pt", "y.pt", "clip_feature.pt", "input_image.png"}
    shown = {"output_full.mp4", "formation.png"}
    assert set(files) == steps | contexts | others | shown


def test_every_tensor_is_recorded_with_its_shape(prior):
    found = {path.name: list(torch.load(path, weights_only=True).shape) for path in prior.glob("*.pt")}
    assert read_json(prior / "run_metadata.json")["shapes"] == found
    assert found["y.pt"] == [1, 20, *found["step_0000.pt"][2:]]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_tensors_are_in_the_pipelines_dtype(make_prior, dtype):
    prior = make_prior("--dtype", dtype)
    for path in prior.glob("*.pt"):
        assert str(torch.load(path, weights_only=True).dtype) == f"torch.{dtype}"


def test_the_last_step_is_the_run(prior):
    latents = torch.load(prior / "step_0009.pt", weights_only=True)
    assert sha256_tensor(latents) == read_json(prior / "run_metadata.json")["latents_sha256"]


# --- the folder ---------------------------------------------------------------------------------------------


def test_a_prior_can_be_moved(prior, infer, tmp_path):
    moved = shutil.copytree(prior, tmp_path / "a folder with spaces, ünïcode and 'quotes'")
    assert infer(moved).path.is_relative_to(moved)


def test_resuming_changes_nothing_of_the_prior(prior_copy, infer):
    before = listing(prior_copy)
    assert infer(prior_copy).code == 0
    assert {name: content for name, content in listing(prior_copy).items() if name in before} == before


def test_two_runs_in_the_same_second(tmp_path, monkeypatch):
    monkeypatch.setattr(time, "strftime", lambda _: "20250101_000000")
    made = [create_run_dir(tmp_path, None) for _ in range(3)]
    assert [run_id for _, run_id in made] == ["20250101_000000", "20250101_000000_2", "20250101_000000_3"]
    assert {path.name for path in tmp_path.iterdir()} == {f"run_{run_id}" for _, run_id in made}


def test_a_run_id_taken_in_the_meantime_is_refused(tmp_path, monkeypatch):
    """Two runs may pass the first look at once; making the folder decides."""
    (tmp_path / "run_mine").mkdir()
    looks = iter([False, True])
    monkeypatch.setattr(Path, "exists", lambda _: next(looks))
    with pytest.raises(InputError, match="run_mine exists"):
        create_run_dir(tmp_path, "mine")


def test_taken_run_id(generate, refused, image, tmp_path):
    (tmp_path / "priors" / "run_mine").mkdir(parents=True)
    refused(lambda: generate("--image", image, "--run_id", "mine"), "run_mine exists", "--run_id")
