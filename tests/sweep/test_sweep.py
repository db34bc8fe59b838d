"""Sweeps: the cross product in one process, what is kept, what is made again, and what ends in an error."""

from __future__ import annotations

import itertools
import json
import os
import random
import shutil
import signal
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import build_model
from helpers import OTHER_PROMPT, PROMPT, edit_metadata, listing, read_json

from step_skip.files.reading import sha256_file
from step_skip.infer import inputs
from step_skip.infer.choices import Choices
from step_skip.pipeline import run as pipeline_run
from step_skip.prior.contexts import kept_context_path, load_context, save_context
from step_skip.prior.files import load_conditioning
from step_skip.prior.metadata import read_prior
from step_skip.prior.prior import context_file
from step_skip.prior.schema import Formation
from step_skip.sweep import finished, make_clips
from step_skip.sweep.clips import deciding_entries, make_groups
from step_skip.sweep.outputs import sweep_folder

THIRD_PROMPT = "The portrait nods."
DECIDING = ("latents_sha256", "video_sha256", "steps_run", "prompt", "cfg_scale", "prior_files")


def results(folder: Path) -> dict[str, dict]:
    """What decides every whole result of a sweep's folder, by name."""
    reports = {path.stem: read_json(path) for path in sorted(folder.glob("*.json"))}
    for stem, report in reports.items():
        assert report["video_sha256"] == sha256_file(folder / f"{stem}.mp4")
    assert {path.stem for path in folder.glob("*.mp4")} == set(reports)
    assert not list(folder.glob(".*"))
    return {stem: {name: report[name] for name in DECIDING} for stem, report in reports.items()}


def planned(outcome) -> list[dict]:
    """The lines of a --dry_run."""
    assert outcome.code == 0, outcome.err
    return [json.loads(line) for line in outcome.out.splitlines()]


@pytest.fixture(scope="session")
def second(make_prior) -> Path:
    """Another prior, of the same model."""
    return make_prior("--seed", "1", "--run_id", "second")


@pytest.fixture(scope="session")
def bfloat16(make_prior) -> Path:
    """A prior in another dtype."""
    return make_prior("--dtype", "bfloat16", "--run_id", "bfloat16")


@pytest.fixture
def encoded(monkeypatch) -> list[str]:
    """The prompts that the text encoder encoded, in order."""

    texts, encode_prompt = [], pipeline_run.encode_prompt

    def spy(pipe, text):
        texts.append(text)
        return encode_prompt(pipe, text)

    monkeypatch.setattr(pipeline_run, "encode_prompt", spy)
    return texts


# --- the plan -----------------------------------------------------------------------------------------------


def test_a_dry_run_prints_the_cross_product_and_loads_nothing(prior_copy, second, infer, loads, tmp_path):
    before = listing(tmp_path)
    flags = ("--prior_dir", second, "--prompt", PROMPT, OTHER_PROMPT, "--start_step", 2, "6-8")
    outcome = infer(prior_copy, *flags, "--dry_run")
    lines = planned(outcome)
    assert [(line["prompt"], line["start_step"]) for line in lines] == [
        (prompt, step) for _ in range(2) for prompt in (PROMPT, OTHER_PROMPT) for step in (2, 6, 7, 8)
    ]
    assert len({line["video"] for line in lines}) == 16
    assert len({Path(line["video"]).parent for line in lines}) == 1
    assert [line["forwards"] for line in lines[:4]] == [13, 5, 3, 1]
    assert not any(line["made"] for line in lines)
    assert "16 clips, 88 forwards, about" in outcome.err
    assert "would load dit, vae, text_encoder" in outcome.err
    assert listing(tmp_path) == before
    assert not loads


def test_the_expected_seconds_are_what_the_prior_took(prior_copy, infer):
    seconds = read_json(prior_copy / "run_metadata.json")["seconds"] | {"decode": 3.0}
    edit_metadata(prior_copy, seconds_per_step=[9.0, *[2.0] * 9], seconds=seconds)
    flags = ("--prompts_file", prior_copy / "prompts.txt", "--start_step", 6, 9, "--dry_run")
    (prior_copy / "prompts.txt").write_text('one\n{"prompt": "two", "cfg_scale": 1}\n')
    lines = planned(infer(prior_copy, *flags))
    assert [line["expected_seconds"] for line in lines] == [8.0, 3.0, 6.0, 3.0]


