"""Images and videos that a user names, or that a prior holds: read as the model sees them, written whole."""

from __future__ import annotations

import errno
import io
import logging
import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from step_skip.files import InputError, RunError, replacing
from step_skip.prior import Prior, RunSettings, read_own_file
from step_skip.schema import LIMITS, MAX_PIXELS

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image

log = logging.getLogger(__name__)

IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP")  # Pillow hands others to programs
THUMB_HEIGHT = 96  # pixels
MAX_BOXES = 100  # of an .mp4; ffmpeg writes four
MAX_AREA = 2**25  # pixels of a frame that is decoded for a page: 8K
MIN_IMAGE_SIDE = 16  # pixels; anything smaller is no picture


def fetch_example(image: Path, *, root: Path) -> Path:
    """Fetch DiffSynth's example image from ModelScope to its place below `root`, once.

    Raises:
        RunError: it could not be fetched.
    """
    if image.is_file():
        return image
    from modelscope import dataset_snapshot_download

    try:
        dataset_snapshot_download(
            "DiffSynth-Studio/examples_in_diffsynth",
            local_dir=str(root),
            allow_file_pattern=str(image.relative_to(root)),
        )
    except Exception as error:  # modelscope, requests and urllib3 each raise their own
        raise RunError(
            f"cannot fetch the example image from ModelScope ({type(error).__name__}): connect to the "
            "network, or give an image of your own with --image"
        ) from error
    return image


def read_image(
    path: Path,
    *,
    width: int,
    height: int,
    label: str = "--image",
    content: bytes | None = None,
    exact: bool = False,
) -> Image:
    """Read an image as the model will see it: upright, RGB, stretched to width x height pixels.

    Args:
        label: what an error calls it.
        content: of the file, where that is read already.
        exact: refuse any other size, before memory is taken for it.

    Raises:
        InputError: no file, not an image, or too small or too large to be one.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    if content is None and not path.is_file():
        raise InputError(f"{label} {path} is not a file; name a picture")
    try:
        with Image.open(path if content is None else io.BytesIO(content), formats=IMAGE_FORMATS) as opened:
            if exact and opened.size != (width, height):
                raise ValueError(f"{opened.width} x {opened.height} pixels, expected {width} x {height}")
            image = ImageOps.exif_transpose(opened).convert("RGB")
    except UnidentifiedImageError:
        raise InputError(f"{label} {path} is not an image that can be read; use PNG, JPEG or WebP") from None
    except Exception as error:  # Pillow's readers raise whatever they meet in a broken file
        raise InputError(
            f"{label} {path} cannot be read ({str(error)[:100] or type(error).__name__}); "
            "save it again as PNG or JPEG"
        ) from error
    return fit_image(image, width=width, height=height, label=f"{label} {path}")


def read_own_image(prior: Prior, name: str) -> Image:
    """An image that a prior keeps, as the model saw it.

    Raises:
        InputError: it is missing, damaged, or of another size.
    """
    sizes = {"width": prior.metadata["width"], "height": prior.metadata["height"]}
    content, label = read_own_file(prior, name), "the prior's image"
    return read_image(prior.directory / name, **sizes, label=label, content=content, exact=True)


def fit_image(image: Image, *, width: int, height: int, label: str = "the image") -> Image:
    """An image as the model will see it: RGB, stretched to width x height pixels.

    Raises:
        InputError: it is too small to be one.
    """
    if min(image.size) < MIN_IMAGE_SIDE:
        raise InputError(
            f"{label} is {image.width} x {image.height} pixels, expected {MIN_IMAGE_SIDE} or more "
            "a side; use a larger picture"
        )
    if abs(math.log(image.width * height / (image.height * width))) > math.log(1.1):
        log.warning(
            f"{label} ({image.width} x {image.height}) is stretched to {width} x {height}; crop it first"
        )
    return image.convert("RGB").resize((width, height))


def as_image(given: str | Path | Image, *, width: int, height: int) -> Image:
    """An image, or the file of one, as the model will see it.

    Raises:
        InputError: it can't be used as one.
    """
    if isinstance(given, str | Path):
        return read_image(Path(given), width=width, height=height)
    return fit_image(given, width=width, height=height)


def read_video(path: Path, *, width: int, height: int, num_frames: int) -> list[Image]:
    """Read the first `num_frames` frames of a video, cropped and scaled to width x height pixels.

    Raises:
        InputError: no file, not a video, or too few frames.
    """
    if not path.is_file():
        raise InputError(f"--input_video {path} is not a file; name a video")
    from diffsynth.utils.data import VideoData

    try:
        video = VideoData(str(path.absolute()), height=height, width=width)
        found = len(video)
        frames = [video[i] for i in range(min(found, num_frames))]
    except Exception as error:  # imageio and ffmpeg raise whatever they like for a broken file
        raise InputError(
            f"--input_video {path} is not a video that can be read ({type(error).__name__}); "
            "save it again as MP4"
        ) from error
    if found < num_frames:
        raise InputError(
            f"--input_video {path} has {found} frames, expected {num_frames}; lower --num_frames"
        )
    return frames


def write_video(frames: list[Image], path: Path, *, fps: float, overwrite: bool = True) -> None:
    """Write frames as an .mp4 (H.264), whole or not at all; see `replacing`."""
    import imageio
    import numpy as np

    cut_off = OSError(errno.EIO, "ffmpeg wrote only a part of it, its own message is above", str(path))
    with replacing(path, overwrite=overwrite) as temporary:
        try:  # imageio takes a first "~" for the user's home
            writer = imageio.get_writer(temporary.absolute(), fps=fps, quality=8)
            with writer:
                for frame in frames:
                    writer.append_data(np.asarray(frame))
        except OSError as error:
            raise cut_off from error
        if not is_whole_mp4(temporary):  # imageio doesn't look at ffmpeg's exit code
            raise cut_off


def video_bytes(settings: RunSettings) -> int:
    """A safe upper bound of a video's size on disk: a quarter of its raw frames."""
    return settings.num_frames * settings.height * settings.width * 3 // 4


