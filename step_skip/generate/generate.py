"""Make one prior on a loaded pipeline: the Python function."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from step_skip.errors import InputError
from step_skip.files.writing import locked
from step_skip.generate.choices import PriorChoices, check_images, check_prior_choices
from step_skip.generate.pictures import id_of, read_pictures, save_preview
from step_skip.generate.plan import plan_prior
from step_skip.generate.run import run_what_is_left, what_is_left
from step_skip.media.images import Picture
from step_skip.models.embedded import warn_of_embedded
from step_skip.models.families import FAMILIES
from step_skip.models.loading import Model, model_of
from step_skip.models.weights import model_defaults
from step_skip.pipeline.results import Clock
from step_skip.prior.prior import END_IMAGE_FILE, IMAGE_FILE, Prior
from step_skip.prior.schema import RecordedImage
from step_skip.prior.writer import PriorWriter, create_run_dir

if TYPE_CHECKING:
    from diffsynth.pipelines.wan_video import WanVideoPipeline
    from PIL.Image import Image

    from step_skip.pipeline.schedulers import ProgressCallback


def generate_prior(
    pipe: WanVideoPipeline | Model,
    image: str | Path | Image | Picture | None = None,
    prompt: str = "",
    *,
    end_image: str | Path | Image | Picture | None = None,
    output_dir: str | Path = "prior_output",
    run_id: str | None = None,
    input_video: list[Image] | None = None,
    callback_on_step_end: ProgressCallback | None = None,
    on_begin: Callable[[Path], object] | None = None,
    progress: bool = True,
    **choices: Any,
) -> Prior:
    """Make a prior: a full run of the pipeline, with everything kept in `output_dir/run_<id>`.

    Args:
        pipe: any WanVideoPipeline, or what `load` gives; it is left as it was found.
        image: the identity, the first frame of every video; None for a model that takes none.
        prompt: what happens in the prior's own video; best is one that holds still.
        end_image: the last frame, for a model that takes one.
        run_id: None: after the image's file or, without one, the prompt or the time.
        input_video: with a denoising_strength below 1, the frames to start from, of the video's size.
        callback_on_step_end: called after each step with (step, steps, denoised).
        on_begin: called with the prior's folder once generate_prior.py --resume could finish it.
        progress: show progress bars.
        choices: see `PriorChoices`: num_inference_steps, cfg_scale, sigma_shift, seed, height, width, fit ...

    Raises:
        InputError: a choice or an image that can't be used, or a folder that can't be written.
        RunError: latents became NaN or infinite.
        DiskError: whatever the disk refused.
    """
    model = model_of(pipe)
    with contextlib.redirect_stdout(sys.stderr):
        family, options = FAMILIES[model.family], model.options
        check_images(options.model, family, image=image is not None, end_image=end_image is not None)
        wanted = PriorChoices(**choices)
        check_prior_choices(wanted)
        given = {IMAGE_FILE: image, END_IMAGE_FILE: end_image}
        defaults = model_defaults(options.model, options.model_dir)
        wanted, pictures = read_pictures(given, wanted, defaults=defaults, family=family)
        metadata = plan_prior(options, wanted, family=model.family)
        if (input_video is None) != (metadata.denoising_strength == 1):
            raise InputError("denoising_strength is below 1 where there is an input_video, and only there")
        for component in family.components:
            model.require(component, "make a prior")
        texts = [prompt] if metadata.cfg_scale == 1 else [prompt, metadata.negative_prompt or ""]
        warn_of_embedded(options, texts, metadata.sizes)
        clock = Clock()
        clock.include({"load": model.seconds})
        directory, run_id = create_run_dir(Path(output_dir), run_id, name=id_of(pictures, prompt))
        begun: dict[str, Any] = {
            "run_id": run_id,
            "prompt": prompt,
            "prior_kind": "prompted" if prompt else "neutral",
            "created": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "seconds_per_step": [],
            "forwards_per_step": [],
            "model_fingerprint": dict(model.fingerprint),
            "parameter_fingerprint": model.parameters,
            "images": {name: RecordedImage(**picture.record) for name, picture in pictures.items()},
        }
        with locked(directory):
            writer = PriorWriter(directory, metadata.model_copy(update=begun))
            images = {name: picture.image for name, picture in pictures.items()}
            for name, picture in pictures.items():
                writer.save(name, picture.image.save)
                save_preview(picture, directory, name)
            writer.write_metadata()  # from here on --resume can finish it
            if on_begin is not None:
                on_begin(directory)
            run_what_is_left(
                writer,
                what_is_left(writer.prior),
                model=model,
                start={**pipeline_images(images), "input_video": input_video},
                clock=clock,
                callback=callback_on_step_end,
                progress=progress,
            )
        return writer.prior


def pipeline_images(images: Mapping[str, Image]) -> dict[str, Image]:
    """Return the images of a prior under the names of the pipeline's arguments."""
    return {Path(name).stem: image for name, image in images.items()}