def test_an_older_prior_expects_nothing(older_prior, infer, image):
    flags = ("--model", "tiny", "--image", image, "--prompt", PROMPT, "--start_step", "6-7", "--dry_run")
    outcome = infer(older_prior, *flags)
    assert [line["expected_seconds"] for line in planned(outcome)] == [None, None]
    assert "time unknown" in outcome.err


def test_a_prompts_file(prior, infer, tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_bytes(
        b"\xef\xbb\xbfShe nods.\r\n# What comes next is French.\r\n\r\n  Elle sourit \xc3\xa0 tous.  \n"
        b'{"prompt": "She waves.", "cfg_scale": 3, "start_step": "2-3"}\n'
        b'{"negative_prompt": "blurry", "steps": [0, 7]}\n'
        b'{"prompt": "She runs.", "num_steps": [1, 2]}\nShe nods.'
    )
    lines = planned(
        infer(prior, "--prompts_file", path, "--prompt", "First.", "--start_step", 6, "--dry_run")
    )
    keys = ("prompt", "negative_prompt", "cfg_scale", "start_step", "steps_run")
    assert [tuple(line[key] for key in keys) for line in lines] == [
        ("First.", "Still.", 5.0, 6, [7, 8, 9]),
        ("She nods.", "Still.", 5.0, 6, [7, 8, 9]),
        ("Elle sourit à tous.", "Still.", 5.0, 6, [7, 8, 9]),
        ("She waves.", "Still.", 3.0, 2, [3, 4, 5, 6, 7, 8, 9]),
        ("She waves.", "Still.", 3.0, 3, [4, 5, 6, 7, 8, 9]),
        (PROMPT, "blurry", 5.0, None, [0, 7]),
        ("She runs.", "Still.", 5.0, None, [0]),
        ("She runs.", "Still.", 5.0, None, [0, 8]),
    ]


@pytest.mark.parametrize(
    ("flags", "found"),
    [
        (("--num_steps", 1, "2-3"), [(1, 5.0), (2, 5.0), (3, 5.0)]),
        (("--num_steps", "3,1"), [(3, 5.0), (1, 5.0)]),
        (("--num_steps", 1, 2, "--cfg_scale", "2,3"), [(1, 2.0), (1, 3.0), (2, 2.0), (2, 3.0)]),
        (("--num_steps", 2, "--cfg_scale", 5, "3,1"), [(2, [5.0, 3.0]), (2, [5.0, 1.0])]),
        (("--start_step", "7,8-9", "--cfg_scale", "1"), [(2, 1.0), (1, 1.0), (0, 1.0)]),
    ],
)
def test_steps_and_guidance_are_swept(prior, infer, flags, found):
    lines = planned(infer(prior, *flags, "--dry_run"))
    assert [(len(line["steps_run"]), line["cfg_scale"]) for line in lines] == found
    assert len({line["video"] for line in lines}) == len(found)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--num_steps", "3-2"), "3-2 is not a range of steps"),
        (("--num_steps", "2,0"), "0 is not a whole number above 0"),
        (("--cfg_scale", "2,x"), "'x' is not a number above 0"),
        (("--cfg_scale", "2,"), "'' is not a number above 0"),
    ],
)
def test_what_cannot_be_swept(prior_copy, infer, refused, flags, words):
    refused(lambda: infer(prior_copy, *flags), words)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, ["is not a file"]),
        (b"", ["holds no prompt"]),
        (b" \n\n", ["holds no prompt"]),
        (b"caf\xe9", ["not UTF-8"]),
        (b"# only a comment\n", ["holds no prompt"]),
        (b'\n[{"prompt": "a"},\n "b"]', ["is a JSON array", "one prompt per line"]),
        ("A boat.".encode("utf-16"), ["not UTF-8"]),
        ("A boat.".encode("utf-16-le"), ["zero bytes", "save it as UTF-8"]),
        (b"one\n{two", ["line 2", "not valid JSON"]),
        (b"[1]\n" + b'{"a":' * 100_000, ["line 2", "not valid JSON"]),
        (b'{"prompt": "a", "seed": 3}', ["line 1", "'seed'", "negative_prompt"]),
        (b'{"prompt": ["a", "b"]}', ["line 1", "prompt is", "not a text"]),
        (b'{"prompt": "\\ud800"}', ["line 1", "not valid UTF-8"]),
        (b'{"cfg_scale": -1}', ["line 1", "above 0"]),
        (b'{"cfg_scale": NaN}', ["line 1", "above 0"]),
        (b'{"start_step": true}', ["line 1", "'True'"]),
        (b'{"start_step": 10}', ["--start_step 10", "steps 0 to 9"]),
        (b'{"start_step": 3, "steps": [0]}', ["line 1", "more than one"]),
        (b'{"steps": [3, 2]}', ["--steps", "increasing"]),
        (b'{"steps": []}', ["line 1", "steps is []"]),
        (b'{"num_steps": 0}', ["line 1", "above 0"]),
    ],
)
def test_a_prompts_file_that_cannot_be_used(prior_copy, infer, refused, tmp_path, content, words):
    path = tmp_path / "prompts.txt"
    if content is not None:
        path.write_bytes(content)
    refused(lambda: infer(prior_copy, "--prompts_file", path), *words)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--start_step", "8-2"), ["--start_step", "8-2 is not a range"]),
        (("--start_step", "2-99999999999"), ["--start_step", "not a range"]),
        (("--start_step", "2-10"), ["--start_step 10", "steps 0 to 9"]),
        (("--start_step", 2, "x"), ["--start_step", "'x'"]),
        (("--start_step", 2, 3, "--output", "a.mp4"), ["--output names one clip", "--output_dir"]),
        (("--output_dir", "sweep", "--output", "a.mp4"), ["--output names one clip"]),
        (("--output_dir", "PRIOR"), ["is a prior", "another folder"]),
    ],
)
def test_flags_of_a_sweep(prior_copy, infer, refused, flags, words):
    flags = [prior_copy if flag == "PRIOR" else flag for flag in flags]
    refused(lambda: infer(prior_copy, *flags), *words)


