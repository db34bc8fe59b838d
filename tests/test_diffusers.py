"""The method on diffusers' WanImageToVideoPipeline: exact there, near to DiffSynth's on the same weights."""

from __future__ import annotations

import inspect
import sys

import pytest
import torch
from conftest import MODEL_CONFIG, build_model
from helpers import FRAMES, PROMPT, ROOT, SIZE

import step_skip
from prior_utils import verify
from step_skip import InputError, comfyui
from step_skip.prior.files import load_latents
from step_skip.prior.prior import noise_pred_file, noise_pred_nega_file, step_file

pytest.importorskip("diffusers")
sys.path.insert(0, str(ROOT / "integrations" / "diffusers"))

from diffusers import AutoencoderKLWan
from embedded import embedded_pipeline

from step_skip.diffusers import generate_prior, infer_from_prior

NEW = "she moves to the left"
SETTINGS = {
    **{"height": SIZE, "width": SIZE, "num_frames": FRAMES, "fps": 8},
    **{"cfg_scale": 5.0, "negative_prompt": "Still.", "num_inference_steps": 6},
}
NEAR = 1e-4  # float32, latents of about 1: two implementations of one network


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    """A small untrained model whose images have 257 tokens: DiffSynth's network takes that for granted."""
    encoder = MODEL_CONFIG["image_encoder"] | {"image_size": 128}
    return build_model(tmp_path_factory.mktemp("model"), config=MODEL_CONFIG | {"image_encoder": encoder})


@pytest.fixture(scope="module")
def pipe(model_dir):
    """The same as diffusers has it."""
    return embedded_pipeline(model_dir)


@pytest.fixture(scope="module")
def own_prior(pipe, image, tmp_path_factory):
    """A prior made by it; tests only read it."""
    return generate_prior(pipe, image, PROMPT, output_dir=tmp_path_factory.mktemp("own"), **SETTINGS)


@pytest.fixture(scope="module")
def diffsynth(model_dir):
    """The same weights in DiffSynth's pipeline."""
    return step_skip.load("tiny", model_dir=model_dir).pipe


@pytest.fixture(scope="module")
def diffsynth_prior(diffsynth, image, tmp_path_factory):
    """The same prior made by that."""
    own = {"output_dir": tmp_path_factory.mktemp("diffsynth"), "progress": False, **SETTINGS}
    return step_skip.generate_prior(diffsynth, image, PROMPT, **own)


def clean(prior) -> torch.Tensor:
    return load_latents(prior, step_file(prior.num_inference_steps - 1))


def apart(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).abs().max())


@pytest.mark.parametrize(
    "steps", [{}, {"num_steps": 1}, {"steps": [0, 2, 5]}, {"start_step": "auto"}, {"start_step": 5}]
)
def test_own_prompt_gives_own_latents(pipe, own_prior, steps):
    clip = infer_from_prior(pipe, own_prior, **steps)
    assert torch.equal(clip.latents, clean(own_prior))
    assert len(clip.frames) == FRAMES
    assert clip.forwards == 2 * len(clip.steps)


def test_pipeline_is_left_as_it_was(pipe, own_prior):
    before, hooks = pipe.scheduler, dict(pipe.transformer._forward_hooks)
    infer_from_prior(pipe, own_prior, NEW, num_steps=1)
    assert pipe.scheduler is before
    assert dict(pipe.transformer._forward_hooks) == hooks == {}


@pytest.mark.parametrize("steps", [{"num_steps": 3}, {"num_steps": 1}, {"start_step": 2}, {"start_step": 0}])
def test_new_prompt_is_near_diffsynths(pipe, diffsynth, own_prior, steps):
    ours = step_skip.infer_from_prior(diffsynth, own_prior, NEW, progress=False, **steps)
    theirs = infer_from_prior(pipe, own_prior, NEW, **steps)
    assert theirs.steps == ours.report["steps_run"]
    assert apart(theirs.latents, ours.latents) < NEAR
    assert apart(theirs.latents, clean(own_prior)) > 100 * NEAR  # the prompt says something


def test_prior_is_whole_and_diffsynth_runs_its_steps_alike(pipe, diffsynth, own_prior):
    """DiffSynth, given its first latents and its conditioning, goes the same way."""
    verify([own_prior.directory])
    assert own_prior.metadata.forwards == 12
    assert len(own_prior.metadata.formation.text_moves) == 6
    rest = step_skip.infer_from_prior(diffsynth, own_prior, start_step=0, progress=False)
    assert apart(rest.latents, clean(own_prior)) < NEAR


