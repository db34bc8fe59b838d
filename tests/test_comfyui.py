"""A prior's latents as ComfyUI reads and writes them; its formulas stand here, with where they come from."""

from __future__ import annotations

import json

import pytest
import torch
from helpers import PROMPT
from safetensors.torch import load_file, save_file

import step_skip
from step_skip import read_prior
from step_skip.comfyui import MEAN, STD
from step_skip.prior.files import load_latents
from step_skip.prior.prior import step_file

# --- ComfyUI, github.com/Comfy-Org/ComfyUI, November 2026: its formulas in this file's words ----------------


def load_latent(path):
    """nodes.py, LoadLatent.load: without the mark an old file's scaling of Stable Diffusion is undone."""
    tensors = load_file(path)
    return tensors["latent_tensor"].float() * (1 if "latent_format_version_0" in tensors else 1 / 0.18215)


def save_latent(samples, path):
    """nodes.py, SaveLatent.save, with its metadata."""
    tensors = {"latent_tensor": samples.contiguous(), "latent_format_version_0": torch.tensor([])}
    save_file(tensors, path, metadata={"prompt": json.dumps({"3": {"class_type": "KSamplerAdvanced"}})})


def process_in(latent):
    """latent_formats.py, Wan21.process_in; its scale_factor is 1."""
    return (latent - torch.tensor(MEAN).view(1, 16, 1, 1, 1)) / torch.tensor(STD).view(1, 16, 1, 1, 1)


def process_out(latent):
    """latent_formats.py, Wan21.process_out."""
    return latent * torch.tensor(STD).view(1, 16, 1, 1, 1) + torch.tensor(MEAN).view(1, 16, 1, 1, 1)


def noise_scaling(sigma, noise, latent_image):
    """model_sampling.py, CONST.noise_scaling: what a sampler begins with."""
    return sigma * noise + (1 - sigma) * latent_image


def inverse_noise_scaling(sigma, latent):
    """model_sampling.py, CONST.inverse_noise_scaling: what it gives back."""
    return latent / (1 - sigma)


def simple_sigmas(steps, shift):
    """samplers.py, simple_scheduler, on the 1000 sigmas of model_sampling.py, ModelSamplingDiscreteFlow."""
    times = torch.arange(1, 1001) / 1000
    sigmas = shift * times / (1 + (shift - 1) * times)
    return [float(sigmas[-(1 + int(i * 1000 / steps))]) for i in range(steps)] + [0.0]


# --- here ---------------------------------------------------------------------------------------------------


@pytest.fixture
def export(run, prior, tmp_path):
    """`export(step)`: the file that the command line makes."""

    def export(*flags):
        outcome = run("prior_utils", "export", prior, "--output", tmp_path / "own.latent", *flags)
        assert outcome.code == 0, outcome.err
        assert outcome.out.strip() == str(tmp_path / "own.latent")
        return tmp_path / "own.latent", outcome.err

    return export


@pytest.mark.parametrize("step", [0, 6, 9])
def test_comfyui_goes_on_where_the_prior_was(export, prior, step):
    """KSamplerAdvanced from start_at_step, without noise: process_in, then noise_scaling (samplers.py)."""
    path, said = export("--step", step)
    sigma = simple_sigmas(10, shift=5)[step + 1]
    begins = noise_scaling(sigma, 0, process_in(load_latent(path)))
    own = load_latents(read_prior(prior), step_file(step))
    assert torch.allclose(begins, own, rtol=1e-5, atol=1e-5)
    assert ("start_at_step 7" in said) == (step == 6)
    assert ("VAEDecode" in said) == (step == 9)


def test_the_last_step_is_the_default(export, prior):
    path, _ = export()
    clean = load_latents(read_prior(prior), step_file(9))
    assert torch.allclose(load_latent(path), process_out(clean), atol=1e-5)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_run_of_comfyui_becomes_a_prior(run, prior, tmp_path, dtype):
    """What leaves a sampler is inverse_noise_scaling, then process_out (samplers.py)."""
    own = read_prior(prior)
    paths, sigmas = [], simple_sigmas(10, shift=5)[1:]
    latents = [load_latents(own, step_file(step)).to(getattr(torch, dtype)) for step in range(10)]
    for step, sigma in enumerate(sigmas):
        paths.append(tmp_path / f"ComfyUI_{step:05}_.latent")
        save_latent(process_out(inverse_noise_scaling(sigma, latents[step].float())), paths[-1])
    flags = ("--output_dir", tmp_path / "made", "--run_id", "theirs", "--dtype", dtype)
    outcome = run("prior_utils", "import", *paths, *flags)
    assert outcome.code == 0, outcome.err
    assert outcome.out.strip() == str(tmp_path / "made" / "run_theirs")
    made = read_prior(tmp_path / "made" / "run_theirs")
    for name in ("scheduler_sigmas", "height", "width", "num_frames"):
        assert getattr(made.metadata, name) == getattr(own.metadata, name)
    for step in range(10):
        found = load_latents(made, step_file(step))
        assert found.dtype == getattr(torch, dtype)
        assert torch.allclose(found, latents[step], rtol=1e-5, atol=1e-5)


