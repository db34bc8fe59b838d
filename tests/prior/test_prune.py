"""A prior that was pruned to what a few steps need: with these it gives what it gave, others are refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from helpers import OTHER_PROMPT, PROMPT, Outcome, edit_metadata, listing, read_json

from step_skip.prior.metadata import read_prior


@pytest.fixture
def prune(run: Callable[..., Outcome]) -> Callable[..., Outcome]:
    """prior_utils.py prune."""
    return lambda *argv: run("prior_utils", "prune", *argv)


def names(prior: Path) -> set[str]:
    return {path.name for path in prior.iterdir() if path.suffix == ".pt"}


def test_nothing_goes_without_yes(prior_copy: Path, prune) -> None:
    before = listing(prior_copy)
    outcome = prune(prior_copy, "--num_steps", 3)
    assert outcome.code == 0 and "would remove" in outcome.err and "--yes" in outcome.err
    assert listing(prior_copy) == before


def test_what_three_steps_need_is_left_and_gives_the_same(prior_copy: Path, prune, infer, run) -> None:
    def clips() -> list[str]:
        asked = [("--num_steps", 3), ("--num_steps", 3, "--prompt", OTHER_PROMPT)]
        return [infer(prior_copy, *flags).report["latents_sha256"] for flags in asked]

    before = clips()
    assert prune(prior_copy, "--num_steps", 3, "--yes").code == 0
    steps = {f"{kind}_{i:04d}.pt" for kind in ("noise_pred", "noise_pred_nega") for i in (0, 6, 9)}
    latents = {"initial_latents.pt", "step_0005.pt", "step_0008.pt", "step_0009.pt"}
    left = {name for name in names(prior_copy) if not name.startswith("context")}
    assert left == steps | latents | {"y.pt", "clip_feature.pt"}
    assert clips() == before
    assert before[0] == read_json(prior_copy / "run_metadata.json")["latents_sha256"]
    verified = run("infer_from_prior", "--prior_dir", prior_copy, "--verify")
    assert verified.code == 0 and "after steps 5, 8-9" in verified.err


def test_pruned_by_default_every_usual_number_of_steps_still_runs(prior_copy: Path, prune, infer) -> None:
    before = infer(prior_copy, "--num_steps", 6, "--prompt", OTHER_PROMPT).report["latents_sha256"]
    assert prune(prior_copy, "--yes").code == 0
    for number in (1, 2, 3, 4):
        assert len(infer(prior_copy, "--num_steps", number).report["steps_run"]) == number
    after = infer(prior_copy, "--num_steps", 6, "--prompt", OTHER_PROMPT).report["latents_sha256"]
    assert after == before


def test_without_a_choice_a_pruned_prior_is_followed_in_what_is_left(
    prior_copy, prune, run, model_dir
) -> None:
    assert prune(prior_copy, "--num_steps", 2, "--yes").code == 0
    common = ("--prior_dir", prior_copy, "--model_dir", model_dir)
    assert run("infer_from_prior", *common).report["steps_run"] == [0, 8]
    assert run("infer_from_prior", *common, "--num_steps", "auto").report["steps_run"] == [0]


def test_a_step_that_is_kept_can_be_resumed_at(prior_copy: Path, prune, infer) -> None:
    assert prune(prior_copy, "--steps", 0, 7, "--yes").code == 0
    resumed = infer(prior_copy, "--start_step", 6).report  # its latents are those before step 7
    assert resumed["latents_sha256"] == read_json(prior_copy / "run_metadata.json")["latents_sha256"]


def test_steps_that_are_gone_are_refused(prior_copy, prune, infer, refused, run) -> None:
    assert prune(prior_copy, "--steps", 0, 7, "--yes").code == 0
    refused(lambda: infer(prior_copy, "--num_steps", 3), "only 2 steps left, 0, 7")
    for flags in (("--steps", 0, 5), ("--start_step", 2)):
        refused(lambda flags=flags: infer(prior_copy, *flags), "keeps only steps 0, 7", "--steps")
    refused(lambda: run("generate_prior", "--resume", prior_copy), "keeps only steps")
    refused(lambda: prune(prior_copy, "--steps", 0, 5), "lacks")


def test_pruned_again_it_is_smaller(prior_copy: Path, prune) -> None:
    assert prune(prior_copy, "--num_steps", 2, 4, "--yes").code == 0
    first = names(prior_copy)
    assert prune(prior_copy, "--num_steps", 2, "--yes").code == 0
    assert names(prior_copy) < first


def test_a_prune_that_was_killed_is_finished_by_the_next(prior_copy: Path, prune) -> None:
    whole = read_prior(prior_copy)
    assert prune(prior_copy, "--num_steps", 2, "--yes").code == 0
    after = names(prior_copy)
    (prior_copy / "step_0003.pt").write_bytes(b"left over")  # the metadata was written, the file not removed
    assert prune(prior_copy, "--num_steps", 2, "--yes").code == 0
    assert names(prior_copy) == after
    assert read_prior(prior_copy).kept_steps == [0, 8] and whole.kept_steps is None


@pytest.fixture
def stopped(make_prior: Callable[..., Path]) -> Path:
    """A prior that ends after a step; made before loads are counted."""
    return make_prior("--stop_after", "3")


def test_what_is_no_whole_prior_is_refused(stopped, older_prior, prior_copy, prune, refused) -> None:
    refused(lambda: prune(older_prior), "only whole priors")
    refused(lambda: prune(stopped), "only whole priors")
    refused(lambda: prune(prior_copy, "--num_steps", 11), "only 10 steps")
    refused(lambda: prune(prior_copy, "--steps", 10), "steps 0 to 9")


@pytest.mark.parametrize("kept", [[], [3, 2], [10], [-1], "all"])
def test_forged_kept_steps_are_refused(prior_copy: Path, prune, refused, kept) -> None:
    edit_metadata(prior_copy, kept_steps=kept, prompt=PROMPT)
    refused(lambda: prune(prior_copy), "kept_steps")