def test_conditioning_is_near_diffsynths(own_prior, diffsynth_prior):
    """Noise and prompts alike; of the image diffusers' processor makes 8-bit pixels before it is encoded."""
    priors = (own_prior, diffsynth_prior)
    differences = {
        name: apart(*(torch.load(each.directory / name, weights_only=True) for each in priors))
        for name in own_prior.metadata.files
        if name.startswith(("initial", "context", "y", "clip"))
    }
    assert differences.pop("initial_latents.pt") == 0
    assert differences.pop("clip_feature.pt") < 0.2
    assert len(differences) == 3
    assert max(differences.values()) < 1e-5


def test_prior_of_diffsynth(pipe, diffsynth, diffsynth_prior):
    """Followed by both: only the encoded image differs, by what the 8-bit pixels make."""
    ours = step_skip.infer_from_prior(diffsynth, diffsynth_prior, NEW, num_steps=3, progress=False)
    theirs = infer_from_prior(pipe, diffsynth_prior, NEW, num_steps=3)
    assert theirs.steps == [0, 3, 5]
    new = apart(ours.latents, clean(diffsynth_prior))
    assert apart(theirs.latents, ours.latents) < new / 10
    assert torch.equal(infer_from_prior(pipe, diffsynth_prior, start_step=5).latents, clean(diffsynth_prior))


def test_half_precision_network_is_exact_too(model_dir, image, tmp_path):
    pipe = embedded_pipeline(model_dir)
    pipe.transformer.to(torch.bfloat16)
    prior = generate_prior(pipe, image, PROMPT, output_dir=tmp_path, **SETTINGS)
    velocity, nega = (load_latents(prior, name(0)) for name in (noise_pred_file, noise_pred_nega_file))
    assert velocity.dtype == nega.dtype == clean(prior).dtype == torch.float32
    assert torch.equal(velocity, velocity.bfloat16().float())
    assert torch.equal(infer_from_prior(pipe, prior, num_steps=2).latents, clean(prior))


def test_without_guidance(pipe, image, tmp_path):
    prior = generate_prior(pipe, image, PROMPT, output_dir=tmp_path, **SETTINGS | {"cfg_scale": 1.0})
    assert prior.metadata.forwards == 6
    assert torch.equal(infer_from_prior(pipe, prior, num_steps=2).latents, clean(prior))


@pytest.mark.parametrize(
    ("choices", "words"),
    [
        ({"stop_after": 2}, ["stop_after", "leave it out"]),
        ({"cfg_scale": 0.5}, ["cfg_scale 0.5", "1 or above"]),
        ({"num_inference_steps": 0}, ["--num_inference_steps 0"]),
        ({"fit": "squeeze"}, ["--fit squeeze"]),
    ],
)
def test_refused_before_it_begins(pipe, image, tmp_path, choices, words):
    with pytest.raises(InputError) as refused:
        generate_prior(pipe, image, PROMPT, output_dir=tmp_path / "none", **SETTINGS | choices)
    assert all(word in str(refused.value) for word in words)
    assert not (tmp_path / "none").exists()


def test_other_pipelines_and_weights_are_refused(pipe, own_prior, model_dir):
    other = embedded_pipeline(model_dir)
    other.transformer.proj_out.bias += 1
    with pytest.raises(InputError, match="not those the prior was made with"):
        infer_from_prior(other, own_prior, NEW)
    other.transformer_2 = other.transformer
    with pytest.raises(InputError, match="expected a WanImageToVideoPipeline of Wan2.1"):
        infer_from_prior(other, own_prior, NEW)
    with pytest.raises(InputError, match="auto"):
        infer_from_prior(pipe, own_prior, num_steps="auto")
    with pytest.raises(InputError, match="--steps"):
        infer_from_prior(pipe, own_prior, NEW, steps=[7])


def test_latent_statistics_written_down_for_comfyui_are_those_of_the_vae():
    defaults = inspect.signature(AutoencoderKLWan.__init__).parameters
    assert list(comfyui.MEAN) == defaults["latents_mean"].default
    assert list(comfyui.STD) == defaults["latents_std"].default
