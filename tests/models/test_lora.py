"""LoRAs: names of several tools, what they do to the weights, what is refused before a model is loaded."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest
import torch
from helpers import OTHER_PROMPT, edit_metadata, read_json
from safetensors.torch import load_file, save_file

from step_skip.errors import InputError
from step_skip.models.loading import load_pipeline
from step_skip.models.lora import check_loras, parse_lora, parse_strengths, read_recorded_loras
from step_skip.models.lora import describe_loras as describe
from step_skip.models.lora import find_recorded_loras as recorded
from step_skip.models.lora_file import Lora
from step_skip.models.weights import LoadOptions, weight_files

I2V_14B = "6bfcfb3b342cb286ce886889d519a77e"  # DiffSynth's hash of keys and shapes
LAYERS = ("blocks.0.self_attn.q", "blocks.3.ffn.0")
PAIR = ("lora_A", "lora_B")
EMPTY = {"A": (0, 48), "B": (48, 0)}


def lora_weights(model_dir: Path, *, layers=LAYERS, rank: int = 2, names=PAIR, prefix="", alpha=None):
    """Random pairs for some layers of the small model, in DiffSynth's naming."""
    base, weights = load_file(model_dir / "dit.safetensors"), {}
    generator = torch.Generator().manual_seed(0)
    for layer in layers:
        outputs, inputs = base.get(f"{layer}.weight", torch.empty(48, 48)).shape
        weights[f"{prefix}{layer}.{names[0]}.weight"] = torch.randn(rank, inputs, generator=generator)
        weights[f"{prefix}{layer}.{names[1]}.weight"] = torch.randn(outputs, rank, generator=generator)
        if alpha is not None:
            weights[f"{prefix}{layer}.alpha"] = torch.tensor(alpha)
    return weights


def distilled_weights(model_dir: Path) -> dict[str, torch.Tensor]:
    """What LightX2V's tools/extract/lora_extractor.py makes of a distilled DiT: as most users' LoRAs are.

    Matrices become lora_down and lora_up; what has one dimension or few values becomes a difference, named
    .diff for weights, .diff_b for biases, .diff_m for modulations.
    """
    weights, generator = {}, torch.Generator().manual_seed(0)
    for name, value in load_file(model_dir / "dit.safetensors").items():
        layer, _, kind = name.rpartition(".")
        if value.ndim == 2 and value.numel() >= 2000:
            weights[f"diffusion_model.{layer}.lora_down.weight"] = torch.randn(
                3, value.shape[1], generator=generator
            )
            weights[f"diffusion_model.{layer}.lora_up.weight"] = torch.randn(
                value.shape[0], 3, generator=generator
            )
        else:
            suffix = {"weight": "diff", "bias": "diff_b", "modulation": "diff_m"}[kind]
            weights[f"diffusion_model.{layer}.{suffix}"] = torch.randn(value.shape, generator=generator)
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
def save(tmp_path):
    """`save(weights)`: a file of them."""

    def save(weights: dict[str, torch.Tensor], stem: str = "lora", **metadata: str) -> Path:
        save_file(weights, tmp_path / f"{stem}.safetensors", metadata)
        return tmp_path / f"{stem}.safetensors"

    return save


@pytest.fixture
def dit_files(model_dir):
    return [model_dir / "dit.safetensors"]


def load_dit(model_dir, *loras: Lora, dtype="float32") -> dict[str, torch.Tensor]:
    """The DiT's parameters as a run has them."""
    options = LoadOptions("tiny", "cpu", dtype, model_dir=model_dir, loras=loras)
    return load_pipeline(options, weight_files(options, ["dit"])).dit.state_dict()


def changed(before, after) -> set[str]:
    return {name for name in before if not torch.equal(before[name], after[name])}


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


@pytest.mark.parametrize("alpha", ["0", "nan", "inf", "0.5,0"])
def test_an_alpha_that_is_no_strength_is_refused(alpha):
    with pytest.raises(ValueError, match="alpha"):
        parse_lora(f"a.safetensors:{alpha}")


