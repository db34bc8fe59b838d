"""Hold a network's conditioning, and check that it fits the weights: a prior's tensors may be untrusted."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from step_skip.errors import InputError
from step_skip.files.bounds import MAX_TOKENS
from step_skip.models.families import FAMILIES

IDENTITY_NAMES = sorted({name for family in FAMILIES.values() for name in family.conditioning})
FUSED = "first_frame_latents"  # the one of IDENTITY_NAMES that is fused into the latents


@dataclass(frozen=True, kw_only=True)
class Conditioning:
    """The network's inputs besides latents and timestep, in the pipeline's dtype.

    identity: tensors computed from the images, by the pipeline's names; models/families.py has their shapes.
    context_posi, context_nega: encoded prompts, [1, 512, 4096] for Wan. context_nega is None if cfg_scale is
        1.
    """

    identity: Mapping[str, torch.Tensor]
    context_posi: torch.Tensor
    context_nega: torch.Tensor | None

    def to(self, device: str | torch.device) -> Conditioning:
        """Return the conditioning with its tensors on a device."""
        return Conditioning(
            identity={name: tensor.to(device) for name, tensor in self.identity.items()},
            context_posi=self.context_posi.to(device),
            context_nega=None if self.context_nega is None else self.context_nega.to(device),
        )


StartCallback = Callable[[torch.Tensor, Conditioning], None]
TOKENS = f"1 to {MAX_TOKENS}"
Sizes = tuple[int | str, ...]  # a shape, in which TOKENS stands for any allowed number of tokens


def check_conditioning(
    conditioning: Mapping[str, torch.Tensor | None], *, dit: torch.nn.Module, latents: torch.Tensor
) -> None:
    """Check that the shapes of a conditioning fit the latents and a WanModel's weights.

    Args:
        conditioning: tensors by the pipeline's names, context_posi and context_nega included.
        dit: the network; tensors for which it has no weights are not checked.
        latents: [B, C, T, H, W]

    Raises:
        InputError: a tensor doesn't fit, or one that the network needs is missing.
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
    """Return the shapes of the tensors that a network takes, by name."""
    # "module" is the attribute of DiffSynth's wrapper around offloaded weights.
    sizes = {name.replace(".module.", "."): weight.shape for name, weight in dit.named_parameters()}
    batch, channels, frames, *spatial = latents.shape
    expected: dict[str, Sizes] = {"first_frame_latents": (batch, channels, 1, *spatial)}
    if (size := sizes.get("patch_embedding.weight")) is not None:
        expected["y"] = (batch, size[1] - channels, frames, *spatial)
    if (size := sizes.get("img_emb.proj.0.weight")) is not None:
        both = sizes.get("img_emb.emb_pos")  # [1, tokens, width], present if the network takes two images
        expected["clip_feature"] = (batch, TOKENS if both is None else both[1], size[0])
    if (size := sizes.get("text_embedding.0.weight")) is not None:
        expected |= dict.fromkeys(("context_posi", "context_nega"), (batch, TOKENS, size[1]))
    return expected
