"""TODO"""

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

IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP")  # Pillow hands others to programs
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".tif", ".tiff", ".bmp")  # looked for in folders
MIN_IMAGE_SIDE = 16  # pixels; anything smaller is no picture
CROP_PREVIEW_SIDE = 512  # pixels, of the longer one

Box = tuple[int, int, int, int]  # left, top, right and bottom in an image's own pixels


@dataclass(frozen=True, kw_only=True)
class Picture:
    """An image as the model will see it, and what became of the one that was given."""

    image: Image  # RGB, of the video's size
    name: str  # of its file; "" where there is none
    size: tuple[int, int]  # its own width and height
    box: Box  # what is seen of it; with "pad" it reaches beyond
    fit: str
    background: str
    sha256: str | None = None  # of its file
    preview: Image | None = None  # what was cropped away, in the dark

    @property
    def record(self) -> dict[str, Any]:
        """As a prior's metadata has it."""
        return {
            "name": self.name,
            "size": list(self.size),
            "box": list(self.box),
            "fit": self.fit,
            "background": hex_colour(self.background),
            **({} if self.sha256 is None else {"sha256": self.sha256}),
        }


def hex_colour(name: str) -> str:
    """A colour as CSS names it, as #rrggbb."""
    from PIL import ImageColor

    red, green, blue = ImageColor.getrgb(name)[:3]
    return f"#{red:02x}{green:02x}{blue:02x}"


# --- reading ------------------------------------------------------------------------------------------------


def files_of(path: Path) -> list[Path]:
    """The images in a folder, by name, or the file itself; none is opened.

    Raises:
        InputError: nothing is there, or no image in the folder.
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
    """An image, or the file of one, upright and in RGB, of its own size.

    Args:
        background: a colour as CSS names it; transparent parts are put on it.
        label: what an error calls it.

    Raises:
        InputError: no file, not an image, or too small or too large to be one.
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
    """Of a size that is not the given one nothing is decoded; content: of a file that is read already."""
    with _opened(path, label=label, content=content) as opened:
        if size not in (None, opened.size):
            expected = "{} x {}".format(*size)
            raise ValueError(f"{opened.width} x {opened.height} pixels, expected {expected}")
        image = to_rgb(opened, background=background, label=f"{label} {path}")
    return _large_enough(image, label=f"{label} {path}")


def image_size(path: Path, *, label: str = "--image") -> tuple[int, int]:
    """Width and height of an image that is held upright; nothing of it is decoded.

    Raises:
        InputError: no file, or not an image.
    """
    from PIL import ExifTags, Image

    with _opened(path, label=label) as opened:
        orientation = Image.Image.getexif(opened).get(ExifTags.Base.Orientation, 1)  # PNG's own decodes
        return opened.size if orientation < 5 else (opened.height, opened.width)


@contextlib.contextmanager
def _opened(path: Path, *, label: str, content: bytes | None = None) -> Iterator[Image]:
    """An image file, with whatever Pillow makes of it in one line."""
    from PIL import Image, UnidentifiedImageError

    if content is None and not path.is_file():
        raise InputError(f"{label} {path} is not a file; name a picture")
    try:
        with Image.open(path if content is None else io.BytesIO(content), formats=IMAGE_FORMATS) as opened:
            yield opened
    except UnidentifiedImageError:
        raise InputError(f"{label} {path} is not an image that can be read; use PNG, JPEG or WebP") from None
    except Exception as error:  # Pillow's readers raise whatever they meet in a broken file
        raise InputError(
            f"{label} {path} cannot be read ({str(error)[:100] or type(error).__name__}); "
            "save it again as PNG or JPEG"
        ) from error


def _large_enough(image: Image, *, label: str) -> Image:
    if min(image.size) < MIN_IMAGE_SIDE:
        raise InputError(
            f"{label} is {image.width} x {image.height} pixels, expected {MIN_IMAGE_SIDE} or more "
            "a side; use a larger picture"
        )
    return image


