"""Nothing is lost and nothing gets in: kills, damage, full disks, and priors made by somebody else."""

from __future__ import annotations

import builtins
import errno
import fcntl
import io
import multiprocessing
import os
import pickle
import resource
import secrets
import signal
import subprocess
import sys
import zipfile
from collections import Counter
from pathlib import Path

import pytest
import torch
from helpers import OTHER_PROMPT, PROMPT, ROOT, edit_metadata, listing, read_json, record_checksum
from PIL import Image

from step_skip.errors import InputError, TakenError
from step_skip.files.tensors import load_tensor
from step_skip.files.writing import locked, replacing, write_json
from step_skip.prior.contexts import kept_context_path
from step_skip.prior.files import damaged_files
from step_skip.prior.metadata import read_prior, read_run
from step_skip.prior.prior import IMAGE_FILE
from step_skip.sweep import make_clips

sys.path.append(str(ROOT / "benchmarks"))  # behind the root: it has a sweep.py, too
SHAPE = (1, 16, 3, 4, 4)  # latents of 9 frames of 32 x 32 pixels


# --- the campaign, in short ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ground(tmp_path_factory):
    import faults

    return faults.prepare(tmp_path_factory.mktemp("ground"))


def test_kills_lose_nothing(ground):
    import faults

    counts = {}
    assert faults.kill(ground, 8, seed=5, progress=counts.update) == []
    assert sum(count for name, count in counts.items() if name.startswith("kills")) >= 8


def test_damage_is_refused_or_does_not_matter(ground):
    import faults

    kinds = Counter()
    faults.damage(ground, 300, seed_=1, kinds=kinds)
    assert sum(kinds.values()) >= 300
    assert {kind.split(": ")[1] for kind in kinds} == {"refused", "exact"}


def test_forgeries_are_refused_or_do_no_harm(ground):
    import forgeries

    kinds = Counter()
    assert forgeries.forgeries(ground, 60, seed=2, kinds=kinds) == []
    assert {kind.split(": ")[1] for kind in kinds} == {"refused", "done"}


# --- every write call fails once ----------------------------------------------------------------------------


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


# --- hostile priors -----------------------------------------------------------------------------------------


def gadget(function, *arguments):
    class Gadget:
        def __reduce__(self):
            return function, arguments

    return Gadget()


GADGETS = {
    "system": lambda proof: gadget(os.system, f"touch {proof}"),
    "popen": lambda proof: gadget(subprocess.Popen, ["touch", str(proof)]),
    "eval": lambda proof: gadget(builtins.eval, f"open({str(proof)!r}, 'w')"),
    "exec": lambda proof: gadget(builtins.exec, f"open({str(proof)!r}, 'w')"),
    "open": lambda proof: gadget(io.open, str(proof), "w"),
    "getattr": lambda proof: gadget(builtins.getattr, Path(proof), "touch"),
    "torch.load": lambda proof: gadget(torch.load, str(proof)),
    "bytearray": lambda proof: gadget(builtins.bytearray, 2**40),
}


def replace_pickle(path: Path, content: bytes) -> None:
    """An archive like torch.save's, with another pickle in it."""
    with zipfile.ZipFile(path) as archive:
        entries = {entry.filename: archive.read(entry) for entry in archive.infolist()}
    name = next(name for name in entries if name.endswith("/data.pkl"))
    with zipfile.ZipFile(path, "w") as archive:
        for each, old in entries.items():
            archive.writestr(each, content if each == name else old)


@pytest.mark.parametrize("protocol", [0, 2, 4])
@pytest.mark.parametrize("kind", GADGETS)
def test_code_in_a_tensor_file(prior_copy, infer, refused, tmp_path, kind, protocol):
    proof, path = tmp_path / "code_was_run", prior_copy / "step_0006.pt"
    replace_pickle(path, pickle.dumps(GADGETS[kind](proof), protocol))
    record_checksum(prior_copy, path.name)
    refused(lambda: infer(prior_copy), path.name, "nothing in it was run")
    assert not proof.exists()


