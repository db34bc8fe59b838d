"""Videos of untrusted origin: ffmpeg reads the one file, follows no script, and never outlives its reader."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from PIL import Image

from step_skip.errors import InputError
from step_skip.infer.report import read_comment
from step_skip.media import decoding as decoding_module
from step_skip.media.decoding import decoding
from step_skip.media.videos import is_whole_mp4, read_thumbs, read_video, write_video

ROOT = Path(__file__).parents[2]
SIZE = 64


@pytest.fixture
def film(tmp_path) -> Path:
    """A red film outside of the folder that the tests name."""
    path = tmp_path / "outside" / "film.mp4"
    path.parent.mkdir()
    write_video([Image.new("RGB", (SIZE, SIZE), (250, 0, 0))] * 9, path, fps=8)
    return path


# --- scripts ------------------------------------------------------------------------------------------------

SCRIPTS = {
    "ffconcat": "ffconcat version 1.0\nfile film.bin\n",
    "HLS": "#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\nfilm.mp4\n#EXT-X-ENDLIST\n",
    "HLS, absolute": "#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\nfile:{film}\n#EXT-X-ENDLIST\n",
    "DASH": '<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011"><BaseURL>{film}</BaseURL></MPD>',
    "SDP": "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 9 RTP/AVP 96\n",
    "metadata": ";FFMETADATA1\ncomment=taken from a text\n",
    "picture": "P6\n1 1\n255\nabc",
}


@pytest.mark.parametrize("kind", SCRIPTS)
def test_a_script_is_no_video(film, tmp_path, kind):
    """ffmpeg would choose a reader that follows it."""
    path = tmp_path / "clip.mp4"
    path.write_text(SCRIPTS[kind].format(film=film))
    for name in ("film.bin", "film.mp4"):
        (tmp_path / name).symlink_to(film)
    with pytest.raises(InputError, match="does not begin as MP4"):
        read_video(path, width=SIZE, height=SIZE, num_frames=9)
    with pytest.raises(InputError, match="not a complete .mp4"):
        read_thumbs(path, num_frames=9)
    assert read_comment(path) == ""


def test_a_script_laid_out_as_boxes_is_no_mp4(film, tmp_path):
    """Its first letters are the length of a box of 1.7 GB; here all but its ends is a hole."""
    path, script = tmp_path / "clip.mp4", b"ffconcat version 1.0\nfile film.bin\n#"
    with path.open("wb") as file:
        file.write(script)
        file.seek(int.from_bytes(script[:4], "big"))
        file.write(b"\0\0\0#moov" + b"#" * 27)
    assert not is_whole_mp4(path)
    with pytest.raises(InputError, match="not a complete .mp4"):
        read_thumbs(path, num_frames=9)


def box(kind: bytes, content: bytes) -> bytes:
    return (8 + len(content)).to_bytes(4, "big") + kind + content


def refer(path: Path, film: Path) -> None:
    """Let the samples of an .mp4 lie in another file: QuickTime's alias, with an absolute path."""
    content, target = path.read_bytes(), str(film).encode().ljust(200, b"\0")
    alias = bytes(10 + 1 + 27 + 12 + 1 + 63 + 16 + 4 + 16) + b"\0\2" + len(target).to_bytes(2, "big") + target
    old = box(b"dref", bytes(4) + b"\0\0\0\1" + box(b"url ", b"\0\0\0\1"))
    new = box(b"dref", bytes(4) + b"\0\0\0\1" + box(b"alis", bytes(4) + alias + b"\xff\xff\0\0"))
    assert content.count(old) == 1
    at = content.index(old)
    changed = bytearray(content.replace(old, new))
    for kind in (b"moov", b"trak", b"mdia", b"minf", b"dinf"):  # the boxes around it
        start = content.rindex(kind, 0, at) - 4
        length = int.from_bytes(content[start : start + 4], "big") + len(new) - len(old)
        changed[start : start + 4] = length.to_bytes(4, "big")
    path.write_bytes(changed)


