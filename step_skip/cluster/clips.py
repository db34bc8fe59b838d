"""Many videos on a Ray cluster: the driver reads priors and writes videos; see cluster.py."""

from __future__ import annotations

import functools
import logging
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from step_skip.cluster.driver import Cluster, Driver, Turn, Worker, plain_error
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


class ClipWorker(Worker):
    """Makes videos."""

    def make(
        self,
        bank: Sequence[Prior],
        plan: Plan,
        inputs: Sequence[Inputs],
        texts: Sequence[str],
        *contexts: torch.Tensor,
    ) -> MadeClip | Exception:
        """Make one video.

        Args:
            bank: the prior, or of a bank all.
            inputs: of each of them.
            texts: the prompts whose contexts the priors don't hold, which follow.
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
                doubts = list(doubts_of(plan, source.prior, device=self.options.device))
                few = [clip.frames[place] for place in (0, (len(clip.frames) - 1) // 2, -1)]
                return MadeClip(
                    path.read_bytes(), few, clip.report_of(path), clip.forwards, clip.seconds, doubts
                )
        except JOB_ERRORS as error:
            return plain_error(error)


def encode_texts(options: LoadOptions, texts: Sequence[str]) -> dict[str, torch.Tensor] | Exception:
    """The contexts of prompts, by a text encoder that goes when this process does."""
    from step_skip.pipeline.run import encode_prompt

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

    def finish(self) -> None:
        """Drop a prior's tensors from Ray's store after its last job."""
        self.left -= 1
        if self.left == 0:
            self.inputs = None


@dataclass
class ClipCluster:
    """The workers of a cluster as a machine that makes clips; see `sweep.make_clips.Machine`.

    Args:
        device: of each worker; None: CUDA where the cluster has GPUs.
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
            InputError: weights that are missing, or that no prior was made with.
            RunError: weights that could not be fetched, or workers that are lost again and again.
        """
        store = ContextStore(contexts)
        components = [name for name in components_of(groups, store) if name != "text_encoder"]
        encode_first(groups, self.cluster, options, store)
        clips = Clips(groups, store, on_made)
        driver = Driver(
            self.cluster, ClipWorker, options, components, clips.turns(), on_model=clips.check_weights
        )
        driver.run("clip", len(clips.costs), cost=sum(clips.costs.values()))
        return clips.failed


def encode_first(
    groups: Sequence[Group], cluster: Cluster, options: LoadOptions, store: ContextStore
) -> None:
    """Encode each prompt once, in one task: its process ends with it, and with it the text encoder."""
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
    """The clips to make, as turns on a cluster."""

    def __init__(self, groups: Sequence[Group], store: ContextStore, on_made: OnMade | None):
        jobs = all_jobs(groups)
        costs = expected_seconds_of_each(jobs) or [job.plan.forwards + 1 for job in jobs]
        self.costs = {id(job): cost for job, cost in zip(jobs, costs, strict=True)}
        self.groups, self.store, self.on_made = groups, store, on_made
        self.failed: dict[Path, Exception] = {}
        self.contexts: dict[Path, Any] = {}  # references, by where each is kept

    def check_weights(self, found: Mapping[str, str]) -> None:
        """Compare the weights with those of the priors."""
        self.failed |= check_weights(self.groups, lambda prior: check_fingerprint(prior, found))

    def turns(self) -> Iterator[Turn]:
        """Every job, with the tensors of its prior, which are read when its first one's turn comes."""
        import ray

        for group in self.groups:
            jobs = [job for job in group.jobs if job.path not in self.failed]
            if not jobs:
                continue
            try:
                if group.prior.is_legacy:
                    raise InputError(f"{group.prior.directory} is of an older format: make it without --ray")
                load_inputs(group, group.plans)
            except JOB_ERRORS as error:
                self.failed |= {job.path: error for job in jobs}
                continue
            given = Given(group, ray.put([member.inputs for member in group.members]), len(jobs))
            release_inputs(group)
            for job in jobs:
                yield Turn(
                    self.costs[id(job)],
                    functools.partial(self.send, given, job),
                    functools.partial(self.take, given, job),
                    functools.partial(self.fail, given, job),
                )

    def send(self, given: Given, job: Job, worker: Any) -> Any:
        """Let a worker make a video."""
        group = given.group
        texts = unheld_texts(group, job.plan.texts)
        contexts = [self.context(group.prior, text) for text in texts]
        bank = [member.prior for member in group.members]
        return worker.make.remote(bank, job.plan, given.inputs, texts, *contexts)

    def context(self, prior: Prior, text: str) -> Any:
        """A reference to an encoded prompt, which all its jobs share."""
        import ray

        path = kept_context_path(prior, text, self.store.folder)
        if path not in self.contexts:
            self.contexts[path] = ray.put(self.store.get(prior, text))
        return self.contexts[path]

    def take(self, given: Given, job: Job, made: MadeClip) -> None:
        """Write a video."""
        save_clip(made, job, self.on_made)
        given.finish()

    def fail(self, given: Given, job: Job, error: Exception) -> None:
        """Note why a video can't be made."""
        self.failed[job.path] = error
        given.finish()
