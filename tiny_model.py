"""The embedded model's loader: DiffSynth's Wan2.1-I2V classes at the sizes of a config.json.

    modules = load(Path("data/tiny_wan_i2v"))
    pipe.dit, pipe.vae = modules["dit"], modules["vae"]

`train.py` in the model's folder makes the weights, this file only builds the classes and fills them.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from diffsynth.models.wan_video_text_encoder import HuggingfaceTokenizer

FOLDER = Path(__file__).resolve().parent / "data" / "tiny_wan_i2v"
MODULES = ("dit", "text_encoder", "image_encoder", "vae")


def read_config(folder: Path = FOLDER) -> dict:
    """The sizes of the four modules, the tokenizer's length and the command line's defaults."""
    return json.loads((Path(folder) / "config.json").read_text())


def build(config: dict, *, seed: int = 0, only: Collection[str] = MODULES) -> dict[str, torch.nn.Module]:
    """The modules at the config's sizes in float32, seeded and untrained."""
    import torch

    builders = {
        "dit": _build_dit,
        "text_encoder": _build_text_encoder,
        "image_encoder": _build_image_encoder,
        "vae": _build_vae,
    }
    modules = {}
    with torch.random.fork_rng(devices=[]):
        for name in only:
            torch.manual_seed(seed)
            modules[name] = builders[name](config).eval().requires_grad_(False)
    return modules


def load(folder: Path = FOLDER, *, only: Collection[str] = MODULES) -> dict[str, torch.nn.Module]:
    """The trained modules in float32, whatever the dtype of the files; a skip_branch is put into the DiT."""
    from safetensors.torch import load_file

    from skip_cache import Branch

    modules = build(read_config(folder), only=[name for name in MODULES if name in only])
    for name, module in modules.items():
        weights = {
            key: value.float() for key, value in load_file(Path(folder) / f"{name}.safetensors").items()
        }
        if name == "vae":
            set_latent_statistics(module, weights.pop("mean"), weights.pop("std"))
        module.load_state_dict(weights)
    if "skip_branch" in only:
        modules["dit"].skip_branch = Branch(**load_file(Path(folder) / "skip_branch.safetensors"))
    return modules


def tokenizer(folder: Path = FOLDER) -> HuggingfaceTokenizer:
    """The word-level tokenizer in `folder/tokenizer`."""
    from diffsynth.models.wan_video_text_encoder import HuggingfaceTokenizer

    seq_len = read_config(folder)["tokenizer"]["seq_len"]
    return HuggingfaceTokenizer(name=str(Path(folder) / "tokenizer"), seq_len=seq_len, clean="whitespace")


def set_latent_statistics(vae: torch.nn.Module, mean: torch.Tensor, std: torch.Tensor) -> None:
    """Per-channel mean and std of the latents, plain attributes of WanVideoVAE. mean, std: [z_dim]"""
    vae.mean, vae.std = mean, std
    vae.scale = [mean, 1.0 / std]


def _build_dit(config: dict) -> torch.nn.Module:
    from diffsynth.models.wan_video_dit import MLP, WanModel

    sizes = dict(config["dit"])
    sizes["patch_size"] = tuple(sizes["patch_size"])
    dit = WanModel(**sizes)
    dit.img_emb = MLP(
        config["image_encoder"]["vision_dim"], sizes["dim"]
    )  # WanModel's own takes 1280 channels
    return dit


def _build_text_encoder(config: dict) -> torch.nn.Module:
    from diffsynth.models.wan_video_text_encoder import WanTextEncoder

    return WanTextEncoder(**config["text_encoder"])


def _build_image_encoder(config: dict) -> torch.nn.Module:
    """WanImageEncoder around a small CLIP; its own constructor would allocate ViT-H."""
    import torch
    from diffsynth.models.wan_video_image_encoder import WanImageEncoder, clip_xlm_roberta_vit_h_14

    encoder = WanImageEncoder.__new__(WanImageEncoder)
    torch.nn.Module.__init__(encoder)
    encoder.model, encoder.transforms = clip_xlm_roberta_vit_h_14(
        return_transforms=True, device="cpu", **config["image_encoder"]
    )
    return encoder


def _build_vae(config: dict) -> torch.nn.Module:
    """WanVideoVAE around a small VideoVAE_; its own full-size one is only laid out on the meta device."""
    import torch
    from diffsynth.models.wan_video_vae import VideoVAE_, WanVideoVAE

    sizes = config["vae"]
    with torch.device("meta"):
        vae = WanVideoVAE(z_dim=sizes["z_dim"])
    vae.model = VideoVAE_(**sizes)
    set_latent_statistics(vae, torch.zeros(sizes["z_dim"]), torch.ones(sizes["z_dim"]))
    return vae
