"""Differential resume: worked by hand, on a flow whose velocity is known, and through the command line.

Latents are [B, C, T, H, W]; the prior's bend is followed position by position, so what is to be followed and
what is not lies at different H or W here, never in two channels.
"""

from __future__ import annotations

import dataclasses
import itertools
import math

import pytest
import torch
from helpers import OTHER_PROMPT, read_json

from step_skip.method.differential import (
    Evaluation,
    StepStart,
    Trajectory,
    Velocity,
    corrected_offset,
    fading_rate,
    follow,
    nearest_sum,
    share_of_residual,
)
from step_skip.pipeline.schedulers import DifferentialScheduler, ReportingScheduler, ResumableScheduler, Step

SIGMAS = (1.0, 0.978, 0.952, 0.921, 0.882, 0.833, 0.769, 0.682, 0.556, 0.357)


def run(scheduler: ReportingScheduler, velocity, latents: torch.Tensor) -> list[Step]:
    """WanVideoPipeline's loop with a network that is a function of latents and sigma."""
    steps: list[Step] = []
    scheduler.on_step = steps.append
    scheduler.set_timesteps(10, denoising_strength=1.0, shift=5.0)
    for timestep, sigma in zip(scheduler.timesteps, scheduler.sigmas, strict=True):
        latents = scheduler.step(velocity(latents, float(sigma)), timestep, latents)
    return steps


def prior_of(velocity, noise: torch.Tensor, chosen: tuple[int, ...]) -> Trajectory:
    """A full run's path at the chosen steps."""
    steps = run(ResumableScheduler(), velocity, noise)
    latents = [steps[i].latents_before for i in chosen] + [steps[-1].latents]
    return Trajectory(chosen, latents, [steps[i].noise_pred for i in chosen])


def none(*_: object, **__: object) -> float:
    """Follow nothing of the prior's residual."""
    return 0.0


def at(*values: float) -> torch.Tensor:
    """Latents of one channel and one frame with these values side by side: [1, 1, 1, 1, W]"""
    return torch.tensor(values).view(1, 1, 1, 1, -1)


@pytest.mark.parametrize("chosen", [(0,), (4,), (2, 7), (2, 5, 8), (0, 9)])
def test_constant_velocities_give_the_offset_worked_by_hand(chosen: tuple[int, ...]) -> None:
    noise, old, new = at(1.0, -2.0), at(0.5, 3.0), at(2.5, 2.0)
    trajectory = prior_of(lambda x, sigma: old, noise, chosen)
    steps = run(DifferentialScheduler(trajectory), lambda x, sigma: new, trajectory.latents[0])
    # the prior ends at noise - old; from sigma_i on the new velocity adds -sigma_i * (new - old)
    expected = (noise - old) - SIGMAS[chosen[0]] * (new - old)
    torch.testing.assert_close(steps[-1].latents, expected, atol=1e-3, rtol=0)
    assert [step.index for step in steps] == list(chosen)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_priors_own_velocity_gives_the_priors_own_latents(dtype: torch.dtype) -> None:
    noise = torch.randn(1, 4, 3, 2, 8, generator=torch.Generator().manual_seed(0)).to(dtype)

    def velocity(x: torch.Tensor, sigma: float) -> torch.Tensor:
        return torch.sin(3 * x) + sigma

    trajectory = prior_of(velocity, noise, (1, 4, 8))
    steps = run(DifferentialScheduler(trajectory), velocity, trajectory.latents[0])
    assert torch.equal(steps[-1].latents, trajectory.latents[-1])


