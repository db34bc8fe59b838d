"""On the machines people have: where weights lie, what computes, and what a run says of memory and disk.

DiffSynth's own loader and memory management at work, on a CPU; nothing here was run on a GPU.
"""

from __future__ import annotations

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from helpers import OTHER_PROMPT, PROMPT, edit_metadata, read_json
from safetensors.torch import load_file, save_file
from small_real import ONE, TWO, file_of, make_known, write_checkpoints

from step_skip.errors import InputError
from step_skip.models import memory
from step_skip.models.loading import loaded_first
from step_skip.models.memory import GIB, HOMES, Memory, expected_memory
from step_skip.models.weights import ENCODERS, LoadOptions

FULL = ("dit", "vae", "text_encoder", "image_encoder")
CLIP = ("dit", "vae")
SIZES = ("--height", 32, "--width", 32, "--num_frames", 5, "--num_inference_steps", 4)


@pytest.fixture(scope="session")
def small_dir(tmp_path_factory):
    """Checkpoints of small models, for DiffSynth's own loader."""
    return write_checkpoints(tmp_path_factory.mktemp("small"))


@pytest.fixture
def real(run, small_dir, monkeypatch, tmp_path):
    """`real.prior(...)`, `real.clip(prior, ...)`: the scripts with a model that DiffSynth loads, on a CPU."""
    make_known(monkeypatch, small_dir)
    common = ("--model_dir", small_dir, "--device", "cpu")

    def prior(*flags, model=ONE):
        what = ("--model", model, "--dtype", "float32", "--prompt", PROMPT, *SIZES)
        return run("generate_prior", *what, *common, "--output_dir", tmp_path / "priors", *flags)

    def clip(prior, *flags):
        return run("infer_from_prior", "--prior_dir", prior, *common, *flags)

    return SimpleNamespace(prior=prior, clip=clip)


@pytest.fixture
def reads(monkeypatch):
    """How often each weight is read from the disk."""
    from diffsynth.core.vram.disk_map import DiskMap

    counts: dict[str, int] = {}
    read = DiskMap.__getitem__

    def spy(self, name):
        counts[name] = counts.get(name, 0) + 1
        return read(self, name)

    monkeypatch.setattr(DiskMap, "__getitem__", spy)
    return counts


# --- where weights lie --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("model", "dtype"), [(ONE, "float32"), (TWO, "bfloat16")])
def test_every_mode_makes_the_same_prior_and_the_same_clips(real, model, dtype):
    found = []
    for mode in HOMES:
        outcome = real.prior("--run_id", mode, "--vram", mode, "--dtype", dtype, model=model)
        metadata = read_json(outcome.path / "run_metadata.json")
        assert metadata["vram"] == mode
        clips = [
            real.clip(outcome.path, "--vram", mode, "--prompt", *flags).report
            for flags in ((OTHER_PROMPT,), (PROMPT, "--start_step", 0))
        ]
        assert {clip["vram"] for clip in clips} == {mode}
        assert clips[1]["latents_sha256"] == metadata["latents_sha256"]
        found.append((metadata["latents_sha256"], *(clip["latents_sha256"] for clip in clips)))
    assert len(set(found)) == 1


def test_every_mode_fuses_a_lora_alike(real, small_dir, tmp_path):
    """Also where DiffSynth would add it while it runs: pairs, differences, in bfloat16."""
    weights = load_file(file_of(small_dir, ONE, "dit"))
    lora = {
        "diffusion_model.blocks.1.self_attn.q.lora_down.weight": torch.randn(2, 24) * 0.1,
        "diffusion_model.blocks.1.self_attn.q.lora_up.weight": torch.randn(24, 2) * 0.1,
        "diffusion_model.blocks.2.ffn.0.diff_b": torch.randn(32) * 0.1,
        "diffusion_model.blocks.3.diff_m": torch.randn(weights["blocks.3.modulation"].shape) * 0.1,
        "diffusion_model.blocks.0.norm3.diff": torch.randn(24) * 0.1,
        "diffusion_model.patch_embedding.diff": torch.randn(weights["patch_embedding.weight"].shape) * 0.1,
        "diffusion_model.head.head.diff_b": torch.randn(64) * 0.1,
    }
    path = tmp_path / "lora.safetensors"
    save_file(lora, path)
    found = {
        mode: real.prior(
            "--run_id", mode, "--vram", mode, "--dtype", "bfloat16", "--lora", f"{path}:0.5"
        ).path
        for mode in HOMES
    }
    digests = {read_json(prior / "run_metadata.json")["latents_sha256"] for prior in found.values()}
    assert len(digests) == 1
    without = real.prior("--dtype", "bfloat16").path
    assert read_json(without / "run_metadata.json")["latents_sha256"] not in digests
    clip = real.clip(found["low"], "--start_step", 1, "--vram", "disk")
    assert {clip.report["latents_sha256"]} == digests
    assert "--vram" not in clip.err.replace("--vram disk: expects", "")


