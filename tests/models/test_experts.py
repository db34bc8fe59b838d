"""Wan2.2's two experts: one after the other, never both in memory, with the pair's latents bit for bit."""

from __future__ import annotations

import functools
import gc
from pathlib import Path

import pytest
import torch
from families import DIT
from helpers import OTHER_PROMPT, PROMPT, read_json
from safetensors.torch import save_file

import step_skip
from step_skip.errors import InputError
from step_skip.files.tensors import sha256_tensor
from step_skip.models import loading
from step_skip.models.families import MODELS

FAMILIES = ("I2V-A14B", "T2V-A14B")
FIRST_LOW = {"I2V-A14B": 4, "T2V-A14B": 5}  # of 10 steps at shift 5


@pytest.fixture(scope="session")
def prior_of(folder_of, tmp_path_factory, image):
    """`prior_of(family, dtype)`: a prior by the pair, in one call of the pipeline; tests only read it."""
    made = {}

    def prior_of(family: str, dtype: str = "float32"):
        if (family, dtype) not in made:
            model = step_skip.load("tiny", model_dir=folder_of(family), dtype=dtype)
            given = image if family == "I2V-A14B" else None
            made[family, dtype] = step_skip.generate_prior(
                model, given, PROMPT, output_dir=tmp_path_factory.mktemp("priors"), progress=False
            )
        return made[family, dtype]

    return prior_of


@pytest.fixture
def in_memory(monkeypatch):
    """How many networks are in memory just after each one is loaded, besides those that were there before."""
    from diffsynth.models.wan_video_dit import WanModel

    gc.collect()
    before = {id(each) for each in gc.get_objects() if isinstance(each, WanModel)}
    counts, load_pipeline = [], loading.load_pipeline

    def spy(options, files):
        pipe = load_pipeline(options, files)
        gc.collect()
        found = [each for each in gc.get_objects() if isinstance(each, WanModel) and id(each) not in before]
        counts.append((sorted(set(files) & {"dit", "dit2"}), len(found)))
        return pipe

    monkeypatch.setattr(loading, "load_pipeline", spy)
    return counts


def infer_flags(prior: Path, folder: Path, *flags: object) -> tuple:
    return ("infer_from_prior", "--prior_dir", prior, "--model_dir", folder, *flags)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_prior_is_the_same_made_expert_by_expert(prior_of, make, image, in_memory, family, dtype):
    flags = ("--image", image) if family == "I2V-A14B" else ()
    pair = prior_of(family, dtype)
    in_memory.clear()
    prior = make(family, *flags, "--dtype", dtype).path
    recorded = read_json(prior / "run_metadata.json")
    tensors = {name: digest for name, digest in pair.metadata.files.items() if name.endswith(".pt")}
    assert {name: recorded["files"][name] for name in tensors} == tensors
    assert in_memory == [(["dit"], 1), (["dit2"], 1)]
    assert recorded["parameter_fingerprint"] == pair.metadata.parameter_fingerprint
    assert recorded["model_fingerprint"]["dit"] != recorded["model_fingerprint"]["dit2"]
    expected = {"I2V-A14B": (0.9, 3.5, None), "T2V-A14B": (0.875, 4.0, 3.0)}[family]
    assert tuple(recorded[name] for name in ("switch_DiT_boundary", "cfg_scale", "cfg_scale_2")) == expected


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_sweep_runs_expert_by_expert_with_the_latents_of_the_pair(
    prior_of, folder_of, run, in_memory, tmp_path, family, dtype
):
    """Resumed, differential and on own sigmas, over the switch and on either side of it."""
    prior, folder = prior_of(family, dtype), folder_of(family)
    in_memory.clear()
    lines = [
        '{"steps": [0, 5, 8]}',
        '{"steps": [1, 7]}',
        '{"steps": [0, 4, 7, 9]}',
        '{"steps": [0]}',
        '{"steps": [6, 9]}',
        '{"start_step": [1, 4, 8]}',
        '{"sigmas": [0.95, 0.8, 0.4]}',
        '{"steps": [0, 5, 8], "cfg_scale": [5, 4, 1]}',
        '{"steps": [0, 5, 8], "cfg_scale": 2, "cfg_scale_2": 6}',
    ]
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(f'{{"prompt": "{OTHER_PROMPT}", {line[1:]}' for line in lines))
    flags = ("--prompts_file", prompts, "--output_dir", tmp_path / "sweep")
    sweep = run(*infer_flags(prior.directory, folder, *flags)).path
    assert in_memory == [(["dit"], 1), (["dit2"], 1)]
    model = step_skip.load("tiny", model_dir=folder, dtype=dtype)
    infer = functools.partial(step_skip.infer_from_prior, model, prior, OTHER_PROMPT, progress=False)
    reports = [read_json(path) for path in sweep.glob("*.json")]
    assert len(reports) == 11
    for report in reports:
        choice = {"cfg_scale": report["cfg_scale"]}
        if report["method"] == "sigmas":
            choice["sigmas"] = report["sigmas"]
        elif report["method"] == "resume":
            choice["start_step"] = report["start_step"]
        else:
            choice["steps"] = report["steps_run"]
        if isinstance(choice["cfg_scale"], float):
            choice["cfg_scale"] = [choice["cfg_scale"]] * len(report["steps_run"])
        clip = infer(**choice)
        assert sha256_tensor(clip.latents) == report["latents_sha256"], choice
        assert (clip.forwards, clip.report["steps_run"]) == (report["forwards"], report["steps_run"])