def test_the_share_of_the_residual_worked_by_hand() -> None:
    def frames(first: tuple[float, float], second: tuple[float, float]) -> torch.Tensor:
        """One channel, two frames of two pixels."""
        return torch.tensor([first, second]).view(1, 1, 2, 1, 2)

    old, new = frames((1, 1), (1, 3)), frames((1, 1), (2, 4))
    bend = frames((0, 0), (1, 1))
    # at rest it is (1, 1): moves of (1, 3) and (0, 2), apart by (1, 1)
    share = share_of_residual(bend, (new, old), None, per_position=False)
    torch.testing.assert_close(share.flatten(), torch.tensor([1, 1 - 2 / (10 + 4 + 2)]))
    # then the new one goes back by (0, 3) where the prior goes on by (0, 1): opposite ways
    apart = new - frames((0, 0), (0, 3)), old + frames((0, 0), (0, 1))
    share = share_of_residual(0.1 * bend, apart, (new, old), per_position=False)
    assert share.flatten().tolist() == [1, 0]
    # position by position: the first one of the second frame goes back by 1, alone
    gone = apart[0] - frames((0, 0), (1, 0)), apart[1]
    share = share_of_residual(0 * bend, gone, apart, per_position=True)
    assert share.flatten().tolist() == [1, 1, 0, 1]


def test_the_schedulers_run_is_that_of_follow() -> None:
    """The method on its own, driven by hand, gives every bit of the scheduler's latents."""
    noise = torch.randn(1, 4, 3, 2, 8, generator=torch.Generator().manual_seed(0))
    prior = prior_of(lambda x, sigma: torch.sin(3 * x) + sigma, noise, (0, 4, 8))

    def velocity(x: torch.Tensor, sigma: float) -> torch.Tensor:
        return torch.cos(2 * x) - sigma

    scheduler = DifferentialScheduler(prior)
    expected = [step.latents for step in run(scheduler, velocity, noise)]
    sigmas = scheduler.schedule[1].tolist()
    clip, found = follow(prior, sigmas), []
    latents = next(clip)
    for step in prior.steps:
        latents = clip.send(Evaluation(latents, velocity(latents, sigmas[step])))
        found.append(latents)
    assert all(map(torch.equal, found, expected)) and len(found) == 3


def test_with_nothing_of_the_rest_a_first_step_is_one_from_noise() -> None:
    def velocity(x: torch.Tensor, sigma: float) -> torch.Tensor:
        return torch.cos(2 * x) - sigma

    noise, chosen = at(0.5, -1.0, 2.0), (0, 5, 8)
    prior = prior_of(lambda x, sigma: torch.sin(3 * x) + sigma, noise, chosen)
    found = run(DifferentialScheduler(prior, share_of=none), velocity, noise)[0].latents
    from_noise = run(ReportingScheduler(lambda _: chosen), velocity, noise)[0].latents
    torch.testing.assert_close(found, from_noise, atol=1e-5, rtol=0)


def test_a_velocity_that_changes_evenly_is_followed_exactly_once_the_prior_has_taught_how() -> None:
    """Both velocities are linear in sigma: from the second chosen step on the guess is the whole step."""
    noise, chosen = at(1.0, -2.0), (0, 5, 8)
    prior = prior_of(lambda x, sigma: at(0.5, 3.0) * sigma, noise, chosen)
    steps = run(
        DifferentialScheduler(prior, correct=lambda offset, *_, **__: offset),
        lambda x, sigma: at(2.5, 2.0) * sigma,
        noise,
    )
    sigmas = [SIGMAS[5], SIGMAS[8], 0.0]
    for step, (begin, end) in zip(steps[1:], itertools.pairwise(sigmas), strict=True):
        # the prior's fine steps are Euler's: their mean velocity, and the new clip's, is that of the sigmas
        fine = [s for s in (*SIGMAS, 0.0) if end <= s <= begin]
        mean = sum((a - b) * a for a, b in itertools.pairwise(fine)) / (begin - end)
        expected = step.latents_before + (end - begin) * at(2.5, 2.0) * mean
        torch.testing.assert_close(step.latents, expected, atol=2e-3, rtol=0)


