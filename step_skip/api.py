"""Python functions that make many priors or many clips, on one pipeline or on a Ray cluster.

Each function runs the same sequence as its script: plan, check, make, report.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from step_skip.cluster.clips import ClipCluster
from step_skip.cluster.driver import Cluster, connected
from step_skip.cluster.priors import PriorCluster
from step_skip.errors import InputError
from step_skip.generate.choices import PriorChoices, check_images, check_prior_choices
from step_skip.infer.choices import choices_on
from step_skip.models.families import FAMILIES
from step_skip.models.loading import OWN_PIPELINE, Model, model_of
from step_skip.models.weights import LoadOptions, family_name
from step_skip.page.page import running_page
from step_skip.prior.metadata import read_prior
from step_skip.prior.prior import Prior
from step_skip.sweep.make_clips import ThisProcess, make_sweep, plan_sweep
from step_skip.sweep.make_priors import (
    PriorProcess,
    check_batch,
    make_batch,
    plan_batch,
    report_failed_priors,
)

if TYPE_CHECKING:
    from diffsynth.pipelines.wan_video import WanVideoPipeline
T = TypeVar("T", bound="str | int | Path | Prior | Mapping[str, Any] | None")


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
    """Make a prior of each image, seed and prompt; priors that exist with the same choices are kept.

    Args:
        pipe: any WanVideoPipeline; or the Model that `load` returns; or LoadOptions, with which a model is
            loaded only if a prior is missing, on a cluster by the workers alone.
        images: one file or folder of images, or several. The arguments below take one or several, too.
        prompts: all of them for each image; if there are as many as files, and no folder: one for each file.
        end_images: one for all images, or one for each.
        ray: the address of a Ray cluster that makes the priors: "auto" for the one this machine belongs to,
            "local" for all GPUs of this machine. Needs a Model of `load`, or LoadOptions.
        workers: the maximum number of workers; None: one per GPU, without GPUs one per CPU.
        on_made: called with each prior that is finished.
        choices: see `PriorChoices`; for a denoising_strength below 1 use `generate_prior`.

    Raises:
        InputError: a choice is invalid, or no image can be used.
        RunError: some priors could not be made. The others exist, and the same call tries only these again.
    """
    model, options = model_and_options(pipe, ray)
    family = family_name(options.model, options.model_dir) if model is None else model.family
    own = model.parameters if model is not None and options.model == OWN_PIPELINE else None
    texts, numbers = as_list(prompts), as_list(seeds)
    if not texts or not numbers:
        raise InputError("prompts and seeds: give at least one of each")
    wanted = PriorChoices(seed=numbers[0], **choices)
    paths, ends = [Path(each) for each in as_list(images)], [Path(each) for each in as_list(end_images)]
    check_prior_choices(wanted)
    check_images(options.model, FAMILIES[family], image=bool(paths), end_image=bool(ends))
    if wanted.denoising_strength < 1:
        raise InputError("denoising_strength below 1 starts from an input video: use generate_prior")

    def report_made(prior: Prior, steps_run: int) -> None:
        if on_made is not None:
            on_made(prior)

    with contextlib.redirect_stdout(sys.stderr):
        batch = plan_batch(
            paths,
            texts,
            wanted,
            options=options,
            family=family,
            output_dir=Path(output_dir),
            end_images=ends,
            seeds=numbers,
            parameters=own,
            is_here=ray is None,
        )
        check_batch(batch)
        with cluster_of(ray if batch.missing else None, workers) as cluster:
            machine = PriorProcess(model) if cluster is None else PriorCluster(cluster, options.device)
            make_batch(batch, machine, on_made=report_made)
        report_failed_priors(batch.jobs, folder=batch.output_dir)
    return [read_prior(job.directory) for job in batch.jobs if job.directory is not None]


def infer_from_priors(
    pipe: WanVideoPipeline | Model | LoadOptions,
    priors: Prior | str | Path | Iterable[Prior | str | Path],
    prompts: str | None | Mapping[str, Any] | Iterable[str | None | Mapping[str, Any]] = None,
    *,
    output_dir: str | Path | None = None,
    nearest: bool = False,
    preview: bool = False,
    ray: str | None = None,
    workers: int | None = None,
    on_made: Callable[[Path], object] | None = None,
    **choices: Any,
) -> list[Path]:
    """Make a clip of each prior with each prompt, in a folder with a page; clips that exist are kept.

    Names, warnings and the page are those of infer_from_prior.py. Either continues a sweep that the other
    began.

    Args:
        pipe: any WanVideoPipeline; or the Model that `load` returns; or LoadOptions, with which a model is
            loaded only if a clip is missing, on a cluster by the workers alone.
        priors: one `Prior` or folder, or several.
        prompts: one text, or several. A mapping, like a line of --prompts_file, also sets options of one
            clip: {"prompt": "she speaks", "num_steps": 4}. None: each prior's own prompt.
        output_dir: the folder of the clips; None: one in the first prior's outputs, named after all choices.
        nearest: let each clip follow the nearest of the priors that share image, size, seed and settings.
        preview: write a moving preview beside each clip while it is made.
        ray, workers: see `generate_priors`.
        on_made: called with the path of each clip that is written.
        choices: options of all clips, as `infer_from_prior` takes them: steps, num_steps, start_step,
            cfg_scale, negative_prompt, fps, ...

    Returns:
        The .mp4 of each prior and prompt, in this order. The .json of each is beside it.

    Raises:
        InputError: a choice is invalid, or no prior can be used.
        RunError: some clips could not be made. The others exist, and the same call tries only these again.
    """
    model, options = model_and_options(pipe, ray)
    wanted = [
        choices_on(options, **{**choices, **(each if isinstance(each, Mapping) else {"prompt": each})})
        for each in as_list(prompts)
    ]
    if not wanted:
        raise InputError("prompts: give at least one")
    directories = [each.directory if isinstance(each, Prior) else Path(each) for each in as_list(priors)]
    if not directories:
        raise InputError("priors: give at least one")

    @contextlib.contextmanager
    def page(folder: Path, names: Iterable[str]) -> Iterator[Callable[[Path, Any], None]]:
        with running_page(folder, list(names)) as add:

            def add_and_report(path: Path, frames: Any) -> None:
                add(path, frames)
                if on_made is not None:
                    on_made(path)

            yield add_and_report

    with contextlib.redirect_stdout(sys.stderr):
        sweep = plan_sweep(
            directories,
            wanted,
            output_dir=None if output_dir is None else Path(output_dir),
            is_sweep=True,
            nearest=nearest,
            preview=preview,
            any_model=options.model == OWN_PIPELINE,
        )
        with cluster_of(ray if sweep.missing else None, workers) as cluster:
            machine = (
                ThisProcess(options.device, model)
                if cluster is None
                else ClipCluster(cluster, options.device)
            )
            make_sweep(sweep, machine, vram=options.vram, model_dir=options.model_dir, page=page)
    return [job.path for job in sweep.jobs]


def model_and_options(
    pipe: WanVideoPipeline | Model | LoadOptions, ray: str | None
) -> tuple[Model | None, LoadOptions]:
    """Return the loaded model, or None, and the options that it was or will be loaded with.

    Raises:
        InputError: the workers of a cluster can't load this pipeline.
    """
    if isinstance(pipe, LoadOptions):
        return None, pipe
    model = model_of(pipe)
    if ray is None:
        return model, model.options
    if model.options.model == OWN_PIPELINE:
        raise InputError(
            "ray: workers load a model by its name; pass a model of step_skip.load, or LoadOptions"
        )
    return None, model.options


@contextlib.contextmanager
def cluster_of(ray: str | None, workers: int | None) -> Iterator[Cluster | None]:
    """Yield the Ray cluster at an address, or None without an address."""
    if ray is None:
        yield None
        return
    with connected(ray, workers=workers) as cluster:
        yield cluster


def as_list(given: T | Iterable[T]) -> list[T]:
    """Return a single value, or several, as a list."""
    if given is None or isinstance(given, str | int | Path | Prior | Mapping):
        return [given]  # type: ignore[list-item]
    return list(given)
