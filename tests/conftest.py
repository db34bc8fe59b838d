"""A small untrained model, priors made with it by the command line, and ways to run the scripts."""

from __future__ import annotations

import contextlib
import gc
import io
import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

pytest.register_assert_rewrite("helpers")
os.fsync = lambda descriptor: None  # no power cut is tested in this process, and waiting for disks is slow
os.environ["OMP_NUM_THREADS"] = "1"  # the model is so small that threads only cost time

from families import build_family, build_folder
from helpers import FRAMES, PROMPT, PUBLISHED_KEYS, SIZE, Outcome, listing, run_in_process

from step_skip.models import loading
from step_skip.models.weights import LoadOptions


def pytest_addoption(parser: pytest.Parser) -> None:
    """--slow runs what is marked so, too."""
    parser.addoption("--slow", action="store_true", help="run the tests that take many minutes, too")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Without --slow those are skipped."""
    for item in items if not config.getoption("--slow") else ():
        if item.get_closest_marker("slow"):
            item.add_marker(pytest.mark.skip(reason="takes many minutes: --slow runs it"))


MODEL_CONFIG = {
    "dit": {
        "dim": 48,
        "in_dim": 36,
        "ffn_dim": 64,
        "out_dim": 16,
        "text_dim": 32,
        "freq_dim": 32,
        "eps": 1e-6,
        "patch_size": [1, 2, 2],
        "num_heads": 2,
        "num_layers": 4,
        "has_image_input": True,
    },
    "text_encoder": {
        "vocab": 256,
        "dim": 32,
        "dim_attn": 32,
        "dim_ffn": 32,
        "num_heads": 2,
        "num_layers": 1,
        "dropout": 0.0,
    },
    "image_encoder": {
        "embed_dim": 32,
        "image_size": 32,
        "patch_size": 8,
        "vision_dim": 32,
        "vision_heads": 2,
        "vision_layers": 1,
    },
    "vae": {"dim": 4, "z_dim": 16, "dim_mult": [1, 2, 2, 2], "num_res_blocks": 1},
    "tokenizer": {"seq_len": 8},
    "defaults": {
        "height": SIZE,
        "width": SIZE,
        "num_frames": FRAMES,
        "fps": 8,
        "negative_prompt": "Still.",
        "cfg_scale": 5.0,
        "sigma_shift": 5.0,
    },
}


def build_model(folder: Path, *, seed: int = 0, config: dict = MODEL_CONFIG) -> Path:
    """An embedded model of the same classes, smaller still and untrained: a step takes milliseconds."""
    return build_folder(folder, config, seed=seed)


def save_image(path: Path, *, size: tuple[int, int] = (SIZE, SIZE), shade: int = 200) -> Path:
    """A picture with something in it."""
    from PIL import Image

    image = Image.linear_gradient("L").resize(size)
    Image.merge("RGB", (image, image.rotate(90), image.point(lambda _: shade))).save(path)
    return path


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a seeded, untrained embedded model."""
    return build_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The identity of every prior here."""
    return save_image(tmp_path_factory.mktemp("image") / "identity.png")


@pytest.fixture(scope="session")
def make_prior(tmp_path_factory: pytest.TempPathFactory, model_dir: Path, image: Path) -> Callable[..., Path]:
    """Make a prior by the command line, once per set of flags; tests only read it."""
    made: dict[tuple[str, ...], Path] = {}

    def make(*flags: str) -> Path:
        if flags not in made:
            import generate_prior

            common = ["--model", "tiny", "--model_dir", model_dir, "--image", image, "--prompt", PROMPT]
            argv = [*map(str, common), "--output_dir", str(tmp_path_factory.mktemp("priors")), *flags]
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                made[flags] = Path(generate_prior.main(argv))
        return made[flags]

    return make


@pytest.fixture(scope="session")
def prior(make_prior: Callable[..., Path]) -> Path:
    """A prior with every default, float32; tests only read it: give --output, or use prior_copy."""
    return make_prior()


@pytest.fixture(scope="session", autouse=True)
def keep_what_is_imported() -> Iterator[None]:
    """Out of the collector's sight: else a collection, one for every load, walks through all of torch."""
    import step_skip.pipeline.run  # noqa: F401

    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True)
