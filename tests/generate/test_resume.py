"""A prior that was interrupted, stopped or damaged ends as if nothing had happened, or is refused."""

from __future__ import annotations

import os
import shutil
import subprocess

import pytest
from conftest import build_model, save_image
from helpers import OTHER_PROMPT, PROMPT, edit_metadata, fail_at_step, listing, read_json

from step_skip.errors import RunError
from step_skip.files.writing import _take, locked
from step_skip.generate import run as prior_run
from step_skip.prior.prior import step_files
from step_skip.prior.writer import PriorWriter

TIMES = {
    "created",
    "seconds",
    "seconds_per_step",
    "peak_memory",
    "metadata_sha256",
}  # the last covers the others


def told(prior, *, without=("run_id",)):
    """A prior's metadata but for times and memory."""
    metadata = read_json(prior / "run_metadata.json")
    return {key: value for key, value in metadata.items() if key not in TIMES | set(without)}


def files_of(prior):
    """Digests of a prior's files but for the metadata."""
    return {name: digest for name, digest in listing(prior).items() if name != "run_metadata.json"}


def assert_same(finished, undisturbed):
    """Byte for byte the same files, the same metadata but for times and memory."""
    assert files_of(finished) == files_of(undisturbed)
    assert told(finished) == told(undisturbed)
    names = ("seconds_per_step", "forwards_per_step")
    assert [len(read_json(finished / "run_metadata.json")[name]) for name in names] == [10, 10]


@pytest.fixture
def resume(run, model_dir):
    """generate_prior.py --resume with the small model."""
    return lambda prior, *argv: run("generate_prior", "--resume", prior, "--model_dir", model_dir, *argv)


@pytest.fixture
def interrupted(generate, image, tmp_path, monkeypatch):
    """`interrupted(name)`: a run that Ctrl-C ends just before it saves the file `name`."""

    def interrupted(name, *argv):
        save = PriorWriter.save

        def stop_at(writer, each, write):
            if each == name:
                raise KeyboardInterrupt
            save(writer, each, write)

        with monkeypatch.context() as patch:
            patch.setattr(PriorWriter, "save", stop_at)
            outcome = generate("--image", image, "--prompt", PROMPT, "--run_id", "early", *argv)
        assert outcome.code == 130
        return tmp_path / "priors" / "run_early"

    return interrupted


@pytest.mark.parametrize(
    "name",
    [
        "initial_latents.pt",
        "clip_feature.pt",
        "noise_pred_0000.pt",
        "step_0000.pt",
        "step_0004.pt",
        "noise_pred_0009.pt",
        "output_full.mp4",
    ],
)
def test_an_interrupted_run_ends_as_an_undisturbed_one(prior, interrupted, resume, infer, loads, name):
    early = interrupted(name)
    assert infer(early).code == 2
    loads.clear()
    assert resume(early).path == early
    assert_same(early, prior)
    components = {"initial_latents.pt": 4, "clip_feature.pt": 4, "output_full.mp4": 1}
    assert len(loads[0]) == components.get(name, 2)


@pytest.mark.parametrize("flags", [("--dtype", "bfloat16"), ("--cfg_scale", "1"), ("--seed", "7")])
def test_other_settings_are_taken_from_the_run(make_prior, interrupted, resume, flags):
    early = interrupted("step_0006.pt", *flags)
    assert resume(early).code == 0
    assert_same(early, make_prior(*flags))


def test_a_run_that_is_interrupted_again_and_again(prior, interrupted, resume, monkeypatch):
    early = interrupted("step_0002.pt")
    for name in ("step_0003.pt", "noise_pred_0003.pt", "step_0008.pt"):
        save = PriorWriter.save

        def stop_at(writer, each, write, name=name, save=save):
            if each == name:
                raise KeyboardInterrupt
            save(writer, each, write)

        with monkeypatch.context() as patch:
            patch.setattr(PriorWriter, "save", stop_at)
            assert resume(early).code == 130
    assert resume(early).code == 0
    assert_same(early, prior)


