"""Ways to make each step cheaper that promise.py compares with --methods cheaper, alone and with the skip."""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

from methods import (
    PRIOR_PROMPTS,
    STEPS,
    Case,
    Method,
    Prior,
    as_prior,
    differential,
    from_noise,
    from_noise_on,
    resume,
    run_prior,
    sigmas_of,
)

MODEL_DIR = Path(__file__).resolve().parents[1] / "data" / "tiny_wan_i2v"
DISTILLED, BRANCH = MODEL_DIR / "distilled_lora.safetensors", MODEL_DIR / "skip_branch.safetensors"
DISTILLED_SIGMAS = (1.0, 0.9375, 5 / 6, 0.625)  # 4 steps at shift 5, what distil.py trains it for
GUIDED = 2.0  # the embedded model's cfg_scale


def changed(run: Callable, **settings) -> Callable:
    """The same method with other settings: skip_cache, cfg_scale by step."""

    def method(case: Case, prior: Prior | None, *, settings=settings, **choices):
        return run(replace(case, settings=replace(case.settings, **settings)), prior, **choices)

    return functools.partial(method, settings=settings)


def without_branch(run: Callable) -> Callable:
    """The same method with Skip-Cache in its form without training, whatever the DiT has."""

    def method(case: Case, prior: Prior | None, **choices):
        from step_skip.pipeline import hooked

        if getattr(case.pipe.dit, "skip_branch", None) is None:
            return run(case, prior, **choices)
        with hooked(case.pipe.dit, skip_branch=None):
            return run(case, prior, **choices)

    return functools.partial(method, **run.keywords)


class WholeResidual:
    """Reuse what all blocks add, as TeaCache does, at fixed steps; put in TeaCache's place in model_fn."""

    def __init__(self, every: int):
        self.every, self.calls = every, 0

    def check(self, dit, x, t_mod) -> bool:
        """Whether this evaluation is spared."""
        self.calls += 1
        spared = (self.calls - 1) % self.every > 0
        self.before = None if spared else x.clone()
        return spared

    def store(self, x) -> None:
        """Keep what the blocks added."""
        self.added = x - self.before

    def update(self, x):
        """Add it again."""
        return x + self.added


def with_whole_residual(run: Callable, every: int) -> Callable:
    """The same method with the whole residual reused."""

    def method(case: Case, prior: Prior | None, *, every=every, **choices):
        from step_skip.pipeline import hooked

        caches, model_fn = {True: WholeResidual(every), False: WholeResidual(every)}, case.pipe.model_fn

        def with_cache(**inputs):
            return model_fn(**inputs, tea_cache=caches[inputs["positive"]])

        with hooked(case.pipe, model_fn=with_cache):
            return run(case, prior, **choices)

    return functools.partial(method, every=every)


def on_sigmas(case: Case, prior: Prior | None, *, sigmas: tuple[float, ...]):
    """--sigmas: these, from where the prior's path, or the noise, is at the first of them."""
    return from_latents(case, on_path(case, prior, sigmas[0]), sigmas)


def from_latents(case: Case, latents, sigmas: tuple[float, ...], *, on_step: Callable | None = None):
    """The new prompt's clip on these sigmas, from latents at the first of them."""
    from step_skip.pipeline import run_on_sigmas

    run = {"sigmas": sigmas, "latents": latents, "conditioning": case.conditioning("new")}
    return run_on_sigmas(case.pipe, case.settings, **run, on_step=on_step)


def on_path(case: Case, prior: Prior | None, sigma: float):
    """Where the prior's path is at a noise level, without a prior the noise: [B, C, T, H, W]."""
    from step_skip.steps import place_on_path

    if prior is None:
        return case.noise
    step, part = place_on_path(sigma, sigmas_of(case))
    return (1 - part) * prior.latents[step] + part * prior.latents[step + 1]


def re_spaced(case: Case, prior: Prior, *, start_step: int, steps: int):
    """--num_steps_after: from the prior's latents to the end in so many steps."""
    from step_skip.steps import tail_sigmas

    begin = sigmas_of(case)[start_step + 1]
    sigmas = tail_sigmas(begin, steps, sigma_shift=case.settings.sigma_shift)
    return on_sigmas(case, prior, sigmas=tuple(sigmas))


@functools.cache
def distilled_dit(pipe):
    """A copy of the pipeline's DiT with the distilled LoRA in it."""
    dit = copy.deepcopy(pipe.dit)
    pipe.load_lora(dit, str(DISTILLED))
    return dit


@contextlib.contextmanager
def with_distilled(case: Case) -> Iterator[Case]:
    """The case as the distilled LoRA runs it for the length of a `with`: its DiT, 4 steps, no guidance."""
    from step_skip.pipeline import hooked

    settings = replace(case.settings, cfg_scale=1.0, num_inference_steps=len(DISTILLED_SIGMAS))
    with hooked(case.pipe, dit=distilled_dit(case.pipe)):
        yield replace(case, settings=settings)


def distilled(case: Case, prior: Prior | None, *, sigmas: tuple[float, ...]):
    """The distilled LoRA without guidance, from noise or from a prior of the base model."""
    latents = on_path(case, prior, sigmas[0])
    with with_distilled(case) as own:
        return from_latents(own, latents, sigmas)