@pytest.mark.parametrize("family", FAMILIES)
def test_only_the_expert_that_is_needed_is_loaded(prior_of, folder_of, run, loads, family):
    prior, first_low = prior_of(family), FIRST_LOW[family]
    expected = prior.metadata.latents_sha256
    for start_step, components in (
        (first_low, [["dit2", "vae"]]),
        (first_low - 1, [["dit2", "vae"]]),
        (first_low - 2, [["dit", "vae"], ["dit2"]]),
        (9, [["vae"]]),
    ):
        loads.clear()
        outcome = run(*infer_flags(prior.directory, folder_of(family), "--start_step", start_step))
        assert outcome.report["latents_sha256"] == expected
        assert loads == components


def test_skip_cache_is_the_same_expert_by_expert(prior_of, folder_of, run):
    prior, folder = prior_of("T2V-A14B"), folder_of("T2V-A14B")
    model = step_skip.load("tiny", model_dir=folder)
    for steps in ((0, 3, 5, 6, 8), (0, 1, 2, 7)):
        flags = ("--prompt", OTHER_PROMPT, "--steps", *steps, "--skip_cache", 2)
        report = run(*infer_flags(prior.directory, folder, *flags)).report
        clip = step_skip.infer_from_prior(
            model, prior, OTHER_PROMPT, steps=steps, skip_cache=2, progress=False
        )
        assert sha256_tensor(clip.latents) == report["latents_sha256"]
        assert clip.report["block_evaluations"] == report["block_evaluations"]


@pytest.mark.parametrize("missing", ["dit", "dit2"])
def test_the_other_expert_never_takes_a_step_silently(prior_of, folder_of, missing):
    prior = prior_of("T2V-A14B")
    pipe = step_skip.load("tiny", model_dir=folder_of("T2V-A14B")).pipe
    setattr(pipe, missing, None)
    infer = functools.partial(step_skip.infer_from_prior, pipe, prior, progress=False)
    kind = {"dit": "high-noise expert, pipe.dit,", "dit2": "low-noise expert, pipe.dit2,"}[missing]
    for choice in ({"steps": (0, 5, 8)}, {"start_step": 1}, {"sigmas": (0.95, 0.4)}):
        with pytest.raises(InputError, match=kind):
            infer(**choice)
    if missing == "dit":
        assert sha256_tensor(infer(start_step=4).latents) == prior.metadata.latents_sha256


def test_the_low_noise_expert_as_the_first_is_refused(prior_of, folder_of):
    pipe = step_skip.load("tiny", model_dir=folder_of("T2V-A14B")).pipe
    pipe.dit, pipe.dit2 = pipe.dit2, None
    with pytest.raises(InputError, match="the dit weights are not those"):
        step_skip.infer_from_prior(pipe, prior_of("T2V-A14B"), progress=False)


def test_tea_cache_is_refused_across_the_switch(prior_of, folder_of, run, make, refused):
    tea = ("--tea_cache_l1_thresh", 0.1, "--tea_cache_model_id", "Wan2.1-T2V-14B")
    flags = infer_flags(prior_of("T2V-A14B").directory, folder_of("T2V-A14B"), *tea)
    refused(lambda: run(*flags), "--tea_cache_l1_thresh", "need both experts", "--skip_cache")
    refused(lambda: make("T2V-A14B", *tea), "--tea_cache_l1_thresh", "need both experts")
    assert run(*flags, "--start_step", 4, "--dry_run").code == 0


