"""A wrong flag is found before the model is loaded: exit 2, one line, nothing changed on disk."""

from __future__ import annotations

import pytest
from helpers import PROMPT, SIZE

NOT_UTF8 = "\udcff\udcfe"  # how Python hands over the bytes ff fe from a shell


# --- generate_prior.py --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--num_inference_steps", 0), ["--num_inference_steps", "above 0"]),
        (("--num_inference_steps", "ten"), ["--num_inference_steps", "'ten'"]),
        (("--num_inference_steps", 10001), ["10001", "at most 10000"]),
        (("--start_step", 10), ["--start_step 10", "steps 0 to 9"]),
        (("--start_step", -1), ["--start_step", "below 0"]),
        (("--cfg_scale", "nan"), ["--cfg_scale", "above 0"]),
        (("--cfg_scale", "inf"), ["--cfg_scale", "above 0"]),
        (("--cfg_scale", 0), ["--cfg_scale", "above 0"]),
        (("--sigma_shift", -5), ["--sigma_shift", "above 0"]),
        (("--sigma_shift", 1e9), ["steps 0 and 1", "--sigma_shift"]),
        (("--denoising_strength", 0.6), ["--denoising_strength 0.6", "--input_video"]),
        (("--denoising_strength", 1.5), ["--denoising_strength", "above 1"]),
        (("--seed", -1), ["--seed", "range 0 to"]),
        (("--seed", 2**64), ["--seed", "range 0 to"]),
        (("--height", 0), ["--height", "range 1 to 16384"]),
        (("--height", 10**9, "--width", 10**9), ["--height", "range 1 to 16384"]),
        (("--num_frames", 10**6), ["--num_frames", "range 1 to 4097"]),
        (("--fps", 1e9), ["--fps", "range"]),
        (("--run_id", "../elsewhere"), ["--run_id '../elsewhere'", "letters"]),
        (("--run_id", ""), ["--run_id", "letters"]),
        (("--prompt", NOT_UTF8), ["--prompt", "not valid UTF-8"]),
        (("--negative_prompt", NOT_UTF8), ["--negative_prompt", "not valid UTF-8"]),
        (("--output_dir", f"priors_{NOT_UTF8}"), ["--output_dir", "not valid UTF-8"]),
        (("--device", "gpu"), ["--device gpu", "cpu, cuda"]),
        (("--device", "meta"), ["--device meta", "cpu, cuda"]),
        (("--dtype", "int8"), ["--dtype", "int8", "bfloat16"]),
        (("--model", "I2V-14B"), ["--model", "I2V-480P"]),
        (("--no_such\nflag", "1"), ["unrecognized", "--no_such"]),
        (("--prom", PROMPT), ["unrecognized", "--prom"]),
        (("--download_example",), ["--download_example", "not allowed with", "--image"]),
    ],
)
def test_flags_of_generate(generate, refused, image, flags, words):
    refused(lambda: generate("--image", image, *flags), *words)


def test_no_image_at_all(generate, refused):
    refused(generate, "--image is missing: tiny needs a first frame")


# --- infer_from_prior.py ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--start_step", 10), ["--start_step 10", "steps 0 to 9"]),
        (("--start_step", -1), ["--start_step", "below 0"]),
        (("--num_inference_steps", 20), ["--num_inference_steps 20", "the prior has 10"]),
        (("--denoising_strength", 0.5), ["--denoising_strength 0.5", "the prior has 1.0"]),
        (("--sigma_shift", 3), ["--sigma_shift 3", "the prior has 5.0"]),
        (("--model", "I2V-480P"), ["--model I2V-480P", "the prior has tiny"]),
        (("--dtype", "bfloat16"), ["--dtype bfloat16", "the prior has float32"]),
        (("--seed", 3), ["--seed is fixed by the prior: 0, not 3", "generate_prior.py --seed 3"]),
        (("--num_frames", 33), ["--num_frames is fixed by the prior: 9, not 33"]),
        (("--height", 64, "--width", SIZE), ["--height is fixed by the prior: 32, not 64"]),
        (("--fps", 0), ["--fps", "range"]),
        (("--cfg_scale", "nan"), ["--cfg_scale", "above 0"]),
        (("--prompt", NOT_UTF8), ["--prompt", "not valid UTF-8"]),
        (("--output", f"{NOT_UTF8}.mp4"), ["--output", "not valid UTF-8"]),
        (("--output", "video.avi"), ["--output video.avi", ".mp4"]),
        (("--output", "a" * 300 + ".mp4"), ["304 bytes is too long"]),
        (("--output", "a" * 251 + ".mp4"), ["255 bytes is too long"]),  # for the .json beside it
        (("--overwrite",), ["--overwrite", "give --output"]),
        (("--image", "nowhere.png"), ["nowhere.png is not a file"]),
        (("--steps", 3, 2), ["--steps", "increasing"]),
        (("--steps", 2, 2), ["--steps", "increasing"]),
        (("--steps", 2, 10), ["--steps", "between 0 and 9"]),
        (("--num_steps", 11), ["--num_steps 11", "10 steps"]),
        (("--steps", 2, "--start_step", 6), ["--start_step", "not allowed with"]),
    ],
)
def test_flags_of_infer(prior_copy, infer, refused, flags, words):
    refused(lambda: infer(prior_copy, *flags), *words)