def test_strengths_between_commas_are_tried_in_turn():
    path = Path("a,b.safetensors")
    assert parse_strengths("low=a,b.safetensors:0.5,-1") == [Lora(path, 0.5, "dit2"), Lora(path, -1, "dit2")]
    assert parse_strengths("a,b.safetensors") == [Lora(path)]
    with pytest.raises(ValueError, match=r"only infer_from_prior\.py takes"):
        parse_lora("a,b.safetensors:0.5,-1")


# --- names --------------------------------------------------------------------------------------------------

# One layer of every kind, as other tools name it. Sources: ComfyUI comfy/lora.py, model_lora_keys_unet;
# musubi-tuner networks/lora_wan.py (prefix lora_unet, dots become underscores); diffusers 0.42
# loaders/single_file_utils.py, convert_wan_transformer_to_diffusers, and loaders/lora_pipeline.py,
# WanLoraLoaderMixin (prefix transformer); PEFT 0.21 utils/save_and_load.py (prefix base_model.model).
PUBLISHED = {
    "blocks.0.self_attn.q": "attn1.to_q",
    "blocks.1.self_attn.o": "attn1.to_out.0",
    "blocks.1.cross_attn.k": "attn2.to_k",
    "blocks.2.cross_attn.v_img": "attn2.add_v_proj",
    "blocks.3.ffn.0": "ffn.net.0.proj",
    "blocks.3.ffn.2": "ffn.net.2",
    "text_embedding.0": "condition_embedder.text_embedder.linear_1",
    "time_embedding.2": "condition_embedder.time_embedder.linear_2",
    "time_projection.1": "condition_embedder.time_proj",
    "img_emb.proj.3": "condition_embedder.image_embedder.ff.net.2",
    "head.head": "proj_out",
}


def in_diffusers_naming(layer: str) -> str:
    block, number, _ = [*layer.split(".", 2), "", ""][:3]
    return f"blocks.{number}.{PUBLISHED[layer]}" if block == "blocks" else PUBLISHED[layer]


NAMINGS = {
    "DiffSynth": lambda layer, part: f"{layer}.lora_{part}.weight",
    "DiffSynth's trainer": lambda layer, part: f"{layer}.lora_{part}.default.weight",
    "ComfyUI": lambda layer, part: f"diffusion_model.{layer}.lora_{part}.weight",
    "LightX2V": lambda layer, part: f"diffusion_model.{layer}.lora_{ {'A': 'down', 'B': 'up'}[part] }.weight",
    "kohya": lambda layer, part: (
        f"lora_unet_{layer.replace('.', '_')}.lora_{ {'A': 'down', 'B': 'up'}[part] }.weight"
    ),
    "diffusers": lambda layer, part: f"transformer.{in_diffusers_naming(layer)}.lora_{part}.weight",
    "PEFT": lambda layer, part: f"base_model.model.{layer}.lora_{part}.weight",
    "PEFT on diffusers": lambda layer, part: (
        f"base_model.model.{in_diffusers_naming(layer)}.lora_{part}.weight"
    ),
}


@pytest.mark.parametrize("tool", NAMINGS)
def test_the_names_of_every_tool_reach_the_same_layers(model_dir, save, dit_files, tool):
    weights = {}
    plain = lora_weights(model_dir, layers=tuple(PUBLISHED))
    for key, value in plain.items():
        layer, part = key.removesuffix(".weight").rsplit(".lora_", 1)
        weights[NAMINGS[tool](layer, part)] = value
    lora = Lora(save(weights), 0.5)
    check_loras([lora], dit_files)
    expected = load_dit(model_dir, Lora(save(plain, "plain"), 0.5))
    found = load_dit(model_dir, lora)
    assert changed(load_dit(model_dir), found) == {f"{layer}.weight" for layer in PUBLISHED}
    assert not changed(expected, found)


