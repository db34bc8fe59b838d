"""The prior on disk: what is written is what is read, to the bit, and never looks whole when it isn't."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest
import torch
from conftest import save_image
from helpers import (
    FRAMES,
    OTHER_PROMPT,
    PROMPT,
    PUBLISHED_KEYS,
    ROOT,
    SIZE,
    edit_metadata,
    fail_at_step,
    listing,
    read_json,
)

from step_skip.errors import InputError
from step_skip.files.tensors import load_tensor, sha256_tensor
from step_skip.files.writing import replacing
from step_skip.media.videos import is_whole_mp4, write_video
from step_skip.prior.prior import context_file
from step_skip.prior.writer import PriorWriter, create_run_dir

OWN_KEYS = {
    "format_version",
    "status",
    "files",
    "shapes",
    "model",
    "model_fingerprint",
    "lora",
    "prompt",
    "negative_prompt",
    "seed",
    "cfg_scale",
    "fps",
    "dtype",
    "tiled",
    "tile_size",
    "tile_stride",
    "start_step",
    "formation",
    "device",
    "device_name",
    "num_threads",
    "versions",
    "seconds",
    "seconds_per_step",
    "forwards",
    "latents_sha256",
}


# --- round trip ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_tensors_come_back_as_they_were(tmp_path, dtype):
    shape = (1, 16, 3, 4, 4)
    latents = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    latents.flatten()[:4] = torch.tensor([0.0, -0.0, torch.finfo(dtype).tiny, torch.finfo(dtype).max]).to(
        dtype
    )
    writer = PriorWriter(tmp_path, {})
    writer.save_tensor("step_0000.pt", latents)
    name = str(dtype).removeprefix("torch.")
    back = load_tensor(tmp_path / "step_0000.pt", shape=shape, dtype=name)
    assert torch.equal(back, latents)
    assert back.dtype == dtype
    assert sha256_tensor(back) == sha256_tensor(latents)


def test_a_view_is_saved_alone_and_contiguous(tmp_path):
    whole = torch.arange(24.0).reshape(2, 3, 4)
    writer = PriorWriter(tmp_path, {})
    writer.save_tensor("view.pt", whole[:, 1, ::2].t())
    back = torch.load(tmp_path / "view.pt", weights_only=True)
    assert torch.equal(back, whole[:, 1, ::2].t())
    assert back.is_contiguous()
    assert back.untyped_storage().nbytes() == 4 * back.numel()


def test_sha256_of_a_tensor_is_that_of_its_bytes():
    assert (
        sha256_tensor(torch.tensor([1.0, -2.0]))
        == hashlib.sha256(b"\x00\x00\x80\x3f\x00\x00\x00\xc0").hexdigest()
    )
    halves = torch.tensor([1.0, -2.0], dtype=torch.bfloat16)
    assert sha256_tensor(halves) == hashlib.sha256(b"\x80\x3f\x00\xc0").hexdigest()
    transposed = torch.arange(6.0).reshape(2, 3).t()
    assert sha256_tensor(transposed) == sha256_tensor(transposed.contiguous())


def test_metadata_has_every_name(prior):
    metadata = read_json(prior / "run_metadata.json")
    assert metadata.keys() >= PUBLISHED_KEYS | OWN_KEYS
    expected = {
        "run_id": prior.name.removeprefix("run_"),
        "num_inference_steps": 10,
        "denoising_strength": 1.0,
        "sigma_shift": 5.0,
        "height": SIZE,
        "width": SIZE,
        "num_frames": FRAMES,
        "status": "complete",
        "format_version": 1,
        "model": "tiny",
        "prompt": PROMPT,
        "negative_prompt": "Still.",
        "seed": 0,
        "cfg_scale": 5.0,
        "fps": 8,
        "dtype": "float32",
        "start_step": 6,
        "forwards": 20,
    }
    assert {key: metadata[key] for key in expected} == expected
    assert set(metadata["seconds"]) == {"load", "encode", "denoise", "decode", "save"}
    assert len(metadata["seconds_per_step"]) == 10
    assert set(metadata["model_fingerprint"]) == {"dit", "vae", "text_encoder", "image_encoder"}


def test_every_file_is_recorded_with_its_checksum(prior):
    files = read_json(prior / "run_metadata.json")["files"]
    assert {path.name for path in prior.iterdir()} == {"run_metadata.json", *files}
    for name, digest in files.items():
        assert hashlib.sha256((prior / name).read_bytes()).hexdigest() == digest
    kinds = ("step", "noise_pred", "noise_pred_nega")
    steps = {f"{kind}_{step:04d}.pt" for kind in kinds for step in range(10)}
    contexts = {context_file(text) for text in (PROMPT, "Still.")}
    others = {"initial_latents.pt", "y.pt", "clip_feature.pt", "input_image.png"}
    shown = {"output_full.mp4", "formation.png"}
    assert set(files) == steps | contexts | others | shown


def test_every_tensor_is_recorded_with_its_shape(prior):
    found = {path.name: list(torch.load(path, weights_only=True).shape) for path in prior.glob("*.pt")}
    assert read_json(prior / "run_metadata.json")["shapes"] == found
    assert found["y.pt"] == [1, 20, *found["step_0000.pt"][2:]]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_tensors_are_in_the_pipelines_dtype(make_prior, dtype):
    prior = make_prior("--dtype", dtype)
    for path in prior.glob("*.pt"):
        assert str(torch.load(path, weights_only=True).dtype) == f"torch.{dtype}"


def test_the_last_step_is_the_run(prior):
    latents = torch.load(prior / "step_0009.pt", weights_only=True)
    assert sha256_tensor(latents) == read_json(prior / "run_metadata.json")["latents_sha256"]


def test_rounded_sizes_are_recorded(generate, image):
    flags = ("--height", 20, "--width", 33, "--num_frames", 4, "--num_inference_steps", 1)
    outcome = generate("--image", image, *flags)
    metadata = read_json(outcome.path / "run_metadata.json")
    assert (metadata["height"], metadata["width"], metadata["num_frames"]) == (32, 48, 5)
    assert outcome.err.count("48 x 32 pixels, 5 frames") == 1
    assert "cropped to its middle, 32 x 21" in outcome.err
    assert len(video_frames(outcome.path / "output_full.mp4")) == 5


def video_frames(path: Path) -> list:
    import imageio

    with imageio.get_reader(path) as reader:
        return [frame for frame in reader]  # noqa: C416, its length is infinite


def test_decoded_videos_are_of_the_denoised_estimates(make_prior, prior):
    """One per step; of the last step the estimate is the result itself."""
    import numpy as np

    decoded = make_prior("--save_decoded_videos")
    assert sorted(path.name for path in decoded.glob("denoised_*.mp4")) == [
        f"denoised_{step:04d}.mp4" for step in range(10)
    ]
    last, full = (video_frames(decoded / name) for name in ("denoised_0009.mp4", "output_full.mp4"))
    assert np.abs(np.subtract(last, full, dtype=float)).max() <= 3
    metadata = [read_json(folder / "run_metadata.json") for folder in (decoded, prior)]
    assert metadata[0]["latents_sha256"] == metadata[1]["latents_sha256"]
    assert metadata[0]["seconds"]["decode_estimates"] > 0


def test_a_prior_can_be_moved(prior, infer, tmp_path):
    moved = shutil.copytree(prior, tmp_path / "a folder with spaces, ünïcode and 'quotes'")
    assert infer(moved).path.is_relative_to(moved)


def test_the_report_says_how_to_make_the_video_again(prior, infer, tmp_path):
    first = infer(prior, "--prompt", OTHER_PROMPT, "--cfg_scale", 3, "--output", tmp_path / "a.mp4").report
    flags = [(f"--{name}", first[name]) for name in ("start_step", "prompt", "negative_prompt", "cfg_scale")]
    again = infer(Path(first["prior_dir"]), *sum(flags, ()), "--output", tmp_path / "b.mp4").report
    known = {"components_loaded", "model_fingerprint"}  # it knows the prompt now
    cost = {"seconds", "seconds_per_step", "peak_memory", *known}
    assert {k: v for k, v in first.items() if k not in cost} == {
        k: v for k, v in again.items() if k not in cost
    }
    assert set(first["seconds"]) == {"load", "encode", "denoise", "decode", "measure", "save"}
    assert len(first["seconds_per_step"]) == 3


def test_the_report_names_what_the_result_depends_on(prior, infer, image, model_dir, tmp_path):
    metadata = read_json(prior / "run_metadata.json")
    outcome = infer(prior, "--image", image, "--output", tmp_path / "video.mp4")
    report = outcome.report
    same = ("device", "device_name", "num_threads", "versions", "lora", "model", "dtype")
    assert {key: report[key] for key in same} == {key: metadata[key] for key in same}
    assert (report["model_dir"], report["vram"]) == (str(model_dir), "plain")
    assert report["model_fingerprint"] == {
        name: metadata["model_fingerprint"][name] for name in report["components_loaded"]
    }
    assert report["prior_files"] == {name: metadata["files"][name] for name in report["prior_files"]}
    assert set(report["prior_files"]) >= {"step_0006.pt", "y.pt", "clip_feature.pt"}
    assert report["image"] == str(image)
    assert report["image_sha256"] == hashlib.sha256(image.read_bytes()).hexdigest()
    assert "warning" not in outcome.err


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"device_name": "another GPU"}, "(then 'another GPU')"),
        ({"device_name": ...}, "(then None)"),
        ({"versions": {"torch": "1.13", "diffsynth": "2.0"}}, "(then '1.13'), diffsynth "),
    ],
)
def test_another_machine_or_version_is_a_warning(prior_copy, infer, changes, words):
    edit_metadata(prior_copy, **changes)
    outcome = infer(prior_copy, "--start_step", 9)
    warnings = [line for line in outcome.err.splitlines() if line.startswith("warning: ")]
    assert (outcome.code, len(warnings)) == (0, 1)
    assert words in warnings[0] and "the last bits" in warnings[0]


def test_what_the_prior_fixes_may_be_said_and_fps_is_free(prior, infer, tmp_path):
    flags = ("--start_step", 9, "--seed", 0, "--num_frames", FRAMES, "--height", SIZE, "--fps", 4)
    report = infer(prior, *flags, "--output", tmp_path / "slow.mp4").report
    own = infer(prior, "--start_step", 9, "--output", tmp_path / "own.mp4").report
    assert (report["fps"], own["fps"]) == (4, 8)
    assert report["latents_sha256"] == own["latents_sha256"]


# --- nothing is overwritten, nothing collides ---------------------------------------------------------------


def test_two_runs_in_the_same_second(tmp_path, monkeypatch):
    monkeypatch.setattr(time, "strftime", lambda _: "20250101_000000")
    made = [create_run_dir(tmp_path, None) for _ in range(3)]
    assert [run_id for _, run_id in made] == ["20250101_000000", "20250101_000000_2", "20250101_000000_3"]
    assert {path.name for path in tmp_path.iterdir()} == {f"run_{run_id}" for _, run_id in made}


def test_a_run_id_taken_in_the_meantime_is_refused(tmp_path, monkeypatch):
    """Two runs may pass the first look at once; making the folder decides."""
    (tmp_path / "run_mine").mkdir()
    looks = iter([False, True])
    monkeypatch.setattr(Path, "exists", lambda _: next(looks))
    with pytest.raises(InputError, match="run_mine exists"):
        create_run_dir(tmp_path, "mine")


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


def test_resuming_changes_nothing_of_the_prior(prior_copy, infer):
    before = listing(prior_copy)
    assert infer(prior_copy).code == 0
    assert {name: content for name, content in listing(prior_copy).items() if name in before} == before


@pytest.mark.parametrize("name", ["a" * 246 + ".mp4", "ünïcode 一只小船.mp4", "two words.mp4"])
def test_any_output_name_that_the_disk_takes(prior, infer, tmp_path, name):
    outcome = infer(prior, "--start_step", 9, "--output", tmp_path / "new folder" / name)
    assert outcome.path == tmp_path / "new folder" / name
    assert set(listing(outcome.path.parent)) == {name, name.replace(".mp4", ".json")}


def test_paths_that_are_no_utf8_can_be_written_down(prior, infer, image, tmp_path):
    odd = tmp_path / os.fsdecode(b"me \xff.png")
    odd.write_bytes(image.read_bytes())
    outcome = infer(prior, "--start_step", 9, "--image", odd, "--output", tmp_path / "video.mp4")
    assert outcome.report["image"] == str(odd)


def test_replacing_leaves_the_old_file_when_writing_fails(tmp_path):
    (tmp_path / "file.json").write_text("old")
    with pytest.raises(RuntimeError), replacing(tmp_path / "file.json") as temporary:
        temporary.write_text("half of the n")
        raise RuntimeError
    assert listing(tmp_path) == {"file.json": hashlib.sha256(b"old").hexdigest()}


# --- runs that do not end -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (KeyboardInterrupt(), 130, "interrupted"),
        (RuntimeError("CUDA out of memory. Tried to allocate 9 GiB"), 1, "--vram low"),
        (OSError(28, "No space left on device", "step_0004.pt"), 2, "No space left on device"),
    ],
)
def test_a_run_that_ends_early_leaves_an_unfinished_prior(
    generate, infer, image, tmp_path, monkeypatch, error, code, words
):
    with monkeypatch.context() as patch:
        fail_at_step(patch, 4, error)
        outcome = generate("--image", image, "--run_id", "early")
    assert outcome.code == code
    assert words in outcome.error
    assert outcome.out == ""
    assert_unfinished(tmp_path / "priors" / "run_early", infer, steps=4)


def assert_unfinished(prior: Path, infer, *, steps: int) -> None:
    """The folder says so itself, holds only whole files, and is refused."""
    metadata = read_json(prior / "run_metadata.json")
    assert metadata["status"] == "running"
    assert sum(name.startswith("step_") for name in metadata["files"]) == steps
    for name, digest in metadata["files"].items():
        assert hashlib.sha256((prior / name).read_bytes()).hexdigest() == digest
    before = listing(prior)
    outcome = infer(prior)
    assert outcome.code == 2
    assert f"unfinished ({steps} of 10 steps are whole)" in outcome.error
    assert listing(prior) == before


KILLED_RUN = """
import os, signal, sys
sys.path.insert(0, {root!r})
import generate_prior, step_skip.generate.run
save_step = step_skip.generate.run.save_step
def save_then_die(writer, step):
    if step.index == 3:
        def die(path):
            path.write_bytes(b"half a file")
            os.kill(os.getpid(), signal.SIGKILL)
        writer.save("step_0003.pt", die)
    save_step(writer, step)
