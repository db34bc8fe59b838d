"""Show the clips of a folder side by side: index.html, where they play in step, and contact_sheet.png.

    python prior_utils.py page prior_output/run_<id>/outputs
    step_skip_page prior_output/run_<id>/outputs        # of an installed package

The folder is one that infer_from_prior.py wrote to: a sweep's, or a prior's outputs. The page has a section
per prior with a grid of prompt x steps; it links to the clips by relative paths, needs no server, and what
it shows lies in the folder: copied elsewhere it is complete. Of more than 300 clips every prior has a page
of its own, and index.html leads to them. The last line on stdout is the page.
"""

from __future__ import annotations

from pathlib import Path

from step_skip.cli.flags import Parser, utf8_path
from step_skip.cli.terminal import run_script
from step_skip.page.page import write_page


def main(argv: list[str] | None = None) -> Path:
    """Write the page of the folder on the command line and return its path."""
    parser = Parser(__doc__)
    parser.add_argument("folder", type=utf8_path, help="where the clips and their JSON files are")
    return write_page(parser.parse_args(argv).folder)


def command() -> None:
    """Run the console script of an installed package."""
    run_script(main)


if __name__ == "__main__":
    command()
