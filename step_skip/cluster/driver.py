"""Run many jobs on many GPUs by Ray: the driver plans, reads and writes every file, workers compute.

A worker is an actor that holds a model of its own while there are jobs. It receives tensors or images and
returns bytes, so that priors, images and clips are needed only on the machine that runs the command. The
weights are needed on every machine with a worker. If a worker is lost, another one runs its job again. The
driver starts the replacement itself, because a call to an actor that Ray restarts may wait forever.

The jobs are those of cluster/clips.py and cluster/priors.py. Importing this module needs no Ray.
"""

from __future__ import annotations

import contextlib
import logging
import socket
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from step_skip.errors import JOB_ERRORS, InputError, RunError
from step_skip.models.loading import Model, load_components
from step_skip.models.machine import pick_device
from step_skip.models.weights import LoadOptions
from step_skip.sweep.progress import Progress

log = logging.getLogger(__name__)

MAX_LOSSES = 3  # workers lost to one job, or one after the other before any has loaded the model


@dataclass(frozen=True)
class Cluster:
    """A connected Ray cluster."""

    workers: int
    gpus: int
    threads: int  # of each worker on a CPU; the last bits of a result depend on their number

    def device(self, model: str, device: str | None) -> str:
        """Return the device of each worker; the driver needs none.

        Raises:
            InputError: see `pick_device`.
        """
        if device is None and self.gpus:
            return "cuda"
        if (device or "").startswith("cuda"):
            if not self.gpus:
                raise InputError(f"--device {device}: the Ray cluster has no GPU; use --device cpu")
            return "cuda"  # a worker sees only its own GPU
        return pick_device(model, device)

    def resources(self, device: str) -> dict[str, Any]:
        """Return the resources that Ray reserves for each worker, as arguments of `ray.remote`."""
        environment = {"OMP_NUM_THREADS": str(self.threads)}
        gpus = 1 if device == "cuda" else 0
        return {"num_cpus": 1, "num_gpus": gpus, "runtime_env": {"env_vars": environment}}


@contextlib.contextmanager
def connected(address: str, *, workers: int | None) -> Iterator[Cluster]:
    """Connect to a Ray cluster, or start one on this machine.

    Args:
        address: "local" (a cluster on this machine, for as long as the command runs), "auto" (the cluster
            that this machine belongs to), or an address that `ray.init` accepts.
        workers: the maximum number of workers; None: one for each GPU, without GPUs one for each CPU.

    Raises:
        InputError: Ray is not installed, or there is no cluster at the address.
    """
    try:
        import ray
    except ImportError as error:
        raise InputError("--ray needs Ray, which is not installed; run pip install .[ray]") from error
    import torch

    check_address(address)
    try:
        ray.init(address=address, log_to_driver=False, configure_logging=False, include_dashboard=None)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise connection_error(address, error) from error
    try:
        found = ray.cluster_resources()
        gpus, cpus = int(found.get("GPU", 0)), int(found.get("CPU", 1))
        yield Cluster(min(workers or gpus or cpus, gpus or cpus), gpus, torch.get_num_threads())
    finally:
        ray.shutdown()


def check_address(address: str) -> None:
    """Refuse an address at which nothing answers; Ray itself would try for minutes.

    Raises:
        InputError: nothing answers at the address.
    """
    host, colon, port = address.rpartition(":")
    if not (colon and port.isdecimal()) or "://" in address:
        return
    try:
        socket.create_connection((host, int(port)), timeout=5).close()
    except (OSError, OverflowError) as error:
        raise connection_error(address, error) from error


def connection_error(address: str, error: Exception) -> InputError:
    """Return the error for a cluster that can't be reached."""
    return InputError(
        f"--ray {address}: no cluster answers ({str(error).splitlines()[0][:100]}); start one with "
        "ray start --head, or use --ray local"
    )


# --- in a worker --------------------------------------------------------------------------------------------


class Worker:
    """An actor with a model; subclasses add `make`. Its methods return errors instead of raising them."""

    def __init__(self, options: LoadOptions, components: Sequence[str], threads: int):
        import torch

        torch.set_num_threads(threads)
        self.options, self.components = options, components
        self.model: Model | None = None

    def load(self) -> dict[str, str] | Exception:
        """Load the model and return the fingerprints of its files."""
        try:
            self.model = load_components(self.options, self.components)
        except JOB_ERRORS as error:
            return picklable_error(error)
        return dict(self.model.fingerprint)

    @property
    def loaded(self) -> Model:
        """The loaded model.

        Raises:
            RunError: no model is loaded.
        """
        if self.model is None:
            raise RunError("the worker has no model")
        return self.model


def picklable_error(error: Exception) -> Exception:
    """Return an error with the same message that any process can unpickle."""
    kind = InputError if isinstance(error, InputError) else RunError
    return kind(str(error) or type(error).__name__)


# --- the driver ---------------------------------------------------------------------------------------------


@dataclass(eq=False)
class WorkItem:
    """A job that is ready for a worker, and how to send it and to handle its result."""

    cost: float  # relative to the other jobs
    send: Callable[[Any], Any]  # sends the job to a worker and returns a reference to its result
    save: Callable[[Any], object]  # writes the result
    fail: Callable[[Exception], object]  # notes why the job can't be done
    losses: int = 0  # the number of workers that were lost while they ran it


