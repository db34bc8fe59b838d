"""Photos as people have them: every mode, turned, transparent, of another shape; told by their pixels."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from helpers import SIZE, read_json
from PIL import Image

from step_skip.errors import InputError
from step_skip.files.reading import sha256_file
from step_skip.generate.choices import PriorChoices, choose_size
from step_skip.media.images import fit_box, fit_picture, open_image
from step_skip.models.families import FAMILIES, MODELS

RAMP = np.linspace(0, 1, 20 * 20).reshape(20, 20)  # black to white, row by row


def levels(image: Image.Image) -> np.ndarray:
    """The reds of an image that has to be grey."""
    pixels = np.asarray(image).astype(int)
    assert (pixels == pixels[..., :1]).all()
    return pixels[..., 0]


# --- modes --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("suffix", "dtype", "white"),
    [
        ("png", np.uint16, 65535),
        ("tiff", np.uint16, 65535),
        ("tiff", ">u2", 65535),
        ("tiff", np.int32, 65535),
        ("tiff", np.float32, 1),
        ("tiff", np.float32, 255),
        ("png", np.uint8, 255),
    ],
)
def test_grey_of_any_depth_keeps_its_levels(tmp_path, suffix, dtype, white):
    path = tmp_path / f"grey.{suffix}"
    Image.fromarray((RAMP * white).astype(dtype)).save(path)
    assert np.abs(levels(open_image(path)) - RAMP * 255).max() <= 1


@pytest.mark.parametrize("values", [(-3.0, 1.0), (0.0, 300.0), (0.0, np.nan)])
def test_grey_of_which_nobody_knows_the_white_is_refused(tmp_path, values):
    path = tmp_path / "grey.tiff"
    Image.fromarray(np.array([values] * 20, np.float32).repeat(10, axis=1)).save(path)
    with pytest.raises(InputError, match="grey values from .* expected 0 to"):
        open_image(path)


def transparent(mode: str) -> Image.Image:
    """Red that shows in the left half only; in the right one it is hidden."""
    image = Image.new("RGBA", (20, 20), (200, 40, 40, 255))
    image.paste((255, 0, 0, 0), (10, 0, 20, 20))
    if mode == "P":
        indexed = Image.new("P", (20, 20), 0)
        indexed.putpalette([200, 40, 40, 255, 0, 0])
        indexed.paste(1, (10, 0, 20, 20))
        indexed.info["transparency"] = 1
        return indexed
    return image.convert(mode)


@pytest.mark.parametrize("mode", ["RGBA", "P", "LA", "RGBa"])
def test_what_is_transparent_shows_the_background(mode, caplog):
    caplog.set_level("INFO", "step_skip")
    image = open_image(transparent(mode), background="#336699")
    assert image.getpixel((15, 10)) == (0x33, 0x66, 0x99)
    assert image.getpixel((5, 10)) == ((88, 88, 88) if mode == "LA" else (200, 40, 40))
    assert "has transparent parts: #336699 shows" in caplog.text


def test_an_opaque_alpha_channel_changes_nothing(caplog):
    caplog.set_level("INFO", "step_skip")
    image = Image.fromarray((RAMP * 255).astype(np.uint8)).convert("RGB")
    assert open_image(image.convert("RGBA")).tobytes() == image.tobytes()
    assert "transparent" not in caplog.text


@pytest.mark.parametrize(
    ("mode", "colour", "expected"),
    [
        ("LAB", (255, 128, 128), (255, 255, 255)),
        ("CMYK", (0, 255, 255, 0), (255, 0, 0)),
        ("YCbCr", (76, 85, 255), (254, 0, 0)),
        ("HSV", (0, 255, 255), (255, 0, 0)),
        ("1", 1, (255, 255, 255)),
    ],
)
def test_other_colours_come_out_right(mode, colour, expected):
    found = open_image(Image.new(mode, (20, 20), colour)).getpixel((10, 10))
    assert np.abs(np.subtract(found, expected)).max() <= 2


def test_a_photo_is_turned_upright_from_python_too(tmp_path):
    path = tmp_path / "turned.jpg"
    image = Image.new("RGB", (40, 20), "black")
    image.paste("white", (0, 0, 20, 20))
    exif = Image.Exif()
    exif[0x0112] = 6  # turn clockwise to see it upright
    image.save(path, exif=exif)
    for given in (path, Image.open(path)):
        upright = open_image(given)
        assert upright.size == (20, 40)
        assert upright.getpixel((10, 5))[0] > 250 and upright.getpixel((10, 35))[0] < 5


def test_a_transparent_picture_on_the_command_line(generate, tmp_path):
    path = tmp_path / "cut_out.png"
    transparent("RGBA").resize((SIZE, SIZE), Image.Resampling.NEAREST).save(path)
    outcome = generate("--image", path, "--background", "lime", "--num_inference_steps", 1)
    with Image.open(outcome.path / "input_image.png") as image:
        assert image.getpixel((SIZE - 1, 0)) == (0, 255, 0)
    assert "lime shows through (--background)" in outcome.err
    record = read_json(outcome.path / "run_metadata.json")["images"]["input_image.png"]
    assert record["background"] == "#00ff00"


def test_a_name_that_is_no_text_leaves_the_prior_readable(generate, infer, image, tmp_path):
    path = tmp_path / "caf\udce9.png"
    shutil.copy(image, path)
    made = generate("--image", path, "--num_inference_steps", 1)
    assert made.path.name == "run_caf"
    assert infer(made.path, "--start_step", 0).report["prior_image"] == "caf?.png"


def test_a_background_that_is_no_colour(generate, refused, image):
    refused(lambda: generate("--image", image, "--background", "nice"), "--background nice", "a colour")


# --- another shape ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "fit", "box"),
    [
        ((200, 100), "crop", (50, 0, 150, 100)),
        ((100, 200), "crop", (0, 50, 100, 150)),
        ((200, 100), "pad", (0, -50, 200, 150)),
        ((100, 200), "pad", (-50, 0, 150, 200)),
        ((200, 100), "stretch", (0, 0, 200, 100)),
        ((64, 64), "crop", (0, 0, 64, 64)),
        ((64, 64), "pad", (0, 0, 64, 64)),
    ],
)
def test_what_is_seen_of_another_shape(size, fit, box):
    assert fit_box(size, width=96, height=96, fit=fit) == box


@pytest.mark.parametrize("fit", ["crop", "pad", "stretch"])
def test_an_image_of_the_videos_size_is_left_as_it_is(image, fit):
    given = open_image(image)
    picture = fit_picture(given, width=SIZE, height=SIZE, fit=fit, background="red", name="", label="it")
    assert picture.image.tobytes() == given.tobytes()
    assert picture.preview is None


@pytest.fixture
def wide(tmp_path) -> Path:
    """Twice as wide as high: a red third, a white middle, a blue third."""
    image = Image.new("RGB", (12 * 16, 6 * 16), "white")
    image.paste("red", (0, 0, 3 * 16, 6 * 16))
    image.paste("blue", (9 * 16, 0, 12 * 16, 6 * 16))
    path = tmp_path / "Wide Photo.png"
    image.save(path)
    return path


@pytest.mark.parametrize(
    ("fit", "left", "top", "box"),
    [
        ("crop", (255, 255, 255), (255, 255, 255), [48, 0, 144, 96]),
        ("pad", (255, 0, 0), (0, 0, 0), [0, -48, 192, 144]),
        ("stretch", (255, 0, 0), (255, 255, 255), [0, 0, 192, 96]),
    ],
)
def test_fit_on_the_command_line(generate, infer, wide, fit, left, top, box):
    outcome = generate("--image", wide, "--fit", fit, "--background", "black", "--num_inference_steps", 1)
    with Image.open(outcome.path / "input_image.png") as seen:
        assert seen.getpixel((1, SIZE // 2)) == left
        assert seen.getpixel((SIZE // 2, 1)) == top
    record = read_json(outcome.path / "run_metadata.json")["images"]["input_image.png"]
    expected = {"name": "Wide Photo.png", "size": [192, 96], "box": box, "fit": fit, "background": "#000000"}
    assert record == expected | {"sha256": sha256_file(wide)}
    preview = outcome.path / "input_image_crop.png"
    assert preview.exists() == (fit == "crop")
    assert infer(outcome.path, "--start_step", 0, "--image", wide).code == 0  # read the same way again
    if fit == "crop":
        assert "cropped to its centre, 96 x 96; --fit pad" in outcome.err
        with Image.open(preview) as shown:
            assert shown.size == (192, 96)
            assert shown.getpixel((96, 48)) == (255, 255, 255)
            assert shown.getpixel((10, 48)) == (63, 0, 0)


def test_the_embedded_model_keeps_its_size(generate, wide):
    metadata = read_json(generate("--image", wide, "--num_inference_steps", 1).path / "run_metadata.json")
    assert (metadata["width"], metadata["height"]) == (SIZE, SIZE)


@pytest.fixture
def model_of_any_size(model_dir, tmp_path) -> Path:
    """The small model as one that takes any size, as the published ones do."""
    folder = shutil.copytree(model_dir, tmp_path / "any_size")
    config = read_json(folder / "config.json")
    config["defaults"]["any_size"] = True
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_with_no_size_given_each_image_keeps_its_shape(generate, model_of_any_size, wide, image):
    flags = ("--model_dir", model_of_any_size, "--num_inference_steps", 1)
    outcome = generate("--image", wide, image, *flags)
    sizes = []
    for folder in outcome.out.splitlines():
        with Image.open(Path(folder) / "input_image.png") as seen:
            sizes.append(seen.size)
    assert sizes == [(32, 16), (SIZE, SIZE)]
    assert not (Path(outcome.out.splitlines()[0]) / "input_image_crop.png").exists()


def test_a_size_given_is_a_size_taken(generate, model_of_any_size, wide):
    flags = ("--model_dir", model_of_any_size, "--num_inference_steps", 1, "--height", 32, "--width", 32)
    metadata = read_json(generate("--image", wide, *flags).path / "run_metadata.json")
    assert (metadata["width"], metadata["height"]) == (32, 32)
    assert metadata["images"]["input_image.png"]["box"] == [48, 0, 144, 96]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("size", [(3000, 4000), (1920, 1080), (1000, 1000), (16, 16000)])
def test_the_shape_of_a_photo_at_the_models_area(name, size):
    model = MODELS[name]
    family, defaults = FAMILIES[model.family], model.defaults
    chosen = choose_size(PriorChoices(), size, defaults=defaults, family=family)
    multiple = 32 if name == "TI2V-5B" else 16
    assert chosen.width % multiple == chosen.height % multiple == 0
    if min(size) > 16:
        assert 0.9 < chosen.width * chosen.height / (defaults.width * defaults.height) <= 1
        assert abs(chosen.width * size[1] / (chosen.height * size[0]) - 1) < 0.05


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("times", [1, 2, 3])
def test_a_photo_of_the_models_shape_has_the_models_size(name, times):
    model = MODELS[name]
    defaults = model.defaults
    size = (times * defaults.width, times * defaults.height)
    chosen = choose_size(PriorChoices(), size, defaults=defaults, family=FAMILIES[model.family])
    assert (chosen.width, chosen.height) == (defaults.width, defaults.height)


def test_the_last_frame_is_fitted_too(make, images, wide):
    flags = ("--image", images["--image"], "--end_image", wide, "--num_inference_steps", 1)
    outcome = make("FLF2V", *flags)
    record = read_json(outcome.path / "run_metadata.json")["images"]
    assert record["end_image.png"]["box"] == [48, 0, 144, 96]
    assert (outcome.path / "end_image_crop.png").exists()
    assert not (outcome.path / "input_image_crop.png").exists()
