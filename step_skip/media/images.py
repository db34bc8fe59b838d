"""Read images that users name and fit them to a clip's size.

`files_of` lists the images of a folder, `open_image` reads one as upright RGB, `fit_picture` crops, pads or
stretches it to the size that a model takes and returns it as a `Picture`.
"""

from __future__ import annotations

import contextlib
import io
import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from step_skip.errors import InputError

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image

log = logging.getLogger(__name__)

IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP")  # Pillow runs external programs for others
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".tif", ".tiff", ".bmp")  # of files in a folder
MIN_IMAGE_SIDE = 16  # pixels of the shorter side
CROP_PREVIEW_SIDE = 512  # pixels of the longer side

Box = tuple[int, int, int, int]  # left, top, right and bottom in an image's own pixels


@dataclass(frozen=True, kw_only=True)
class Picture:
    """An image fitted to the clip's size, with a record of the given image and of how it was fitted."""

    image: Image  # RGB, of the clip's size
    name: str  # name of the given file; "" if there is none
    size: tuple[int, int]  # width and height of the given image, in pixels
    box: Box  # the visible part of the given image; with "pad" it extends beyond the image
    fit: str  # one of FITS
    background: str  # colour as CSS names it
    sha256: str | None = None  # SHA-256 of the given file, in hex
    preview: Image | None = None  # the given image with the cropped parts darkened; None: nothing was cropped

    @property
    def record(self) -> dict[str, Any]:
        """Return the entry of a prior's metadata for this image."""
        return {
            "name": self.name,
            "size": list(self.size),
            "box": list(self.box),
            "fit": self.fit,
            "background": hex_colour(self.background),
            **({} if self.sha256 is None else {"sha256": self.sha256}),
        }


def hex_colour(name: str) -> str:
    """Convert a colour as CSS names it to #rrggbb."""
    from PIL import ImageColor

    red, green, blue = ImageColor.getrgb(name)[:3]
    return f"#{red:02x}{green:02x}{blue:02x}"


# --- reading ------------------------------------------------------------------------------------------------


def files_of(path: Path) -> list[Path]:
    """Return the images in a folder, sorted by name, or the file itself; opens none of them.

    Raises:
        InputError: there is no such file, or no image in the folder.
    """
    if not path.is_dir():
        if not path.is_file():
            raise InputError(f"--image {path} is not a file; name a picture, or a folder of them")
        return [path]
    files = sorted(
        each for each in path.iterdir() if each.suffix.lower() in IMAGE_SUFFIXES and each.name[0] != "."
    )
    if not files:
        raise InputError(f"--image {path} holds no picture; expected files as {', '.join(IMAGE_SUFFIXES)}")
    return files


def open_image(given: str | Path | Image, *, background: str = "white", label: str = "--image") -> Image:
    """Return an image, given as a path or a PIL image, upright and in RGB at its original size.

    Args:
        background: a colour as CSS names it, shown through transparent parts.
        label: name of the image in error messages.

    Raises:
        InputError: no file, not an image, or an image that is too small or too large.
    """
    if isinstance(given, str | Path):
        return _open_file(Path(given), background=background, label=label)
    try:
        return _large_enough(to_rgb(given, background=background, label=label), label=label)
    except ValueError as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{label} cannot be used ({error}); convert it to RGB") from error


def _open_file(
    path: Path,
    *,
    background: str = "white",
    label: str,
    size: tuple[int, int] | None = None,
    content: bytes | None = None,
) -> Image:
    """Read an image file; see `open_image`.

    Args:
        size: expected width and height; another size is rejected before decoding. None: any size.
        content: the file's bytes; None: they are read from `path`.
    """
    with _opened(path, label=label, content=content) as opened:
        if size not in (None, opened.size):
            expected = "{} x {}".format(*size)
            raise ValueError(f"{opened.width} x {opened.height} pixels, expected {expected}")
        image = to_rgb(opened, background=background, label=f"{label} {path}")
    return _large_enough(image, label=f"{label} {path}")


