"""Many videos on many GPUs, by Ray: the driver plans, reads priors and writes every file, workers compute.

A worker is an actor with a model of its own, as long as there are jobs. It is given tensors and gives a
video's bytes back, so that priors and videos need to be only where the command runs; the weights are where
each worker is. A worker that is lost costs the clip in hand, which another makes; the driver starts its
replacement itself, because a call to an actor that Ray restarts may wait forever.

Importing this module needs no Ray.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import socket
import tempfile
from collections import Counter, deque
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from step_skip.contexts import ContextStore, kept_context_path
from step_skip.cost import expected_seconds_of_each
from step_skip.files import InputError, RunError, replacing, write_json
from step_skip.infer import make_clip
from step_skip.inputs import let_go, own_contexts, unheld_texts, unknown_texts
from step_skip.jobs import JOB_ERRORS, check_weights, components_of, read_group, save_clip
from step_skip.loading import Model, load_components, pick_device
from step_skip.models import LoadOptions
from step_skip.prior import Prior
from step_skip.sweep import Group, Inputs, Job, all_jobs
from step_skip.tell import doubts_of

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image

    from step_skip.jobs import OnMade

log = logging.getLogger(__name__)

LOCAL: Final = "local"  # an address: a cluster of this machine, for as long as the command runs
HERE: Final = "auto"  # an address: the cluster that this machine is part of
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
        address: LOCAL, HERE, or one that `ray.init` takes.
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


@dataclass
class MadeClip:
    """A video as a worker gives it back: its file, and what is written beside it."""

    video: bytes
    frames: list[Image]  # the first, the middle and the last
    report: dict[str, Any]
    forwards: int
    seconds: dict[str, float]
    doubts: list[str] = field(default_factory=list)

    def save(self, path: Path, *, overwrite: bool = False) -> None:
        """Write both, as `Clip.save` does."""
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path, overwrite=overwrite) as temporary:
            temporary.write_bytes(self.video)
        write_json(path.with_suffix(".json"), self.report | {"seconds": self.seconds}, overwrite=overwrite)


class Worker:
    """A model, and what makes videos on it. What goes wrong is returned, so that it arrives as it was."""

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

    def make(
        self, group: Group, inputs: Sequence[Inputs], texts: Sequence[str], *contexts: torch.Tensor
    ) -> MadeClip | Exception:
        """Make one video.

        Args:
            group: with this job alone, and without its inputs.
            inputs: those of its members.
            texts: the prompts whose contexts the priors don't hold, which follow.
        """
        try:
            if self.model is None:
                raise RunError("the worker has no model")
            for member, given in zip(group.members, inputs, strict=True):
                member.inputs = given
            own_contexts(group)
            group.inputs.contexts |= zip(texts, contexts, strict=True)
            clip = make_clip(group, group.jobs[0].plan, self.model, progress=False)
            with tempfile.TemporaryDirectory() as folder:
                path = clip.save(Path(folder) / "clip.mp4")
                doubts = list(doubts_of(group, device=self.model.options.device))
                few = [clip.frames[place] for place in (0, (len(clip.frames) - 1) // 2, -1)]
                return MadeClip(
                    path.read_bytes(), few, clip.report_of(path), clip.forwards, clip.seconds, doubts
                )
        except JOB_ERRORS as error:
            return plain_error(error)


def plain_error(error: Exception) -> Exception:
    """An error that any process can read, without what torch or the system hung onto it."""
    kind = InputError if isinstance(error, InputError) else RunError
    return kind(str(error) or type(error).__name__)


def encode_texts(options: LoadOptions, texts: Sequence[str]) -> dict[str, torch.Tensor] | Exception:
    """The contexts of prompts, by a text encoder that goes when this process does."""
    from step_skip.pipeline import encode_prompt

    try:
        model = load_components(options, ["text_encoder"])
        return {text: encode_prompt(model.pipe, text).cpu() for text in texts}
    except JOB_ERRORS as error:
        return plain_error(error)


# --- the driver ---------------------------------------------------------------------------------------------


@dataclass
class Given:
    """A prior whose jobs are at hand: its tensors in Ray's store until the last of them is done."""

    group: Group
    inputs: Any  # of its members, a reference
    left: int