def test_no_two_layers_of_the_real_model_share_a_name():
    """kohya's underscores could stand for two places of a dot."""
    from diffsynth.configs.model_configs import wan_series
    from diffsynth.models.wan_video_dit import WanModel

    from step_skip.models.lora_file import LayerNames

    [sizes] = [each["extra_kwargs"] for each in wan_series if each["model_hash"] == I2V_14B]
    with torch.device("meta"):
        names = LayerNames(WanModel(**sizes).state_dict().keys())
    assert len(names.kohya) == len(names.dotted)
    assert len(set(names.dotted.values())) > 40 * 14


# --- what becomes of the weights ----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"prefix": "diffusion_model."},
        {"names": ("lora_down", "lora_up")},
        {"names": ("lora_down", "lora_up"), "alpha": 1.5},
        {"names": ("lora_A.default", "lora_B.default")},
        {"alpha": 3},  # an integer, as musubi-tuner's convert_lora.py writes it
    ],
)
def test_pairs_give_the_bits_that_diffsynths_loader_gives(model_dir, make_lora, dit_files, dtype, options):
    path = make_lora(**options)
    assert check_loras([Lora(path)], dit_files) == []
    given = LoadOptions("tiny", "cpu", dtype, model_dir=model_dir)
    theirs = load_pipeline(given, weight_files(given, ["dit"]))
    theirs.load_lora(theirs.dit, str(path), alpha=0.5)
    ours = load_dit(model_dir, Lora(path, 0.5), dtype=dtype)
    assert not changed(theirs.dit.state_dict(), ours)
    assert changed(load_dit(model_dir, dtype=dtype), ours) == {f"{layer}.weight" for layer in LAYERS}


def test_the_weights_become_w_plus_alpha_b_a(model_dir, make_lora):
    path = make_lora(alpha=3.0)
    plain, fused, pairs = load_dit(model_dir), load_dit(model_dir, Lora(path, 0.5)), load_file(path)
    for layer in LAYERS:
        down, up = (pairs[f"{layer}.{name}.weight"] for name in PAIR)
        torch.testing.assert_close(fused[f"{layer}.weight"], plain[f"{layer}.weight"] + 0.5 * 1.5 * up @ down)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_distilled_lora_is_applied_whole(model_dir, save, dit_files, dtype):
    """Pairs, differences of weights, biases and modulations: every parameter, by the formula."""
    weights = distilled_weights(model_dir)
    kinds = {key.rsplit(".", 1)[1] for key in weights}
    assert kinds == {"weight", "diff", "diff_b", "diff_m"}
    lora = Lora(save(weights), 0.25)
    assert check_loras([lora], dit_files) == []
    plain, fused = (load_dit(model_dir, *loras, dtype=dtype) for loras in ((), (lora,)))
    assert changed(plain, fused) == set(plain)
    for name, value in plain.items():
        layer, _, kind = name.rpartition(".")
        key = f"diffusion_model.{layer}"
        if f"{key}.lora_up.weight" in weights and kind == "weight":
            up, down = (weights[f"{key}.lora_{part}.weight"].to(value.dtype) for part in ("up", "down"))
            expected = value + 0.25 * up @ down
        else:
            suffix = {"weight": "diff", "bias": "diff_b", "modulation": "diff_m"}[kind]
            expected = (value.float() + 0.25 * weights[f"{key}.{suffix}"]).to(value.dtype)
        assert torch.equal(fused[name], expected), name


def test_a_modulation_may_be_named_whole(model_dir, save):
    difference = torch.randn(1, 6, 48)
    ways = {"diffusion_model.blocks.1.diff_m": difference}, {"blocks.1.modulation.diff": difference}
    one, other = (load_dit(model_dir, Lora(save(weights))) for weights in ways)
    assert changed(load_dit(model_dir), one) == {"blocks.1.modulation"}
    assert not changed(one, other)


