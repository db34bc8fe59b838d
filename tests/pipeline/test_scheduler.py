"""The schedule against numbers worked by hand, and resuming on flows whose trajectory is known."""

from __future__ import annotations

import pytest
import torch
from helpers import metadata_with, read_json

from step_skip.errors import InputError
from step_skip.method.steps import (
    locate_sigma,
    recommended_num_steps,
    recommended_start_step,
    spread_steps,
    tail_sigmas,
)
from step_skip.models.families import latents_shape, round_sizes
from step_skip.pipeline.schedulers import (
    ResumableScheduler,
    SigmasScheduler,
    Step,
    compute_schedule,
)
from step_skip.pipeline.settings import check_distinct
from step_skip.prior.checks import check_schedule
from step_skip.prior.prior import Prior

# sigma = 5 s / (1 + 4 s) for s = 1, .9, ... .1
SIGMAS = (1.0, 0.978, 0.952, 0.921, 0.882, 0.833, 0.769, 0.682, 0.556, 0.357)


def schedule(steps=10, strength=1.0, shift=5.0):
    return compute_schedule(num_inference_steps=steps, denoising_strength=strength, sigma_shift=shift)


def trajectory(velocity, latents, *, start_step: int = -1, steps: int = 10) -> list[Step]:
    """The pipeline's loop around our scheduler, with `velocity(latents, sigma)` as the network."""
    scheduler, taken = ResumableScheduler(start_step=start_step), []
    scheduler.on_step = taken.append
    scheduler.set_timesteps(steps, denoising_strength=1.0, shift=5.0)
    for timestep in scheduler.timesteps:
        latents = scheduler.step(velocity(latents, float(timestep) / 1000), timestep, latents)
    return taken


def test_sigmas_are_the_hand_computed_ones(prior):
    timesteps, sigmas = schedule()
    assert sigmas == pytest.approx(SIGMAS, abs=5e-4)
    assert timesteps == pytest.approx([1000 * sigma for sigma in SIGMAS], abs=0.5)
    metadata = read_json(prior / "run_metadata.json")
    assert metadata["scheduler_sigmas"] == sigmas
    assert metadata["scheduler_timesteps"] == timesteps


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"steps": 4, "shift": 1.0}, (1.0, 0.75, 0.5, 0.25)),
        ({"steps": 2, "shift": 3.0}, (1.0, 0.75)),
        ({"steps": 2, "strength": 0.6, "shift": 1.0}, (0.6, 0.3)),
        ({"steps": 3, "strength": 0.6, "shift": 5.0}, (3 / 3.4, 2 / 2.6, 1 / 1.8)),
        ({"steps": 1}, (1.0,)),
    ],
)
def test_other_schedules(settings, expected):
    assert schedule(**settings)[1] == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("start_step", [-1, 0, 6, 9])
def test_constant_velocity_ends_one_velocity_away(start_step):
    """dx/dsigma = v: from sigma to 0 the latents move by -sigma v, in however many steps."""
    latents, velocity = torch.tensor([2.0, -1.0]), torch.tensor([0.5, 3.0])
    sigma = [*SIGMAS, 0.0][start_step + 1]
    taken = trajectory(lambda x, s: velocity, latents, start_step=start_step)
    end = taken[-1].latents if taken else latents
    torch.testing.assert_close(end, latents - sigma * velocity, atol=1e-3, rtol=0)
    assert [step.index for step in taken] == list(range(start_step + 1, 10))


def test_every_step_reports_its_sigma_and_what_it_points_at():
    """On a straight path every denoised estimate is the end already."""
    noise, clean = torch.tensor([1.0, 4.0]), torch.tensor([-2.0, 0.5])
    taken = trajectory(lambda x, s: noise - clean, noise)
    assert [step.sigma for step in taken] == pytest.approx(SIGMAS, abs=5e-4)
    for step, after in zip(taken, [*SIGMAS[1:], 0.0], strict=True):
        torch.testing.assert_close(step.denoised, clean, atol=1e-5, rtol=0)
        torch.testing.assert_close(step.latents, clean + after * (noise - clean), atol=2e-3, rtol=0)


