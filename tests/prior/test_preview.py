"""--preview: what a step points at, in colours, without the VAE."""

from __future__ import annotations

import numpy as np
import torch
from helpers import OTHER_PROMPT
from PIL import Image, ImageSequence

import step_skip
from step_skip.models.loading import load
from step_skip.prior.metadata import read_prior
from step_skip.prior.preview import draw, fit_colours


def test_a_linear_map_is_found_and_drawn():
    """Colours that are linear in the latents come out as they are."""
    latents = torch.rand(16, 12, 20, generator=torch.Generator().manual_seed(0))
    true = torch.rand(17, 3, generator=torch.Generator().manual_seed(1)) / 17
    colours = (latents.flatten(1).T @ true[:-1] + true[-1]).reshape(12, 20, 3)
    image = Image.fromarray(colours.mul(255).round().byte().numpy())
    found = fit_colours(latents, image.resize((160, 96), Image.Resampling.NEAREST))
    assert torch.allclose(found, true, atol=0.01)
    [picture] = draw(latents[None, :, None], found)
    assert picture.size == (260, 156)
    centres = np.asarray(picture)[6::13, 6::13] / 255
    assert np.abs(centres - colours.numpy()).max() < 0.03


def frames_of(path) -> int:
    with Image.open(path) as picture:
        return sum(1 for _ in ImageSequence.Iterator(picture))


def test_both_scripts(generate, infer, image, tmp_path):
    made = generate("--image", image, "--num_inference_steps", 3, "--preview")
    assert frames_of(made.path / "preview.webp") == 3  # latent frames of 9
    flags = ("--prompt", OTHER_PROMPT, "--num_steps", 2)
    shown = infer(made.path, *flags, "--preview", "--output", tmp_path / "shown.mp4")
    assert frames_of(tmp_path / "shown.webp") == 3
    plain = infer(made.path, *flags, "--output", tmp_path / "plain.mp4")
    assert not (tmp_path / "plain.webp").exists()
    assert shown.report["latents_sha256"] == plain.report["latents_sha256"]


def test_a_sweep_shows_each_of_its_clips(prior_copy, infer, tmp_path):
    flags = ("--prompt", OTHER_PROMPT, "She speaks.", "--num_steps", 1, "--preview")
    folder = infer(prior_copy, *flags, "--output_dir", tmp_path / "sweep").path
    assert {path.stem for path in folder.glob("*.webp")} == {path.stem for path in folder.glob("*.mp4")}
    assert len(list(folder.glob("*.webp"))) == 2


def test_it_is_written_after_every_step_from_python_too(prior_copy, model_dir, tmp_path):
    model = load("tiny", device="cpu", model_dir=model_dir)
    show = step_skip.preview_to(read_prior(prior_copy), tmp_path / "preview.webp")
    seen = []

    def callback(*step):
        show(*step)
        seen.append((tmp_path / "preview.webp").read_bytes())

    step_skip.infer_from_prior(model, prior_copy, OTHER_PROMPT, num_steps=3, callback_on_step_end=callback)
    assert len(set(seen)) == 3


def test_a_prior_that_was_cut_short_shows_the_rest(generate, run, image, model_dir):
    made = generate("--image", image, "--num_inference_steps", 3, "--stop_after", 0)
    flags = ("--model_dir", model_dir, "--preview")
    assert run("generate_prior", "--resume", made.path, *flags).code == 0
    assert frames_of(made.path / "preview.webp") == 3


def test_without_an_image_there_are_no_colours(make, refused, run, folder_of, older_prior, infer, image):
    refused(lambda: make("T2V", "--preview"), "--preview takes its colours from an image")
    scene = make("T2V", "--num_inference_steps", 1).path
    flags = ("--prior_dir", scene, "--model_dir", folder_of("T2V"), "--preview")
    outcome = run("infer_from_prior", *flags)
    assert outcome.code == 2 and "holds none: leave it out" in outcome.error
    outcome = infer(older_prior, "--model", "tiny", "--image", image, "--prompt", OTHER_PROMPT, "--preview")
    assert outcome.code == 2 and "--preview" in outcome.error
