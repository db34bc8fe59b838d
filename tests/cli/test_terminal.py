"""What a script says is text on lines of its own, and how it ends depends on no reader."""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import ROOT, edit_metadata

from step_skip.cli.terminal import one_line, plain

EVIL = "a\x1b[2J\x9b1A\r\nrun_b: 28 of 28 files are whole\u202e\u2066"
STEERING = "\x1b\x9b\u202e\u2066\u2028"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("run_1/一只小船 ünï.mp4", "run_1/一只小船 ünï.mp4"),
        ("می\u200cخواهم 👩\u200d🚀", "می\u200cخواهم 👩\u200d🚀"),
        ("\x1b[2J", "\\u001b[2J"),
        ("\x7f\x9b", "\\u007f\\u009b"),
        ("a\u202eb\u2066c\u200fd", "a\\u202eb\\u2066c\\u200fd"),
        ("\U000e0041\udcff", "\\udb40\\udc41\\udcff"),
    ],
)
def test_what_would_steer_a_terminal_is_shown_as_its_code(text, shown):
    assert plain(text) == shown


def test_a_message_is_a_line():
    assert one_line("one\r\ntwo\x0bthree\u2028four\x85five\n") == "one two three four five"


def test_a_message_ends_somewhere():
    assert len(one_line("a" * 10**7)) < 20_000


# --- what a forged prior has shown --------------------------------------------------------------------------


def assert_plain(text: str) -> None:
    assert not set(STEERING) & set(text), text


@pytest.mark.parametrize(
    "changes",
    [
        {"model": EVIL},
        {"device_name": EVIL, "versions": {"torch": EVIL, "diffsynth": EVIL}},
        {"model_fingerprint": {"dit": EVIL}},
        {"run_id": EVIL},
        {"lora": [{"path": f"/tmp/{EVIL}.safetensors", "alpha": 1.0, "sha256": "0" * 64}]},
        {"lora": [{"path": f"/tmp/{EVIL}", "alpha": 1.0, "sha256": "0" * 64}]},
        {"status": EVIL},
        {EVIL: EVIL, "seconds": {EVIL: "x"}},
        {"files": {EVIL: "0" * 64}},
        {"tea_cache_l1_thresh": 1.0, "tea_cache_model_id": EVIL},
    ],
    ids=lambda changes: next(iter(changes))[:9],
)
def test_text_of_a_prior_never_steers_the_terminal(prior_copy, infer, run, model_dir, changes):
    edit_metadata(prior_copy, **changes)
    outcomes = [
        infer(prior_copy, "--start_step", 9),
        run("infer_from_prior", "--verify", "--prior_dir", prior_copy),
        run("generate_prior", "--resume", prior_copy, "--model_dir", model_dir),
    ]
    for outcome in outcomes:
        assert_plain(outcome.err)
        assert not any(line.startswith("run_b: 28") for line in outcome.err.splitlines())


def test_a_false_verdict_in_a_folders_name(prior, prior_copy, run):
    """What --verify says of one prior is one line, and its own."""
    evil = prior_copy.rename(prior_copy.with_name(EVIL))
    (evil / "y.pt").unlink()
    outcome = run("infer_from_prior", "--verify", "--prior_dir", evil)
    assert (outcome.code, outcome.out) == (2, "")
    assert_plain(outcome.err)
    assert "1 files are damaged" in outcome.error
    missing, verdict = outcome.err.splitlines()[:-1]
    assert "y.pt is missing" in missing and verdict.endswith("it can't be resumed with its own prompts")


def test_a_file_of_the_prior_whose_name_steers(prior_copy, infer, run):
    """Beside what the metadata lists; and a LoRA that the user has."""
    name = f"x{EVIL}.safetensors".replace("/", "")
    (prior_copy / name).write_bytes(b"no tensors")
    outcome = infer(prior_copy, "--lora", prior_copy / name)
    assert outcome.code == 2 and "is not a safetensors file" in outcome.error
    assert_plain(outcome.err)


# --- stdout and stderr that can't be written ----------------------------------------------------------------

DOOR = f"""
import sys; sys.path.insert(0, {str(ROOT)!r})
import logging, os, signal, time, step_skip.cli.terminal
def main():
    for number in range(3):
        logging.getLogger("step_skip").info("line %d", number)
    {{body}}
    return {{result!r}}
step_skip.cli.terminal.run_script(main)
"""


