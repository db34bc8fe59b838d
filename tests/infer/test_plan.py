"""A plan is data for one video: made from flags and prior alone, run on a pipeline loaded once."""

from __future__ import annotations

import copy

import pytest
from helpers import OTHER_PROMPT, PROMPT, read_json

import infer_from_prior
from step_skip.cli.prompts import read_choices
from step_skip.files.tensors import sha256_tensor
from step_skip.infer.clip import make_clip
from step_skip.infer.inputs import know_contexts, load_inputs
from step_skip.models.loading import load_components
from step_skip.models.weights import LoadOptions
from step_skip.prior.contexts import ContextStore
from step_skip.prior.metadata import read_prior
from step_skip.sweep.clips import Group, Job, make_plans


def plan_of(prior, *flags):
    args = infer_from_prior.parse_args(["--prior_dir", str(prior), *map(str, flags)])
    before = copy.deepcopy(vars(args))
    (plan,) = make_plans(read_prior(prior), read_choices(args)).values()
    assert vars(args) == before
    return plan


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ((), ("differential", None, [0, 6, 9], PROMPT, 5.0)),
        (("--start_step", 9, "--cfg_scale", 1), ("resume", 9, [], PROMPT, 1.0)),
        (("--steps", 0, 9, "--prompt", OTHER_PROMPT), ("differential", None, [0, 9], OTHER_PROMPT, 5.0)),
        (("--num_steps", 2, "--prompt", ""), ("differential", None, [0, 8], "", 5.0)),
    ],
)
def test_a_plan_is_what_the_flags_say_and_else_the_prior(prior, model_dir, flags, expected):
    plan = plan_of(prior, "--model_dir", model_dir, *flags)
    assert (plan.method, plan.start_step, plan.steps_to_run, plan.prompt, plan.cfg_scale) == expected
    assert (plan.model, plan.dtype, plan.fps, plan.negative_prompt) == ("tiny", "float32", 8, "Still.")


def test_one_loaded_pipeline_makes_several_videos(prior, model_dir, tmp_path):
    options = LoadOptions("tiny", "cpu", "float32", model_dir=model_dir)
    model = load_components(options, ["dit", "vae"])
    recorded = read_prior(prior)
    expected = read_json(prior / "run_metadata.json")["latents_sha256"]
    for flags in (("--start_step", 8), ("--steps", 3), ("--start_step", 9)):
        plan, path = plan_of(prior, *flags), tmp_path / f"{flags[-1]}.mp4"
        group = Group(prior=recorded, jobs=[Job(recorded, plan)])
        load_inputs(group, group.plans)
        assert not know_contexts(group, group.texts, ContextStore())
        clip = make_clip(group, plan, model)
        clip.save(path)
        assert sha256_tensor(clip.latents) == expected
        assert clip.report["steps_run"] == plan.steps_to_run
        assert path.exists() and clip.seconds["save"] > 0 == clip.seconds["load"]
