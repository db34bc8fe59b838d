"""What the network sees besides latents has to fit its weights: a prior's tensors may be anybody's."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from step_skip.errors import InputError
from step_skip.files.bounds import MAX_TOKENS
from step_skip.models.families import FAMILIES

IDENTITY_NAMES = sorted({name for family in FAMILIES.values() for name in family.conditioning})
FUSED = "first_frame_latents"  # of those, the one that is a part of the latents


@dataclass(frozen=True, kw_only=True)
class Conditioning:
    """What the network sees besides latents and timestep, in the pipeline's dtype.

    identity: what it sees of the images, by the pipeline's names; families.py has their shapes.
    context_posi and context_nega: [1, 512, 4096] for Wan. context_nega is None where cfg_scale is 1.
    """

    identity: Mapping[str, torch.Tensor]
    context_posi: torch.Tensor
    context_nega: torch.Tensor | None

    def to(self, device: str | torch.device) -> Conditioning:
        """The same tensors on `device`."""
        return Conditioning(
            identity={name: tensor.to(device) for name, tensor in self.identity.items()},
            context_posi=self.context_posi.to(device),
            context_nega=None if self.context_nega is None else self.context_nega.to(device),
        )


StartCallback = Callable[[torch.Tensor, Conditioning], None]
TOKENS = f"1 to {MAX_TOKENS}"
Sizes = tuple[int | str, ...]  # TOKENS stands for any number of them


def check_conditioning(
    conditioning: Mapping[str, torch.Tensor | None], *, dit: torch.nn.Module, latents: torch.Tensor
) -> None:
    """Compare the shapes of what is kept of images and prompts with the latents and a WanModel's weights.

    Args:
        conditioning: by the pipeline's names for it, and context_posi and context_nega.
        dit: whose weights tell the widths; what it has no weight for is not compared.
        latents: [B, C, T, H, W]

    Raises:
        InputError: the network could not take one, or can't do without one that isn't there.
    """
    for name, expected in _expected(dit, latents).items():
        tensor = conditioning.get(name)
        if tensor is None:
            if name == "clip_feature" or (name == "y" and expected[1] != 0):
                raise InputError(f"the prior has no {name}, and these weights take one; make the prior again")
            continue
        found = tuple(tensor.shape)
        fits = len(found) == len(expected) and all(
            0 < size <= MAX_TOKENS if wanted == TOKENS else size == wanted
            for size, wanted in zip(found, expected, strict=True)
        )
        if not fits:
            raise InputError(
                f"the prior's {name} has shape {list(found)}, expected [{', '.join(map(str, expected))}] for "
                "these latents and weights; make the prior again"
            )


def _expected(dit: torch.nn.Module, latents: torch.Tensor) -> dict[str, Sizes]:
    """The shapes that a network takes, by name."""
    # "module": DiffSynth's wrapper around weights that are offloaded
    sizes = {name.replace(".module.", "."): weight.shape for name, weight in dit.named_parameters()}
    batch, channels, frames, *places = latents.shape
    expected: dict[str, Sizes] = {"first_frame_latents": (batch, channels, 1, *places)}
    if (size := sizes.get("patch_embedding.weight")) is not None:
        expected["y"] = (batch, size[1] - channels, frames, *places)
    if (size := sizes.get("img_emb.proj.0.weight")) is not None:
        both = sizes.get("img_emb.emb_pos")  # [1, tokens, width] where it takes two images
        expected["clip_feature"] = (batch, TOKENS if both is None else both[1], size[0])
    if (size := sizes.get("text_embedding.0.weight")) is not None:
        expected |= dict.fromkeys(("context_posi", "context_nega"), (batch, TOKENS, size[1]))
    return expected