step_skip.generate.run.save_step = save_then_die
generate_prior.main(sys.argv[1:])
"""


def test_a_killed_run_leaves_an_unfinished_prior(infer, image, model_dir, tmp_path):
    flags = ["--model", "tiny", "--model_dir", model_dir, "--image", image, "--output_dir", tmp_path]
    command = [
        sys.executable,
        "-c",
        KILLED_RUN.format(root=str(ROOT)),
        *map(str, flags),
        "--run_id",
        "killed",
    ]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=300)
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    assert not (tmp_path / "run_killed" / "step_0003.pt").exists()
    assert_unfinished(tmp_path / "run_killed", infer, steps=3)


def listen_to_interrupts() -> None:
    """A shell's background job, which may run these tests, starts with interrupts ignored."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.mark.parametrize(
    ("sent", "code", "word"), [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")]
)
def test_a_signal_in_the_middle_of_a_run(infer, image, model_dir, tmp_path, sent, code, word):
    """A real one, from outside, as soon as the first step is on disk."""
    flags = ["--model", "tiny", "--model_dir", model_dir, "--image", image, "--output_dir", tmp_path]
    command = [sys.executable, ROOT / "generate_prior.py", *flags, "--run_id", "stopped"]
    command += ["--num_inference_steps", "5000"]
    command = list(map(str, command))
    with subprocess.Popen(
        command, stdout=-1, stderr=-1, text=True, cwd=tmp_path, preexec_fn=listen_to_interrupts
    ) as process:
        deadline = time.monotonic() + 300
        while not (tmp_path / "run_stopped" / "step_0000.pt").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(sent)
        out, err = process.communicate(timeout=300)
    assert process.returncode == code, err
    assert out == ""
    assert err.splitlines()[-1] == f"generate_prior.py: error: {word}"
    assert f"go on with: python {ROOT / 'generate_prior.py'} --resume {tmp_path / 'run_stopped'}" in err
    assert "Traceback" not in err
    assert read_json(tmp_path / "run_stopped" / "run_metadata.json")["status"] == "running"
    assert not list((tmp_path / "run_stopped").glob(".*"))


