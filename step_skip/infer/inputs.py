"""Read what a prior gives to its clips: its files are checked, its tensors read just before they are needed.

Of a sweep's priors only the one whose clips are being made is in memory.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from step_skip.errors import InputError
from step_skip.files.tensors import dtype_name
from step_skip.infer.plan import (
    Plan,
    conditioning_files,
    input_files,
    latents_files,
    nega_files,
    velocity_files,
)
from step_skip.models.loading import Model
from step_skip.prior.contexts import ContextStore
from step_skip.prior.files import check_files, load_conditioning, load_latents
from step_skip.prior.pictures import read_as_before, read_own_image
from step_skip.prior.prior import IMAGE_FILE, Prior, context_file, identity_file

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image


@dataclass(kw_only=True)
class Inputs:
    """What a prior's plans need besides the model: read from the prior, or encoded if the prior lacks it."""

    prior_files: dict[str, str] = field(default_factory=dict)  # SHA-256 by name
    image: Image | None = None
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)  # by file name
    encoded: dict[str, torch.Tensor] = field(default_factory=dict)  # of an older prior's image, likewise
    contexts: dict[str, torch.Tensor] = field(default_factory=dict)  # by prompt


@dataclass
class Source:
    """A prior that clips are made from, or several that begin alike (bank.py), and what was read of it."""

    prior: Prior
    inputs: Inputs = field(default_factory=Inputs)  # empty until they are needed
    others: Sequence[Source] = ()  # of a bank: its other priors

    @classmethod
    def of(cls, bank: Sequence[Prior]) -> Source:
        """Return the source of a prior, or of a bank of them."""
        first, *others = bank
        return cls(first, others=[cls(prior) for prior in others])

    @property
    def members(self) -> Sequence[Source]:
        """The prior and those beside it."""
        return [self, *self.others]


def texts_of(plans: Iterable[Plan]) -> list[str]:
    """Return the prompts of all plans, each once."""
    return list(dict.fromkeys(text for plan in plans for text in plan.texts))


# --- reading ------------------------------------------------------------------------------------------------


def check_inputs(source: Source, plans: Sequence[Plan]) -> None:
    """Check every file that plans need of a prior or a bank, once, and read the images; no tensor yet.

    Raises:
        InputError: something is missing, damaged, or not the prior's.
    """
    for member in source.members:
        if not member.inputs.prior_files:
            member.inputs = read_inputs(member.prior, plans)


def read_inputs(prior: Prior, plans: Sequence[Plan]) -> Inputs:
    """Check the files of one prior; see `check_inputs`."""
    image = plans[0].image
    distinct = {id(plan): plan for plan in plans}.values()
    names = dict.fromkeys(name for plan in distinct for name in input_files(plan, prior))
    return Inputs(
        prior_files=check_files(prior, names),
        image=None if image is None else read_identity_image(image, prior),
    )


def load_inputs(source: Source, plans: Sequence[Plan]) -> str:
    """Check and load what plans need of a prior or a bank, each file once, unless it is loaded already.

    Returns:
        The latents' dtype, "bfloat16" for example.

    Raises:
        InputError: the installed scheduler gives another schedule; or something is missing or damaged, holds
            something else, or isn't in --dtype.
    """
    from step_skip.prior.checks import check_installed_schedule

    check_installed_schedule(source.prior)
    check_inputs(source, plans)
    for other in source.others:
        load_tensors(other, plans)
    return load_tensors(source, plans)


def load_tensors(source: Source, plans: Sequence[Plan]) -> str:
    """Load what plans need of one prior whose files are checked; see `load_inputs`."""
    prior, inputs = source.prior, source.inputs
    for plan in plans:
        latents = [*latents_files(plan, prior), *velocity_files(plan), *nega_files(plan, prior)]
        for name in latents:  # as they were when `read_inputs` checked them
            if name not in inputs.tensors:
                inputs.tensors[name] = load_latents(prior, name, sha256=inputs.prior_files[name])
        for name in conditioning_files(plan, prior):
            if name not in inputs.tensors:
                inputs.tensors[name] = load_conditioning(prior, name)
        found = dtype_name(inputs.tensors[latents[0]])
        if plan.dtype not in (None, found):
            raise InputError(f"--dtype {plan.dtype}: the prior's latents are {found}; leave the flag out")
    return found


