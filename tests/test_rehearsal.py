"""The table's files are those DiffSynth knows; --slow runs both scripts at full size, without weights."""

from __future__ import annotations

import math
import sys

import pytest
from helpers import ROOT, read_json, run_as_user

sys.path.append(str(ROOT / "benchmarks"))

from sparse import published_shapes  # noqa: E402

from step_skip.models.families import MODELS  # noqa: E402

WEIGHTS = {each.model_hash: each for model in MODELS.values() for each in model.weights.values()}


@pytest.mark.parametrize("model_hash", WEIGHTS)
def test_keys_shapes_and_sizes_of_the_published_files(model_hash):
    """The hash is compared where the shapes are made."""
    weights = WEIGHTS[model_hash]
    shapes = published_shapes(weights)
    loaded = sum(math.prod(shape) for name, shape in shapes.items() if not name.startswith("textual."))
    assert loaded == weights.parameters
    assert weights.file_bytes in [size * sum(map(math.prod, shapes.values())) for size in (2, 4)]


@pytest.mark.slow
def test_fun_1_3b_at_full_size(tmp_path):
    sizes = ("--height", 16, "--width", 16, "--num_frames", 5, "--num_inference_steps", 2)
    command = (ROOT / "benchmarks" / "rehearsal.py", "Fun-1.3B-InP", *sizes, "--output", tmp_path / "results")
    ended = run_as_user(*command, "--folder", tmp_path, cwd=tmp_path, timeout=3600)
    assert ended.returncode == 0, ended.stderr
    result = read_json(tmp_path / "results" / "Fun-1.3B-InP.json")
    assert all(run["as_expected"] for run in result["runs"])
    assert result["weights_bytes"]["on_disk"] < 2e9 < 16e9 < result["weights_bytes"]["logical"]
