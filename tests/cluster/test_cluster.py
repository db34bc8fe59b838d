"""Sweeps on a Ray cluster of two nodes on this machine: the same clips, whatever is lost on the way."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from conftest import build_model, save_image
from helpers import OTHER_PROMPT, PROMPT, ROOT, read_json

from step_skip import LoadOptions, generate_priors
from step_skip.cluster import clips as cluster_clips
from step_skip.cluster import priors as cluster_priors
from step_skip.cluster.driver import Cluster
from step_skip.errors import InputError
from step_skip.files.reading import sha256_file
from step_skip.prior.files import damaged_files
from step_skip.prior.metadata import read_prior
from step_skip.prior.schema import METADATA_FILE

THIRD_PROMPT = "The portrait nods."
POISON = "The portrait takes its worker along."
DECIDING = ("latents_sha256", "video_sha256", "steps_run", "prompt", "prior_files", "forwards", "identity")


class Slow(cluster_clips.ClipWorker):
    """A worker that gives others time to kill it."""

    def make(self, *given):
        time.sleep(0.3)
        return super().make(*given)


class DeadlyPrior(cluster_priors.PriorWorker):
    """A worker that one prompt kills."""

    def make(self, pictures, prompt, *given):
        if prompt == POISON:
            os._exit(1)
        return super().make(pictures, prompt, *given)


class Deadly(cluster_clips.ClipWorker):
    """A worker that one prompt kills."""

    def make(self, bank, plan, *given):
        if plan.prompt == POISON:
            os._exit(1)
        return super().make(bank, plan, *given)


NODE = {"num_cpus": 1, "object_store_memory": 2**27, "include_dashboard": False}


@pytest.fixture(scope="module")
def nodes(tmp_path_factory):
    """A cluster of two nodes with one CPU each, besides the one that only drives it."""
    ray = pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    os.environ["RAY_AUTH_MODE"] = "disabled"
    nodes = Cluster(initialize_head=True, head_node_args={**NODE, "num_cpus": 0})
    for _ in range(2):
        nodes.add_node(**NODE)
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    yield nodes
    nodes.shutdown()


@pytest.fixture
def address(nodes):
    """Where it is."""
    return nodes.address


@pytest.fixture(scope="module")
def second(make_prior) -> Path:
    """Another prior, of the same model."""
    return make_prior("--seed", "1", "--run_id", "second")


@pytest.fixture
def sweep(prior, second, infer, address, tmp_path):
    """`sweep("name", *prompts, ray=True)`: both priors with these prompts, into a folder of that name."""

    def sweep(name, *prompts, ray=True):
        where = ("--ray", address) if ray else ()
        flags = ("--prior_dir", second, "--prompt", *prompts, "--output_dir", tmp_path / name)
        return infer(prior, *flags, *where)

    return sweep


def results(folder: Path) -> dict[str, dict]:
    """What decides every result, each of which is whole."""
    reports = {path.stem: read_json(path) for path in sorted(folder.glob("*.json"))}
    for stem, report in reports.items():
        assert report["video_sha256"] == sha256_file(folder / f"{stem}.mp4")
    assert {path.stem for path in folder.glob("*.mp4")} == set(reports)
    return {stem: {name: report[name] for name in DECIDING} for stem, report in reports.items()}


def test_a_cluster_makes_what_one_process_makes(sweep, tmp_path):
    outcome = sweep("cluster", OTHER_PROMPT, THIRD_PROMPT)
    assert outcome.code == 0, outcome.err
    assert "encoding 2 prompts" in outcome.err and "clip 4 of 4" in outcome.err
    assert sweep("here", OTHER_PROMPT, THIRD_PROMPT, ray=False).code == 0
    assert results(tmp_path / "cluster") == results(tmp_path / "here")
    assert len(list((tmp_path / "cluster" / "contexts").iterdir())) == 2
    assert "4 exist already" in sweep("cluster", OTHER_PROMPT, THIRD_PROMPT, PROMPT).err


def test_a_lost_worker_costs_nothing_and_a_job_that_kills_three_is_given_up(
    prior, infer, address, tmp_path, monkeypatch
):
    monkeypatch.setattr(cluster_clips, "ClipWorker", Deadly)
    threading.Thread(target=kill_one_worker, daemon=True).start()
    prompts = ("--prompt", OTHER_PROMPT, POISON, THIRD_PROMPT)
    outcome = infer(prior, *prompts, "--output_dir", tmp_path / "sweep", "--ray", address)
    assert outcome.code == 1
    assert "1 of 3 clips failed" in outcome.error
    assert outcome.err.count("3 workers were lost while they ran this job: given up") == 1
    assert outcome.err.count("a worker was lost") >= 3
    made = results(tmp_path / "sweep")
    assert {each["prompt"] for each in made.values()} == {OTHER_PROMPT, THIRD_PROMPT}


def kill_one_worker() -> None:
    """Kill the first worker that has a model, from without."""
    import psutil

    for _ in range(600):
        for process in psutil.process_iter(["cmdline"]):
            if (process.info["cmdline"] or [""])[0].startswith("ray::Deadly.make"):
                os.kill(process.pid, signal.SIGKILL)
                return
        time.sleep(0.1)


def test_a_lost_node_and_a_killed_command_cost_nothing(
    sweep, prior, second, model_dir, nodes, tmp_path, monkeypatch
):
    monkeypatch.setattr(cluster_clips, "ClipWorker", Slow)
    prompts = [f"The portrait moves {number}." for number in range(6)]
    folder = tmp_path / "cluster"

    def take_the_power_from_one() -> None:
        wait_for_clip(folder)
        nodes.remove_node(nodes.list_all_nodes()[-1], allow_graceful=False)

    killer = threading.Thread(target=take_the_power_from_one, daemon=True)
    killer.start()
    outcome = sweep("cluster", *prompts)
    killer.join()
    nodes.add_node(**NODE)
    assert outcome.code == 0 and "a worker was lost" in outcome.err, outcome.err
    assert sweep("here", *prompts, ray=False).code == 0
    expected = results(tmp_path / "here")
    assert results(folder) == expected
    command = (
        sys.executable,
        ROOT / "infer_from_prior.py",
        "--prior_dir",
        prior,
        second,
        "--model_dir",
        model_dir,
    )
    flags = (
        "--start_step",
        6,
        "--prompt",
        *prompts,
        "--output_dir",
        tmp_path / "killed",
        "--ray",
        nodes.address,
    )
    driver = subprocess.Popen([*map(str, command + flags)], stdout=-1, stderr=-1)
    made = wait_for_clip(tmp_path / "killed")
    driver.kill()
    driver.communicate()
    before = made.stat()
    assert len(list((tmp_path / "killed").glob("*.json"))) < len(expected)
    assert sweep("killed", *prompts).code == 0
    assert results(tmp_path / "killed") == expected
    assert (made.stat().st_ino, made.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def wait_for_clip(folder: Path) -> Path:
    """The first clip of a sweep."""
    for _ in range(30_000):
        if made := next(folder.glob("*.json"), None):
            return made
        time.sleep(0.005)
    raise TimeoutError(folder)


def test_priors_of_a_folder_are_those_of_one_process(
    generate, image, address, model_dir, tmp_path, monkeypatch
):
    """One image can't be read, and one prompt kills its worker."""
    monkeypatch.setattr(cluster_priors, "PriorWorker", DeadlyPrior)
    photos = tmp_path / "photos"
    photos.mkdir()
    shutil.copy(image, photos / "ann.png")
    save_image(photos / "ben.png", shade=90)
    (photos / "cut.png").write_bytes(image.read_bytes()[: image.stat().st_size // 2])
    output = tmp_path / "cluster"
    (output / f".tmp_{'a' * 16}_prior").mkdir(parents=True)
    flags = ("--image", photos, "--num_inference_steps", 2, "--prompt")
    there = ("--output_dir", output, "--ray", address)
    outcome = generate(*flags, PROMPT, POISON, *there)
    assert outcome.code == 1 and "4 of 6 priors failed" in outcome.error, outcome.err
    assert outcome.err.count("3 workers were lost while they ran this job: given up") == 2
    assert outcome.err.count("cut.png cannot be read") == 2 and "a minute" in outcome.err
    generate(*flags, PROMPT)
    here = {path.name: read_json(path / METADATA_FILE) for path in (tmp_path / "priors").iterdir()}
    assert sorted(here) == sorted(path.name for path in output.iterdir()) == ["run_ann", "run_ben"]
    for name, metadata in here.items():
        made = read_prior(output / name)
        assert made.metadata.files == metadata["files"] and not damaged_files(made)
        assert made.metadata.run_id == name.removeprefix("run_")
        assert {path.name for path in made.directory.iterdir()} == {
            path.name for path in (tmp_path / "priors" / name).iterdir()
        }
    again = generate("--image", photos / "ann.png", *flags[2:], PROMPT, *there)
    assert again.path == output / "run_ann" and "nothing to do" in again.err
    options = LoadOptions("tiny", "cpu", "float32", model_dir=model_dir)
    asked = {"num_inference_steps": 2, "output_dir": tmp_path / "python", "ray": address, "workers": 1}
    [made] = generate_priors(options, photos / "ben.png", [PROMPT], **asked)
    assert made.metadata.files == here["run_ben"]["files"]


def test_each_worker_has_a_gpu_of_its_own_where_there_are_any():
    cluster = Cluster(workers=3, gpus=4, threads=1)
    assert cluster.device("I2V-480P", None) == cluster.device("tiny", "cuda:1") == "cuda"
    assert cluster.resources("cuda")["num_gpus"] == 1 and cluster.resources("cpu")["num_gpus"] == 0
    with pytest.raises(InputError, match="the Ray cluster has no GPU"):
        Cluster(workers=2, gpus=0, threads=1).device("tiny", "cuda")


def test_weights_that_are_missing_are_one_line(prior, second, run, address, tmp_path):
    (tmp_path / "model").mkdir()
    folder = build_model(tmp_path / "model")
    (folder / "dit.safetensors").unlink()
    flags = ("--prior_dir", prior, second, "--prompt", PROMPT, "--output_dir", tmp_path / "s")
    outcome = run("infer_from_prior", *flags, "--model_dir", folder, "--ray", address)
    assert (outcome.code, outcome.out) == (2, "")
    assert "holds no dit.safetensors (the dit)" in outcome.error and "Traceback" not in outcome.err


def test_an_address_without_a_cluster_is_one_line(prior_copy, infer, refused):
    pytest.importorskip("ray")
    refused(
        lambda: infer(prior_copy, "--ray", "127.0.0.1:1", "--output_dir", "s"), "--ray 127.0.0.1:1", "local"
    )


def test_without_ray_it_is_said_how_to_get_it(prior_copy, infer, refused, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    refused(lambda: infer(prior_copy, "--ray"), "pip install .[ray]")
    refused(lambda: infer(prior_copy, "--workers", 2), "--ray")
