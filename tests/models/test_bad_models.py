"""A device that is not there, and model folders that are not whole, are refused in one line."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from helpers import read_json

# --- devices ------------------------------------------------------------------------------------------------


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu(generate, prior, infer, refused, image, tmp_path):
    refused(lambda: generate("--image", image, "--device", "cuda"), "no CUDA GPU", "--device cpu")
    refused(lambda: infer(prior, "--device", "cuda:1", "--output", tmp_path / "a.mp4"), "no CUDA GPU")


def test_a_gpu_that_is_not_there(generate, refused, image, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    refused(lambda: generate("--image", image, "--device", "cuda:3"), "--device cuda:3", "cuda:0")


# --- model folders ------------------------------------------------------------------------------------------


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
