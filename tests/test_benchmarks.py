"""Benchmarks that can't be run here for real still run: on the tests' model, and on a CPU."""

from __future__ import annotations

import csv
import importlib.util
import sys
from dataclasses import replace

import pytest
from helpers import OTHER_PROMPT, PROMPT, ROOT
from small_real import SmallVae

from step_skip.models.machine import describe_machine, installed_versions

sys.path.append(str(ROOT / "benchmarks"))

import gpu
import promise_real

about = {"machine": describe_machine("cpu"), "versions": installed_versions()}


def test_the_promise_on_a_model_whose_world_is_not_known(model_dir, image, tmp_path):
    flags = ("--model", "tiny", "--model_dir", model_dir, "--images", image, "--output", tmp_path / "real")
    steps = ("--num_inference_steps", "10")
    path = promise_real.main([*map(str, flags), *steps, "--prompts", PROMPT, OTHER_PROMPT])
    rows = list(csv.DictReader(path.open()))
    # what begins on a prior's latents, or is given the noise's negative branch, runs one less
    assert [row["forwards"] for row in rows] == ["20", "6", "5", "5", "5", "5", "3"]
    assert float(rows[0]["distance"]) == 0 < min(float(row["distance"]) for row in rows[1:])
    assert (tmp_path / "real" / "contact_sheet.png").stat().st_size > 1000


def small_bench():
    sizes = gpu.FULL_SIZE | {"dim": 48, "ffn_dim": 64, "num_heads": 4, "num_layers": 3, "text_dim": 32}
    settings = replace(gpu.SETTINGS, height=32, width=32, num_frames=5)
    return gpu.Bench(sizes, settings, "cpu", "eager")


def test_all_that_is_measured_on_a_gpu(monkeypatch):
    monkeypatch.setattr(gpu, "exactness", lambda *flags, **_: {"clips": 13, "exact": 13})
    written = []
    result = gpu.measure(
        small_bench(), SmallVae, lambda each: written.append(gpu.summarize(about | each)), steps=1
    )
    kinds = result["kinds"]
    both = [] if importlib.util.find_spec("torchao") is None else ["fp8", "fp8 compiled"]
    known = ["bare pipeline", "plain (Skip-Cache 1)", "Skip-Cache 2", "Skip-Cache 3", "compiled", *both]
    assert list(kinds) == known
    assert result["left_out"].keys() == {"fp8", "fp8 compiled"} - {*both}
    decoding = result["decoding"]["tiles"]["seconds"]
    sums = {
        name: [each[sum] - decoding for sum in ("seconds_per_prior", "seconds_per_new_prompt")]
        for name, each in kinds.items()
    }
    step = kinds["plain (Skip-Cache 1)"]["seconds_per_step"]
    assert sums["plain (Skip-Cache 1)"] == pytest.approx([10 * step, 2.5 * step])
    full, between = (kinds["Skip-Cache 3"][name] for name in ("seconds_per_step", "seconds_between"))
    assert sums["Skip-Cache 3"] == pytest.approx([4 * full + 6 * between, full + 2 * between])
    assert len(written) == 9 and "| compiled | " in written[-1] and "**not run by us**" in written[-1]


def test_what_there_is_no_time_for_is_named():
    result = gpu.measure(small_bench(), SmallVae, lambda _: None, seconds=-1)
    assert len(result["left_out"]) == 8 and not result["kinds"]


@pytest.mark.slow
@pytest.mark.parametrize("flags", [(), ("--compile", "inductor"), ("--quantize", "fp8")])
def test_exactness_between_processes(flags):
    """As benchmarks/gpu.py has it on a GPU, here on the CPU."""
    if "fp8" in flags:
        pytest.importorskip("torchao")
    found = gpu.exactness(*flags, device="cpu")
    assert found["exact"] == found["clips"] == 13
