"""Sweeps on a Ray cluster of two nodes on this machine: the same clips, whatever is lost on the way."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest
from conftest import build_model
from helpers import OTHER_PROMPT, PROMPT, read_json

from step_skip import cluster_videos
from step_skip.files import sha256_file

THIRD_PROMPT = "The portrait nods."
POISON = "The portrait takes its worker along."
DECIDING = ("latents_sha256", "video_sha256", "steps_run", "prompt", "prior_files", "forwards")


class Deadly(cluster_videos.VideoWorker):
    """A worker that one prompt kills."""

    def make(self, group, inputs, texts, *contexts):
        if group.jobs[0].plan.prompt == POISON:
            os._exit(1)
        return super().make(group, inputs, texts, *contexts)


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    """The address of a cluster of two nodes with one CPU each."""
    ray = pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    os.environ["RAY_AUTH_MODE"] = "disabled"
    nodes = Cluster()
    for _ in range(2):
        nodes.add_node(num_cpus=1, object_store_memory=2**27, include_dashboard=False)
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    yield nodes.address
    nodes.shutdown()


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
    assert "encoding 2 prompts" in outcome.err and "video 4 of 4" in outcome.err
    assert sweep("here", OTHER_PROMPT, THIRD_PROMPT, ray=False).code == 0
    assert results(tmp_path / "cluster") == results(tmp_path / "here")
    assert len(list((tmp_path / "cluster" / "contexts").iterdir())) == 2
    assert "4 are there already" in sweep("cluster", OTHER_PROMPT, THIRD_PROMPT, PROMPT).err


def test_a_lost_worker_costs_nothing_and_a_job_that_kills_three_is_given_up(
    prior, infer, address, tmp_path, monkeypatch
):
    monkeypatch.setattr(cluster_videos, "VideoWorker", Deadly)
    threading.Thread(target=kill_one_worker, daemon=True).start()
    prompts = ("--prompt", OTHER_PROMPT, POISON, THIRD_PROMPT)
    outcome = infer(prior, *prompts, "--output_dir", tmp_path / "sweep", "--ray", address)
    assert outcome.code == 1
    assert "1 of 3 videos failed" in outcome.error
    assert outcome.err.count("3 workers were lost over it: given up") == 1
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