def test_decoded_videos_that_were_left_are_made(make_prior, interrupted, resume):
    early = interrupted("denoised_0005.mp4", "--save_decoded_videos")
    made = early / "denoised_0004.mp4"
    before = made.stat().st_mtime_ns
    assert resume(early).code == 0
    assert made.stat().st_mtime_ns == before
    assert_same(early, make_prior("--save_decoded_videos"))


def test_the_command_that_is_printed_goes_on(prior, generate, run, image, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(prior_run, "save_step", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        outcome = generate("--image", image, "--prompt", PROMPT, "--run_id", "words")
    line = next(line for line in outcome.err.splitlines() if "every complete step is saved" in line)
    script, *words = line.split("resume with: python ")[1].split()
    assert script.endswith("generate_prior.py")
    assert run("generate_prior", *words).path == tmp_path / "priors" / "run_words"
    assert_same(tmp_path / "priors" / "run_words", prior)


# --- what would come out otherwise is refused ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"versions": {"torch": "1.13", "diffsynth": "2.1.12"}}, ["torch is", "was '1.13'"]),
        ({"versions": {}}, ["torch is", "was None"]),
        ({"device_name": "another GPU"}, ["device_name is", "was 'another GPU'"]),
        ({"num_threads": 64}, ["num_threads is", "was 64"]),
        ({"device": "cuda:7"}, ["--device"]),
        ({"model": "I2V-14B"}, ["'I2V-14B'", "doesn't know"]),
        ({"sigma_shift": 4.0}, ["scheduler_timesteps[1]", "installed scheduler gives"]),
        ({"model_fingerprint": {}}, ["dit weights are not those"]),
        ({"stop_after": 10}, ["stop_after = 10", "cannot be resumed"]),
        ({"stop_after": "3"}, ["stop_after = '3'", "cannot be resumed"]),
        ({"save_decoded_videos": ...}, ["lacks 'save_decoded_videos'", "cannot be resumed"]),
        ({"seconds_per_step": [1.0] * 3}, ["seconds_per_step", "cannot be resumed"]),
        ({"forwards_per_step": ["2"] * 4}, ["forwards_per_step", "cannot be resumed"]),
        ({"formation": {"branch_distances": [1.0]}}, ["branch_distances", "cannot be resumed"]),
        ({"formation": 7}, ["formation = 7", "cannot be resumed"]),
        ({"formation": {"branch_distances": 7}}, ["branch_distances'] = 7", "cannot be resumed"]),
        ({"seconds": [1]}, ["seconds = [1]", "cannot be resumed"]),
        ({"seconds": {"load": "x"}}, ["seconds['load'] = 'x'", "cannot be resumed"]),
        ({"lora": {}}, ["{} as a LoRA", "cannot be resumed"]),
        ({"device": None}, ["device = None", "cannot be resumed"]),
        (
            {"tea_cache_l1_thresh": 0.1, "tea_cache_model_id": "none"},
            ["no coefficients for none", "cannot be resumed"],
        ),
        ({"tea_cache_l1_thresh": 0.1, "skip_cache": 2}, ["save the same work", "cannot be resumed"]),
        ({"cfg_scale": float("nan")}, ["cfg_scale = nan"]),
    ],
)
def test_a_run_that_would_end_otherwise(interrupted, resume, refused, loads, changes, words):
    early = interrupted("step_0004.pt")
    loads.clear()
    edit_metadata(early, **changes)
    refused(lambda: resume(early), *words)


def test_other_weights(interrupted, run, refused, loads, tmp_path):
    early = interrupted("step_0004.pt")
    loads.clear()
    (tmp_path / "other").mkdir()
    other = build_model(tmp_path / "other", seed=1)
    refused(lambda: run("generate_prior", "--resume", early, "--model_dir", other), "dit weights are not")


@pytest.mark.parametrize("flag", ["--prompt=x", "--seed=0", "--num_inference_steps=10", "--stop_after=3"])
def test_settings_beside_resume(prior_copy, resume, refused, flag):
    refused(
        lambda: resume(prior_copy, flag), "--resume takes every setting", f"leave out {flag.split('=')[0]}"
    )