@pytest.mark.parametrize(("mode", "once"), [("cpu", True), ("low", True), ("disk", False)])
def test_a_sweep_reads_the_dit_from_the_disk_once(real, reads, mode, once):
    prior = real.prior().path
    reads.clear()
    prompts = ("she looks up", "she looks down", "she sings")
    assert real.clip(prior, "--vram", mode, "--prompt", *prompts).code == 0
    blocks = {count for name, count in reads.items() if name.startswith("blocks.0.self_attn")}
    assert (blocks == {1}) == once
    assert (min(blocks) > 3) != once


def test_nothing_of_a_model_is_held_that_its_mode_leaves_on_the_disk(small_dir, monkeypatch):
    from step_skip.models.loading import load_pipeline
    from step_skip.models.weights import weight_files

    make_known(monkeypatch, small_dir)
    for mode, (encoders, networks) in HOMES.items():
        options = LoadOptions(ONE, "cpu", "float32", mode, small_dir)
        pipe = load_pipeline(options, weight_files(options))
        for name in ("dit", "vae", "text_encoder"):
            held = [not each.is_meta for each in getattr(pipe, name).parameters()]
            home = encoders if name in ENCODERS else networks
            assert any(held) == (home != "disk"), (mode, name)


def test_a_gpu_is_given_what_is_at_work(monkeypatch):
    """What DiffSynth is told for a GPU, stage by stage."""
    dtype = torch.bfloat16
    assert memory.offload_config("plain", "dit", dtype=dtype, device="cuda") == {}
    stages = ("offload", "onload", "preparing", "computation")
    for mode, component, homes in (
        ("plain", "text_encoder", ["cpu", "cpu", "cuda", "cuda"]),
        ("cpu", "dit", ["cpu", "cpu", "cuda", "cuda"]),
        ("low", "image_encoder", ["disk", "disk", "cuda", "cuda"]),
        ("low", "vae", ["cpu", "cpu", "cuda", "cuda"]),
        ("disk", "dit", ["disk", "disk", "cuda", "cuda"]),
    ):
        told = memory.offload_config(mode, component, dtype=dtype, device="cuda")
        assert [told[f"{stage}_device"] for stage in stages] == homes
        kinds = ["disk" if home == "disk" else dtype for home in homes]
        assert [told[f"{stage}_dtype"] for stage in stages] == kinds
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (10 * GIB, 24 * GIB))
    assert memory.vram_limit("cuda") == 22
    assert memory.vram_limit("cpu") is None


def test_a_prior_that_records_no_mode_is_warned_of_with_a_lora(real, small_dir, tmp_path):
    """Until a prior recorded its mode, `low` added LoRAs at run time, which gives other bits."""
    path = tmp_path / "lora.safetensors"
    name = "blocks.0.ffn.0.lora"
    save_file({f"{name}_A.weight": torch.ones(1, 24), f"{name}_B.weight": torch.ones(32, 1)}, path)
    prior = real.prior("--lora", path).path
    told = "the prior doesn't record its --vram"
    assert told not in real.clip(prior).err
    metadata = read_json(prior / "run_metadata.json")
    del metadata["vram"]
    from step_skip.prior.metadata import sealed

    (prior / "run_metadata.json").write_text(json.dumps(sealed(metadata)))
    assert told in real.clip(prior, "--prompt", OTHER_PROMPT).err


# --- what is expected ---------------------------------------------------------------------------------------


def options(**changes) -> LoadOptions:
    return LoadOptions(**{"model": "I2V-480P", "device": "cuda", "dtype": "bfloat16"} | changes)


@pytest.fixture
def free(monkeypatch):
    """What a machine with a GPU says is free, in GiB."""
    state = SimpleNamespace(vram=80, host=128)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(memory, "free_memory", lambda _: Memory(state.vram * GIB, state.host * GIB))
    return state