def image_size(path: Path, *, label: str = "--image") -> tuple[int, int]:
    """Return width and height of an upright image, in pixels, without decoding it.

    Raises:
        InputError: no file, or not an image.
    """
    from PIL import ExifTags, Image

    with _opened(path, label=label) as opened:
        # The method of Image, because PNG's own override decodes the image.
        orientation = Image.Image.getexif(opened).get(ExifTags.Base.Orientation, 1)
        return opened.size if orientation < 5 else (opened.height, opened.width)


@contextlib.contextmanager
def _opened(path: Path, *, label: str, content: bytes | None = None) -> Iterator[Image]:
    """Open an image file; turn any error of Pillow's into an InputError of one line."""
    from PIL import Image, UnidentifiedImageError

    if content is None and not path.is_file():
        raise InputError(f"{label} {path} is not a file; name a picture")
    try:
        with Image.open(path if content is None else io.BytesIO(content), formats=IMAGE_FORMATS) as opened:
            yield opened
    except UnidentifiedImageError:
        raise InputError(f"{label} {path} is not an image that can be read; use PNG, JPEG or WebP") from None
    except Exception as error:  # Pillow's readers raise errors of many types for a broken file
        raise InputError(
            f"{label} {path} cannot be read ({str(error)[:100] or type(error).__name__}); "
            "save it again as PNG or JPEG"
        ) from error


def _large_enough(image: Image, *, label: str) -> Image:
    if min(image.size) < MIN_IMAGE_SIDE:
        raise InputError(
            f"{label} is {image.width} x {image.height} pixels, expected {MIN_IMAGE_SIDE} or more "
            "per side; use a larger picture"
        )
    return image


def to_rgb(image: Image, *, background: str, label: str) -> Image:
    """Convert an image of any of Pillow's modes to RGB, rotated by its EXIF orientation.

    Args:
        background: a colour as CSS names it, shown through transparent parts.
        label: name of the image in messages.

    Raises:
        ValueError: pixel values outside the known ranges, so that white is undefined (see `grey_levels`).
    """
    from PIL import Image, ImageOps

    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I") or image.mode == "F":
        return Image.fromarray(grey_levels(image)).convert("RGB")
    if image.mode == "LAB":
        return lab_to_rgb(image)
    if image.has_transparency_data:
        image = image.convert("LA").convert("RGBA") if image.mode == "La" else image.convert("RGBA")
        if image.getchannel("A").getextrema() != (255, 255):
            log.info(f"{label} has transparent parts: {background} shows through (--background)")
        return Image.alpha_composite(Image.new("RGBA", image.size, background), image).convert("RGB")
    return image.convert("RGB")


def grey_levels(image: Image) -> np.ndarray:
    """Convert the pixels of a grey image of more than 8 bits to uint8, [H, W].

    White is 65535 in a file of 16 bits, which Pillow may read as 32 bits. In floats it is 1, or 255 if any
    value is above 1.

    Raises:
        ValueError: values below 0 or above white.
    """
    import numpy as np

    values = np.asarray(image)
    least, most = float(values.min()), float(values.max())
    white = (1 if most <= 1 else 255) if image.mode == "F" else 65535
    if not 0 <= least <= most <= white:  # false for NaN, too
        raise ValueError(f"grey values from {least:g} to {most:g}, expected 0 to {white}")
    return (values.astype(np.float64) * (255 / white)).round().astype(np.uint8)


def lab_to_rgb(image: Image) -> Image:
    """Convert an image from CIE L*a*b* to sRGB."""
    from PIL import ImageCms

    lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
    converted = ImageCms.profileToProfile(image, lab, srgb, outputMode="RGB")
    return cast("Image", converted)  # None only with inPlace


# --- into that size -----------------------------------------------------------------------------------------