def test_priors_of_one_name_are_refused(prior_copy, infer, refused, tmp_path):
    shutil.copytree(prior_copy, tmp_path / "again")
    refused(lambda: infer(prior_copy, "--prior_dir", tmp_path / "again"), "same run_id", "sweep them")


def test_plans_are_shared_between_priors_but_for_what_is_their_own(prior, second):
    choices = [Choices(start_step=step) for step in (6, 7)]
    groups, left_out = make_groups([prior, second], choices)
    one, other = groups
    assert not left_out
    assert all(a is b for a, b in zip(one.plans, other.plans, strict=True)) is (
        read_prior(prior).metadata.seed == read_prior(second).metadata.seed
    )
    own = deciding_entries(one.prior, choices)
    for name, value in (("prompt", "another"), ("cfg_scale", 9.0), ("lora", [1]), ("num_inference_steps", 4)):
        edited = replace(one.prior, metadata=one.prior.metadata.model_copy(update={name: value}))
        assert deciding_entries(edited, choices) != own
    pruned = replace(one.prior, metadata=one.prior.metadata.model_copy(update={"files": {}}))
    assert deciding_entries(pruned, choices) != own
    update = {"run_id": "x", "formation": Formation(text_moves=[1.0])}
    renamed = replace(one.prior, metadata=one.prior.metadata.model_copy(update=update))
    assert deciding_entries(renamed, choices) == own
    assert deciding_entries(renamed, [Choices(start_step="auto")]) != own


# --- odd priors ---------------------------------------------------------------------------------------------


def test_odd_priors_fail_their_own_clips(prior, second, prior_copy, generate, infer, image, loads, tmp_path):
    """A draft, no prior, one of other weights, a damaged one: each in a line, and the rest is made."""
    draft = generate("--image", image, "--stop_after", 3, "--run_id", "draft").path
    other = shutil.copytree(prior_copy, tmp_path / "other")
    edit_metadata(prior_copy, run_id="damaged")
    edit_metadata(other, run_id="other", model_fingerprint={"dit": "0" * 64})
    (tmp_path / "none").mkdir()
    flip(prior_copy / "step_0006.pt")
    loads.clear()
    priors = (tmp_path / "none", draft, other, prior_copy, second)
    prompts = ("--prompt", PROMPT, OTHER_PROMPT)
    command = ("--prior_dir", *priors, *prompts, "--output_dir", tmp_path / "sweep")
    outcome = infer(prior, *command)
    assert outcome.code == 1
    assert "4 of 8 clips failed and 2 priors were left out" in outcome.error
    lines = [line for line in outcome.err.splitlines() if "left out: " in line or " failed: " in line]
    assert len(lines) == 4
    for name, words in (
        ("none", "holds no run_metadata.json"),
        ("draft", "--start_step 6: the prior has steps 0 to 3"),
        ("other", "weights are not those"),
        ("damaged", "step_0006.pt is damaged"),
    ):
        assert sum(name in line and words in line for line in lines) == 1, (name, lines)
    made = results(tmp_path / "sweep")
    assert len(made) == 4 and len(loads) == 1
    assert infer(prior, *command[:-2], "--dry_run").err.count("left out: ") == 2