FORKED = multiprocessing.get_context("forkserver")  # its processes begin with these imports made
FORKED.set_forkserver_preload(
    ["torch", "step_skip.pipeline.run", "infer_from_prior", "step_skip.cli.flags", __name__]
)


def limited_run(argv, cwd, *, mebibytes):
    """infer_from_prior.py up to the loading of the model, with this much memory above what imports take."""
    process = FORKED.Process(target=run_limited, args=([*map(str, argv)], cwd, mebibytes))
    process.start()
    process.join(timeout=600)
    out, err = ((cwd / name).read_text() for name in ("out", "err"))
    return subprocess.CompletedProcess(argv, process.exitcode, out, err)


def run_limited(argv: list[str], cwd: Path, mebibytes: int) -> None:
    """What `limited_run` runs in a process of its own."""
    import infer_from_prior
    from step_skip.cli.terminal import run_script

    os.chdir(cwd)
    for descriptor, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT), descriptor)
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + mebibytes * 2**20,) * 2)
    sys.argv = ["infer_from_prior.py", *argv]
    run_script(infer_from_prior.main)


def claiming(path: Path, numel: int) -> None:
    """A file of a few KB whose pickle says that its storage has so many values."""
    with zipfile.ZipFile(path) as archive:
        content = archive.read(next(name for name in archive.namelist() if name.endswith("/data.pkl")))
    true, claim = (pickle.dumps(count, 2)[2:-1] for count in (16 * 3 * 4 * 4, numel))
    assert true in content
    replace_pickle(path, content.replace(true, claim, 1))  # the first one: others are strides


def zip_bomb(path: Path) -> None:
    with (
        zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive,
        archive.open("archive/data.pkl", "w") as file,
    ):
        for _ in range(2**10):
            file.write(bytes(2**20))


def stored_bomb(path: Path) -> None:
    """Says it is stored, and large; a hole, which costs no disk."""
    with path.open("wb") as file:
        file.truncate(2**32)


def image_bomb(path: Path) -> None:
    """Below what Pillow refuses, and half a GiB when decoded."""
    from PIL import Image

    Image.new("RGB", (13000, 13000)).save(path)


def deep_json(path: Path) -> None:
    path.write_text('{"run_id": ' + "[" * 900 + "]" * 900 + "}")


def sparse_json(path: Path) -> None:
    with path.open("r+b") as file:
        file.truncate(2**30)


BOMBS = {
    "4 TB claimed": ("step_0006.pt", lambda path: claiming(path, 2**40), "make the prior again"),
    "zip bomb": ("step_0006.pt", zip_bomb, "compressed"),
    "stored bomb": ("step_0006.pt", stored_bomb, "expected at most"),
    "image bomb": ("input_image.png", image_bomb, "13000 x 13000 pixels, expected 32 x 32"),
    "deep json": ("run_metadata.json", deep_json, "nested deeper"),
    "1 GB of metadata": ("run_metadata.json", sparse_json, "too large"),
}


@pytest.mark.parametrize("kind", BOMBS)
def test_bombs_under_a_memory_limit(prior_copy, model_dir, image, tmp_path, kind):
    name, make, words = BOMBS[kind]
    make(prior_copy / name)
    if name != "run_metadata.json" and kind != "stored bomb":
        record_checksum(prior_copy, name)
    argv = ("--prior_dir", prior_copy, "--model_dir", model_dir, "--start_step", 6, "--image", image)
    ended = limited_run(argv, tmp_path, mebibytes=200)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert "Traceback" not in ended.stderr and words in ended.stderr.splitlines()[-1]


def test_the_memory_limit_is_one(prior_copy, model_dir, image, tmp_path):
    """Shows that the test above can fail: this image is the user's own, and decoded."""
    image_bomb(tmp_path / "large.png")
    argv = ("--prior_dir", prior_copy, "--model_dir", model_dir, "--image", tmp_path / "large.png")
    ended = limited_run(argv, tmp_path, mebibytes=200)
    assert ended.returncode == 2
    assert "large.png cannot be read (MemoryError)" in ended.stderr.splitlines()[-1]


