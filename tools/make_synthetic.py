"""Draw synthetic people in the on-disk layout of SYSU-MM01, RegDB or LLCM; the real sets are under licence.

    python -m tools.make_synthetic --dataset sysu  --out data/toy --ids 130 --seed 0 --difficulty easy
    python -m tools.make_synthetic --dataset regdb --out data/toy_regdb --full

A person is a set of attributes drawn once. Build, hair, bag, garment shapes and patterns show in both modalities,
colours only in visible light, infrared reflectances only in infrared. --difficulty decides how far the two agree and
how much the cameras differ: "easy" people look alike in all cameras, "hard" ones defy a small network. Each image has
a random stream of its own, so a tree is the same byte for byte whatever --workers says (on one Pillow version).
"""

import functools
import json
import math
import os
import shutil
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import PIL
from PIL import Image, ImageDraw, ImageFilter
from tqdm import tqdm

import utils

VERSION = 4  # of the drawing; raise it when the same settings give other images
PERSON, IMAGE, SCENE, SPLIT, TRIAL = range(1, 6)  # a random stream is [seed, one of these, further numbers]
SUPERSAMPLE = 2  # the canvas is drawn at this multiple of the final size
Images = dict[str, tuple[int, int, int]]  # path in the tree -> person, camera and number of the image, as `draw` takes

# What --difficulty decides: (easy, hard). Shares and probabilities are 0..1, lengths are fractions of the image height.
DIAL = {
    "ir_own": (0.0, 1.0),  # share of a garment's infrared reflectance that has nothing to do with its colour
    "ir_texture": (0.8, 0.3),  # share of a pattern's contrast that survives in infrared
    "cameras": (0.35, 1.0),  # strength of each camera's own gain, cast, vignette, scale and blur
    "views": (0.25, 1.0),  # probability that the view follows the camera's habit; otherwise the person faces it
    "pose": (0.5, 1.0),  # amplitude of leg spread and arm swing
    "crop": (0.012, 0.045),  # sd of the person's offset in the box, of log scale, and (x 60) of the tilt in degrees
    "light": (0.05, 0.25),  # sd of an image's log gain
    "noise": (3.0, 14.0),  # sd of the sensor noise in grey levels; infrared sensors have 1.5 times as much
    "blur": (0.3, 1.2),  # largest extra blur in pixels
    "clutter": (0.4, 1.0),  # contrast of the background, and how far the box wanders over it
    "occlusion": (0.0, 0.4),  # probability that something stands in front of the person
}
DIFFICULTIES = {
    name: SimpleNamespace(**{key: (1 - share) * easy + share * hard for key, (easy, hard) in DIAL.items()})
    for name, share in (("easy", 0), ("medium", 0.25), ("hard", 1))
}


class Camera(NamedTuple):
    """A fixed camera. The last three are those of an infrared one, whose images have one channel."""

    room: int  # number of the background scene; odd rooms are indoors, even ones outdoors
    gain: float
    cast: tuple[float, ...]  # gain per channel
    vignette: float  # loss of light at the corners; in infrared, the fall-off of the lamp
    scale: float  # size of people
    blur: float  # radius in pixels
    views: tuple[float, float, float]  # shares of front, back, side
    tone: tuple[float, float, float] | None = None  # grey levels of reflectance 0, 1/2 and 1; None: visible light
    skin: int = 0  # grey level of skin
    backdrop: tuple[float, float] = (0.0, 255.0)  # grey levels of black and white in the scene


# ---- people ----------------------------------------------------------------------------------------------------------

Ink = tuple[int, ...]  # (r, g, b), or (grey,) on an infrared canvas
Point = tuple[float, float]
PARTS = ("upper", "accent", "lower", "shoes", "bag", "hat", "hair", "skin")
PATTERNS = {  # number of repeats -> boxes (u0, v0, u1, v1) on a garment, 0..1 from its top left corner
    "plain": lambda n: [],
    "hoops": lambda n: [(0, (i + 0.3) / n, 1, (i + 0.8) / n) for i in range(n)],
    "stripes": lambda n: [((i + 0.25) / n, 0, (i + 0.75) / n, 1) for i in range(n)],
    "checks": lambda n: [(i / n, j / n, (i + 1) / n, (j + 1) / n) for i in range(n) for j in range(n) if (i + j) % 2],
    "logo": lambda n: [(0.25, 0.18, 0.75, 0.3 + 0.06 * n)],
    "two-tone": lambda n: [(0, 0.2 + 0.08 * n, 1, 1)],
}