def test_the_first_prior_is_checked_before_anything_is_loaded(prior_copy, infer, refused, tmp_path):
    copies = [shutil.copytree(prior_copy, tmp_path / f"run_{n}") for n in range(2)]
    for number, copy in enumerate(copies):
        edit_metadata(copy, run_id=str(number))
        flip(copy / "step_0006.pt")
    refused(lambda: infer(copies[0], "--prior_dir", copies[1]), "step_0006.pt is damaged")


def test_priors_that_need_other_weights_run_one_after_the_other(prior, bfloat16, infer, loads, tmp_path):
    outcome = infer(prior, "--prior_dir", bfloat16, "--prompt", OTHER_PROMPT, "--output_dir", tmp_path / "s")
    assert outcome.code == 0, outcome.err
    assert len(loads) == 2
    reports = [read_json(path) for path in sorted((tmp_path / "s").glob("*.json"))]
    assert sorted(report["dtype"] for report in reports) == ["bfloat16", "float32"]
    for report in reports:
        alone = infer(Path(report["prior_dir"]), "--prompt", OTHER_PROMPT, "--output", tmp_path / "a.mp4")
        assert alone.report["latents_sha256"] == report["latents_sha256"]
        (tmp_path / "a.mp4").unlink()
        (tmp_path / "a.json").unlink()


def test_one_prior_is_in_memory_at_a_time(prior, second, infer, monkeypatch, tmp_path):
    held, groups, make = [], [], make_clips.ClipRun.make

    def spy(run, group, *how):
        if group not in groups:
            groups.append(group)
        held.append(sum(bool(each.inputs.tensors) for each in groups))
        make(run, group, *how)

    monkeypatch.setattr(make_clips.ClipRun, "make", spy)
    infer(prior, "--prior_dir", second, "--prompt", PROMPT, OTHER_PROMPT, "--output_dir", tmp_path / "s")
    assert held == [1, 1, 1, 1] and len(groups) == 2
    assert not any(group.inputs.tensors or group.inputs.contexts for group in groups)


# --- the run ------------------------------------------------------------------------------------------------


def test_a_sweep_makes_what_separate_calls_make(prior, second, infer, loads, encoded, tmp_path):
    prompts, steps = (OTHER_PROMPT, THIRD_PROMPT), (6, 8)
    flags = ("--prior_dir", second, "--prompt", *prompts, "--start_step", *steps)
    outcome = infer(prior, *flags, "--output_dir", tmp_path / "sweep")
    assert outcome.path == tmp_path / "sweep"
    assert loads == [["dit", "text_encoder", "vae"]]
    assert encoded == [*prompts]  # once each, for both priors
    assert "clip 8 of 8" in outcome.err
    swept = results(tmp_path / "sweep")
    assert len(swept) == 8
    for number, (each, prompt, step) in enumerate(itertools.product((prior, second), prompts, steps)):
        flags = ("--prompt", prompt, "--start_step", step, "--output", tmp_path / f"{number}.mp4")
        report = infer(each, *flags).report
        assert {name: report[name] for name in DECIDING} in swept.values()


def test_a_known_prompt_needs_no_encoder(prior, infer, loads, encoded, tmp_path):
    command = ("--prompt", OTHER_PROMPT, THIRD_PROMPT)
    first = infer(prior, *command, "--output_dir", tmp_path / "first").path
    again = infer(prior, *command, "--output_dir", tmp_path / "again").path
    assert results(first) == results(again)
    assert encoded == [OTHER_PROMPT, THIRD_PROMPT]
    assert loads == [["dit", "text_encoder", "vae"], ["dit", "vae"]]
    for path in again.glob("*.json"):
        assert read_json(path)["components_loaded"] == ["dit", "vae"]


