"""Load a model: onto which device, and by which means; DiffSynth's own loader does it for the real ones.

Importing this module is cheap; torch and diffsynth are imported by the functions that need them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import hashlib
import logging
import sys
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from step_skip.errors import InputError
from step_skip.models.compute import check_compute, compile_network, quantize_network
from step_skip.models.embedded import load_tiny_modules, load_tiny_tokenizer
from step_skip.models.families import FAMILIES, MODEL_NAMES, MODELS
from step_skip.models.lora import check_loras, parse_lora
from step_skip.models.lora_file import Lora, fuse_loras
from step_skip.models.machine import pick_device
from step_skip.models.memory import (
    begin_peak,
    check_download,
    offload_config,
    pick_vram,
    say_what_is_expected,
    vram_limit,
)
from step_skip.models.weights import (
    COMPONENTS,
    EXPERTS,
    TINY_DIR,
    LoadOptions,
    all_components,
    family_name,
    fingerprint_files,
    model_defaults,
    tokenizer_folder,
    weight_files,
)

if TYPE_CHECKING:
    import torch
    from diffsynth.pipelines.wan_video import WanVideoPipeline


log = logging.getLogger(__name__)

OWN_PIPELINE = "own"  # the model of a prior that was made on a pipeline we didn't load
UNVERIFIED = "unverified"


# --- loading ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Model:
    """A pipeline that is loaded, and what it was loaded from."""

    pipe: WanVideoPipeline
    options: LoadOptions
    fingerprint: Mapping[str, str] = field(default_factory=dict)  # of the files, by component
    seconds: float = 0.0  # loading took
    experts: Mapping[str, list[Path]] = field(default_factory=dict)  # files of two that take turns in memory

    def use_expert(self, name: str) -> float:
        """Of two experts that take turns, load this one in the other's place; returns the seconds it took."""
        begin = time.perf_counter()
        if name in self.experts and getattr(self.pipe, name) is None:
            release(self.pipe, self.experts)
            loaded = load_pipeline(self.options, {name: self.experts[name]})
            setattr(self.pipe, name, getattr(loaded, name))
        return time.perf_counter() - begin

    @property
    def family(self) -> str:
        """Its family's name: by the model's, of somebody's own pipeline by what its network takes."""
        if self.options.model == OWN_PIPELINE:
            return family_of_pipe(self.pipe)
        return family_name(self.options.model, self.options.model_dir)

    @property
    def parameters(self) -> dict[str, str]:
        """A fingerprint of the values of each component that is loaded; see `fingerprint_parameters`."""
        modules = {name: getattr(self.pipe, name, None) for name in COMPONENTS}
        return {
            name: fingerprint_parameters(module) for name, module in modules.items() if module is not None
        }

    def require(self, component: str, purpose: str) -> None:
        """Refuse what the pipeline was loaded without.

        Raises:
            InputError: naming the component.
        """
        if getattr(self.pipe, component, None) is None and component not in self.experts:
            raise InputError(f"the pipeline has no {component}, needed to {purpose}; load it with one")


def load(
    model: str = "tiny",
    *,
    device: str | None = None,
    dtype: str | None = None,
    vram: str = "auto",
    model_dir: str | Path | None = None,
    lora: Iterable[str | Path | Lora] = (),
    quantize: str | None = None,
    compile: str | None = None,
) -> Model:
    """Load a model by its name, whole: what the scripts run on.

    Args:
        model: one of MODEL_NAMES, "I2V-480P" for example.
        device: "cuda", "cuda:1", "cpu"; None: CUDA where there is one.
        dtype: "bfloat16", "float16" or "float32"; None: the model's own.
        vram: "plain", "cpu", "low", "disk" or "auto" (docs/machines.md).
        model_dir: a folder of downloaded weights; None: DiffSynth finds or fetches them.
        lora: paths, PATH:ALPHA, or Lora.
        quantize: "fp8", which needs torchao.
        compile: a backend of torch.compile, "inductor" for example.

    Raises:
        InputError: a device, a file or a name that isn't there.
        RunError: weights that could not be fetched.
    """
    if model not in MODEL_NAMES:
        raise InputError(f"there is no model {model!r}; expected one of {', '.join(MODEL_NAMES)}")
    folder = None if model_dir is None else Path(model_dir)
    device = pick_device(model, device)
    loras = tuple(each if isinstance(each, Lora) else parse_lora(str(each)) for each in lora)
    dtype = dtype or model_defaults(model, folder).dtype
    options = LoadOptions(model, device, dtype, vram, folder, loras, quantize, compile)
    with contextlib.redirect_stdout(sys.stderr):
        return load_components(options, all_components(model, folder))