def garment_colour(rng: np.random.Generator, value: float) -> tuple[float, float, float]:
    """A colour of the given brightness (0..1) and any hue; a third of all garments are nearly grey."""
    saturation = rng.uniform(0.0, 0.15) if rng.random() < 0.33 else rng.uniform(0.45, 0.95)
    channels = np.cos(2 * math.pi * (rng.random() - np.arange(3) / 3)) * 0.5 + 0.5  # a hue circle
    channels = 1 - saturation * (1 - channels / channels.max())
    return tuple((20 + 235 * value) * channels)


class Person:
    """One identity, the same at every difficulty. Lengths are multiples of an average body's."""

    def __init__(self, seed: int, pid: int):
        rng = np.random.default_rng([seed, PERSON, pid])
        value = {part: rng.random() for part in PARTS}
        value["accent"] = (value["upper"] + rng.uniform(0.35, 0.65)) % 1  # a pattern must stand out from its cloth
        self.colours = {part: garment_colour(rng, v) for part, v in value.items()}  # RGB, 0..255
        tan, grey = rng.uniform(0.45, 1.0), rng.uniform(0.0, 1.0) ** 3
        self.colours["skin"] = (245 * tan, 205 * tan**1.2, 175 * tan**1.4)
        self.colours["hair"] = (30 + 150 * grey, 22 + 130 * grey, 18 + 90 * grey)
        self.height = rng.uniform(0.86, 1.0)
        self.shoulders = rng.uniform(0.8, 1.2)
        self.build = rng.uniform(0.75, 1.3)
        self.legs = rng.uniform(0.45, 0.54)  # share of the body height below the hip
        self.hair = rng.choice(["short", "long", "bald", "ponytail", "hat"], p=[0.3, 0.25, 0.1, 0.15, 0.2])
        self.bag = rng.choice(["none", "backpack", "shoulder", "hand"], p=[0.35, 0.25, 0.2, 0.2])
        self.lower = rng.choice(["trousers", "shorts", "skirt"], p=[0.6, 0.2, 0.2])
        self.coat = rng.random() < 0.2
        self.sleeve = rng.choice([0.1, 0.3, 1.0], p=[0.15, 0.35, 0.5])  # covered share of the arm
        self.pattern = rng.choice(list(PATTERNS))
        self.cells = rng.integers(3, 7)  # repeats of the pattern over the torso
        self.reflectances = {part: rng.random() for part in PARTS}  # in infrared, 0..1

    def inks(self, camera: Camera, hard: SimpleNamespace) -> dict[str, Ink]:
        """What every part looks like to a camera, before light and noise."""
        if not camera.tone:
            return {part: tuple(int(c) for c in colour) for part, colour in self.colours.items()}
        luminance = {part: (0.299 * r + 0.587 * g + 0.114 * b) / 255 for part, (r, g, b) in self.colours.items()}
        seen = {part: (1 - hard.ir_own) * luminance[part] + hard.ir_own * self.reflectances[part] for part in PARTS}
        seen["accent"] = seen["upper"] + hard.ir_texture * (seen["accent"] - seen["upper"])
        greys = {part: (int(np.interp(r, (0, 0.5, 1), camera.tone)),) for part, r in seen.items()}
        return greys | {"skin": (camera.skin,)}


def shade(ink: Ink, factor: float) -> Ink:
    return tuple(min(255, int(c * factor)) for c in ink)


# ---- drawing ---------------------------------------------------------------------------------------------------------


