"""What lies between the weights: the most bytes of tensors that a full-size DiT or VAE holds at once.

    python benchmarks/activations.py

Runs DiffSynth's own classes on the meta device, where tensors have sizes and no values, and follows every
tensor from its making to its end. Attention gives its output and takes nothing, as kernels that never write
the scores do. memory.py estimates by these figures. Takes two minutes.
"""

from __future__ import annotations

import importlib
import math
import weakref
from typing import Any

import torch
from diffsynth.configs.model_configs import wan_series
from diffsynth.pipelines.wan_video import model_fn_wan_video
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

GIB = 2**30
DITS = {"I2V-14B": "6bfcfb3b", "T2V-14B": "aafcfd96", "Fun-1.3B-InP": "6d6ccde6", "TI2V-5B": "1f5ab770"}
VAES = {"Wan2.1_VAE": "ccc42284", "Wan2.2_VAE": "e1de6c02"}
SIZES = ((480, 832, 81), (704, 1280, 81))
TILE = (30, 52)  # latents, DiffSynth's default


class Peak(TorchDispatchMode):
    """Adds up the bytes of tensors that are alive; weights that were there before are not counted."""

    def __init__(self, model: torch.nn.Module):
        super().__init__()
        self.alive = {each.untyped_storage()._cdata: 0 for each in model.parameters()}
        self.now = self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self.alive:
                    self.alive[storage._cdata] = storage.nbytes()
                    self.now += storage.nbytes()
                    self.most = max(self.most, self.now)
                    weakref.finalize(storage, self._forget, storage._cdata)
        return made

    def _forget(self, key: int) -> None:
        self.now -= self.alive.pop(key)


def build(prefix: str) -> tuple[torch.nn.Module, dict[str, Any]]:
    """The class that DiffSynth has for a checkpoint of this hash, in bfloat16, and its sizes."""
    [config] = [each for each in wan_series if each["model_hash"].startswith(prefix)]
    module, name = config["model_class"].rsplit(".", 1)
    sizes = config.get("extra_kwargs", {})
    with torch.device("meta"):
        return getattr(importlib.import_module(module), name)(**sizes).to(torch.bfloat16), sizes


def empty(*shape: int) -> torch.Tensor:
    """A tensor of this shape without values."""
    return torch.empty(shape, device="meta", dtype=torch.bfloat16)


def peak_of_dit(prefix: str, height: int, width: int, num_frames: int) -> tuple[int, float]:
    """Bytes at the peak of a forward, and those bytes for each token and channel."""
    dit, sizes = build(prefix)
    dit.freqs = tuple(each.to("meta") for each in dit.freqs)
    fused = sizes.get("fuse_vae_embedding_in_latents", False)
    channels, factor = (48, 16) if fused else (16, 8)
    latents = ((num_frames - 1) // 4 + 1, height // factor, width // factor)
    inputs = {"latents": empty(1, channels, *latents), "timestep": empty(1), "context": empty(1, 512, 4096)}
    if sizes["in_dim"] == 36:
        inputs |= {"y": empty(1, 20, *latents), "clip_feature": empty(1, 257, 1280)}
    with torch.no_grad(), Peak(dit) as peak:
        model_fn_wan_video(dit, **inputs, fuse_vae_embedding_in_latents=fused)
    return peak.most, peak.most / (math.prod(latents) / 4 * sizes["dim"])


def peak_of_decoding(prefix: str, height: int, width: int, num_frames: int) -> tuple[int, float]:
    """Bytes at the peak of decoding whole frames, and those bytes for each pixel."""
    vae, _ = build(prefix)
    vae.scale = [each.to("meta") for each in vae.scale]
    factor = vae.upsampling_factor
    latents = ((num_frames - 1) // 4 + 1, height // factor, width // factor)
    with torch.no_grad(), Peak(vae) as peak:
        vae.model.decode(empty(1, vae.z_dim, *latents), vae.scale)
    return peak.most, peak.most / (height * width)


def main() -> None:
    """Print both tables."""
    torch.nn.functional.scaled_dot_product_attention = lambda q, k, v, *_, **__: torch.empty_like(q)
    for name, prefix in DITS.items():
        for size in SIZES:
            most, each = peak_of_dit(prefix, *size)
            print(f"{name} {size}: {most / GIB:.2f} GiB, {each:.1f} bytes a token and channel", flush=True)
    for name, prefix in VAES.items():
        factor = build(prefix)[0].upsampling_factor
        for size in ((TILE[0] * factor, TILE[1] * factor, 81), *SIZES):
            most, each = peak_of_decoding(prefix, *size)
            print(f"{name} {size}: {most / GIB:.2f} GiB, {each:.0f} bytes a pixel", flush=True)


if __name__ == "__main__":
    main()
