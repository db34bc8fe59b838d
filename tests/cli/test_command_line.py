"""The scripts as a user runs them: an interpreter of their own, any folder, stdout kept for the result."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import OTHER_PROMPT, PROMPT, ROOT, read_json, run_as_user

from step_skip.cli.terminal import Terminated, run_script
from step_skip.errors import DiskError, InputError, RunError

SCRIPTS = ("generate_prior.py", "infer_from_prior.py")


def test_both_scripts_from_another_folder(image, model_dir, tmp_path):
    """Relative paths are the caller's; stdout is the path alone; the printed command is one that runs."""
    (tmp_path / "model").symlink_to(model_dir)
    (tmp_path / "me.png").write_bytes(image.read_bytes())
    flags = ("--model", "tiny", "--model_dir", "model", "--image", "me.png", "--prompt", PROMPT)
    more = ("--start_step", 5, "--device", "cpu")
    made = run_as_user(ROOT / "generate_prior.py", *flags, *more, cwd=tmp_path)
    assert made.returncode == 0, made.stderr
    prior = made.stdout.removesuffix("\n")
    assert prior.startswith("prior_output/run_")
    assert "10/10" in made.stderr
    printed = made.stderr.splitlines()[-1].strip()
    script = shlex.quote(str(ROOT / "infer_from_prior.py"))
    flags = f"--prior_dir {prior} --model_dir model --device cpu"
    assert printed == f'python {script} {flags} --prompt "..." --start_step 5'

    command = shlex.split(printed.replace("...", OTHER_PROMPT))
    resumed = run_as_user(*command[1:], cwd=tmp_path)
    assert resumed.returncode == 0, resumed.stderr
    video = tmp_path / resumed.stdout.removesuffix("\n")
    assert video.parent == tmp_path / prior / "outputs"
    report = read_json(video.with_suffix(".json"))
    assert (report["start_step"], report["steps_run"]) == (5, [6, 7, 8, 9])
    assert "runs 4 of 10 steps, skips 6" in resumed.stderr
    assert "loading dit, vae, text_encoder of tiny to cpu ..." in resumed.stderr
    assert re.search(
        r"7 forwards, .* network .* \(the prior's run: .* s\), .*decode .*, load ", resumed.stderr
    )


def test_what_diffsynth_prints_goes_to_stderr(run, generate, image, monkeypatch):
    from diffsynth.pipelines.wan_video import WanVideoPipeline

    check = WanVideoPipeline.check_resize_height_width

    def talkative(*args, **kwargs):
        print("a tip on downloading")
        return check(*args, **kwargs)

    monkeypatch.setattr(WanVideoPipeline, "check_resize_height_width", talkative)
    outcome = generate("--image", image, "--num_inference_steps", 1)
    assert outcome.out == f"{outcome.path}\n"
    assert "a tip on downloading" in outcome.err


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_answers_without_the_heavy_imports(script, tmp_path):
    code = (
        f"import sys, runpy; sys.argv = [{script!r}, '--help']\n"
        f"sys.path.insert(0, {str(ROOT)!r})\n"
        "try: runpy.run_path(sys.path[0] + '/' + sys.argv[0], run_name='__main__')\n"
        "except SystemExit as ended: code = ended.code\n"
        "heavy = [m for m in ('torch', 'diffsynth', 'numpy', 'matplotlib', 'PIL') if m in sys.modules]\n"
        "print(heavy, code, file=sys.stderr)"
    )
    ended = run_as_user("-c", code, cwd=tmp_path)
    assert ended.stderr.splitlines()[-1] == "[] 0"
    assert "usage: " in ended.stdout
    for flag in ("--model", "--prompt", "--cfg_scale", "--device", "--dtype", "--vram"):
        assert flag in ended.stdout


