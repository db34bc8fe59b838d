"""The models by name: what is asked for, from where, onto what; everything up to the download."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import safetensors.torch
import torch
from helpers import PROMPT, listing, run_as_user

from step_skip.errors import InputError, RunError
from step_skip.models import loading
from step_skip.models.loading import load_pipeline
from step_skip.models.machine import pick_device
from step_skip.models.memory import HOMES
from step_skip.models.weights import ROOT, LoadOptions, fingerprint_files, model_defaults, weight_files

# as in the examples of DiffSynth-Studio, after its redirection of the .pth files to converted ones
CONVERTED = "DiffSynth-Studio/Wan-Series-Converted-Safetensors"
PUBLISHED = {
    (CONVERTED, "Wan2.1_VAE.safetensors"),
    (CONVERTED, "models_t5_umt5-xxl-enc-bf16.safetensors"),
    (CONVERTED, "models_clip_open-clip-xlm-roberta-large-vit-huge-14.safetensors"),
    ("Wan-AI/Wan2.1-T2V-1.3B", "google/umt5-xxl/"),
}
DIT = "diffusion_pytorch_model*.safetensors"
MODEL_IDS = {"I2V-480P": "Wan-AI/Wan2.1-I2V-14B-480P", "I2V-720P": "Wan-AI/Wan2.1-I2V-14B-720P"}
SHARDS = [f"diffusion_pytorch_model-{i:05d}-of-00007.safetensors" for i in range(1, 8)]
OTHERS = {
    "vae": "Wan2.1_VAE",
    "text_encoder": "models_t5_umt5-xxl-enc-bf16",
    "image_encoder": "models_clip_open-clip-xlm-roberta-large-vit-huge-14",
}


def options(model="I2V-480P", **changes) -> LoadOptions:
    return LoadOptions(**{"model": model, "device": "cuda", "dtype": "bfloat16"} | changes)


@pytest.fixture
def gpu(monkeypatch):
    """A machine that says it has a GPU; `gpu.free` GiB of its memory are free."""
    state = SimpleNamespace(free=80)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "a GPU")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (state.free * 2**30, 80 * 2**30))
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda _: None)
    monkeypatch.setattr(loading, "check_download", lambda *_: None)  # tests/models/test_machines.py
    return state


@pytest.fixture
def asked(monkeypatch):
    """What DiffSynth would be asked to fetch."""
    from diffsynth.pipelines.wan_video import ModelConfig

    calls = []
    monkeypatch.setattr(
        ModelConfig, "download", lambda self: calls.append((self.model_id, self.origin_file_pattern))
    )
    return calls


def touch(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"weights of " + name.encode())


# --- what is asked for --------------------------------------------------------------------------------------


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("flags", [(), ("--model", "I2V-480P"), ("--model", "I2V-720P")])
def test_a_14b_model_without_a_gpu_names_the_tiny_one(run, refused, asked, image, tmp_path, flags):
    command = ("generate_prior", "--image", image, "--output_dir", tmp_path / "priors", *flags)
    refused(lambda: run(*command), "needs a CUDA GPU", "--model tiny", "--device cpu")
    assert not asked


def test_a_cpu_that_is_named_may_run_a_14b_model(caplog):
    assert pick_device("I2V-480P", "cpu") == "cpu"
    assert "I2V-480P runs on the CPU, as asked for" in caplog.text


def with_published_files(base: Path, model: str) -> None:
    """What a finished download leaves, in ModelScope's layout."""
    touch(base, *(f"{MODEL_IDS[model]}/{shard}" for shard in SHARDS))
    touch(base, *(f"{CONVERTED}/{stem}.safetensors" for stem in OTHERS.values()))
    touch(base, "Wan-AI/Wan2.1-T2V-1.3B/google/umt5-xxl/tokenizer.json")


@pytest.mark.parametrize("model", MODEL_IDS)
def test_the_published_files_are_asked_for(run, gpu, asked, image, tmp_path, monkeypatch, model):
    """Through the command line, up to the loading."""
    loaded = []
    monkeypatch.setattr(loading, "load_pipeline", lambda *given: loaded.append(given) or stop())
    monkeypatch.setenv("DIFFSYNTH_MODEL_BASE_PATH", str(tmp_path / "models"))
    with_published_files(tmp_path / "models", model)

    def stop():
        raise RunError("far enough")

    command = ("--model", model, "--vram", "cpu", "--image", image, "--output_dir", tmp_path / "priors")
    outcome = run("generate_prior", *command)
    assert (outcome.code, outcome.out) == (1, "")
    assert "far enough" in outcome.error
    assert set(asked) == PUBLISHED | {(MODEL_IDS[model], DIT)}
    given, files = loaded[0]
    assert (given.model, given.device, given.dtype, given.vram) == (model, "cuda", "bfloat16", "cpu")
    assert [path.name for path in files["dit"]] == SHARDS
    assert not (tmp_path / "priors").exists()