def heed_signals() -> None:
    """As from a shell, even where the tests themselves run under nohup."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


def door(body="pass", result="the/path", **options) -> subprocess.CompletedProcess:
    """A script's door in an interpreter of its own, around a few lines."""
    code = DOOR.format(body=body, result=result)
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "preexec_fn": heed_signals} | options
    return subprocess.run([sys.executable, "-c", code], timeout=300, **options)


def test_a_reader_that_wants_no_more_is_no_error():
    """As in `generate_prior.py ... | true`: what was made is there."""
    reading, writing = os.pipe()
    os.close(reading)
    ended = door(stdout=writing)
    os.close(writing)
    assert (ended.returncode, ended.stderr.decode().splitlines()[3:]) == (0, [])


@pytest.mark.parametrize("how", ["full", "closed", "pipe"])
def test_messages_that_cannot_be_told_stop_nothing(how):
    if how == "full":
        with open("/dev/full", "wb") as full:  # noqa: PTH123
            ended = door(stderr=full)
    elif how == "pipe":
        reading, writing = os.pipe()
        os.close(reading)
        ended = door(stderr=writing)
    else:
        ended = door(preexec_fn=lambda: os.close(2), stderr=None)
    assert (ended.returncode, ended.stdout) == (0, b"the/path\n")


def test_a_path_is_its_own_bytes_whatever_the_encoding():
    ended = door(result="prior/一只小船", env=os.environ | {"PYTHONIOENCODING": "ascii"})
    assert (ended.returncode, ended.stdout.decode()) == (0, "prior/一只小船\n")


def test_a_terminal_is_shown_text_and_a_program_the_path():
    assert door(result=EVIL).stdout == EVIL.encode() + b"\n"
    ours, theirs = pty.openpty()
    ended = door(result=EVIL, stdout=theirs)
    shown = os.read(ours, 10_000).decode()
    assert ended.returncode == 0
    assert "\\u001b[2J\\u009b1A" in shown
    assert_plain(shown)


# --- signals ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "code", "word"),
    [("SIGINT", 130, "interrupted"), ("SIGTERM", 143, "terminated"), ("SIGHUP", 129, "hung")],
)
def test_signals_end_a_run_in_one_line(name, code, word):
    ended = door(f"os.kill(os.getpid(), signal.{name}); time.sleep(60)")
    assert (ended.returncode, ended.stdout) == (code, b"")
    assert word in ended.stderr.decode().splitlines()[-1]
    assert b"Traceback" not in ended.stderr


def test_nohup_is_heeded():
    ignore = {"preexec_fn": lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN)}
    assert door("os.kill(os.getpid(), signal.SIGHUP)", **ignore).returncode == 0


def as_from_a_shell(modules: Path, script: str, *words: str) -> subprocess.CompletedProcess:
    """A script with other modules in front of the installed ones."""
    env = os.environ | {"PYTHONPATH": str(modules)}
    command = [sys.executable, str(ROOT / script), *words]
    return subprocess.run(command, env=env, preexec_fn=heed_signals, capture_output=True, text=True)


@pytest.mark.parametrize("script", ["generate_prior.py", "infer_from_prior.py"])
def test_ctrl_c_while_the_packages_are_imported(script, tmp_path):
    (tmp_path / "pydantic.py").write_text(
        "import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(60)\n"
    )
    ended = as_from_a_shell(tmp_path, script, "--help")
    assert (ended.returncode, ended.stdout, ended.stderr) == (-signal.SIGINT, "", "")


@pytest.mark.parametrize(
    ("line", "code", "word"),
    [
        ("os.kill(os.getpid(), signal.SIGINT)", 130, "interrupted"),
        ("raise ImportError('libtorch.so: failed to map segment from shared object')", 1, "out of memory"),
        ("raise OSError(12, 'Cannot allocate memory')", 1, "out of memory"),
    ],
)
def test_an_import_that_fails_half_way(tmp_path, line, code, word):
    """numpy turns Ctrl-C into an ImportError; the loader's own is of too little memory."""
    (tmp_path / "torch.py").write_text(
        "import os, signal\ntry:\n"
        f"    {line}\n"
        "except KeyboardInterrupt:\n    raise ImportError('numpy could not be imported')\n"
    )
    ended = as_from_a_shell(
        tmp_path,
        "generate_prior.py",
        "--model",
        "tiny",
        "--image",
        ROOT / "data/tiny_wan_i2v/inputs/mila.png",
    )
    assert (ended.returncode, ended.stdout) == (code, "")
    assert word in ended.stderr and len(ended.stderr.splitlines()) == 1