def test_a_convolution_takes_pairs(model_dir, save, dit_files):
    """As ComfyUI does: the product of the flattened halves (comfy/weight_adapter/lora.py)."""
    up, down = torch.randn(48, 2, 1, 1, 1), torch.randn(2, 36, 1, 2, 2)
    path = save({"patch_embedding.lora_up.weight": up, "patch_embedding.lora_down.weight": down})
    check_loras([Lora(path)], dit_files)
    name = "patch_embedding.weight"
    expected = load_dit(model_dir)[name] + (up.flatten(1) @ down.flatten(1)).reshape(48, 36, 1, 2, 2)
    torch.testing.assert_close(load_dit(model_dir, Lora(path))[name], expected)


@pytest.mark.parametrize("lora_bias", [False, True])
def test_what_peft_saves_is_what_peft_merges(model_dir, dit_files, tmp_path, lora_bias):
    """A LoRA made by PEFT itself: alpha is in adapter_config.json, and lora_B may have a bias."""
    import peft

    options = LoadOptions("tiny", "cpu", "float32", model_dir=model_dir)
    dit = load_pipeline(options, weight_files(options, ["dit"])).dit
    config = peft.LoraConfig(r=2, lora_alpha=6, target_modules=["q", "ffn.2"], lora_bias=lora_bias)
    model = peft.get_peft_model(dit, config)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter)
    model.save_pretrained(tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    assert any(".lora_B.bias" in key for key in load_file(path)) == lora_bias
    assert check_loras([Lora(path)], dit_files) == []
    merged, fused = model.merge_and_unload().state_dict(), load_dit(model_dir, Lora(path))
    assert len(changed(load_dit(model_dir), fused)) == 4 * 3 * (1 + lora_bias)
    for name, value in merged.items():
        torch.testing.assert_close(fused[name], value)


def test_pefts_config_is_part_of_what_is_recorded(model_dir, save, dit_files, tmp_path):
    path = save(lora_weights(model_dir, prefix="base_model.model."), "adapter_model")
    [note] = check_loras([Lora(path)], dit_files)
    assert "no adapter_config.json" in note and "alpha is assumed to be the rank" in note
    config = tmp_path / "adapter_config.json"
    config.write_text(json.dumps({"lora_alpha": 4, "r": 2}))
    assert check_loras([Lora(path)], dit_files) == []
    described = describe([Lora(path)])
    assert recorded(described) == (Lora(path),)
    config.write_text(json.dumps({"lora_alpha": 6, "r": 2}))
    with pytest.raises(InputError, match="another .* than is there now"):
        recorded(described)
    for content in ("{", "[]", '{"lora_alpha": "x"}', '{"lora_alpha": NaN}'):
        config.write_text(content)
        with pytest.raises(InputError, match="lora_alpha.*none of it is applied"):
            check_loras([Lora(path)], dit_files)


def test_alpha_in_diffusers_metadata_counts(model_dir, save):
    """diffusers writes its adapter's config into the file: loaders/lora_base.py, lora_adapter_metadata."""
    weights = lora_weights(model_dir, layers=LAYERS[1:], prefix="transformer.")
    weights = {key.replace("ffn.0", "ffn.net.0.proj"): value for key, value in weights.items()}
    told = json.dumps({"transformer.r": 2, "transformer.lora_alpha": 8})
    path = save(weights, "diffusers", lora_adapter_metadata=told)
    expected = load_dit(model_dir, Lora(save(weights, "plain"), 4.0))
    found = load_dit(model_dir, Lora(path))
    for name in expected:
        torch.testing.assert_close(found[name], expected[name])
    dora = save(weights, lora_adapter_metadata=json.dumps({"transformer.lora_alpha": 8, "use_dora": True}))
    with pytest.raises(InputError, match="use_dora, which isn't supported"):
        load_dit(model_dir, Lora(dora))


def test_several_are_added_up(model_dir, make_lora):
    path = make_lora()
    twice, once = (load_dit(model_dir, *loras) for loras in ((Lora(path), Lora(path, -1.0)), ()))
    for key in once:
        torch.testing.assert_close(twice[key], once[key])


# --- what is refused ----------------------------------------------------------------------------------------


def refusal(path: Path, dit_files) -> str:
    """The one line, and that it is one."""
    with pytest.raises(InputError) as error:
        check_loras([Lora(path)], dit_files)
    assert "\n" not in str(error.value)
    assert str(path) in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    "key",
    [
        "transformer_blocks.0.attn.to_q.lora_A.weight",  # another model's
        "diffusion_model.blocks.0.cross_attn.k_image.lora_A.weight",
        "lora_unet_blocks_9_self_attn_q.lora_down.weight",  # a block too many
        "lora_te_text_model_encoder_layers_0_mlp_fc1.lora_down.weight",  # the text encoder's
        "blocks.0.self_attn.q.hada_w1_a",  # LoHa
        "blocks.0.self_attn.q.lokr_w1",
        "blocks.0.self_attn.q.dora_scale",
        "blocks.0.self_attn.q.lora_mid.weight",
        "blocks.0.self_attn.q.lora_magnitude_vector",
        "blocks.0.self_attn.q.diff_m",  # a linear layer has no modulation
        "patch_embedding.reshape_weight",
        "emb_pos",
    ],
)
def test_what_has_no_place_is_named_and_nothing_is_applied(model_dir, save, dit_files, key):
    error = refusal(save(lora_weights(model_dir) | {key: torch.ones(2, 48)}), dit_files)
    assert f"holds 5 tensors, 1 of them fit nowhere: {key!r}" in error
    assert "none of it is applied" in error


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({f"{LAYERS[0]}.lora_A.weight": torch.zeros(2, 7)}, "[2, 7]"),
        ({f"{LAYERS[0]}.lora_A.weight": torch.zeros(3, 48)}, "[3, 48]"),
        ({f"{LAYERS[0]}.lora_{half}.weight": torch.zeros(shape) for half, shape in EMPTY.items()}, "[0, 48]"),
        ({f"{LAYERS[0]}.lora_A.weight": torch.zeros(48)}, "[48] and [48, 2] for blocks.0"),
        ({f"{LAYERS[0]}.diff": torch.zeros(48)}, "[48]"),
        ({f"{LAYERS[0]}.diff_b": torch.zeros(1)}, "[1] for blocks.0.self_attn.q.bias, expected [48]"),
        ({f"{LAYERS[0]}.alpha": torch.zeros(2)}, "expected one number"),
        ({"blocks.1.ffn.0.alpha": torch.tensor(1.0)}, "without the other tensor of its pair"),
        ({"blocks.1.ffn.0.lora_B.weight": torch.zeros(64, 2)}, "without the other tensor of its pair"),
        ({"blocks.1.ffn.0.lora_A.weight": torch.zeros(2, 48)}, "without the other tensor of its pair"),
        ({"blocks.1.ffn.0.lora_B.bias": torch.zeros(64)}, "without the other tensor of its pair"),
        ({f"diffusion_model.{LAYERS[0]}.lora_A.weight": torch.zeros(2, 48)}, "for one layer"),
        ({f"{LAYERS[0]}.lora_down.weight": torch.zeros(2, 48)}, "for one layer"),
        ({f"{LAYERS[0]}.diff_b": torch.zeros(48, dtype=torch.int8)}, "in I8, expected one of BF16"),
        ({f"{LAYERS[0]}.diff_b": torch.zeros(48, dtype=torch.float8_e4m3fn)}, "in F8_E4M3"),
        ({f"{LAYERS[0]}.diff_b": torch.full((48,), torch.nan)}, "NaN or infinite values"),
        ({f"{LAYERS[0]}.alpha": torch.tensor(torch.inf)}, "NaN or infinite values"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_named(model_dir, save, dit_files, changes, words):
    assert words in refusal(save(lora_weights(model_dir) | changes), dit_files)


def test_a_file_that_is_no_lora_is_refused(dit_files, tmp_path):
    assert "fit nowhere" in refusal(dit_files[0], dit_files)
    empty = tmp_path / "empty.safetensors"
    save_file({}, empty)
    assert "there is nothing to apply" in refusal(empty, dit_files)
    empty.write_bytes(b"not a tensor")
    assert "not a safetensors file" in refusal(empty, dit_files)


@pytest.mark.parametrize(
    "content",
    [
        (2**40).to_bytes(8, "little") + b"{}",
        (2**24 + 1).to_bytes(8, "little") + b"{" + b" " * 2**24,
        (10).to_bytes(8, "little") + b"[" * 10,
        (2).to_bytes(8, "little") + b"{}" + b"more than the header says",
        b"",
    ],
)
def test_a_forged_header_is_refused_before_it_costs_anything(dit_files, tmp_path, content):
    path = tmp_path / "forged.safetensors"
    path.write_bytes(content)
    assert "not a safetensors file that can be read" in refusal(path, dit_files)


def test_sizes_that_the_file_does_not_hold_are_refused(dit_files, tmp_path):
    """A tensor of a terabyte in a file of some bytes; overlapping ones."""
    name, path = f"{LAYERS[0]}.diff", tmp_path / "forged.safetensors"
    for entries in (
        {name: {"dtype": "F32", "shape": [2**20, 2**18], "data_offsets": [0, 2**40]}},
        {name: {"dtype": "F32", "shape": [2**20, 2**18], "data_offsets": [0, 16]}},
        {key: {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]} for key in (name, f"{LAYERS[1]}.diff")},
    ):
        header = json.dumps(entries).encode()
        path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(16))
        assert "not a safetensors file that can be read" in refusal(path, dit_files)


