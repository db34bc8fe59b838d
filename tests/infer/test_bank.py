"""Several priors as one, of which the nearest is followed, and as many steps as the first one calls for."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers import OTHER_PROMPT, PROMPT, Outcome, read_json

import step_skip
from step_skip.errors import InputError
from step_skip.method.closeness import MOST_CLOSENESS, FirstLook, predicted_closeness

PROMPTS = (PROMPT, OTHER_PROMPT, "The portrait rises.")
BETWEEN = "The portrait nods."


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def bank(request: pytest.FixtureRequest, tmp_path_factory, model_dir: Path, image: Path) -> list[Path]:
    """Three priors of one image, made by one command."""
    import generate_prior

    flags = ["--model", "tiny", "--model_dir", model_dir, "--image", image, "--prompt", *PROMPTS]
    folder = tmp_path_factory.mktemp("bank")
    generate_prior.main([*map(str, flags), "--dtype", request.param, "--output_dir", str(folder)])
    return sorted(folder.iterdir())


@pytest.fixture
def ask(run: Callable[..., Outcome], model_dir: Path, tmp_path: Path) -> Callable[..., Outcome]:
    """infer_from_prior.py --nearest, with the small model."""

    def ask(priors: list[Path], *argv: object) -> Outcome:
        output = () if "--output_dir" in argv else ("--output", tmp_path / "clip.mp4", "--overwrite")
        common = ("--prior_dir", *priors, "--model_dir", model_dir, *output)
        return run("infer_from_prior", *common, *argv)

    return ask


def latents_of(prior: Path) -> str:
    return read_json(prior / "run_metadata.json")["latents_sha256"]


def test_one_image_and_several_prompts_make_a_prior_of_each(bank: list[Path]) -> None:
    assert [read_json(prior / "run_metadata.json")["prompt"] for prior in bank] == list(PROMPTS)
    assert len({(prior / "initial_latents.pt").read_bytes() for prior in bank}) == 1
    assert len(set(map(latents_of, bank))) == len(bank)


@pytest.mark.parametrize("method", [[], ["--num_steps", 1], ["--steps", 0, 5], ["--num_steps", "auto"]])
def test_a_priors_own_prompt_finds_it_and_gives_its_latents(bank, ask, method) -> None:
    for prior in bank:
        prompt = read_json(prior / "run_metadata.json")["prompt"]
        report = ask(bank, "--nearest", "--prompt", prompt, *method).report
        assert report["prior_dir"] == str(prior)
        assert report["latents_sha256"] == latents_of(prior)
        assert report["apart"] == 0 and report["predicted_closeness"] == MOST_CLOSENESS
        if method == ["--num_steps", "auto"]:
            assert report["forwards"] == 1


def test_another_prompt_follows_the_nearest_as_if_it_had_been_given_alone(bank, ask) -> None:
    alone = [ask([prior], "--prompt", BETWEEN).report for prior in bank]
    together = ask(bank, "--nearest", "--prompt", BETWEEN).report
    nearest = min(alone, key=lambda report: report["apart"])
    assert len({report["apart"] for report in alone}) == len(bank)
    for name in ("prior_dir", "latents_sha256", "apart", "forwards", "steps_run", "predicted_closeness"):
        assert together[name] == nearest[name]
    assert together["nearest_of"] == [prior.name.removeprefix("run_") for prior in bank]


def test_as_many_steps_run_as_the_first_one_says(bank, ask) -> None:
    numbered = {n: ask(bank[:1], "--prompt", BETWEEN, "--num_steps", n).report for n in (1, 2, 3, 4, 6)}
    predicted = [report["predicted_closeness"] for report in numbered.values()]
    assert predicted == sorted(predicted)
    for number, closeness in ((1, 1), (3, numbered[3]["predicted_closeness"]), (6, 1000)):
        flags = ("--num_steps", "auto", "--closeness", closeness)
        report = ask(bank[:1], "--prompt", BETWEEN, *flags).report
        for name in ("latents_sha256", "forwards", "steps_run", "predicted_closeness"):
            assert report[name] == numbered[number][name]


def test_a_sweep_over_banks_goes_on_where_it_stopped(bank, ask, loads, tmp_path: Path) -> None:
    flags = ("--nearest", "--prompt", PROMPT, BETWEEN, "--num_steps", "auto", "--output_dir", tmp_path / "s")
    first = ask(bank, *flags)
    made = {path: path.stat().st_mtime_ns for path in first.path.glob("*.mp4")}
    assert len(made) == 2 and len(loads) == 1
    again = ask(bank, *flags)
    assert {path: path.stat().st_mtime_ns for path in again.path.glob("*.mp4")} == made and len(loads) == 1
    planned = ask(bank, *flags, "--dry_run")
    assert planned.code == 0 and planned.out.count('"made": true') == 2


def test_priors_that_begin_differently_go_their_own_way(bank, ask, generate, image, tmp_path: Path) -> None:
    dtype = read_json(bank[0] / "run_metadata.json")["dtype"]
    other = generate("--image", image, "--prompt", PROMPT, "--seed", 1, "--dtype", dtype).path
    outcome = ask([*bank, other], "--nearest", "--prompt", BETWEEN, "--output_dir", tmp_path / "s")
    reports = [read_json(path) for path in outcome.path.glob("*.json")]
    assert len(reports) == 2 and "2 identities or settings" in outcome.err
    assert sorted("nearest_of" in report for report in reports) == [False, True]


def test_from_python_a_list_of_priors_is_one_thing(bank, generate, image, model_dir: Path) -> None:
    dtype = read_json(bank[0] / "run_metadata.json")["dtype"]
    model = step_skip.load("tiny", model_dir=model_dir, device="cpu", dtype=dtype)
    clip = step_skip.infer_from_prior(model, bank, OTHER_PROMPT, num_steps="auto", progress=False)
    assert clip.report["prior_dir"] == str(bank[1]) and clip.report["latents_sha256"] == latents_of(bank[1])
    other = generate("--image", image, "--prompt", PROMPT, "--seed", 1, "--dtype", dtype).path
    with pytest.raises(InputError, match=r"differ in initial_latents\.pt"):
        step_skip.infer_from_prior(model, [*bank, other], BETWEEN)
    with pytest.raises(InputError, match="no prior"):
        step_skip.infer_from_prior(model, [], BETWEEN)


def test_what_can_not_be_compared_is_refused(bank, ask, refused, older_prior, tmp_path: Path) -> None:
    nearest = ("--nearest", "--prompt", BETWEEN)
    refused(lambda: ask(bank, *nearest, "--start_step", 6), "first step", "--start_step")
    refused(lambda: ask(bank, *nearest, "--steps", 3, 6), "begin with 0")
    refused(lambda: ask([older_prior, *bank], *nearest), "older format")
    refused(lambda: ask(bank[:1], "--closeness", "good"), "--num_steps auto")
    refused(lambda: ask(bank[:1], "--num_steps", "auto", "--closeness", "fine"), "'fine' is not a number")
    refused(lambda: ask(bank[:1], "--num_steps", "auto", "--cfg_scale", 5, 1), "one --cfg_scale")
    refused(lambda: ask(bank[:1], "--num_steps", "auto", "--skip_cache", 2), "--skip_cache")


def test_a_damaged_one_of_a_bank_is_named(bank, ask, refused, tmp_path: Path) -> None:
    copies = [shutil.copytree(prior, tmp_path / prior.name) for prior in bank]
    (copies[2] / "noise_pred_0000.pt").write_bytes(b"other")
    refused(lambda: ask(copies, "--nearest", "--prompt", BETWEEN), copies[2].name, "damaged")


def test_more_change_or_guidance_is_predicted_to_come_less_near_and_more_steps_nearer() -> None:
    for apart, cfg_scale in itertools.product((0.2, 0.5, 1.0), (2, 5)):
        numbers = (1, 2, 3, 4, 6, 12)
        found, further, stronger = (
            [predicted_closeness(times * apart, n, cfg_scale=scale) for n in numbers]
            for times, scale in ((1, cfg_scale), (2, cfg_scale), (1, 2 * cfg_scale))
        )
        assert found == sorted(found)
        for less in (further, stronger):
            assert all(a > b for a, b in zip(found, less, strict=True) if a < MOST_CLOSENESS)


def test_nothing_is_told_before_the_first_velocity_is_known() -> None:
    look = FirstLook([{}])
    assert look.describe() == {} and look.nearest == 0
