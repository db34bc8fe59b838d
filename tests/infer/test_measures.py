"""Measures of a clip, on frames whose truth is known, and where they are shown."""

from __future__ import annotations

import json

import numpy as np
import pytest
from helpers import OTHER_PROMPT, read_json
from PIL import Image

from step_skip.infer import measures
from step_skip.infer.measures import measure_frames

NAMES = ("identity", "movement", "flicker")


def picture(seed: int = 0) -> Image.Image:
    """Something with texture at every scale, 192 x 144."""
    rng = np.random.default_rng(seed)
    layers = [
        Image.fromarray(rng.integers(0, 255, (3 * scale, 4 * scale, 3), dtype=np.uint8)).resize((192, 144))
        for scale in (2, 6, 18)
    ]
    return Image.fromarray(np.mean([np.asarray(layer) for layer in layers], axis=0).astype(np.uint8))


def pan(step: float = 1.0, number: int = 17) -> list[Image.Image]:
    """The middle of the picture, seen by a camera that moves so many pixels a frame."""
    return [
        picture().transform(
            (144, 96), Image.Transform.AFFINE, (1, 0, step * each, 0, 1, 24), Image.Resampling.BICUBIC
        )
        for each in range(number)
    ]


def test_moving_alone_changes_nothing_but_movement():
    still, slow, fast = (measure_frames(pan(step)) for step in (0, 1, 2))
    assert (still["movement"], still["flicker"]) == (0, 0)
    assert still["identity"] == measures.MOST_IDENTITY
    assert slow["movement"] == pytest.approx(16 / 96, rel=0.2)
    assert fast["movement"] == pytest.approx(32 / 96, rel=0.2)
    for moving in (slow, fast):
        assert moving["flicker"] < 4


def test_another_identity_is_seen_while_it_moves():
    other = np.asarray(picture(1).crop((0, 24, 144, 120)), float)
    shares = [0.0, 0.1, 0.3, 0.9]
    found = []
    for share in shares:  # of another face, mixed in by the end
        frames = [np.asarray(frame, float) for frame in pan()]
        mixed = [
            Image.fromarray((frame + share * place / 16 * (other - frame)).astype(np.uint8))
            for place, frame in enumerate(frames)
        ]
        found.append(measure_frames(mixed)["identity"])
    assert found == sorted(found, reverse=True)
    assert found[0] - found[-1] > 5


def test_flicker_is_seen_while_it_moves():
    frames = pan()
    lit = [frame.point(lambda v, up=8 * (place % 2): v + up) for place, frame in enumerate(frames)]
    before, after = measure_frames(frames), measure_frames(lit)
    assert after["flicker"] > before["flicker"] + 10
    assert after["movement"] == pytest.approx(before["movement"], rel=0.2)


@pytest.mark.parametrize("size", [(832, 480), (480, 832), (16, 16), (16, 320)])
def test_any_size_and_a_flat_picture(size):
    """A large clip is measured small; a flat one shows no movement."""
    found = measure_frames([Image.new("RGB", size, "teal")] * 4)
    assert found == {"identity": measures.MOST_IDENTITY, "movement": 0, "flicker": 0}
    assert measure_frames([Image.new("RGB", size)] * 2) == {}


def test_they_stand_in_the_json_on_the_page_and_in_the_last_lines(prior_copy, infer, tmp_path):
    outcome = infer(prior_copy, "--prompt", OTHER_PROMPT, "--num_steps", 1, "--output_dir", tmp_path / "s")
    [path] = outcome.path.glob("*.json")
    report = read_json(path)
    told = ", ".join(measures.describe_measures(report))
    assert told.startswith(f"identity {report['identity']:.1f} dB, movement ")
    assert told.endswith(" dB to a full run") and told in outcome.err
    page = (outcome.path / "index.html").read_text()
    assert told in page.replace("<span>", "").replace("</span>", "")
    for name in NAMES:
        assert f"<option value={name}>{name}</option>" in page
        assert f'data-{name}="{report[name]}"' in page


def test_a_measure_that_fails_loses_no_clip(prior_copy, infer, monkeypatch):
    first = infer(prior_copy, "--prompt", OTHER_PROMPT, "--num_steps", 1)

    def fail(frames: list[Image.Image]) -> dict[str, float]:
        raise MemoryError("no room")

    monkeypatch.setattr(measures, "measure_frames", fail)
    second = infer(prior_copy, "--prompt", OTHER_PROMPT, "--num_steps", 1, "--output", prior_copy / "a.mp4")
    assert "could not be measured (MemoryError: no room)" in second.err
    assert not set(NAMES) & set(second.report)
    for name in ("latents_sha256", "video_sha256"):
        assert second.report[name] == first.report[name]


def test_clips_without_measures_stay_and_are_shown(prior_copy, infer, tmp_path):
    """As those of earlier versions are."""
    flags = ("--prompt", OTHER_PROMPT, "--num_steps", 1, "--output_dir", tmp_path / "s")
    folder = infer(prior_copy, *flags).path
    [path] = folder.glob("*.json")
    edit(path, without=NAMES)
    outcome = infer(prior_copy, *flags)
    assert outcome.code == 0 and len(list(folder.glob("*.json"))) == 1
    page = (folder / "index.html").read_text()
    assert "predicted closeness</option>" in page
    assert "<option value=identity>" not in page and "<span>flicker " not in page


def edit(path, *, without) -> None:
    """Take entries out of a JSON file, whose video is the same."""
    report = {name: value for name, value in read_json(path).items() if name not in without}
    path.write_text(json.dumps(report))
