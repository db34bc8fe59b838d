"""Priors of a folder of images: each image, seed and prompt once, whatever else goes wrong."""

from __future__ import annotations

import json
import shutil

import pytest
from conftest import build_model, save_image
from helpers import OTHER_PROMPT, PROMPT, edit_metadata, fail_at_step, listing, read_json
from PIL import Image

from step_skip.files.writing import locked
from step_skip.media.images import image_size
from step_skip.sweep.priors import bases_of

METADATA = "run_metadata.json"


@pytest.fixture
def photos(tmp_path):
    """A folder of two identities, a file that is no image, and one that does not look like one."""
    folder = tmp_path / "photos"
    folder.mkdir()
    save_image(folder / "ann.png", shade=90)
    save_image(folder / "ben.JPG")
    whole = (folder / "ann.png").read_bytes()
    (folder / "cut.png").write_bytes(whole[: len(whole) // 2])
    (folder / "notes.txt").write_text("no image")
    return folder


def prompts_and_seeds(priors):
    """What was made, by folder."""
    recorded = {path.parent.name: read_json(path) for path in sorted(priors.glob(f"run_*/{METADATA}"))}
    return {name: (m["prompt"], m["seed"], m["status"]) for name, m in recorded.items()}


def test_a_folder_is_every_image_times_seeds_times_prompts(generate, photos, loads, image, tmp_path):
    flags = ("--image", photos, "--prompt", PROMPT, OTHER_PROMPT, "--seed", 0, 7, "--num_inference_steps", 1)
    outcome = generate(*flags)
    assert outcome.code == 1 and len(loads) == 1
    assert "4 of 12 priors failed" in outcome.error
    assert outcome.err.count(f"{photos}/cut.png cannot be read") == 1
    assert "prior 12 of 12" in outcome.err and "a minute" in outcome.err
    chosen = [(prompt, seed, "complete") for seed in (0, 7) for prompt in (PROMPT, OTHER_PROMPT)]
    made = prompts_and_seeds(tmp_path / "priors")
    names = [f"run_{name}{number}" for name in ("ann", "ben") for number in ("", "_2", "_3", "_4")]
    assert made == dict(zip(names, 2 * chosen, strict=True))
    again = generate(*flags)
    assert again.code == 1 and len(loads) == 1
    assert outcome.out.splitlines() == again.out.splitlines() == [str(tmp_path / "priors" / n) for n in names]
    assert "8 exist already" in again.err
    alone = generate("--image", photos / "ann.png", *flags[2:])
    assert alone.out.splitlines() == [str(tmp_path / "priors" / name) for name in names[:4]]
    assert len(loads) == 1


def test_a_prior_of_a_sweep_is_the_one_made_alone(generate, prior, photos, image, tmp_path):
    (photos / "cut.png").unlink()
    shutil.copy(image, photos / "image.png")
    outcome = generate("--image", photos, "--prompt", PROMPT)
    files = read_json(outcome.path / METADATA)["files"]
    assert outcome.path.name == "run_image" and files == read_json(prior / METADATA)["files"]


def test_a_dry_run_says_what_there_is_and_what_it_takes(generate, photos, loads, tmp_path):
    (photos / "cut.png").unlink()
    made = generate("--image", photos / "ann.png").path
    before = listing(tmp_path)
    outcome = generate("--image", photos, "--dry_run")
    rows = [json.loads(line) for line in outcome.out.splitlines()]
    assert [(row["made"], row["prior_dir"]) for row in rows] == [(True, str(made)), (False, None)]
    assert all(row["bytes_at_most"] > 2**20 and row["forwards"] == 20 for row in rows)
    assert "1 priors to make, at most 0.0 GB; 1 exist already" in outcome.err
    assert listing(tmp_path) == before and len(loads) == 1
    (photos / "ugly.png").write_text("no image")
    odd = generate("--image", photos, "--dry_run")
    assert odd.code == 1 and "1 of 3 priors failed, see above" in odd.error
    assert ["error" in json.loads(line) for line in odd.out.splitlines()] == [False, False, True]


@pytest.mark.parametrize("step", [0, 4])
def test_one_that_was_interrupted_is_finished_by_the_same_command(
    generate, prior, photos, image, tmp_path, monkeypatch, step
):
    (photos / "cut.png").unlink()
    shutil.copy(image, photos / "ann.png")
    with monkeypatch.context() as patch:
        fail_at_step(patch, step, KeyboardInterrupt())
        outcome = generate("--image", photos, "--prompt", PROMPT)
    assert outcome.code == 130 and "resume with: the same command" in outcome.err
    assert prompts_and_seeds(tmp_path / "priors") == {"run_ann": (PROMPT, 0, "running")}
    assert generate("--image", photos, "--prompt", PROMPT).code == 0
    assert prompts_and_seeds(tmp_path / "priors").keys() == {"run_ann", "run_ben"}
    made = read_json(tmp_path / "priors" / "run_ann" / METADATA)
    assert (made["status"], made["files"]) == ("complete", read_json(prior / METADATA)["files"])


@pytest.fixture
def made_before(prior, tmp_path):
    """The prior of PROMPT, where the same command looks for it."""
    return shutil.copytree(prior, tmp_path / "priors" / "run_identity")


def test_what_cannot_be_gone_on_with_is_told_before_a_model_is_loaded(
    generate, refused, made_before, image, monkeypatch
):
    edit_metadata(made_before, status="running", num_threads=64)
    flags = ("--image", image, "--prompt", PROMPT)
    refused(lambda: generate(*flags), "was 64", "prior_utils.py rm", "another --run_id")
    refused(lambda: generate(*flags, "--ray", "local"), "without --ray")
    with locked(made_before):
        refused(lambda: generate(*flags), "another process is writing")


def test_what_was_lost_of_one_is_made_again(generate, prior, made_before, image, tmp_path):
    flags = ("--image", image, "--prompt", PROMPT)
    for name in ("step_0008.pt", "output_full.mp4"):
        (made_before / name).unlink()
    planned = generate(*flags, "--dry_run")
    assert json.loads(planned.out)["made"] is False
    outcome = generate(*flags)
    assert outcome.path == made_before and "2 steps" in outcome.err
    assert listing(made_before) == listing(prior) | {METADATA: listing(made_before)[METADATA]}
    assert read_json(made_before / METADATA)["files"] == read_json(prior / METADATA)["files"]
    assert "no file is missing: nothing to do" in generate(*flags).err


def test_a_pruned_one_counts_as_made_and_is_told_of(generate, run, refused, made_before, image, tmp_path):
    flags = ("--image", image, "--prompt", PROMPT)
    assert run("prior_utils", "prune", made_before, "--steps", 6, "--yes").code == 0
    outcome = generate(*flags)
    assert outcome.path == made_before
    assert f"{made_before}; give another --run_id to make a complete one" in outcome.err
    (made_before / "output_full.mp4").unlink()
    planned = generate(*flags, "--dry_run")
    assert "run_identity was pruned and lacks output_full.mp4" in planned.err
    assert json.loads(planned.out)["prior_dir"] is None


def test_a_draft_that_lost_something_does_not_count(generate, image):
    flags = ("--image", image, "--num_inference_steps", 2, "--stop_after", 0)
    draft = generate(*flags).path
    assert "no file is missing: nothing to do" in generate(*flags).err
    (draft / "denoised_0000.mp4").unlink()
    planned = generate(*flags, "--dry_run")
    assert "run_identity is a draft and lacks denoised_0000.mp4" in planned.err and "--resume" in planned.err
    assert json.loads(planned.out)["prior_dir"] is None


def test_what_makes_another_prior(generate, image, loads, tmp_path):
    """Other bytes under the same name, another choice, other weights; but not another place of the image."""
    few = ("--num_inference_steps", 1)
    first = generate("--image", image, *few).path
    moved = tmp_path / "moved" / image.name
    moved.parent.mkdir()
    shutil.copy(image, moved)
    same = generate("--image", moved, *few)
    assert same.path == first and len(loads) == 1 and "nothing to do" in same.err
    (tmp_path / "model").mkdir()
    weights = build_model(tmp_path / "model", seed=3)
    others = [("--cfg_scale", 3), ("--fit", "pad"), ("--stop_after", 0), ("--model_dir", weights)]
    others[2] = ("--num_inference_steps", 2, "--stop_after", 0)
    names = [generate("--image", moved, *few, *flags).path.name for flags in others]
    save_image(moved, shade=3)
    names.append(generate("--image", moved, *few).path.name)
    assert names == [f"run_identity_{number}" for number in range(2, 7)]
    assert generate("--image", moved, *few, *others[2]).path.name == "run_identity_7"
    edit_metadata(tmp_path / "priors" / "run_identity_6", seed=5)
    assert generate("--image", moved, *few).path.name == "run_identity_8"


def test_an_id_that_was_asked_for_is_looked_at_alone(generate, refused, image, loads, tmp_path):
    flags = ("--image", image, "--num_inference_steps", 1)
    made = generate(*flags, "--run_id", "mine").path
    assert generate(*flags, "--run_id", "mine").path == made
    assert generate(*flags).path.name == "run_identity"
    loads.clear()
    refused(lambda: generate(*flags, "--seed", 1, "--run_id", "mine"), "run_mine exists")


def test_files_and_prompts_of_one_number_go_together_and_others_are_crossed(generate, photos):
    files = [photos / "ann.png", photos / "ben.JPG"]

    def planned(*flags):
        rows = [json.loads(line) for line in generate(*flags, "--dry_run").out.splitlines()]
        return [(row["name"].rpartition("/")[2], row["prompt"]) for row in rows]

    assert planned("--image", *files, "--prompt", "go on", "lie") == [
        ("ann.png", "go on"),
        ("ben.JPG", "lie"),
    ]
    crossed = planned("--image", *files, "--prompt", "go on", "lie", "he nods")
    assert crossed == [
        (name, text) for name in ("ann.png", "ben.JPG") for text in ("go on", "lie", "he nods")
    ]
    (photos / "cut.png").unlink()
    assert len(planned("--image", photos, "--prompt", "go on", "lie")) == 4
    assert len(planned("--image", files[0], files[0], "--prompt", "go on")) == 1


def test_a_folder_without_pictures_and_one_in_which_none_can_be_read(generate, refused, photos, tmp_path):
    (tmp_path / "empty").mkdir()
    refused(lambda: generate("--image", tmp_path / "empty"), "empty holds no picture", ".png")
    for name in ("ann.png", "ben.JPG"):
        (photos / name).write_text("no image")
    (photos / "cut.png").unlink()
    refused(lambda: generate("--image", photos), "ann.png is not an image")


def test_a_photo_that_lies_on_its_side_has_the_size_it_is_seen_in(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (40, 20)).save(tmp_path / "turned.jpg", exif=exif)
    Image.new("RGB", (40, 20)).save(tmp_path / "plain.png")
    assert image_size(tmp_path / "turned.jpg") == (20, 40)
    assert image_size(tmp_path / "plain.png") == (40, 20)


def test_the_names_that_a_numbered_one_may_stand_for():
    assert list(bases_of("mila")) == ["mila"]
    assert list(bases_of("mila_2")) == ["mila_2", "mila"]
    assert list(bases_of("20250101_000000")) == ["20250101_000000", "20250101", ""]
    assert "" in bases_of("20250101_000000_2")