def test_mistakes_with_images_are_told_before_torch_is_imported(image, tmp_path):
    """Each in its own main, all in one interpreter: importing torch takes seconds."""
    (tmp_path / "text.png").write_text("no picture")
    mistakes = [
        [["--image", "not_there.png"], "is not a file"],
        [["--image", "text.png"], "not an image"],
        [["--image", image, image, "--run_id", "one"], "1 for 2 images"],
        [["--image", image, "--background", "nice"], "--background nice"],
        [["--image", image, "--prompt", "she", "speaks"], "--prompt 'she speaks'"],
    ]
    code = (
        "import sys, contextlib, io, generate_prior\n"
        f"for argv, words in {[[[*map(str, argv)], words] for argv, words in mistakes]!r}:\n"
        "    told = io.StringIO()\n"
        "    try:\n"
        "        with contextlib.redirect_stderr(told): generate_prior.main(['--model', 'tiny', *argv])\n"
        "    except (ValueError, SystemExit) as error: told.write(str(error))\n"
        "    assert words in told.getvalue(), told.getvalue()\n"
        "assert not {'torch', 'diffsynth'} & sys.modules.keys()\n"
    )
    ended = run_as_user("-c", code, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert ended.returncode == 0, ended.stderr


@pytest.mark.parametrize("script", SCRIPTS)
def test_forgotten_quotes_are_given_back(run, script):
    flags = ("--prior_dir", "a b") if "infer" in script else ("--image", "a b.png")
    outcome = run(script.removesuffix(".py"), *flags, "--prompt", "she", "moves", "left", "--device", "cpu")
    assert outcome.code == 2
    quoted = shlex.join(["python", script, *flags, "--prompt", "she moves left", "--device", "cpu"])
    assert f"3 prompts of one word each; if they are one prompt, quote it: {quoted};" in outcome.error


def test_prompts_of_one_word_may_each_have_a_flag(prior, infer):
    outcome = infer(prior, "--prompt", "Speaks.", "--prompt", "Sleeps.", "--dry_run")
    assert (outcome.code, len(outcome.out.splitlines())) == (0, 2)


def test_the_command_printed_is_short_where_nothing_else_was_given(monkeypatch, tmp_path):
    import generate_prior
    from step_skip.cli.prior_report import command_line

    args = generate_prior.parse_args(["--model", "tiny", "--image", "me.png"])
    words = ("infer_from_prior.py", "--prior_dir", Path("prior_output/run_my cat"))
    line = "infer_from_prior.py --prior_dir 'prior_output/run_my cat'"
    monkeypatch.chdir(ROOT)
    assert command_line(args, *words) == f"python {line}"
    monkeypatch.chdir(ROOT / "data")
    assert command_line(args, *words) == f"python {shlex.quote(str(ROOT))}/{line}"


def test_the_defaults_in_the_help_are_those_that_hold(tmp_path):
    from step_skip.models.weights import model_defaults

    text = " ".join(run_as_user(ROOT / "generate_prior.py", "--help", cwd=tmp_path).stdout.split())
    real, large, tiny = (model_defaults(name) for name in ("I2V-480P", "I2V-720P", "tiny"))
    for line in (
        f"({real.height} x {real.width} pixels; I2V-720P: {large.height} x {large.width}) and "
        f"{real.num_frames} frames; "
        f"tiny has {tiny.height} x {tiny.width} pixels and {tiny.num_frames} frames.",
        f"Frames per second. (default: {real.fps}; tiny: {tiny.fps})",
        f"halves the cost. (default: {real.cfg_scale:g}; tiny: {tiny.cfg_scale:g})",
        f"at high noise. (default: {real.sigma_shift:g})",
        f"(default: {real.dtype}; tiny: {tiny.dtype})",
        "Seed of the initial noise. With several seeds, each makes a prior. (default: 0)",
    ):
        assert line in text
    assert (tiny.negative_prompt, tiny.sigma_shift) == ("", real.sigma_shift)


@pytest.mark.parametrize("script", SCRIPTS)
def test_bytes_that_are_no_text(script, tmp_path):
    """As a shell passes them on; a Latin-1 é, for example."""
    flags = [os.fsencode(ROOT / script), b"--image", b"x.png", b"--prior_dir", b"x", b"--prompt", b"caf\xe9"]
    ended = run_as_user(*map(os.fsdecode, flags), cwd=tmp_path)
    assert ended.returncode == 2
    assert ended.stderr == (
        f"{script}: error: argument --prompt: the text is not valid UTF-8 (--help explains every flag)\n"
    )


def test_a_path_that_could_not_be_told_is_an_error(tmp_path):
    """Whoever reads stdout must not take an empty answer for success."""
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); import step_skip.cli.terminal\n"
        "step_skip.cli.terminal.run_script(lambda: 'the/path')"
    )
    with open("/dev/full", "w") as full:  # noqa: PTH123
        ended = subprocess.run(
            [sys.executable, "-c", code], cwd=tmp_path, stdout=full, stderr=-1, text=True, timeout=300
        )
    assert ended.returncode != 0
    assert "No space left on device" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_wrong_flags_are_one_line(tmp_path):
    ended = run_as_user(ROOT / "infer_from_prior.py", "--start_step", "six", cwd=tmp_path)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert len(ended.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (InputError("found, expected,\nwhat to do"), 2, "found, expected, what to do"),
        (RunError("no network"), 1, "no network"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (OSError(28, "No space left on device", "a.pt"), 2, "a.pt: No space left on device"),
        (Terminated(), 143, "terminated"),
        (OSError(116, "Stale file handle", "a.pt"), 2, "a.pt: Stale file handle"),
        (DiskError(2, "No such file or directory", "a.pt"), 2, "a.pt: No such file"),
        (MemoryError(), 1, "out of memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), 1, "out of memory"),
    ],
)
def test_exit_codes(capsys, error, code, words):
    def main() -> Path:
        raise error

    with pytest.raises(SystemExit) as ended:
        run_script(main)
    out, err = capsys.readouterr()
    assert (ended.value.code, out) == (code, "")
    assert len(err.splitlines()) == 1
    assert words in err


def test_what_is_told_line_by_line_is_never_held_as_a_whole(tmp_path):
    """As a dry run of a million jobs: the reader wants three lines, and no more than a few are made."""
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); import step_skip.cli.terminal\n"
        "def main():\n"
        "    for number in range(10**6):\n"
        "        print(f'made {number}', file=sys.stderr) if number % 10**5 == 0 else None\n"
        "        yield f'line {number}'\n"
        "step_skip.cli.terminal.run_script(main)"
    )
    command = f"{shlex.quote(sys.executable)} -c {shlex.quote(code)} | head -n 3; echo ${{PIPESTATUS[0]}}"
    ended = subprocess.run(["bash", "-c", command], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert ended.stdout.splitlines() == ["line 0", "line 1", "line 2", "0"]
    assert ended.stderr == "made 0\n"


def test_mistakes_of_the_program_keep_their_traceback():
    def main() -> Path:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run_script(main)