@pytest.mark.parametrize(
    ("mode", "vram", "host"),
    [("plain", 38, 14), ("cpu", 7, 45), ("low", 7, 33), ("disk", 7, 2)],
)
def test_what_the_real_model_takes_at_480p(mode, vram, host):
    """Wan2.1-I2V-14B in bfloat16: DiT 30.5 GiB, T5 10.6, CLIP 1.2, VAE 0.2, and 5.0 between them."""
    expected = expected_memory(options(), FULL, mode)
    assert (round(expected.vram / GIB), round(expected.host / GIB)) == (vram, host)


@pytest.mark.parametrize(
    ("vram", "host", "expected"),
    [
        (80, 128, "plain"),
        (45, 16, "plain"),  # a card of 48 GB
        (38, 8, "disk"),  # no room for the encoders
        (24, 64, "cpu"),
        (24, 40, "low"),
        (24, 16, "disk"),
        (4, 16, "disk"),
    ],
)
def test_auto_takes_the_first_mode_that_has_the_room(free, vram, host, expected):
    free.vram, free.host = vram, host
    assert memory.pick_vram(options(), FULL) == expected
    assert memory.pick_vram(options(vram="low"), FULL) == "low"


def test_auto_goes_by_what_is_run(free):
    free.vram, free.host = 40, 8
    assert memory.pick_vram(options(), CLIP) == "plain"  # no encoder has to lie anywhere
    assert memory.pick_vram(options(size=(720, 1280, 81)), CLIP) == "disk"
    assert memory.pick_vram(options(model="tiny", device="cpu"), FULL) == "plain"


def test_two_experts_take_the_room_of_one():
    """27 GiB each in bfloat16; from Python both are loaded."""
    both = ("dit", "dit2", "vae", "text_encoder")
    of = {
        name: expected_memory(options(model="T2V-A14B"), components, "plain").vram
        for name, components in (("turns", loaded_first(both)), ("low", both[1:]), ("both", both))
    }
    assert of["turns"] == of["low"] < of["both"] - 26 * GIB


def test_what_lies_between_the_weights_of_the_family():
    """As benchmarks/activations.py counted it: GiB of DiT and of whole frames, at 480 x 832 x 81."""
    for model, step, frames in (
        ("I2V-480P", 4.11, 3.80),
        ("Fun-1.3B-InP", 1.41, 3.80),
        ("TI2V-5B", 1.23, 4.19),
    ):
        run = options(model=model, size=(480, 832, 81))
        assert 1 <= memory.dit_activation_bytes(run) / GIB / step < 1.25
        assert 1 <= memory.vae_activation_bytes(run, tiled=False) / GIB / frames < 1.2


def test_whole_frames_take_more_than_tiles():
    small, large = (
        memory.activation_bytes(options(size=(720, 1280, 5), tiled=tiled)) for tiled in (True, False)
    )
    assert large > 8 * GIB > 2 * GIB > small


def test_a_run_says_what_it_expects_and_what_it_took(generate, infer, image):
    outcome = generate("--image", image, "--num_inference_steps", 2)
    assert "--vram plain: expects about " in outcome.err
    assert "GiB of host memory are free" in outcome.err
    assert "peak memory: " in outcome.err
    peak = read_json(outcome.path / "run_metadata.json")["peak_memory"]
    assert peak["vram"] is None
    assert 2**27 < peak["host"] < 2**36
    clip = infer(outcome.path, "--start_step", 0)
    assert "expects about" in clip.err and "peak memory: " in clip.err
    assert clip.report["peak_memory"]["host"] >= 2**27


def test_a_dry_run_says_what_a_run_would_take(real, run, tmp_path):
    flags = ("--height", 64, "--prompt", "a sea", "a wood", "--num_inference_steps", 4, "--stop_after", 2)
    made = real.prior("--dry_run", *flags, model=TWO)
    lines = [json.loads(line) for line in made.out.splitlines()]
    assert [(line["prompt"], line["height"], line["forwards"]) for line in lines] == [
        ("a sea", 64, 6),
        ("a wood", 64, 6),
    ]
    assert all(line["bytes_at_most"] > 2**20 for line in lines)
    assert not (tmp_path / "priors").exists()
    for mode in HOMES:
        assert f"--vram {mode}: expects about " in made.err
    assert "GiB of host memory are free: it would run with --vram " in made.err
    prior = real.prior(model=TWO).path
    before = sorted(prior.rglob("*"))
    clip = real.clip(prior, "--dry_run")
    assert "--vram disk: expects about " in clip.err
    assert "would load dit, dit2, vae" in clip.err
    assert sorted(prior.rglob("*")) == before
    elsewhere = run("infer_from_prior", "--prior_dir", prior, "--model_dir", tmp_path, "--dry_run")
    assert "--vram cpu: expects about 2.0 GiB of VRAM and 55.7 GiB of host memory" in elsewhere.err