def test_a_prompt_is_encoded_and_kept_once_for_all_priors_of_a_sweep(
    prior, second, infer, loads, encoded, tmp_path
):
    command = ("--prior_dir", second, "--prompt", OTHER_PROMPT, "--output_dir", tmp_path / "sweep")
    made = results(infer(prior, *command).path)
    assert len(list((tmp_path / "sweep" / "contexts").iterdir())) == 1
    assert not (prior / "contexts").exists() and not (second / "contexts").exists()
    for path in (tmp_path / "sweep").glob("*.mp4"):
        path.unlink()
    assert results(infer(prior, *command).path) == made
    assert encoded == [OTHER_PROMPT]
    assert loads == [["dit", "text_encoder", "vae"], ["dit", "vae"]]


def test_what_one_prior_keeps_is_not_given_to_another(prior_copy, second, infer, encoded, tmp_path):
    """A kept context vouches for itself only, and a prior may come from a stranger."""
    recorded = read_prior(prior_copy)
    forged = torch.full((1, 8, 32), 7.0)
    save_context(recorded, OTHER_PROMPT, forged)
    infer(prior_copy, "--prior_dir", second, "--prompt", OTHER_PROMPT, "--output_dir", tmp_path / "sweep")
    assert encoded == [OTHER_PROMPT]
    assert torch.equal(load_context(recorded, OTHER_PROMPT), forged)
    assert not torch.equal(load_context(recorded, OTHER_PROMPT, tmp_path / "sweep"), forged)


def test_what_a_sweep_keeps_stays_there(prior, second, infer, encoded, tmp_path):
    """Its folder may be a stranger's: what is in it goes into its own videos alone."""
    (tmp_path / "sweep").mkdir()
    save_context(read_prior(prior), OTHER_PROMPT, torch.full((1, 8, 32), 7.0), tmp_path / "sweep")
    command = ("--prior_dir", second, "--prompt", OTHER_PROMPT, "--output_dir")
    infer(prior, *command, tmp_path / "sweep")
    assert encoded == []
    infer(prior, *command, tmp_path / "another")
    infer(prior, "--prompt", OTHER_PROMPT, "--output", tmp_path / "a.mp4")
    assert encoded == [OTHER_PROMPT] * 2


def test_a_sweep_that_is_done_reads_nothing_and_changes_nothing(prior_copy, infer, loads, monkeypatch):
    command = ("--prompt", PROMPT, OTHER_PROMPT, "--start_step", "8-9")
    folder = infer(prior_copy, *command).path
    assert folder.parent == prior_copy / "outputs"
    before = listing(prior_copy)
    assert {"index.html", "contact_sheet.png"} < {path.name for path in folder.iterdir()}
    loads.clear()
    read: list[object] = []
    for module, name in ((inputs, "check_files"), (inputs, "load_latents"), (finished, "sha256_file")):
        monkeypatch.setattr(module, name, lambda *given, **_: read.append(given))
    outcome = infer(prior_copy, *command)
    assert outcome.path == folder
    assert listing(prior_copy) == before
    assert not loads
    assert read == []
    assert "0 clips, 0 forwards" in infer(prior_copy, *command, "--dry_run").err


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-9])


def edit(path: Path, **changes) -> None:
    path.write_text(json.dumps(read_json(path) | changes))


@pytest.mark.parametrize(
    "damage",
    [
        lambda video: cut(video),
        lambda video: flip(video),
        lambda video: video.unlink(),
        lambda video: cut(video.with_suffix(".json")),
        lambda video: video.with_suffix(".json").unlink(),
        lambda video: video.with_suffix(".json").write_text("[]"),
        lambda video: edit(video.with_suffix(".json"), cfg_scale=3),
        lambda video: edit(video.with_suffix(".json"), prior_files={}),
    ],
    ids=[
        "video cut",
        "video flipped",
        "no video",
        "JSON cut",
        "no JSON",
        "a list",
        "other settings",
        "another prior",
    ],
)
def test_what_is_not_whole_is_made_again(prior, infer, tmp_path, damage):
    command = ("--prompt", PROMPT, OTHER_PROMPT, "--start_step", 8, "--output_dir", tmp_path / "sweep")
    folder = infer(prior, *command).path
    expected = results(folder)
    times = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    damaged = sorted(folder.glob("*.mp4"))[0]
    damage(damaged)
    lines = planned(infer(prior, *command, "--dry_run"))
    assert {line["video"]: line["made"] for line in lines}[str(damaged)] is False
    assert "1 exist already" in infer(prior, *command).err
    assert results(folder) == expected
    kept = [path.name for path in folder.iterdir() if path.stat().st_mtime_ns == times.get(path.name)]
    assert len(kept) >= 2
    assert damaged.name not in kept


