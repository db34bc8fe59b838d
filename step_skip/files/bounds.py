"""The bounds on what is read from files and accepted from users, in one table.

Each is far beyond what any real use needs, so that no time or memory goes into what cannot be right.
"""

from __future__ import annotations

MAX_STEPS = 10_000
MAX_NAME = 1000  # characters of what is no prompt: ids, names of devices, versions, paths
MAX_PIXELS = 2**31  # of all frames together; 81 frames of 720 x 1280 are 1/28 of it
LIMITS = {  # what can be made and read; far beyond what any machine holds
    "height": (1, 16384),
    "width": (1, 16384),
    "num_frames": (1, 4097),
    "fps": (0.1, 1000),
    "seed": (0, 2**63 - 1),
}


def is_number(value: object) -> bool:
    """Whether a value from JSON is a finite number."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    return abs(value) < 1e30  # false for NaN and infinity, too


def is_utf8(text: str) -> bool:
    """Whether the text can be written as UTF-8: a shell or an escape in JSON may give half a character."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def short(value: object) -> str:
    """A value as an error shows it."""
    try:
        text = repr(value)
    except ValueError:  # an integer of thousands of digits
        text = f"a {type(value).__name__} too long to show"
    return text if len(text) <= 60 else text[:57] + "..."


MAX_HEADER_BYTES = 2**24  # of a safetensors file; those of a 14B model and of its LoRAs have some 100 KB
MAX_SMALL_HEADER_BYTES = 2**22  # of one with a few tensors; it may hold a prompt, or a workflow of ComfyUI
MAX_METADATA_BYTES = 16 * 2**20
MAX_REPORT_BYTES = 2**20  # of a clip's JSON; one has some 5 KB
MAX_METADATA_DEPTH = 10  # objects in objects; so nothing that walks through them can overflow

MAX_DIRECTORY_BYTES = 2**14  # of a .pt file; one has some 500
MAX_PICKLE_BYTES = 2**12  # in a .pt file; one has some 200
MAX_TENSOR_BYTES = 2**30  # the latents of the largest video that can be made take half of it
MAX_CONTEXT_BYTES = 2**26  # a Wan2.1 context has 8 MiB

MAX_TOKENS = 4096  # of a prompt or an image; Wan2.1 has 512 and 257
MAX_LORA_BYTES = 2**33  # one of rank 256 for a 14B model has a third of it
MAX_BOXES = 100  # of an .mp4; ffmpeg writes four
MAX_AREA = 2**25  # pixels of a frame that is decoded for a page: 8K
MAX_DECODE_SECONDS = 120  # of one video; 81 frames of 720 x 1280 take some 3
MAX_LATENT_BYTES = 2**30  # 81 frames of 720 x 1280 pixels have 19 MB
MAX_POSTER_BYTES = 2**21
MAX_PROMPTS_BYTES = 16 * 2**20
MAX_EMBEDDED_BYTES = 2**15  # ffmpeg takes them as an argument, whose length systems limit