def is_whole_mp4(path: Path) -> bool:
    """Whether a file is a row of whole MP4 boxes, the index (moov) that ffmpeg writes last among them."""
    kinds, place, size = set(), 0, path.stat().st_size
    with path.open("rb") as file:
        for _ in range(MAX_BOXES):
            if place >= size:
                break
            file.seek(place)
            head = file.read(16)  # length, kind and, where the length is 1, the length again in 64 bits
            length = int.from_bytes(head[:4], "big")
            place += max(8, int.from_bytes(head[8:], "big") if length == 1 else length)
            kinds.add(head[4:8])
    return place == size and b"moov" in kinds


def read_thumbs(path: Path, *, num_frames: int | None) -> list[Image]:
    """First, middle and last frame of a video, THUMB_HEIGHT pixels high.

    Args:
        num_frames: how many it must have; None: unknown.

    Raises:
        InputError: it is missing, cut off, or has another number of frames.
    """
    if path.is_symlink():
        raise InputError(f"{path.name} is a symbolic link, which may lead anywhere")
    if not path.is_file():
        raise InputError(f"{path.name} is missing from {path.parent}")
    if not is_whole_mp4(path):
        raise InputError(f"{path.name} is damaged: it is no whole .mp4")
    most = num_frames or LIMITS["num_frames"][1]
    thumbs, found = {}, 0
    try:
        expected = num_frames or sum(1 for _ in _decoded(path, most=most))
        wanted = [1, (expected + 1) // 2, expected]
        for found, frame in enumerate(_decoded(path, most=most), 1):
            if found in wanted:
                thumbs[found] = thumb(frame)
    except Exception as error:  # imageio and ffmpeg raise whatever they like for a broken file
        raise InputError(f"{path.name} is damaged: it cannot be decoded") from error
    if not 0 < found == expected <= most:
        told = f"over {most}" if found > most else found
        raise InputError(f"{path.name} is damaged: {told} frames, expected {num_frames or f'at most {most}'}")
    return [thumbs[number] for number in wanted]


def _decoded(path: Path, *, most: int) -> Iterator[np.ndarray]:
    """The first frames of a video, [H, W, 3] uint8, one more than `most`, or as many as MAX_PIXELS."""
    import imageio

    input_params = ["-max_pixels", str(MAX_AREA)]
    reader: Any = imageio.get_reader(path.absolute(), format="FFMPEG", input_params=input_params)
    with reader:
        for number, frame in enumerate(reader):
            if number > most or number * frame.shape[0] * frame.shape[1] > MAX_PIXELS:
                return
            yield frame


def thumb(frame: Any) -> Image:
    """A frame, [H, W, 3] uint8, as an image of THUMB_HEIGHT pixels."""
    from PIL import Image

    height, width, _ = frame.shape
    size = min(max(1, round(width * THUMB_HEIGHT / height)), 8 * THUMB_HEIGHT), THUMB_HEIGHT
    return Image.fromarray(frame).resize(size, Image.Resampling.LANCZOS)
