"""Videos that a user names, or that a prior holds: read as the model sees them, written whole."""

from __future__ import annotations

import errno
import itertools
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from step_skip.errors import InputError, RunError
from step_skip.files.bounds import LIMITS, MAX_BOXES, MAX_PIXELS
from step_skip.files.writing import replacing
from step_skip.media.decoding import decoding

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image

THUMB_HEIGHT = 240  # pixels, at most
CODEC = "h264"  # the only decoder for clips: `write_video` encodes so


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


def read_video(path: Path, *, width: int, height: int, num_frames: int) -> list[Image]:
    """Read the first `num_frames` frames of a video, cropped and scaled to width x height pixels.

    Raises:
        InputError: no file, not a video, or too few frames.
    """
    if not path.is_file():
        raise InputError(f"--input_video {path} is not a file; name a video")
    from diffsynth.utils.data import crop_and_resize
    from PIL import Image

    frames = []
    try:
        with decoding(path, follow=True) as decoded:
            for frame in itertools.islice(decoded, num_frames):
                image = Image.fromarray(frame)
                same = image.size == (width, height)
                frames.append(image if same else crop_and_resize(image, height, width))
    except InputError as error:
        raise InputError(
            f"--input_video {path} is not a video that can be read ({error}); save it again as MP4"
        ) from error
    if len(frames) < num_frames:
        raise InputError(
            f"--input_video {path} has {len(frames)} frames, expected {num_frames}; lower --num_frames"
        )
    return frames


def write_video(
    frames: list[Image],
    path: Path,
    *,
    fps: float,
    overwrite: bool = True,
    tags: Mapping[str, str] | None = None,
) -> None:
    """Write frames as an .mp4 (H.264), whole or not at all; see `replacing`.

    Args:
        tags: the video's own metadata, by MP4's names.
    """
    import imageio
    import numpy as np

    cut_off = OSError(errno.EIO, "ffmpeg wrote only a part of it, its own message is above", str(path))
    with replacing(path, overwrite=overwrite) as temporary:
        try:  # imageio takes a first "~" for the user's home
            said = [word for name, text in (tags or {}).items() for word in ("-metadata", f"{name}={text}")]
            writer = imageio.get_writer(temporary.absolute(), fps=fps, quality=8, output_params=said)
            with writer:
                for frame in frames:
                    writer.append_data(np.asarray(frame))
        except OSError as error:
            raise cut_off from error
        if not is_whole_mp4(temporary):  # imageio doesn't look at ffmpeg's exit code
            raise cut_off


def video_bytes(size: tuple[int, int, int]) -> int:
    """Return a safe upper bound of a video's size on disk, in bytes: a quarter of its raw frames.

    Args:
        size: height, width (pixels) and number of frames.
    """
    return math.prod(size) * 3 // 4


def is_whole_mp4(path: Path) -> bool:
    """Return whether a file is a row of whole MP4 boxes: first its type (ftyp), later its index (moov)."""
    kinds, place, size = [], 0, path.stat().st_size
    with path.open("rb") as file:
        for _ in range(MAX_BOXES):
            if place >= size:
                break
            file.seek(place)
            head = file.read(16)  # length, kind and, where the length is 1, the length again in 64 bits
            length = int.from_bytes(head[:4], "big")
            place += max(8, int.from_bytes(head[8:], "big") if length == 1 else length)
            kinds.append(head[4:8])
    return place == size and kinds[:1] == [b"ftyp"] and b"moov" in kinds


def read_thumbs(path: Path, *, num_frames: int | None) -> list[Image]:
    """First, middle and last frame of a video, at most THUMB_HEIGHT pixels high.

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
        expected = num_frames or _count_frames(path, most=most)
        wanted = [1, (expected + 1) // 2, expected]
        with decoding(path, codecs=CODEC) as frames:
            for found, frame in enumerate(_first_frames(frames, most=most), 1):
                if found in wanted:
                    thumbs[found] = thumb(frame)
    except InputError as error:
        raise InputError(f"{path.name} is damaged: it cannot be decoded ({error})") from error
    if not 0 < found == expected <= most:
        told = f"over {most}" if found > most else found
        raise InputError(f"{path.name} is damaged: {told} frames, expected {num_frames or f'at most {most}'}")
    return [thumbs[number] for number in wanted]


def _count_frames(path: Path, *, most: int) -> int:
    with decoding(path, codecs=CODEC) as frames:
        return sum(1 for _ in _first_frames(frames, most=most))


def _first_frames(frames: Iterator[np.ndarray], *, most: int) -> Iterator[np.ndarray]:
    """Yield the first frames, [H, W, 3] uint8, one more than `most`, or as many as MAX_PIXELS."""
    for number, frame in enumerate(frames):
        if number > most or number * frame.shape[0] * frame.shape[1] > MAX_PIXELS:
            return
        yield frame


def thumb(frame: Any) -> Image:
    """A frame, [H, W, 3] uint8, as an image of at most THUMB_HEIGHT pixels in height."""
    from PIL import Image

    height, width, _ = frame.shape
    new = min(height, THUMB_HEIGHT)
    size = min(max(1, round(width * new / height)), 8 * THUMB_HEIGHT), new
    return Image.fromarray(frame).resize(size, Image.Resampling.LANCZOS)