def test_a_tensor_that_claims_more_than_it_holds(prior_copy):
    """torch would read on behind the end of what is there."""
    path = prior_copy / "step_0006.pt"
    with zipfile.ZipFile(path) as archive:
        entries = {entry.filename: archive.read(entry) for entry in archive.infolist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in entries.items():
            archive.writestr(name, content[:64] if name.endswith("/data/0") else content)
    with pytest.raises(InputError, match="more values than it holds|not a tensor file"):
        load_tensor(path, shape=SHAPE, dtype="float32")


@pytest.mark.parametrize("name", ["../../secret.pt", "/etc/passwd", "..", "a/b.pt", "..\\x.pt", "."])
def test_no_path_leaves_the_prior(prior_copy, infer, run, refused, model_dir, name):
    files = read_json(prior_copy / "run_metadata.json")["files"]
    edit_metadata(prior_copy, files=files | {name: "0" * 64})
    refused(lambda: infer(prior_copy), "not inside the prior")
    refused(lambda: run("infer_from_prior", "--prior_dir", prior_copy, "--verify"), "not inside the prior")
    command = ("generate_prior", "--resume", prior_copy, "--model_dir", model_dir)
    refused(lambda: run(*command), "not inside the prior")


@pytest.mark.parametrize("name", ["step_0006.pt", "y.pt", "run_metadata.json"])
def test_no_link_leaves_the_prior(prior_copy, infer, refused, tmp_path, name):
    (prior_copy / name).rename(tmp_path / "elsewhere")
    (prior_copy / name).symlink_to(tmp_path / "elsewhere")
    refused(lambda: infer(prior_copy), name, "symbolic link")


def test_a_pipe_is_no_file(prior_copy, infer, refused):
    """Reading one would wait forever."""
    for name in ("step_0006.pt", "run_metadata.json"):
        (prior_copy / name).unlink()
        os.mkfifo(prior_copy / name)
        signal.alarm(60)
        outcome = infer(prior_copy)
        signal.alarm(0)
        assert outcome.code == 2 and name in outcome.error


# --- metadata that was changed ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"cfg_scale": 5.0', '"cfg_scale": 4.0'),
        (PROMPT, "The portrait moves lest."),
        ('"seed": 0', '"seed": 1'),
    ],
)
def test_metadata_that_is_sound_and_not_what_was_written(prior_copy, infer, refused, old, new):
    path = prior_copy / "run_metadata.json"
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    refused(lambda: infer(prior_copy), "was edited or damaged", "copy the prior again")


def test_a_damaged_prior_never_passes_for_an_older_one(prior_copy, infer, refused, image):
    path = prior_copy / "run_metadata.json"
    path.write_text(path.read_text().replace("format_version", "format_versioo"))
    refused(lambda: infer(prior_copy, "--image", image, "--prompt", PROMPT), "format_version None")


# --- --verify -----------------------------------------------------------------------------------------------


@pytest.fixture
def verify(run):
    return lambda *priors: run("infer_from_prior", "--verify", "--prior_dir", *priors)


def test_whole_priors_are_said_to_be_so(prior, prior_copy, verify, loads):
    outcome = verify(prior, prior_copy)
    assert (outcome.code, outcome.out) == (0, f"{prior}\n{prior_copy}\n")
    assert outcome.err.count("38 of 38 files are whole; it can be resumed after steps 0-9") == 2
    assert not loads


def test_damage_is_told_file_by_file(prior_copy, verify, infer):
    (prior_copy / "step_0003.pt").unlink()
    (prior_copy / "output_full.mp4").write_bytes(b"half")
    torch.save(torch.zeros(SHAPE) * float("nan"), prior_copy / "step_0008.pt")
    record_checksum(prior_copy, "step_0008.pt")
    outcome = verify(prior_copy)
    assert (outcome.code, outcome.out) == (2, "")
    for words in ("step_0003.pt is missing", "output_full.mp4 is damaged", "step_0008.pt holds NaN"):
        assert words in outcome.err
    assert "35 of 38 files are whole; it can be resumed after steps 0-2, 4-7, 9" in outcome.err
    assert "3 files are damaged" in outcome.error
    assert infer(prior_copy, "--start_step", 6).code == 0  # as was said
    assert infer(prior_copy, "--start_step", 3).code == 2


