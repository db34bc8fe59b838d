"""Define the bounds on values that are read from files or accepted from users, in one table.

Each bound is far above what any real use needs, so that no time or memory is spent on invalid input.
"""

from __future__ import annotations

MAX_STEPS = 10_000
MAX_NAME = 1000  # characters of any text that is not a prompt: ids, names of devices, versions, paths
MAX_FILE_NAME = 200  # characters of a name that becomes a part of a file's name; systems allow 255 bytes
MAX_PIXELS = 2**31  # of all frames together; 81 frames of 720 x 1280 are 1/28 of it
LIMITS = {  # smallest and largest value of each setting; the largest exceed the memory of any machine
    "height": (1, 16384),
    "width": (1, 16384),
    "num_frames": (1, 4097),
    "fps": (0.1, 1000),
    "seed": (0, 2**63 - 1),
}


def is_number(value: object) -> bool:
    """Return whether a value from JSON is a finite number."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    return abs(value) < 1e30  # false for NaN and infinity, too


def is_utf8(text: str) -> bool:
    """Return whether a text can be encoded as UTF-8; a shell or a JSON escape may give a lone surrogate."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def short(value: object) -> str:
    """Return a value's repr for an error message, at most 60 characters long."""
    try:
        text = repr(value)
    except ValueError:  # an integer of thousands of digits
        text = f"a {type(value).__name__} too long to show"
    return text if len(text) <= 60 else text[:57] + "..."


MAX_HEADER_BYTES = 2**24  # of a safetensors file; headers of a 14B model and of its LoRAs have some 100 KB
MAX_SMALL_HEADER_BYTES = 2**22  # of one with a few tensors; it may hold a prompt, or a workflow of ComfyUI
MAX_METADATA_BYTES = 16 * 2**20
MAX_REPORT_BYTES = 2**20  # of a clip's JSON; one has some 5 KB
MAX_METADATA_DEPTH = 10  # objects in objects; so nothing that walks through them can overflow

MAX_DIRECTORY_BYTES = 2**14  # of a .pt file; one has some 500
MAX_PICKLE_BYTES = 2**12  # in a .pt file; one has some 200
MAX_TENSOR_BYTES = 2**30  # the latents of the largest clip within LIMITS take half of it
MAX_CONTEXT_BYTES = 2**26  # a Wan2.1 context has 8 MiB

MAX_TOKENS = 4096  # of a prompt or an image; Wan2.1 has 512 and 257
MAX_LORA_BYTES = 2**33  # a LoRA of rank 256 for a 14B model has a third of it
MAX_BOXES = 100  # boxes of an .mp4 file; ffmpeg writes four
MAX_AREA = 2**25  # pixels of a frame that is decoded for a page: 8K
MAX_DECODE_SECONDS = 120  # of one video; 81 frames of 720 x 1280 take some 3
MAX_LATENT_BYTES = 2**30  # of a .latent file; 81 frames of 720 x 1280 pixels have 19 MB
MAX_PREVIEW_BYTES = 2**26
MAX_POSTER_BYTES = 2**21
MAX_PROMPTS_BYTES = 16 * 2**20
MAX_EMBEDDED_BYTES = 2**15  # of tags in an .mp4 file; ffmpeg takes them as an argument of limited length