def test_the_defaults_of_the_real_models():
    small, large = (model_defaults(model) for model in MODEL_IDS)
    assert (small.height, small.width, small.num_frames, small.fps) == (480, 832, 81, 16)
    assert (large.height, large.width) == (720, 1280)
    assert (small.cfg_scale, small.sigma_shift, small.dtype) == (5.0, 5.0, "bfloat16")
    assert small.negative_prompt.startswith("色调艳丽，过曝，静态") and small.negative_prompt.endswith(
        "倒着走"
    )


def test_only_what_is_needed_is_asked_for(gpu, asked, tmp_path, monkeypatch):
    monkeypatch.setenv("DIFFSYNTH_MODEL_BASE_PATH", str(tmp_path))
    with_published_files(tmp_path, "I2V-480P")
    assert set(weight_files(options(), ["vae"])) == {"vae"}
    assert asked == [(CONVERTED, "Wan2.1_VAE.safetensors")]


def test_diffsynth_gets_the_files_that_were_found(gpu, asked, tmp_path, monkeypatch):
    """from_pretrained is given paths, never asked to fetch, and where weights lie that are not at work."""
    from diffsynth.pipelines.wan_video import WanVideoPipeline

    calls = []
    pipe = SimpleNamespace(dit=torch.nn.Linear(1, 1), dit2=None, torch_dtype=torch.bfloat16, device="cpu")
    monkeypatch.setattr(WanVideoPipeline, "from_pretrained", lambda **kwargs: calls.append(kwargs) or pipe)
    with_published_files(tmp_path, "I2V-480P")
    for mode in HOMES:
        chosen = options(vram=mode, model_dir=tmp_path)
        load_pipeline(chosen, weight_files(chosen))
    assert not asked
    for call in calls:
        paths = [config.path for config in call["model_configs"]]
        assert [Path(path).name for path in paths[0]] == SHARDS
        assert [Path(path).stem for path in paths[1:]] == list(OTHERS.values())
        assert Path(call["tokenizer_config"].path) == tmp_path / "Wan-AI/Wan2.1-T2V-1.3B/google/umt5-xxl"
        assert call["torch_dtype"] == torch.bfloat16
    assert {call["vram_limit"] for call in calls} == {78}
    places = [[config.offload_device for config in call["model_configs"]] for call in calls]
    assert places == [
        [None, None, "cpu", "cpu"],  # DiT and VAE, then the encoders
        ["cpu"] * 4,
        ["cpu", "cpu", "disk", "disk"],
        ["disk"] * 4,
    ]


# --- no network ---------------------------------------------------------------------------------------------


class NetworkError(Exception):
    """As modelscope raises it: the reason, then a long URL."""


def unreachable(*args, **kwargs):
    raise NetworkError("HTTPSConnectionPool(host='www.modelscope.cn', port=443)\n" + "x" * 2000)


def test_no_network_is_one_line(run, gpu, image, tmp_path, monkeypatch):
    from diffsynth.pipelines.wan_video import ModelConfig

    monkeypatch.setattr(ModelConfig, "download", unreachable)
    monkeypatch.setenv("DIFFSYNTH_MODEL_BASE_PATH", str(tmp_path / "models"))
    before = listing(tmp_path)
    outcome = run("generate_prior", "--image", image, "--output_dir", tmp_path / "priors")
    assert (outcome.code, outcome.out) == (1, "")
    for word in ("cannot fetch", "NetworkError", "connect to the network", "--model_dir", "--model tiny"):
        assert word in outcome.error
    assert len(outcome.error) < 400
    assert listing(tmp_path) == before


@pytest.mark.parametrize("files", [(), (f"{MODEL_IDS['I2V-480P']}/{SHARDS[0]}",)])
def test_downloading_switched_off_is_one_line(run, gpu, image, tmp_path, monkeypatch, files):
    monkeypatch.setenv("DIFFSYNTH_SKIP_DOWNLOAD", "True")
    monkeypatch.setenv("DIFFSYNTH_MODEL_BASE_PATH", str(tmp_path / "models"))
    touch(tmp_path / "models", "Wan-AI/Wan2.1-T2V-1.3B/google/umt5-xxl/tokenizer.json", *files)
    outcome = run("generate_prior", "--image", image, "--output_dir", tmp_path / "priors")
    assert outcome.code == (2 if files else 1)
    words = (
        ("1 of the 7 shards", "finish the download") if files else ("DIFFSYNTH_SKIP_DOWNLOAD", "--model_dir")
    )
    for word in words:
        assert word in outcome.error
    assert not (tmp_path / "priors").exists()


