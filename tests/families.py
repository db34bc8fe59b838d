"""A small random model of each kind of the Wan family, of DiffSynth's own classes, as a --model_dir."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from helpers import ROOT

from step_skip.models.embedded import build_tiny
from step_skip.models.families import FAMILIES

DIT = {
    "dim": 24,
    "in_dim": 16,
    "ffn_dim": 32,
    "out_dim": 16,
    "text_dim": 16,
    "freq_dim": 32,
    "eps": 1e-6,
    "patch_size": [1, 2, 2],
    "num_heads": 2,
    "num_layers": 2,
    "has_image_input": False,
}
VAE = {"dim": 4, "z_dim": 16, "dim_mult": [1, 1, 1, 1], "num_res_blocks": 1}
WITH_CLIP = {"in_dim": 36, "has_image_input": True}
DITS = {  # what DiffSynth's model_configs have for each kind, at small sizes
    "T2V": {},
    "InP": WITH_CLIP,
    "I2V": WITH_CLIP,
    "FLF2V": WITH_CLIP | {"has_image_pos_emb": True},
    "TI2V": {
        "in_dim": 48,
        "out_dim": 48,
        "seperated_timestep": True,
        "require_clip_embedding": False,
        "require_vae_embedding": False,
        "fuse_vae_embedding_in_latents": True,
    },
    "I2V-A14B": {"in_dim": 36, "require_clip_embedding": False},
    "T2V-A14B": {},
}
EXPERTS = {  # at shift 5 the second takes over at step 4 and at step 5 of 10
    "I2V-A14B": {"cfg_scale": 3.5, "switch_DiT_boundary": 0.9},
    "T2V-A14B": {"cfg_scale": 4.0, "cfg_scale_2": 3.0, "switch_DiT_boundary": 0.875},
}
SIZES = {name: 64 if name == "TI2V" else 32 for name in FAMILIES}  # pixels


def config_of(family: str) -> dict:
    """The config.json of a small model of this family."""
    experts = len(FAMILIES[family].experts)
    vae = VAE | {"z_dim": 48, "dec_dim": 4} if family == "TI2V" else VAE
    return {
        "family": family,
        "dit": DIT | DITS[family] | {"num_layers": 2 if experts == 1 else 3},  # 3 for Skip-Cache
        "text_encoder": {
            "vocab": 256,
            "dim": 16,
            "dim_attn": 16,
            "dim_ffn": 16,
            "num_heads": 2,
            "num_layers": 1,
            "dropout": 0.0,
        },
        "image_encoder": {  # 257 tokens, as CrossAttention expects
            "embed_dim": 16,
            "image_size": 32,
            "patch_size": 2,
            "vision_dim": 16,
            "vision_heads": 2,
            "vision_layers": 2,
        },
        "vae": vae,
        "tokenizer": {"seq_len": 8},
        "defaults": {
            "height": SIZES[family],
            "width": SIZES[family],
            "num_frames": 5,
            "fps": 8,
            "negative_prompt": "Still.",
            "cfg_scale": 5.0,
            "sigma_shift": 5.0,
            **EXPERTS.get(family, {}),
        },
    }


def build_family(folder: Path, family: str, *, seed: int = 0) -> Path:
    """The folder of a small random model of this family."""
    return build_folder(folder, config_of(family), seed=seed)


def build_folder(folder: Path, config: dict, *, seed: int = 0) -> Path:
    """The folder of an untrained model, as data/tiny_wan_i2v's is."""
    from safetensors.torch import save_file

    (folder / "config.json").write_text(json.dumps(config))
    for name, module in build_tiny(config, seed=seed).items():
        weights = module.state_dict()
        if name == "vae":
            weights |= {"mean": module.mean, "std": module.std}
        save_file({key: value.clone() for key, value in weights.items()}, str(folder / f"{name}.safetensors"))
    shutil.copytree(ROOT / "data" / "tiny_wan_i2v" / "tokenizer", folder / "tokenizer")
    return folder


def image_flags(family: str, images: dict[str, Path], *, with_image: bool = True) -> list[object]:
    """The images that a model of this family may have."""
    needs = {"--image": FAMILIES[family].image, "--end_image": FAMILIES[family].end_image}
    taken = [flag for flag, need in needs.items() if need != "none" and with_image]
    return [word for flag in taken for word in (flag, images[flag])]