def test_a_run_that_has_no_room_is_warned(generate, image, monkeypatch):
    monkeypatch.setattr(memory, "free_memory", lambda _: Memory(0, 10))
    assert "that is more than is free" in generate("--image", image, "--num_inference_steps", 1).err


# --- before a download --------------------------------------------------------------------------------------


@pytest.fixture
def disk(monkeypatch, tmp_path):
    """A disk for downloads with so many GiB free."""
    state = SimpleNamespace(free=200, base=tmp_path / "models")
    monkeypatch.setenv("DIFFSYNTH_MODEL_BASE_PATH", str(state.base))
    monkeypatch.delenv("DIFFSYNTH_SKIP_DOWNLOAD", raising=False)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=state.free * GIB))
    return state


def test_a_download_is_announced(disk, caplog):
    caplog.set_level("INFO")
    memory.check_download(options(), FULL)
    [line] = caplog.messages
    assert line.startswith("76.6 GiB of weights to download to ")
    assert "dit 61.1, vae 0.5, text_encoder 10.6, image_encoder 4.4" in line
    assert "200.0 GiB are free there" in line


def test_a_download_without_room_is_refused_before_it_begins(disk):
    disk.free = 50
    with pytest.raises(
        InputError, match=r"76.6 GiB.*50.0 GiB are free.*DIFFSYNTH_MODEL_BASE_PATH.*--model_dir"
    ):
        memory.check_download(options(), FULL)
    assert not disk.base.exists()


def test_what_is_there_is_not_counted(disk, monkeypatch, tmp_path):
    def lay(name: str, size: int) -> None:
        path = disk.base / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as file:
            file.truncate(size)  # a hole: costs no disk

    converted = "DiffSynth-Studio/Wan-Series-Converted-Safetensors"
    lay(f"{converted}/models_t5_umt5-xxl-enc-bf16.safetensors", 11_361_920_000)
    lay("Wan-AI/Wan2.1-I2V-14B-480P/diffusion_pytorch_model-00001-of-00007.safetensors", 10 * GIB)
    sizes = memory.bytes_to_fetch(options(), FULL)
    assert sizes.keys() == {"dit", "vae", "image_encoder"}
    assert round(sizes["dit"] / GIB, 1) == 51.1
    assert memory.bytes_to_fetch(options(model_dir=tmp_path), FULL) == {}
    assert memory.bytes_to_fetch(options(model="tiny"), FULL) == {}
    monkeypatch.setenv("DIFFSYNTH_SKIP_DOWNLOAD", "True")
    assert memory.bytes_to_fetch(options(), FULL) == {}


# --- what computes ------------------------------------------------------------------------------------------


def test_compiled_blocks_resume_exactly(generate, infer, image):
    """By dynamo's eager backend, which keeps the bits: under every hook, and as without it."""
    flags = ("--image", image, "--num_inference_steps", 4)
    plain, compiled = (generate(*flags, *more).path for more in ((), ("--compile", "eager")))
    own = read_json(compiled / "run_metadata.json")
    assert own["compile"] == "eager"
    assert own["latents_sha256"] == read_json(plain / "run_metadata.json")["latents_sha256"]
    for method in (("--start_step", 1), ("--num_steps", 2)):
        clip = infer(compiled, *method)
        assert clip.report["compile"] == "eager"
        assert clip.report["latents_sha256"] == own["latents_sha256"]
    uncompiled = infer(compiled, "--start_step", 1, "--compile", "off", "--output", compiled / "off.mp4")
    assert "runs with --compile off, and the prior was made with eager" in uncompiled.err
    assert uncompiled.report.get("compile") is None
    cached = infer(compiled, "--start_step", 0, "--skip_cache", 2, "--prompt", OTHER_PROMPT)
    assert cached.report["block_evaluations"] == 2 * (4 + 2 + 4)


def test_a_backend_that_torch_does_not_have_is_refused(generate, prior, infer, refused, image):
    refused(lambda: generate("--image", image, "--compile", "magic"), "--compile 'magic'", "inductor")
    refused(lambda: infer(prior, "--compile", "magic"), "--compile 'magic'")