def load_components(
    options: LoadOptions,
    components: Collection[str],
    *,
    check: Callable[[Mapping[str, str]], object] = lambda fingerprint: None,
    by_expert: bool = False,
) -> Model:
    """Find, check and load these components and no others.

    Args:
        check: called with the files' fingerprints, before anything is loaded.
        by_expert: of two experts load the first only; `Model.use_expert` then changes them.

    Raises:
        InputError, RunError: see `weight_files` and `check_loras`; and what `check` raises.
    """
    begin = time.perf_counter()
    at_once = loaded_first(components) if by_expert else list(components)
    options = dataclasses.replace(options, vram=pick_vram(options, at_once))
    check_compute(vram=options.vram, quantize=options.quantize, compile=options.compile)
    check_download(options, components)
    files = weight_files(options, components)
    networks = [files[name] for name in EXPERTS if name in files]
    for note in check_loras(options.loras, networks[0]) if networks else ():
        log.warning(note)
    fingerprint = fingerprint_files(files)
    check(fingerprint)
    say_what_is_expected(options, at_once)
    begin_peak(options.device)
    experts = {name: files[name] for name in EXPERTS} if len(at_once) < len(files) else {}
    pipe = load_pipeline(options, {name: files[name] for name in at_once})
    return Model(pipe, options, fingerprint, time.perf_counter() - begin, experts)


def loaded_first(components: Collection[str]) -> list[str]:
    """What is in memory at once: of two experts the first."""
    turns = set(EXPERTS) <= set(components)
    return [name for name in components if not (turns and name == EXPERTS[1])]


def model_of(pipe: WanVideoPipeline | Model) -> Model:
    """What is known of a pipeline: all of one that `load` gave, else only its device and dtype."""
    if isinstance(pipe, Model):
        return pipe
    dtype = str(pipe.torch_dtype).removeprefix("torch.")
    return Model(pipe, LoadOptions(OWN_PIPELINE, str(pipe.device), dtype, vram="own"))


def family_of_pipe(pipe: WanVideoPipeline) -> str:
    """The family whose latents, conditioning and experts are those of a pipeline.

    Raises:
        InputError: there is none.
    """
    experts = [name for name in EXPERTS if getattr(pipe, name) is not None]
    if not experts or pipe.vae is None:
        raise InputError("the pipeline has no dit or no vae, and a prior needs both; load it with them")
    dit, latent_channels = getattr(pipe, experts[0]), pipe.vae.z_dim
    takes = {
        "y": dit.require_vae_embedding and dit.in_dim > latent_channels,
        "clip_feature": dit.require_clip_embedding and dit.has_image_input,
        "first_frame_latents": dit.fuse_vae_embedding_in_latents,
    }
    names = [name for name, is_taken in takes.items() if is_taken]
    for name, family in FAMILIES.items():
        alike = (list(family.conditioning), family.latent_channels, len(family.experts))
        needs_end = family.end_image == "required"
        if alike == (names, latent_channels, len(experts)) and needs_end == dit.has_image_pos_emb:
            return name
    raise InputError(
        f"the pipeline has {len(experts)} networks that take {', '.join(names) or 'no image'} and "
        f"{latent_channels} latent channels, as none of {', '.join(FAMILIES)} does: priors of it aren't known"
    )


def fingerprint_parameters(module: torch.nn.Module, *, samples: int = 16) -> str:
    """A fingerprint of a module's values, in hex: so many of each parameter, evenly spread, by name.

    It is the same for the same weights on any device, offloaded to the CPU or compiled, and another where a
    LoRA is fused. UNVERIFIED where the values are not in memory (offloaded to disk, quantised).
    """
    import torch

    digest, known = hashlib.sha256(), (torch.float32, torch.bfloat16, torch.float16)
    parameters = sorted(module.named_parameters())
    if not parameters or not all(
        type(values) is torch.nn.Parameter and not values.is_meta and values.dtype in known
        for _, values in parameters
    ):
        return UNVERIFIED
    for name, values in parameters:
        name = name.replace("_orig_mod.", "").replace(".module.", ".")
        flat = values.detach().flatten()
        places = torch.linspace(0, len(flat) - 1, min(samples, len(flat)), dtype=torch.float64).long()
        sample = flat[places.to(flat.device)].float().cpu()
        digest.update(f"{name}:{tuple(values.shape)}".encode() + sample.numpy().tobytes())
    return digest.hexdigest()


