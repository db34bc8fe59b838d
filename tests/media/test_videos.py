"""Videos: written whole or not at all, and read without keeping all frames."""

from __future__ import annotations

import pytest
from helpers import fill_disk, video_frames
from PIL import Image

from step_skip.media.videos import is_whole_mp4, write_video


def noise_frames(number: int) -> list:
    return [Image.effect_noise((64, 64), 100).convert("RGB") for _ in range(number)]


def test_a_video_that_was_cut_off_is_not_kept(small_disk, monkeypatch):
    """imageio says nothing when ffmpeg fails."""
    fill_disk(small_disk, monkeypatch, free_kib=40)
    with pytest.raises(OSError, match="only a part"):
        write_video(noise_frames(200), small_disk / "video.mp4", fps=8)
    assert [path.name for path in small_disk.iterdir()] == ["others"]


@pytest.mark.parametrize("fps", [0.1, 1, 23.976, 60, 1000])
def test_a_whole_video_is_kept(tmp_path, fps):
    path = tmp_path / "video.mp4"
    write_video(noise_frames(3), path, fps=fps)
    assert is_whole_mp4(path)
    assert len(video_frames(path)) == 3
    content = path.read_bytes()
    for kept in (0, 7, 8, 100, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:kept])
        assert not is_whole_mp4(path)


def test_three_thumbs_are_all_that_is_kept_of_a_film(tmp_path, monkeypatch):
    from step_skip.media import videos

    made, thumb = [], videos.thumb
    monkeypatch.setattr(videos, "thumb", lambda frame: made.append(thumb(frame)) or made[-1])
    for count in (1, 2, 8, 9):
        frames = [Image.new("RGB", (16, 16), (25 * i, 0, 0)) for i in range(count)]
        videos.write_video(frames, tmp_path / "film.mp4", fps=8)
        for num_frames in (count, None):
            made.clear()
            thumbs = videos.read_thumbs(tmp_path / "film.mp4", num_frames=num_frames)
            reds = [thumb.getpixel((4, 4))[0] for thumb in thumbs]
            assert reds == pytest.approx([0, 25 * ((count - 1) // 2), 25 * (count - 1)], abs=8)
            assert len(made) <= 3
