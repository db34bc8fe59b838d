"""Every kind of the Wan family, on small random models: exact at every step, with the images it takes."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
import torch
from families import SIZES, image_flags
from helpers import OTHER_PROMPT, PROMPT, edit_metadata, read_json

import step_skip
from step_skip.errors import InputError
from step_skip.files.tensors import sha256_tensor
from step_skip.models.families import FAMILIES, MODELS
from step_skip.models.loading import family_of_pipe

# with every image it may have; TI2V without one, too
CASES = [(name, family.image != "none") for name, family in FAMILIES.items()] + [("TI2V", False)]
IDS = [f"{name}{'' if image else ' without image'}" for name, image in CASES]
EXACT = [{"start_step": step} for step in range(10)] + [{"steps": each} for each in ((0, 5, 8), (1, 7))]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("family", "with_image"), CASES, ids=IDS)
def test_own_prompt_is_exact_from_every_step_and_differentially(
    make, run, folder_of, images, tmp_path, family, with_image, dtype
):
    """Prior and one clip by the command line, the others by the function."""
    folder = folder_of(family)
    prior = make(family, *image_flags(family, images, with_image=with_image), "--dtype", dtype).path
    expected = read_json(prior / "run_metadata.json")["latents_sha256"]
    clip = (
        "infer_from_prior",
        "--prior_dir",
        prior,
        "--model_dir",
        folder,
        "--output",
        tmp_path / "clip.mp4",
    )
    assert run(*clip).report["latents_sha256"] == expected
    model = step_skip.load("tiny", model_dir=folder, dtype=dtype)
    infer = functools.partial(step_skip.infer_from_prior, model, prior, progress=False)
    for choice in EXACT:
        assert sha256_tensor(infer(**choice).latents) == expected, choice
    assert sha256_tensor(infer(OTHER_PROMPT).latents) != expected


@pytest.mark.parametrize(("family", "with_image"), CASES, ids=IDS)
def test_a_prior_holds_what_its_family_takes(make, run, images, tmp_path, family, with_image):
    kind, size = FAMILIES[family], SIZES[family]
    flags = image_flags(family, images, with_image=with_image)
    prior = make(family, *flags, "--num_inference_steps", 1).path
    metadata = read_json(prior / "run_metadata.json")
    conditioning = {f"{name}.pt" for name in kind.conditioning} if with_image else set()
    assert {
        name for name in metadata["files"] if name in ("y.pt", "clip_feature.pt", "first_frame_latents.pt")
    } == (conditioning)
    taken = {"input_image.png": "--image" in flags, "end_image.png": "--end_image" in flags}
    assert {name: name in metadata["files"] for name in taken} == taken
    latent = size // kind.spatial_factor
    assert metadata["shapes"]["step_0000.pt"] == [1, kind.latent_channels, 2, latent, latent]
    assert metadata["family"] == family
    assert run("infer_from_prior", "--prior_dir", prior, "--verify").code == 0


def test_a_first_frame_that_is_fused_moves_in_no_branch(make, images):
    prior = make("TI2V", *image_flags("TI2V", images), "--num_inference_steps", 2).path
    first = torch.load(prior / "first_frame_latents.pt", weights_only=True)
    for step in range(2):
        tensors = {
            name: torch.load(prior / f"{name}_{step:04d}.pt", weights_only=True)
            for name in ("step", "noise_pred", "noise_pred_nega")
        }
        assert torch.equal(tensors["step"][:, :, :1], first)
        for name in ("noise_pred", "noise_pred_nega"):
            assert not tensors[name][:, :, :1].any() and tensors[name][:, :, 1:].any()


def test_an_end_image_that_may_be_left_out_makes_another_prior(make, images):
    flags = ("--image", images["--image"], "--num_inference_steps", 1)
    with_end, without = (
        make("InP", *flags, "--end_image", images["--end_image"]).path,
        make("InP", *flags).path,
    )
    found = [read_json(prior / "run_metadata.json") for prior in (with_end, without)]
    assert found[0]["latents_sha256"] != found[1]["latents_sha256"]
    assert ["end_image.png" in each["files"] for each in found] == [True, False]


def test_a_scene_for_each_prompt_where_there_is_no_image(make):
    outcome = make("T2V", "--prompt", PROMPT, OTHER_PROMPT, "--num_inference_steps", 1)
    assert outcome.code == 0, outcome.err
    prompts = [read_json(Path(line) / "run_metadata.json")["prompt"] for line in outcome.out.splitlines()]
    assert prompts == [PROMPT, OTHER_PROMPT]


@pytest.mark.parametrize(
    ("family", "flags", "words"),
    [
        ("T2V", ("--image",), ["--image: tiny takes no first frame", "leave it out", "I2V-480P"]),
        ("I2V", (), ["--image is missing: tiny needs a first frame", "T2V-1.3B"]),
        ("I2V", ("--image", "--end_image"), ["--end_image: tiny takes no last frame", "FLF2V-14B"]),
        ("FLF2V", ("--image",), ["--end_image is missing: tiny needs a last frame", "I2V-480P"]),
        ("FLF2V", ("--end_image",), ["--image is missing"]),
    ],
)
def test_the_wrong_images_are_refused(make, refused, images, family, flags, words):
    given = [word for flag in flags for word in (flag, images[flag])]
    refused(lambda: make(family, *given), *words)


@pytest.mark.parametrize("model", MODELS)
def test_the_wrong_images_of_a_published_model_are_refused_before_all_else(
    run, refused, images, tmp_path, model
):
    family = FAMILIES[MODELS[model].family]
    right = image_flags(MODELS[model].family, images)
    wrong = [] if family.image == "required" else [*right, "--image", images["--image"]]
    if family.image == "optional":
        wrong = [*right, "--end_image", images["--end_image"]]
    command = ("generate_prior", "--model", model, "--output_dir", tmp_path / "priors")
    refused(
        lambda: run(*command, *wrong), f"{model} ", "--image" if "--end_image" not in wrong else "--end_image"
    )


def test_an_image_says_nothing_of_a_prior_without_one(make, run, images):
    prior = make("T2V", "--num_inference_steps", 1).path
    outcome = run("infer_from_prior", "--prior_dir", prior, "--image", images["--image"])
    assert outcome.code == 2
    assert "was made without an image; leave the flag out" in outcome.error


@pytest.mark.parametrize(
    ("family", "lost"), [("FLF2V", "clip_feature.pt"), ("TI2V", "first_frame_latents.pt")]
)
def test_what_is_lost_of_the_images_is_made_again(make, run, folder_of, images, family, lost):
    prior = make(family, *image_flags(family, images), "--num_inference_steps", 2).path
    before = (prior / lost).read_bytes()
    (prior / lost).unlink()
    assert run("generate_prior", "--resume", prior, "--model_dir", folder_of(family)).code == 0
    assert (prior / lost).read_bytes() == before


@pytest.mark.parametrize("family", FAMILIES)
def test_somebodys_own_pipeline_is_known_by_what_it_takes(folder_of, tmp_path, family):
    """Wan2.1's I2V and Fun's InP are one network; the second may have a last frame."""
    pipe = step_skip.load("tiny", model_dir=folder_of(family)).pipe
    assert family_of_pipe(pipe) == ("InP" if family == "I2V" else family)
    pipe.vae.z_dim = 7
    with pytest.raises(InputError, match="load such a model"):
        step_skip.generate_prior(pipe, output_dir=tmp_path)


def test_a_family_that_is_not_known_is_refused(make, run, folder_of):
    prior = make("T2V", "--num_inference_steps", 1).path
    edit_metadata(prior, family="T9V")
    outcome = run("infer_from_prior", "--prior_dir", prior, "--model_dir", folder_of("T2V"))
    assert outcome.code == 2
    assert "has family = 'T9V', expected one of T2V" in outcome.error