def test_no_example_without_a_network(run, loads, tmp_path, monkeypatch):
    import modelscope

    import generate_prior

    monkeypatch.setattr(generate_prior, "EXAMPLE_IMAGE", ROOT / "data" / "examples" / "none.jpg")
    monkeypatch.setattr(modelscope, "dataset_snapshot_download", unreachable)
    outcome = run("generate_prior", "--model", "tiny", "--download_example", "--output_dir", tmp_path)
    assert (outcome.code, outcome.out, loads) == (1, "", [])
    for word in ("cannot fetch the example image", "NetworkError", "--image"):
        assert word in outcome.error


def test_nothing_is_fetched_for_flags_that_cannot_be_used(run, refused, tmp_path, monkeypatch):
    import modelscope

    import generate_prior

    fetched = []
    monkeypatch.setattr(generate_prior, "EXAMPLE_IMAGE", tmp_path / "none.jpg")
    monkeypatch.setattr(modelscope, "dataset_snapshot_download", lambda *_, **__: fetched.append(1))
    (tmp_path / "run_mine").mkdir()
    command = ("generate_prior", "--model", "tiny", "--download_example", "--output_dir", tmp_path)
    for flags in (("--run_id", "../x"), ("--run_id", "mine"), ("--device", "gpu"), ("--sigma_shift", 1e9)):
        refused(lambda f=flags: run(*command, *f), flags[0])
    assert not fetched


def test_the_example_is_fetched_once_and_used(run, model_dir, image, tmp_path, monkeypatch):
    import modelscope

    import generate_prior

    example, calls = tmp_path / "data" / "examples" / "wan" / "input_image.jpg", []

    def download(dataset, *, local_dir, allow_file_pattern):
        calls.append(dataset)
        assert Path(local_dir) / allow_file_pattern == example
        example.parent.mkdir(parents=True)
        example.write_bytes(image.read_bytes())

    monkeypatch.setattr(generate_prior, "ROOT", tmp_path)
    monkeypatch.setattr(generate_prior, "EXAMPLE_IMAGE", example)
    monkeypatch.setattr(modelscope, "dataset_snapshot_download", download)
    flags = (
        "--model",
        "tiny",
        "--model_dir",
        model_dir,
        "--output_dir",
        tmp_path,
        "--num_inference_steps",
        1,
    )
    for _ in range(2):
        assert run("generate_prior", "--download_example", *flags).code == 0
    assert calls == ["DiffSynth-Studio/examples_in_diffsynth"]


# --- a folder of downloaded weights -------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.parametrize("layout", ["flat", "modelscope"])
def test_a_folder_of_weights_may_be_laid_out_either_way(tmp_path, layout, suffix):
    own = f"{MODEL_IDS['I2V-720P']}/" if layout == "modelscope" else ""
    shared = f"{CONVERTED}/" if layout == "modelscope" and suffix == ".safetensors" else own
    touch(tmp_path, *(own + shard for shard in SHARDS), *(shared + stem + suffix for stem in OTHERS.values()))
    touch(tmp_path, f"{own}google/umt5-xxl/tokenizer.json")
    files = weight_files(options("I2V-720P", model_dir=tmp_path))
    assert [path.name for path in files["dit"]] == SHARDS
    assert {name: files[name][0].name for name in OTHERS} == {
        name: stem + suffix for name, stem in OTHERS.items()
    }


def test_the_other_models_weights_are_not_taken(tmp_path):
    with_published_files(tmp_path, "I2V-720P")
    with pytest.raises(InputError, match=r"holds no diffusion_pytorch_model.*the dit.*--model_dir"):
        weight_files(options("I2V-480P", model_dir=tmp_path))


@pytest.mark.parametrize("missing", [SHARDS[0], SHARDS[3], SHARDS[6]])
def test_a_missing_shard_is_named(tmp_path, missing):
    with_published_files(tmp_path, "I2V-480P")
    (tmp_path / MODEL_IDS["I2V-480P"] / missing).unlink()
    with pytest.raises(InputError, match="6 of the 7 shards") as refused:
        weight_files(options(model_dir=tmp_path))
    assert missing in str(refused.value)


@pytest.mark.parametrize("component", OTHERS)
def test_a_missing_component_is_named(tmp_path, component):
    with_published_files(tmp_path, "I2V-480P")
    (tmp_path / CONVERTED / f"{OTHERS[component]}.safetensors").unlink()
    with pytest.raises(InputError, match=f"{OTHERS[component]}.*the {component}.*--model_dir"):
        weight_files(options(model_dir=tmp_path))


