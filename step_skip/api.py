"""Priors of a folder of images from Python, on one pipeline or on a Ray cluster."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from step_skip.cluster.driver import connected
from step_skip.cluster.priors import make_on_cluster
from step_skip.errors import InputError
from step_skip.files.writing import check_folder
from step_skip.generate.choices import PriorChoices, check_images, check_prior_choices
from step_skip.models.families import FAMILIES
from step_skip.models.loading import OWN_PIPELINE, Model, load_components, model_of
from step_skip.models.weights import LoadOptions, family_name
from step_skip.prior.metadata import read_prior
from step_skip.prior.prior import Prior
from step_skip.sweep.make_priors import check_first, make_all, report_failed_priors, usable, what_to_load
from step_skip.sweep.priors import bytes_of, make_jobs, plan_jobs

if TYPE_CHECKING:
    from diffsynth.pipelines.wan_video import WanVideoPipeline
T = TypeVar("T", bound="str | int | Path")


def generate_priors(
    pipe: WanVideoPipeline | Model | LoadOptions,
    images: str | Path | Iterable[str | Path],
    prompts: str | Iterable[str] = "",
    *,
    end_images: str | Path | Iterable[str | Path] = (),
    seeds: int | Iterable[int] = 0,
    output_dir: str | Path = "prior_output",
    ray: str | None = None,
    workers: int | None = None,
    on_made: Callable[[Prior], object] | None = None,
    **choices: Any,
) -> list[Prior]:
    """Make a prior of each image, seed and prompt; what is there of the same choices is not made again.

    Args:
        pipe: any WanVideoPipeline, or what `load` gives; or LoadOptions, with which a model is loaded only if
            a prior is missing, on a cluster by the workers alone.
        images: files, and folders of them; of these, as of all that follow, one alone or several.
        prompts: all for each image; as many as there are files, and no folder: one for each.
        end_images: one for all images, or one for each.
        ray: the address of a Ray cluster to make them on: "auto" the one here, "local" all GPUs of this
            machine; needs what `load` gives, or LoadOptions.
        workers: of the cluster, at most so many.
        on_made: called with each prior once it is made.
        choices: see `PriorChoices`; a denoising_strength below 1 is for `generate_prior`.

    Raises:
        InputError: a choice that can't be used, or no image can.
        RunError: some priors could not be made; the others are, and the same call tries only these again.
    """
    model = None if isinstance(pipe, LoadOptions) else model_of(pipe)
    options = pipe if isinstance(pipe, LoadOptions) else model_of(pipe).options
    family = family_name(options.model, options.model_dir) if model is None else model.family
    own = model.parameters if model is not None and options.model == OWN_PIPELINE else None
    if ray is not None and own is not None:
        raise InputError(
            "ray: workers load a model by its name; give what step_skip.load gives, or LoadOptions"
        )
    texts, numbers = as_list(prompts), as_list(seeds)
    if not texts or not numbers:
        raise InputError("prompts and seeds: give at least one of each")
    folder, wanted = Path(output_dir), PriorChoices(seed=numbers[0], **choices)
    paths, ends = [Path(each) for each in as_list(images)], [Path(each) for each in as_list(end_images)]
    check_prior_choices(wanted)
    check_images(options.model, FAMILIES[family], image=bool(paths), end_image=bool(ends))
    if wanted.denoising_strength < 1:
        raise InputError("denoising_strength below 1 starts from a video: use generate_prior")
    with contextlib.redirect_stdout(sys.stderr):
        jobs = make_jobs(paths, texts, wanted, end_images=ends, seeds=numbers)
        here = options if ray is None else dataclasses.replace(options, device="cpu")  # workers have theirs
        jobs = plan_jobs(jobs, here, family, folder, parameters=own)
        to_do = usable(jobs, [job for job in jobs if not job.made])
        if to_do:
            check_folder(folder, sum(map(bytes_of, to_do)))
            check_first(to_do, here, family, on_cluster=ray is not None)
            to_do = usable(jobs, to_do)
        how: dict[str, Any] = {"output_dir": folder}
        if on_made is not None:
            how["on_made"] = lambda prior, _: on_made(prior)
        if to_do and ray is None:
            sized, components = what_to_load(to_do, options)
            model = model or load_components(sized, components, by_expert=True)
            make_all(to_do, model, single=len(jobs) == 1, **how)
        elif to_do:
            with connected(str(ray), workers=workers) as cluster:
                device = cluster.device(options.model, options.device)
                sized, components = what_to_load(to_do, dataclasses.replace(options, device=device))
                make_on_cluster(to_do, cluster, options=sized, family=family, components=components, **how)
        report_failed_priors(jobs, folder=folder)
    return [read_prior(job.directory) for job in jobs if job.directory is not None]


def as_list(given: T | Iterable[T]) -> list[T]:
    """One alone, or several, as a list."""
    return [given] if isinstance(given, str | int | Path) else list(given)
