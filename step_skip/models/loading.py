"""Load a model's components onto a device: published models by DiffSynth's own loader, and the embedded one.

`load` takes a model's name, `load_components` the options of the scripts; `model_of` wraps a user's own
pipeline. torch and diffsynth are imported by the functions that need them.
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
    log_expected_memory,
    offload_config,
    pick_vram,
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

OWN_PIPELINE = "own"  # model name of a prior that was made on a user's own pipeline
UNVERIFIED = "unverified"  # fingerprint of weights whose values can't be read


# --- loading ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Model:
    """A loaded pipeline, with the options and files it was loaded from."""

    pipe: WanVideoPipeline
    options: LoadOptions
    fingerprint: Mapping[str, str] = field(default_factory=dict)  # of the files, by component
    seconds: float = 0.0  # loading time
    experts: Mapping[str, list[Path]] = field(default_factory=dict)  # files of experts that take turns

    def use_expert(self, name: str) -> float:
        """Load an expert in place of the other if they take turns; return the seconds it took."""
        begin = time.perf_counter()
        if name in self.experts and getattr(self.pipe, name) is None:
            release(self.pipe, self.experts)
            loaded = load_pipeline(self.options, {name: self.experts[name]})
            setattr(self.pipe, name, getattr(loaded, name))
        return time.perf_counter() - begin

    @property
    def family(self) -> str:
        """Return the family's name, by the model's name or, for a user's own pipeline, by its inputs."""
        if self.options.model == OWN_PIPELINE:
            return family_of_pipe(self.pipe)
        return family_name(self.options.model, self.options.model_dir)

    @property
    def parameters(self) -> dict[str, str]:
        """Return a fingerprint of the values of each loaded component; see `fingerprint_parameters`."""
        modules = {name: getattr(self.pipe, name, None) for name in COMPONENTS}
        return {
            name: fingerprint_parameters(module) for name, module in modules.items() if module is not None
        }

    def require(self, component: str, purpose: str) -> None:
        """Check that the pipeline has a component.

        Args:
            purpose: a verb phrase for the message, "decode latents" for example.

        Raises:
            InputError: it was loaded without the component.
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
    """Load all components of a model by its name.

    Args:
        model: one of MODEL_NAMES, "I2V-480P" for example.
        device: "cuda", "cuda:1", "cpu"; None: CUDA if available.
        dtype: "bfloat16", "float16" or "float32"; None: the model's own.
        vram: "plain", "cpu", "low", "disk" or "auto" (docs/machines.md).
        model_dir: a folder of downloaded weights; None: DiffSynth finds or downloads them.
        lora: paths, texts PATH:ALPHA, or `Lora` objects.
        quantize: "fp8", which needs torchao.
        compile: a backend of torch.compile, "inductor" for example.

    Raises:
        InputError: a device, a file or a model doesn't exist, or a LoRA doesn't fit.
        RunError: weights could not be downloaded.
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
    """Find, check and load the given components and no others.

    Args:
        check: called with the files' fingerprints before anything is loaded.
        by_expert: of two experts load only the first; `Model.use_expert` swaps them.

    Raises:
        InputError, RunError: see `weight_files` and `check_loras`; errors of `check` pass through.
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
    log_expected_memory(options, at_once)
    begin_peak(options.device)
    experts = {name: files[name] for name in EXPERTS} if len(at_once) < len(files) else {}
    pipe = load_pipeline(options, {name: files[name] for name in at_once})
    return Model(pipe, options, fingerprint, time.perf_counter() - begin, experts)


def loaded_first(components: Collection[str]) -> list[str]:
    """Return the components in memory at once: without the second of two experts."""
    turns = set(EXPERTS) <= set(components)
    return [name for name in components if not (turns and name == EXPERTS[1])]


def model_of(pipe: WanVideoPipeline | Model) -> Model:
    """Return the Model itself, or wrap a user's own pipeline, of which only device and dtype are known."""
    if isinstance(pipe, Model):
        return pipe
    dtype = str(pipe.torch_dtype).removeprefix("torch.")
    return Model(pipe, LoadOptions(OWN_PIPELINE, str(pipe.device), dtype, vram="own"))


def family_of_pipe(pipe: WanVideoPipeline) -> str:
    """Return the family whose latents, conditioning and experts match those of a pipeline.

    Raises:
        InputError: no family matches.
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
        f"{latent_channels} latent channels, expected those of {', '.join(FAMILIES)}; load such a model"
    )


def fingerprint_parameters(module: torch.nn.Module, *, samples: int = 16) -> str:
    """Return a fingerprint of a module's values, in hex, from evenly spread samples of each parameter.

    It is the same for the same weights on any device, offloaded to the CPU or compiled, and differs if a LoRA
    is fused. It is UNVERIFIED if the values are not in memory (offloaded to disk, quantised).

    Args:
        samples: number of values of each parameter.
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
        indices = torch.linspace(0, len(flat) - 1, min(samples, len(flat)), dtype=torch.float64).long()
        sample = flat[indices.to(flat.device)].float().cpu()
        digest.update(f"{name}:{tuple(values.shape)}".encode() + sample.numpy().tobytes())
    return digest.hexdigest()


def load_pipeline(options: LoadOptions, files: Mapping[str, list[Path]]) -> WanVideoPipeline:
    """Load the components of `files` (see `weight_files`), and no others, into a WanVideoPipeline."""
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
        if name in EXPERTS and options.quantize is not None:  # quantising moves it to the device by layers
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
    except (SafetensorError, ValueError) as error:  # a truncated file; keys and shapes of an unknown model
        raise InputError(
            f"DiffSynth can't load the weights of {options.model} ({str(error)[:300]}); download them again"
        ) from error
    if torch.device(options.device).type == "cpu":
        # DiffSynth calls empty_cache of torch.<device_type>: torch.cpu has none, torch.cuda's needs no GPU.
        pipe.device_type = "cuda"
    if "dit2" in files and "dit" not in files:  # DiffSynth makes the first network that is loaded dit
        pipe.dit, pipe.dit2 = None, pipe.dit
    return pipe


def release(pipe: WanVideoPipeline, names: Iterable[str]) -> None:
    """Release components that are no longer needed, to free memory on the device."""
    import torch

    for name in names:
        setattr(pipe, name, None)
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def load_logged(options: LoadOptions, components: Collection[str], **arguments: Any) -> Model:
    """Call `load_components`, with a log line before it, because it may take minutes, and one after it.

    Args:
        arguments: further arguments of `load_components`.
    """
    log.info(f"loading {', '.join(components)} of {options.model} to {options.device} ...")
    model = load_components(options, components, **arguments)
    log.info(f"loaded in {model.seconds:.1f} s")
    return model
