"""A clip as a prior for its variations: exact with its own prompt, also in a bank."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from families import image_flags
from helpers import OTHER_PROMPT, PROMPT, Outcome, edit_metadata, read_json

import step_skip
from step_skip.errors import InputError
from step_skip.files.tensors import sha256_tensor
from step_skip.infer.schema import ClipReport
from step_skip.infer.steps import more_steps
from step_skip.method.closeness import FirstLook, fewest_steps, predicted_closeness
from step_skip.method.steps import nearest_steps
from step_skip.prior.prior import Prior

VARIATION = "The portrait rises."


@pytest.fixture
def save(run: Callable[..., Outcome], model_dir: Path) -> Callable[..., Outcome]:
    """infer_from_prior.py --save_prior with another prompt, with the small model."""

    def save(prior: Path, *argv: object) -> Outcome:
        common = ("--prior_dir", prior, "--model_dir", model_dir, "--prompt", OTHER_PROMPT)
        return run("infer_from_prior", *common, "--save_prior", *argv)

    return save


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", ["I2V", "TI2V", "T2V", "T2V-A14B"])
def test_its_own_prompt_gives_the_clip_by_every_number_of_its_steps(
    make, run, folder_of, images, family, dtype
) -> None:
    """The clip by the command line: with a first frame that is fused, no image, two experts."""
    prior = make(family, *image_flags(family, images), "--dtype", dtype).path
    flags = ("--prior_dir", prior, "--model_dir", folder_of(family), "--prompt", OTHER_PROMPT)
    clip = run("infer_from_prior", *flags, "--num_steps", 4, "--save_prior").report
    saved = Path(clip["saved_prior"])
    assert saved.parent == prior.parent
    recorded = read_json(saved / "run_metadata.json")
    assert recorded["latents_sha256"] == clip["latents_sha256"] != read_json(prior / "run_metadata.json")
    assert recorded["kept_steps"] == clip["steps_run"]
    assert f"run_{recorded['run_id']}" == saved.name
    model = step_skip.load("tiny", model_dir=folder_of(family), dtype=dtype)
    for choice in (
        {},
        *({"num_steps": number} for number in (1, 2, 3, 4)),
        {"steps": clip["steps_run"][::2]},
    ):
        again = step_skip.infer_from_prior(model, saved, progress=False, **choice)
        assert sha256_tensor(again.latents) == clip["latents_sha256"], choice
        assert set(again.report["steps_run"]) <= set(clip["steps_run"])
    assert run("infer_from_prior", "--prior_dir", saved, "--verify").code == 0


def test_beside_the_prior_it_followed_it_is_found_and_lets_it_be_found(
    prior_copy, save, run, model_dir
) -> None:
    clip = save(prior_copy).report
    bank = ("--prior_dir", prior_copy, clip["saved_prior"], "--model_dir", model_dir, "--nearest")
    latents = read_json(prior_copy / "run_metadata.json")["latents_sha256"]
    for steps in ((), ("--num_steps", 2), ("--num_steps", "auto")):
        own, its = (
            run("infer_from_prior", *bank, "--prompt", text, *steps) for text in (PROMPT, OTHER_PROMPT)
        )
        assert (own.report["prior_dir"], own.report["latents_sha256"]) == (str(prior_copy), latents)
        assert (its.report["prior_dir"], its.report["latents_sha256"]) == (
            clip["saved_prior"],
            clip["latents_sha256"],
        )


def test_a_variation_starts_with_the_clips_saved_branch_and_is_a_clip_like_others(
    prior_copy, save, run, model_dir
) -> None:
    saved = save(prior_copy).report["saved_prior"]
    varied = ("--prior_dir", saved, "--model_dir", model_dir, "--prompt", VARIATION)
    outcome = run("infer_from_prior", *varied, "--num_steps", 2, "--save_prior")
    assert outcome.report["forwards"] == 3
    assert read_json(Path(outcome.report["saved_prior"]) / "run_metadata.json")["kept_steps"] == [0, 9]
    listed = run("prior_utils", "list", prior_copy.parent)
    assert "3 of 10" in listed.out and "2 of 10" in listed.out


def test_guidance_and_negative_prompt_are_the_clips_own(prior_copy, save, run, model_dir) -> None:
    clip = save(prior_copy, "--cfg_scale", 3, "--negative_prompt", VARIATION).report
    again = run("infer_from_prior", "--prior_dir", clip["saved_prior"], "--model_dir", model_dir).report
    assert (again["cfg_scale"], again["negative_prompt"]) == (3, VARIATION)
    assert again["latents_sha256"] == clip["latents_sha256"]
    unguided = save(prior_copy, "--cfg_scale", 1).report
    again = run("infer_from_prior", "--prior_dir", unguided["saved_prior"], "--model_dir", model_dir).report
    assert again["latents_sha256"] == unguided["latents_sha256"] and again["forwards"] == 3


def test_a_clip_that_is_there_is_made_again_only_for_its_prior(prior_copy, save, run, model_dir) -> None:
    flags = ("--prior_dir", prior_copy, "--model_dir", model_dir, "--prompt", OTHER_PROMPT)
    run("infer_from_prior", *flags)
    first = save(prior_copy)
    assert "nothing to do" not in first.err
    assert "nothing to do" in save(prior_copy).err
    assert len([*prior_copy.parent.glob("run_*")]) == 2
    shutil.rmtree(first.report["saved_prior"])
    assert Path(save(prior_copy).report["saved_prior"]).is_dir()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--start_step", 6), ["differential resume from step 0"]),
        (("--steps", 2, 5), ["begin --steps with 0"]),
        (("--num_steps", "2,3"), ["--save_prior is for one clip"]),
        (("--cfg_scale", 3, 3, 1), ["one --cfg_scale"]),
        (("--tea_cache_l1_thresh", 0.1, "--tea_cache_model_id", "Wan2.1-I2V-14B-480P"), ["TeaCache"]),
        (("--ray",), ["--save_prior", "--ray"]),
    ],
)
def test_what_can_be_no_prior_is_refused_before_it_is_made(prior_copy, save, refused, flags, words) -> None:
    refused(lambda: save(prior_copy, *flags), *words)


def test_a_damaged_image_is_told_before_anything_is_made(prior_copy, save, refused) -> None:
    with (prior_copy / "input_image.png").open("ab") as file:
        file.write(b"more")
    refused(lambda: save(prior_copy), "input_image.png", "damaged")


def test_no_clip_is_lost_when_its_prior_cannot_be_saved(prior_copy, save, monkeypatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("step_skip.infer.as_prior.write_video", full)
    outcome = save(prior_copy)
    assert outcome.code != 0 and "No space left" in outcome.error
    assert len([*(prior_copy / "outputs").glob("*.mp4")]) == 1
    assert [*prior_copy.parent.glob("run_*")] == [prior_copy]
    monkeypatch.undo()
    assert Path(save(prior_copy).report["saved_prior"]).is_dir()


def test_its_own_clip_is_made_no_second_prior_of(prior_copy, run, model_dir) -> None:
    flags = ("--prior_dir", prior_copy, "--model_dir", model_dir, "--save_prior")
    assert run("infer_from_prior", *flags).report["saved_prior"] == str(prior_copy)
    assert [*prior_copy.parent.glob("run_*")] == [prior_copy]


def test_how_its_weights_were_is_the_clips_own(prior_copy, save) -> None:
    edit_metadata(prior_copy, quantize="fp8", skip_cache=2)
    recorded = read_json(
        Path(save(prior_copy, "--quantize", "off").report["saved_prior"]) / "run_metadata.json"
    )
    assert recorded["quantize"] is recorded["skip_cache"] is None


def test_it_is_pruned_to_fewer_of_its_steps_and_more_are_not_proposed(saved, run, model_dir) -> None:
    assert run("prior_utils", "prune", saved, "--num_steps", 2, "--yes").code == 0
    flags = ("--prior_dir", saved, "--model_dir", model_dir, "--prompt", VARIATION)
    report = run("infer_from_prior", *flags).report
    assert report["steps_run"] == [0, 9]
    assert more_steps(ClipReport.model_validate(report)) is None


@pytest.fixture
def saved(prior_copy: Path, save: Callable[..., Outcome]) -> str:
    """A clip's prior; made before loads are counted."""
    return save(prior_copy).report["saved_prior"]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--start_step", 6), "made of a clip"),
        (("--start_step", "auto"), "made of a clip"),
        (("--sigmas", 0.9, 0.5), "made of a clip"),
        (("--num_steps", 4), "only 3 steps left, 0, 6, 9"),
        (("--steps", 0, 5), "0, 6, 9"),
    ],
)
def test_what_a_clips_prior_lacks_is_refused(saved, run, model_dir, refused, flags, words) -> None:
    given = ("--prior_dir", saved, "--model_dir", model_dir, "--prompt", VARIATION)
    refused(lambda: run("infer_from_prior", *given, *flags), words)


