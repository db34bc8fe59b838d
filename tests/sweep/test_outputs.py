"""Where clips go: names that never collide, and what is never replaced."""

from __future__ import annotations

import os
import shutil

import pytest
from helpers import OTHER_PROMPT, fill_disk, listing, read_json

from step_skip.sweep import make_clips

# --- names --------------------------------------------------------------------------------------------------


def test_videos_of_other_prompts_and_settings_stand_side_by_side(prior_copy, infer):
    commands = [(), ("--prompt", OTHER_PROMPT), ("--start_step", 8), ("--cfg_scale", 2), ("--steps", 2)]
    paths = [infer(prior_copy, *flags).path for flags in commands]
    assert len(set(paths)) == len(commands)
    for path in paths:
        assert path.parent == prior_copy / "outputs"
        assert path.exists()
        assert path.with_suffix(".json").exists()
    assert "the-portrait-moves-left" in paths[0].name
    assert paths[0].name.startswith("step06_")


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ("", "no-prompt"),
        ("../../etc/passwd", "etc-passwd"),
        ("一只小船。", "一只小船"),
        ("船" * 50, "船" * 20),
        ("a" + "船" * 50, "a" + "船" * 19),
        ("a" * 5000, "a" * 60),
        ("-rf *", "rf"),
        ("...", "prompt"),
        ("a\nb", "a-b"),
    ],
)
def test_any_prompt_makes_a_sound_file_name(prior_copy, infer, prompt, words):
    path = infer(prior_copy, "--start_step", 9, f"--prompt={prompt}").path
    assert path.parent == prior_copy / "outputs"
    assert path.name.split("_")[1] == words
    assert read_json(path.with_suffix(".json"))["prompt"] == prompt


def test_however_many_steps_make_a_sound_file_name(make_prior, infer, tmp_path):
    prior = shutil.copytree(make_prior("--num_inference_steps", "60"), tmp_path / "run_many")
    names = [infer(prior, "--num_steps", number).path.name for number in (2, 6, 7, 60)]
    names.append(infer(prior, "--steps", *range(7)).path.name)
    starts = [name.split("_")[0] for name in names]
    assert starts == ["steps0-45", "steps0-16-30-42-51-57", "7steps", "60steps", "7steps"]
    assert len({name.split("_")[-1] for name in names}) == len(names)  # the steps are in the hash, too


@pytest.mark.parametrize("name", ["a" * 246 + ".mp4", "ünïcode 一只小船.mp4", "two words.mp4"])
def test_any_output_name_that_the_disk_takes(prior, infer, tmp_path, name):
    outcome = infer(prior, "--start_step", 9, "--output", tmp_path / "new folder" / name)
    assert outcome.path == tmp_path / "new folder" / name
    assert set(listing(outcome.path.parent)) == {name, name.replace(".mp4", ".json")}


# --- what is there ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("taken", ["video.mp4", "video.json"])
def test_nothing_is_overwritten_unasked(prior, infer, refused, tmp_path, taken):
    (tmp_path / taken).write_text("precious")
    refused(lambda: infer(prior, "--output", tmp_path / "video.mp4"), f"{taken} exists", "--overwrite")
    assert infer(prior, "--output", tmp_path / "video.mp4", "--overwrite").code == 0
    assert (tmp_path / taken).read_bytes() != b"precious"


@pytest.mark.parametrize("name", ["run_metadata.mp4", "output_full.mp4", "RUN_METADATA.mp4"])
def test_the_priors_own_files_are_never_replaced(prior_copy, infer, refused, tmp_path, name):
    (tmp_path / "link").symlink_to(prior_copy)
    for folder in (prior_copy, tmp_path / "link", prior_copy / ".." / prior_copy.name):
        for flags in ((), ("--overwrite",)):
            refused(lambda f=folder, o=flags: infer(prior_copy, "--output", f / name, *o), "the prior itself")


def test_an_output_that_is_a_folder(prior, infer, refused, tmp_path):
    (tmp_path / "video.mp4").mkdir()
    command = ("--output", tmp_path / "video.mp4", "--overwrite")
    refused(lambda: infer(prior, *command), "video.mp4 is a folder")


@pytest.mark.parametrize(
    "flags",
    [
        (),
        ("--start_step", "5", "6"),
        ("--output", "run_copy/outputs/video.mp4"),
        ("--output_dir", "run_copy/outputs/sweep"),
    ],
)
def test_a_link_in_place_of_the_outputs_folder(prior_copy, infer, refused, tmp_path, monkeypatch, flags):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / ".tmp_thesis.tex").write_text("years of work")
    (prior_copy / "outputs").symlink_to(tmp_path / "elsewhere")
    refused(lambda: infer(prior_copy, *flags), "outputs is a symbolic link")


# --- a disk that fills up -----------------------------------------------------------------------------------


@pytest.mark.parametrize("free_kib", [8, 4, 0])
def test_a_disk_that_fills_up_while_the_video_is_written(prior, infer, small_disk, monkeypatch, free_kib):
    fill_disk(small_disk, monkeypatch, free_kib=free_kib)
    outcome = infer(prior, "--start_step", 9, "--output", small_disk / "video.mp4")
    assert outcome.code == 2, outcome.err
    assert "use another disk or folder" in outcome.error
    assert not (small_disk / "video.json").exists()


# --- two writers of one name --------------------------------------------------------------------------------


@pytest.fixture
def another_run(monkeypatch):
    """`another_run(path)`: another run writes this video while ours computes."""

    def begin(path):
        make_clip = make_clips.make_clip

        def overtaken(group, plan, *args, **options):
            clip = make_clip(group, plan, *args, **options)
            taken = path or group.jobs[0].path
            taken.parent.mkdir(exist_ok=True)
            taken.write_bytes(b"theirs")
            return clip

        monkeypatch.setattr(make_clips, "make_clip", overtaken)

    return begin


@pytest.mark.parametrize("links", [True, False])
def test_two_runs_with_one_output(prior, infer, another_run, tmp_path, monkeypatch, links):
    if not links:
        monkeypatch.setattr(os, "link", lambda *_, **__: (_ for _ in ()).throw(PermissionError(1, "no")))
    path = tmp_path / "video.mp4"
    another_run(path)
    outcome = infer(prior, "--start_step", 9, "--output", path)
    assert (outcome.code, outcome.out) == (2, "")
    assert (
        f"another run wrote {path} in the meantime; the clip of this run is {tmp_path}/video_2.mp4"
        in outcome.error
    )
    assert path.read_bytes() == b"theirs" and not path.with_suffix(".json").exists()
    report = read_json(tmp_path / "video_2.json")
    assert report["video_sha256"] == listing(tmp_path)["video_2.mp4"]
    assert not list(tmp_path.glob(".tmp*"))


def test_two_runs_that_choose_the_same_free_name(prior_copy, infer, another_run):
    another_run(None)
    path = infer(prior_copy, "--start_step", 9).path
    assert path.stem.endswith("_2") and path.exists() and path.with_suffix(".json").exists()


def test_overwrite_still_replaces(prior, infer, another_run, tmp_path):
    another_run(tmp_path / "video.mp4")
    outcome = infer(prior, "--start_step", 9, "--output", tmp_path / "video.mp4", "--overwrite")
    assert outcome.path == tmp_path / "video.mp4" and outcome.path.read_bytes() != b"theirs"
