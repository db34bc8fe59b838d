"""The flags of cheaper steps on both scripts: what runs, what is recorded, what is refused before loading."""

from __future__ import annotations

import os
import shutil
import signal

import pytest
import torch
from helpers import OTHER_PROMPT, PROMPT, edit_metadata, read_json
from safetensors.torch import save_file

import infer_from_prior
from step_skip.cli.prompts import read_choices
from step_skip.infer.clip import between
from step_skip.infer.inputs import load_inputs
from step_skip.infer.plan import latents_files, part_of_step
from step_skip.models.lora import describe_loras
from step_skip.models.lora_file import Lora
from step_skip.prior.metadata import read_prior
from step_skip.sweep.clips import Group, Job, make_plans

BLOCKS = 4  # of the tests' DiT


def sha256(prior):
    return read_json(prior / "run_metadata.json")["latents_sha256"]


@pytest.fixture
def lora_file(tmp_path_factory):
    """A LoRA of random matrices for two layers."""
    generator, weights = torch.Generator().manual_seed(0), {}
    for layer, (outputs, inputs) in {"blocks.0.self_attn.q": (48, 48), "blocks.1.ffn.0": (64, 48)}.items():
        weights[f"{layer}.lora_A.weight"] = torch.randn(2, inputs, generator=generator)
        weights[f"{layer}.lora_B.weight"] = torch.randn(outputs, 2, generator=generator)
    path = tmp_path_factory.mktemp("lora") / "random.safetensors"
    save_file(weights, path)
    return path


# --- skip_cache and TeaCache --------------------------------------------------------------------------------


def test_skip_cache_runs_fewer_blocks_and_is_recorded(prior, infer, tmp_path):
    plain = infer(prior, "--output", tmp_path / "plain.mp4").report
    assert (plain["skip_cache"], plain["block_evaluations"]) == (None, 5 * BLOCKS)
    cached = infer(prior, "--skip_cache", 2, "--output", tmp_path / "cached.mp4").report
    assert (cached["skip_cache"], cached["forwards"]) == (2, 6)
    assert cached["block_evaluations"] == 2 * (2 * BLOCKS + 2)
    assert cached["latents_sha256"] != plain["latents_sha256"] == sha256(prior)


def test_skip_cache_of_a_differential_resume(prior, infer, tmp_path):
    flags = ("--steps", 0, 5, 8, "--prompt", OTHER_PROMPT, "--skip_cache", 3)
    report = infer(prior, *flags, "--output", tmp_path / "video.mp4").report
    assert report["block_evaluations"] == 2 * (BLOCKS + 2 + 2)


@pytest.mark.parametrize("value", ["1", "0", "-2", "x"])
def test_no_period_of_full_steps(prior, infer, refused, value):
    refused(lambda: infer(prior, "--skip_cache", value), "--skip_cache")


def test_a_model_without_coefficients_for_tea_cache_is_refused_by_name(prior, infer, refused):
    refused(lambda: infer(prior, "--tea_cache_l1_thresh", 0.1), "no coefficients for tiny", "Wan2.1-I2V")
    other = ("--tea_cache_l1_thresh", 0.1, "--tea_cache_model_id", "Wan9")
    refused(lambda: infer(prior, *other), "no coefficients for Wan9")
    refused(lambda: infer(prior, *other[2:]), "--tea_cache_l1_thresh")
    refused(lambda: infer(prior, *other[:2], "--skip_cache", 2), "give one of them")


def test_tea_cache_with_the_coefficients_of_another_model(prior, infer, tmp_path):
    flags = ("--tea_cache_l1_thresh", 1e9, "--tea_cache_model_id", "Wan2.1-I2V-14B-480P")
    report = infer(prior, "--start_step", 4, *flags, "--output", tmp_path / "video.mp4").report
    assert (report["forwards"], report["block_evaluations"]) == (10, 2 * 2 * BLOCKS)
    assert report["tea_cache_l1_thresh"] == 1e9


def test_a_prior_made_with_skip_cache_is_exact_where_a_full_step_is_due(generate, infer, image, tmp_path):
    made = generate("--image", image, "--skip_cache", 2).path
    assert read_json(made / "run_metadata.json")["skip_cache"] == 2
    for step, flags, exact in (
        (5, ("--skip_cache", 2), True),
        (6, ("--skip_cache", 2), False),
        (5, (), False),
    ):
        path = tmp_path / f"{step}{len(flags)}.mp4"
        outcome = infer(made, "--start_step", step, *flags, "--output", path)
        assert (outcome.report["latents_sha256"] == sha256(made)) == exact
        assert ("made with --skip_cache 2" in outcome.err) == (not flags)