def test_a_step_is_corrected_to_what_a_full_run_did_once_its_end_is_known() -> None:
    """Of both flows the clean latents drift evenly: x - sigma * v = fixed + drift * sigma."""

    def velocity(fixed: torch.Tensor, drift: torch.Tensor):
        return lambda x, sigma: (x - fixed - drift * sigma) / sigma

    noise, old = at(1.0, -2.0), velocity(at(0.5, 3.0), at(1.0, -0.5))
    new = velocity(at(2.5, 2.0), at(-2.0, 1.0))
    corrected: list[torch.Tensor] = []

    def correct(*given, **at):
        corrected.append(corrected_offset(*given, **at))
        return corrected[-1]

    steps = run(DifferentialScheduler(prior_of(old, noise, (0, 8)), correct=correct), new, noise)
    there = [run(ResumableScheduler(), each, noise)[8].latents_before for each in (new, old)]
    missed = (steps[1].latents_before - there[0]).abs()
    assert missed.min() > 0.09  # where the second step was evaluated
    torch.testing.assert_close(corrected[-1], there[0] - there[1])


def test_of_two_branches_the_positive_one_is_taken_to_be_off_as_far_as_the_offset_is() -> None:
    sigma, ahead = SIGMAS[5], SIGMAS[5] - 1
    unit, other, unseen = at(1.0, 0.0), at(0.0, 1.0), at(9.0, 9.0)
    start_old = Velocity(at(1.0, -1.0), at(0.0, 0.0), at(0.0, 0.0), 3.0)
    end_old = Velocity(unseen, unit, other, 3.0)
    mean_old = start_old.guided + at(0.5, 0.2)  # a = 0.5, b = 0.2
    moves = at(1.4, -0.6), at(0.2, 1.1)  # of the new run's branches
    true_offset = ahead * (at(1.0, 2.0) + 0.5 * (moves[0] - unit) + 0.2 * (moves[1] - other))
    start_new = dataclasses.replace(start_old, guided=start_old.guided + at(1.0, 2.0))
    start = StepStart(start_new, start_old, 0.0, mean_old, ahead)
    end_new = Velocity(unseen, moves[0] + at(0.3, -0.1) / sigma, moves[1], 3.0)
    corrected = corrected_offset(true_offset + at(0.3, -0.1), start, end_new, end_old, sigma=sigma)
    torch.testing.assert_close(corrected, true_offset, atol=1e-3, rtol=0)


@pytest.mark.parametrize(
    ("moved", "rate"),  # of the positive branch, from the prior's, whose text acts in the first position
    [
        ((0.0, 0.0), 1),  # nothing changes
        ((3.0, 0.0), 1),  # there
        ((0.0, 3.0), 0),  # elsewhere
        ((1.0, 1.0), 0.5**0.5),  # half there
        ((4.0, 4.0), 1),  # and larger by so much that it fades as fast
        ((3.0, 4.0), 9 / (81 + 256) ** 0.5 * 5 / 4),
    ],
)
def test_guidance_fades_as_far_as_a_change_is_where_the_priors_text_acted(moved, rate) -> None:
    """One step, no rest followed: the change is that of posi + (cfg_scale - 1) * fade * (posi - nega)."""

    noise, nega, text, cfg_scale, decay = at(1.0, -2.0), at(0.5, 1.0), at(4.0, 0.0), 3.0, 0.25
    prior = prior_of(lambda x, sigma: nega + cfg_scale * text, noise, (0,))
    prior = dataclasses.replace(prior, noise_pred_nega=[nega], cfg_scale=cfg_scale, guidance_decay=[decay])
    rates: list[float] = []

    def rate_of(new: Velocity, old: Velocity) -> float:
        rates.append(fading_rate(new, old))
        return rates[-1]

    scheduler = DifferentialScheduler(prior, cfg_scale, share_of=none, rate_of=rate_of)
    scheduler.noise_pred_nega = lambda: nega
    [step] = run(scheduler, lambda x, sigma: nega + cfg_scale * (text + at(*moved)), noise)
    assert rates == [pytest.approx(rate)]
    faded = nega + text + (cfg_scale - 1) * decay * text  # the prior's, where nothing of its rest is followed
    expected = noise - faded - (1 + (cfg_scale - 1) * decay**rate) * at(*moved)
    torch.testing.assert_close(step.latents, expected)


def test_the_nearest_sum_of_parts_is_the_least_squares_one() -> None:
    parts = torch.randn(2, 1, 1, 1, 1, 50, generator=torch.Generator().manual_seed(0))
    target = 0.5 * parts[0] - 2 * parts[1]
    assert nearest_sum(list(parts), target) == pytest.approx([0.5, -2], abs=1e-4)
    assert sum(nearest_sum([parts[0], parts[0]], parts[0])) == pytest.approx(1)  # alike: it can't tell
    assert nearest_sum([torch.zeros(2), torch.zeros(2)], torch.ones(2)) == [0, 0]