def test_an_image_beside_resume(prior_copy, resume, refused, image):
    refused(lambda: resume(prior_copy, "--image", image), "--image", "not allowed with", "--resume")


def test_what_is_no_run(older_prior, resume, refused, tmp_path):
    refused(lambda: resume(older_prior), "older", "make it again")
    refused(lambda: resume(tmp_path / "nowhere"), "is not a folder")
    (tmp_path / "empty").mkdir()
    refused(lambda: resume(tmp_path / "empty"), "holds no run_metadata.json")


def test_a_run_that_lost_what_it_begins_with(interrupted, resume, refused, loads):
    early = interrupted("initial_latents.pt")
    loads.clear()
    save_image(early / "input_image.png", shade=7)
    refused(lambda: resume(early), "input_image.png is damaged")
    (early / "input_image.png").unlink()
    refused(lambda: resume(early), "input_image.png is missing")


def test_a_run_that_lost_the_video_it_begins_with(prior, interrupted, resume, refused, loads):
    flags = ("--denoising_strength", 0.6, "--input_video", prior / "output_full.mp4")
    early = interrupted("initial_latents.pt", *flags)
    loads.clear()
    refused(lambda: resume(early), "before the noised input video was saved")


def test_a_run_that_began_with_a_video(generate, prior, interrupted, resume, image):
    flags = ("--denoising_strength", 0.6, "--input_video", prior / "output_full.mp4")
    early = interrupted("step_0002.pt", *flags)
    assert resume(early).code == 0
    undisturbed = generate("--image", image, "--prompt", PROMPT, *flags).path
    assert_same(early, undisturbed)


def test_an_image_that_is_damaged_cannot_be_made_again(prior_copy, resume, refused):
    (prior_copy / "input_image.png").write_bytes(b"something else")
    refused(lambda: resume(prior_copy), "input_image.png is damaged")


# --- damage is made good ------------------------------------------------------------------------------------


def test_a_complete_prior_is_left_alone(prior_copy, resume, loads):
    before = listing(prior_copy)
    outcome = resume(prior_copy)
    assert outcome.path == prior_copy
    assert "nothing to do" in outcome.err
    assert listing(prior_copy) == before
    assert not loads


@pytest.mark.parametrize(
    "name", ["step_0003.pt", "noise_pred_0009.pt", "output_full.mp4", "y.pt", "formation.png"]
)
@pytest.mark.parametrize("damage", ["missing", "flipped"])
def test_damaged_files_are_made_again(prior, prior_copy, resume, name, damage):
    path = prior_copy / name
    content = path.read_bytes()
    path.unlink()
    if damage == "flipped":
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    outcome = resume(prior_copy)
    assert outcome.code == 0
    assert f"{name} is {'missing' if damage == 'missing' else 'damaged'}" in outcome.err
    assert_same(prior_copy, prior)


def test_what_is_made_again_has_to_be_the_same(prior_copy, resume, monkeypatch):
    """A machine that computes otherwise without saying so must not mix its steps with those there."""
    from diffsynth.models.wan_video_dit import WanModel

    (prior_copy / "step_0008.pt").unlink()
    before, unpatchify = listing(prior_copy), WanModel.unpatchify
    monkeypatch.setattr(WanModel, "unpatchify", lambda *args: unpatchify(*args) * 1.0001)
    outcome = resume(prior_copy)
    assert outcome.code == 1
    assert "noise_pred_0008.pt came out other than the prior records it" in outcome.error
    assert listing(prior_copy) == before


# --- one writer ---------------------------------------------------------------------------------------------


def test_two_writers_never_write_one_run(interrupted, resume, refused, loads):
    early = interrupted("step_0004.pt")
    loads.clear()
    with locked(early):
        refused(lambda: resume(early), "another process is writing", str(early))
    assert not (early / ".lock").exists()
    assert resume(early).code == 0


