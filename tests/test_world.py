"""The measures of the drawn world: right on true clips, and wrong where a clip is spoilt."""

import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "data" / "tiny_wan_i2v"))

import world

CLIPS = 30


@pytest.fixture(scope="module")
def clips() -> list[tuple]:
    """(motion, identity, open part, frames), every motion three times."""
    rng = np.random.default_rng(11)
    made = []
    for i in range(CLIPS):
        motion, identity = world.MOTIONS[i % len(world.MOTIONS)], world.sample_identity(rng)
        open_part = world.sample_open_part(rng)
        made.append((motion, identity, open_part, world.render(identity, motion, open_part)))
    return made


@pytest.fixture(scope="module")
def measured(clips) -> list[world.Measurement]:
    return [world.measure(frames, identity) for _, identity, _, frames in clips]


def blurred(frames: np.ndarray) -> np.ndarray:
    """A box of seven pixels over every frame."""
    padded = np.pad(frames.astype(np.float32), ((0, 0), (3, 3), (3, 3), (0, 0)), "edge")
    windows = np.lib.stride_tricks.sliding_window_view(padded, (7, 7), axis=(1, 2))
    return windows.mean((-1, -2)).round().astype(np.uint8)


def test_true_clips_show_their_motion(clips, measured):
    wrong = [(m, found.motion) for (m, *_), found in zip(clips, measured, strict=True) if found.motion != m]
    assert len(wrong) <= 0.01 * CLIPS, wrong


def test_true_clips_are_true(clips, measured):
    assert np.median([found.identity_error for found in measured]) < 2
    assert np.max([found.colour_error for found in measured]) < 3
    assert np.max([found.place_error for found in measured]) < 1
    assert np.median([found.sharpness for found in measured]) == pytest.approx(1, abs=0.1)


def test_blooms_are_read_without_a_mistake(clips, measured):
    for (_, _, open_part, _), found in zip(clips, measured, strict=True):
        visible = found.blooms >= 0
        assert visible.sum() >= 2
        assert np.array_equal(found.blooms[visible], open_part.blooms[visible])
        assert found.bloom_error < 0.01
        assert found.decided == 1


def test_the_track_follows_the_drawn_pose(clips, measured):
    for (motion, _, open_part, _), found in zip(clips, measured, strict=True):
        drawn = world.poses(motion, open_part)[list(world.TRACKED)]
        assert np.median(np.abs(found.pose - drawn)[:, :2]) < 0.5
        assert np.median(np.abs(found.pose - drawn)[:, 2:4]) < 0.03


def test_the_first_frame_tells_neither_motion_nor_blooms():
    rng = np.random.default_rng(0)
    identity = world.sample_identity(rng)
    for motion in world.MOTIONS:
        frames = world.render(identity, motion, world.sample_open_part(rng))
        assert frames.shape == (world.FRAMES, world.SIZE, world.SIZE, 3)
        assert np.array_equal(frames[0], world.first_frame(identity))


def test_a_blurred_clip_is_less_sharp_and_less_decided(clips, measured):
    for (_, identity, _, frames), found in list(zip(clips, measured, strict=True))[:6]:
        spoilt = world.measure(blurred(frames), identity)
        assert spoilt.sharpness < 0.6 * found.sharpness
        assert spoilt.bloom_error > found.bloom_error + 0.05
        assert spoilt.identity_error > 2 * found.identity_error


def test_a_wrong_colour_shows(clips, measured):
    for (_, identity, _, frames), found in list(zip(clips, measured, strict=True))[:6]:
        spoilt = world.measure(frames[..., [1, 2, 0]], identity)
        assert spoilt.colour_error > found.colour_error + 10


def test_another_face_shows(clips):
    (_, first, _, frames), (_, second, *_) = clips[0], clips[1]
    assert world.measure(frames, second).identity_error > 5 * world.measure(frames, first).identity_error


def test_a_clip_that_does_not_move_or_comes_back_is_not_obeyed(clips):
    for motion, identity, _, frames in clips[:6]:
        frozen = world.measure(np.repeat(frames[:1], world.FRAMES, 0), identity)
        assert frozen.motion == "still" != motion
        assert frozen.bloom_error > 0.5  # the buds never opened
        reversed_clip = world.measure(frames[::-1], identity)
        assert reversed_clip.motion != motion


def test_a_mirrored_motion_is_the_other_one(clips):
    left, right = clips[0], clips[1]
    for (_, identity, open_part, _), wrong in ((left, "right"), (right, "left")):
        assert world.measure(world.render(identity, wrong, open_part), identity).motion == wrong


def test_noise_is_no_clip(clips):
    _, identity, _, frames = clips[0]
    noise = np.random.default_rng(0).integers(0, 256, frames.shape).astype(np.uint8)
    assert world.measure(noise, identity).identity_error > 30


def test_agreement_counts_tiles_seen_in_both(clips):
    _, identity, open_part, frames = clips[0]
    other = world.measure(world.render(identity, "right", open_part), identity)
    assert world.agreement(world.measure(frames, identity), other) == 1
    fresh = world.sample_open_part(np.random.default_rng(99))
    shuffled = world.measure(world.render(identity, "right", fresh), identity)
    assert world.agreement(other, shuffled) < 0.5


def test_held_out_wordings_are_new_but_made_of_known_words():
    trained = {wording for words, _ in world.WORDINGS.values() for wording in words}
    known = {word for wording in trained for word in wording.split()}
    for motion, (_, held_out) in world.WORDINGS.items():
        for wording in held_out:
            assert wording not in trained, motion
            assert set(wording.split()) <= known, wording


def test_no_two_motions_share_a_wording():
    said = [wording for words in world.WORDINGS.values() for group in words for wording in group]
    assert len(said) == len(set(said))


def test_unknown_motions_and_shapes_are_refused(clips):
    _, identity, open_part, frames = clips[0]
    with pytest.raises(ValueError, match="no motion 'jump'; known: left, right"):
        world.render(identity, "jump", open_part)
    with pytest.raises(ValueError, match="expected frames of shape"):
        world.measure(frames[:5], identity)