def mixture_velocity(centres: torch.Tensor, width: float, x: torch.Tensor, sigma: float) -> torch.Tensor:
    """Velocity of the flow from N(0, 1) to an even mixture of N(centre, width^2), one coordinate.

    x_sigma = (1 - sigma) x_0 + sigma eps, and v = E[eps - x_0 | x_sigma] is a posterior mean of Gaussians.
    """
    spread = ((1 - sigma) * width) ** 2 + sigma**2
    away = x[:, None] - (1 - sigma) * centres
    weight = torch.softmax(-away.square() / (2 * spread), dim=1)
    clean = centres + (1 - sigma) * width**2 / spread * away
    noise = sigma / spread * away
    return (weight * (noise - clean)).sum(1)


DETAIL = torch.linspace(-1.5, 1.5, 9)  # nine sharp modes, 0.375 apart, the same for every prompt


def world_velocity(motions: tuple[float, ...]):
    """Two pixels: a detail that no prompt touches, and a motion that is one of `motions`."""

    def velocity(x: torch.Tensor, sigma: float) -> torch.Tensor:
        detail = mixture_velocity(DETAIL, 0.03, x[..., 0].flatten(), sigma)
        motion = mixture_velocity(torch.tensor(motions), 0.1, x[..., 1].flatten(), sigma)
        return torch.stack([detail, motion], 1).view_as(x)

    return velocity


def test_detail_is_the_priors_and_motion_the_prompts() -> None:
    noise = torch.randn(2000, 1, 1, 1, 2, generator=torch.Generator().manual_seed(0))
    neutral, asked = world_velocity((-1.0, 1.0)), world_velocity((1.0,))
    prior = prior_of(neutral, noise, (2, 6, 9))
    found = run(DifferentialScheduler(prior), asked, prior.latents[0])[-1].latents
    assert (found[..., 1] > 0).float().mean() > 0.99
    assert (prior.latents[-1][..., 1] > 0).float().mean() < 0.6  # the prior itself had not settled on it

    full = run(ResumableScheduler(), asked, noise)[-1].latents
    few = run(ReportingScheduler(lambda _: (2, 6, 9)), asked, noise)[-1].latents
    kept, missed = (math.sqrt((each - full)[..., 0].square().mean()) for each in (found, few))
    assert kept < 0.02 < 0.1 < missed  # the same steps from noise miss the detail


def test_following_the_bend_where_both_move_alike_is_nearer_than_following_it_everywhere() -> None:
    noise = torch.randn(2000, 1, 1, 1, 2, generator=torch.Generator().manual_seed(0))
    asked = world_velocity((1.0,))
    prior = prior_of(world_velocity((-1.0, 1.0)), noise, (0, 5, 8))
    full = run(ResumableScheduler(), asked, noise)[-1].latents
    found, whole = (
        run(DifferentialScheduler(prior, **parts), asked, noise)[-1].latents
        for parts in ({}, {"share_of": lambda *_, **__: 1.0})
    )
    errors = [(each - full)[..., 1].square().mean().sqrt() for each in (found, whole)]
    assert errors[0] < 0.8 * errors[1]


@pytest.mark.parametrize("flags", [("--steps", 2, 5, 8), ("--num_steps", 2), ("--steps", 0, 9)])
def test_the_priors_own_prompt_gives_the_priors_own_video(infer, prior_copy, flags) -> None:
    expected = read_json(prior_copy / "run_metadata.json")["latents_sha256"]
    assert infer(prior_copy, *flags).report["latents_sha256"] == expected
    assert infer(prior_copy, *flags, "--prompt", OTHER_PROMPT).report["latents_sha256"] != expected