def test_a_damaged_negative_branch_is_missed_by_the_step_before(prior_copy, verify, infer):
    (prior_copy / "noise_pred_nega_0003.pt").unlink()
    assert "37 of 38 files are whole; it can be resumed after steps 0-1, 3-9" in verify(prior_copy).err
    assert infer(prior_copy, "--start_step", 2).code == 2


def test_a_prior_without_its_identity_is_said_to_be_useless(prior_copy, verify):
    (prior_copy / "y.pt").unlink()
    assert "can't be resumed" in verify(prior_copy).err


def test_drafts_and_older_priors_are_verified_too(make_prior, older_prior, verify):
    draft = make_prior("--stop_after", "3")
    assert "it can be resumed after steps 0-3" in verify(draft).err
    assert "10 of 10 files are whole" in verify(older_prior).err


def test_verify_stands_alone(prior, run, refused):
    command = ("infer_from_prior", "--verify", "--prior_dir", prior, "--prompt", PROMPT)
    refused(lambda: run(*command), "--verify only looks at priors", "--prompt")


# --- links in the way of what is written --------------------------------------------------------------------


@pytest.fixture
def precious(tmp_path):
    """A file of the user's that no prior may change."""
    path = tmp_path / "profile"
    path.write_text("export PATH")
    return path


def test_links_under_guessable_temporary_names_are_not_followed(prior_copy, infer, precious, tmp_path):
    """A forged prior may hold links under any name it can foresee, wherever something will be written."""

    prior = read_prior(prior_copy)
    names = [kept_context_path(prior, OTHER_PROMPT).name, "output.json", "output.mp4", "index.html"]
    for folder in (prior_copy, prior_copy / "contexts", prior_copy / "outputs"):
        folder.mkdir(exist_ok=True)
        for name in names:
            for number in (os.getpid(), *range(os.getpid() + 1, os.getpid() + 50)):
                (folder / f".tmp_{number}_{name}").symlink_to(precious)
            (folder / name).symlink_to(precious)
    outcome = infer(prior_copy, "--prompt", OTHER_PROMPT)
    assert outcome.code == 0, outcome.err
    assert precious.read_text() == "export PATH"
    assert not kept_context_path(prior, OTHER_PROMPT).is_symlink()  # replaced, not followed


def test_a_temporary_name_is_never_one_that_is_there(tmp_path, precious, monkeypatch):
    monkeypatch.setattr(secrets, "token_hex", lambda _: "0" * 16)
    (tmp_path / f".tmp_{'0' * 16}_file.json").symlink_to(precious)
    with pytest.raises(OSError, match="exists"):
        write_json(tmp_path / "file.json", {})
    assert precious.read_text() == "export PATH"


@pytest.mark.parametrize("kind", ["link", "fifo"])
def test_what_was_put_in_place_of_the_temporary_file_is_not_taken(tmp_path, precious, kind):
    words = {"link": "symbolic links", "fifo": "another program"}[kind]
    with (
        pytest.raises(OSError, match=words),
        replacing(tmp_path / "file.json") as temporary,
    ):
        temporary.unlink()
        temporary.symlink_to(precious) if kind == "link" else os.mkfifo(temporary)
    assert not (tmp_path / "file.json").exists()
    assert precious.read_text() == "export PATH"


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


def test_a_link_in_place_of_a_sweeps_folder_has_no_page(prior_copy, infer, run, tmp_path):
    sweep = prior_copy / "outputs" / "sweep"
    infer(prior_copy, "--start_step", 9, "--output_dir", sweep).path.rename(tmp_path / "elsewhere")
    sweep.symlink_to(tmp_path / "elsewhere")
    before = listing(tmp_path)
    outcome = run("step_skip.page.__main__", sweep)
    assert outcome.code == 2 and "sweep is a symbolic link" in outcome.error
    assert listing(tmp_path) == before