def test_a_linear_field_gives_the_product_of_its_factors():
    """dx/dsigma = x: each Euler step multiplies by 1 + (sigma_next - sigma)."""
    expected = torch.tensor(1.0, dtype=torch.float64)
    sigmas = [5 * s / (1 + 4 * s) for s in (1, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1)] + [0.0]
    for now, after in zip(sigmas, sigmas[1:], strict=False):
        expected = expected * (1 + after - now)
    end = trajectory(lambda x, s: x, torch.tensor([1.0], dtype=torch.float64))[-1].latents
    assert float(end) == pytest.approx(float(expected), rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("steps", [1, 3, 10, 25, 1000])
def test_resuming_takes_the_same_steps_to_the_bit(dtype, steps):
    noise = torch.randn(64, generator=torch.Generator().manual_seed(0)).to(dtype)

    def velocity(x: torch.Tensor, sigma: float) -> torch.Tensor:
        return torch.sin(3 * x) + sigma

    full = trajectory(velocity, noise, steps=steps)
    for start in {0, steps // 2, max(0, steps - 2)} - {steps - 1}:
        resumed = trajectory(velocity, full[start].latents, start_step=start, steps=steps)
        assert [step.index for step in resumed] == list(range(start + 1, steps))
        assert torch.equal(resumed[-1].latents, full[-1].latents)
        assert resumed[-1].latents.dtype == dtype


def test_a_schedule_that_differs_in_one_entry_is_refused(tmp_path):
    timesteps, sigmas = schedule()
    recorded = {"scheduler_timesteps": timesteps, "scheduler_sigmas": sigmas}
    prior = Prior(tmp_path, metadata_with(sigmas=sigmas, scheduler_timesteps=timesteps))
    check_schedule(prior, timesteps=timesteps, sigmas=sigmas)
    for key, values in recorded.items():
        for step in range(10):
            altered = list(values)
            altered[step] *= 1.00001
            other = Prior(tmp_path, prior.metadata.model_copy(update={key: altered}))
            with pytest.raises(InputError, match=rf"{key}\[{step}\]"):
                check_schedule(other, timesteps=timesteps, sigmas=sigmas)
    with pytest.raises(InputError, match="10 entries, the installed scheduler 9"):
        check_schedule(prior, timesteps=timesteps[:9], sigmas=sigmas)


def test_a_schedule_that_repeats_itself_is_refused():
    check_distinct(schedule(10_000)[0])
    with pytest.raises(InputError, match="steps 1 and 2 .* timestep 500"):
        check_distinct([1000.0, 500.0, 500.0, 0.0])


def test_recommended_step_is_6_of_10_and_always_exists():
    assert [recommended_start_step(n) for n in (1, 2, 3, 10, 25, 50)] == [0, 1, 1, 6, 15, 30]
    assert all(0 <= recommended_start_step(n) < n for n in range(1, 200))


def test_a_differential_resume_runs_as_many_steps_as_asked_denser_to_the_end():
    found = [spread_steps(10, n) for n in (1, 2, 3, 4, 6)]
    assert found == [[0], [0, 8], [0, 6, 9], [0, 4, 7, 9], [0, 3, 5, 7, 8, 9]]
    assert [spread_steps(25, 3), spread_steps(4, 2)] == [[0, 14, 22], [0, 3]]
    for total in (1, 2, 3, 4, 10, 50, 200):
        for number in range(1, total + 1):
            steps = spread_steps(total, number)
            assert steps[0] >= 0 and steps[-1] < total and len(steps) == number
            assert steps == sorted(set(steps))
    assert [recommended_num_steps(n) for n in (1, 2, 4, 10, 14, 25)] == [1, 1, 2, 3, 4, 4]


def test_shapes_and_rounded_sizes():
    assert latents_shape(height=480, width=832, num_frames=81) == (1, 16, 21, 60, 104)
    assert round_sizes(height=480, width=832, num_frames=81) == {
        "height": 480,
        "width": 832,
        "num_frames": 81,
    }
    assert round_sizes(height=481, width=1, num_frames=82) == {"height": 496, "width": 16, "num_frames": 85}


def test_sizes_are_rounded_as_the_pipeline_does():
    import contextlib
    import io

    from diffsynth.pipelines.wan_video import WanVideoPipeline

    pipe = WanVideoPipeline(device="cpu")
    for height, width, num_frames in [(1, 17, 1), (480, 832, 81), (479, 833, 2), (32, 31, 6), (100, 200, 84)]:
        with contextlib.redirect_stdout(io.StringIO()):
            rounded = pipe.check_resize_height_width(height, width, num_frames)
        ours = round_sizes(height=height, width=width, num_frames=num_frames)
        assert tuple(ours.values()) == tuple(rounded)


@pytest.mark.parametrize("start", [0, 3, 9])
def test_a_tail_of_as_many_steps_as_are_left_is_the_schedules_own(start):
    sigmas = schedule()[1]
    assert tail_sigmas(sigmas[start], 10 - start, sigma_shift=5.0) == pytest.approx(sigmas[start:], rel=1e-5)


def test_a_tail_in_other_steps_is_the_schedule_of_that_many():
    assert tail_sigmas(1.0, 4, sigma_shift=5.0) == pytest.approx(schedule(4)[1])
    assert tail_sigmas(0.6, 3, sigma_shift=1.0) == pytest.approx([0.6, 0.4, 0.2])
    assert tail_sigmas(0.5, 1, sigma_shift=3.0) == [0.5]


def test_the_place_of_a_sigma_on_a_runs_path():
    sigmas = [1.0, 0.8, 0.4]
    assert [locate_sigma(sigma, sigmas)[0] for sigma in (1.0, 0.9, 0.8, 0.5, 0.4, 0.1)] == [0, 0, 1, 1, 2, 2]
    parts = [locate_sigma(sigma, sigmas)[1] for sigma in (1.0, 0.9, 0.8, 0.5, 0.4, 0.1)]
    assert parts == pytest.approx([0, 0.5, 0, 0.75, 0, 0.75])
    assert locate_sigma(0.8 * (1 + 1e-7), sigmas) == locate_sigma(0.8 * (1 - 1e-7), sigmas) == (1, 0.0)
    for sigma in (1.01, 0.0, -1.0):
        with pytest.raises(ValueError, match="between 0 and 1"):
            locate_sigma(sigma, sigmas)


def test_sigmas_of_ones_own_are_run_as_they_are():
    """On a straight path any sigmas end at its end."""
    noise, clean = torch.tensor([1.0, 4.0]), torch.tensor([-2.0, 0.5])
    scheduler, taken = SigmasScheduler([0.9, 0.3, 0.1]), []
    scheduler.on_step = taken.append
    scheduler.set_timesteps(10, denoising_strength=1.0, shift=5.0)
    latents = 0.1 * clean + 0.9 * noise
    for timestep in scheduler.timesteps:
        latents = scheduler.step(noise - clean, timestep, latents)
    assert [step.sigma for step in taken] == pytest.approx([0.9, 0.3, 0.1])
    assert scheduler.timesteps.tolist() == pytest.approx([900, 300, 100])
    torch.testing.assert_close(latents, clean)