def test_it_runs_only_the_steps_that_were_chosen(infer, prior_copy, loads) -> None:
    report = infer(prior_copy, "--steps", "2", "5", "8", "--prompt", OTHER_PROMPT).report
    assert (report["method"], report["steps_run"], report["forwards"]) == ("differential", [2, 5, 8], 5)
    assert loads == [["dit", "text_encoder", "vae"]]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--steps", "5", "2"), "increasing steps between 0 and 9"),
        (("--steps", "2", "10"), "increasing steps between 0 and 9"),
        (("--num_steps", "11"), "only 10 steps"),
        (("--steps", "2", "--start_step", "6"), "not allowed with argument"),
    ],
)
def test_steps_that_make_no_sense_are_refused(refused, infer, prior, flags, words) -> None:
    refused(lambda: infer(prior, *flags), words)


def test_a_damaged_velocity_is_refused_only_where_it_is_needed(refused, infer, prior_copy) -> None:
    path = prior_copy / "noise_pred_0005.pt"
    path.write_bytes(path.read_bytes()[:-1])
    assert "noise_pred_0005.pt is damaged" in refused(lambda: infer(prior_copy, "--steps", "2", "5", "8"))
    assert infer(prior_copy, "--steps", "2", "8").code == 0


def test_it_is_the_default(run, model_dir, prior_copy) -> None:
    command = ("--prior_dir", prior_copy, "--model_dir", model_dir, "--prompt", OTHER_PROMPT)
    report = run("infer_from_prior", *command).report
    assert (report["method"], report["steps_run"]) == ("differential", [0, 6, 9])


@pytest.mark.parametrize(
    ("flags", "warned"),
    [
        (("--start_step", 6, "--prompt", OTHER_PROMPT), True),
        (("--start_step", 6), False),
        (("--start_step", 3, "--prompt", OTHER_PROMPT), False),
        (("--steps", 4, 8, "--prompt", OTHER_PROMPT), False),
    ],
)
def test_a_prompt_that_comes_too_late_is_warned_of(infer, prior_copy, flags, warned) -> None:
    assert ("late for a new motion" in infer(prior_copy, *flags).err) == warned


def test_a_prior_says_whether_it_was_made_with_a_prompt(generate, image, prior) -> None:
    assert read_json(prior / "run_metadata.json")["prior_kind"] == "prompted"
    neutral = generate("--image", image, "--num_inference_steps", 1).path
    assert read_json(neutral / "run_metadata.json")["prior_kind"] == "neutral"


def test_the_start_step_a_prior_was_made_with_is_where_it_is_resumed(make_prior, run, model_dir, tmp_path):
    """Unless told otherwise; a prior made without it is run differentially."""
    chosen = make_prior("--start_step", "3")

    def steps_run(prior, *flags):
        path = tmp_path / f"{len(list(tmp_path.iterdir()))}.mp4"
        common = ("--prior_dir", prior, "--model_dir", model_dir, "--output", path)
        return run("infer_from_prior", *common, *flags).report["steps_run"]

    assert steps_run(chosen) == [4, 5, 6, 7, 8, 9]
    assert steps_run(chosen, "--num_steps", 2) == [0, 8]
    assert steps_run(make_prior()) == [0, 6, 9]


@pytest.mark.parametrize(
    ("flags", "words"), [((), "23% (20% if its prior holds still)"), (("--prompt", ""), "69%")]
)
def test_the_warning_of_a_late_step_tells_what_was_measured(make_prior, infer, tmp_path, flags, words):
    outcome = infer(make_prior(*flags), "--prompt", "Else.", "--output", tmp_path / "video.mp4")
    assert f"after 6 of 10, {words} of the embedded model's clips obeyed" in outcome.err


def test_the_commands_printed_do_what_they_are_said_to_do(generate, image):
    """A prior made with --start_step is resumed there without a flag, any other is run differentially."""
    flags = ("--image", image, "--num_inference_steps", 10)
    plain, chosen = generate(*flags).err, generate(*flags, "--start_step", 4).err
    assert '--prompt "..."\nOr resumed after step 6' in plain and '--prompt "..." --start_step 6' in plain
    assert '--prompt "..." --num_steps 3\nOr resumed after step 4' in chosen
    assert '--prompt "..." --start_step 4' in chosen