def test_what_a_run_records_is_found_again_or_refused(make_lora):
    path = make_lora()
    described = describe([Lora(path, 0.5)])
    assert set(described[0].recorded()) == {"path", "alpha", "sha256"}
    assert recorded(described) == (Lora(path, 0.5),)
    assert recorded([]) == ()
    path.write_bytes(b"another")
    with pytest.raises(InputError, match="another .* than is there now"):
        recorded(described)
    path.unlink()
    with pytest.raises(InputError, match="does not exist"):
        recorded(described)
    with pytest.raises(InputError, match="as a LoRA"):
        read_recorded_loras([{"path": 3}])


# --- by the command line ------------------------------------------------------------------------------------


def test_a_prior_with_a_distilled_lora_resumes_exactly(generate, infer, image, model_dir, save):
    """LightX2V's kind, in bfloat16 and with guidance off."""
    weights = {key: 0.02 * value for key, value in distilled_weights(model_dir).items()}
    flags = ("--image", image, "--lora", save(weights), "--cfg_scale", 1, "--num_inference_steps", 4)
    prior = generate(*flags, "--dtype", "bfloat16").path
    own = read_json(prior / "run_metadata.json")
    assert own["lora"][0]["differences"] == sum(".diff" in key for key in weights)
    for method in (("--start_step", 1), ("--num_steps", 2)):
        assert infer(prior, *method).report["latents_sha256"] == own["latents_sha256"]
    without = infer(prior, "--start_step", 1, "--lora")
    assert without.report["latents_sha256"] != own["latents_sha256"]


