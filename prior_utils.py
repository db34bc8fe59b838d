"""What the scripts share, for whoever has a prior in hand: save, load, verify, check the schedule.

    python prior_utils.py prior_output/run_*          # looks at every file and says what is still usable
    python prior_utils.py list                        # those in prior_output: name, prompt, steps, clips
    python prior_utils.py show prior_output/run_mila
    python prior_utils.py prune prior_output/run_*    # what could go of them; with --yes it goes
    python prior_utils.py rm prior_output/run_mila    # likewise, all of it
    python prior_utils.py export prior_output/run_mila --step 6    # its latents as a .latent of ComfyUI
    python prior_utils.py import latents/*.latent     # a run that was made there, as a prior
    python prior_utils.py page prior_output/run_mila/outputs       # the page of a folder of clips

The names here stay; the parts they come from are in step_skip.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from step_skip.cli.manage import (
    COMMANDS,
    export_prior,
    import_prior,
    list_priors,
    parse_command,
    prune_priors,
    remove_priors,
    show_prior,
    verify,
)
from step_skip.cli.terminal import run_script
from step_skip.errors import InputError, RunError
from step_skip.files.reading import sha256_file
from step_skip.files.tensors import DTYPES, sha256_tensor
from step_skip.files.writing import replacing, write_json
from step_skip.page.__main__ import main as write_page_of
from step_skip.pipeline.settings import RunSettings
from step_skip.prior.checks import check_schedule
from step_skip.prior.files import check_files, load_conditioning, load_denoised, load_latents
from step_skip.prior.metadata import FORMAT_VERSION, read_prior, read_run, sealed
from step_skip.prior.prior import (
    IMAGE_FILE,
    OUTPUT_FILE,
    Prior,
    noise_pred_file,
    step_file,
)
from step_skip.prior.schema import METADATA_FILE
from step_skip.prior.writer import PriorWriter

__all__ = [
    "DTYPES",
    "FORMAT_VERSION",
    "IMAGE_FILE",
    "METADATA_FILE",
    "OUTPUT_FILE",
    "InputError",
    "Prior",
    "PriorWriter",
    "RunError",
    "RunSettings",
    "check_files",
    "check_schedule",
    "load_conditioning",
    "load_denoised",
    "load_latents",
    "noise_pred_file",
    "read_prior",
    "read_run",
    "replacing",
    "sealed",
    "sha256_file",
    "sha256_tensor",
    "step_file",
    "verify",
    "write_json",
]


def main(argv: list[str] | None = None) -> str | Path:
    """List, show, remove, prune, export or import priors, or verify them, as infer_from_prior.py --verify."""
    argv = sys.argv[1:] if argv is None else argv
    if argv and argv[0] == "page":
        return write_page_of(argv[1:])
    with_parsers = {"prune": prune_priors, "export": export_prior, "import": import_prior}
    if argv and argv[0] in with_parsers:
        return with_parsers[argv[0]](argv[1:])
    if argv and argv[0] in COMMANDS:
        args = parse_command(argv)
        if argv[0] == "rm":
            return remove_priors(args.prior_dir, sure=args.yes)
        if argv[0] == "list":
            return list_priors(args.prior_dir)
        return "\n\n".join(map(show_prior, args.prior_dir))
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("prior_dir", type=Path, nargs="+", metavar="DIR", help="a run_<id> folder")
    return verify(parser.parse_args(argv).prior_dir)


def command() -> None:
    """Run the console script of an installed package."""
    run_script(main)


if __name__ == "__main__":
    command()
