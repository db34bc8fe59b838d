"""Skip-Cache, guidance by step and TeaCache: which blocks run, and that nothing else changes."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch
from helpers import read_json

from step_skip.errors import InputError, RunError
from step_skip.files.tensors import sha256_tensor
from step_skip.method.closeness import FirstLook
from step_skip.method.differential import Trajectory
from step_skip.method.skip_cache import Branch, Middle
from step_skip.models.loading import load_pipeline
from step_skip.models.weights import LoadOptions, weight_files
from step_skip.pipeline.cheaper import skip_cache
from step_skip.pipeline.conditioning import Conditioning
from step_skip.pipeline.run import run_differential, run_from, run_scheduler
from step_skip.pipeline.schedulers import SigmasScheduler, compute_schedule
from step_skip.pipeline.settings import RunSettings
from step_skip.prior.prior import context_file

BLOCKS = 4  # of the tests' DiT
GUIDED = 2  # forwards a step


@pytest.fixture(scope="module")
def pipe(model_dir):
    options = LoadOptions("tiny", "cpu", "float32", model_dir=model_dir)
    return load_pipeline(options, weight_files(options, ["dit", "vae"]))


@pytest.fixture(scope="module")
def settings(prior) -> RunSettings:
    metadata = read_json(prior / "run_metadata.json")
    names = RunSettings.__dataclass_fields__
    return RunSettings(**{name: metadata[name] for name in names if name in metadata})


@pytest.fixture(scope="module")
def load(prior):
    return lambda name: torch.load(prior / name, weights_only=True)


@pytest.fixture(scope="module")
def conditioning(prior, load) -> Conditioning:
    texts = [read_json(prior / "run_metadata.json")[name] for name in ("prompt", "negative_prompt")]
    posi, nega = (load(context_file(text)) for text in texts)
    return Conditioning(
        identity={name: load(f"{name}.pt") for name in ("y", "clip_feature")},
        context_posi=posi,
        context_nega=nega,
    )


@pytest.fixture
def run(pipe, load, conditioning, settings):
    """Run the steps after start_step of the prior, with some settings changed."""

    def run(start_step: int = -1, on_step=None, **changes):
        name = "initial_latents.pt" if start_step < 0 else f"step_{start_step:04d}.pt"
        return run_from(
            pipe,
            replace(settings, **changes),
            start_step=start_step,
            latents=load(name),
            conditioning=conditioning,
            on_step=on_step,
        )

    return run


def evaluated(full_steps: int, cached_steps: int) -> int:
    return GUIDED * (full_steps * BLOCKS + cached_steps * 2)


def test_unset_nothing_changes_and_every_block_is_counted(prior, run):
    result = run()
    assert sha256_tensor(result.latents) == read_json(prior / "run_metadata.json")["latents_sha256"]
    assert (result.forwards, result.block_evaluations) == (20, evaluated(10, 0))


@pytest.mark.parametrize(("every", "full_steps"), [(2, 5), (3, 4), (4, 3), (10, 1)])
def test_every_nth_step_of_a_full_run_is_a_full_one(run, every, full_steps):
    result = run(skip_cache=every)
    assert result.forwards == 20
    assert result.block_evaluations == evaluated(full_steps, 10 - full_steps)


@pytest.mark.parametrize("start_step", [5, 6, 8])
def test_the_first_step_of_a_resumed_run_is_a_full_one(run, start_step):
    left = 9 - start_step
    result = run(start_step, skip_cache=2)
    assert result.block_evaluations == evaluated((left + 1) // 2, left // 2)
    first = run(start_step, skip_cache=left + 1)
    assert first.block_evaluations == evaluated(1, left - 1)


def test_a_single_step_is_the_plain_one(run):
    assert torch.equal(run(8, skip_cache=2).latents, run(8).latents)
    assert not torch.equal(run(7, skip_cache=2).latents, run(7).latents)


def test_a_run_resumed_where_a_full_step_is_due_goes_on_as_the_run_did(run):
    steps = []
    full = run(skip_cache=2, on_step=steps.append)
    for start_step in (1, 3, 5, 7):
        resumed = run_again(run, start_step, steps[start_step].latents)
        assert torch.equal(resumed.latents, full.latents)
    assert not torch.equal(run_again(run, 4, steps[4].latents).latents, full.latents)


def run_again(run, start_step, latents):
    with patch.object(torch, "load", lambda *_, **__: latents):
        return run(start_step, skip_cache=2)


def test_without_guidance_one_branch_runs(run):
    result = run(cfg_scale=1.0, skip_cache=2)
    assert (result.forwards, result.block_evaluations) == (10, evaluated(5, 5) // GUIDED)


def test_a_differential_resume_counts_the_steps_it_runs(pipe, settings, load, conditioning):
    steps = (0, 5, 8)
    latents = [load(name) for name in ("initial_latents.pt", "step_0004.pt", "step_0007.pt", "step_0009.pt")]
    trajectory = Trajectory(steps, latents, [load(f"noise_pred_{step:04d}.pt") for step in steps])
    cached = replace(settings, skip_cache=2)
    result = run_differential(pipe, cached, paths=FirstLook([{3: trajectory}]), conditioning=conditioning)
    assert result.block_evaluations == evaluated(2, 1)


def test_both_branches_keep_their_own_and_a_step_without_one_does_not_age_it():
    """Blocks that add what they are told; a middle that reuses gives what its branch added before."""

    class Add(torch.nn.Module):
        amount = 0.0

        def forward(self, x):
            return x + self.amount

    block = Add()
    middle = Middle(torch.nn.ModuleList([block]), every=2)

    def at(step, branch, amount):
        middle.step, middle.positive, block.amount = step, branch, amount
        return float(middle(torch.tensor(100.0)))

    assert [at(0, True, 1), at(0, False, 2)] == [101, 102]
    assert [at(1, True, 5), at(1, False, 5)] == [101, 102]
    assert at(2, True, 3) == 103  # the negative branch is left out here
    assert [at(3, True, 5), at(3, False, 7)] == [103, 107]


def test_a_branch_corrects_what_is_used_again_by_steps_apart():
    weight, bias = torch.zeros(2, 1, 2), torch.tensor([[10.0], [20.0]])
    weight[0, 0, 0], weight[1, 0, 1] = 0.5, 2.0  # one apart: half of x; two: twice what was added
    branch = Branch(weight, bias)
    x, added = torch.tensor([[[4.0]]]), torch.tensor([[[3.0]]])
    assert [float(branch(x, added, age=age)) for age in (1, 2, 3)] == [12, 26, 26]
    middle = Middle(torch.nn.ModuleList([torch.nn.Identity()]), every=3, branch=branch)
    assert float(middle(x)) == 4
    middle.step = 1
    assert float(middle(x)) == 4 + 0 + 12


def test_the_blocks_are_put_back_also_after_an_error(pipe, run):
    blocks = pipe.dit.blocks
    run(skip_cache=2)
    assert pipe.dit.blocks is blocks

    def stop(step):
        raise RunError("stopped")

    with pytest.raises(RunError):
        run(skip_cache=2, on_step=stop)
    assert pipe.dit.blocks is blocks
    assert not any(block._forward_pre_hooks for block in blocks)


def test_a_dit_with_nothing_between_is_refused():
    dit = torch.nn.Module()
    dit.blocks = torch.nn.ModuleList([torch.nn.Identity(), torch.nn.Identity()])
    pipe = SimpleNamespace(dit=dit, dit2=None)
    with pytest.raises(InputError, match="this one has 2"), skip_cache(pipe, every=2, model_fn=print):
        pass


# --- guidance by step ---------------------------------------------------------------------------------------


def test_the_same_guidance_at_every_step_is_the_pipelines_own_to_the_bit(run, settings):
    result = run(cfg_scale=(settings.cfg_scale,) * 10)
    assert torch.equal(result.latents, run().latents)
    assert result.forwards == 20


def test_a_step_without_guidance_needs_one_forward(run):
    by_step, scales = [], (5.0, 3.0, 1.0)
    result = run(6, by_step.append, cfg_scale=scales)
    assert result.forwards == 5
    latents = {}
    for scale in scales:
        run(6, lambda step, scale=scale: latents.setdefault((scale, step.index), step), cfg_scale=scale)
    assert torch.equal(by_step[0].latents, latents[5.0, 7].latents)
    posi = run_one_step_unguided(run, by_step[1].latents)
    assert torch.equal(by_step[2].noise_pred, posi)


def run_one_step_unguided(run, latents):
    steps = []
    with patch.object(torch, "load", lambda *_, **__: latents):
        run(8, steps.append, cfg_scale=1.0)
    return steps[0].noise_pred


def test_guidance_by_step_with_skip_cache_counts_what_runs(run):
    result = run(5, cfg_scale=(5.0, 5.0, 1.0, 1.0), skip_cache=2)
    assert result.forwards == 6
    assert result.block_evaluations == 2 * BLOCKS + 2 * 2 + BLOCKS + 2


# --- TeaCache -----------------------------------------------------------------------------------------------


def tea(threshold):
    return {"tea_cache_l1_thresh": threshold, "tea_cache_model_id": "Wan2.1-I2V-14B-480P"}


@pytest.mark.parametrize(("start_step", "left"), [(-1, 10), (5, 4), (7, 2), (8, 1)])
def test_tea_cache_runs_the_first_and_the_last_step_that_run(run, start_step, left):
    """A threshold that nothing reaches leaves the forced steps, a negative one all of them."""
    result = run(start_step, **tea(1e9))
    assert result.block_evaluations == evaluated(min(left, 2), 0)
    every = run(start_step, **tea(-1e9))
    assert every.block_evaluations == evaluated(left, 0)
    torch.testing.assert_close(every.latents, run(start_step).latents, atol=1e-5, rtol=0)


def test_tea_cache_counts_the_guided_steps_of_the_negative_branch(run):
    result = run(4, cfg_scale=(5.0, 5.0, 5.0, 1.0, 1.0), **tea(1e9))
    assert result.block_evaluations == 2 * 2 * BLOCKS


# --- a schedule of its own ----------------------------------------------------------------------------------


def test_the_priors_own_sigmas_are_the_priors_own_steps(pipe, settings, load, conditioning, run):
    names = ("num_inference_steps", "denoising_strength", "sigma_shift")
    sigmas = compute_schedule(**{name: getattr(settings, name) for name in names})[1]
    latents = load("step_0004.pt")
    result = run_scheduler(
        pipe, settings, scheduler=SigmasScheduler(sigmas[5:]), latents=latents, conditioning=conditioning
    )
    assert torch.equal(result.latents, run(4).latents)
    assert result.steps == [0, 1, 2, 3, 4]
