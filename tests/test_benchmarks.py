"""Benchmarks that can't be run here for real still run: on the tests' model, and on a CPU."""

from __future__ import annotations

import csv
import sys

from helpers import OTHER_PROMPT, PROMPT, ROOT

sys.path.append(str(ROOT / "benchmarks"))

import gpu
import promise_real


def test_the_promise_on_a_model_whose_world_is_not_known(model_dir, image, tmp_path):
    flags = ("--model", "tiny", "--model_dir", model_dir, "--images", image, "--output", tmp_path / "real")
    steps = ("--num_inference_steps", "10")
    path = promise_real.main([*map(str, flags), *steps, "--prompts", PROMPT, OTHER_PROMPT])
    rows = list(csv.DictReader(path.open()))
    # what begins on a prior's latents, or is given the noise's negative branch, runs one less
    assert [row["forwards"] for row in rows] == ["20", "6", "5", "5", "5", "5", "3"]
    assert float(rows[0]["distance"]) == 0 < min(float(row["distance"]) for row in rows[1:])
    assert (tmp_path / "real" / "contact_sheet.png").stat().st_size > 1000


def test_the_timing_of_a_dit_with_random_weights():
    sizes = gpu.FULL_SIZE | {"dim": 48, "ffn_dim": 64, "num_heads": 4, "num_layers": 3, "text_dim": 32}
    found = gpu.timing(runs=1, sizes=sizes, height=32, width=32, num_frames=5, device="cpu")
    assert [found[name][0]["forwards"] for name, *_ in gpu.KINDS] == [5, 20, 6, 20, 20]
    assert [found[name][0]["block_evaluations"] for name, *_ in gpu.KINDS] == [15, 60, 16, 50, 48]