def test_guidance_is_each_experts_own_unless_one_is_given(make, run, folder_of):
    prior = make("T2V-A14B", "--cfg_scale", 2, "--num_inference_steps", 4).path
    assert read_json(prior / "run_metadata.json")["cfg_scale_2"] is None
    prior = make("T2V-A14B", "--num_inference_steps", 4, "--cfg_scale_2", 1).path
    metadata = read_json(prior / "run_metadata.json")
    assert (metadata["cfg_scale"], metadata["cfg_scale_2"]) == (4.0, 1)
    assert metadata["forwards_per_step"] == [2, 2, 1, 1]
    outcome = run(*infer_flags(prior, folder_of("T2V-A14B"), "--start_step", 0))
    assert outcome.report["cfg_scale"] == [4.0, 1, 1]
    assert outcome.report["latents_sha256"] == metadata["latents_sha256"]


@pytest.mark.parametrize("stop_after", [1, 3, 4, 7])
def test_a_prior_that_was_stopped_is_finished_as_if_it_had_not(make, run, folder_of, prior_of, stop_after):
    early = make("T2V-A14B", "--stop_after", stop_after).path
    assert run("generate_prior", "--resume", early, "--model_dir", folder_of("T2V-A14B")).code == 0
    found, expected = read_json(early / "run_metadata.json"), prior_of("T2V-A14B").metadata
    assert found["latents_sha256"] == expected.latents_sha256
    assert {n: d for n, d in found["files"].items() if n.endswith(".pt")} == {
        n: d for n, d in expected.files.items() if n.endswith(".pt")
    }


def test_what_is_of_two_experts_is_refused_for_one(make, refused, image, folder_of, run):
    for flag, value in (("--cfg_scale_2", 3), ("--switch_DiT_boundary", 0.9)):
        refused(lambda f=flag, v=value: make("I2V", "--image", image, f, v), f"{flag} is of a model with two")
    prior = make("T2V", "--num_inference_steps", 1).path
    outcome = run(*infer_flags(prior, folder_of("T2V"), "--cfg_scale_2", 3))
    assert outcome.code == 2
    assert "--cfg_scale_2 is of two experts' second" in outcome.error


@pytest.mark.parametrize("name", FAMILIES)
def test_the_published_order_of_files_is_high_noise_first(name):
    patterns = {part: weights.pattern for part, weights in MODELS[name].weights.items()}
    assert list(patterns)[:2] == ["dit", "dit2"]
    assert patterns["dit"].startswith("high_noise_model/") and patterns["dit2"].startswith("low_noise_model/")


@pytest.fixture
def loras(tmp_path) -> dict[str, Path]:
    """Two LoRAs that differ."""
    made = {}
    for seed, word in enumerate(("high", "low")):
        generator = torch.Generator().manual_seed(seed)
        key = "diffusion_model.blocks.0.self_attn.q"
        pair = {"A": (2, DIT["dim"]), "B": (DIT["dim"], 2)}
        tensors = {
            f"{key}.lora_{name}.weight": torch.randn(shape, generator=generator)
            for name, shape in pair.items()
        }
        made[word] = tmp_path / f"{word} noise.safetensors"
        save_file(tensors, str(made[word]))
    return made


def test_each_expert_has_its_own_lora(make, run, folder_of, prior_of, loras, tmp_path):
    folder, prompt = folder_of("T2V-A14B"), ("--num_inference_steps", 4)
    own = [f"{word}={path}:0.5" for word, path in loras.items()]
    made = {
        name: read_json(make("T2V-A14B", *prompt, "--lora", *words).path / "run_metadata.json")
        for name, words in {"own": own, "both": [loras["high"]], "high": own[:1]}.items()
    }
    assert [(each["path"], each.get("expert")) for each in made["own"]["lora"]] == [
        (str(loras["high"]), "dit"),
        (str(loras["low"]), "dit2"),
    ]
    model = step_skip.load("tiny", model_dir=folder, lora=own)
    choice = {"num_inference_steps": 4, "output_dir": tmp_path / "pair", "progress": False}
    pair = step_skip.generate_prior(model, None, PROMPT, **choice)
    assert pair.metadata.latents_sha256 == made["own"]["latents_sha256"]
    assert len({each["latents_sha256"] for each in made.values()}) == 3
    report = run(*infer_flags(pair.directory, folder, "--start_step", 0)).report
    assert report["latents_sha256"] == pair.metadata.latents_sha256
    others = ("--lora", *reversed(own))
    assert run(*infer_flags(pair.directory, folder, "--start_step", 0, *others)).report["latents_sha256"] == (
        pair.metadata.latents_sha256
    )


def test_a_lora_for_an_expert_of_a_model_with_one_network_is_refused(make, refused, loras):
    words = ("--lora", f"high={loras['high']}")
    refused(lambda: make("T2V", *words), "--lora high=", "this model has one network; name the file alone")
