"""Images and videos that cannot be used are refused in one line, before anything is loaded."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import save_image
from helpers import SIZE

from step_skip.errors import InputError
from step_skip.media.images import fit_image, open_image

# --- images -------------------------------------------------------------------------------------------------


def truncated_image(path: Path) -> Path:
    whole = save_image(path.with_suffix(".jpg"), size=(256, 256)).read_bytes()
    path.write_bytes(whole[: len(whole) // 3])
    path.with_suffix(".jpg").unlink()
    return path


def bomb(path: Path) -> Path:
    """A PNG of 60000 x 60000 pixels in a few hundred bytes."""
    import struct
    import zlib

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(100)))
    )
    return path


def written(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


BAD_IMAGES = {
    "missing": (lambda path: path, "is not a file"),
    "folder": (lambda path: path.mkdir() or path, "holds no picture"),
    "empty": (lambda path: written(path, b""), "not an image"),
    "text": (lambda path: written(path, b"not a picture, just text"), "not an image"),
    "truncated": (truncated_image, "cannot be read"),
    "bomb": (bomb, "cannot be read"),
    "tiny": (lambda path: save_image(path, size=(15, 400)), "15 x 400 pixels, expected 16"),
    "long name": (lambda path: path.with_name("a" * 300), "too long"),
}


@pytest.mark.parametrize("kind", BAD_IMAGES)
def test_images_that_cannot_be_used(generate, refused, tmp_path, kind):
    make, words = BAD_IMAGES[kind]
    path = make(tmp_path / "picture.png")
    refused(lambda: generate("--image", path), words)


@pytest.mark.parametrize("damage", ["flip", "cut"])
def test_damaged_images_are_refused_or_read_never_a_traceback(tmp_path, damage):

    outcomes = set()
    for suffix in ("png", "jpg", "webp", "gif", "tiff", "bmp"):
        whole = save_image(tmp_path / f"whole.{suffix}", size=(64, 64)).read_bytes()
        for place in range(0, len(whole), max(1, len(whole) // 40)):
            flipped = whole[:place] + bytes([whole[place] ^ 0xFF]) + whole[place + 1 :]
            path = written(tmp_path / f"bad.{suffix}", flipped if damage == "flip" else whole[:place])
            try:
                outcomes.add(fit_image(open_image(path), width=SIZE, height=SIZE).size)
            except InputError as error:
                outcomes.add("refused")
                assert str(path) in str(error)
    assert outcomes == {(SIZE, SIZE), "refused"}


# --- videos -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "is not a file"),
        (b"", "not a video"),
        (b"\0\0\0\x20ftypisom not a video at all", "not a video"),
    ],
)
def test_videos_that_cannot_be_used(generate, refused, image, tmp_path, content, words):
    path = tmp_path / "clip.mp4"
    if content is not None:
        path.write_bytes(content)
    flags = ("--image", image, "--denoising_strength", 0.5, "--input_video", path)
    refused(lambda: generate(*flags), "--input_video", words)


def test_a_video_that_is_too_short(prior, generate, refused, image):
    flags = ("--denoising_strength", 0.5, "--input_video", prior / "output_full.mp4", "--num_frames", 13)
    refused(lambda: generate("--image", image, *flags), "has 9 frames, expected 13", "--num_frames")


def test_a_video_that_would_not_be_used(prior, generate, refused, image):
    flags = ("--input_video", prior / "output_full.mp4")
    refused(lambda: generate("--image", image, *flags), "--input_video", "--denoising_strength")