class Driver:
    """The driver of all jobs that need the same model.

    Args:
        worker_class: the class of the workers.
        components: the parts of the model that each worker loads.
        items: the jobs; the next one is read when a worker is free.
        on_model: called with the fingerprints of the weights, once the first worker has loaded them.
    """

    def __init__(
        self,
        cluster: Cluster,
        worker_class: type[Worker],
        options: LoadOptions,
        components: Collection[str],
        items: Iterator[WorkItem],
        *,
        on_model: Callable[[Mapping[str, str]], object] = lambda fingerprint: None,
    ):
        self.cluster, self.worker_class = cluster, worker_class
        self.options, self.on_model = options, on_model
        self.components = list(components)
        self.items: Iterator[WorkItem] | None = items  # None: all were read
        self.retries: deque[WorkItem] = deque()  # jobs whose worker was lost
        self.workers: list[Any] = []
        self.pending: dict[Any, tuple[Any, WorkItem | None]] = {}  # by reference: worker, job; None: it loads
        self.idle_losses = 0
        self.fingerprint: Mapping[str, str] | None = None
        self.logged: set[str] = set()  # warnings

    def run(self, what: str, number: int, *, cost: float) -> None:
        """Start the workers, send each a job whenever it is free, and write the results.

        Args:
            what: the name of a job in the progress bar, "clip" for example.
            number: the number of jobs.
            cost: the cost of all jobs together.

        Raises:
            InputError: weights are missing; or what `on_model` raises.
            RunError: weights could not be downloaded, or workers are lost again and again.
        """
        import ray

        try:
            for _ in range(min(self.cluster.workers, number)):
                self.start_worker()
            with Progress(what, number, cost=cost) as progress:
                while self.has_work:
                    [reference], _ = ray.wait(list(self.pending))
                    worker, item = self.pending.pop(reference)
                    if self.handle_result(reference, worker, item) and item is not None:
                        progress.add(item.cost)
        finally:
            for worker in self.workers:
                ray.kill(worker)

    @property
    def has_work(self) -> bool:
        """Whether jobs are left to send or to finish; workers that are still loading don't count."""
        is_running = any(item is not None for _, item in self.pending.values())
        return is_running or bool(self.pending and (self.retries or self.items is not None))

    def handle_result(self, reference: Any, worker: Any, item: WorkItem | None) -> bool:
        """Take the result of a worker and send it the next job; return False if the worker was lost."""
        import ray

        try:
            result = ray.get(reference)
        except ray.exceptions.RayError as error:
            self.replace_worker(worker, item, error)
            return False
        if item is None:
            self.check_model(result)
        else:
            self.save_result(result, item)
        self.send_next(worker)
        return True

    def start_worker(self) -> None:
        """Start a worker and let it load its model."""
        import ray

        resources = self.cluster.resources(self.options.device)
        actor = ray.remote(max_restarts=0, **resources)(self.worker_class)
        worker = actor.remote(self.options, self.components, self.cluster.threads)
        self.workers.append(worker)
        self.pending[worker.load.remote()] = (worker, None)

    def replace_worker(self, worker: Any, item: WorkItem | None, error: Exception) -> None:
        """Replace a lost worker and retry its job, unless MAX_LOSSES workers were lost to it."""
        import ray

        self.workers.remove(worker)
        with contextlib.suppress(Exception):  # the worker may hang and still be alive
            ray.kill(worker)
        log.warning(f"a worker was lost ({str(error).splitlines()[0][:100]}); another is started")
        if item is None:
            self.idle_losses += 1
            if self.idle_losses == MAX_LOSSES:
                raise RunError(
                    f"{MAX_LOSSES} workers were lost while they loaded the model; see the cluster's logs"
                )
        else:
            item.losses += 1
            if item.losses < MAX_LOSSES:
                self.retries.append(item)
            else:
                item.fail(RunError(f"{MAX_LOSSES} workers were lost while they ran this job: given up"))
        self.start_worker()

    def check_model(self, result: Mapping[str, str] | Exception) -> None:
        """Compare the weights that a worker loaded with those of the others."""
        if isinstance(result, Exception):
            raise result
        self.idle_losses = 0
        if self.fingerprint is None:
            self.on_model(result)
            self.fingerprint = result
        elif result != self.fingerprint:
            raise RunError("the machines of the cluster have different weights; copy the same weights to all")

    def save_result(self, result: Any, item: WorkItem) -> None:
        """Write a result and log its warnings, or note why the job failed."""
        try:
            if isinstance(result, Exception):
                raise result
            for warning in result.warnings:
                if warning not in self.logged:
                    log.warning(warning)
                self.logged.add(warning)
            item.save(result)
        except JOB_ERRORS as error:
            item.fail(error)

    def send_next(self, worker: Any) -> None:
        """Send a worker the next job; if there is none, end the worker."""
        import ray

        if self.retries:
            item: WorkItem | None = self.retries.popleft()
        else:
            item = None if self.items is None else next(self.items, None)
        if item is None:
            self.items = None
            self.workers.remove(worker)
            ray.kill(worker)
        else:
            self.pending[item.send(worker)] = (worker, item)