def test_readers_do_not_wait_for_a_writer(prior_copy, infer):
    with locked(prior_copy):
        assert infer(prior_copy, "--start_step", 9).code == 0


def test_a_dead_writer_holds_no_lock(interrupted, resume):
    """What it leaves behind is a file that nobody has locked, and half a file under a temporary name."""
    early = interrupted("step_0004.pt")
    (early / ".lock").touch()
    (early / ".tmp_123_step_0004.pt").write_bytes(b"half a f")
    assert resume(early).code == 0
    assert not list(early.glob(".*"))


def test_a_lock_that_was_deleted_is_none(tmp_path):
    """Who opened the file before its last owner deleted it must not believe to be alone."""
    descriptor = os.open(tmp_path / ".lock", os.O_RDWR | os.O_CREAT)
    (tmp_path / ".lock").unlink()
    assert not _take(descriptor)
    os.close(descriptor)


def test_a_lock_never_follows_a_link(prior_copy, resume, refused, tmp_path):
    (prior_copy / ".lock").symlink_to(tmp_path / "elsewhere")
    refused(lambda: resume(prior_copy), "cannot write to")
    assert not (tmp_path / "elsewhere").exists()


# --- stopped early ------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def draft(make_prior):
    """A prior stopped after step 3; tests only read it."""
    return make_prior("--stop_after", "3")


@pytest.fixture
def draft_copy(draft, tmp_path):
    return shutil.copytree(draft, tmp_path / "run_draft")


def test_a_draft_holds_the_first_steps_of_the_full_run(draft, prior):
    files, full = files_of(draft), files_of(prior)
    preview = files.pop("denoised_0003.mp4")
    assert files.items() < full.items()
    assert {name for name in full if name not in files} == {"output_full.mp4", "formation.png"} | {
        name for step in range(4, 10) for name in step_files(step, nega=True)
    }
    assert preview == read_json(draft / "run_metadata.json")["files"]["denoised_0003.mp4"]
    metadata = read_json(draft / "run_metadata.json")
    assert (metadata["status"], metadata["stop_after"], metadata["forwards"]) == ("stopped", 3, 8)


def test_the_preview_is_what_the_step_points_at(draft, make_prior):
    decoded = make_prior("--save_decoded_videos") / "denoised_0003.mp4"
    assert decoded.read_bytes() == (draft / "denoised_0003.mp4").read_bytes()


@pytest.mark.parametrize("flags", [(), ("--start_step", 3), ("--start_step", 1), ("--start_step", 0)])
def test_a_draft_is_finished_as_if_never_stopped(draft, prior, run, model_dir, tmp_path, flags):
    command = ("--prior_dir", draft, "--model_dir", model_dir, "--output", tmp_path / "video.mp4")
    report = run("infer_from_prior", *command, *flags).report
    assert report["latents_sha256"] == read_json(prior / "run_metadata.json")["latents_sha256"]
    assert report["start_step"] == (flags[1] if flags else 3)
    assert packets_of(tmp_path / "video.mp4") == packets_of(prior / "output_full.mp4")


def packets_of(video):
    """What is seen of a video, as it is encoded; without its own metadata, which say how it was made."""
    import imageio_ffmpeg

    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-i", video, "-c", "copy", "-f", "h264", "-"]
    return subprocess.run(command, capture_output=True, check=True).stdout


def test_a_draft_takes_a_new_prompt_as_the_full_prior_does(draft, prior, infer, tmp_path):
    flags = ("--start_step", 2, "--prompt", OTHER_PROMPT, "--output")
    made = [infer(each, *flags, tmp_path / f"{each.name}.mp4").report for each in (draft, prior)]
    assert made[0]["latents_sha256"] == made[1]["latents_sha256"]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--start_step", 4), ["--start_step 4", "steps 0 to 3"]),
        (("--start_step", 9), ["--start_step 9", "steps 0 to 3"]),
        (("--steps", 0, 2), ["stopped after step 3", "--start_step", "--resume"]),
        (("--num_steps", 3), ["stopped after step 3", "--start_step", "--resume"]),
        (("--start_step", "auto"), ["stopped after step 3", "name a step", "--resume"]),
    ],
)
def test_what_a_draft_has_not(draft, infer, refused, flags, words):
    refused(lambda: infer(draft, *flags), *words)


