"""A prior is used with its own weights and on its own schedule, or refused before anything is loaded."""

from __future__ import annotations

import pytest
from conftest import build_model
from helpers import edit_metadata, read_json

# --- weights ------------------------------------------------------------------------------------------------


def test_other_weights(prior_copy, run, refused, tmp_path):
    (tmp_path / "other").mkdir()
    other = build_model(tmp_path / "other", seed=1)
    command = ("infer_from_prior", "--prior_dir", prior_copy, "--model_dir", other)
    refused(lambda: run(*command), "dit weights are not those", "--model_dir")


def test_weights_without_a_recorded_fingerprint(prior_copy, infer, refused):
    edit_metadata(prior_copy, model_fingerprint={})
    refused(lambda: infer(prior_copy), "dit weights are not those")


# --- schedule -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["scheduler_sigmas", "scheduler_timesteps"])
@pytest.mark.parametrize("place", [0, 4, 9])
def test_one_altered_entry_of_the_schedule(prior_copy, infer, refused, key, place):
    values = read_json(prior_copy / "run_metadata.json")[key]
    values[place] *= 1.0001
    edit_metadata(prior_copy, **{key: values})
    refused(lambda: infer(prior_copy), f"{key}[{place}]", "installed scheduler gives", "make the prior again")


@pytest.mark.parametrize("changes", [{"sigma_shift": 5.001}, {"denoising_strength": 0.999}])
def test_a_schedule_of_other_settings(prior_copy, infer, refused, changes):
    edit_metadata(prior_copy, **changes)
    refused(lambda: infer(prior_copy), "installed scheduler gives")