def test_what_cannot_be_applied_is_refused_before_anything_is_loaded(
    generate, refused, image, model_dir, save
):
    weights = lora_weights(model_dir) | {"blocks.0.cross_attn.k_img2.diff_b": torch.zeros(48)}
    path = save(weights)
    refused(
        lambda: generate("--image", image, "--lora", path),
        "'blocks.0.cross_attn.k_img2.diff_b'",
        "none of it is applied",
    )


def test_a_prior_of_a_lora_that_was_applied_in_part_is_told_apart(generate, infer, image, model_dir, save):
    """Until the differences were applied a prior recorded none: its own prompt gives another video now."""
    path = save({key: 0.02 * value for key, value in distilled_weights(model_dir).items()})
    prior = generate("--image", image, "--lora", path).path
    metadata = read_json(prior / "run_metadata.json")
    edit_metadata(prior, lora=[{key: metadata["lora"][0][key] for key in ("path", "alpha", "sha256")}])
    outcome = infer(prior, "--prompt", OTHER_PROMPT)
    assert outcome.code == 0
    assert (
        f"{path.name}:1" in outcome.err and "with its differences, and the prior was made with" in outcome.err
    )


def test_a_sweep_of_strengths_makes_what_single_runs_make(
    prior_copy, model_dir, infer, run, make_lora, loads, tmp_path
):
    """Each strength on weights that are read anew, once for all its clips; the clips say which it is."""
    path, sweep = make_lora(), tmp_path / "sweep"
    flags = ("--prompt", "She speaks.", OTHER_PROMPT, "--num_steps", 1)
    outcome = infer(prior_copy, *flags, "--lora", f"{path}:0.25,1,-0.5", "--output_dir", sweep)
    assert outcome.code == 0, outcome.err
    assert len(loads) == 3
    assert (prior_copy / "contexts").is_dir() and not (sweep / "contexts").exists()  # of one prior
    reports = {file.stem: read_json(file) for file in sweep.glob("*.json")}
    assert len(reports) == 6 == len({report["latents_sha256"] for report in reports.values()})
    page = (sweep / "index.html").read_text()
    for name, report in reports.items():
        [lora] = report["lora"]
        assert (f"_lora{lora['alpha']:g}_" in name) == (lora["alpha"] != 1)
        assert f"{path.name}:{lora['alpha']:g} " in page
        single = ("--lora", f"{path}:{lora['alpha']}", "--output", tmp_path / f"{name}.mp4")
        alone = infer(prior_copy, "--prompt", report["prompt"], "--num_steps", 1, *single)
        assert alone.report["latents_sha256"] == report["latents_sha256"]
        assert alone.report["video_sha256"] == report["video_sha256"]
    like = run("infer_from_prior", "--like", sweep / f"{name}.json", "--output", tmp_path / "like.mp4")
    assert like.report["latents_sha256"] == report["latents_sha256"]
    words = shlex.split(report["command"])[2:]
    assert run("infer_from_prior", *words).report["latents_sha256"] == report["latents_sha256"]
    loads.clear()
    again = infer(prior_copy, *flags, "--lora", f"{path}:0.25,1,-0.5", "--output_dir", sweep)
    assert again.code == 0 and not loads