def run_on_cluster(
    groups: Sequence[Group],
    cluster: Cluster,
    *,
    options: LoadOptions,
    contexts: Path | None = None,
    on_made: OnMade | None = None,
) -> dict[Path, Exception]:
    """Make every video on the workers of a cluster; see `jobs.run_jobs`, which does the same in one process.

    Raises:
        InputError: weights that are missing, or are those that no prior was made with.
        RunError: weights that could not be fetched, or workers that are lost again and again.
    """
    import ray

    store = ContextStore(contexts)
    components = [name for name in components_of(groups, store) if name != "text_encoder"]
    encode_first(groups, cluster, options, store)
    run = Run(groups, cluster, options, components, store, on_made)
    try:
        run.to_the_end()
    finally:
        for worker in run.workers:
            ray.kill(worker)
    return run.failed


def encode_first(
    groups: Sequence[Group], cluster: Cluster, options: LoadOptions, store: ContextStore
) -> None:
    """Encode each prompt once, in one task: its process ends with it, and with it the text encoder."""
    import ray

    unknown = {text: group.prior for group in groups for text in unknown_texts(group, store)}
    if not unknown:
        return
    log.info(f"encoding {len(unknown)} prompts on the cluster ...")
    task = ray.remote(max_calls=1, **cluster.resources(options.device))(encode_texts)
    found = ray.get(task.remote(options, list(unknown)))
    if isinstance(found, Exception):
        raise found
    for group in groups:
        for text in unknown_texts(group, store):
            store.encode(group.prior, text, found.__getitem__)


