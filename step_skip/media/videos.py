"""Read video files at a model's size, write clips as .mp4 files, and decode frames for a page.

`read_video` reads a user's video, `write_video` writes a clip, `is_whole_mp4` finds truncated files,
`read_thumbs` decodes three small frames.
"""

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

THUMB_HEIGHT = 240  # largest height of a thumbnail, in pixels
CODEC = "h264"  # the only decoder for clips: `write_video` encodes so


def fetch_example(image: Path, *, root: Path) -> Path:
    """Download DiffSynth's example image from ModelScope to its path below `root`, unless it exists.

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
    """Write frames to an .mp4 file (H.264), completely or not at all; see `replacing`.

    Args:
        fps: frames per second.
        overwrite: replace an existing file.
        tags: metadata to store in the file, by MP4's names.

    Raises:
        TakenError: the file exists and may not be replaced.
        DiskError: the file could not be written, or ffmpeg wrote only a part of it.
    """
    import imageio
    import numpy as np

    cut_off = OSError(errno.EIO, "ffmpeg wrote only a part of the file, see its message above", str(path))
    options = [word for name, text in (tags or {}).items() for word in ("-metadata", f"{name}={text}")]
    with replacing(path, overwrite=overwrite) as temporary:
        try:  # an absolute path, because imageio expands a leading "~" to the user's home
            writer = imageio.get_writer(temporary.absolute(), fps=fps, quality=8, output_params=options)
            with writer:
                for frame in frames:
                    writer.append_data(np.asarray(frame))
        except OSError as error:
            raise cut_off from error
        if not is_whole_mp4(temporary):  # imageio ignores ffmpeg's exit code
            raise cut_off


def video_bytes(size: tuple[int, int, int]) -> int:
    """Return a safe upper bound of a clip's size on disk, in bytes: a quarter of its raw frames.

    Args:
        size: height, width (pixels) and number of frames.
    """
    return math.prod(size) * 3 // 4


def is_whole_mp4(path: Path) -> bool:
    """Return whether a file is a row of whole MP4 boxes: first its type (ftyp), later its index (moov)."""
    kinds, offset, size = [], 0, path.stat().st_size
    with path.open("rb") as file:
        for _ in range(MAX_BOXES):
            if offset >= size:
                break
            file.seek(offset)
            head = file.read(16)  # length in 32 bits, kind and, if the length is 1, the length in 64 bits
            length = int.from_bytes(head[:4], "big")
            offset += max(8, int.from_bytes(head[8:], "big") if length == 1 else length)
            kinds.append(head[4:8])
    return offset == size and kinds[:1] == [b"ftyp"] and b"moov" in kinds


def read_thumbs(path: Path, *, num_frames: int | None) -> list[Image]:
    """Return the first, middle and last frame of a video, at most THUMB_HEIGHT pixels high.

    Args:
        num_frames: expected number of frames; None: unknown.

    Raises:
        InputError: the video is missing, truncated, or has another number of frames.
    """
    if path.is_symlink():
        raise InputError(f"{path.name} is a symbolic link, expected a file; copy the file there")
    if not path.is_file():
        raise InputError(f"{path.name} is missing from {path.parent}; copy it again or make it again")
    if not is_whole_mp4(path):
        raise InputError(f"{path.name} is damaged: it is not a complete .mp4 file; make it again")
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
        shown = f"over {most}" if found > most else found
        raise InputError(
            f"{path.name} is damaged: {shown} frames, expected {num_frames or f'at most {most}'}; "
            "make it again"
        )
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
    """Convert a frame, [H, W, 3] uint8, to an image of at most THUMB_HEIGHT pixels in height."""
    from PIL import Image

    height, width, _ = frame.shape
    new = min(height, THUMB_HEIGHT)
    size = min(max(1, round(width * new / height)), 8 * THUMB_HEIGHT), new
    return Image.fromarray(frame).resize(size, Image.Resampling.LANCZOS)