def release_inputs(source: Source) -> None:
    """Forget the tensors that were read, after the last clip."""
    for member in source.members:
        member.inputs.tensors.clear()
        member.inputs.contexts.clear()


def read_identity_image(image: Path | Image, prior: Prior) -> Image:
    """Read --image and compare it with the image the prior was made from, where the prior holds it.

    Raises:
        InputError: it can't be read, or is another.
    """
    found = read_as_before(image, prior)
    if not prior.is_legacy:
        own = prior.directory / IMAGE_FILE
        if found.tobytes() != read_own_image(prior, IMAGE_FILE).tobytes():
            raise InputError(
                f"--image {image} is not the image the prior was made from ({own}); "
                "leave the flag out, or make a prior of this image"
            )
    return found


# --- encoded prompts ----------------------------------------------------------------------------------------


def own_contexts(source: Source, texts: Iterable[str]) -> None:
    """Add the contexts that are files of the source's priors."""
    for text in texts:
        for member in source.members:
            own = member.inputs.tensors.get(context_file(text))
            if own is not None:
                source.inputs.contexts[text] = own


def know_contexts(source: Source, texts: Sequence[str], store: ContextStore) -> list[str]:
    """Add the contexts that are known, the priors' own or kept ones; return the other texts."""
    own_contexts(source, texts)
    contexts = source.inputs.contexts
    for text in texts:
        for member in source.members if text not in contexts else ():
            context = store.get(member.prior, text)
            if context is not None:
                contexts[text] = context
    return [text for text in texts if text not in contexts]


def unheld_texts(source: Source, texts: Iterable[str]) -> list[str]:
    """Return the texts whose contexts are no files of the source's priors."""
    return [t for t in texts if not any(m.prior.has(context_file(t)) for m in source.members)]


def unknown_texts(source: Source, texts: Iterable[str], store: ContextStore) -> list[str]:
    """Return the texts that have to be encoded; no tensor of the prior is read for it."""
    members = source.members
    return [t for t in unheld_texts(source, texts) if all(store.get(m.prior, t) is None for m in members)]


def encode_new(source: Source, plans: Sequence[Plan], model: Model, store: ContextStore) -> None:
    """Encode what the source's priors don't hold, each prompt encoded once.

    What one prior's folder holds is never given to another prior: it may come from an untrusted source.
    """
    for text in know_contexts(source, texts_of(plans), store):
        source.inputs.contexts[text] = encode_text(source.prior, text, model, store)
    encode_identity(source, plans, model)


def encode_text(prior: Prior, text: str, model: Model, store: ContextStore) -> torch.Tensor:
    """Encode a prompt and return its context, on the CPU: VRAM is for what runs."""
    from step_skip.pipeline.run import encode_prompt

    def encode(text: str) -> torch.Tensor:
        model.require("text_encoder", f"encode {text[:40]!r}")
        return encode_prompt(model.pipe, text).cpu()

    return store.encode(prior, text, encode)


def encode_identity(source: Source, plans: Sequence[Plan], model: Model) -> None:
    """Encode the image of an older prior, which holds only latents."""
    from step_skip.pipeline.run import encode_image

    prior, own = source.prior, source.inputs
    runs = any(plan.steps_to_run for plan in plans)
    if prior.is_legacy and runs and not own.encoded and own.image is not None:  # its plans name one
        model.require("image_encoder", "encode the image")
        identity = encode_image(model.pipe, own.image, num_frames=prior.metadata.num_frames)
        own.encoded = {identity_file(name): tensor for name, tensor in identity.items()}
