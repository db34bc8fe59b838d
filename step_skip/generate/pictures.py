"""The images of a new prior: read, fitted to the video's size, and recorded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from step_skip.files.names import id_from_name
from step_skip.files.reading import sha256_file
from step_skip.files.writing import replacing
from step_skip.generate.choices import PriorChoices, choose_size
from step_skip.media.images import Picture, crop_preview_file, fit_picture, open_image
from step_skip.models.families import Defaults, Family, round_sizes
from step_skip.prior.prior import IMAGE_FILE, LABELS

if TYPE_CHECKING:
    from PIL.Image import Image


def save_preview(picture: Picture, directory: Path, file: str) -> None:
    """Show beside the image of a prior what was cropped away; the prior is whole without it."""
    if picture.preview is not None:
        with replacing(directory / crop_preview_file(file)) as temporary:
            picture.preview.save(temporary)


def read_pictures(
    given: Mapping[str, str | Path | Image | Picture | None],
    choices: PriorChoices,
    *,
    defaults: Defaults,
    family: Family,
) -> tuple[PriorChoices, dict[str, Picture]]:
    """Read the images of one prior; return them, and its choices with the size that follows from the first.

    Args:
        given: by the prior's file names, the first frame first; a Picture stays as it is, None is none.

    Raises:
        InputError: one can't be used.
    """
    pictures: dict[str, Picture] = {}
    for file, each in given.items():
        if each is None or isinstance(each, Picture):
            pictures |= {} if each is None else {file: each}
            continue
        image = open_image(each, background=choices.background, label=LABELS[file])
        choices = choose_size(choices, image.size, defaults=defaults, family=family)
        sizes = {name: getattr(choices, name) or getattr(defaults, name) for name in ("width", "height")}
        sizes = round_sizes(**sizes, num_frames=1, family=family)
        path = Path(each) if isinstance(each, str | Path) else None
        name = "" if path is None else path.name.encode(errors="replace").decode()
        picture = fit_picture(
            image,
            width=sizes["width"],
            height=sizes["height"],
            fit=choices.fit,
            background=choices.background,
            name=name,
            label=f"{LABELS[file]} {name}".rstrip(),
        )
        pictures[file] = picture if path is None else replace(picture, sha256=sha256_file(path))
    return choices, pictures


def id_of(pictures: Mapping[str, Picture], prompt: str) -> str:
    """Return a run id after the image's file or, without one, the prompt; "" if that has no letters."""
    image = pictures.get(IMAGE_FILE)
    return id_from_name(prompt if image is None else Path(image.name).stem)