def test_from_python_only_a_differential_clip_becomes_one(
    prior: Path, model_dir: Path, tmp_path: Path
) -> None:
    model = step_skip.load("tiny", model_dir=model_dir)
    clip = step_skip.infer_from_prior(model, prior, OTHER_PROMPT, progress=False)
    saved = clip.save_prior(tmp_path, run_id="hers")
    assert isinstance(saved, Prior) and saved.directory == tmp_path / "run_hers"
    again = step_skip.infer_from_prior(model, saved, num_steps=1, progress=False)
    assert sha256_tensor(again.latents) == sha256_tensor(clip.latents) and again.forwards == 1
    resumed = step_skip.infer_from_prior(model, prior, OTHER_PROMPT, start_step=8, progress=False)
    with pytest.raises(InputError, match="differential"):
        resumed.save_prior(tmp_path)


def test_what_follows_a_clip_is_predicted_to_come_no_nearer_than_it() -> None:
    assert predicted_closeness(0, 1, own=38) == 38
    assert predicted_closeness(0.3, 4, own=38) < 38 < predicted_closeness(0.3, 4)
    assert fewest_steps(0.3, (1, 2, 4), 30, own=38) == fewest_steps(0.3, (1, 2, 4), 30)
    assert FirstLook([{}, {}]).own == [float("inf")] * 2


def test_steps_that_are_kept_stand_in_for_the_usual_ones() -> None:
    kept = [0, 19, 35, 45]
    assert nearest_steps([0], kept) == [0] and nearest_steps([0, 38], kept) == [0, 35]
    assert nearest_steps([0, 44, 45, 46], kept) == kept
    assert nearest_steps([0, 1, 2], kept) == [0, 19, 35]
