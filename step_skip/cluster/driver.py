"""Many jobs on many GPUs, by Ray: the driver plans, reads and writes every file, workers compute.

A worker is an actor with a model of its own, as long as there are jobs. It is given tensors or images and
gives bytes back, so that priors, images and videos need to be only where the command runs; the weights are
where each worker is. A worker that is lost costs the job in hand, which another does; the driver starts its
replacement itself, because a call to an actor that Ray restarts may wait forever.

What a job is stands in cluster_videos.py and cluster_priors.py. Importing this module needs no Ray.
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

MOST_LOSSES = 3  # of workers by one job, or one after the other before any has a model


@dataclass(frozen=True)
class Cluster:
    """A Ray cluster that is connected."""

    workers: int
    gpus: int
    threads: int  # of each worker on a CPU: the last bits depend on them

    def device(self, model: str, device: str | None) -> str:
        """The device of each worker; the driver needs none.

        Raises:
            InputError: see `pick_device`.
        """
        if device is None and self.gpus:
            return "cuda"
        if (device or "").startswith("cuda"):
            if not self.gpus:
                raise InputError(f"--device {device}: the Ray cluster has no GPU; use --device cpu")
            return "cuda"  # a worker sees one
        return pick_device(model, device)

    def resources(self, device: str) -> dict[str, Any]:
        """What Ray is asked for each worker."""
        environment = {"OMP_NUM_THREADS": str(self.threads)}
        gpus = 1 if device == "cuda" else 0
        return {"num_cpus": 1, "num_gpus": gpus, "runtime_env": {"env_vars": environment}}


@contextlib.contextmanager
def connected(address: str, *, workers: int | None) -> Iterator[Cluster]:
    """Connect to a cluster, or start one of this machine.

    Args:
        address: "local" (a cluster of this machine, for as long as the command runs), "auto" (the cluster
            that this machine is part of), or one that `ray.init` takes.
        workers: at most so many; None: one for each GPU, without any one for each CPU.

    Raises:
        InputError: no Ray, or no cluster.
    """
    try:
        import ray
    except ImportError as error:
        raise InputError("--ray needs Ray, which is not installed: pip install .[ray]") from error
    import torch

    check_address(address)
    try:
        ray.init(address=address, log_to_driver=False, configure_logging=False, include_dashboard=None)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise no_cluster(address, error) from error
    try:
        there = ray.cluster_resources()
        gpus, cpus = int(there.get("GPU", 0)), int(there.get("CPU", 1))
        yield Cluster(min(workers or gpus or cpus, gpus or cpus), gpus, torch.get_num_threads())
    finally:
        ray.shutdown()


def check_address(address: str) -> None:
    """Refuse an address at which nothing answers: Ray itself would try for minutes.

    Raises:
        InputError: nothing does.
    """
    host, colon, port = address.rpartition(":")
    if not (colon and port.isdecimal()) or "://" in address:
        return
    try:
        socket.create_connection((host, int(port)), timeout=5).close()
    except (OSError, OverflowError) as error:
        raise no_cluster(address, error) from error


def no_cluster(address: str, error: Exception) -> InputError:
    """What is said where a cluster can't be reached."""
    return InputError(
        f"--ray {address}: no cluster there ({str(error).splitlines()[0][:100]}); start one with "
        "ray start --head, or use --ray local"
    )


# --- in a worker --------------------------------------------------------------------------------------------


class Worker:
    """A model, and in subclasses what is made on it by `make`. What goes wrong is returned, as it was."""

    def __init__(self, options: LoadOptions, components: Sequence[str], threads: int):
        import torch

        torch.set_num_threads(threads)
        self.options, self.components = options, components
        self.model: Model | None = None

    def load(self) -> dict[str, str] | Exception:
        """Load the model; returns the fingerprints of its files."""
        try:
            self.model = load_components(self.options, self.components)
        except JOB_ERRORS as error:
            return plain_error(error)
        return dict(self.model.fingerprint)

    @property
    def loaded(self) -> Model:
        """The model."""
        if self.model is None:
            raise RunError("the worker has no model")
        return self.model


def plain_error(error: Exception) -> Exception:
    """An error that any process can read, without what torch or the system hung onto it."""
    kind = InputError if isinstance(error, InputError) else RunError
    return kind(str(error) or type(error).__name__)


# --- the driver ---------------------------------------------------------------------------------------------


@dataclass(eq=False)
class Turn:
    """A job that is at hand."""

    cost: float  # beside the others'
    send: Callable[[Any], Any]  # gives it to a worker; returns a reference to what comes back
    take: Callable[[Any], object]  # writes what came back
    fail: Callable[[Exception], object]  # notes why it can't be done
    losses: int = 0  # of workers by it