class Run:
    """The jobs of one model on a cluster, from the first to the last."""

    def __init__(
        self,
        groups: Sequence[Group],
        cluster: Cluster,
        options: LoadOptions,
        components: Collection[str],
        store: ContextStore,
        on_made: OnMade | None,
    ):
        self.on_made = on_made
        self.groups, self.cluster, self.options, self.store = groups, cluster, options, store
        self.components = list(components)
        self.failed: dict[Path, Exception] = {}
        self.workers: list[Any] = []
        self.pending: dict[Any, tuple[Any, Given | None, Job | None]] = {}  # by reference; no job: it loads
        self.again: deque[tuple[Given, Job]] = deque()  # whose worker was lost
        self.losses: Counter[Path] = Counter()
        self.idle_losses = 0
        self.fingerprint: Mapping[str, str] | None = None
        self.told: set[str] = set()
        self.contexts: dict[Path, Any] = {}  # references, by where each is kept
        self.turns = self.all_turns()

    def to_the_end(self) -> None:
        """Start workers, give each a job whenever it has none, and write what comes back."""
        import ray
        from tqdm import tqdm

        jobs = all_jobs(self.groups)
        costs = expected_seconds_of_each(jobs) or [job.plan.forwards + 1 for job in jobs]
        cost_of = {id(job): cost for job, cost in zip(jobs, costs, strict=True)}
        for _ in range(min(self.cluster.workers, len(jobs))):
            self.start_worker()
        bar_format = "{desc}{percentage:3.0f}%|{bar}| {elapsed}<{remaining}{postfix}"
        done = 0
        with tqdm(total=sum(costs), smoothing=0, bar_format=bar_format) as bar:
            while self.pending:
                [reference], _ = ray.wait(list(self.pending))
                worker, given, job = self.pending.pop(reference)
                if self.settle(reference, worker, given, job) and job is not None:
                    done += 1
                    minutes = max(bar.format_dict["elapsed"], 1e-9) / 60
                    bar.set_description(f"video {done} of {len(jobs)}", refresh=False)
                    bar.set_postfix_str(f", {done / minutes:.1f} a minute", refresh=False)
                    bar.update(cost_of[id(job)])

    def settle(self, reference: Any, worker: Any, given: Given | None, job: Job | None) -> bool:
        """Take what a worker gave back, and give it the next job; False: the worker was lost."""
        import ray

        try:
            result = ray.get(reference)
        except ray.exceptions.RayError as error:
            self.lose(worker, given, job, error)
            return False
        if given is None or job is None:
            self.take_model(result)
        else:
            self.take_clip(result, job)
            self.finish(given)
        self.give_work(worker)
        return True

    def start_worker(self) -> None:
        """Start a worker, which begins with loading its model."""
        import ray

        actor = ray.remote(max_restarts=0, **self.cluster.resources(self.options.device))(Worker)
        worker = actor.remote(self.options, self.components, self.cluster.threads)
        self.workers.append(worker)
        self.pending[worker.load.remote()] = (worker, None, None)

    def lose(self, worker: Any, given: Given | None, job: Job | None, error: Exception) -> None:
        """Go on without a worker: another takes its place, and its job, unless that is what kills them."""
        import ray

        self.workers.remove(worker)
        with contextlib.suppress(Exception):  # it may hang, not be dead
            ray.kill(worker)
        log.warning(f"a worker was lost ({str(error).splitlines()[0][:100]}); another takes its place")
        if given is not None and job is not None:
            self.losses[job.path] += 1
            if self.losses[job.path] < MOST_LOSSES:
                self.again.append((given, job))
            else:
                self.failed[job.path] = RunError(f"{MOST_LOSSES} workers were lost over it: given up")
                self.finish(given)
        else:
            self.idle_losses += 1
            if self.idle_losses == MOST_LOSSES:
                raise RunError(f"{MOST_LOSSES} workers were lost while they loaded the model")
        self.start_worker()

    def take_model(self, result: Mapping[str, str] | Exception) -> None:
        """Compare the weights that a worker loaded with those of the others, and of the priors."""
        if isinstance(result, Exception):
            raise result
        self.idle_losses = 0
        if self.fingerprint is None:
            self.failed |= check_weights(self.groups, result)
            self.fingerprint = result
        elif result != self.fingerprint:
            raise RunError("the machines of the cluster have different weights; give all the same")

    def take_clip(self, result: MadeClip | Exception, job: Job) -> None:
        """Write a video, or note why it could not be made."""
        try:
            if isinstance(result, Exception):
                raise result
            for doubt in result.doubts:
                if doubt not in self.told:
                    log.warning(doubt)
                self.told.add(doubt)
            save_clip(result, job, self.on_made)
        except JOB_ERRORS as error:
            self.failed[job.path] = error

    def give_work(self, worker: Any) -> None:
        """Let a worker make the next video; without one it ends."""
        import ray

        turn = self.again.popleft() if self.again else next(self.turns, None)
        if turn is None:
            self.workers.remove(worker)
            ray.kill(worker)
            return
        given, job = turn
        bare = dataclasses.replace(given.group, jobs=[job], inputs=Inputs())
        bare.others = [dataclasses.replace(each, jobs=[job], inputs=Inputs()) for each in given.group.others]
        texts = unheld_texts(bare)
        contexts = [self.context(bare.prior, text) for text in texts]
        self.pending[worker.make.remote(bare, given.inputs, texts, *contexts)] = (worker, given, job)

    def context(self, prior: Prior, text: str) -> Any:
        """A reference to an encoded prompt, which all its jobs share."""
        import ray

        path = kept_context_path(prior, text, self.store.folder)
        if path not in self.contexts:
            self.contexts[path] = ray.put(self.store.get(prior, text))
        return self.contexts[path]

    def finish(self, given: Given) -> None:
        """Drop a prior's tensors from Ray's store after its last job."""
        given.left -= 1
        if given.left == 0:
            given.inputs = None

    def all_turns(self) -> Iterator[tuple[Given, Job]]:
        """Every job, with the tensors of its prior, which are read when its first one's turn comes."""
        import ray

        for group in self.groups:
            jobs = [job for job in group.jobs if job.path not in self.failed]
            if not jobs:
                continue
            try:
                if group.prior.is_legacy:
                    raise InputError(f"{group.prior.directory} is of an older format: make it without --ray")
                read_group(group)
            except JOB_ERRORS as error:
                self.failed |= {job.path: error for job in jobs}
                continue
            given = Given(group, ray.put([member.inputs for member in group.members]), len(jobs))
            let_go(group)
            for job in jobs:
                yield given, job
