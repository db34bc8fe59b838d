"""LoRAs: what they do to the weights, what is refused before a model is loaded, what a run records."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from step_skip.files import InputError
from step_skip.loading import load_pipeline
from step_skip.models import LoadOptions, Lora, check_loras, parse_lora, weight_files
from step_skip.models import describe_loras as describe
from step_skip.models import find_recorded_loras as recorded

LAYERS = ("blocks.0.self_attn.q", "blocks.3.ffn.0")


def lora_weights(model_dir: Path, *, layers=LAYERS, rank: int = 2, names=("lora_A", "lora_B"), prefix=""):
    """Random low-rank matrices for some layers of the embedded model."""
    base, weights = load_file(model_dir / "dit.safetensors"), {}
    generator = torch.Generator().manual_seed(0)
    for layer in layers:
        outputs, inputs = base.get(f"{layer}.weight", torch.empty(48, 48)).shape
        weights[f"{prefix}{layer}.{names[0]}.weight"] = torch.randn(rank, inputs, generator=generator)
        weights[f"{prefix}{layer}.{names[1]}.weight"] = torch.randn(outputs, rank, generator=generator)
    return weights


@pytest.fixture
def make_lora(model_dir, tmp_path_factory):
    folder = tmp_path_factory.mktemp("lora")

    def make(name: str = "lora", **options) -> Path:
        path = folder / f"{name}.safetensors"
        save_file(lora_weights(model_dir, **options), path)
        return path

    return make


@pytest.fixture
def dit_files(model_dir):
    return [model_dir / "dit.safetensors"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a.safetensors", ("a.safetensors", 1.0)),
        ("a.safetensors:0.5", ("a.safetensors", 0.5)),
        ("/x/a:b.safetensors", ("/x/a:b.safetensors", 1.0)),
        ("/x/a:b.safetensors:-2", ("/x/a:b.safetensors", -2.0)),
    ],
)
def test_the_part_after_the_last_colon_is_alpha_where_it_is_a_number(text, expected):
    assert parse_lora(text) == Lora(Path(expected[0]), expected[1])


@pytest.mark.parametrize("alpha", ["0", "nan", "inf"])
def test_an_alpha_that_is_no_strength_is_refused(alpha):
    with pytest.raises(ValueError, match="alpha"):
        parse_lora(f"a.safetensors:{alpha}")


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"prefix": "diffusion_model."},
        {"names": ("lora_down", "lora_up")},
        {"names": ("lora_A.default", "lora_B.default")},
    ],
)
def test_the_weights_become_w_plus_alpha_b_a(model_dir, make_lora, dit_files, options):
    path = make_lora(**options)
    assert check_loras([Lora(path)], dit_files) == []
    plain, changed = (load_dit(model_dir, loras) for loras in ((), (Lora(path, 0.5),)))
    weights = load_file(path)
    for layer in LAYERS:
        down, up = (
            next(value for key, value in weights.items() if layer in key and name in key)
            for name in (("_A", "_B") if "lora_down" not in str(options) else ("_down", "_up"))
        )
        expected = plain[f"{layer}.weight"] + 0.5 * up @ down
        torch.testing.assert_close(changed[f"{layer}.weight"], expected)
    same = {key for key in plain if torch.equal(plain[key], changed[key])}
    assert same == set(plain) - {f"{layer}.weight" for layer in LAYERS}


def load_dit(model_dir, loras):
    options = LoadOptions("tiny", "cpu", "float32", model_dir=model_dir, loras=loras)
    return load_pipeline(options, weight_files(options, ["dit"])).dit.state_dict()


def test_several_are_added_up(model_dir, make_lora):
    path = make_lora()
    twice, once = (load_dit(model_dir, loras) for loras in ((Lora(path), Lora(path, -1.0)), ()))
    for key in once:
        torch.testing.assert_close(twice[key], once[key])


def test_layers_of_another_model_are_refused(make_lora, dit_files):
    path = make_lora(layers=("transformer_blocks.0.attn.to_q",))
    with pytest.raises(InputError, match="matches no layer.*transformer_blocks.0.attn.to_q.*blocks"):
        check_loras([Lora(path)], dit_files)


def test_another_size_is_refused(make_lora, dit_files, tmp_path):
    weights = load_file(make_lora())
    weights[f"{LAYERS[0]}.lora_A.weight"] = torch.zeros(2, 7)
    save_file(weights, tmp_path / "wide.safetensors")
    with pytest.raises(InputError, match=r"\[2, 7\] for blocks.0.self_attn.q, which is \[48, 48\]"):
        check_loras([Lora(tmp_path / "wide.safetensors")], dit_files)


def test_a_file_that_is_no_lora_is_refused(dit_files, tmp_path):
    with pytest.raises(InputError, match="no lora_A and lora_B"):
        check_loras([Lora(dit_files[0])], dit_files)
    half = tmp_path / "half.safetensors"
    save_file({f"{LAYERS[0]}.lora_B.weight": torch.zeros(48, 2)}, half)
    with pytest.raises(InputError, match="no lora_A and lora_B"):
        check_loras([Lora(half)], dit_files)
    half.write_bytes(b"not a tensor")
    with pytest.raises(InputError, match="not a safetensors file"):
        check_loras([Lora(half)], dit_files)


def test_what_is_not_used_is_said(make_lora, dit_files):
    path = make_lora(layers=(*LAYERS, "text_model.q"))
    assert "2 layers take part, 2 of 6 tensors" in check_loras([Lora(path)], dit_files)[0]


def test_what_a_run_records_is_found_again_or_refused(make_lora):
    path = make_lora()
    described = describe([Lora(path, 0.5)])
    assert recorded(described) == (Lora(path, 0.5),)
    assert recorded([]) == ()
    path.write_bytes(b"another")
    with pytest.raises(InputError, match="another .* than is there now"):
        recorded(described)
    path.unlink()
    with pytest.raises(InputError, match="not there"):
        recorded(described)