class Brush:
    """Draws in body units: x right of the body's axis, y down from the crown, 1 = the body's height."""

    def __init__(self, canvas: Image.Image, crown: Point, unit: float, tilt: float, mirror: bool):
        self.draw = ImageDraw.Draw(canvas)
        self.crown, self.flip = crown, -1 if mirror else 1
        self.cos, self.sin = unit * math.cos(tilt), unit * math.sin(tilt)

    def polygon(self, points: list[Point], ink: Ink) -> None:
        (left, top), cos, sin, flip = self.crown, self.cos, self.sin, self.flip
        self.draw.polygon([(left + flip * x * cos - y * sin, top + flip * x * sin + y * cos) for x, y in points], ink)

    def box(self, x0: float, y0: float, x1: float, y1: float, ink: Ink) -> None:
        self.polygon([(x0, y0), (x1, y0), (x1, y1), (x0, y1)], ink)

    def ellipse(self, x: float, y: float, rx: float, ry: float, ink: Ink, start: float = 0, turn: float = 1) -> None:
        """An ellipse, or the piece from `start` on over `turn`, both in turns, clockwise from the right."""
        steps = [2 * math.pi * (start + turn * i / 14) for i in range(15)]
        self.polygon([(x + rx * math.cos(a), y + ry * math.sin(a)) for a in steps], ink)

    def limb(self, a: Point, b: Point, wide: float, narrow: float, ink: Ink) -> None:
        """A tapering bar from a (`wide` across) to b (`narrow` across) with a round joint at b."""
        dx, dy = b[0] - a[0], b[1] - a[1]
        length = 2 * math.hypot(dx, dy)
        corners = ((a, wide), (a, -wide), (b, -narrow), (b, narrow))
        self.polygon([(x - dy / length * w, y + dx / length * w) for (x, y), w in corners], ink)
        self.ellipse(*b, narrow / 2, narrow / 2, ink)

    def garment(self, top: float, bottom: float, wide: Point, ink: Ink, cells: list = (), accent: Ink = ()) -> None:
        """A trapezium between heights `top` and `bottom`, half widths `wide`, with its pattern."""
        for (u0, v0, u1, v1), colour in [((0, 0, 1, 1), ink), *((cell, accent) for cell in cells)]:
            corners = ((u0, v0), (u1, v0), (u1, v1), (u0, v1))
            points = [((2 * u - 1) * (wide[0] + v * (wide[1] - wide[0])), top + v * (bottom - top)) for u, v in corners]
            self.polygon(points, colour)


def draw_body(brush: Brush, who: Person, ink: dict[str, Ink], view: str, swing: Point) -> None:
    """A person from the far parts to the near ones; `swing` = signed amplitudes of legs and arms, -1..1."""
    side = view == "side"
    chest, waist = (0.075, 0.07 * who.build) if side else (0.125 * who.shoulders, 0.092 * who.build)
    neck, hip, ankle = 0.165, 1 - who.legs, 0.965
    thick = 0.6 + 0.4 * who.build
    stride, reach = (amplitude * (0.13 if side else 0.03) for amplitude in swing)
    bag = (who.bag, view)

    def arm(s: int) -> Point:  # the left (-1) or right (1) one; returns where its hand is
        out = 0 if side else s  # from the side, both arms hang at the middle
        shoulder = (out * (chest - 0.012), neck + 0.025)
        elbow = (shoulder[0] + 0.4 * s * reach + 0.028 * out, neck + 0.175)
        hand = (shoulder[0] + s * reach + (0.02 if side else 0.03 * s), neck + 0.33)
        short = min(1.0, 2 * who.sleeve)  # the upper arm is half of it
        cover = (shoulder[0] + short * (elbow[0] - shoulder[0]), shoulder[1] + short * (elbow[1] - shoulder[1]))
        brush.limb(shoulder, elbow, 0.058 * thick, 0.046 * thick, ink["skin"])
        brush.limb(elbow, hand, 0.046 * thick, 0.036 * thick, ink["skin"])
        sleeve = shade(ink["upper"], 0.82)  # shaded, or the arm would melt into the trunk
        brush.limb(shoulder, cover, 0.066 * thick, 0.058 * thick, sleeve)
        if who.sleeve == 1:
            brush.limb(elbow, (hand[0] * 0.9 + elbow[0] * 0.1, hand[1] - 0.03), 0.056 * thick, 0.046 * thick, sleeve)
        return hand

    if side:
        arm(-1)
    if bag == ("backpack", "side"):
        brush.box(-chest - 0.075, neck + 0.02, -chest + 0.03, hip - 0.08, ink["bag"])
    for s, dim in ((-1, 0.85), (1, 1.0)):
        at = 0.012 * s if side else 0.052 * s * who.build
        foot, knee = (at + s * stride, ankle), (at + s * stride * 0.35 + 0.02 * side, (hip + ankle) / 2)
        shin, thigh = "lower" if who.lower == "trousers" else "skin", "skin" if who.lower == "skirt" else "lower"
        brush.limb(knee, foot, 0.075 * thick, 0.052 * thick, shade(ink[shin], dim))
        brush.limb((at, hip - 0.02), knee, 0.105 * thick, 0.078 * thick, shade(ink[thigh], dim))
        toe, length = (0.035, 0.055) if side else (0.008 * s, 0.034)
        brush.ellipse(foot[0] + toe, 0.98, length, 0.02, shade(ink["shoes"], dim))
    if who.lower == "skirt":
        brush.garment(hip - 0.04, hip + 0.24, (waist, waist + 0.045), ink["lower"])
    if who.coat:
        brush.garment(hip - 0.03, hip + 0.2, (waist, waist + 0.025), shade(ink["upper"], 0.92))
    else:
        brush.garment(hip - 0.05, hip + 0.02, (waist, waist), ink["lower"])
    brush.limb((0.01 * side, 0.1), (0.01 * side, neck), 0.05, 0.055, ink["skin"])
    brush.ellipse(0, neck + 0.012, chest * 0.9, 0.025, ink["upper"])
    cells = [] if who.pattern == "logo" and view != "front" else PATTERNS[who.pattern](who.cells)
    brush.garment(neck + 0.01, hip - 0.02, (chest, waist), ink["upper"], cells, ink["accent"])
    if not side:
        arm(-1)
    hand = arm(1)
    if bag == ("backpack", "back"):
        brush.box(-chest * 0.75, neck + 0.02, chest * 0.75, hip - 0.09, ink["bag"])
        brush.box(-chest * 0.5, hip - 0.22, chest * 0.5, hip - 0.12, shade(ink["bag"], 0.75))
    elif bag == ("backpack", "front"):
        for s in (-1, 1):
            brush.limb((s * chest * 0.6, neck), (s * chest * 0.62, hip - 0.16), 0.028, 0.028, ink["bag"])
    elif who.bag == "shoulder":
        brush.limb((-chest * 0.7, neck + 0.005), (waist, hip - 0.03), 0.02, 0.02, ink["bag"])
        brush.box(waist - 0.055, hip - 0.06, waist + 0.065, hip + 0.075, ink["bag"])
    elif who.bag == "hand":
        brush.box(hand[0] - 0.055, hand[1] + 0.02, hand[0] + 0.055, hand[1] + 0.15, ink["bag"])