def test_a_link_in_place_of_the_contexts_folder(prior_copy, infer, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (prior_copy / "contexts").symlink_to(tmp_path / "elsewhere")
    outcome = infer(prior_copy, "--prompt", OTHER_PROMPT)
    assert outcome.code == 0 and "is a symbolic link" in outcome.err
    assert listing(tmp_path / "elsewhere") == {}


def test_only_our_own_leftovers_are_cleared_away(tmp_path):

    for name in (".tmp_thesis.tex", ".tmp_0123456789abcdef_step_0001.pt", ".tmp_77_step_0001.pt", "a.pt"):
        (tmp_path / name).write_text("text")
    (tmp_path / ".tmp_78_folder").mkdir()
    with locked(tmp_path):
        pass
    assert set(listing(tmp_path)) == {".tmp_thesis.tex", ".tmp_78_folder", "a.pt"}


# --- what was kept and what is shown ------------------------------------------------------------------------


def forge_context(path: Path, header: dict, tensor) -> None:
    import safetensors.torch

    path.parent.mkdir(exist_ok=True)
    path.write_bytes(safetensors.torch.save({"context": tensor}, header))


@pytest.mark.parametrize(
    "tensor",
    [
        torch.zeros(1, 8, 32, dtype=torch.int8),
        torch.zeros(1, 8, 32, dtype=torch.float64),
        torch.zeros(1, 8, 16),
        torch.zeros(1, 0, 32),
        torch.tensor(0.0),
        torch.full((1, 8, 32), float("nan")),
    ],
    ids=["int8", "float64", "width", "empty", "scalar", "nan"],
)
def test_a_kept_context_that_cannot_be_is_encoded_again(prior, prior_copy, infer, tmp_path, tensor):
    from step_skip.prior.contexts import _context_header, kept_context_path

    expected = infer(prior, "--prompt", OTHER_PROMPT, "--output", tmp_path / "a.mp4").report["latents_sha256"]
    recorded = read_prior(prior_copy)
    path = kept_context_path(recorded, OTHER_PROMPT)
    forge_context(path, _context_header(recorded, OTHER_PROMPT, tensor), tensor)
    report = infer(prior_copy, "--prompt", OTHER_PROMPT, "--output", tmp_path / "b.mp4").report
    assert report["latents_sha256"] == expected
    assert "text_encoder" in report["components_loaded"]


@pytest.mark.parametrize("kind", ["fifo", "sparse", "folder"])
def test_a_kept_context_that_is_no_file_of_its_size(prior_copy, infer, tmp_path, kind):
    from step_skip.prior.contexts import kept_context_path

    path = kept_context_path(read_prior(prior_copy), OTHER_PROMPT)
    path.parent.mkdir()
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        with path.open("wb") as file:
            file.truncate(6 * 2**30)
    outcome = infer(prior_copy, "--prompt", OTHER_PROMPT, "--output", tmp_path / "b.mp4")
    assert outcome.code == 0, outcome.err


@pytest.mark.parametrize("kind", ["link", "other", "long"])
def test_a_priors_film_that_is_not_its_own_is_not_shown(prior_copy, infer, run, tmp_path, kind):
    from step_skip.media.videos import write_video

    own = prior_copy / "output_full.mp4"
    frames = [Image.new("RGB", (16, 16))] * (40 if kind == "long" else 9)
    own.rename(tmp_path / "own.mp4")
    write_video(frames, tmp_path / "other.mp4", fps=8)
    if kind == "link":
        own.symlink_to(tmp_path / "own.mp4")
    else:
        own.write_bytes((tmp_path / "other.mp4").read_bytes())
    if kind == "long":
        record_checksum(prior_copy, own.name)
    folder = infer(prior_copy, "--prompt", PROMPT, OTHER_PROMPT, "--start_step", 9).path
    text = (folder / "index.html").read_text()
    words = {"link": "is a symbolic link", "other": "is damaged", "long": "over 9 frames, expected 9"}[kind]
    assert words in text
    assert 'output_full.mp4"' not in text  # nothing to play
    assert run("step_skip.page.__main__", folder).code == 0


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


def test_a_sweeps_folder_from_a_stranger(prior, infer, run, tmp_path):
    """What is in it is made again, or told on the page; none of it is waited for or followed."""
    flags = ("--prompt", PROMPT, OTHER_PROMPT, "--start_step", "4-9", "--output_dir", tmp_path / "sweep")
    folder = infer(prior, *flags).path
    whole = listing(folder)
    (tmp_path / "elsewhere").write_text("precious")
    laid = {
        "brackets": lambda path: path.write_text("[" * 100_000),
        "deep": lambda path: path.write_text("[" * 900 + "]" * 900),
        "fifo": os.mkfifo,
        "link": lambda path: path.symlink_to(tmp_path / "elsewhere"),
        "sparse": lambda path: os.truncate(os.fspath(path), 2**36),
        "folder": Path.mkdir,
    }
    for suffix in (".json", ".mp4"):
        videos = sorted(folder.glob("*.mp4"))[:: 1 if suffix == ".mp4" else -1][: len(laid)]
        for video, (kind, lay) in zip(videos, laid.items(), strict=True):
            path = video.with_suffix(suffix)
            if kind != "sparse":
                path.unlink()
            lay(path)
    signal.alarm(100)
    assert run("step_skip.page.__main__", folder).code == 0
    outcome = infer(prior, *flags)
    signal.alarm(0)
    assert (outcome.code, "2 of 12 clips failed" in outcome.error) == (1, True), outcome.err
    found = {name: digest for name, digest in listing(folder).items() if "/" not in name}
    laid_over = [path for path in folder.iterdir() if path.is_dir() and path.name != "page"]
    made = {name for name, digest in found.items() if name.endswith(".mp4") and digest == whole.get(name)}
    # the video whose JSON is a folder is made, and not said to be
    assert len(made) == 11 and len(laid_over) == 2
    assert (tmp_path / "elsewhere").read_text() == "precious"


# --- what is swapped between two looks ----------------------------------------------------------------------


@pytest.mark.parametrize("name", ["step_0006.pt", "y.pt"])
def test_a_file_that_is_swapped_after_its_sum_was_taken(prior_copy, infer, refused, monkeypatch, name):
    """What is loaded is what the sum is of, so that the JSON never records another."""
    from step_skip.files import reading

    check, path = reading.check_sha256, prior_copy / name
    torch.save(torch.load(path, weights_only=True) * 2, prior_copy.parent / "other.pt")

    def swap_after(checked, *sums):
        check(checked, *sums)
        if checked == path and (prior_copy.parent / "other.pt").exists():
            (prior_copy.parent / "other.pt").rename(path)

    monkeypatch.setattr("step_skip.prior.files.check_sha256", swap_after)
    outcome = infer(prior_copy)
    assert outcome.code == 2 and f"{name} is damaged: its SHA-256" in outcome.error


def test_an_older_priors_file_that_is_swapped(older_prior, infer, image, monkeypatch):
    """It records no sums: what was seen first has to be what is loaded."""
    from step_skip.infer import inputs

    read, path = inputs.read_inputs, older_prior / "step_0006.pt"

    def swap_after(*given):
        inputs = read(*given)
        torch.save(torch.zeros(SHAPE), path)
        return inputs

    monkeypatch.setattr("step_skip.infer.inputs.read_inputs", swap_after)
    outcome = infer(older_prior, "--model", "tiny", "--image", image, "--prompt", PROMPT)
    assert outcome.code == 2 and "step_0006.pt is damaged: its SHA-256" in outcome.error


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
    assert f"another run made {path} meanwhile; this run's clip is {tmp_path}/video_2.mp4" in outcome.error
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


def test_of_many_writers_one_gets_the_name(tmp_path):
    from concurrent.futures import ThreadPoolExecutor

    def write(number):
        try:
            write_json(tmp_path / "one.json", {"number": number}, overwrite=False)
        except TakenError:
            return None
        return number

    with ThreadPoolExecutor(8) as pool:
        winners = [number for number in pool.map(write, range(40)) if number is not None]
    assert len(winners) == 1 and read_json(tmp_path / "one.json")["number"] == winners[0]
    assert set(listing(tmp_path)) == {"one.json"}


def test_a_file_system_without_locks_is_said_to_be_one(tmp_path, monkeypatch, caplog):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with locked(tmp_path):
        pass
    assert "locks don't work" in caplog.text
