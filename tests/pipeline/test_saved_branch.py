"""The first negative branch of a run that begins on the prior's own latents is read, not evaluated."""

from __future__ import annotations

import pytest
import torch
from helpers import OTHER_PROMPT, edit_metadata, read_json

from step_skip.pipeline.hooks import ForwardCounter

STEPS_3 = ("--num_steps", 3)


@pytest.fixture
def without_branch(prior_copy):
    """The prior as it was made before branches were saved: another entry, fewer files."""
    metadata = read_json(prior_copy / "run_metadata.json")
    kept = {name for name in metadata["files"] if "nega" not in name}
    for path in prior_copy.glob("noise_pred_nega_*.pt"):
        path.unlink()
    entries = {key: {n: v for n, v in metadata[key].items() if n in kept} for key in ("files", "shapes")}
    edit_metadata(prior_copy, keeps_nega=False, **entries)
    return prior_copy


def forwards_and_latents(infer, prior, path, *flags):
    report = infer(prior, *flags, "--output", path).report
    return report["forwards"], report["latents_sha256"]


def test_a_known_branch_is_given_once_and_not_counted():
    known, evaluated = torch.ones(1), torch.zeros(1)
    counter = ForwardCounter(lambda **_: evaluated, known_nega=known)
    latents = torch.zeros(1)
    assert counter(positive=True, latents=latents) is evaluated
    assert torch.equal(counter(positive=False, latents=latents), known)
    assert counter.forwards == 1
    assert counter(positive=True, latents=latents) is evaluated
    assert counter(positive=False, latents=latents) is evaluated
    assert counter.forwards == 3


@pytest.mark.parametrize(
    ("flags", "forwards"), [(("--start_step", 6), 5), (("--start_step", 8), 1), (("--steps", 0), 1)]
)
def test_a_resume_reads_it_for_the_same_latents(prior, without_branch, infer, tmp_path, flags, forwards):
    flags = (*flags, "--prompt", OTHER_PROMPT)
    saved = forwards_and_latents(infer, prior, tmp_path / "saved.mp4", *flags)
    assert saved[0] == forwards
    if "--start_step" in flags:  # a differential resume also splits the prior's velocities by it
        evaluated = forwards_and_latents(infer, without_branch, tmp_path / "evaluated.mp4", *flags)
        assert evaluated == (forwards + 1, saved[1])


@pytest.mark.parametrize("flags", [STEPS_3, ("--start_step", 6), ("--steps", *range(10))])
def test_a_prior_without_branches_costs_what_it_did_and_stays_exact(without_branch, infer, tmp_path, flags):
    expected = read_json(without_branch / "run_metadata.json")["latents_sha256"]
    forwards, latents = forwards_and_latents(infer, without_branch, tmp_path / "own.mp4", *flags)
    steps = 10 if len(flags) > 2 else 3
    assert (forwards, latents) == (2 * steps, expected)


@pytest.mark.parametrize(
    ("flags", "forwards"),
    [
        ((), 5),
        (("--cfg_scale", 7), 5),  # the guidance is the run's own, the branch isn't
        (("--cfg_scale", 5, 5, 1), 4),
        (("--cfg_scale", 1, 5, 5), 5),  # no negative branch is asked for where it is known
        (("--cfg_scale", 1), 3),
        (("--negative_prompt", OTHER_PROMPT), 6),
        (("--skip_cache", 2), 6),
    ],
)
def test_it_is_read_only_where_it_is_the_same(prior, infer, tmp_path, flags, forwards):
    found = forwards_and_latents(infer, prior, tmp_path / "a.mp4", *STEPS_3, "--prompt", OTHER_PROMPT, *flags)
    assert found[0] == forwards


def test_a_cached_or_unguided_prior_saves_none(make_prior):
    for flags in (("--skip_cache", "2"), ("--cfg_scale", "1")):
        prior = make_prior(*flags)
        assert not list(prior.glob("noise_pred_nega_*"))
        assert read_json(prior / "run_metadata.json")["keeps_nega"] is False


def test_a_damaged_branch_is_found_before_it_is_used(prior_copy, infer, refused):
    path = prior_copy / "noise_pred_nega_0007.pt"
    path.write_bytes(path.read_bytes()[:-1])
    refused(lambda: infer(prior_copy, "--start_step", 6, "--prompt", OTHER_PROMPT), path.name)
    assert infer(prior_copy, "--start_step", 7, "--prompt", OTHER_PROMPT).code == 0  # reads step 8's


def test_resuming_a_prior_makes_a_lost_branch_again(prior_copy, run, model_dir):
    path = prior_copy / "noise_pred_nega_0008.pt"
    before = path.read_bytes()
    path.unlink()
    assert run("generate_prior", "--resume", prior_copy, "--model_dir", model_dir).code == 0
    assert path.read_bytes() == before