def draw_head(brush: Brush, who: Person, ink: dict[str, Ink], view: str) -> None:
    """Head, face, hair and hat; the face looks to +x from the side."""
    side, style = view == "side", (who.hair, view)
    x = 0.012 * side
    if who.hair == "long" and view != "back":
        brush.box(x - 0.062, 0.06, x + (0.01 if side else 0.062), 0.215, ink["hair"])
    if style == ("ponytail", "side"):
        brush.limb((x - 0.04, 0.04), (x - 0.1, 0.14), 0.03, 0.03, ink["hair"])
    brush.ellipse(x, 0.075, 0.05, 0.066, ink["skin"])
    if who.hair != "bald":
        start, turn = {"front": (0.5, 0.5), "side": (0.3, 0.5), "back": (0, 1)}[view]
        brush.ellipse(x, 0.063, 0.056, 0.063, ink["hair"], start, turn)
    if style == ("long", "back"):
        brush.box(x - 0.06, 0.06, x + 0.06, 0.225, ink["hair"])
    elif style == ("ponytail", "back"):
        brush.limb((x, 0.06), (x, 0.19), 0.04, 0.03, ink["hair"])
    elif style == ("ponytail", "front"):
        brush.ellipse(x, 0.0, 0.026, 0.022, ink["hair"])
    elif who.hair == "hat":
        brush.ellipse(x, 0.05, 0.062, 0.062, ink["hat"], 0.5, 0.5)
        brush.box(x - 0.065 + 0.02 * side, 0.042, x + 0.065 + 0.035 * side, 0.058, shade(ink["hat"], 0.7))
    for eye in {"front": (-0.02, 0.02), "side": (0.035,), "back": ()}[view]:
        brush.ellipse(x + eye, 0.078, 0.007, 0.006, shade(ink["skin"], 0.3))


