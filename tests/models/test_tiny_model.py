"""The embedded model's loader: DiffSynth's small classes, through an unmodified pipeline."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from step_skip.models.embedded import build_tiny, load_tiny_modules, load_tiny_tokenizer
from step_skip.models.weights import TINY_DIR, read_tiny_config

SMALL = {
    "dit": {
        "dim": 32,
        "in_dim": 36,
        "ffn_dim": 64,
        "out_dim": 16,
        "text_dim": 16,
        "freq_dim": 32,
        "eps": 1e-6,
        "patch_size": [1, 2, 2],
        "num_heads": 1,
        "num_layers": 2,
        "has_image_input": True,
    },
    "text_encoder": {
        "vocab": 32,
        "dim": 16,
        "dim_attn": 16,
        "dim_ffn": 32,
        "num_heads": 2,
        "num_layers": 1,
        "dropout": 0.0,
    },
    "image_encoder": {
        "embed_dim": 16,
        "image_size": 32,
        "patch_size": 2,
        "vision_dim": 16,
        "vision_heads": 2,
        "vision_layers": 2,
    },
    "vae": {"dim": 4, "z_dim": 16, "dim_mult": [1, 1, 1, 1], "num_res_blocks": 1},
    "tokenizer": {"seq_len": 8},
}


def same(first: torch.nn.Module, second: torch.nn.Module) -> bool:
    pairs = zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder as train.py leaves it: config.json and bfloat16 weights."""
    from safetensors.torch import save_file

    (tmp_path / "config.json").write_text(json.dumps(SMALL))
    for name, module in build_tiny(SMALL, seed=3).items():
        weights = {key: value.to(torch.bfloat16).contiguous() for key, value in module.state_dict().items()}
        if name == "vae":
            weights |= {"mean": torch.arange(16.0), "std": torch.full((16,), 2.0)}
        save_file(weights, tmp_path / f"{name}.safetensors")
    return tmp_path


def test_import_is_cheap():
    code = "import sys, step_skip; print([m for m in ('torch', 'diffsynth') if m in sys.modules])"
    out = subprocess.run(
        [sys.executable, "-c", code], cwd=TINY_DIR.parents[1], capture_output=True, text=True
    )
    assert out.stdout.strip() == "[]", out.stderr


def test_build_is_seeded_and_leaves_the_callers_noise_alone():
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    first, again, other = (build_tiny(SMALL, seed=seed, only=("dit",))["dit"] for seed in (1, 1, 2))
    assert torch.equal(torch.rand(1), expected)
    assert same(first, again)
    assert not same(first, other)


def test_build_makes_only_what_is_asked_for_at_the_configs_sizes():
    modules = build_tiny(SMALL, only=("vae", "text_encoder"))
    assert set(modules) == {"vae", "text_encoder"}
    assert modules["vae"].z_dim == 16
    assert sum(p.numel() for p in modules["vae"].parameters()) < 100_000
    assert not any(p.is_meta for p in modules["vae"].parameters())


def test_load_reads_the_files_into_float32(folder: Path):
    modules = load_tiny_modules(folder)
    assert list(modules) == ["dit", "vae", "text_encoder", "image_encoder"]
    for name, module in build_tiny(SMALL, seed=3).items():
        assert same(modules[name], module.to(torch.bfloat16).float())
    assert {p.dtype for m in modules.values() for p in m.parameters()} == {torch.float32}


def test_load_sets_the_vaes_latent_statistics(folder: Path):
    vae = load_tiny_modules(folder, only=("vae",))["vae"]
    assert torch.equal(vae.scale[0], torch.arange(16.0))
    assert torch.equal(vae.scale[1], torch.full((16,), 0.5))


def test_load_opens_only_the_files_it_needs(folder: Path):
    (folder / "image_encoder.safetensors").unlink()
    assert set(load_tiny_modules(folder, only=("dit", "vae"))) == {"dit", "vae"}
    with pytest.raises(FileNotFoundError):
        load_tiny_modules(folder)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_runs_in_an_unmodified_pipeline(dtype: torch.dtype):
    from diffsynth.pipelines.wan_video import WanVideoPipeline
    from PIL import Image

    pipe = WanVideoPipeline(device="cpu", torch_dtype=dtype)
    for name, module in load_tiny_modules().items():
        setattr(pipe, name, module.to(dtype))
    pipe.tokenizer = load_tiny_tokenizer()
    defaults = read_tiny_config()["defaults"]
    size = {"height": defaults["height"], "width": defaults["width"], "num_frames": defaults["num_frames"]}
    image = Image.new("RGB", (defaults["width"], defaults["height"]), "teal")
    frames = pipe(
        prompt="she moves up", input_image=image, num_inference_steps=2, seed=0, tiled=False, **size
    )
    assert len(frames) == size["num_frames"]
    assert frames[0].size == (size["width"], size["height"])


def test_committed_weights_fit_the_repository():
    assert sum(path.stat().st_size for path in TINY_DIR.glob("*.safetensors")) <= 10_000_000


def test_tokenizer_ends_every_prompt_even_the_empty_one():
    tokenizer = load_tiny_tokenizer()
    ids, mask = tokenizer(["", "She moves up."], return_mask=True)
    assert mask.sum(1).tolist() == [1, 4]
    assert ids[0, 0] == ids[1, 3]