def test_a_prior_there_and_back_is_resumed(run, prior, image, model_dir, tmp_path):
    """Its own prompt gives its own latents, to the rounding of float32."""
    paths = [tmp_path / f"{step}.latent" for step in range(10)]
    for step, path in enumerate(paths):
        assert run("prior_utils", "export", prior, "--step", step, "--output", path).code == 0
    back = run("prior_utils", "import", *paths, "--output_dir", tmp_path / "back", "--dtype", "float32")
    folder = tmp_path / "back" / "run_0"
    assert back.out.strip() == str(folder)
    assert run("prior_utils", folder).code == 0
    model = step_skip.load("tiny", model_dir=model_dir)
    own = {"negative_prompt": "Still.", "image": image, "start_step": 6, "progress": False}
    clip = step_skip.infer_from_prior(model, folder, PROMPT, **own)
    assert clip.forwards == 6
    assert torch.allclose(clip.latents, load_latents(read_prior(prior), step_file(9)), atol=1e-4)


def test_steps_that_comfyui_spaces_otherwise_are_told(run, make_prior, tmp_path):
    """simple takes its sigmas out of 1000: of 7 steps they lie elsewhere."""
    from step_skip.comfyui import SIGMAS

    for steps, own in ((10, True), (7, False)):
        sigmas = read_prior(make_prior("--num_inference_steps", str(steps))).metadata.scheduler_sigmas
        assert (simple_sigmas(steps, 5)[:-1] == pytest.approx(sigmas)) == own == (SIGMAS % steps == 0)
    made = make_prior("--num_inference_steps", "7")
    outcome = run("prior_utils", "export", made, "--step", 2, "--output", tmp_path / "own.latent")
    assert "divides 1000" in outcome.err


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"no safetensors", ["is not a .latent file of ComfyUI"]),
        ({"latent_tensor": torch.zeros(1, 16, 2, 4, 4)}, ["latent_format_version_0"]),
        ({"other": torch.zeros(1)}, ["latent_format_version_0, other, expected latent_tensor"]),
        ({"latent_tensor": torch.zeros(1, 4, 8, 8)}, ["[1, 4, 8, 8]", "[1, 16, frames, height, width]"]),
        ({"latent_tensor": torch.full((1, 16, 2, 4, 4), torch.nan)}, ["finite"]),
        (None, ["a.latent"]),
    ],
)
def test_what_is_no_latent_is_refused(run, refused, tmp_path, content, words):
    path = tmp_path / "a.latent"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        mark = {} if words == ["latent_format_version_0"] else {"latent_format_version_0": torch.tensor([])}
        save_file(content | mark, path)
    refused(lambda: run("prior_utils", "import", path, "--output_dir", tmp_path / "made"), *words)


def test_what_cannot_be_exported_is_refused(run, refused, prior_copy, tmp_path):
    output = ("--output", tmp_path / "own.latent")
    refused(lambda: run("prior_utils", "export", prior_copy, "--step", 10, *output), "--step 10", "0 to 9")
    (prior_copy / step_file(3)).unlink()
    refused(lambda: run("prior_utils", "export", prior_copy, "--step", 3, *output), step_file(3))
    (tmp_path / "own.latent").write_text("mine")
    refused(lambda: run("prior_utils", "export", prior_copy, *output), "own.latent exists")


def test_latents_of_another_vae_are_refused(run, make, tmp_path):
    made = make("TI2V", "--num_inference_steps", 2)
    assert made.code == 0, made.err
    outcome = run("prior_utils", "export", made.out.strip())
    assert outcome.code == 2
    assert "48 latent channels" in outcome.error


def test_files_of_two_runs_are_refused(run, refused, tmp_path):
    for name, width in (("a", 4), ("b", 6)):
        save_latent(torch.zeros(1, 16, 2, 4, width), tmp_path / f"{name}.latent")
    paths = [tmp_path / "a.latent", tmp_path / "b.latent"]
    refused(
        lambda: run("prior_utils", "import", *paths, "--output_dir", tmp_path / "made"), "b.latent", "one run"
    )
