"""Runs that do not end leave an unfinished prior: of whole files, which says so itself and is refused."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers import PROMPT, ROOT, assert_unfinished, fail_at_step, fill_disk, listing, read_json

from step_skip.prior.files import damaged_files
from step_skip.prior.metadata import read_run
from step_skip.prior.prior import IMAGE_FILE

# --- errors, signals and kills ------------------------------------------------------------------------------


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
    assert f"resume with: python {ROOT / 'generate_prior.py'} --resume {tmp_path / 'run_stopped'}" in err
    assert "Traceback" not in err
    assert read_json(tmp_path / "run_stopped" / "run_metadata.json")["status"] == "running"
    assert not list((tmp_path / "run_stopped").glob(".*"))


# --- the disk -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("free_kib", [100, 60, 20, 4, 0])
def test_a_disk_that_fills_up_during_the_run(generate, infer, image, small_disk, monkeypatch, free_kib):
    fill_disk(small_disk, monkeypatch, free_kib=free_kib)
    outcome = generate("--image", image, "--output_dir", small_disk, "--run_id", "full")
    assert outcome.code == 2, outcome.err
    assert "use another disk or folder" in outcome.error or "can be written" in outcome.error
    metadata = small_disk / "run_full" / "run_metadata.json"
    assert not metadata.exists() or read_json(metadata)["status"] == "running"


class FailingDisk:
    """Fails the n-th call that writes, syncs or renames below a folder."""

    def __init__(self, folder, number, monkeypatch):
        self.folder, self.number, self.calls = str(folder), number, 0
        self.error = errno.ENOSPC
        for owner, name in ((Path, "write_bytes"), (Path, "write_text"), (os, "replace"), (os, "fsync")):
            monkeypatch.setattr(owner, name, self.failing(getattr(owner, name), name))

    def failing(self, original, name):
        def call(*args, **kwargs):
            if name in ("fsync", "replace") or str(args[0]).startswith(self.folder):
                self.calls += 1
                if self.calls == self.number:
                    if name == "write_bytes":
                        original(args[0], bytes(args[1])[:10])  # what a full disk leaves
                    raise OSError(self.error, os.strerror(self.error))
            return original(*args, **kwargs)

        return call


def test_every_write_call_fails_once(generate, run, model_dir, image, tmp_path, monkeypatch):
    """One by one: nothing half-written has a final name, the file is named, and the run can be finished."""
    flags = ("--image", image, "--num_inference_steps", 1, "--prompt", PROMPT, "--run_id")
    with monkeypatch.context() as patch:
        disk = FailingDisk(tmp_path, -1, patch)
        whole = generate(*flags, "whole").path
    true = {name: digest for name, digest in listing(whole).items() if name != "run_metadata.json"}
    assert disk.calls > 30
    for number in range(1, disk.calls + 1):
        prior = tmp_path / "priors" / f"run_{number}"
        code = (errno.ENOSPC, errno.EIO)[number % 2]
        with monkeypatch.context() as patch:
            FailingDisk(tmp_path, number, patch).error = code
            outcome = generate(*flags, number)
        if outcome.code != 0:  # only a picture's may pass, with a warning
            assert outcome.code == 2, outcome.err
            assert os.strerror(code) in outcome.error and str(prior) in outcome.error
        else:
            assert "no formation.png" in outcome.err
        found = listing(prior)
        metadata = found.pop("run_metadata.json", None)
        assert found.items() <= true.items()
        if metadata is not None:
            left = read_run(prior)
            assert left.is_complete or not damaged_files(left)
            assert left.has(IMAGE_FILE)  # so that it can be finished
            if number % 9 == 0:
                resumed = run("generate_prior", "--resume", prior, "--model_dir", model_dir)
                assert resumed.code == 0, resumed.err
