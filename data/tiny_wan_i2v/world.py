"""The drawn world the embedded model lives in: who, which motion, what stays open, and how to measure it.

    rng = np.random.default_rng(0)
    identity = sample_identity(rng)
    frames = render(identity, "left", sample_open_part(rng))     # uint8 [T, H, W, 3]
    measure(frames, identity).motion                                     # "left"

A clip is a cartoon character in front of a papered wall. The first frame gives the identity (colours, hair,
place, wall). The prompt gives the motion. Neither gives the open part: tempo, travel, wobble, and what the
buds on the wall bloom into, one of six patterns on every tile, whatever the motion.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

SIZE = 96  # pixels, square
FRAMES = 17
TILE = 16  # pixels: one tile of the wall is one patch of the transformer (VAE 8 x patch 2)
GRID = SIZE // TILE
BLOOMS = ("northwest", "northeast", "southwest", "southeast", "disc", "diamond")  # triangles after Truchet
BLOOM_FRAMES = (4.0, 9.0)  # buds open between these frames, then stay
BUD_RADIUS = 2.4
EDGE = 2.5  # pixels over which every outline fades
CONTRAST = 0.17  # norm of the colour step from wall to bloom, colours in 0..1
HAIR_STYLES = ("cap", "long", "puffs", "bun")

POSE = ("dx", "dy", "zoom", "tilt", "mouth", "eyes")  # pixels, pixels, log scale, radians, 0..1, 0..1
MOTIONS = ("left", "right", "up", "down", "closer", "away", "tilt", "speak", "sleep", "still")

SUBJECTS = ("the character", "she", "he", "somebody")
# motion -> (wordings trained on, wordings held out: every word of them is in a trained wording)
WORDINGS = {
    "left": (
        ("moves to the left", "goes left", "slides left", "steps to the left side", "walks to the left"),
        ("slides to the left", "walks left"),
    ),
    "right": (
        ("moves to the right", "goes right", "slides right", "steps to the right side", "walks to the right"),
        ("slides to the right", "walks right"),
    ),
    "up": (
        ("moves up", "rises", "goes upwards", "floats up", "lifts into the air"),
        ("goes up", "floats upwards"),
    ),
    "down": (
        ("moves down", "sinks", "goes downwards", "drops down", "ducks below"),
        ("goes down", "drops downwards"),
    ),
    "closer": (
        ("comes closer", "moves towards us", "approaches", "comes near the camera", "gets bigger"),
        ("moves closer", "comes towards the camera"),
    ),
    "away": (
        ("backs away", "moves away from us", "retreats", "goes far from the camera", "gets smaller"),
        ("moves away", "goes away from the camera"),
    ),
    "tilt": (
        ("tilts the head", "tilts her head", "leans his head", "bends the head over", "cocks his head"),
        ("tilts his head", "leans the head over"),
    ),
    "speak": (
        ("speaks", "talks", "opens her mouth", "is talking to us", "says something", "is speaking"),
        ("opens his mouth", "talks to us"),
    ),
    "sleep": (
        ("closes his eyes", "falls asleep", "shuts the eyes", "is sleeping", "sleeps"),
        ("closes her eyes", "shuts his eyes"),
    ),
    "still": (
        ("stays still", "does not move", "keeps still", "stands without moving", "is not moving"),
        ("keeps without moving", "stands still"),
    ),
}
NEUTRAL = (
    "a portrait of a character",
    "a character in front of a wall",
    "somebody in front of a papered wall",
)


@dataclass(frozen=True)
class Identity:
    """Who and where, all of it visible in the first frame. Colours are RGB in 0..1, lengths in pixels."""

    skin: tuple[float, float, float]
    hair: tuple[float, float, float]
    shirt: tuple[float, float, float]
    wall: tuple[float, float, float]
    bloom: tuple[float, float, float]
    x: float
    y: float
    radius: float
    aspect: float
    eye: float
    eye_gap: float
    style: int


@dataclass(frozen=True)
class OpenPart:
    """What neither the first frame nor the prompt decides. `blooms`: [GRID, GRID] indices into BLOOMS."""

    travel: float  # 0..1, how far within the motion's range
    tempo: float  # exponent of the motion's clock
    beat: float  # cycles of speech in the clip
    wobble: tuple[float, float]  # amplitudes in pixels, across and down
    rate: tuple[float, float]  # cycles per clip
    phase: tuple[float, float]
    blooms: np.ndarray


@dataclass(frozen=True)
class Measurement:
    """What a clip shows. Errors are root mean squares in 8-bit levels unless said otherwise."""

    motion: str
    pose: np.ndarray  # [tracked frames, 6], see POSE
    identity_error: float  # frame against the character redrawn in the tracked pose, inside its outline
    colour_error: float  # of the mean colours of skin, hair and shirt
    place_error: float  # pixels, first frame
    sharpness: float  # gradient energy over that of the clean drawing, last frame
    blooms: np.ndarray  # [GRID, GRID] best-fitting bloom per tile in the last frame, -1 where hidden
    bloom_error: float  # energy of what the best bloom leaves over that of the bloom, mean of visible tiles
    decided: float  # share of visible tiles whose bloom_error is below a quarter


def sample_identity(rng: np.random.Generator, *, contrast: float = CONTRAST) -> Identity:
    """A character whose parts can be told from each other and from the wall."""
    while True:
        skin, hair, shirt = (_vivid(rng) for _ in range(3))
        wall = rng.uniform(0.35, 0.65) + rng.uniform(-0.12, 0.12, 3)
        pairs = ((skin, hair), (skin, wall), (hair, wall), (shirt, wall), (skin, shirt))
        if min(np.linalg.norm(a - b) for a, b in pairs) > 0.35:
            break
    step = np.abs(rng.normal(size=3)) + 0.5
    bloom = wall + rng.choice((-1, 1)) * contrast * step / np.linalg.norm(step)
    colours = {"skin": skin, "hair": hair, "shirt": shirt, "wall": wall, "bloom": bloom}
    return Identity(
        **{name: tuple(float(v) for v in np.clip(colour, 0.02, 0.98)) for name, colour in colours.items()},
        x=float(rng.uniform(43, 53)),
        y=float(rng.uniform(41, 49)),
        radius=float(rng.uniform(19, 22)),
        aspect=float(rng.uniform(0.92, 1.12)),
        eye=float(rng.uniform(5.2, 6.0)),
        eye_gap=float(rng.uniform(8.2, 9.4)),
        style=int(rng.integers(len(HAIR_STYLES))),
    )


def sample_open_part(rng: np.random.Generator) -> OpenPart:
    """Everything that is left to the noise."""
    return OpenPart(
        travel=float(rng.uniform()),
        tempo=float(np.exp(rng.uniform(np.log(0.6), np.log(1.7)))),
        beat=float(rng.uniform(1.0, 2.0)),
        wobble=(float(rng.uniform(0, 2.0)), float(rng.uniform(0, 1.5))),
        rate=(float(rng.uniform(0.5, 2.0)), float(rng.uniform(0.5, 2.0))),
        phase=(float(rng.uniform(0, 2 * np.pi)), float(rng.uniform(0, 2 * np.pi))),
        blooms=rng.integers(len(BLOOMS), size=(GRID, GRID)),
    )


def sample_prompt(rng: np.random.Generator, motion: str, *, held_out: bool = False) -> str:
    """One way to say the motion, from the trained wordings or from those held out."""
    wordings = WORDINGS[motion][1 if held_out else 0]
    return f"{rng.choice(SUBJECTS)} {rng.choice(wordings)}"


def vocabulary() -> list[str]:
    """Every word of every prompt, sorted."""
    phrases = [phrase for trained, held_out in WORDINGS.values() for phrase in trained + held_out]
    return sorted({word for phrase in phrases + list(SUBJECTS) + list(NEUTRAL) for word in phrase.split()})


def render(identity: Identity, motion: str, open_part: OpenPart) -> np.ndarray:
    """A clip. uint8 [FRAMES, SIZE, SIZE, 3]"""
    wall = draw_wall(identity, open_part.blooms)  # [T, H, W, 3]
    colour, alpha = draw_character(identity, poses(motion, open_part))
    return to_uint8(wall + alpha[..., None] * (colour - wall))


def first_frame(identity: Identity) -> np.ndarray:
    """The image that says who: every clip of the identity begins with it. uint8 [SIZE, SIZE, 3]"""
    colour, alpha = draw_character(identity, np.zeros((1, len(POSE))))
    wall = draw_wall(identity, np.zeros((GRID, GRID), int))[:1]
    return to_uint8(wall + alpha[..., None] * (colour - wall))[0]


def poses(motion: str, open_part: OpenPart) -> np.ndarray:
    """The character's pose in every frame, zero in the first. [FRAMES, 6]"""
    clock = np.linspace(0, 1, FRAMES)
    done = (1 - np.cos(np.pi * clock**open_part.tempo)) / 2
    reach = open_part.travel
    pose = np.zeros((FRAMES, len(POSE)))
    for axis in (0, 1):
        turn = 2 * np.pi * open_part.rate[axis] * clock + open_part.phase[axis]
        pose[:, axis] = open_part.wobble[axis] * (np.sin(turn) - np.sin(open_part.phase[axis])) / 2
    if motion in ("left", "right"):
        pose[:, 0] += done * (12 + 5 * reach) * (-1 if motion == "left" else 1)
    elif motion in ("up", "down"):
        pose[:, 1] += done * (11 + 5 * reach) * (-1 if motion == "up" else 1)
    elif motion == "closer":
        pose[:, 2] = done * (0.30 + 0.15 * reach)
    elif motion == "away":
        pose[:, 2] = -done * (0.35 + 0.2 * reach)
    elif motion == "tilt":
        pose[:, 3] = done * (0.45 + 0.15 * reach)
    elif motion == "speak":
        pose[:, 4] = (0.8 + 0.2 * reach) * np.abs(np.sin(np.pi * open_part.beat * clock**open_part.tempo))
    elif motion == "sleep":
        pose[:, 5] = np.minimum(1.0, done * (1.2 + 0.8 * reach))
    elif motion != "still":
        raise ValueError(f"no motion {motion!r}; known: {', '.join(MOTIONS)}")
    return pose


