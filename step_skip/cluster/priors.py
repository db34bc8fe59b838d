"""Make many priors on a Ray cluster: the driver reads images and writes priors; see cluster/driver.py."""

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

from step_skip.cluster.driver import Cluster, Driver, Worker, WorkItem, picklable_error
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
class FinishedPrior:
    """A prior as a worker returns it: the contents of its files."""

    files: dict[str, bytes]  # by name
    warnings: list[str]

    def save(self, output_dir: Path, run_id: str | None, *, name: str) -> Prior:
        """Write the prior into a temporary folder and rename it; see `create_run_dir` for its name."""
        temporary_dir = output_dir / f"{TEMPORARY_PREFIX}{secrets.token_hex(8)}_prior"
        temporary_dir.mkdir()
        for file, content in self.files.items():
            if file != METADATA_FILE:
                with replacing(temporary_dir / file) as temporary:
                    temporary.write_bytes(content)
        directory, run_id = create_run_dir(output_dir, run_id, name=name)
        metadata = json.loads(self.files[METADATA_FILE])
        write_json(temporary_dir / METADATA_FILE, sealed(metadata | {"run_id": run_id}))
        temporary_dir.replace(directory)  # the target is an empty folder
        return read_prior(directory)


class PriorWorker(Worker):
    """A worker that makes priors."""

    def make(
        self,
        pictures: Mapping[str, Picture],
        prompt: str,
        choices: PriorChoices,
        input_video: list[Image] | None,
    ) -> FinishedPrior | Exception:
        """Make one prior; see `generate_prior`."""
        try:
            with collecting_warnings() as warnings, tempfile.TemporaryDirectory() as folder:
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
                files = {path.name: path.read_bytes() for path in prior.directory.iterdir()}
                return FinishedPrior(files, warnings)
        except JOB_ERRORS as error:
            return picklable_error(error)


@contextlib.contextmanager
def collecting_warnings() -> Iterator[list[str]]:
    """Collect the warnings of the package in a list, which the driver logs."""
    collected: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: collected.append(record.getMessage())  # type: ignore[method-assign]
    package = logging.getLogger("step_skip")
    package.addHandler(handler)
    try:
        yield collected
    finally:
        package.removeHandler(handler)


# --- the driver ---------------------------------------------------------------------------------------------


@dataclass
class PriorCluster:
    """A machine that makes priors on the workers of a cluster; see `sweep.make_priors.PriorMachine`.

    Args:
        device: the device of each worker; None: CUDA if the cluster has GPUs.
    """

    cluster: Cluster
    device: str | None = None

    def device_of(self, options: LoadOptions) -> str:
        """Return the device of each worker."""
        return self.cluster.device(options.model, self.device)

    def make(self, run: PriorRun) -> None:
        """Make the prior of every job on the workers.

        Raises:
            InputError: weights are missing, or another run on a cluster writes to the folder.
            RunError: weights could not be downloaded, or workers are lost again and again.
        """
        run.output_dir.mkdir(parents=True, exist_ok=True)
        with locked(run.output_dir):
            for leftover in run.output_dir.iterdir():
                if LEFTOVER.fullmatch(leftover.name) and not leftover.is_symlink():
                    shutil.rmtree(leftover)
            items = Priors(run).work_items()
            driver = Driver(self.cluster, PriorWorker, run.options, run.components, items)
            driver.run("prior", len(run.jobs), cost=sum(map(cost_of, run.jobs)))


class Priors:
    """The priors to make, as work for a cluster."""

    def __init__(self, run: PriorRun):
        self.run = run
        self.names: dict[PriorJob, str] = {}  # given in the order of the jobs, not in that of the results

    def work_items(self) -> Iterator[WorkItem]:
        """Yield every job; its images are decoded just before."""
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
            yield WorkItem(cost, send, functools.partial(self.save, job), functools.partial(self.fail, job))

    def save(self, job: PriorJob, finished: FinishedPrior) -> None:
        """Write a prior."""
        prior = finished.save(self.run.output_dir, job.run_id, name=self.names[job])
        job.directory = prior.directory
        if self.run.on_made is not None:
            self.run.on_made(prior, len(prior.metadata.seconds_per_step))

    def fail(self, job: PriorJob, error: Exception) -> None:
        """Note why a prior can't be made."""
        job.error = error
        log.warning(describe_failure(job))


def sender(*arguments: Any) -> Callable[[Any], Any]:
    """Return a function that sends the job with these arguments to a worker."""
    return lambda worker: worker.make.remote(*arguments)
