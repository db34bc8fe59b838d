"""The recipe's LoRA and branch: made in seconds here, so hardly trained, but files that load and fit."""

from __future__ import annotations

import shutil
import sys

import pytest
import torch
from helpers import ROOT
from safetensors.torch import load_file

from step_skip.method.skip_cache import Branch
from step_skip.models.lora import check_loras
from step_skip.models.lora_file import Lora

sys.path.append(str(ROOT / "data" / "tiny_wan_i2v"))

import distil

from step_skip.models.embedded import load_tiny_modules

FEW = ("--identities", "2", "--clips", "2", "--threads", "1")


@pytest.fixture(scope="module")
def folder(model_dir, tmp_path_factory):
    """A copy of the tests' model."""
    return shutil.copytree(model_dir, tmp_path_factory.mktemp("distil") / "model")


def test_the_lora_fits_every_layer_of_the_blocks(folder, capsys):
    distil.main(["lora", "--folder", str(folder), "--steps", "2", "--rank", "3", *FEW])
    path = folder / distil.LORA_FILE
    assert capsys.readouterr().out.splitlines()[-1] == str(path)
    weights = load_file(path)
    assert check_loras([Lora(path)], [folder / "dit.safetensors"]) == []
    assert len(weights) == 2 * 4 * (4 + 6 + 2)  # 4 blocks; self and cross attention, feed-forward
    assert all(3 in weight.shape for weight in weights.values())
    assert any(weight.any() for name, weight in weights.items() if "lora_B" in name)  # it has learned


def test_the_branch_is_the_dits_where_it_is_asked_for(folder):
    distil.main(["branch", "--folder", str(folder), *FEW, "--identities", "5"])
    assert not hasattr(load_tiny_modules(folder, only=["dit"])["dit"], "skip_branch")
    branch = load_tiny_modules(folder, only=["dit", "skip_branch"])["dit"].skip_branch
    assert isinstance(branch, Branch)
    assert [list(each.shape) for each in branch.parameters()] == [[3, 48, 96], [3, 48]]


def test_least_squares_finds_the_layer_that_was_there():
    generator = torch.Generator().manual_seed(0)
    rows, layer = (torch.randn(*shape, generator=generator).double() for shape in ((200, 7), (7, 3)))
    fit = distil.LeastSquares()
    for part in rows.split(64):
        fit.add(part, part @ layer)
    torch.testing.assert_close(fit.solve(), layer, atol=1e-4, rtol=0)


def test_what_the_branch_is_to_add_is_what_the_reuse_misses():
    shallow = torch.arange(12.0).reshape(3, 2, 1, 1, 2)  # steps, guidance branches, clips, tokens, width
    added = 10 * shallow
    inputs, missing = distil.reuse(shallow, added, 2)
    assert inputs[0].tolist() == [8, 9, 0, 10, 1]  # now, kept two steps before, 1
    assert missing[0].tolist() == [80, 80]
    assert (len(inputs), len(missing)) == (2, 2)