def to_rgb(image: Image, *, background: str, label: str) -> Image:
    """An image of any mode of Pillow's, turned as its EXIF says and converted to RGB.

    Args:
        background: a colour as CSS names it; transparent parts are put on it.
        label: what a message calls the image.

    Raises:
        ValueError: pixel values of which nobody can tell what is white.
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
            log.info(f"{label} is transparent in places: {background} shows through (--background)")
        return Image.alpha_composite(Image.new("RGBA", image.size, background), image).convert("RGB")
    return image.convert("RGB")


def grey_levels(image: Image) -> np.ndarray:
    """The pixels of a grey image of more than 8 bits: uint8 [H, W].

    White is 65535 in a file of 16 bits, which Pillow may read as 32; of floats it is 1, or 255 where there is
    any above 1.

    Raises:
        ValueError: values beyond that.
    """
    import numpy as np

    values = np.asarray(image)
    least, most = float(values.min()), float(values.max())
    white = (1 if most <= 1 else 255) if image.mode == "F" else 65535
    if not 0 <= least <= most <= white:  # false for NaN, too
        raise ValueError(f"grey values from {least:g} to {most:g}, expected 0 to {white}")
    return (values.astype(np.float64) * (255 / white)).round().astype(np.uint8)


def lab_to_rgb(image: Image) -> Image:
    """From CIE L*a*b* to sRGB."""
    from PIL import ImageCms

    lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
    converted = ImageCms.profileToProfile(image, lab, srgb, outputMode="RGB")
    return cast("Image", converted)  # None only with inPlace


# --- into that size -----------------------------------------------------------------------------------------


def fit_picture(
    image: Image, *, width: int, height: int, fit: str, background: str, name: str, label: str
) -> Picture:
    """Bring an image to width x height pixels: "crop" its middle, "pad" it, or "stretch" it."""
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
            f"{label} ({image.width} x {image.height}) is cropped to its middle, "
            f"{right - left} x {bottom - top}; --fit pad keeps all of it"
        )
    return Picture(
        image=fitted, name=name, size=image.size, box=box, fit=fit, background=background, preview=preview
    )


def fit_image(image: Image, *, width: int, height: int, label: str = "the image") -> Image:
    """An image stretched to width x height pixels."""
    if abs(math.log(image.width * height / (image.height * width))) > math.log(1.1):
        log.warning(f"{label} ({image.width} x {image.height}) is stretched to {width} x {height}")
    return image.resize((width, height))


def fit_box(size: tuple[int, int], *, width: int, height: int, fit: str) -> Box:
    """What of an image of this size is seen in width x height pixels.

    Its middle with "crop", all of it with "stretch"; with "pad" more than there is.
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
    """All of an image, in the middle of width x height pixels."""
    from PIL import Image

    left, top, right, bottom = box
    scale = width / (right - left), height / (bottom - top)
    inner = max(1, round(image.width * scale[0])), max(1, round(image.height * scale[1]))
    canvas = Image.new("RGB", (width, height), background)
    canvas.paste(image.resize(inner), ((width - inner[0]) // 2, (height - inner[1]) // 2))
    return canvas


def show_box(image: Image, box: Box) -> Image:
    """An image made small, dark where it is outside the box."""
    scale = min(1, CROP_PREVIEW_SIDE / max(image.size))
    small = image.resize((max(1, round(image.width * scale)), max(1, round(image.height * scale))))
    left, top, right, bottom = (round(edge * scale) for edge in box)
    shown = small.point(lambda value: value // 4)
    shown.paste(small.crop((left, top, right, bottom)), (left, top))
    return shown


FITS = ("crop", "pad", "stretch")  # what becomes of an image of another shape than the video's


def check_colour(background: str) -> None:
    """Refuse what Pillow takes for no colour.

    Raises:
        InputError: it does.
    """
    from PIL import ImageColor

    try:
        ImageColor.getrgb(background)
    except ValueError:
        raise InputError(
            f"--background {background}: expected a colour as CSS names it, white or #336699 for example"
        ) from None


def crop_preview_file(name: str) -> str:
    """Name of the picture that shows what was cropped from the image `name`."""
    return f"{Path(name).stem}_crop.png"
