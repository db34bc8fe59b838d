"""Prior-based step skip for Wan video, from Python.

    from step_skip import generate_prior, infer_from_prior

    prior = generate_prior(pipe, "face.png", prompt="she stays still")
    infer_from_prior(pipe, prior, prompt="she speaks").save("speaks.mp4")

`pipe` is any WanVideoPipeline, or what `load` gives. docs/python.md has the rest. Importing this is cheap.
"""

from step_skip.api import generate_priors, infer_from_priors
from step_skip.errors import DiskError, InputError, RunError
from step_skip.generate.generate import generate_prior
from step_skip.infer.clip import Clip
from step_skip.infer.infer import infer_from_prior
from step_skip.models.loading import Model, load
from step_skip.models.weights import LoadOptions
from step_skip.prior.metadata import read_prior
from step_skip.prior.preview import preview_to
from step_skip.prior.prior import Prior

__all__ = [
    "Clip",
    "DiskError",
    "InputError",
    "LoadOptions",
    "Model",
    "Prior",
    "RunError",
    "generate_prior",
    "generate_priors",
    "infer_from_prior",
    "infer_from_priors",
    "load",
    "preview_to",
    "read_prior",
]