@functools.lru_cache(maxsize=32)
def backdrop(seed: int, number: int, clutter: float) -> Image.Image:
    """The room or street that a camera looks at, 520 x 440; flattened towards its mean where clutter is low."""
    camera = CAMERAS[number]
    rng = np.random.default_rng([seed, SCENE, camera.room])
    width, height, floor = 520, 440, 250
    tint = lambda low, high: tuple(int(c) for c in rng.uniform(low, high) + rng.uniform(-22, 22, 3))  # noqa: E731
    canvas = Image.new("RGB", (width, height), tint(130, 200))
    draw = ImageDraw.Draw(canvas)
    outdoors = camera.room % 2 == 0
    x = 0
    while outdoors and x < width:  # houses with windows against the sky
        wide, top = rng.integers(60, 130), rng.integers(0, 120)
        draw.rectangle((x, top, x + wide, floor), tint(70, 180))
        glass = tint(40, 110)
        for left in range(x + 10, x + wide - 18, 28):
            for upper in range(top + 14, floor - 40, 42):
                draw.rectangle((left, upper, left + 14, upper + 22), glass)
        x += wide
    draw.rectangle((0, floor, width, height), tint(70, 150))
    line = tint(50, 100)
    for i in range(-8, 9):  # floorboards or paving run to a vanishing point
        draw.line((width / 2 + 30 * i, floor, width / 2 + 110 * i, height), line, 2)
    draw.rectangle((0, floor - 6, width, floor), line)
    for _ in range(7):
        x, high = rng.integers(0, width), rng.integers(60, 200)
        if outdoors:  # trees
            draw.rectangle((x - 4, floor - high, x + 4, floor + 10), tint(40, 80))
            r, leaf, y = rng.integers(15, 45), rng.integers(40, 100), floor - high
            draw.ellipse((x - r, y - r, x + r, y + r), (leaf * 7 // 10, leaf, leaf // 2))
        else:  # cabinets and doors, or posters
            stands = rng.random() < 0.7
            top = floor - high if stands else rng.integers(20, 100)
            bottom = floor + 12 if stands else top + 70
            draw.rectangle((x, top, x + rng.integers(35, 90), bottom), tint(40, 210), line)
    pixels = np.asarray(canvas.filter(ImageFilter.GaussianBlur(1.5)), dtype=np.float32)
    if camera.tone:
        low, high = camera.backdrop
        pixels = low + (high - low) * pixels.mean(2) / 255
    pixels = pixels.mean((0, 1)) + clutter * (pixels - pixels.mean((0, 1)))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def draw(seed: int, pid: int, number: int, index: int, hard: SimpleNamespace = DIFFICULTIES["easy"]) -> Image.Image:
    """Image `index` of a person in a camera of `CAMERAS`, RGB: of 64 x 128 pixels in RegDB, else 64-80 x 144-176."""
    rng = np.random.default_rng([seed, IMAGE, pid, number, index])
    who, camera = Person(seed, pid), CAMERAS[number]
    width, height = SUPERSAMPLE * np.array((64, 128) if number in REGDB else rng.integers((64, 144), (81, 177)))
    behind = backdrop(seed, number, hard.clutter)
    free = np.subtract(behind.size, (width, height))  # the box is at the centre, or anywhere where clutter is full
    left, top = (free * (0.5 + hard.clutter * rng.uniform(-0.5, 0.5, 2))).astype(int)
    canvas = behind.crop((left, top, left + width, top + height))
    ink = who.inks(camera, hard)
    view = rng.choice(["front", "back", "side"], p=camera.views) if rng.random() < hard.views else "front"
    offset, zoom, tilt = rng.normal(0, hard.crop, 2), math.exp(rng.normal(0, hard.crop)), rng.normal(0, hard.crop)
    unit = 0.95 * height * who.height * zoom * (1 + hard.cameras * (camera.scale - 1))
    crown = (width / 2 + offset[0] * height + unit * math.sin(tilt) / 2, 0.98 * height - unit + offset[1] * height)
    brush = Brush(canvas, crown, unit, tilt, mirror=rng.random() < 0.5)
    draw_body(brush, who, ink, view, hard.pose * rng.uniform(-1, 1, 2))
    draw_head(brush, who, ink, view)
    if rng.random() < hard.occlusion:  # a post, or a counter before the legs
        tone = tuple(int(c) for c in rng.uniform(30, 200) + rng.uniform(-20, 20, len(ink["skin"])))
        x, wide, y = rng.uniform(0, width), rng.uniform(0.08, 0.25) * width, rng.uniform(0.6, 0.85) * height
        post = rng.random() < 0.5
        brush.draw.rectangle((x, 0, x + wide, height) if post else (0, y, width, height), tone)
    return develop(canvas, camera, hard, rng)


def develop(canvas: Image.Image, camera: Camera, hard: SimpleNamespace, rng: np.random.Generator) -> Image.Image:
    """Optics and sensor: blur, light, vignette, cast and noise on the reduced canvas."""
    image = canvas.reduce(SUPERSAMPLE)
    radius = hard.cameras * camera.blur + hard.blur * rng.random()
    if radius > 0.2:
        image = image.filter(ImageFilter.GaussianBlur(radius))
    pixels = np.asarray(image, dtype=np.float32).reshape(image.height, image.width, -1)
    y, x = np.linspace(-1, 1, image.height, dtype=np.float32), np.linspace(-1, 1, image.width, dtype=np.float32)
    falloff = camera.vignette * (0.5 + 0.5 * hard.cameras if camera.tone else hard.cameras) / 2
    light = (1 - falloff * (y[:, None] ** 2 + x**2)) * math.exp(rng.normal(0, hard.light))
    light *= 1 + hard.cameras * (camera.gain - 1)
    cast = 1 + hard.cameras * (np.array(camera.cast) - 1)
    pixels = pixels * light[..., None] * cast.astype(np.float32)
    pixels += hard.noise * (1.5 if camera.tone else 1.0) * rng.standard_normal(pixels.shape, dtype=np.float32)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8).squeeze()).convert("RGB")


