"""What the network sees besides latents has to fit its weights: a prior's tensors may be anybody's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from step_skip.files import InputError

if TYPE_CHECKING:
    import torch

MAX_TOKENS = 4096  # of a prompt or an image; Wan2.1 has 512 and 257
TOKENS = f"1 to {MAX_TOKENS}"


def check_conditioning(
    conditioning: Mapping[str, torch.Tensor | None], *, dit: torch.nn.Module, latents: torch.Tensor
) -> None:
    """Compare the shapes of y, clip_feature and the contexts with the latents and a WanModel's weights.

    Args:
        conditioning: by the names of `pipeline.Conditioning`.
        dit: whose weights tell the widths; what it has no weight for is not compared.
        latents: [B, C, T, H, W]

    Raises:
        InputError: the network could not take one.
    """
    # "module": DiffSynth's wrapper around weights that are offloaded
    sizes = {name.replace(".module.", "."): weight.shape for name, weight in dit.named_parameters()}
    batch, channels, *places = latents.shape
    known = {
        "y": ("patch_embedding.weight", lambda size: (batch, size[1] - channels, *places)),
        "clip_feature": ("img_emb.proj.0.weight", lambda size: (batch, TOKENS, size[0])),
        "context_posi": ("text_embedding.0.weight", lambda size: (batch, TOKENS, size[1])),
        "context_nega": ("text_embedding.0.weight", lambda size: (batch, TOKENS, size[1])),
    }
    for name, (weight, shape_for) in known.items():
        tensor = conditioning.get(name)
        if tensor is None or weight not in sizes:
            continue
        expected, found = shape_for(sizes[weight]), tuple(tensor.shape)
        fits = len(found) == len(expected) and all(
            0 < size <= MAX_TOKENS if wanted == TOKENS else size == wanted
            for size, wanted in zip(found, expected, strict=True)
        )
        if not fits:
            raise InputError(
                f"the prior's {name} has shape {list(found)}, expected [{', '.join(map(str, expected))}] for "
                "these latents and weights; make the prior again"
            )
