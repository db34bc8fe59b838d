"""Kept contexts from a stranger: encoded again where they cannot be right, and no link is followed."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from helpers import OTHER_PROMPT, listing

from step_skip.prior.contexts import kept_context_path
from step_skip.prior.metadata import read_prior


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
    from step_skip.prior.contexts import _context_header

    expected = infer(prior, "--prompt", OTHER_PROMPT, "--output", tmp_path / "a.mp4").report["latents_sha256"]
    recorded = read_prior(prior_copy)
    path = kept_context_path(recorded, OTHER_PROMPT)
    forge_context(path, _context_header(recorded, OTHER_PROMPT, tensor), tensor)
    report = infer(prior_copy, "--prompt", OTHER_PROMPT, "--output", tmp_path / "b.mp4").report
    assert report["latents_sha256"] == expected
    assert "text_encoder" in report["components_loaded"]


@pytest.mark.parametrize("kind", ["fifo", "sparse", "folder"])
def test_a_kept_context_that_is_no_file_of_its_size(prior_copy, infer, tmp_path, kind):

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


def test_a_link_in_place_of_the_contexts_folder(prior_copy, infer, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (prior_copy / "contexts").symlink_to(tmp_path / "elsewhere")
    outcome = infer(prior_copy, "--prompt", OTHER_PROMPT)
    assert outcome.code == 0 and "is a symbolic link" in outcome.err
    assert listing(tmp_path / "elsewhere") == {}
