"""Let ffmpeg read a file of untrusted origin: one container, no other file, no network, and a deadline.

Left alone, ffmpeg chooses a reader by a file's content, and some of its readers follow scripts: lists of
files (ffconcat), playlists with addresses (HLS, DASH). So the container is recognised here, by the first
bytes and from a short list, and ffmpeg is given its name. It is handed the opened file, not its path, and is
killed at the end of the block that started it.
"""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, BinaryIO

from step_skip.errors import InputError
from step_skip.files.bounds import MAX_AREA, MAX_DECODE_SECONDS
from step_skip.files.reading import opened

if TYPE_CHECKING:
    import numpy as np

# ffmpeg's name of each container that refers to no other file by default, and how such a file begins
CONTAINERS = {
    "mov": re.compile(rb".{4}(ftyp|moov|mdat|wide|free|skip|pnot)", re.DOTALL),
    "matroska": re.compile(rb"\x1a\x45\xdf\xa3"),
    "avi": re.compile(rb"RIFF.{4}AVI ", re.DOTALL),
}
EXPECTED = "MP4, MOV, MKV, WebM or AVI"


def find_container(file: BinaryIO) -> str:
    """Return ffmpeg's name of a file's container, by its first bytes.

    Raises:
        InputError: none of CONTAINERS.
    """
    file.seek(0)
    head = file.read(12)
    for name, beginning in CONTAINERS.items():
        if beginning.match(head):
            return name
    raise InputError(f"it does not begin as {EXPECTED} does")


@contextlib.contextmanager
def running_ffmpeg(
    file: BinaryIO, container: str, output: Sequence[str], *, codecs: str | None = None
) -> Iterator[IO[bytes]]:
    """Run ffmpeg on an opened file and yield its output; it is killed at the end of the block.

    Args:
        file: a regular file, so that ffmpeg never waits for input.
        container: see `find_container`.
        output: flags of the output.
        codecs: ffmpeg's names of the only decoders to use, separated by commas; None: any.

    Raises:
        InputError: it took more than MAX_DECODE_SECONDS.
    """
    import imageio_ffmpeg

    reading = ["-protocol_whitelist", "file", "-format_whitelist", container, "-f", container]
    reading += ["-max_pixels", str(MAX_AREA)]
    reading += [] if codecs is None else ["-codec_whitelist", codecs]
    # CPU seconds of all threads: ends it where this process was killed and could not
    limit = ["-timelimit", str(MAX_DECODE_SECONDS * (os.cpu_count() or 1))]
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-nostdin", *limit, *reading]
    command += ["-i", "file:/dev/stdin", *output, "-"]
    file.seek(0)
    process = subprocess.Popen(  # noqa: S603  imageio's own ffmpeg, and no shell
        command, stdin=file, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    expired = threading.Event()

    def end() -> None:
        expired.set()
        process.kill()

    timer = threading.Timer(MAX_DECODE_SECONDS, end)
    timer.daemon = True
    try:
        timer.start()
        assert process.stdout is not None  # noqa: S101  for mypy: it is a pipe
        with process.stdout:
            yield process.stdout
    finally:
        timer.cancel()
        process.kill()  # SIGTERM does not end an ffmpeg that waits
        process.wait()
        if expired.is_set():
            raise InputError(f"ffmpeg took more than {MAX_DECODE_SECONDS} s to read it")


@contextlib.contextmanager
def decoding(
    path: Path, *, follow: bool = False, codecs: str | None = None
) -> Iterator[Iterator[np.ndarray]]:
    """Yield an iterator over the frames of a video, [H, W, 3] uint8.

    Args:
        follow: a link, which a user may name.
        codecs: see `running_ffmpeg`.

    Raises:
        InputError: not a regular file, none of CONTAINERS, no frame, or a decoder that took too long.
    """
    output = ["-pix_fmt", "rgb24", "-c:v", "ppm", "-f", "image2pipe"]
    with opened(path, follow=follow) as file:
        container = find_container(file)
        with running_ffmpeg(file, container, output, codecs=codecs) as frames:
            yield _read_frames(frames)


def _read_frames(stream: IO[bytes]) -> Iterator[np.ndarray]:
    """Yield the PPM images of a stream, each [H, W, 3] uint8; ffmpeg writes them one after the other."""
    import numpy as np

    found = False
    while stream.readline() == b"P6\n":
        width, height = map(int, stream.readline().split())
        stream.readline()  # the largest value, 255
        pixels = stream.read(width * height * 3)
        if len(pixels) < width * height * 3:
            raise InputError("ffmpeg ended in the middle of a frame")
        found = True
        yield np.frombuffer(pixels, np.uint8).reshape(height, width, 3)
    if not found:
        raise InputError("ffmpeg finds no frame in it")
