"""What only a run can tell: NaN in the latents, and conditioning that the weights don't take."""

from __future__ import annotations

import pytest
import torch
from helpers import assert_unfinished, edit_metadata, needed_name, read_json, record_checksum

# --- NaN ----------------------------------------------------------------------------------------------------


def poison(monkeypatch, step: int, value: float) -> None:
    """Let the network answer with NaN or infinity from a step on."""
    from diffsynth.models.wan_video_dit import WanModel

    calls, unpatchify = [], WanModel.unpatchify

    def forward(*args, **kwargs):
        calls.append(None)
        result = unpatchify(*args, **kwargs)
        return result * value if len(calls) > 2 * step else result

    monkeypatch.setattr(WanModel, "unpatchify", forward)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_stops_a_full_run_at_that_step(generate, infer, image, tmp_path, monkeypatch, value):
    with monkeypatch.context() as patch:
        poison(patch, 4, value)
        outcome = generate("--image", image, "--run_id", "nan")
    assert outcome.code == 1
    assert "NaN or infinite at step 4" in outcome.error
    assert "5/10" not in outcome.err  # the sixth step was never begun
    assert_unfinished(tmp_path / "priors" / "run_nan", infer, steps=4)


@pytest.mark.parametrize(("flags", "step"), [((), 8), (("--steps", 1, 5), 5)])
def test_nan_stops_a_resumed_run_at_that_step(prior_copy, infer, monkeypatch, flags, step):
    poison(monkeypatch, 1, float("nan"))
    outcome = infer(prior_copy, *flags)
    assert outcome.code == 1
    assert f"NaN or infinite at step {step}" in outcome.error
    assert outcome.out == ""
    assert not (prior_copy / "outputs").exists()


# --- conditioning -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["y.pt", "clip_feature.pt", "context"])
@pytest.mark.parametrize("change", ["wide", "batch", "flat", "long", "scalar"])
def test_conditioning_of_another_shape_whose_sums_agree(prior_copy, infer, name, change):
    """Only the weights can tell: so they are loaded, and no step is run."""
    path = prior_copy / needed_name(prior_copy, name)
    tensor = torch.load(path, weights_only=True)
    tensor = {
        "wide": lambda: torch.cat([tensor, tensor], 1 if tensor.ndim == 5 else 2),
        "batch": lambda: torch.cat([tensor, tensor]),
        "flat": lambda: tensor[0].clone(),
        "long": lambda: (
            torch.zeros(1, 5000, tensor.shape[2]) if tensor.ndim == 3 else tensor[:, :, :-1].clone()
        ),
        "scalar": lambda: torch.zeros(1)[0].clone(),
    }[change]()
    torch.save(tensor, path)
    shapes = read_json(prior_copy / "run_metadata.json")["shapes"]
    edit_metadata(prior_copy, shapes=shapes | {path.name: list(tensor.shape)})
    record_checksum(prior_copy, path.name)
    outcome = infer(prior_copy)
    assert outcome.code == 2
    assert f"has shape {list(tensor.shape)}, expected [1, " in outcome.error
    assert not (prior_copy / "outputs").exists()


def test_a_family_whose_network_sees_no_image(prior_copy, infer):
    """Likewise: by the metadata there is no y, and the weights take one."""
    edit_metadata(prior_copy, family="T2V")
    outcome = infer(prior_copy)
    assert outcome.code == 2
    assert "the prior has no y, and these weights take one" in outcome.error