def test_a_quantised_dit_resumes_exactly(generate, infer, image):
    pytest.importorskip("torchao")
    flags = ("--image", image, "--dtype", "bfloat16", "--num_inference_steps", 4)
    plain, quantised = (generate(*flags, *more).path for more in ((), ("--quantize", "fp8")))
    own, other = (read_json(prior / "run_metadata.json") for prior in (quantised, plain))
    assert own["quantize"] == "fp8"
    assert own["latents_sha256"] != other["latents_sha256"]
    for method in (("--start_step", 1), ("--num_steps", 2)):
        clip = infer(quantised, *method)
        assert clip.report["quantize"] == "fp8"
        assert clip.report["latents_sha256"] == own["latents_sha256"]
    assert "--quantize off" in infer(quantised, "--start_step", 1, "--quantize", "off").err


def test_only_blocks_are_quantised(model_dir):
    pytest.importorskip("torchao")
    from step_skip.models.loading import load

    dit = load("tiny", dtype="bfloat16", model_dir=model_dir, quantize="fp8").pipe.dit
    kinds = {name: type(module).__name__ for name, module in dit.named_modules()}
    linear = {name for name, kind in kinds.items() if kind == "TorchaoLinear"}
    assert linear == {name for name in linear if name.startswith("blocks.")}
    assert len(linear) == 4 * 12
    assert "Linear" in kinds.values()


def test_quantising_without_torchao_is_refused(generate, refused, image, monkeypatch):
    from diffsynth.core.quant.backends import torchao

    monkeypatch.setattr(torchao, "TORCHAO_AVAILABLE", False)
    refused(lambda: generate("--image", image, "--quantize", "fp8"), "needs torchao", "pip install torchao")


def test_quantised_weights_do_not_leave_the_gpu(generate, refused, image):
    for mode in ("cpu", "low", "disk"):
        refused(lambda m=mode: generate("--image", image, "--quantize", "fp8", "--vram", m), "--vram", mode)


def test_what_a_strangers_prior_says_of_computing_is_checked(prior_copy, infer, refused):
    for name, value, words in (
        ("quantize", "../fp8", "has quantize = '../fp8', expected 'fp8'"),
        ("compile", ["x"], "has compile = ['x']"),
        ("compile", "magic", "--compile 'magic'"),
    ):
        edit_metadata(prior_copy, quantize=None, compile=None)
        edit_metadata(prior_copy, **{name: value})
        refused(lambda: infer(prior_copy), words)


def test_another_attention_is_warned_of(prior_copy, infer):
    metadata = read_json(prior_copy / "run_metadata.json")
    assert metadata["attention"] == "torch"
    assert "attention torch" not in infer(prior_copy).err
    edit_metadata(prior_copy, attention="flash_attention_3")
    assert "attention torch (then 'flash_attention_3')" in infer(prior_copy, "--prompt", OTHER_PROMPT).err


# --- decoding -----------------------------------------------------------------------------------------------


def test_whole_frames_are_recorded_and_inherited(generate, infer, image, monkeypatch):
    from diffsynth.models.wan_video_vae import WanVideoVAE

    tiled, decode = [], WanVideoVAE.decode

    def spy(self, *args, **kwargs):
        tiled.append(kwargs["tiled"])
        return decode(self, *args, **kwargs)

    monkeypatch.setattr(WanVideoVAE, "decode", spy)
    flags = ("--image", image, "--num_inference_steps", 2)
    whole = generate(*flags, "--vae_tiling", "off").path
    own = read_json(whole / "run_metadata.json")
    assert own["tiled"] is False
    clip = infer(whole, "--start_step", 0)
    assert (clip.report["tiled"], clip.report["latents_sha256"]) == (False, own["latents_sha256"])
    in_tiles = generate(*flags).path
    clip = infer(in_tiles, "--start_step", 0, "--vae_tiling", "off")
    assert clip.report["latents_sha256"] == read_json(in_tiles / "run_metadata.json")["latents_sha256"]
    assert "nearly the same frames" in clip.err
    assert infer(in_tiles, "--start_step", 0, "--vae_tiling", "auto").report["tiled"] is True
    assert tiled == [False, False, True, False, True]


@pytest.mark.parametrize(
    ("model", "size", "whole"),
    [
        ("I2V-480P", (480, 832, 81), True),
        ("I2V-480P", (480, 832, 33), False),
        ("Fun-1.3B-InP", (480, 832, 81), False),
        ("own", (480, 832, 81), False),
    ],
)
def test_whole_frames_where_they_take_no_more_than_the_dit(model, size, whole):
    sizes = dict(zip(("height", "width", "num_frames"), size, strict=True))
    assert memory.in_tiles("auto", model, sizes) != whole