def save_image(root: Path, settings: dict, image: tuple[str, tuple[int, int, int]]) -> None:
    """Draw one of `Images` and save it below `root`."""
    path, (pid, number, index) = image
    (root / path).parent.mkdir(parents=True, exist_ok=True)
    draw(settings["seed"], pid, number, index, DIFFICULTIES[settings["difficulty"]]).save(root / path, quality=90)


# ---- SYSU-MM01 -------------------------------------------------------------------------------------------------------

# Cameras 2 and 3 share a room. Camera 3 saturates, and camera 6 turns tones round: dark synthetic fabrics glow in
# near infrared. Both are functions of reflectance alone, hence learnable, but no RGB filter bank gets them for free.
SYSU = {
    1: Camera(1, 1.10, (1.08, 1.0, 0.88), 0.15, 1.00, 0.2, (0.6, 0.2, 0.2)),
    2: Camera(3, 0.92, (0.90, 1.0, 1.12), 0.25, 0.93, 0.5, (0.2, 0.5, 0.3)),
    3: Camera(3, 1.00, (1,), 0.55, 0.96, 0.5, (0.5, 0.2, 0.3), (70, 205, 250), 235, (90, 190)),
    4: Camera(2, 1.20, (1.0, 1.05, 0.92), 0.10, 1.03, 0.3, (0.3, 0.3, 0.4)),
    5: Camera(4, 0.75, (0.92, 0.97, 1.15), 0.30, 0.90, 0.7, (0.2, 0.3, 0.5)),
    6: Camera(6, 0.90, (1,), 0.75, 0.97, 0.6, (0.3, 0.2, 0.5), (215, 150, 70), 205, (8, 80)),
}
# Of the real set: persons in each set of cameras; by camera (images, least, most of a person). "none" is in no list.
REAL_SETS = {
    "train": {"123456": 180, "345": 92, "12356": 11, "3456": 5, "12456": 3, "35": 2, "34": 2, "23456": 1},
    "val": {"345": 96, "34": 3},
    "test": {"123456": 53, "3456": 37, "12456": 2, "456": 1, "346": 1, "12356": 1, "356": 1},
    "none": {"45": 10, "1245": 6, "6": 2, "12": 2, "145": 1, "36": 1},
}
REAL_IMAGES = {
    "train": ((4721, 2, 50), (5753, 7, 88), (5929, 20, 40), (4821, 8, 30), (4989, 9, 27), (4000, 20, 20)),
    "val": ((0, 0, 0), (0, 0, 0), (1980, 20, 20), (990, 10, 10), (984, 10, 30), (0, 0, 0)),
    "test": ((1374, 13, 42), (1565, 18, 40), (1883, 20, 26), (1918, 20, 27), (1918, 20, 24), (1920, 20, 20)),
    "none": ((194, 16, 29), (210, 11, 39), (20, 20, 20), (301, 10, 24), (333, 10, 50), (60, 20, 20)),
}


def real_sysu(seed: int) -> tuple[dict[str, list[int]], dict[int, dict[int, int]]]:
    """Splits and counts with the real set's 513 persons, 30,071 RGB and 15,792 infrared images."""
    rng = np.random.default_rng([seed, SPLIT])
    pids = iter((1 + rng.permutation(513)).tolist())
    splits, counts = {}, {}
    for split, sets in REAL_SETS.items():
        where = {next(pids): cams for cams, n in sets.items() for _ in range(n)}
        splits[split] = sorted(where)
        for cam, (total, least, most) in enumerate(REAL_IMAGES[split], start=1):
            here, room = [pid for pid, cams in where.items() if str(cam) in cams], most - least
            free = rng.permutation(np.repeat(here[2:], room))  # the first person has the least, the second the most
            taken = [*here[1:2] * room, *free[: total - least * len(here) - room].tolist()]
            for pid in here:
                counts.setdefault(pid, {})[cam] = least + taken.count(pid)
    return splits, counts


