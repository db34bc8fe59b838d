"""The two functions from Python, on a pipeline the user made in their own way."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from helpers import OTHER_PROMPT, PROMPT, ROOT, SIZE, read_json, run_as_user
from PIL import Image

import step_skip
from step_skip.errors import InputError, RunError
from step_skip.files.tensors import sha256_tensor
from step_skip.models.embedded import load_tiny_modules, load_tiny_tokenizer
from step_skip.models.loading import fingerprint_parameters

SMALL = {"height": SIZE, "width": SIZE, "num_frames": 9, "cfg_scale": 5.0, "negative_prompt": "Still."}

# what docs/python.md says, on the embedded model put into a pipeline by hand
SCRIPT = f"""
import sys, torch
sys.path.insert(0, {str(ROOT)!r})
from diffsynth.pipelines.wan_video import WanVideoPipeline
from step_skip.models.embedded import load_tiny_modules, load_tiny_tokenizer
pipe = WanVideoPipeline(device="cpu", torch_dtype=torch.float32)
for name, module in load_tiny_modules().items():
    setattr(pipe, name, module)
pipe.tokenizer = load_tiny_tokenizer()
image = {str(ROOT / "data/tiny_wan_i2v/inputs/mila.png")!r}
small = dict(height=64, width=64, num_frames=9, cfg_scale=2.0, negative_prompt="", output_dir="priors")