def to_uint8(frames: np.ndarray) -> np.ndarray:
    """Colours in 0..1 to 8 bits."""
    return np.rint(np.clip(frames, 0, 1) * 255).astype(np.uint8)


# drawing


@lru_cache(maxsize=4)
def _pixels(stride: int) -> tuple[np.ndarray, np.ndarray]:
    """x and y of the pixel centres at one pixel in `stride`. two float32 [1, H, W]"""
    centre = (np.arange(SIZE // stride, dtype=np.float32) + 0.5) * stride
    return np.broadcast_to(centre, (1, len(centre), len(centre))), np.broadcast_to(
        centre[:, None], (1, len(centre), len(centre))
    )


def _ellipse(x: np.ndarray, y: np.ndarray, rx: np.ndarray | float, ry: np.ndarray | float) -> np.ndarray:
    """Approximate signed distance to an ellipse round the origin, negative inside."""
    k = np.sqrt((x / rx) ** 2 + (y / ry) ** 2) + 1e-6
    slope = np.sqrt((x / rx**2) ** 2 + (y / ry**2) ** 2) + 1e-6
    return k * (k - 1) / slope


def _cover(distance: np.ndarray, width: np.ndarray | float = EDGE) -> np.ndarray:
    """Share of a pixel that a shape covers, from the signed distance to its edge."""
    return np.clip(0.5 - distance / width, 0, 1)


def draw_character(identity: Identity, pose: np.ndarray, *, stride: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """The character in every pose. pose: [T, 6] -> colour [T, H, W, 3], alpha [T, H, W]"""
    dx, dy, zoom, tilt, mouth, eyes = (
        column.astype(np.float32)[:, None, None] for column in np.asarray(pose).T
    )
    scale = np.exp(zoom)
    px, py = _pixels(stride)
    x, y = (px - identity.x - dx) / scale, (py - identity.y - dy) / scale  # body frame, origin at the head
    r, rx = identity.radius, identity.radius * identity.aspect
    soft = max(stride, EDGE) / scale
    cos, sin = np.cos(tilt), np.sin(tilt)
    pivot = 0.9 * r  # the head turns about the neck
    hx, hy = cos * x + sin * (y - pivot), -sin * x + cos * (y - pivot) + pivot
    body = np.minimum(
        _ellipse(x, y - 2.1 * r, 1.25 * r, 1.2 * r), np.maximum(np.abs(x) - 1.25 * r, 2.1 * r - y)
    )
    gx, gy = 2.0 * np.tanh(dx / 8), 2.0 * np.tanh(dy / 8)  # it looks where it goes
    side = np.abs(hx) - identity.eye_gap
    ball = _ellipse(side, hy, identity.eye * 0.8, identity.eye * (1.02 - 0.9 * eyes))
    pupil = np.maximum(
        _ellipse(side * np.sign(hx) - gx * np.ones_like(hx), hy - gy, 3.0, 3.4),
        ball,
    )
    lips = _ellipse(hx, hy - 0.62 * r, 6.0 + 0.8 * mouth, 1.4 + 4.9 * mouth)
    ink, white, red = (0.08, 0.06, 0.1), (0.97, 0.97, 0.97), (0.55, 0.05, 0.12)
    layers = (
        (_hair_behind(identity, hx, hy), identity.hair, 1.0),
        (body, identity.shirt, 1.0),
        (_ellipse(hx, hy, rx, r), identity.skin, 1.0),
        (np.maximum(_ellipse(hx, hy + 0.05 * r, 1.08 * rx, 1.1 * r), hy + 0.38 * r), identity.hair, 1.0),
        (ball, white, 1.0 - eyes),
        (pupil, ink, 1.0 - eyes),
        (_ellipse(side, hy, identity.eye * 0.8, 1.4), ink, eyes),
        (lips, red, 1.0),
    )
    shape = np.broadcast_shapes(hx.shape, dx.shape)
    colour, alpha = np.zeros((*shape, 3), np.float32), np.zeros(shape, np.float32)
    for distance, paint, opacity in layers:
        cover = (_cover(distance, soft) * opacity)[..., None]
        colour += cover * (np.asarray(paint, np.float32) - colour)
        alpha = alpha + cover[..., 0] * (1 - alpha)
    return colour, alpha


def _hair_behind(identity: Identity, hx: np.ndarray, hy: np.ndarray) -> np.ndarray:
    """The part of the hair that the head hides, which is what tells the styles apart."""
    r, rx = identity.radius, identity.radius * identity.aspect
    style = HAIR_STYLES[identity.style]
    if style == "long":
        return np.maximum(_ellipse(hx, hy - 0.15 * r, 1.3 * rx, 1.35 * r), hy - 1.05 * r)
    if style == "puffs":
        return _ellipse(np.abs(hx) - 0.95 * rx, hy + 0.75 * r, 0.5 * r, 0.5 * r)
    if style == "bun":
        return _ellipse(hx, hy + 1.25 * r, 0.45 * r, 0.45 * r)
    return _ellipse(hx, hy + 0.05 * r, 1.08 * rx, 1.1 * r) + 0.38 * r


@lru_cache(maxsize=1)
def bloom_masks() -> np.ndarray:
    """Coverage of every bloom on one tile. [len(BLOOMS), TILE, TILE]"""
    centre = np.arange(TILE) + 0.5 - TILE / 2
    x, y = np.meshgrid(centre, centre)
    far = np.hypot(x, y)

    distances = {
        "northwest": (x + y) / np.sqrt(2),
        "northeast": (y - x) / np.sqrt(2),
        "southwest": (x - y) / np.sqrt(2),
        "southeast": -(x + y) / np.sqrt(2),
        "disc": far - 6.4,
        "diamond": 5.3 - (np.abs(x) + np.abs(y)) / np.sqrt(2),
    }
    return np.stack([_cover(distances[name]) for name in BLOOMS]).astype(np.float32)


@lru_cache(maxsize=1)
def _bud_mask() -> np.ndarray:
    centre = np.arange(TILE) + 0.5 - TILE / 2
    return _cover(np.hypot(*np.meshgrid(centre, centre)) - BUD_RADIUS).astype(np.float32)


def draw_wall(identity: Identity, blooms: np.ndarray) -> np.ndarray:
    """The wall in every frame, its buds opening. blooms: [GRID, GRID] -> [FRAMES, SIZE, SIZE, 3]"""
    start, end = BLOOM_FRAMES
    opened = np.clip((np.arange(FRAMES) - start) / (end - start), 0, 1).astype(np.float32)[:, None, None]
    flower = bloom_masks()[blooms].transpose(0, 2, 1, 3).reshape(SIZE, SIZE)
    mask = np.tile(_bud_mask(), (GRID, GRID)) * (1 - opened) + flower * opened  # [T, H, W]
    wall, bloom = np.asarray(identity.wall, np.float32), np.asarray(identity.bloom, np.float32)
    return wall + mask[..., None] * (bloom - wall)


def _vivid(rng: np.random.Generator) -> np.ndarray:
    """A colour from anywhere in the cube but the greys' middle."""
    return rng.uniform(0.05, 0.95, 3)


# measuring

TRACKED = tuple(range(2, FRAMES, 2))
UNIT = np.array([12.0, 11.0, 0.32, 0.45, 0.8, 0.8])  # a motion's least reach along each axis of the pose
POSE_STEP = np.array([0.5, 0.5, 0.02, 0.03, 0.06, 0.06])
POSE_LIMIT = np.array([30.0, 30.0, 0.9, 1.0, 1.15, 1.05])
# how far a pose may have moved since the frame tracked before, as starts for the fit: [n, 6]
JUMPS = np.concatenate(
    [np.zeros((1, 6)), np.diag([4, 4, 0.12, 0.2, 0.8, 0.5]), np.diag([-4, -4, -0.12, -0.2, -0.8, -0.5])]
)


def measure(frames: np.ndarray, identity: Identity) -> Measurement:
    """Follow the character through a clip and compare it with its drawing. frames: uint8 [T, H, W, 3]"""
    video = np.asarray(frames, np.float32) / 255
    if video.shape != (FRAMES, SIZE, SIZE, 3):
        raise ValueError(f"expected frames of shape {(FRAMES, SIZE, SIZE, 3)}, got {video.shape}")
    start = _fit(video[0], identity, np.zeros(len(POSE)))
    pose = track(video, identity)
    late = TRACKED[-3:]
    exact = np.stack(
        [
            _gauss_newton(video[t], identity, p[None], stride=1, rounds=3)
            for t, p in zip(late, pose[-3:], strict=True)
        ]
    )
    drawn, alpha = draw_character(identity, exact)
    shown = video[list(late)]
    inside = alpha > 0.99
    blooms, leftover = _fit_blooms(video[-1], identity, alpha[-1])
    visible = blooms >= 0
    clean = draw_wall(identity, np.maximum(blooms, 0))[-1]
    clean = clean + alpha[-1][..., None] * (drawn[-1] - clean)
    return Measurement(
        motion=classify(pose),
        pose=pose,
        identity_error=float(255 * np.sqrt(np.mean((shown - drawn)[inside] ** 2))),
        colour_error=_colour_error(shown, drawn, inside, identity),
        place_error=float(np.hypot(*start[:2])),
        sharpness=_gradient_energy(video[-1]) / _gradient_energy(clean),
        blooms=blooms,
        bloom_error=float(leftover[visible].mean()) if visible.any() else float("nan"),
        decided=float((leftover[visible] < 0.25).mean()) if visible.any() else float("nan"),
    )


def track(video: np.ndarray, identity: Identity, *, frames: Iterable[int] = TRACKED) -> np.ndarray:
    """The pose in every second frame. video: float [T, H, W, 3] in 0..1 -> [len(frames), 6]"""
    found = [np.zeros(len(POSE))]
    for frame in frames:
        found.append(_fit(video[frame], identity, found[-1]))
    return np.stack(found[1:])


def classify(pose: np.ndarray) -> str:
    """The motion whose reach the track comes nearest to, "still" if half-way to none. pose: [n, 6]"""
    end = pose[-3:].mean(0) / UNIT
    said = {
        "left": -end[0],
        "right": end[0],
        "up": -end[1],
        "down": end[1],
        "closer": end[2],
        "away": -end[2],
        "tilt": end[3],
        "speak": np.sort(pose[:, 4])[-2] / UNIT[4],
        "sleep": end[5],
    }
    best = max(said, key=said.get)
    return best if said[best] > 0.5 else "still"


def _fit(frame: np.ndarray, identity: Identity, near: np.ndarray, *, strides: tuple = (4, 2)) -> np.ndarray:
    """The pose that draws the frame best: from the best of some poses near the last one, coarse to fine.

    frame: [H, W, 3], near: [6] -> [6]
    """
    starts = np.clip(near + JUMPS, -POSE_LIMIT, POSE_LIMIT)
    starts[:, 4:] = np.clip(starts[:, 4:], 0, 1)
    pose = _gauss_newton(frame, identity, starts, stride=strides[0])
    for stride in strides[1:]:
        pose = _gauss_newton(frame, identity, pose[None], stride=stride)
    return pose


def _gauss_newton(
    frame: np.ndarray, identity: Identity, starts: np.ndarray, *, stride: int, rounds: int = 6
) -> np.ndarray:
    """Damped least squares from the best of the starts, on a frame shrunk by `stride`. starts: [n, 6] -> [6]

    Residuals are bounded, for the blooms on the wall are not in the drawing it is compared with.
    """
    small = SIZE // stride
    target = frame.reshape(small, stride, small, stride, 3).mean((1, 3))
    wall = np.asarray(identity.wall, np.float32)

    def residual(poses: np.ndarray) -> np.ndarray:
        colour, alpha = draw_character(identity, poses, stride=stride)
        error = wall + alpha[..., None] * (colour - wall) - target
        return (0.5 * np.tanh(error / 0.5)).reshape(len(poses), -1)

    errors = (residual(starts) ** 2).sum(1)
    pose, best = starts[errors.argmin()], errors.min()
    step = POSE_STEP * stride / 2
    for _ in range(rounds):
        near = residual(np.concatenate([pose[None], pose + np.diag(step)]))
        slope = near[1:] - near[:1]  # [6, n], per step
        hessian, downhill = slope @ slope.T, slope @ near[0]
        tries = np.repeat(pose[None], 3, 0)
        for row, damping in zip(tries, (1e-2, 0.5, 5.0), strict=True):
            row -= np.linalg.solve(hessian + damping * np.diag(np.diag(hessian) + 1e-4), downhill) * step
        tries = np.clip(tries, -POSE_LIMIT, POSE_LIMIT)
        tries[:, 4:] = np.clip(tries[:, 4:], 0, None)
        errors = (residual(tries) ** 2).sum(1)
        if errors.min() >= best * 0.9999:
            break
        pose, best = tries[errors.argmin()], errors.min()
    return pose


def _fit_blooms(frame: np.ndarray, identity: Identity, alpha: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Best bloom per tile (-1 where the character hides it) and its relative error. both [GRID, GRID]"""
    wall, bloom = np.asarray(identity.wall, np.float32), np.asarray(identity.bloom, np.float32)
    tiles = frame.reshape(GRID, TILE, GRID, TILE, 3).transpose(0, 2, 1, 3, 4) - wall  # [g, g, t, t, 3]
    masks = bloom_masks()
    error = ((tiles[:, :, None] - masks[..., None] * (bloom - wall)) ** 2).sum((3, 4, 5))  # [g, g, k]
    error = error / ((masks**2).sum((1, 2)) * ((bloom - wall) ** 2).sum())
    hidden = alpha.reshape(GRID, TILE, GRID, TILE).max((1, 3)) > 0.01
    return np.where(hidden, -1, error.argmin(-1)), error.min(-1)


def _colour_error(shown: np.ndarray, drawn: np.ndarray, inside: np.ndarray, identity: Identity) -> float:
    """Root mean square difference of the mean colours of skin, hair and shirt, in 8-bit levels."""
    errors = []
    for paint in (identity.skin, identity.hair, identity.shirt):
        part = inside & (np.abs(drawn - np.asarray(paint, np.float32)).max(-1) < 0.01)
        if part.sum() > 20:
            errors.append(shown[part].mean(0) - drawn[part].mean(0))
    return float(255 * np.sqrt(np.mean(np.square(errors)))) if errors else float("nan")


def _gradient_energy(frame: np.ndarray) -> float:
    return float((np.diff(frame, axis=0) ** 2).sum() + (np.diff(frame, axis=1) ** 2).sum())


def agreement(first: Measurement, second: Measurement) -> float:
    """Share of the tiles visible in both clips that show the same bloom (chance: one in six)."""
    both = (first.blooms >= 0) & (second.blooms >= 0)
    return float((first.blooms == second.blooms)[both].mean()) if both.any() else float("nan")