def small_sysu(ids: int, images: int, seed: int) -> tuple[dict[str, list[int]], dict[int, dict[int, int]]]:
    """Splits and counts of `ids` persons with about `images` images in each camera they pass.

    Camera sets follow the real test split, whose persons are in cameras 1 and 2 together or in neither. The first
    person of every split is in all six cameras, so that every search has something to find.
    """
    rng = np.random.default_rng([seed, SPLIT])
    val, test = max(1, round(ids * 99 / 491)), max(2, round(ids * 96 / 491))
    order = (1 + rng.permutation(ids)).tolist()
    splits = {"train": order[: -val - test], "val": order[-val - test : -test], "test": order[-test:]}
    sets, persons = list(REAL_SETS["test"]), np.array(list(REAL_SETS["test"].values()))
    counts = {}
    for split, pids in splits.items():
        least = 10 if split == "test" and images >= 9 else 1  # a multi-shot gallery has ten images of each
        for i, pid in enumerate(pids):
            where = "123456" if i == 0 else rng.choice(sets, p=persons / persons.sum())
            wobble = {cam: rng.normal(0, 0.2 if cam in "12" else 0.04) for cam in where}  # as uneven as the real ones
            counts[pid] = {int(cam): max(least, round(images * (1 + w))) for cam, w in wobble.items()}
    return splits, counts


def sysu_tree(ids: int | None, images: int | None, seed: int) -> tuple[Images, dict[str, str]]:
    """cam1..cam6/<id>/<image>.jpg and exp/{train,val,test}_id.txt."""
    splits, counts = real_sysu(seed) if ids is None else small_sysu(ids, images, seed)
    lists = {f"exp/{name}_id.txt": ",".join(map(str, sorted(splits[name]))) + "\n" for name in ("train", "val", "test")}
    paths = {}
    for pid, cam in ((pid, cam) for pid, cams in counts.items() for cam in cams):
        paths |= {f"cam{cam}/{pid:04d}/{i:04d}.jpg": (pid, cam, i) for i in range(1, counts[pid][cam] + 1)}
    return paths, lists


# ---- RegDB -----------------------------------------------------------------------------------------------------------

REGDB = {
    7: Camera(8, 1.0, (1, 1, 1), 0.1, 1.0, 0.2, (0.4, 0.4, 0.2)),
    # Thermal: skin is hot, a garment is the colder the better it insulates, the street is cold.
    8: Camera(8, 1.0, (1,), 0.1, 1.0, 0.8, (0.4, 0.4, 0.2), (190, 120, 75), 245, (15, 75)),
}