def write_branch(folder, seed):
    generator = torch.Generator().manual_seed(seed)
    tensors = {"weight": torch.randn(1, 48, 96, generator=generator), "bias": torch.zeros(1, 48)}
    save_file(tensors, folder / "skip_branch.safetensors")


def test_the_branch_is_one_of_the_weights_where_skip_cache_uses_it(run, model_dir, image, loads, tmp_path):
    folder = shutil.copytree(model_dir, tmp_path / "model")
    write_branch(folder, 0)
    made = ("--model", "tiny", "--model_dir", folder, "--image", image, "--output_dir", tmp_path / "priors")
    plain = run("generate_prior", *made).path
    cached = run("generate_prior", *made, "--skip_cache", 2).path
    assert sha256(plain) != sha256(cached)
    assert [
        sorted(read_json(each / "run_metadata.json")["model_fingerprint"]) for each in (plain, cached)
    ] == [
        ["dit", "image_encoder", "text_encoder", "vae"],
        ["dit", "image_encoder", "skip_branch", "text_encoder", "vae"],
    ]

    def resumed(prior, *flags):
        command = ("--prior_dir", prior, "--model_dir", folder, "--start_step", 5, *flags)
        return run("infer_from_prior", *command, "--output", tmp_path / "x.mp4", "--overwrite")

    assert resumed(cached, "--skip_cache", 2).report["latents_sha256"] == sha256(cached)
    without = run("generate_prior", *made[:2], "--model_dir", model_dir, *made[4:], "--skip_cache", 2).path
    assert sha256(without) != sha256(cached)
    sweep = ("--prior_dir", plain, cached, "--model_dir", folder, "--start_step", 5, "--skip_cache", 2)
    assert run("infer_from_prior", *sweep, "--output_dir", tmp_path / "sweep").code == 0
    write_branch(folder, 1)
    loads.clear()
    assert "the skip_branch weights are not those" in resumed(cached, "--skip_cache", 2).error
    (folder / "skip_branch.safetensors").unlink()
    assert "the skip_branch weights are not those" in resumed(cached, "--skip_cache", 2).error
    assert not loads
    assert resumed(cached).code == 0  # without the cache the branch is of no use
    assert resumed(plain).report["latents_sha256"] == sha256(plain)
    assert resumed(plain, "--skip_cache", 2).code == 0


def test_a_draft_with_cheaper_steps_is_finished_as_if_it_had_not_stopped(
    run, generate, image, model_dir, lora_file
):
    flags = ("--image", image, "--skip_cache", 2, "--lora", lora_file)
    whole, draft = generate(*flags).path, generate(*flags, "--stop_after", 2).path
    assert run("generate_prior", "--resume", draft, "--model_dir", model_dir).path == draft
    assert sha256(draft) == sha256(whole)


def test_generate_prior_refuses_what_no_run_could_use(generate, image, lora_file, refused):
    refused(lambda: generate("--image", image, "--tea_cache_l1_thresh", 1), "no coefficients for tiny")
    refused(lambda: generate("--image", image, "--skip_cache", 1), "--skip_cache")
    refused(lambda: generate("--image", image, "--lora", image), "not a safetensors file")


# --- guidance by step ---------------------------------------------------------------------------------------


def test_guidance_by_step(prior, infer, tmp_path):
    report = infer(prior, "--cfg_scale", 5, 5, 1, "--output", tmp_path / "video.mp4").report
    assert (report["cfg_scale"], report["forwards"]) == ([5, 5, 1], 4)
    same = infer(prior, "--cfg_scale", 5, 5, 5, "--output", tmp_path / "same.mp4").report
    assert (same["cfg_scale"], same["latents_sha256"]) == (5, sha256(prior))


def test_as_many_guidances_as_steps(prior, infer, refused):
    refused(lambda: infer(prior, "--cfg_scale", 5, 1), "2 values, and 3 steps run")


# --- other sigmas -------------------------------------------------------------------------------------------


def test_the_priors_own_sigmas_give_its_own_video(prior, infer, tmp_path):
    sigmas = read_json(prior / "run_metadata.json")["scheduler_sigmas"]
    for begin in (0, 7):
        path = tmp_path / f"{begin}.mp4"
        report = infer(prior, "--sigmas", *sigmas[begin:], "--output", path).report
        assert report["latents_sha256"] == sha256(prior)
        assert report["sigmas"] == pytest.approx(sigmas[begin:])
        assert report["steps_run"] == list(range(10 - begin))