from step_skip import generate_prior, infer_from_prior
prior = generate_prior(pipe, image, prompt="she stays still", num_inference_steps=4, **small)
clip = infer_from_prior(pipe, prior, prompt="she speaks")
clip.save("speaks.mp4")
"""


@pytest.fixture
def own_pipe(model_dir):
    """A pipeline that was not loaded by us."""
    from diffsynth.pipelines.wan_video import WanVideoPipeline

    pipe = WanVideoPipeline(device="cpu", torch_dtype=torch.float32)
    for name, module in load_tiny_modules(model_dir).items():
        setattr(pipe, name, module)
    pipe.tokenizer = load_tiny_tokenizer(model_dir)
    return pipe


@pytest.fixture
def own_prior(own_pipe, image, tmp_path):
    return step_skip.generate_prior(
        own_pipe, image, PROMPT, output_dir=tmp_path / "priors", run_id="own", progress=False, **SMALL
    )


def state_of(pipe) -> dict[str, object]:
    """Everything that a call could leave changed."""
    hooks = [len(module._forward_pre_hooks) for module in pipe.dit.modules()]
    return {**vars(pipe), "hooks": hooks, "blocks": list(pipe.dit.blocks)}


def test_the_five_lines_of_the_docs(tmp_path):
    ended = run_as_user("-c", SCRIPT, cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout == ""
    report = read_json(tmp_path / "speaks.json")
    assert (report["prompt"], report["forwards"], report["steps_run"]) == ("she speaks", 3, [0, 3])
    [prior] = (tmp_path / "priors").iterdir()
    assert read_json(prior / "run_metadata.json")["status"] == "complete"
    lines = SCRIPT.strip().splitlines()[-4:]
    documented = (ROOT / "docs" / "python.md").read_text()
    assert lines[0] in documented and lines[3] in documented and lines[2] in documented


def test_priors_of_a_folder_on_a_pipeline_of_ones_own(own_pipe, own_prior, image, tmp_path):
    photos, made = tmp_path / "photos", []
    photos.mkdir()
    shutil.copy(image, photos / "ann.png")
    (photos / "cut.png").write_text("no image")
    asked = {
        "prompts": [PROMPT, OTHER_PROMPT],
        "output_dir": tmp_path / "many",
        "on_made": made.append,
        **SMALL,
    }
    before = state_of(own_pipe)
    with pytest.raises(RunError, match="2 of 4 priors failed"):
        step_skip.generate_priors(own_pipe, photos, **asked)
    (photos / "cut.png").unlink()
    priors = step_skip.generate_priors(own_pipe, photos, **asked)
    assert [each.directory for each in priors] == [each.directory for each in made]
    assert [prior.metadata.prompt for prior in priors] == [PROMPT, OTHER_PROMPT]
    assert priors[0].metadata.files == own_prior.metadata.files
    assert state_of(own_pipe) == before
    with torch.no_grad():
        next(own_pipe.dit.parameters()).add_(0.01)
    [other] = step_skip.generate_priors(own_pipe, photos, **asked | {"prompts": [PROMPT]})
    assert other.directory.name == "run_ann_3"
    with pytest.raises(InputError, match="LoadOptions"):
        step_skip.generate_priors(own_pipe, photos, ray="local")


def test_priors_that_are_there_need_no_model(model_dir, prior, image, loads):
    options = step_skip.LoadOptions("tiny", "cpu", "float32", model_dir=model_dir)
    [found] = step_skip.generate_priors(
        options, [image], [PROMPT], output_dir=prior.parent, on_made=lambda prior: 1 / 0
    )
    assert found.directory == prior and not loads
    [same] = step_skip.generate_priors(options, image, PROMPT, seeds=0, output_dir=prior.parent)
    assert same.directory == prior and not loads
    with pytest.raises(InputError, match="nowhere is not a file"):
        step_skip.generate_priors(options, "nowhere")
    for nothing in ({"prompts": ()}, {"seeds": ()}):
        with pytest.raises(InputError, match="at least one"):
            step_skip.generate_priors(options, image, **nothing)


def test_own_prompt_gives_the_priors_own_video(own_pipe, own_prior):
    expected = own_prior.metadata.latents_sha256
    for choice in ({}, {"start_step": 4}, {"steps": (0, 9)}, {"num_steps": 2}, {"start_step": 9}):
        clip = step_skip.infer_from_prior(own_pipe, own_prior, progress=False, **choice)
        assert sha256_tensor(clip.latents) == expected, choice
    other = step_skip.infer_from_prior(own_pipe, own_prior, OTHER_PROMPT, progress=False)
    assert sha256_tensor(other.latents) != expected
    assert (other.forwards, len(other.frames)) == (5, 9)
    assert other.seconds["denoise"] > 0


def test_the_scripts_and_the_functions_make_the_same(prior, model_dir, image, infer, tmp_path):
    """Latents bit for bit, both of the prior and of a clip; a folder may be a string."""
    model = step_skip.load("tiny", model_dir=str(model_dir))
    made = step_skip.generate_prior(
        model, str(image), PROMPT, output_dir=str(tmp_path / "priors"), progress=False
    )
    assert made.metadata.latents_sha256 == read_json(prior / "run_metadata.json")["latents_sha256"]
    clip = step_skip.infer_from_prior(model, str(prior), OTHER_PROMPT, start_step=6, progress=False)
    path = clip.save(tmp_path / "clip.mp4")
    report = infer(prior, "--prompt", OTHER_PROMPT, "--output", tmp_path / "script.mp4").report
    own = read_json(path.with_suffix(".json"))
    assert own["latents_sha256"] == report["latents_sha256"]
    assert own.keys() == report.keys()
    assert infer(made.directory).report["latents_sha256"] == made.metadata.latents_sha256


def test_the_pipeline_is_left_as_it_was_also_after_an_error(own_pipe, own_prior, capsys):
    before = state_of(own_pipe)

    def stop(*_):
        raise KeyboardInterrupt

    step_skip.infer_from_prior(own_pipe, own_prior, OTHER_PROMPT, skip_cache=2)
    assert state_of(own_pipe) == before
    with pytest.raises(KeyboardInterrupt):
        step_skip.infer_from_prior(own_pipe, own_prior, OTHER_PROMPT, callback_on_step_end=stop)
    assert state_of(own_pipe) == before
    assert capsys.readouterr().out == ""


def test_a_callback_sees_every_step(own_pipe, own_prior, image, tmp_path):
    seen = []

    def see(step, steps, denoised):
        seen.append((step, steps, tuple(denoised.shape)))

    step_skip.infer_from_prior(own_pipe, own_prior, steps=[0, 5, 8], callback_on_step_end=see)
    assert seen == [(step, 3, (1, 16, 3, 4, 4)) for step in (0, 5, 8)]
    seen.clear()
    step_skip.generate_prior(
        own_pipe,
        Image.open(image),
        output_dir=tmp_path,
        num_inference_steps=2,
        callback_on_step_end=see,
        **SMALL,
    )
    assert [each[:2] for each in seen] == [(0, 2), (1, 2)]


def test_progress_can_be_switched_off(own_pipe, own_prior, capfd):
    step_skip.infer_from_prior(own_pipe, own_prior)
    assert "denoise" in capfd.readouterr().err
    step_skip.infer_from_prior(own_pipe, own_prior, progress=False)
    assert "denoise" not in capfd.readouterr().err


@pytest.mark.parametrize(
    ("choices", "words"),
    [
        ({"start_step": 10}, "the prior has steps 0 to 9"),
        ({"start_step": -1}, "the prior has steps 0 to 9"),
        ({"steps": [5, 3]}, "expected increasing steps"),
        ({"steps": [-1, 3]}, "expected increasing steps"),
        ({"num_steps": 0}, "has only 10 steps"),
        ({"sigmas": [0.5, 0.0]}, "above 0"),
        ({"cfg_scale": -1.0}, "above 0"),
        ({"cfg_scale": float("nan")}, "above 0"),
    ],
)
def test_choices_that_cannot_be_are_our_own_errors(own_pipe, own_prior, choices, words):
    with pytest.raises(step_skip.InputError, match=words):
        step_skip.infer_from_prior(own_pipe, own_prior, **choices)


@pytest.mark.parametrize(
    ("choices", "words"),
    [
        ({"num_inference_steps": 0}, "num_inference_steps"),
        ({"height": 0}, "height"),
        ({"cfg_scale": 0}, "cfg_scale"),
        ({"denoising_strength": 2}, "denoising_strength"),
        ({"denoising_strength": 0.5}, "input_video"),
        ({"seed": -1}, "seed"),
        ({"stop_after": 9}, "stop_after"),
        ({"run_id": "../elsewhere"}, "run_id"),
    ],
)
def test_a_prior_that_cannot_be_leaves_nothing_behind(own_pipe, image, tmp_path, choices, words):
    with pytest.raises(step_skip.InputError, match=words):
        step_skip.generate_prior(own_pipe, image, output_dir=tmp_path / "priors", **{**SMALL, **choices})
    assert not (tmp_path / "priors").exists()


# --- which weights ------------------------------------------------------------------------------------------


def test_other_weights_are_refused(own_pipe, own_prior):
    with torch.no_grad():
        own_pipe.dit.blocks[0].ffn[0].weight += 0.01
    with pytest.raises(step_skip.InputError, match="the dit weights are not those"):
        step_skip.infer_from_prior(own_pipe, own_prior)


def test_the_fingerprint_of_the_values_is_the_same_compiled_and_loaded_by_the_scripts(own_pipe, prior):
    recorded = read_json(prior / "run_metadata.json")["parameter_fingerprint"]
    assert recorded["dit"] == fingerprint_parameters(own_pipe.dit)
    assert recorded["dit"] == fingerprint_parameters(torch.compile(own_pipe.dit))
    assert recorded["dit"] == fingerprint_parameters(own_pipe.dit.to(torch.float32))
    for module in (torch.nn.Linear(2, 2, device="meta"), torch.nn.Identity()):
        assert fingerprint_parameters(module) == "unverified"


def test_weights_that_cannot_be_compared_are_said_to_be_unverified(own_pipe, prior_copy, caplog):
    from helpers import edit_metadata

    edit_metadata(prior_copy, parameter_fingerprint=...)
    clip = step_skip.infer_from_prior(own_pipe, prior_copy, progress=False)
    assert sha256_tensor(clip.latents) == read_json(prior_copy / "run_metadata.json")["latents_sha256"]
    assert "unverified" in caplog.text


def test_a_prior_of_an_own_pipeline_is_refused_by_the_script_in_one_line(own_prior, run, refused):
    refused(
        lambda: run("infer_from_prior", "--prior_dir", own_prior.directory, "--prompt", OTHER_PROMPT),
        "the model 'own'",
        "from Python",
    )


def test_the_steps_have_to_be_there(own_pipe, own_prior, tmp_path):
    copy = shutil.copytree(own_prior.directory, tmp_path / "copy")
    (copy / "step_0004.pt").unlink()
    with pytest.raises(step_skip.InputError, match="is missing"):
        step_skip.infer_from_prior(own_pipe, copy, start_step=4)


def test_a_pipeline_without_text_encoder_needs_a_known_prompt(own_pipe, own_prior):
    own_pipe.text_encoder = None
    step_skip.infer_from_prior(own_pipe, own_prior, progress=False)
    with pytest.raises(step_skip.InputError, match="has no text_encoder"):
        step_skip.infer_from_prior(own_pipe, own_prior, OTHER_PROMPT)


def test_the_packages_are_those_of_the_requirements():
    project = (ROOT / "pyproject.toml").read_text().split("dependencies = ")[1].split("]")[0] + "]"
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    assert json.loads(project.replace(",\n]", "\n]")) == [line for line in lines if not line.startswith("#")]


# --- many clips ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def second(make_prior):
    """Another prior, of the same model."""
    return make_prior("--seed", "1", "--run_id", "second")


def test_a_sweep_from_python_is_the_scripts_sweep(prior, second, model_dir, infer, loads, tmp_path):
    """Names, page and latents are the same, and each finds what the other made."""
    options = step_skip.LoadOptions("tiny", "cpu", "float32", model_dir=model_dir)
    made = []
    paths = step_skip.infer_from_priors(
        options,
        [prior, step_skip.read_prior(second)],
        [{"prompt": PROMPT, "num_steps": 1}, {"prompt": OTHER_PROMPT, "num_steps": 2}],
        output_dir=tmp_path / "python",
        on_made=made.append,
    )
    assert paths == made and len(paths) == 4 and len(loads) == 1
    assert (tmp_path / "python" / "index.html").is_file()
    loads.clear()
    lines = tmp_path / "prompts.txt"
    lines.write_text(
        json.dumps({"prompt": PROMPT, "num_steps": 1})
        + "\n"
        + json.dumps({"prompt": OTHER_PROMPT, "num_steps": 2})
    )
    flags = ("--prior_dir", second, "--prompts_file", lines, "--output_dir")
    outcome = infer(prior, *flags, tmp_path / "python")
    assert outcome.code == 0 and not loads, outcome.err
    infer(prior, *flags, tmp_path / "script")
    for path in paths:
        reports = [read_json(tmp_path / name / f"{path.stem}.json") for name in ("python", "script")]
        assert reports[0]["latents_sha256"] == reports[1]["latents_sha256"]
        assert reports[0].keys() == reports[1].keys()
    loads.clear()
    again = step_skip.infer_from_priors(
        options, [prior, second], [PROMPT, OTHER_PROMPT], num_steps=2, output_dir=tmp_path / "script"
    )
    assert len(again) == 4 and again[1] == tmp_path / "script" / paths[1].name


def test_a_sweep_on_a_pipeline_of_ones_own(own_pipe, own_prior, image, capsys, tmp_path):
    before = state_of(own_pipe)
    asked = {"start_step": 6, "output_dir": tmp_path / "s"}
    paths = step_skip.infer_from_priors(own_pipe, own_prior, [None, OTHER_PROMPT], **asked)
    assert state_of(own_pipe) == before and capsys.readouterr().out == ""
    [own, other] = (read_json(path.with_suffix(".json")) for path in paths)
    assert own["latents_sha256"] == own_prior.metadata.latents_sha256 != other["latents_sha256"]
    clip = step_skip.infer_from_prior(own_pipe, own_prior, OTHER_PROMPT, start_step=6, progress=False)
    assert clip.report["latents_sha256"] == other["latents_sha256"]
    with pytest.raises(InputError, match="LoadOptions"):
        step_skip.infer_from_priors(own_pipe, own_prior, ray="local")
    damaged = step_skip.generate_prior(
        own_pipe, image, PROMPT, output_dir=tmp_path, run_id="damaged", **SMALL
    )
    (damaged.directory / "step_0007.pt").write_bytes(b"damaged")
    asked["start_step"] = 7
    with pytest.raises(RunError, match="1 of 2 clips failed"):
        step_skip.infer_from_priors(own_pipe, [own_prior, damaged], OTHER_PROMPT, **asked)
    for nothing in (([], "a"), (own_prior, [])):
        with pytest.raises(InputError, match="at least one"):
            step_skip.infer_from_priors(own_pipe, *nothing)


def test_one_clip_from_python_is_warned_of_as_by_the_script(prior, model_dir, infer, caplog):
    model = step_skip.load("tiny", model_dir=model_dir)
    step_skip.infer_from_prior(model, prior, OTHER_PROMPT, start_step=6, progress=False)
    assert "is late for a new motion" in caplog.text
    warned = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    err = infer(prior, "--prompt", OTHER_PROMPT, "--start_step", 6).err
    assert warned and all(text in err for text in warned)


def test_a_choice_that_no_prior_could_record_is_our_own_error(own_pipe, image, tmp_path):
    with pytest.raises(InputError, match="has skip_cache = 1, expected 2 to 10000"):
        step_skip.generate_prior(own_pipe, image, PROMPT, output_dir=tmp_path, skip_cache=1, **SMALL)
    assert not any(tmp_path.glob("run_*"))