def forget_contexts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A shared prior keeps the prompts and videos it is used for: no test may depend on those of another."""
    yield
    for name in ("contexts", "outputs"):
        for folder in tmp_path_factory.getbasetemp().glob(f"priors*/run_*/{name}"):
            shutil.rmtree(folder)


@pytest.fixture
def prior_copy(prior: Path, tmp_path: Path) -> Path:
    """The same prior, to be damaged."""
    return shutil.copytree(prior, tmp_path / "run_copy")


@pytest.fixture
def older_prior(prior: Path, tmp_path: Path) -> Path:
    """The same prior as the pull request's scripts write it: latents and nine entries of metadata."""
    import torch

    folder = tmp_path / "older"
    folder.mkdir()
    metadata = json.loads((prior / "run_metadata.json").read_text())
    for step in range(10):
        latents = torch.load(prior / f"step_{step:04d}.pt", weights_only=True)
        torch.save(latents.cpu(), folder / f"step_{step:04d}.pt")
    (folder / "run_metadata.json").write_text(json.dumps({key: metadata[key] for key in PUBLISHED_KEYS}))
    return folder


@pytest.fixture
def run(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Outcome]:
    """`run("infer_from_prior", "--prior_dir", prior, ...)`: a command line, in process."""

    def run(script: str, *argv: object) -> Outcome:
        return run_in_process(script, *argv, capsys=capsys, monkeypatch=monkeypatch)

    return run


@pytest.fixture
def generate(run: Callable[..., Outcome], model_dir: Path, tmp_path: Path) -> Callable[..., Outcome]:
    """generate_prior.py with the small model, into tmp_path/priors."""

    def generate(*argv: object) -> Outcome:
        common = ("--model", "tiny", "--model_dir", model_dir, "--output_dir", tmp_path / "priors")
        return run("generate_prior", *common, *argv)

    return generate


@pytest.fixture
def infer(run: Callable[..., Outcome], model_dir: Path) -> Callable[..., Outcome]:
    """infer_from_prior.py with the small model, resuming after step 6 unless the flags choose the steps."""

    def infer(prior: Path, *argv: object) -> Outcome:
        chosen = {"--start_step", "--steps", "--num_steps", "--sigmas"} & set(map(str, argv))
        method = () if chosen else ("--start_step", 6)
        return run("infer_from_prior", "--prior_dir", prior, "--model_dir", model_dir, *method, *argv)

    return infer


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The components of every load_pipeline call of this test."""
    calls, load_pipeline = [], loading.load_pipeline

    def spy(options: LoadOptions, files: dict[str, list[Path]]) -> object:
        calls.append(sorted(files))
        return load_pipeline(options, files)

    monkeypatch.setattr(loading, "load_pipeline", spy)
    return calls


@pytest.fixture
def refused(loads: list[list[str]], tmp_path: Path) -> Callable[..., str]:
    """`refused(lambda: infer(...))`: exit 2, one line, nothing loaded, nothing changed; returns the line."""

    def refused(command: Callable[[], Outcome], *words: str) -> str:
        before = listing(tmp_path)
        outcome = command()
        assert outcome.code == 2, outcome.err
        assert outcome.out == ""
        for word in words:
            assert word in outcome.error
        assert listing(tmp_path) == before
        assert not loads
        return outcome.error

    return refused


@pytest.fixture
def small_disk(tmp_path):
    """Mount a file system of one MiB, where this user may."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True).returncode != 0:
        pytest.skip("needs to mount a small file system")
    yield folder
    subprocess.run(["umount", folder], check=True)


# --- the family ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def folder_of(tmp_path_factory) -> Callable[[str], Path]:
    """`folder_of(family)`: the folder of a small model of it, built once."""
    made: dict[str, Path] = {}

    def folder_of(family: str) -> Path:
        if family not in made:
            made[family] = build_family(tmp_path_factory.mktemp(family), family)
        return made[family]

    return folder_of


@pytest.fixture
def make(folder_of, run, tmp_path) -> Callable[..., Outcome]:
    """`make(family, *flags)`: generate_prior.py with the small model of a family."""

    def make(family: str, *flags: object) -> Outcome:
        common = ("--model", "tiny", "--model_dir", folder_of(family), "--output_dir", tmp_path / "priors")
        return run("generate_prior", *common, "--prompt", PROMPT, *flags)

    return make


@pytest.fixture
def images(tmp_path) -> dict[str, Path]:
    """A first and a last frame."""
    return {"--image": save_image(tmp_path / "1.png"), "--end_image": save_image(tmp_path / "2.png", shade=9)}