@pytest.mark.parametrize(("sigma", "step"), [(0.99, 0), (0.9, 3), (0.2, 9)])
def test_sigmas_begin_on_the_straight_line_between_two_steps(prior, sigma, step):
    args = infer_from_prior.parse_args(["--prior_dir", str(prior), "--sigmas", str(sigma), "0.1"])
    recorded = read_prior(prior)
    (plan,) = make_plans(recorded, read_choices(args)).values()
    assert plan.start_step == step - 1
    group = Group(prior=recorded, jobs=[Job(recorded, plan)])
    load_inputs(group, group.plans)
    ends = [group.inputs.tensors[name] for name in latents_files(plan, recorded)]
    begin = between(ends[0], ends[-1], part_of_step(plan, recorded))
    noise_pred = torch.load(prior / f"noise_pred_{step:04d}.pt", weights_only=True)
    expected = ends[0] + (sigma - recorded.metadata["scheduler_sigmas"][step]) * noise_pred
    torch.testing.assert_close(begin, expected, atol=1e-5, rtol=0)


def test_sigmas_that_no_run_could_follow(prior, infer, refused, older_prior):
    refused(lambda: infer(prior, "--sigmas", 0.5, 0.5), "expected decreasing values")
    refused(lambda: infer(prior, "--sigmas", 0.5, 0.7), "expected decreasing values")
    refused(lambda: infer(prior, "--sigmas", 1.5), "--sigmas")
    refused(lambda: infer(prior, "--sigmas", 0.5, 0), "--sigmas")
    refused(lambda: infer(prior, "--sigmas", 0.5, "--start_step", 3), "not allowed with")


def test_an_older_prior_begins_after_its_first_step(older_prior, image, infer, refused, tmp_path):
    flags = (
        "--image",
        image,
        "--prompt",
        OTHER_PROMPT,
        "--model",
        "tiny",
        "--output",
        tmp_path / "video.mp4",
    )
    refused(lambda: infer(older_prior, "--sigmas", 0.99, *flags), "begin at 0.97")
    assert infer(older_prior, "--sigmas", 0.95, 0.5, *flags).report["steps_run"] == [0, 1]


@pytest.fixture(scope="module")
def draft(make_prior):
    """A prior whose last latents are at sigma 0.882."""
    return make_prior("--stop_after", "3")


def test_a_draft_holds_the_path_down_to_where_it_was_stopped(draft, infer, refused, tmp_path):
    refused(lambda: infer(draft, "--sigmas", 0.88, 0.5), "stopped after step 3", "begin at 0.882353 or above")


def test_a_draft_begins_where_it_holds_the_path(draft, infer, tmp_path):
    path = tmp_path / "video.mp4"
    assert infer(draft, "--sigmas", 0.9, 0.5, "--output", path).report["steps_run"] == [0, 1]


def test_a_tail_of_no_step_or_after_none(prior, infer, refused):
    refused(lambda: infer(prior, "--steps", 0, 5, "--num_steps_after", 2), "give --start_step")
    refused(lambda: infer(prior, "--start_step", 9, "--num_steps_after", 2), "step 9 is the prior's last")


def test_a_tail_spaced_anew(prior, infer, tmp_path):
    flags = ("--start_step", 6, "--num_steps_after")
    same = infer(prior, *flags, 3, "--output", tmp_path / "same.mp4").report
    assert (same["latents_sha256"], same["steps_run"]) == (sha256(prior), [7, 8, 9])
    report = infer(prior, *flags, 2, "--output", tmp_path / "two.mp4").report
    assert (report["steps_run"], report["forwards"]) == ([0, 1], 4)
    assert report["sigmas"] == pytest.approx([1.5 / 2.2, 0.75 / 1.6])  # s = .3, .15


# --- LoRAs --------------------------------------------------------------------------------------------------


def test_a_resumed_run_may_have_another_lora_than_its_prior(prior, infer, lora_file, tmp_path):
    outcome = infer(prior, "--lora", f"{lora_file}:0.5", "--cfg_scale", 1, "--output", tmp_path / "video.mp4")
    report = outcome.report
    assert [(each["path"], each["alpha"]) for each in report["lora"]] == [(str(lora_file), 0.5)]
    assert report["prior_lora"] == []
    assert "random.safetensors:0.5" in outcome.err and "the prior was made with no LoRA" in outcome.err
    plain = infer(prior, "--cfg_scale", 1, "--output", tmp_path / "plain.mp4")
    assert plain.report["latents_sha256"] != report["latents_sha256"]
    assert "LoRA" not in plain.err