def distilled_after_base(case: Case, prior: Prior | None, *, base_steps: int):
    """What is done by hand today: the base model begins, with guidance and the new prompt, the LoRA ends."""
    steps = []
    from_latents(case, case.noise, DISTILLED_SIGMAS, on_step=steps.append)
    with with_distilled(case) as own:
        result = from_latents(own, steps[base_steps].latents_before, DISTILLED_SIGMAS[base_steps:])
    result.forwards += sum(step.forwards for step in steps[:base_steps])
    result.block_evaluations += 2 * base_steps * len(case.pipe.dit.blocks)
    result.seconds["denoise"] += sum(step.seconds for step in steps[:base_steps])
    return result


def distilled_differential(case: Case, prior: Prior | None, *, steps: tuple[int, ...], prompt: str):
    """Differential resume from a prior made by the LoRA itself, in its 4 steps; the prior is not counted."""
    with with_distilled(case) as own:
        return differential(own, as_prior(*run_prior(own, prompt)), steps=steps)


def cheaper() -> Iterator[Method]:
    """Everything on the chart of cheaper steps, the full run first."""
    bind = functools.partial
    bases = (  # name, how, prior, choices
        ("full run", from_noise, "none", {"steps": STEPS}),
        ("resume", resume, "empty", {"start_step": 3}),
        ("differential", differential, "still", {"steps": (0, 5, 8)}),
        ("differential", differential, "still", {"steps": (0, 3, 6, 8, 9)}),
    )
    for name, run, kind, choices in bases:
        yield Method(name, bind(run, **choices), kind)
    for steps in (6, 4, 3, 2, 1):
        yield Method("fewer steps", bind(from_noise, steps=steps))
    for steps in ((0, 4, 7, 9), (0, 5, 8), (0, 7)):
        yield Method("fewer steps, chosen sigmas", bind(from_noise_on, steps=steps))
    for steps in ((0, 4, 7, 9), (1, 7), (1,)):
        yield Method("differential", bind(differential, steps=steps), "still")
    for (name, run, kind, choices), periods in zip(bases, ((2, 3, 4), (2, 3, 4), (2,), (2,)), strict=True):
        for every in periods:
            cached = bind(changed(run, skip_cache=every), **choices)
            yield Method(f"{name}, skip-cache {every}", without_branch(cached), kind)
            if BRANCH.exists():
                yield Method(f"{name}, skip-cache {every}, branch", cached, kind)
            whole = bind(with_whole_residual(run, every), **choices)
            yield Method(f"{name}, whole residual {every}", whole, kind)
    yield from by_step(bases)
    for start_step, numbers in ((3, (3, 2)), (5, (2,))):
        for steps in numbers:
            run = bind(re_spaced, start_step=start_step, steps=steps)
            yield Method(f"resume after {start_step}, re-spaced", run, "empty")
    if DISTILLED.exists():
        yield from with_lora()


def by_step(bases) -> Iterator[Method]:
    """Guidance on the first steps only."""
    for name, run, kind, choices, lengths in (
        (*bases[0], ((5, 5), (8, 2))),
        (*bases[1], ((4, 2), (3, 3))),
        (*bases[2], ((2, 1), (1, 2))),
    ):
        for guided, unguided in lengths:
            cfg_scale = (GUIDED,) * guided + (1.0,) * unguided
            method = functools.partial(changed(run, cfg_scale=cfg_scale), **choices)
            yield Method(f"{name}, guided {guided} of {guided + unguided}", method, kind)
    both = changed(from_noise, cfg_scale=(GUIDED,) * 5 + (1.0,) * 5, skip_cache=2)
    yield Method("full run, guided 5 of 10, skip-cache 2", functools.partial(both, steps=STEPS))


def with_lora() -> Iterator[Method]:
    """The distilled LoRA on its own sigmas: alone, after a prior or the base model, from its own prior."""
    bind, own = functools.partial, DISTILLED_SIGMAS
    for places in ((0, 1, 2, 3), (0, 2, 3), (0, 2), (0,)):
        sigmas, steps = tuple(own[place] for place in places), f"{' '.join(map(str, places))} of 4"
        yield Method("distilled LoRA", bind(distilled, sigmas=sigmas), steps=steps)
        yield Method("base on the LoRA's sigmas", bind(on_sigmas, sigmas=sigmas), steps=steps)
    for first in (1, 2, 3):
        steps = f"{' '.join(map(str, range(first, 4)))} of 4"
        by_hand = bind(distilled_after_base, base_steps=first)
        yield Method(f"distilled LoRA after {first} of the base", by_hand, steps=steps)
        for kind in ("empty", "still", "motion"):
            yield Method("distilled LoRA from a base prior", bind(distilled, sigmas=own[first:]), kind, steps)
        yield Method("base on the LoRA's sigmas", bind(on_sigmas, sigmas=own[first:]), "empty", steps)
    for places in ((0, 2, 3), (0, 3), (0,)):
        for kind in ("still", "motion"):
            run = bind(distilled_differential, steps=places, prompt=PRIOR_PROMPTS[kind])
            steps = f"{' '.join(map(str, places))} of 4"
            yield Method("differential with the LoRA", run, f"{kind}, by the LoRA", steps)