def poison(monkeypatch, step: int, value: float) -> None:
    """Let the network answer with NaN or infinity from a step on."""
    from diffsynth.models.wan_video_dit import WanModel

    calls, unpatchify = [], WanModel.unpatchify

    def forward(*args, **kwargs):
        calls.append(None)
        result = unpatchify(*args, **kwargs)
        return result * value if len(calls) > 2 * step else result

    monkeypatch.setattr(WanModel, "unpatchify", forward)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_stops_a_full_run_at_that_step(generate, infer, image, tmp_path, monkeypatch, value):
    with monkeypatch.context() as patch:
        poison(patch, 4, value)
        outcome = generate("--image", image, "--run_id", "nan")
    assert outcome.code == 1
    assert "NaN or infinite at step 4" in outcome.error
    assert "5/10" not in outcome.err  # the sixth step was never begun
    assert_unfinished(tmp_path / "priors" / "run_nan", infer, steps=4)


@pytest.mark.parametrize(("flags", "step"), [((), 8), (("--steps", 1, 5), 5)])
def test_nan_stops_a_resumed_run_at_that_step(prior_copy, infer, monkeypatch, flags, step):
    poison(monkeypatch, 1, float("nan"))
    outcome = infer(prior_copy, *flags)
    assert outcome.code == 1
    assert f"NaN or infinite at step {step}" in outcome.error
    assert outcome.out == ""
    assert not (prior_copy / "outputs").exists()


