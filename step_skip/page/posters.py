"""What the page shows before a video plays: a strip of its first, middle and last frame, kept beside it.

It is saved when a video is made, from the frames that are at hand, so that a page decodes no video. What a
page keeps of a folder's videos lies in a folder of its own there:

    page/<video>.jpg            the three frames, side by side
    page/order.json             the videos in the order they were asked for
    page/prior_<run id>_*.mp4   a prior's own video, with .json and .jpg: the folder can be copied elsewhere
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from step_skip.errors import InputError
from step_skip.files.bounds import MAX_AREA, MAX_POSTER_BYTES
from step_skip.files.reading import read_file
from step_skip.files.writing import folder_inside, replacing
from step_skip.media.videos import read_thumbs, thumb

if TYPE_CHECKING:
    from PIL import Image

KEPT_FOLDER = "page"
FRAMES = 3  # first, middle, last


def kept_folder(folder: Path) -> Path:
    """Return the folder where a page keeps what it shows.

    Raises:
        InputError: a link is there.
    """
    return folder_inside(folder, KEPT_FOLDER)


def poster_of(video: Path) -> Path:
    """Return the path of a clip's poster; that of a prior's copy lies beside it."""
    folder = video.parent if video.parent.name == KEPT_FOLDER else kept_folder(video.parent)
    return folder / f"{video.stem}.jpg"


def save_poster(video: Path, frames: Sequence[Image.Image]) -> Path:
    """Write the poster of a video from all of its frames."""
    import numpy as np

    first, middle, last = frames[0], frames[(len(frames) - 1) // 2], frames[-1]
    return write_poster(video, [thumb(np.asarray(frame)) for frame in (first, middle, last)])


def write_poster(video: Path, thumbs: Sequence[Image.Image]) -> Path:
    """Write three small frames, of one size, as the poster of a video."""
    from PIL import Image

    width, height = thumbs[0].size
    strip = Image.new("RGB", (FRAMES * width, height))
    for place, each in enumerate(thumbs):
        strip.paste(each, (place * width, 0))
    path = poster_of(video)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        strip.save(temporary, quality=85)
    return path


def find_poster(video: Path, *, num_frames: int | None) -> tuple[Path, tuple[int, int]]:
    """Return the poster of a clip; made again if it is older than the .mp4 or its JSON.

    Args:
        num_frames: how many the video must have; None: unknown.

    Returns:
        The poster, and width and height of each of its frames.

    Raises:
        InputError: the video is missing or damaged, as far as it has to be looked at.
    """
    path = poster_of(video)
    with contextlib.suppress(OSError):
        newest = max(each.lstat().st_mtime_ns for each in (video, video.with_suffix(".json")))
        if not video.is_symlink() and video.is_file() and path.lstat().st_mtime_ns >= newest:
            strip = read_poster(path)
            return path, (strip.width // FRAMES, strip.height)
    thumbs = read_thumbs(video, num_frames=num_frames)
    return write_poster(video, thumbs), thumbs[0].size


def read_poster(path: Path) -> Image.Image:
    """Open a poster; its pixels are decoded only when they are used.

    Raises:
        OSError: it is no JPEG of a poster's size.
    """
    from PIL import Image

    try:
        strip = Image.open(io.BytesIO(read_file(path, most=MAX_POSTER_BYTES)), formats=["JPEG"])
    except InputError as error:
        raise OSError(str(error)) from error
    if strip.width % FRAMES or strip.width * strip.height > MAX_AREA:
        raise OSError(f"{path} is not a poster")
    return strip


def read_frames(path: Path, *, height: int) -> list[Image.Image]:
    """Return the three frames of a poster, so many pixels high.

    Raises:
        OSError: it is no poster.
    """
    from PIL import Image

    strip = read_poster(path).convert("RGB")
    width = strip.width // FRAMES
    frames = [strip.crop((place * width, 0, (place + 1) * width, strip.height)) for place in range(FRAMES)]
    size = max(1, round(width * height / strip.height)), height
    return [frame.resize(size, Image.Resampling.LANCZOS) for frame in frames]