def test_an_mp4_whose_samples_lie_in_another_file_is_not_followed(film, tmp_path):
    path = tmp_path / "clip.mp4"
    path.write_bytes(film.read_bytes())
    refer(path, film)
    assert is_whole_mp4(path)
    with pytest.raises(InputError, match="finds no frame"):
        read_thumbs(path, num_frames=9)
    with pytest.raises(InputError, match="finds no frame"):
        read_video(path, width=SIZE, height=SIZE, num_frames=9)


def test_another_codec_is_not_decoded_for_a_page(film, tmp_path):
    import imageio_ffmpeg

    path = tmp_path / "clip.mp4"
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-i", film, "-c:v", "mpeg4", path]
    subprocess.run(command, check=True, stdin=subprocess.DEVNULL)
    with pytest.raises(InputError, match="finds no frame"):
        read_thumbs(path, num_frames=9)
    assert len(read_video(path, width=SIZE, height=SIZE, num_frames=9)) == 9


def test_a_link_or_a_pipe_is_not_decoded(film, tmp_path):
    (tmp_path / "link.mp4").symlink_to(film)
    os.mkfifo(tmp_path / "pipe.mp4")
    for name in ("link.mp4", "pipe.mp4"):
        with pytest.raises(InputError), decoding(tmp_path / name):
            raise AssertionError("it was opened")


# --- the process --------------------------------------------------------------------------------------------


@pytest.fixture
def stuck(tmp_path, monkeypatch) -> Path:
    """Put a program in ffmpeg's place that never answers and ignores SIGTERM; it writes its id here."""
    program, said = tmp_path / "ffmpeg", tmp_path / "pid"
    program.write_text(
        f"#!/bin/sh\ntrap '' TERM\necho $$ > {said}.new && mv {said}.new {said}\nexec sleep 300\n"
    )
    program.chmod(0o755)
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", str(program))
    return said


def wait_for(done) -> None:
    for _ in range(600):
        if done():
            return
        time.sleep(0.1)
    raise AssertionError("waited for a minute")


def is_gone(pid: int) -> bool:
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def test_ffmpeg_has_a_deadline(film, stuck, monkeypatch):
    monkeypatch.setattr(decoding_module, "MAX_DECODE_SECONDS", 1)
    with pytest.raises(InputError, match=r"damaged: .* took more than 1 s"):
        read_thumbs(film, num_frames=9)
    with pytest.raises(InputError, match="not a video that can be read .* took more than 1 s"):
        read_video(film, width=SIZE, height=SIZE, num_frames=9)
    with pytest.raises(InputError, match="took more than 1 s"):
        read_comment(film)
    assert is_gone(int(stuck.read_text()))


def test_ffmpeg_ends_with_an_error_of_its_reader(film):
    with pytest.raises(KeyError), decoding(film) as frames:
        next(frames)
        [child] = psutil.Process().children()
        raise KeyError
    assert is_gone(child.pid)


READER = """
import sys, time
from pathlib import Path
from step_skip.cli.terminal import run_script
from step_skip.media.decoding import decoding

def main():
    with decoding(Path(sys.argv[1])) as frames:
        print(next(frames).shape, flush=True)
        time.sleep(300)

run_script(main)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stuck_ffmpeg_ends_with_its_reader(film, stuck, number):
    reader = subprocess.Popen(
        [sys.executable, "-c", READER, film],
        cwd=ROOT,
        stderr=subprocess.DEVNULL,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a job in the background ignores it
    )
    wait_for(stuck.exists)
    reader.send_signal(number)
    assert reader.wait(timeout=60) == 128 + number
    wait_for(lambda: is_gone(int(stuck.read_text())))


def test_ffmpeg_ends_with_a_reader_that_was_killed(film):
    """Nothing is left to end it but its closed pipe."""
    reader = subprocess.Popen([sys.executable, "-c", READER, film], cwd=ROOT, stderr=subprocess.PIPE)
    assert b"(64, 64, 3)" in reader.stderr.readline()
    [child] = psutil.Process(reader.pid).children()
    reader.kill()
    reader.wait()
    wait_for(lambda: is_gone(child.pid))
