"""What a prior gives to its videos: its files checked, then its tensors, read just before they are needed.

Of a sweep's priors only the one whose videos are made is in memory.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from step_skip.contexts import ContextStore
from step_skip.files import InputError, dtype_name
from step_skip.images import read_as_before, read_own_image
from step_skip.plan import conditioning_files, input_files, latents_files, nega_files, velocity_files
from step_skip.prior import IMAGE_FILE, Prior, check_files, context_file, load_conditioning, load_latents
from step_skip.sweep import Group, Inputs

if TYPE_CHECKING:
    from PIL.Image import Image


def check_inputs(group: Group) -> None:
    """Check every file that the plans of a prior or a bank need, once, and read the images; no tensor yet.

    Raises:
        InputError: something is missing, damaged, or not the prior's.
    """
    for member in group.members:
        if not member.inputs.prior_files:
            member.inputs = read_inputs(member)


def read_inputs(group: Group) -> Inputs:
    """The same for one prior."""
    image = group.jobs[0].plan.image
    plans = {id(job.plan): job.plan for job in group.jobs}.values()
    names = dict.fromkeys(name for plan in plans for name in input_files(plan, group.prior))
    return Inputs(
        prior_files=check_files(group.prior, names),
        image=None if image is None else read_identity_image(image, group.prior),
    )


def load_inputs(group: Group) -> str:
    """Check and load what the plans of a prior or a bank need, each file once, unless it is there already.

    Returns:
        The latents' dtype, "bfloat16" for example.

    Raises:
        InputError: something is missing or damaged, holds something else, or isn't in --dtype.
    """
    check_inputs(group)
    for other in group.others:
        load_tensors(other)
    return load_tensors(group)


def load_tensors(group: Group) -> str:
    """The same for one prior whose files are checked."""
    prior, inputs = group.prior, group.inputs
    for plan in group.plans:
        latents = [*latents_files(plan, prior), *velocity_files(plan), *nega_files(plan, prior)]
        for name in latents:  # as they were when `read_inputs` looked at them
            if name not in inputs.tensors:
                inputs.tensors[name] = load_latents(prior, name, sha256=inputs.prior_files[name])
        for name in conditioning_files(plan, prior):
            if name not in inputs.tensors:
                inputs.tensors[name] = load_conditioning(prior, name)
        found = dtype_name(inputs.tensors[latents[0]])
        if plan.dtype not in (None, found):
            raise InputError(f"--dtype {plan.dtype}: the prior's latents are {found}; leave the flag out")
    return found


def own_contexts(group: Group) -> None:
    """Give a group the contexts that are files of its priors."""
    for text in group.texts:
        for member in group.members:
            own = member.inputs.tensors.get(context_file(text))
            if own is not None:
                group.inputs.contexts[text] = own


def know_contexts(group: Group, store: ContextStore) -> list[str]:
    """Give a group the contexts that are known, its priors' own or kept; returns the other prompts."""
    own_contexts(group)
    contexts = group.inputs.contexts
    for text in group.texts:
        for member in group.members if text not in contexts else ():
            context = store.get(member.prior, text)
            if context is not None:
                contexts[text] = context
    return [text for text in group.texts if text not in contexts]


def unheld_texts(group: Group) -> list[str]:
    """The prompts of a group whose contexts are no files of its priors."""
    return [t for t in group.texts if not any(m.prior.has(context_file(t)) for m in group.members)]


def unknown_texts(group: Group, store: ContextStore) -> list[str]:
    """The prompts of a group that have to be encoded; none of its tensors is read to tell."""
    members = group.members
    return [t for t in unheld_texts(group) if all(store.get(m.prior, t) is None for m in members)]


def let_go(group: Group) -> None:
    """Forget what was read for a group, after its last video."""
    for member in group.members:
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
