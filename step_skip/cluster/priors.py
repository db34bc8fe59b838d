"""Many priors on a Ray cluster: the driver reads images and writes priors; see cluster.py."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import logging
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from step_skip.cluster.driver import Cluster, Driver, Turn, Worker, plain_error
from step_skip.errors import JOB_ERRORS
from step_skip.files.writing import LEFTOVER, TEMPORARY_PREFIX, locked, replacing, write_json
from step_skip.generate.choices import PriorChoices
from step_skip.generate.generate import generate_prior
from step_skip.media.images import Picture
from step_skip.models.weights import LoadOptions
from step_skip.prior.metadata import read_prior, sealed
from step_skip.prior.prior import END_IMAGE_FILE, IMAGE_FILE, Prior
from step_skip.prior.schema import METADATA_FILE
from step_skip.prior.writer import create_run_dir, free_run_id
from step_skip.sweep.make_priors import PriorRun, cost_of, describe_failure, take_images
from step_skip.sweep.priors import PriorJob

if TYPE_CHECKING:
    from PIL.Image import Image


log = logging.getLogger(__name__)


# --- in a worker --------------------------------------------------------------------------------------------


@dataclass
class MadePrior:
    """A prior as a worker gives it back."""

    files: dict[str, bytes]  # by name
    doubts: list[str]

    def save(self, output_dir: Path, run_id: str | None, *, name: str) -> Prior:
        """Write it under its id, or after a name, as a whole; see `create_run_dir`."""
        whole = output_dir / f"{TEMPORARY_PREFIX}{secrets.token_hex(8)}_prior"
        whole.mkdir()
        for file, content in self.files.items():
            if file != METADATA_FILE:
                with replacing(whole / file) as temporary:
                    temporary.write_bytes(content)
        directory, run_id = create_run_dir(output_dir, run_id, name=name)
        metadata = json.loads(self.files[METADATA_FILE])
        write_json(whole / METADATA_FILE, sealed(metadata | {"run_id": run_id}))
        whole.replace(directory)  # which is empty
        return read_prior(directory)


class PriorWorker(Worker):
    """Makes priors."""

    def make(
        self,
        pictures: Mapping[str, Picture],
        prompt: str,
        choices: PriorChoices,
        input_video: list[Image] | None,
    ) -> MadePrior | Exception:
        """Make one prior; see `generate_prior`."""
        try:
            with kept_warnings() as doubts, tempfile.TemporaryDirectory() as folder:
                prior = generate_prior(
                    self.loaded,
                    pictures.get(IMAGE_FILE),
                    prompt,
                    end_image=pictures.get(END_IMAGE_FILE),
                    output_dir=folder,
                    run_id="made",
                    input_video=input_video,
                    progress=False,
                    **dataclasses.asdict(choices),
                )
                return MadePrior({path.name: path.read_bytes() for path in prior.directory.iterdir()}, doubts)
        except JOB_ERRORS as error:
            return plain_error(error)


@contextlib.contextmanager
def kept_warnings() -> Iterator[list[str]]:
    """What the package warns of, to be told where somebody reads it."""
    kept: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: kept.append(record.getMessage())  # type: ignore[method-assign]
    package = logging.getLogger("step_skip")
    package.addHandler(handler)
    try:
        yield kept
    finally:
        package.removeHandler(handler)


# --- the driver ---------------------------------------------------------------------------------------------


@dataclass
class PriorCluster:
    """The workers of a cluster as a machine that makes priors; see `sweep.make_priors.PriorMachine`.

    Args:
        device: of each worker; None: CUDA where the cluster has GPUs.
    """

    cluster: Cluster
    device: str | None = None

    def device_of(self, options: LoadOptions) -> str:
        """Return the device of each worker."""
        return self.cluster.device(options.model, self.device)

    def make(self, run: PriorRun) -> None:
        """Make the prior of every job on the workers.

        Raises:
            InputError: weights that are missing; or another run on a cluster writes to the folder.
            RunError: weights that could not be fetched, or workers that are lost again and again.
        """
        run.output_dir.mkdir(parents=True, exist_ok=True)
        with locked(run.output_dir):
            for leftover in run.output_dir.iterdir():
                if LEFTOVER.fullmatch(leftover.name) and not leftover.is_symlink():
                    shutil.rmtree(leftover)
            turns = Priors(run).turns()
            driver = Driver(self.cluster, PriorWorker, run.options, run.components, turns)
            driver.run("prior", len(run.jobs), cost=sum(map(cost_of, run.jobs)))


class Priors:
    """The priors to make, as turns on a cluster."""

    def __init__(self, run: PriorRun):
        self.run = run
        self.names: dict[PriorJob, str] = {}  # in the order of the jobs, in whichever they are done

    def turns(self) -> Iterator[Turn]:
        """Yield every job, with its images, which are decoded when its turn comes."""
        for job in self.run.jobs:
            cost = cost_of(job)
            try:
                choices, pictures = take_images(job, self.run.options, self.run.family)
                video = self.run.input_video(job)
            except JOB_ERRORS as error:
                self.fail(job, error)
                continue
            self.names[job] = free_run_id(self.run.output_dir, job.base, taken=self.names.values())
            send = sender(pictures, job.prompt, choices, video)
            yield Turn(cost, send, functools.partial(self.take, job), functools.partial(self.fail, job))

    def take(self, job: PriorJob, made: MadePrior) -> None:
        """Write a prior."""
        prior = made.save(self.run.output_dir, job.run_id, name=self.names[job])
        job.directory = prior.directory
        if self.run.on_made is not None:
            self.run.on_made(prior, len(prior.metadata.seconds_per_step))

    def fail(self, job: PriorJob, error: Exception) -> None:
        """Note why a prior can't be made."""
        job.error = error
        log.warning(describe_failure(job))


def sender(*arguments: Any) -> Callable[[Any], Any]:
    """Return what lets a worker make a prior."""
    return lambda worker: worker.make.remote(*arguments)
