"""Make many clips on a Ray cluster: the driver reads priors and writes clips; see cluster/driver.py."""

from __future__ import annotations

import functools
import logging
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from step_skip.cluster.driver import Cluster, Driver, Worker, WorkItem, picklable_error
from step_skip.errors import JOB_ERRORS, InputError
from step_skip.files.writing import replacing, write_json
from step_skip.infer.clip import make_clip
from step_skip.infer.inputs import (
    Inputs,
    Source,
    load_inputs,
    own_contexts,
    release_inputs,
    unheld_texts,
    unknown_texts,
)
from step_skip.infer.plan import Plan
from step_skip.infer.warnings import doubts_of
from step_skip.models.loading import Model, load_components
from step_skip.models.weights import LoadOptions
from step_skip.prior.checks import check_fingerprint
from step_skip.prior.contexts import ContextStore, kept_context_path
from step_skip.prior.prior import Prior
from step_skip.sweep.clips import Group, Job, all_jobs
from step_skip.sweep.cost import expected_seconds_of_each
from step_skip.sweep.make_clips import check_weights, components_of, save_clip

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image

    from step_skip.sweep.make_clips import OnMade

log = logging.getLogger(__name__)


# --- in a worker --------------------------------------------------------------------------------------------


@dataclass
class FinishedClip:
    """A clip as a worker returns it: the contents of its .mp4 file and of the JSON file beside it."""

    video: bytes
    frames: list[Image]  # the first, the middle and the last
    report: dict[str, Any]
    forwards: int
    seconds: dict[str, float]
    warnings: list[str] = field(default_factory=list)

    def save(self, path: Path, *, overwrite: bool = False) -> None:
        """Write both files, like `Clip.save`."""
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path, overwrite=overwrite) as temporary:
            temporary.write_bytes(self.video)
        write_json(path.with_suffix(".json"), self.report | {"seconds": self.seconds}, overwrite=overwrite)