@pytest.fixture
def small_disk(tmp_path):
    """A file system of one MiB, where this user may mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True).returncode != 0:
        pytest.skip("needs to mount a small file system")
    yield folder
    subprocess.run(["umount", folder], check=True)


def fill(disk: Path, monkeypatch, *, free_kib: int) -> None:
    """Leave so little space, and let the look before the run be told that all is well."""
    monkeypatch.setattr(shutil, "disk_usage", lambda _: types.SimpleNamespace(free=2**40))
    (disk / "others").write_bytes(bytes(2**20 - free_kib * 2**10))


@pytest.mark.parametrize("free_kib", [100, 60, 20, 4, 0])
def test_a_disk_that_fills_up_during_the_run(generate, infer, image, small_disk, monkeypatch, free_kib):
    fill(small_disk, monkeypatch, free_kib=free_kib)
    outcome = generate("--image", image, "--output_dir", small_disk, "--run_id", "full")
    assert outcome.code == 2, outcome.err
    assert "use another disk or folder" in outcome.error or "can be written" in outcome.error
    metadata = small_disk / "run_full" / "run_metadata.json"
    assert not metadata.exists() or read_json(metadata)["status"] == "running"


@pytest.mark.parametrize("free_kib", [8, 4, 0])
def test_a_disk_that_fills_up_while_the_video_is_written(prior, infer, small_disk, monkeypatch, free_kib):
    fill(small_disk, monkeypatch, free_kib=free_kib)
    outcome = infer(prior, "--start_step", 9, "--output", small_disk / "video.mp4")
    assert outcome.code == 2, outcome.err
    assert "use another disk or folder" in outcome.error
    assert not (small_disk / "video.json").exists()


def noise_frames(number: int) -> list:
    from PIL import Image

    return [Image.effect_noise((64, 64), 100).convert("RGB") for _ in range(number)]


def test_a_video_that_was_cut_off_is_not_kept(small_disk, monkeypatch):
    """imageio says nothing when ffmpeg fails."""
    fill(small_disk, monkeypatch, free_kib=40)
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


# --- priors of the pull request's scripts -------------------------------------------------------------------


@pytest.mark.parametrize("step", [0, 6, 9])
def test_an_older_prior_gives_what_the_full_one_gives(prior, older_prior, infer, image, tmp_path, step):
    flags = ("--start_step", step, "--prompt", OTHER_PROMPT)
    full = infer(prior, *flags, "--output", tmp_path / "full.mp4").report
    outcome = infer(older_prior, "--model", "tiny", "--image", image, *flags)
    assert outcome.report["latents_sha256"] == full["latents_sha256"]
    assert outcome.report["steps_run"] == full["steps_run"]
    latents = older_prior / f"step_{step:04d}.pt"
    digest = hashlib.sha256(latents.read_bytes()).hexdigest()
    assert outcome.report["prior_files"] == {latents.name: digest}
    assert outcome.report["image_sha256"] == hashlib.sha256(image.read_bytes()).hexdigest()


def test_an_older_priors_image_is_read_once(older_prior, infer, tmp_path):
    wide = save_image(tmp_path / "wide.png", size=(2 * SIZE, SIZE))
    outcome = infer(older_prior, "--model", "tiny", "--image", wide, "--prompt", PROMPT)
    assert outcome.code == 0
    assert outcome.err.count("stretched") == 1


def test_an_older_prior_warns_of_what_could_not_be_checked(older_prior, infer, image):
    assert set(read_json(older_prior / "run_metadata.json")) == PUBLISHED_KEYS
    outcome = infer(older_prior, "--model", "tiny", "--image", image, "--prompt", PROMPT)
    warnings = [line for line in outcome.err.splitlines() if line.startswith("warning: ")]
    assert len(warnings) == 2
    assert "late for a new motion" in warnings[1] and "make the prior again" in warnings[1]
    for word in (
        "older format",
        "could not be checked",
        "model",
        "weights",
        "image",
        "cfg_scale",
        "checksums",
    ):
        assert word in warnings[0]


def test_an_older_prior_ignores_entries_of_other_types(prior, older_prior, infer, image):
    path = older_prior / "run_metadata.json"
    junk = {"start_step": "6", "files": 3, "model": [], "cfg_scale": "5", "prompt": 1, "model_fingerprint": 0}
    path.write_text(json.dumps(read_json(path) | junk))
    outcome = infer(older_prior, "--model", "tiny", "--image", image, "--prompt", PROMPT)
    assert outcome.report["latents_sha256"] == read_json(prior / "run_metadata.json")["latents_sha256"]


def test_an_older_prior_may_record_the_sizes_that_were_asked_for(older_prior, infer, image):
    path = older_prior / "run_metadata.json"
    path.write_text(json.dumps(read_json(path) | {"height": SIZE - 1, "num_frames": FRAMES - 1}))
    outcome = infer(older_prior, "--model", "tiny", "--image", image, "--prompt", PROMPT)
    assert (outcome.report["height"], outcome.report["num_frames"]) == (SIZE, FRAMES)


def test_verify_looks_at_every_prior(prior, prior_copy, run, tmp_path):
    """Also at those after one that can't be read."""
    (tmp_path / "no_prior").mkdir()
    (prior_copy / "step_0004.pt").unlink()
    outcome = run("infer_from_prior", "--verify", "--prior_dir", tmp_path / "no_prior", prior_copy, prior)
    assert outcome.code == 2
    assert "1 of 3 priors cannot be read and 1 files are damaged" in outcome.error
    assert "no_prior holds no run_metadata.json" in outcome.err
    assert "it can be resumed after steps 0-3, 5-9" in outcome.err
    assert f"{prior}: " in outcome.err