def load_pipeline(options: LoadOptions, files: Mapping[str, list[Path]]) -> WanVideoPipeline:
    """Load the components named in `files` (see `weight_files`), and no others, into a WanVideoPipeline."""
    load = _load_real if options.model in MODELS else _load_tiny
    files = {name: paths for name, paths in files.items() if paths}
    pipe = load(options, files)
    for name in EXPERTS:
        if getattr(pipe, name) is not None:
            loras = [lora for lora in options.loras if lora.expert in (None, name)]
            fuse_loras(getattr(pipe, name), loras, dtype=pipe.torch_dtype, device=pipe.device)
            if options.quantize is not None:
                quantize_network(pipe, name, options.quantize, device=options.device)
            if options.compile is not None:
                compile_network(pipe, name, options.compile)
    return pipe


def _load_tiny(options: LoadOptions, files: Mapping[str, list[Path]]) -> WanVideoPipeline:
    import torch
    from diffsynth.pipelines.wan_video import WanVideoPipeline
    from safetensors import SafetensorError

    folder = options.model_dir or TINY_DIR
    dtype = getattr(torch, options.dtype)
    pipe = WanVideoPipeline(device=options.device, torch_dtype=dtype)
    try:
        modules = load_tiny_modules(folder, only=tuple(files))
    except (RuntimeError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"the weights in {folder} do not fit its config.json "
            f"({type(error).__name__}: {str(error)[:80]}); copy the model's folder again"
        ) from error
    for name, module in modules.items():
        setattr(pipe, name, module.to(device=options.device, dtype=dtype).eval())
    if "text_encoder" in files:
        pipe.tokenizer = load_tiny_tokenizer(tokenizer_folder(options).parent)
    return pipe


def _load_real(options: LoadOptions, files: Mapping[str, list[Path]]) -> WanVideoPipeline:
    import torch
    from diffsynth.pipelines.wan_video import ModelConfig, WanVideoPipeline
    from safetensors import SafetensorError

    dtype, mode = getattr(torch, options.dtype), pick_vram(options, files)

    def config(name: str, paths: list[Path]) -> ModelConfig:
        homes = offload_config(mode, name, dtype=dtype, device=options.device)
        if name in EXPERTS and options.quantize is not None:  # goes to the device layer by layer
            homes = {"computation_device": "cpu", "computation_dtype": dtype}
        named = [str(path) for path in paths]
        return ModelConfig(path=named if len(named) > 1 else named[0], **homes)

    tokenizer = ModelConfig(path=str(tokenizer_folder(options))) if "text_encoder" in files else None
    try:
        pipe = WanVideoPipeline.from_pretrained(
            torch_dtype=dtype,
            device=options.device,
            model_configs=[config(name, paths) for name, paths in files.items()],
            tokenizer_config=tokenizer,
            vram_limit=vram_limit(options.device),
        )
    except (SafetensorError, ValueError) as error:  # a file that was cut off; keys and shapes of no model
        raise InputError(
            f"DiffSynth can't load the weights of {options.model} ({str(error)[:300]}); fetch the file again"
        ) from error
    if torch.device(options.device).type == "cpu":
        pipe.device_type = (
            "cuda"  # where DiffSynth empties the cache: torch.cpu can't, torch.cuda needs no GPU
        )
    if "dit2" in files and "dit" not in files:  # the first network that is loaded becomes dit
        pipe.dit, pipe.dit2 = None, pipe.dit
    return pipe


def release(pipe: WanVideoPipeline, names: Iterable[str]) -> None:
    """Let go of components that are not needed any more, to make room on the device."""
    import torch

    for name in names:
        setattr(pipe, name, None)
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def load_told(options: LoadOptions, components: Collection[str], **how: Any) -> Model:
    """`load_components`, with a word before it, because it may take minutes, and the seconds after it."""
    log.info(f"loading {', '.join(components)} of {options.model} to {options.device} ...")
    model = load_components(options, components, **how)
    log.info(f"loaded in {model.seconds:.1f} s")
    return model