def test_a_missing_tokenizer_is_named(tmp_path):
    with_published_files(tmp_path, "I2V-480P")
    (tmp_path / "Wan-AI/Wan2.1-T2V-1.3B/google/umt5-xxl/tokenizer.json").unlink()
    with pytest.raises(InputError, match="google/umt5-xxl/tokenizer.json.*the tokenizer.*--model_dir"):
        weight_files(options(model_dir=tmp_path))
    weight_files(options(model_dir=tmp_path), ["dit", "vae"])  # where no text is encoded


# --- the fingerprint ----------------------------------------------------------------------------------------


@pytest.fixture
def weights(tmp_path) -> Path:
    """A safetensors file with a header longer than one sample."""
    from safetensors.torch import save_file

    path = tmp_path / "weights.safetensors"
    tensors = {f"blocks.{i}.weight": torch.full((64, 64), float(i)) for i in range(200)}
    save_file(tensors, str(path))
    return path


def flip(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def fingerprint(path: Path) -> str:
    return fingerprint_files({"dit": [path]})["dit"]


def test_the_fingerprint_is_stable(weights, tmp_path):
    first = fingerprint(weights)
    copy = tmp_path / "elsewhere" / weights.name
    copy.parent.mkdir()
    copy.write_bytes(weights.read_bytes())
    assert fingerprint(weights) == fingerprint(copy) == first
    assert len(first) == 64


@pytest.mark.parametrize("place", [0, 100, 9000, 13000, -1, -4000])
def test_a_flipped_byte_in_header_or_end_changes_the_fingerprint(weights, place):
    header = 8 + int.from_bytes(weights.read_bytes()[:8], "little")
    assert header > 13000
    before = fingerprint(weights)
    flip(weights, place)
    assert fingerprint(weights) != before


def test_another_size_or_name_changes_the_fingerprint(weights):
    before = fingerprint(weights)
    renamed = weights.rename(weights.with_name("other.safetensors"))
    assert fingerprint(renamed) != before
    renamed.rename(weights)
    with weights.open("ab") as file:
        file.write(b"\0")
    assert fingerprint(weights) != before


def test_trained_further_changes_the_fingerprint(weights):
    """Every tensor of it changes, so the samples do."""
    from safetensors.torch import load_file, save_file

    before = fingerprint(weights)
    save_file({name: tensor + 1e-3 for name, tensor in load_file(weights).items()}, str(weights))
    assert fingerprint(weights) != before


class CountingFile(io.FileIO):
    """A file that notes how much of it is read."""

    def read(self, size: int = -1) -> bytes:
        CountingPath.reads.append(size)
        return super().read(size)


class CountingPath(type(Path())):
    """A path that opens as a CountingFile."""

    reads: list[int] = []

    def open(self, mode: str) -> CountingFile:
        return CountingFile(self, mode)


def test_the_fingerprint_of_28_gb_reads_little(tmp_path):
    path = tmp_path / "model.safetensors"
    with path.open("wb") as file:
        file.write((100_000).to_bytes(8, "little"))
        file.truncate(28 * 10**9)  # a hole: costs no disk
    counted = CountingPath(path)
    fingerprint(counted)
    assert 100_000 < sum(CountingPath.reads) < 300_000


# --- in an interpreter of its own ---------------------------------------------------------------------------


def test_importing_the_modules_is_cheap(tmp_path):
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
        "import generate_prior, infer_from_prior, prior_utils, step_skip.cli.flags\n"
        "print([m for m in ('torch', 'diffsynth', 'modelscope', 'numpy', 'PIL') if m in sys.modules])"
    )
    assert run_as_user("-c", code, cwd=tmp_path).stdout == "[]\n"


def test_a_prior_of_a_14b_model_needs_a_gpu_too(prior_copy, run, refused, asked):
    from helpers import edit_metadata

    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    edit_metadata(prior_copy, model="I2V-480P")
    command = ("infer_from_prior", "--prior_dir", prior_copy, "--prompt", PROMPT)
    refused(lambda: run(*command), "I2V-480P", "needs a CUDA GPU", "--model tiny")
    assert not asked
    assert "diffsynth" in sys.modules  # so that the spy was in place


@pytest.mark.parametrize("content", [{}, {"weight": torch.zeros(1)}])
def test_weights_that_diffsynth_does_not_know_are_told_in_one_line(run, image, tmp_path, content):
    with_published_files(tmp_path, "I2V-480P")
    for path in tmp_path.rglob("*.safetensors"):
        path.write_bytes(safetensors.torch.save(content) if content else b"cut off")
    flags = ("--model", "I2V-480P", "--model_dir", tmp_path, "--device", "cpu", "--vram", "disk")
    outcome = run("generate_prior", *flags, "--image", image, "--output_dir", tmp_path / "priors")
    assert outcome.code == 2 and "can't load the weights" in outcome.error and "download" in outcome.error
