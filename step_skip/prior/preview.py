"""--preview: what a step points at, as a small animated picture, without the VAE.

A latent pixel is shown in the colour that a linear map gives it. The map is the one that fits best where both
are known: the prior's own image and its encoded first frame. So it suits any VAE, and nothing is loaded.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import TYPE_CHECKING

from step_skip.errors import InputError
from step_skip.files.bounds import MAX_PREVIEW_BYTES
from step_skip.files.reading import read_file
from step_skip.files.writing import replacing
from step_skip.prior.files import load_conditioning
from step_skip.prior.metadata import read_run
from step_skip.prior.pictures import read_own_image
from step_skip.prior.prior import IMAGE_FILE, Prior, identity_file

if TYPE_CHECKING:
    import torch
    from PIL import Image

    from step_skip.pipeline.schedulers import ProgressCallback

PREVIEW_SIDE = 256  # pixels, at least, of the longer side
PREVIEW_MARK = (
    b"<x:xmpmeta>step_skip preview</x:xmpmeta>"  # in a preview of this program's, which may be replaced
)
MASK_CHANNELS = 4  # of y, before those of the encoded images


def preview_to(prior: Prior | str | Path, path: str | Path) -> ProgressCallback:
    """Return a callback_on_step_end that writes the preview again after each step.

    Args:
        prior: the one that is made, or that a clip is made from; its image gives the colours.
        path: a .webp; it is replaced.

    Raises:
        InputError: by the callback, see `colours_of`.
    """

    def show(step: int, steps: int, denoised: torch.Tensor) -> None:
        own = prior if isinstance(prior, Prior) else read_run(Path(prior))
        m = own.metadata
        frames = draw(denoised, colours_of(own))
        duration = 1000 * m.num_frames / own.fps / len(frames)
        with replacing(Path(path)) as temporary:
            frames[0].save(
                temporary,
                save_all=True,
                loop=0,
                append_images=frames[1:],
                duration=round(duration),
                xmp=PREVIEW_MARK,
            )

    return show


def check_own_preview(path: Path) -> None:
    """Refuse to replace a file that is no preview of this program's.

    Raises:
        InputError: names the file.
    """
    if not os.path.lexists(path):
        return
    with contextlib.suppress(InputError):
        if PREVIEW_MARK in read_file(path, most=MAX_PREVIEW_BYTES):
            return
    raise InputError(f"{path} exists and is no preview of this program's; move it, or choose another name")


def check_previewable(prior: Prior) -> None:
    """Refuse a prior that tells no colours.

    Raises:
        InputError: it holds no image, or not the encoded one.
    """
    if not prior.has(IMAGE_FILE) or not prior.identity_names:
        raise InputError(
            f"--preview takes its colours from the prior's image, and {prior.directory} holds none: "
            "leave it out"
        )


def colours_of(prior: Prior) -> torch.Tensor:
    """Return the affine map from latents to colours that fits the prior's own image best: [C + 1, 3]

    Raises:
        InputError: see `check_previewable`; or the prior is damaged.
    """
    check_previewable(prior)
    names = prior.identity_names
    name = "y" if "y" in names else "first_frame_latents"
    latents = load_conditioning(prior, identity_file(name))[0, :, 0]
    return fit_colours(latents[MASK_CHANNELS:] if name == "y" else latents, read_own_image(prior, IMAGE_FILE))


def fit_colours(latents: torch.Tensor, image: Image.Image) -> torch.Tensor:
    """Fit the affine map from latents to an image's colours, 0 ... 1: [C + 1, 3]

    Args:
        latents: of the image, [C, H, W].
    """
    import numpy as np
    import torch
    from PIL import Image

    _, height, width = latents.shape
    small = np.asarray(image.resize((width, height), Image.Resampling.BOX), dtype=np.float32) / 255
    colours = torch.from_numpy(small).reshape(-1, 3)
    return torch.linalg.lstsq(_with_ones(latents), colours, driver="gelsd").solution


def draw(denoised: torch.Tensor, colours: torch.Tensor) -> list[Image.Image]:
    """Draw each latent frame of [1, C, T, H, W] as a picture."""
    from PIL import Image

    _, _, _, height, width = denoised.shape
    scale = -(-PREVIEW_SIDE // max(height, width))
    pictures = []
    for latents in denoised[0].detach().cpu().transpose(0, 1):
        levels = (_with_ones(latents) @ colours).clamp(0, 1).mul(255).round().byte()
        picture = Image.fromarray(levels.reshape(height, width, 3).numpy())
        pictures.append(picture.resize((width * scale, height * scale), Image.Resampling.BICUBIC))
    return pictures


def _with_ones(latents: torch.Tensor) -> torch.Tensor:
    """Return [C, H, W] as float32 rows of one pixel each, with a constant: [H * W, C + 1]"""
    import torch

    pixels = latents.float().flatten(1).T
    return torch.cat([pixels, torch.ones(len(pixels), 1)], dim=1)