def regdb_tree(ids: int | None, images: int, seed: int) -> tuple[Images, dict[str, str]]:
    """{Visible,Thermal}/<id>/*.bmp and ten random halvings in idx/."""
    persons = ids or 412
    names = {7: "Visible/{}/person_v_{:04d}.bmp", 8: "Thermal/{}/person_t_{:04d}.bmp"}
    numbers = range(1, images + 1)
    paths = {names[c].format(p, i): (p, c, i) for p in range(1, persons + 1) for c in names for i in numbers}
    rng, halves, lists = np.random.default_rng([seed, TRIAL]), {}, {}
    while len(halves) < 10:  # no two trials alike
        order = (1 + rng.permutation(persons)).tolist()
        halves[tuple(sorted(order[: persons // 2]))] = sorted(order[persons // 2 :])
    for trial, (train, test) in enumerate(halves.items(), start=1):
        for subset, members in (("train", train), ("test", test)):
            for modality, cam in (("visible", 7), ("thermal", 8)):
                rows = [f"{names[cam].format(p, i)} {label}\n" for label, p in enumerate(members) for i in numbers]
                lists[f"idx/{subset}_{modality}_{trial}.txt"] = "".join(rows)
    return paths, lists


# ---- LLCM ------------------------------------------------------------------------------------------------------------

# Dim light: nine cameras see it, and eight of them, all but the third, also see in near infrared.
LLCM = {10 + n: SYSU[1]._replace(room=20 + n, gain=0.5 + 0.06 * n, blur=0.1 * n) for n in range(1, 10)}
LLCM |= {20 + n: SYSU[6 if n % 2 else 3]._replace(room=20 + n, blur=0.1 * n) for n in (1, 2, 4, 5, 6, 7, 8, 9)}


def llcm_tree(ids: int | None, images: int, seed: int) -> tuple[Images, dict[str, str]]:
    """{vis,nir}/<id>/*.jpg, test_{vis,nir}/cam<n>/<id>/*.jpg and the lists of idx/.

    Each person passes three cameras in each modality, with `images` images each.
    """
    persons = ids or 1064
    rng = np.random.default_rng([seed, SPLIT])
    train = sorted((1 + rng.permutation(persons))[: round(persons * 713 / 1064)].tolist())
    test = [pid for pid in range(1, persons + 1) if pid not in train]
    lists, paths = {"idx/test_id.txt": ",".join(map(str, test)) + "\n"}, {}
    for kind, first in (("vis", 10), ("nir", 20)):
        rows, cameras = [], [number - first for number in LLCM if first < number < first + 10]
        for pid in range(1, persons + 1):
            folder = f"{kind}/{pid:04d}" if pid in train else f"test_{kind}/cam{{}}/{pid:04d}"
            for cam in sorted(rng.choice(cameras, 3, replace=False).tolist()):
                names = [f"{folder.format(cam)}/{pid:04d}_c{cam:02d}_{i:04d}_{kind}.jpg" for i in range(1, images + 1)]
                paths |= {name: (pid, first + cam, i) for i, name in enumerate(names, 1)}
                rows += [f"{name} {train.index(pid)}\n" for name in names] if pid in train else []
        lists[f"idx/train_{kind}.txt"] = "".join(rows)
    return paths, lists


# ---- command ---------------------------------------------------------------------------------------------------------

CAMERAS = SYSU | REGDB | LLCM  # a camera's number is its own among all datasets
TREES = {"sysu": sysu_tree, "regdb": regdb_tree, "llcm": llcm_tree}
FULL = {"sysu": None, "regdb": 10, "llcm": 7}  # --images of the real set: of SYSU-MM01 known one by one, of LLCM about


def make(
    dataset: str, out: Path, ids: int | None = 130, images: int = 20, seed: int = 0, difficulty: str = "easy", workers=1
) -> bool:
    """Write a tree whole or not at all, in a folder beside `out` until the end; False if the same is there already.

    `ids` None stands for the real set's persons and images, whatever `images` says.
    """
    if seed < 0 or (ids is not None and not (5 <= ids <= 9999 and 2 <= images <= 999)):
        raise ValueError(f"give --ids from 5 to 9999, --images 2 to 999, --seed from 0, not {ids}, {images} and {seed}")
    images = FULL[dataset] if ids is None or dataset == "regdb" else images
    settings = {"dataset": dataset, "ids": ids, "images": images, "seed": seed, "difficulty": difficulty}
    settings |= {"full": ids is None, "version": VERSION, "pillow": PIL.__version__}
    note = json.dumps(settings, indent=1) + "\n"
    out = Path(out).resolve()
    if (out / "synthetic.json").is_file() and (out / "synthetic.json").read_bytes() == note.encode():
        return False
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise OSError(f"{out} holds other content or other settings: give another --out, or delete it")
    paths, lists = TREES[dataset](ids, images, seed)
    part = out.with_name(out.name + ".synthetic-partial")
    with ProcessPoolExecutor(workers) as pool:  # which starts no process while it is idle
        shutil.rmtree(part, ignore_errors=True)  # what an interrupted run left
        for name, text in (lists | {"synthetic.json": note}).items():
            (part / name).parent.mkdir(parents=True, exist_ok=True)
            (part / name).write_text(text)
        saved = (map if workers == 1 else pool.map)(functools.partial(save_image, part, settings), paths.items())
        for _ in tqdm(saved, total=len(paths), unit="image", disable=None):
            pass
    part.rename(out)
    return True


make_sysu, make_regdb, make_llcm = (functools.partial(make, dataset) for dataset in TREES)


def main() -> None:
    parser = utils.Parser(prog="python -m tools.make_synthetic", description=__doc__)
    add = parser.add_argument
    add("--dataset", choices=[*TREES], required=True, help="layout to write")
    add("--out", type=Path, required=True, help="folder to make: new, empty or the same tree")
    add("--ids", type=int, default=130, help="persons in all splits together (%(default)s)")
    add("--full", dest="ids", action="store_const", const=None, help="the real set's persons and images")
    add("--images", type=int, default=20, help="images per person and camera, of RegDB always 10 (%(default)s)")
    add("--seed", type=int, default=0, help="another seed draws other people and rooms (%(default)s)")
    add("--difficulty", choices=[*DIFFICULTIES], default="easy", help="see above (%(default)s)")
    add("--workers", type=int, default=os.cpu_count() or 1, help="processes (one per core)")
    args = vars(parser.parse_args())
    print(f"{args['out']}: {'written' if make(**args) else 'already there'}")


if __name__ == "__main__":
    utils.run(main)