class Driver:
    """The jobs of one model on a cluster, from the first to the last.

    Args:
        kind: of worker.
        components: of the model, that each worker loads.
        turns: the jobs; one is asked for when a worker has nothing to do.
        on_model: called with the fingerprints of the weights, when the first worker has loaded them.
    """

    def __init__(
        self,
        cluster: Cluster,
        kind: type[Worker],
        options: LoadOptions,
        components: Collection[str],
        turns: Iterator[Turn],
        *,
        on_model: Callable[[Mapping[str, str]], object] = lambda fingerprint: None,
    ):
        self.cluster, self.kind, self.options, self.on_model = cluster, kind, options, on_model
        self.components = list(components)
        self.turns: Iterator[Turn] | None = turns  # None: there are no more
        self.again: deque[Turn] = deque()  # whose worker was lost
        self.workers: list[Any] = []
        self.pending: dict[Any, tuple[Any, Turn | None]] = {}  # by reference; no turn: it loads
        self.idle_losses = 0
        self.fingerprint: Mapping[str, str] | None = None
        self.told: set[str] = set()

    def run(self, what: str, number: int, *, cost: float) -> None:
        """Start workers, give each a job whenever it has none, and write what comes back.

        Args:
            what: a job is called, "video" for example.
            number: of jobs.
            cost: of all together.

        Raises:
            InputError: weights that are missing; or what `on_model` raises.
            RunError: weights that could not be fetched, or workers that are lost again and again.
        """
        import ray

        try:
            for _ in range(min(self.cluster.workers, number)):
                self.start_worker()
            with Progress(what, number, cost=cost) as progress:
                while self.has_work:
                    [reference], _ = ray.wait(list(self.pending))
                    worker, turn = self.pending.pop(reference)
                    if self.settle(reference, worker, turn) and turn is not None:
                        progress.add(turn.cost)
        finally:
            for worker in self.workers:
                ray.kill(worker)

    @property
    def has_work(self) -> bool:
        """Whether anything is left to do or to come back; workers that still load are not waited for."""
        at_work = any(turn is not None for _, turn in self.pending.values())
        return at_work or bool(self.pending and (self.again or self.turns is not None))

    def settle(self, reference: Any, worker: Any, turn: Turn | None) -> bool:
        """Take what a worker gave back, and give it the next job; False: the worker was lost."""
        import ray

        try:
            result = ray.get(reference)
        except ray.exceptions.RayError as error:
            self.lose(worker, turn, error)
            return False
        if turn is None:
            self.take_model(result)
        else:
            self.take_result(result, turn)
        self.give_work(worker)
        return True

    def start_worker(self) -> None:
        """Start a worker, which begins with loading its model."""
        import ray

        actor = ray.remote(max_restarts=0, **self.cluster.resources(self.options.device))(self.kind)
        worker = actor.remote(self.options, self.components, self.cluster.threads)
        self.workers.append(worker)
        self.pending[worker.load.remote()] = (worker, None)

    def lose(self, worker: Any, turn: Turn | None, error: Exception) -> None:
        """Go on without a worker: another takes its place, and its job, unless that is what kills them."""
        import ray

        self.workers.remove(worker)
        with contextlib.suppress(Exception):  # it may hang, not be dead
            ray.kill(worker)
        log.warning(f"a worker was lost ({str(error).splitlines()[0][:100]}); another takes its place")
        if turn is None:
            self.idle_losses += 1
            if self.idle_losses == MOST_LOSSES:
                raise RunError(f"{MOST_LOSSES} workers were lost while they loaded the model")
        else:
            turn.losses += 1
            if turn.losses < MOST_LOSSES:
                self.again.append(turn)
            else:
                turn.fail(RunError(f"{MOST_LOSSES} workers were lost over it: given up"))
        self.start_worker()

    def take_model(self, result: Mapping[str, str] | Exception) -> None:
        """Compare the weights that a worker loaded with those of the others."""
        if isinstance(result, Exception):
            raise result
        self.idle_losses = 0
        if self.fingerprint is None:
            self.on_model(result)
            self.fingerprint = result
        elif result != self.fingerprint:
            raise RunError("the machines of the cluster have different weights; give all the same")

    def take_result(self, result: Any, turn: Turn) -> None:
        """Write what was made, or note why it could not be."""
        try:
            if isinstance(result, Exception):
                raise result
            for doubt in result.doubts:
                if doubt not in self.told:
                    log.warning(doubt)
                self.told.add(doubt)
            turn.take(result)
        except JOB_ERRORS as error:
            turn.fail(error)

    def give_work(self, worker: Any) -> None:
        """Let a worker do the next job; without one it ends."""
        import ray

        turn = self.again.popleft() if self.again else None if self.turns is None else next(self.turns, None)
        if turn is None:
            self.turns = None
            self.workers.remove(worker)
            ray.kill(worker)
        else:
            self.pending[turn.send(worker)] = (worker, turn)
