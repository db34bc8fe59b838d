"""Models for DiffSynth's own loader: small classes and checkpoints, made known to it for a test.

What is loaded, offloaded and moved between devices is then DiffSynth's code, as for the published weights.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from diffsynth.models.wan_video_dit import WanModel
from diffsynth.models.wan_video_text_encoder import WanTextEncoder
from diffsynth.models.wan_video_vae import VideoVAE_, WanVideoVAE
from families import DIT, config_of
from helpers import ROOT
from safetensors.torch import save_file

from step_skip.models.families import MODELS

ONE, TWO = "T2V-1.3B", "T2V-A14B"  # with one network, with two experts
CONFIG = config_of("T2V")


class SmallDit(WanModel):
    def __init__(self):
        super().__init__(**DIT | {"num_layers": 4, "patch_size": (1, 2, 2)})


class SmallVae(WanVideoVAE):
    def __init__(self):
        torch.nn.Module.__init__(self)
        sizes = CONFIG["vae"]
        self.z_dim, self.upsampling_factor = sizes["z_dim"], 8
        self.mean, self.std = torch.zeros(self.z_dim), torch.ones(self.z_dim)
        self.scale = [self.mean, 1 / self.std]
        self.model = VideoVAE_(**sizes)


class SmallTextEncoder(WanTextEncoder):
    def __init__(self):
        super().__init__(**CONFIG["text_encoder"])


CLASSES = {
    "dit": (SmallDit, WanModel),
    "dit2": (SmallDit, WanModel),
    "vae": (SmallVae, WanVideoVAE),
    "text_encoder": (SmallTextEncoder, WanTextEncoder),
}


def file_of(folder: Path, model: str, component: str) -> Path:
    """Where models.py looks for a component: as ModelScope lays it out."""
    weights = MODELS[model].weights[component]
    return folder / weights.model_id / weights.pattern.replace("*", "")


def write_checkpoints(folder: Path) -> Path:
    """Seeded weights of every component of both models in `folder`, and a tokenizer."""
    for model in (ONE, TWO):
        for seed, name in enumerate(MODELS[model].weights):
            path = file_of(folder, model, name)
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.manual_seed(seed)
            small = CLASSES[name][0]().state_dict()
            weights = {key: 0.05 * torch.randn_like(value) for key, value in small.items()}
            norms = [key for key in weights if "norm" in key and key.endswith("weight")]
            save_file(weights | {key: 1 + weights[key] for key in norms}, path)
    shutil.copytree(ROOT / "data" / "tiny_wan_i2v" / "tokenizer", folder / "google" / "umt5-xxl")
    return folder


def make_known(monkeypatch, folder: Path) -> None:
    """Let DiffSynth's loader recognise the checkpoints and manage their memory as the real classes'."""
    from diffsynth.core import hash_model_file
    from diffsynth.models import model_loader

    configs, maps = list(model_loader.MODEL_CONFIGS), dict(model_loader.VRAM_MANAGEMENT_MODULE_MAPS)
    for name in MODELS[ONE].weights:
        small, real = CLASSES[name]
        path, of_real = f"small_real.{small.__name__}", f"{real.__module__}.{real.__name__}"
        model_hash = hash_model_file(str(file_of(folder, ONE, name)))
        configs.append({"model_hash": model_hash, "model_name": f"wan_video_{name}", "model_class": path})
        maps[path] = maps[of_real]
    monkeypatch.setattr(model_loader, "MODEL_CONFIGS", configs)
    monkeypatch.setattr(model_loader, "VRAM_MANAGEMENT_MODULE_MAPS", maps)