def test_one_video_that_fails_does_not_stop_the_rest(prior, infer, tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text(f'{OTHER_PROMPT}\n{{"prompt": "Too much.", "cfg_scale": 1e39}}\n{THIRD_PROMPT}\n')
    outcome = infer(prior, "--prompts_file", path, "--output_dir", tmp_path / "sweep")
    assert (outcome.code, outcome.out) == (1, "")
    assert f"1 of 3 clips failed, see above; the others are in {tmp_path / 'sweep'}" in outcome.error
    assert "too-much" in outcome.err and "NaN or infinite at step 7" in outcome.err
    made = results(tmp_path / "sweep")
    assert {each["prompt"] for each in made.values()} == {OTHER_PROMPT, THIRD_PROMPT}
    flags = ("--prompt", "Too much.", "--cfg_scale", 1e39, "--output", tmp_path / "one.mp4")
    assert "NaN or infinite at step 7" in infer(prior, *flags).error


def test_a_second_sweep_of_the_same_folder_has_to_wait(prior, infer, loads, tmp_path):
    command = ("--prompt", PROMPT, OTHER_PROMPT, "--output_dir", tmp_path / "sweep")
    with sweep_folder(tmp_path / "sweep"):
        outcome = infer(prior, *command)
    assert (outcome.code, loads) == (2, [])
    assert "another process is writing" in outcome.error
    assert not (tmp_path / "sweep").exists()
    assert infer(prior, *command).code == 0


def test_older_priors_sweep_too(older_prior, prior, infer, image, loads, tmp_path):
    flags = ("--model", "tiny", "--image", image, "--prompt", PROMPT, OTHER_PROMPT, "--start_step", 6, 8)
    command = (*flags, "--output_dir", tmp_path / "sweep")
    older = results(infer(older_prior, *command).path)
    assert loads == [["dit", "image_encoder", "text_encoder", "vae"]]
    full = results(infer(prior, *flags, "--output_dir", tmp_path / "full").path)
    assert [each["latents_sha256"] for each in older.values()] == [
        each["latents_sha256"] for each in full.values()
    ]
    assert not (older_prior / "contexts").exists()  # nothing tells whose they would be
    loads.clear()
    assert infer(older_prior, *command).code == 0
    assert not loads


# --- kept prompts -------------------------------------------------------------------------------------------


def kept(prior: Path) -> list[Path]:
    """The files of the prompts a prior has kept."""
    return sorted((prior / "contexts").iterdir())


def test_a_kept_prompt_is_the_encoded_prompt(prior_copy, infer, tmp_path):
    """Saved by one run, it is what generate_prior.py would have recorded."""
    import torch

    neutral = read_prior(prior_copy)
    assert load_context(neutral, PROMPT) is None
    own = load_conditioning(neutral, context_file(PROMPT))
    save_context(neutral, PROMPT, own)
    assert torch.equal(load_context(neutral, PROMPT), own)
    infer(prior_copy, "--prompt", OTHER_PROMPT, "--output", tmp_path / "video.mp4")
    assert len(kept(prior_copy)) == 2


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    "damage",
    [flip, cut, lambda path: path.write_bytes(b""), lambda path: path.unlink()],
    ids=["flipped", "cut", "empty", "gone"],
)
def test_a_kept_prompt_that_is_damaged_is_encoded_again(prior_copy, infer, encoded, tmp_path, damage):
    command = ("--prompt", OTHER_PROMPT, "--output", tmp_path / "video.mp4", "--overwrite")
    expected = infer(prior_copy, *command).report["latents_sha256"]
    [path] = kept(prior_copy)
    whole = path.read_bytes()
    damage(path)
    assert infer(prior_copy, *command).report["latents_sha256"] == expected
    assert path.read_bytes() == whole