def fit_picture(
    image: Image, *, width: int, height: int, fit: str, background: str, name: str, label: str
) -> Picture:
    """Fit an image to width x height pixels: "crop" it to its centre, "pad" it, or "stretch" it."""
    box = fit_box(image.size, width=width, height=height, fit=fit)
    if fit == "stretch":
        fitted = fit_image(image, width=width, height=height, label=label)
    elif fit == "pad":
        fitted = pad(image, box, width=width, height=height, background=background)
    else:
        fitted = image.crop(box).resize((width, height))
    preview = None
    if fit == "crop" and box != (0, 0, *image.size):
        preview = show_box(image, box)
        left, top, right, bottom = box
        log.info(
            f"{label} ({image.width} x {image.height}) is cropped to its centre, "
            f"{right - left} x {bottom - top}; --fit pad keeps all of it"
        )
    return Picture(
        image=fitted, name=name, size=image.size, box=box, fit=fit, background=background, preview=preview
    )


def fit_image(image: Image, *, width: int, height: int, label: str = "the image") -> Image:
    """Stretch an image to width x height pixels; warn if its aspect ratio changes by more than 10%."""
    if abs(math.log(image.width * height / (image.height * width))) > math.log(1.1):
        log.warning(f"{label} ({image.width} x {image.height}) is stretched to {width} x {height}")
    return image.resize((width, height))


def fit_box(size: tuple[int, int], *, width: int, height: int, fit: str) -> Box:
    """Return the box of an image, in its own pixels, that is shown in width x height pixels.

    Args:
        size: width and height of the image.
        fit: "crop" gives the centre, "stretch" the whole image, "pad" a box that extends beyond the image.
    """
    own_width, own_height = size
    is_wider = own_width * height > own_height * width
    seen_width, seen_height = own_width, own_height
    if fit != "stretch" and is_wider == (fit == "crop"):
        seen_width = max(1, round(own_height * width / height))
    elif fit != "stretch":
        seen_height = max(1, round(own_width * height / width))
    left, top = (own_width - seen_width) // 2, (own_height - seen_height) // 2
    return left, top, left + seen_width, top + seen_height


def pad(image: Image, box: Box, *, width: int, height: int, background: str) -> Image:
    """Return the whole image, centred on a background of width x height pixels.

    Args:
        box: from `fit_box` with "pad".
    """
    from PIL import Image

    left, top, right, bottom = box
    scale = width / (right - left), height / (bottom - top)
    inner = max(1, round(image.width * scale[0])), max(1, round(image.height * scale[1]))
    canvas = Image.new("RGB", (width, height), background)
    canvas.paste(image.resize(inner), ((width - inner[0]) // 2, (height - inner[1]) // 2))
    return canvas


def show_box(image: Image, box: Box) -> Image:
    """Return a preview of an image, darkened outside the box, at most CROP_PREVIEW_SIDE pixels per side."""
    scale = min(1, CROP_PREVIEW_SIDE / max(image.size))
    small = image.resize((max(1, round(image.width * scale)), max(1, round(image.height * scale))))
    left, top, right, bottom = (round(edge * scale) for edge in box)
    shown = small.point(lambda value: value // 4)
    shown.paste(small.crop((left, top, right, bottom)), (left, top))
    return shown


FITS = ("crop", "pad", "stretch")  # ways to fit an image whose aspect ratio is not the clip's


def check_colour(background: str) -> None:
    """Check that Pillow knows a colour.

    Raises:
        InputError: it doesn't.
    """
    from PIL import ImageColor

    try:
        ImageColor.getrgb(background)
    except ValueError:
        raise InputError(
            f"--background {background}: expected a colour as CSS names it, white or #336699 for example"
        ) from None


def crop_preview_file(name: str) -> str:
    """Return the name of the preview file that shows how the image `name` was cropped."""
    return f"{Path(name).stem}_crop.png"
