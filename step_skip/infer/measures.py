"""Measure a clip by its own frames: nothing is downloaded, no reference is needed.

    identity    PSNR in dB of the late frames to the first frame warped along the motion: how much changed in
                another way than by moving; also low where the motion uncovers much
    movement    how far the tenth of the picture that moves most goes, in heights of the frame
    flicker     8-bit levels: the difference of a frame to the frames before and after, warped to it

The motion is that of OpenCV's dense inverse search, from frame to frame, on frames of at most SIDE pixels.
docs/measures.md has how far each agrees with a truth that is known, and what none of them can tell.
"""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Final

from step_skip.files.bounds import is_number

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image

log = logging.getLogger(__name__)

SIDE = 192  # pixels of a frame's shorter side, of which the motion is found
LATE_FRAMES = (0.75, 0.875, 1.0)  # of the clip: where it is held against its first frame
LIVELIEST = 90  # percentile
MOST_IDENTITY = 60.0  # dB; without any change it would be infinite
WORDS: Final[Mapping[str, str]] = {  # of a result's JSON: what people are told of it, in this order
    "identity": "identity {:.1f} dB",
    "movement": "movement {:.2f}",
    "flicker": "flicker {:.1f}",
    "predicted_closeness": "predicted {:.1f} dB to a full run",
}


def measures_of(frames: Sequence[Image]) -> dict[str, float]:
    """Measure a clip by `measure_frames`; if that fails, warn and return nothing: no clip is lost over it."""
    try:
        return measure_frames(frames)
    except Exception as error:  # cv2.error, a missing package, no memory
        log.warning(f"the clip could not be measured ({type(error).__name__}: {str(error)[:100]})")
        return {}


def measure_frames(frames: Sequence[Image]) -> dict[str, float]:
    """Return the measures of a clip by name, see above; none for less than three frames."""
    import cv2
    import numpy as np

    if len(frames) < 3:
        return {}
    small = [shrink(np.asarray(frame)) for frame in frames]  # uint8 [H, W, 3]
    grey = [cv2.cvtColor(each, cv2.COLOR_RGB2GRAY) for each in small]
    search = cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
    back = [search.calc(new, old, None) for old, new in itertools.pairwise(grey)]  # [H, W, 2] each, pixels
    ahead = [search.calc(old, new, None) for old, new in itertools.pairwise(grey)]
    late = sorted({round(share * (len(frames) - 1)) for share in LATE_FRAMES})
    lost = []
    carried = np.zeros_like(back[0])  # from each frame back to the first
    for number, flow in enumerate(back, 1):
        carried = flow + moved(carried, flow)
        if number in late:
            path = search.calc(grey[number], grey[0], carried.copy())  # from there on, it may be nearer
            apart = moved(small[0], path).astype(np.float32) - small[number]
            lost.append(np.sqrt(np.square(apart).mean(-1)).mean())
    found = {
        "identity": min(MOST_IDENTITY, 20 * math.log10(255 / max(float(np.mean(lost)), 1e-9))),
        "movement": sum(np.percentile(np.hypot(*np.moveaxis(flow, -1, 0)), LIVELIEST) for flow in back)
        / grey[0].shape[0],
        "flicker": flicker(small, back, ahead),
    }
    return {name: round(float(value), 4) for name, value in found.items() if np.isfinite(value)}


def shrink(frame: np.ndarray) -> np.ndarray:
    """Shrink a frame, [H, W, 3] uint8, so that its shorter side has at most SIDE pixels."""
    import cv2

    height, width, _ = frame.shape
    scale = SIDE / min(height, width)
    if scale >= 1:
        return frame
    return cv2.resize(frame, (round(width * scale), round(height * scale)), interpolation=cv2.INTER_AREA)


def moved(values: np.ndarray, flow: np.ndarray) -> np.ndarray:
    """Warp values, [H, W, C], backwards along a flow, [H, W, 2] in pixels."""
    import cv2
    import numpy as np

    y, x = np.indices(flow.shape[:2], dtype=np.float32)
    places = x + flow[..., 0], y + flow[..., 1]
    return cv2.remap(values, *places, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)


def flicker(frames: Sequence[np.ndarray], back: Sequence[np.ndarray], ahead: Sequence[np.ndarray]) -> float:
    """Compute the second difference in time along the motion: root mean square, 8-bit levels."""
    import numpy as np

    squares = []
    for number in range(1, len(frames) - 1):
        before = moved(frames[number - 1], back[number - 1]).astype(np.float32)
        after = moved(frames[number + 1], ahead[number]).astype(np.float32)
        squares.append(np.square(before - 2 * frames[number].astype(np.float32) + after).mean())
    return math.sqrt(np.mean(squares))


def describe_measures(report: Mapping[str, object]) -> list[str]:
    """Describe the measures in a clip's JSON, each in a few words."""
    return [words.format(report[name]) for name, words in WORDS.items() if is_number(report.get(name))]