def test_any_damage_to_a_kept_prompt_is_seen(prior_copy):
    import torch

    recorded = read_prior(prior_copy)
    save_context(recorded, OTHER_PROMPT, torch.linspace(0, 1, 256).reshape(1, 8, 32))
    [path] = kept(prior_copy)
    whole = path.read_bytes()
    for place in range(0, len(whole), 3):
        for content in (whole[:place], whole[:place] + bytes([whole[place] ^ 0x41]) + whole[place + 1 :]):
            path.write_bytes(content)
            assert load_context(recorded, OTHER_PROMPT) is None
    path.write_bytes(whole)
    assert load_context(recorded, OTHER_PROMPT) is not None


def test_a_prompt_of_another_text_encoder_is_not_taken(prior_copy, infer, tmp_path):
    infer(prior_copy, "--prompt", OTHER_PROMPT, "--output", tmp_path / "video.mp4")
    fingerprint = read_json(prior_copy / "run_metadata.json")["model_fingerprint"]
    edit_metadata(prior_copy, model_fingerprint=fingerprint | {"text_encoder": "0" * 64})
    assert load_context(read_prior(prior_copy), OTHER_PROMPT) is None
    [path] = kept(prior_copy)
    path.rename(kept_context_path(read_prior(prior_copy), OTHER_PROMPT))
    assert load_context(read_prior(prior_copy), OTHER_PROMPT) is None


def test_other_weights_keep_nothing(prior_copy, run, tmp_path):
    (tmp_path / "other").mkdir()
    other = build_model(tmp_path / "other", seed=1)
    command = ("--prior_dir", prior_copy, "--model_dir", other, "--prompt", OTHER_PROMPT)
    outcome = run("infer_from_prior", *command)
    assert outcome.code == 2
    assert not (prior_copy / "contexts").exists()


def test_a_prior_that_cannot_be_written_to_costs_only_the_keeping(prior_copy, infer, tmp_path):
    (prior_copy / "contexts").write_text("a file where the folder would be")
    command = ("--prompt", OTHER_PROMPT, THIRD_PROMPT, "--output_dir", tmp_path / "sweep")
    outcome = infer(prior_copy, *command)
    assert outcome.err.count("cannot keep the encoded prompt") == 2
    assert len(results(outcome.path)) == 2


# --- interruptions ------------------------------------------------------------------------------------------


def run_and_kill(argv: list[str], *, after: int | None) -> int:
    """Run the command line in a forked process that kills itself at its `after`th opened or renamed file.

    Returns:
        How many files it opened or renamed, where it was not killed.
    """
    read_end, write_end = os.pipe()
    child = os.fork()
    if child == 0:
        import infer_from_prior

        count = 0

        def hook(event: str, _: object) -> None:
            nonlocal count
            if event in ("open", "os.rename"):
                count += 1
                if count == after:
                    os.kill(os.getpid(), signal.SIGKILL)

        with open(os.devnull, "w") as nowhere:  # noqa: PTH123
            sys.stdout = sys.stderr = nowhere
            sys.addaudithook(hook)
            infer_from_prior.main(argv)
            os.write(write_end, str(count).encode())
        os._exit(0)
    os.close(write_end)
    _, status = os.waitpid(child, 0)
    with os.fdopen(read_end) as file:
        count = file.read()
    assert (os.WTERMSIG(status) == signal.SIGKILL) if after else (status == 0)
    return int(count or 0)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system can't fork")
def test_killed_at_ten_moments_and_run_again(prior_copy, model_dir, infer, tmp_path):
    flags = ("--prompt", OTHER_PROMPT, THIRD_PROMPT, "--start_step", 8, "--output_dir")
    argv = ["--prior_dir", prior_copy, "--model_dir", model_dir, *flags]
    assert infer(prior_copy, *flags, tmp_path / "warm").code == 0  # what is imported late is no file to count
    shutil.rmtree(prior_copy / "contexts")
    total = run_and_kill([*map(str, argv), str(tmp_path / "whole")], after=None)
    expected, expected_contexts = results(tmp_path / "whole"), listing(prior_copy / "contexts")
    assert len(expected) == 2
    for moment in random.Random(0).sample(range(1, total + 1), 10):
        shutil.rmtree(prior_copy / "contexts")
        folder = tmp_path / f"killed_{moment}"
        run_and_kill([*map(str, argv), str(folder)], after=moment)
        assert infer(prior_copy, *flags, folder).code == 0
        assert results(folder) == expected
        assert listing(prior_copy / "contexts").items() >= expected_contexts.items()
