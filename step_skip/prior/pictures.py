"""The images a prior keeps, as the model saw them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from step_skip.media.images import _open_file, fit_picture, open_image
from step_skip.prior.files import read_own_file
from step_skip.prior.prior import IMAGE_FILE, Prior

if TYPE_CHECKING:
    from PIL.Image import Image


def read_own_image(prior: Prior, name: str) -> Image:
    """Read an image that a prior keeps, as the model saw it.

    Raises:
        InputError: it is missing, damaged, or of another size.
    """
    size, content = (prior.metadata.width, prior.metadata.height), read_own_file(prior, name)
    return _open_file(prior.directory / name, label="the prior's image", size=size, content=content)


def read_as_before(given: Path | Image, prior: Prior) -> Image:
    """Read an image and fit it as the prior's own was fitted; an older prior's was stretched.

    Raises:
        InputError: it can't be read.
    """
    m = prior.metadata
    own = m.images.get(IMAGE_FILE)
    fit, background = ("stretch", "white") if own is None else (own.fit, own.background)
    image, name = open_image(given, background=background), f"{given}" if isinstance(given, Path) else ""
    return fit_picture(
        image,
        width=m.width,
        height=m.height,
        fit=fit,
        background=background,
        name=name,
        label=f"--image {name}".rstrip(),
    ).image