def test_resume_finishes_a_draft(draft_copy, prior, resume):
    assert resume(draft_copy).code == 0
    (draft_copy / "denoised_0003.mp4").unlink()
    assert files_of(draft_copy) == files_of(prior)
    assert told(draft_copy, without=("run_id", "files")) == told(prior, without=("run_id", "files"))


def test_a_draft_that_was_interrupted_is_still_a_draft(interrupted, resume, draft):
    early = interrupted("step_0001.pt", "--stop_after", "3")
    assert resume(early).code == 0
    assert files_of(early) == files_of(draft)
    assert told(early) == told(draft)


def test_a_draft_whose_preview_was_interrupted(interrupted, resume, draft):
    early = interrupted("denoised_0003.mp4", "--stop_after", "3")
    assert resume(early).code == 0
    assert files_of(early) == files_of(draft)


def test_a_draft_is_usable_while_it_is_finished(draft_copy, prior, resume, infer, monkeypatch):
    with monkeypatch.context() as patch:
        fail_at_step(patch, 2, KeyboardInterrupt())
        assert resume(draft_copy).code == 130
    sha256 = read_json(prior / "run_metadata.json")["latents_sha256"]
    assert infer(draft_copy, "--start_step", 5).report["latents_sha256"] == sha256
    shutil.rmtree(draft_copy / "outputs")
    assert resume(draft_copy).code == 0
    assert read_json(draft_copy / "run_metadata.json")["latents_sha256"] == sha256


@pytest.mark.parametrize("step", [9, 10, -1])
def test_stopping_where_nothing_would_be_left(generate, refused, image, step):
    refused(lambda: generate("--image", image, f"--stop_after={step}"), "--stop_after")


# --- several images -----------------------------------------------------------------------------------------


def test_several_images_share_one_loading(prior, generate, image, loads, tmp_path):
    other = save_image(tmp_path / "other.png", shade=90)
    flags = ("--prompt", PROMPT, OTHER_PROMPT, "--run_id", "one", "two")
    outcome = generate("--image", image, other, *flags)
    one, two = (tmp_path / "priors" / f"run_{name}" for name in ("one", "two"))
    assert outcome.out == f"{one}\n{two}\n"
    assert len(loads) == 1
    assert_same(one, prior)
    assert read_json(two / "run_metadata.json")["prompt"] == OTHER_PROMPT
    alone = generate("--image", other, "--prompt", OTHER_PROMPT, "--run_id", "alone").path
    assert_same(two, alone)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--run_id", "a"), ["--run_id: 1 for 2 images"]),
        (("--run_id", "a", "a"), ["--run_id a: given twice"]),
        (("--run_id", "a", "../b"), ["--run_id '../b'"]),
    ],
)
def test_as_many_ids_as_images(generate, refused, image, flags, words):
    refused(lambda: generate("--image", image, image, *flags), *words)


def test_one_bad_image_among_several(generate, refused, image, tmp_path):
    refused(lambda: generate("--image", image, tmp_path / "nowhere.png"), "nowhere.png is not a file")


def test_one_image_that_fails_does_not_stop_the_rest(generate, image, tmp_path, monkeypatch):
    save_step, bad = prior_run.save_step, []

    def fail_once(writer, step):
        if not bad:
            bad.append(writer.directory)
            raise RunError("latents became NaN")
        save_step(writer, step)

    monkeypatch.setattr(prior_run, "save_step", fail_once)
    outcome = generate("--image", image, image, "--run_id", "bad", "good")
    assert outcome.code == 1
    assert "1 of 2 priors failed" in outcome.error and f"{image} failed: latents became NaN" in outcome.err
    assert read_json(tmp_path / "priors" / "run_good" / "run_metadata.json")["status"] == "complete"