@pytest.mark.parametrize(
    ("name", "metadata", "steps"),
    [
        ("lightx2v_I2V_14B_480p_cfg_step_distill_rank64_bf16", {}, 4),  # Kijai/WanVideo_comfy
        ("wan2.1_i2v_lora_rank64_lightx2v_4step", {}, 4),  # lightx2v/Wan2.1-Distill-Loras
        ("Wan2.2-I2V-A14B-4steps-lora-rank64-Seko-V1", {"name": "Wan2.2-Lightning"}, 4),
        ("distilled_8_steps", {}, 8),
        ("mine", {"modelspec.title": "My face, distilled in 6 steps"}, 6),
        ("mine", {"ss_output_name": "face-14B-480p"}, None),
        ("40_steps_of_training", {}, None),
    ],
)
def test_a_distilled_lora_is_known_by_its_name_or_metadata(save, name, metadata, steps):
    from step_skip.models.lora import distilled_steps

    assert distilled_steps(Lora(save({"a": torch.zeros(1)}, name, **metadata))) == steps


def test_what_a_distilled_lora_is_made_for_is_hinted_and_changes_nothing(
    generate, infer, image, model_dir, save, prior_copy
):
    path = save(lora_weights(model_dir), "lightx2v_4step")
    outcome = generate("--image", image, "--lora", path)
    hint = "make its prior with --cfg_scale 1 --num_inference_steps 4 --sigma_shift 5"
    assert hint in outcome.err
    metadata = read_json(outcome.path / "run_metadata.json")
    assert (metadata["cfg_scale"], metadata["num_inference_steps"]) == (5.0, 10)
    assert "hint" not in generate("--image", image, "--lora", path, "--cfg_scale", 1).err
    outcome = infer(prior_copy, "--lora", path)
    assert hint in outcome.err
    assert outcome.report["cfg_scale"] == 5.0
    for flags in (("--lora", path, "--cfg_scale", 1), ()):
        assert "hint" not in infer(prior_copy, *flags).err