class ClipWorker(Worker):
    """A worker that makes clips."""

    def make(
        self,
        bank: Sequence[Prior],
        plan: Plan,
        inputs: Sequence[Inputs],
        texts: Sequence[str],
        *contexts: torch.Tensor,
    ) -> FinishedClip | Exception:
        """Make one clip.

        Args:
            bank: the prior, or all priors of a bank.
            inputs: the inputs of each prior.
            texts: the prompts whose contexts no prior holds.
            contexts: the contexts of these prompts.
        """
        try:
            source = Source.of(bank)
            for member, given in zip(source.members, inputs, strict=True):
                member.inputs = given
            own_contexts(source, plan.texts)
            source.inputs.contexts |= zip(texts, contexts, strict=True)
            clip = make_clip(source, plan, self.loaded, progress=False)
            with tempfile.TemporaryDirectory() as folder:
                path = clip.save(Path(folder) / "clip.mp4")
                warnings = list(doubts_of(plan, source.prior, device=self.options.device))
                few = [clip.frames[index] for index in (0, (len(clip.frames) - 1) // 2, -1)]
                return FinishedClip(
                    path.read_bytes(), few, clip.report_of(path), clip.forwards, clip.seconds, warnings
                )
        except JOB_ERRORS as error:
            return picklable_error(error)


def encode_texts(options: LoadOptions, texts: Sequence[str]) -> dict[str, torch.Tensor] | Exception:
    """Return the contexts of prompts; the text encoder is released when this process ends."""
    from step_skip.pipeline.run import encode_prompt

    try:
        model = load_components(options, ["text_encoder"])
        return {text: encode_prompt(model.pipe, text).cpu() for text in texts}
    except JOB_ERRORS as error:
        return picklable_error(error)


# --- the driver ---------------------------------------------------------------------------------------------


@dataclass
class StoredInputs:
    """The tensors of a group's priors, which stay in Ray's store until the last job of the group is done."""

    group: Group
    inputs: Any  # a reference to the inputs of each prior
    jobs_left: int

    def finish_job(self) -> None:
        """Count one job as done, and release the tensors after the last one."""
        self.jobs_left -= 1
        if self.jobs_left == 0:
            self.inputs = None


@dataclass
class ClipCluster:
    """A machine that makes clips on the workers of a cluster; see `sweep.make_clips.Machine`.

    Args:
        device: the device of each worker; None: CUDA if the cluster has GPUs.
    """

    cluster: Cluster
    device: str | None = None
    model: Model | None = None
    is_here: bool = False

    def device_of(self, model: str) -> str:
        """Return the device of each worker."""
        return self.cluster.device(model, self.device)

    def make(
        self,
        groups: Sequence[Group],
        options: LoadOptions,
        *,
        contexts: Path | None = None,
        on_made: OnMade | None = None,
    ) -> dict[Path, Exception]:
        """Make every clip on the workers.

        Raises:
            InputError: weights are missing, or no prior was made with them.
            RunError: weights could not be downloaded, or workers are lost again and again.
        """
        store = ContextStore(contexts)
        components = [name for name in components_of(groups, store) if name != "text_encoder"]
        encode_missing(groups, self.cluster, options, store)
        clips = Clips(groups, store, on_made)
        items = clips.work_items()
        driver = Driver(self.cluster, ClipWorker, options, components, items, on_model=clips.check_weights)
        driver.run("clip", len(clips.costs), cost=sum(clips.costs.values()))
        return clips.failed


def encode_missing(
    groups: Sequence[Group], cluster: Cluster, options: LoadOptions, store: ContextStore
) -> None:
    """Encode each unknown prompt once, in one task, whose process ends and releases the text encoder."""
    import ray

    unknown = {text: group.prior for group in groups for text in unknown_texts(group, group.texts, store)}
    if not unknown:
        return
    log.info(f"encoding {len(unknown)} prompts on the cluster ...")
    task = ray.remote(max_calls=1, **cluster.resources(options.device))(encode_texts)
    found = ray.get(task.remote(options, list(unknown)))
    if isinstance(found, Exception):
        raise found
    for group in groups:
        for text in unknown_texts(group, group.texts, store):
            store.encode(group.prior, text, found.__getitem__)


class Clips:
    """The clips to make, as work for a cluster, and the errors of those that failed."""

    def __init__(self, groups: Sequence[Group], store: ContextStore, on_made: OnMade | None):
        jobs = all_jobs(groups)
        costs = expected_seconds_of_each(jobs) or [job.plan.forwards + 1 for job in jobs]
        self.costs = {id(job): cost for job, cost in zip(jobs, costs, strict=True)}
        self.groups, self.store, self.on_made = groups, store, on_made
        self.failed: dict[Path, Exception] = {}
        self.contexts: dict[Path, Any] = {}  # a reference to each context, by the path of its file

    def check_weights(self, found: Mapping[str, str]) -> None:
        """Compare the loaded weights with those of the priors."""
        self.failed |= check_weights(self.groups, lambda prior: check_fingerprint(prior, found))

    def work_items(self) -> Iterator[WorkItem]:
        """Yield every job; the tensors of a prior are read just before its first job."""
        import ray

        for group in self.groups:
            jobs = [job for job in group.jobs if job.path not in self.failed]
            if not jobs:
                continue
            try:
                if group.prior.is_legacy:
                    raise InputError(
                        f"{group.prior.directory} has an older format: make its clips without --ray"
                    )
                load_inputs(group, group.plans)
            except JOB_ERRORS as error:
                self.failed |= {job.path: error for job in jobs}
                continue
            stored = StoredInputs(group, ray.put([member.inputs for member in group.members]), len(jobs))
            release_inputs(group)
            for job in jobs:
                yield WorkItem(
                    self.costs[id(job)],
                    functools.partial(self.send, stored, job),
                    functools.partial(self.save, stored, job),
                    functools.partial(self.fail, stored, job),
                )

    def send(self, stored: StoredInputs, job: Job, worker: Any) -> Any:
        """Send a clip's job to a worker and return a reference to its result."""
        group = stored.group
        texts = unheld_texts(group, job.plan.texts)
        contexts = [self.context(group.prior, text) for text in texts]
        bank = [member.prior for member in group.members]
        return worker.make.remote(bank, job.plan, stored.inputs, texts, *contexts)

    def context(self, prior: Prior, text: str) -> Any:
        """Return a reference to an encoded prompt, which all jobs share."""
        import ray

        path = kept_context_path(prior, text, self.store.folder)
        if path not in self.contexts:
            self.contexts[path] = ray.put(self.store.get(prior, text))
        return self.contexts[path]

    def save(self, stored: StoredInputs, job: Job, clip: FinishedClip) -> None:
        """Write a clip."""
        save_clip(clip, job, self.on_made)
        stored.finish_job()

    def fail(self, stored: StoredInputs, job: Job, error: Exception) -> None:
        """Note why a clip can't be made."""
        self.failed[job.path] = error
        stored.finish_job()