def test_a_priors_lora_goes_with_it(generate, infer, image, lora_file, tmp_path):
    made = generate("--image", image, "--prompt", PROMPT, "--lora", f"{lora_file}:0.5").path
    plain = generate("--image", image, "--prompt", PROMPT).path
    assert sha256(made) != sha256(plain)
    for method in (("--start_step", 6), ("--steps", 0, 5)):
        outcome = infer(made, *method, "--output", tmp_path / f"{method[0]}.mp4")
        assert outcome.report["latents_sha256"] == sha256(made)
        assert outcome.report["lora"] == outcome.report["prior_lora"] != []
        assert "the prior was made with" not in outcome.err
    without = infer(made, "--lora", "--output", tmp_path / "without.mp4")
    assert without.report["lora"] == [] and "runs with no LoRA" in without.err
    assert without.report["latents_sha256"] != sha256(made)


def test_a_priors_lora_that_is_gone_or_another_is_refused(prior_copy, infer, lora_file, refused):
    described = describe_loras([Lora(lora_file, 0.5)])
    edit_metadata(prior_copy, lora=described)
    lora_file.write_bytes(lora_file.read_bytes()[:-4] + b"else")
    refused(lambda: infer(prior_copy), "another", "--lora")
    lora_file.unlink()
    refused(lambda: infer(prior_copy), "no such file", "--lora without a file")
    edit_metadata(prior_copy, lora="some")
    refused(lambda: infer(prior_copy), "as a LoRA")


@pytest.mark.parametrize("kind", ["other name", "relative", "pipe", "folder", "sparse"])
def test_a_recorded_path_that_is_no_lora_is_never_opened(
    prior_copy, infer, run, model_dir, lora_file, refused, tmp_path_factory, monkeypatch, kind
):
    """Not by a run, still less where nothing would be loaded: a stranger may have named any path."""
    path = tmp_path_factory.mktemp("home") / ("passwd" if kind == "other name" else "a.safetensors")
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.write_bytes(b"secret")
    if kind == "sparse":
        os.truncate(path, 2**40)
    recorded = describe_loras([Lora(lora_file)])[0] | {"path": path.name if kind == "relative" else str(path)}
    edit_metadata(prior_copy, lora=[recorded])
    monkeypatch.chdir(path.parent)
    signal.alarm(100)
    words = {"other name": "a .safetensors file", "relative": "a .safetensors file", "sparse": "too large"}
    refused(lambda: infer(prior_copy), words.get(kind, "no such file"))
    (prior_copy / "step_0009.pt").unlink()  # something left to do
    refused(
        lambda: run("generate_prior", "--resume", prior_copy, "--model_dir", model_dir),
        words.get(kind, "no such file"),
    )
    path.rmdir() if kind == "folder" else path.unlink()
    assert infer(prior_copy, "--dry_run").code == 0
    assert "it can be resumed" in run("infer_from_prior", "--verify", "--prior_dir", prior_copy).err
    signal.alarm(0)


def test_a_lora_that_fits_no_layer_is_an_error(prior, infer, refused, tmp_path):
    other = tmp_path / "other.safetensors"
    save_file({f"unet.q.lora_{half}.weight": torch.zeros(2, 2) for half in "AB"}, other)
    refused(lambda: infer(prior, "--lora", other), "2 of them fit nowhere", "unet.q")
    refused(lambda: infer(prior, "--lora", tmp_path / "none.safetensors"), "is not a file")
    refused(lambda: infer(prior, "--lora", f"{other}:0"), "alpha 0")


def test_where_only_decoding_is_left_no_lora_is_asked_for_its_layers(
    generate, infer, run, image, model_dir, lora_file, loads, tmp_path
):
    """Neither in a prior that lost its video nor in a clip after the last step: the DiT isn't loaded."""
    prior = generate("--image", image, "--lora", lora_file, "--prompt", PROMPT).path
    own = (prior / "output_full.mp4").read_bytes()
    (prior / "output_full.mp4").unlink()
    loads.clear()
    assert run("generate_prior", "--resume", prior, "--model_dir", model_dir).code == 0
    assert (prior / "output_full.mp4").read_bytes() == own
    report = infer(prior, "--start_step", 9, "--output", tmp_path / "last.mp4").report
    assert report["latents_sha256"] == sha256(prior)
    assert loads == [["vae"], ["vae"]]


def test_where_nothing_is_left_to_run_nothing_is_loaded(prior_copy, run, model_dir, loads):
    (prior_copy / "formation.png").unlink()
    outcome = run("generate_prior", "--resume", prior_copy, "--model_dir", model_dir)
    assert outcome.code == 0, outcome.err
    assert (prior_copy / "formation.png").exists()
    assert loads == []
