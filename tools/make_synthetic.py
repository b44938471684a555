"""Draw synthetic people in the on-disk layout of SYSU-MM01 or RegDB, because the real sets are under licence.

    python -m tools.make_synthetic --dataset sysu  --out data/toy --ids 130 --seed 0 --difficulty easy
    python -m tools.make_synthetic --dataset regdb --out data/toy_regdb --full

A person is a set of attributes drawn once. Build, hair, bag, garment shapes and patterns show in both modalities;
colours show in visible light alone and infrared reflectances in infrared alone. How far the two agree, and how much
the cameras differ, is what --difficulty decides: "easy" people look alike in all cameras, "hard" ones defy a small
network. Every image has a random stream of its own, named by (seed, person,
camera, number), so a tree is the same byte for byte whatever the number of workers (on one Pillow version).
"""

import argparse
import functools
import json
import math
import os
import shutil
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import astuple, dataclass
from pathlib import Path

import numpy as np
import PIL
from PIL import Image, ImageDraw, ImageFilter
from tqdm import tqdm

import utils

VERSION = 1  # of the drawing; raise it when the same settings give other images
PERSON, IMAGE, SCENE, SPLIT, TRIAL = range(1, 6)  # a random stream is [seed, one of these, further numbers]
SUPERSAMPLE = 2  # the canvas is drawn at this multiple of the final size


# ---------------------------------------------------------------------------------------------- the dial and the scene


@dataclass(frozen=True)
class Difficulty:
    """Everything the dial moves. Shares and probabilities lie in 0..1, lengths are fractions of the image height."""

    ir_own: float  # share of a garment's infrared reflectance that has nothing to do with its colour
    ir_texture: float  # share of a pattern's contrast that survives in infrared
    cameras: float  # strength of each camera's own gain, cast, vignette, scale and blur
    views: float  # probability that the view follows the camera's habit; otherwise the person faces it
    pose: float  # amplitude of leg spread and arm swing
    crop: float  # sd of the person's offset in the box, of log scale, and (x 60) of the tilt in degrees
    light: float  # sd of an image's log gain
    noise: float  # sd of the sensor noise in grey levels; infrared sensors have 1.5 times as much
    blur: float  # largest extra blur in pixels
    clutter: float  # contrast of the background, and how far the box wanders over it
    occlusion: float  # probability that something stands in front of the person


EASY = Difficulty(0.0, 0.8, 0.35, 0.25, 0.5, 0.012, 0.05, 3.0, 0.3, 0.4, 0.0)
HARD = Difficulty(1.0, 0.3, 1.0, 1.0, 1.0, 0.045, 0.25, 14.0, 1.2, 1.0, 0.4)
MEDIUM = Difficulty(*(0.75 * easy + 0.25 * hard for easy, hard in zip(astuple(EASY), astuple(HARD), strict=True)))
DIFFICULTIES = {"easy": EASY, "medium": MEDIUM, "hard": HARD}


@dataclass(frozen=True)
class Camera:
    """A fixed camera. `tone` maps infrared reflectance 0, 1/2, 1 to grey levels (None: an RGB camera)."""

    path: str  # image file relative to the tree
    room: int  # number of the background scene; odd rooms are indoors, even ones outdoors
    gain: float
    cast: tuple[float, float, float]  # gain per channel
    vignette: float  # loss of light at the corners; in infrared, the fall-off of the lamp
    scale: float  # size of people
    blur: float  # radius in pixels
    views: tuple[float, float, float]  # shares of front, back, side
    tone: tuple[float, float, float] | None = None
    skin: float = 0.0  # grey level of skin in infrared
    backdrop: tuple[float, float] = (0.0, 255.0)  # grey levels that black and white of the scene take in infrared


SYSU_PATH = "cam{}/{{pid:04d}}/{{index:04d}}.jpg".format
# Cameras 2 and 3 share a room. Camera 3 saturates, and camera 6 turns tones round: dark synthetic fabrics glow in
# near infrared. Both are functions of reflectance alone, hence learnable, but no RGB filter bank gets them for free.
SYSU = {
    1: Camera(SYSU_PATH(1), 1, 1.10, (1.08, 1.0, 0.88), 0.15, 1.00, 0.2, (0.6, 0.2, 0.2)),
    2: Camera(SYSU_PATH(2), 3, 0.92, (0.90, 1.0, 1.12), 0.25, 0.93, 0.5, (0.2, 0.5, 0.3)),
    3: Camera(SYSU_PATH(3), 3, 1.00, (1, 1, 1), 0.55, 0.96, 0.5, (0.5, 0.2, 0.3), (70, 205, 250), 235, (90, 190)),
    4: Camera(SYSU_PATH(4), 2, 1.20, (1.0, 1.05, 0.92), 0.10, 1.03, 0.3, (0.3, 0.3, 0.4)),
    5: Camera(SYSU_PATH(5), 4, 0.75, (0.92, 0.97, 1.15), 0.30, 0.90, 0.7, (0.2, 0.3, 0.5)),
    6: Camera(SYSU_PATH(6), 6, 0.90, (1, 1, 1), 0.75, 0.97, 0.6, (0.3, 0.2, 0.5), (215, 150, 70), 205, (8, 80)),
}
REGDB = {
    7: Camera("Visible/{pid}/person_v_{index:04d}.bmp", 8, 1.0, (1, 1, 1), 0.1, 1.0, 0.2, (0.4, 0.4, 0.2)),
    # Thermal: skin is hot, a garment is the colder the better it insulates, the street is cold.
    8: Camera(
        "Thermal/{pid}/person_t_{index:04d}.bmp", 8, 1.0, (1, 1, 1), 0.1, 1.0, 0.8, (0.4, 0.4, 0.2),
        (190, 120, 75), 245, (15, 75),
    ),
}  # fmt: skip
CAMERAS = SYSU | REGDB
VIEWS = ("front", "back", "side")


# --------------------------------------------------------------------------------------------------------- the people


@dataclass(frozen=True)
class Person:
    """One identity. Lengths are multiples of an average body's; colours are RGB 0..255, reflectances 0..1."""

    height: float
    shoulders: float
    build: float
    legs: float  # share of the body height below the hip
    hair: str
    bag: str
    lower: str
    coat: bool
    sleeve: float  # covered share of the arm
    pattern: str
    cells: int  # repeats of the pattern over the torso
    colours: dict[str, tuple[float, float, float]]
    reflectances: dict[str, float]


PARTS = ("upper", "accent", "lower", "shoes", "bag", "hat", "hair", "skin")
Cells = list[tuple[float, float, float, float]]  # boxes (u0, v0, u1, v1) on a garment, 0..1 from its top left corner
PATTERNS: dict[str, Callable[[int], Cells]] = {
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


@functools.lru_cache(maxsize=64)
def person(seed: int, pid: int) -> Person:
    """The person with number `pid`; the same at every difficulty."""
    rng = np.random.default_rng([seed, PERSON, pid])
    value = {part: rng.random() for part in PARTS}
    value["accent"] = (value["upper"] + rng.uniform(0.35, 0.65)) % 1  # a pattern must stand out from its cloth
    colours = {part: garment_colour(rng, v) for part, v in value.items()}
    tan, grey = rng.uniform(0.45, 1.0), rng.uniform(0.0, 1.0) ** 3
    colours["skin"] = (245 * tan, 205 * tan**1.2, 175 * tan**1.4)
    colours["hair"] = (30 + 150 * grey, 22 + 130 * grey, 18 + 90 * grey)
    return Person(
        height=rng.uniform(0.86, 1.0),
        shoulders=rng.uniform(0.8, 1.2),
        build=rng.uniform(0.75, 1.3),
        legs=rng.uniform(0.45, 0.54),
        hair=str(rng.choice(["short", "long", "bald", "ponytail", "hat"], p=[0.3, 0.25, 0.1, 0.15, 0.2])),
        bag=str(rng.choice(["none", "backpack", "shoulder", "hand"], p=[0.35, 0.25, 0.2, 0.2])),
        lower=str(rng.choice(["trousers", "shorts", "skirt"], p=[0.6, 0.2, 0.2])),
        coat=bool(rng.random() < 0.2),
        sleeve=float(rng.choice([0.1, 0.3, 1.0], p=[0.15, 0.35, 0.5])),
        pattern=str(rng.choice(list(PATTERNS))),
        cells=int(rng.integers(3, 7)),
        colours=colours,
        reflectances={part: rng.random() for part in PARTS},
    )


Ink = tuple[int, ...]  # (r, g, b), or (grey,) on an infrared canvas


def inks(who: Person, camera: Camera, hard: Difficulty) -> dict[str, Ink]:
    """What every part of a person looks like to a camera, before light and noise."""
    if camera.tone is None:
        return {part: tuple(int(c) for c in colour) for part, colour in who.colours.items()}
    seen = {}
    for part, (r, g, b) in who.colours.items():
        luminance = (0.299 * r + 0.587 * g + 0.114 * b) / 255
        seen[part] = (1 - hard.ir_own) * luminance + hard.ir_own * who.reflectances[part]
    seen["accent"] = seen["upper"] + hard.ir_texture * (seen["accent"] - seen["upper"])
    greys = {part: (int(np.interp(r, (0, 0.5, 1), camera.tone)),) for part, r in seen.items()}
    return greys | {"skin": (int(camera.skin),)}


def shade(ink: Ink, factor: float) -> Ink:
    return tuple(min(255, int(c * factor)) for c in ink)


# -------------------------------------------------------------------------------------------------------- the drawing

Point = tuple[float, float]


class Brush:
    """Draws in body units: x right of the body's axis, y down from the crown, 1 = the body's height."""

    def __init__(self, canvas: Image.Image, crown: Point, unit: float, tilt: float, mirror: bool):
        self.draw = ImageDraw.Draw(canvas)
        self.crown, self.flip = crown, -1 if mirror else 1
        self.cos, self.sin = unit * math.cos(tilt), unit * math.sin(tilt)

    def polygon(self, points: Iterable[Point], ink: Ink) -> None:
        (left, top), cos, sin, flip = self.crown, self.cos, self.sin, self.flip
        self.draw.polygon([(left + flip * x * cos - y * sin, top + flip * x * sin + y * cos) for x, y in points], ink)

    def ellipse(self, x: float, y: float, rx: float, ry: float, ink: Ink, start: float = 0, turn: float = 1) -> None:
        """An ellipse, or the piece from `start` on over `turn`, both in turns, clockwise from the right."""
        steps = [2 * math.pi * (start + turn * i / 14) for i in range(15)]
        self.polygon([(x + rx * math.cos(a), y + ry * math.sin(a)) for a in steps], ink)

    def limb(self, a: Point, b: Point, wide: float, narrow: float, ink: Ink) -> None:
        """A tapering bar from a (`wide` across) to b (`narrow` across) with a round joint at b."""
        dx, dy = b[0] - a[0], b[1] - a[1]
        length = 2 * math.hypot(dx, dy) or 1.0
        nx, ny = -dy / length, dx / length
        corners = [(a, wide), (a, -wide), (b, -narrow), (b, narrow)]
        self.polygon([(p[0] + nx * w, p[1] + ny * w) for p, w in corners], ink)
        self.ellipse(*b, narrow / 2, narrow / 2, ink)

    def box(self, x0: float, y0: float, x1: float, y1: float, ink: Ink) -> None:
        self.polygon([(x0, y0), (x1, y0), (x1, y1), (x0, y1)], ink)

    def garment(self, top: float, bottom: float, wide: Point, ink: Ink, cells: Cells, accent: Ink) -> None:
        """A trapezium between heights `top` and `bottom`, half widths `wide`, with its pattern."""
        for boxes, colour in (([(0, 0, 1, 1)], ink), (cells, accent)):
            for u0, v0, u1, v1 in boxes:
                y0, y1 = top + v0 * (bottom - top), top + v1 * (bottom - top)
                w0, w1 = wide[0] + v0 * (wide[1] - wide[0]), wide[0] + v1 * (wide[1] - wide[0])
                u0, u1 = 2 * u0 - 1, 2 * u1 - 1
                self.polygon([(u0 * w0, y0), (u1 * w0, y0), (u1 * w1, y1), (u0 * w1, y1)], colour)


def draw_body(brush: Brush, who: Person, ink: dict[str, Ink], view: str, swing: Point) -> None:
    """A person from the far parts to the near ones; `swing` = signed amplitudes of legs and arms, -1..1."""
    side, back = view == "side", view == "back"
    chest, waist = (0.075, 0.07 * who.build) if side else (0.125 * who.shoulders, 0.092 * who.build)
    neck, hip, ankle = 0.165, 1 - who.legs, 0.965
    cells = [] if (who.pattern == "logo" and view != "front") else PATTERNS[who.pattern](who.cells)
    thick = 0.6 + 0.4 * who.build

    def leg(s: int) -> None:
        stride = swing[0] * (0.13 if side else 0.03)
        at = 0.012 * s if side else 0.052 * s * who.build
        foot, knee = (at + s * stride, ankle), (at + s * stride * 0.35 + 0.02 * side, (hip + ankle) / 2)
        dim = 1.0 if s > 0 else 0.85
        shin, thigh = "lower" if who.lower == "trousers" else "skin", "skin" if who.lower == "skirt" else "lower"
        brush.limb(knee, foot, 0.075 * thick, 0.052 * thick, shade(ink[shin], dim))
        brush.limb((at, hip - 0.02), knee, 0.105 * thick, 0.078 * thick, shade(ink[thigh], dim))
        toe = 0.035 if side else 0.008 * s
        brush.ellipse(foot[0] + toe, 0.98, 0.055 if side else 0.034, 0.02, shade(ink["shoes"], dim))

    def arm(s: int) -> Point:
        reach = swing[1] * s * (0.13 if side else 0.03)
        at = (0.0 if side else s * (chest - 0.012), neck + 0.025)
        elbow = (at[0] + 0.4 * reach + (0 if side else 0.028 * s), neck + 0.175)
        hand = (at[0] + reach + (0.02 if side else 0.03 * s), neck + 0.33)
        short = min(1.0, 2 * who.sleeve)  # the upper arm is half of it
        cover = (at[0] + short * (elbow[0] - at[0]), at[1] + short * (elbow[1] - at[1]))
        brush.limb(at, elbow, 0.058 * thick, 0.046 * thick, ink["skin"])
        brush.limb(elbow, hand, 0.046 * thick, 0.036 * thick, ink["skin"])
        sleeve = shade(ink["upper"], 0.82)  # shaded, or the arm would melt into the trunk
        brush.limb(at, cover, 0.066 * thick, 0.058 * thick, sleeve)
        if who.sleeve == 1:
            brush.limb(elbow, (hand[0] * 0.9 + elbow[0] * 0.1, hand[1] - 0.03), 0.056 * thick, 0.046 * thick, sleeve)
        return hand

    if side:
        arm(-1)
        if who.bag == "backpack":
            brush.box(-chest - 0.075, neck + 0.02, -chest + 0.03, hip - 0.08, ink["bag"])
    leg(-1), leg(1)
    if who.lower == "skirt":
        brush.garment(hip - 0.04, hip + 0.24, (waist, waist + 0.045), ink["lower"], [], ink["lower"])
    if who.coat:
        brush.garment(hip - 0.03, hip + 0.2, (waist, waist + 0.025), shade(ink["upper"], 0.92), [], ink["accent"])
    else:
        brush.garment(hip - 0.05, hip + 0.02, (waist, waist), ink["lower"], [], ink["lower"])
    brush.limb((0.01 * side, 0.1), (0.01 * side, neck), 0.05, 0.055, ink["skin"])
    brush.ellipse(0, neck + 0.012, chest * 0.9, 0.025, ink["upper"])
    brush.garment(neck + 0.01, hip - 0.02, (chest, waist), ink["upper"], cells, ink["accent"])
    hands = [arm(1)] if side else [arm(-1), arm(1)]

    if who.bag == "backpack" and back:
        brush.box(-chest * 0.75, neck + 0.02, chest * 0.75, hip - 0.09, ink["bag"])
        brush.box(-chest * 0.5, hip - 0.22, chest * 0.5, hip - 0.12, shade(ink["bag"], 0.75))
    elif who.bag == "backpack" and not side:
        for s in (-1, 1):
            brush.limb((s * chest * 0.6, neck), (s * chest * 0.62, hip - 0.16), 0.028, 0.028, ink["bag"])
    elif who.bag == "shoulder":
        brush.limb((-chest * 0.7, neck + 0.005), (waist, hip - 0.03), 0.02, 0.02, ink["bag"])
        brush.box(waist - 0.055, hip - 0.06, waist + 0.065, hip + 0.075, ink["bag"])
    elif who.bag == "hand":
        x, y = hands[-1]
        brush.box(x - 0.055, y + 0.02, x + 0.055, y + 0.15, ink["bag"])

    draw_head(brush, who, ink, view)


def draw_head(brush: Brush, who: Person, ink: dict[str, Ink], view: str) -> None:
    """Head, face, hair and hat; the face looks to +x from the side."""
    side, back = view == "side", view == "back"
    hair, x = ink["hair"], 0.012 * side
    if who.hair == "long" and not back:
        brush.box(x - 0.062, 0.06, x + (0.01 if side else 0.062), 0.215, hair)
    if who.hair == "ponytail" and side:
        brush.limb((x - 0.04, 0.04), (x - 0.1, 0.14), 0.03, 0.03, hair)
    brush.ellipse(x, 0.075, 0.05, 0.066, ink["skin"])
    if who.hair != "bald":
        start, turn = {"front": (0.5, 0.5), "side": (0.3, 0.5), "back": (0, 1)}[view]
        brush.ellipse(x, 0.063, 0.056, 0.063, hair, start, turn)
    if who.hair == "long" and back:
        brush.box(x - 0.06, 0.06, x + 0.06, 0.225, hair)
    elif who.hair == "ponytail":
        if back:
            brush.limb((x, 0.06), (x, 0.19), 0.04, 0.03, hair)
        elif not side:
            brush.ellipse(x, 0.0, 0.026, 0.022, hair)
    elif who.hair == "hat":
        brush.ellipse(x, 0.05, 0.062, 0.062, ink["hat"], 0.5, 0.5)
        brush.box(x - 0.065 + 0.02 * side, 0.042, x + 0.065 + 0.035 * side, 0.058, shade(ink["hat"], 0.7))
    for eye in () if back else (0.035,) if side else (-0.02, 0.02):
        brush.ellipse(x + eye, 0.078, 0.007, 0.006, shade(ink["skin"], 0.3))


@functools.lru_cache(maxsize=32)
def scene(seed: int, room: int) -> Image.Image:
    """The fixed background of a room or a street, RGB 520 x 440, floor or ground from two thirds down."""
    rng = np.random.default_rng([seed, SCENE, room])
    width, height, floor = 520, 440, 250
    tint = lambda low, high: tuple(int(c) for c in rng.uniform(low, high) + rng.uniform(-22, 22, 3))  # noqa: E731
    canvas = Image.new("RGB", (width, height), tint(130, 200))
    draw = ImageDraw.Draw(canvas)
    indoors = room % 2 == 1
    if not indoors:  # houses with windows against the sky
        x = 0
        while x < width:
            wide, top = int(rng.integers(60, 130)), int(rng.integers(0, 120))
            draw.rectangle((x, top, x + wide, floor), tint(70, 180))
            glass = tint(40, 110)
            for wx in range(x + 10, x + wide - 18, 28):
                for wy in range(top + 14, floor - 40, 42):
                    draw.rectangle((wx, wy, wx + 14, wy + 22), glass)
            x += wide
    draw.rectangle((0, floor, width, height), tint(70, 150))
    line = tint(50, 100)
    for i in range(-8, 9):  # floorboards or paving run to a vanishing point
        draw.line((width / 2 + 30 * i, floor, width / 2 + 110 * i, height), line, 2)
    draw.rectangle((0, floor - 6, width, floor), line)
    for _ in range(7):  # cabinets, doors and posters; or trees and posts
        x, high = int(rng.integers(0, width)), int(rng.integers(60, 200))
        if indoors:
            top = floor - high if rng.random() < 0.7 else int(rng.integers(20, 100))
            bottom = floor + 12 if top == floor - high else top + 70
            draw.rectangle((x, top, x + int(rng.integers(35, 90)), bottom), tint(40, 210), line)
        else:
            draw.rectangle((x - 4, floor - high, x + 4, floor + 10), tint(40, 80))
            r, leaf, y = int(rng.integers(15, 45)), int(rng.integers(40, 100)), floor - high
            draw.ellipse((x - r, y - r, x + r, y + r), (leaf * 7 // 10, leaf, leaf // 2))
    return canvas.filter(ImageFilter.GaussianBlur(1.5))


@functools.lru_cache(maxsize=32)
def backdrop(seed: int, number: int, clutter: float) -> Image.Image:
    """The scene as a camera sees it: grey for infrared, and flattened towards its mean where clutter is low."""
    camera = CAMERAS[number]
    pixels = np.asarray(scene(seed, camera.room), dtype=np.float32)
    if camera.tone is not None:
        low, high = camera.backdrop
        pixels = low + (high - low) * pixels.mean(2) / 255
    pixels = pixels.mean((0, 1)) + clutter * (pixels - pixels.mean((0, 1)))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def draw(seed: int, pid: int, number: int, index: int, hard: Difficulty = EASY) -> Image.Image:
    """Image `index` of person `pid` in camera `number` (1-6 SYSU, 7 and 8 RegDB visible and thermal), mode RGB.

    SYSU boxes are 64-80 x 144-176 pixels, RegDB ones 64 x 128.
    """
    rng = np.random.default_rng([seed, IMAGE, pid, number, index])
    who, camera = person(seed, pid), CAMERAS[number]
    width, height = (64, 128) if number in REGDB else (int(rng.integers(64, 81)), int(rng.integers(144, 177)))

    # The box over the background: at the centre of the scene, or anywhere on it where clutter is full.
    size = (SUPERSAMPLE * width, SUPERSAMPLE * height)
    behind = backdrop(seed, number, hard.clutter)
    free = np.array([behind.width - size[0], behind.height - size[1]])
    left, top = free * (0.5 + hard.clutter * rng.uniform(-0.5, 0.5, 2))
    canvas = behind.crop((int(left), int(top), int(left) + size[0], int(top) + size[1]))

    ink = inks(who, camera, hard)
    view = str(rng.choice(VIEWS, p=camera.views)) if rng.random() < hard.views else "front"
    offset, zoom, tilt = rng.normal(0, hard.crop, 2), math.exp(rng.normal(0, hard.crop)), rng.normal(0, hard.crop)
    unit = 0.95 * size[1] * who.height * zoom * (1 + hard.cameras * (camera.scale - 1))
    crown = (size[0] / 2 + offset[0] * size[1] + unit * math.sin(tilt) / 2, 0.98 * size[1] - unit + offset[1] * size[1])
    brush = Brush(canvas, crown, unit, tilt, mirror=bool(rng.random() < 0.5))
    draw_body(brush, who, ink, view, tuple(hard.pose * rng.uniform(-1, 1, 2)))
    if rng.random() < hard.occlusion:  # a post, or a counter before the legs
        tone = tuple(int(c) for c in rng.uniform(30, 200) + rng.uniform(-20, 20, len(ink["skin"])))
        x, wide, y = rng.uniform(0, size[0]), rng.uniform(0.08, 0.25) * size[0], rng.uniform(0.6, 0.85) * size[1]
        post = rng.random() < 0.5
        brush.draw.rectangle((x, 0, x + wide, size[1]) if post else (0, y, size[0], size[1]), tone)
    return develop(canvas, camera, hard, rng)


def develop(canvas: Image.Image, camera: Camera, hard: Difficulty, rng: np.random.Generator) -> Image.Image:
    """Optics and sensor: blur, light, vignette, cast and noise on the reduced canvas."""
    image = canvas.reduce(SUPERSAMPLE)
    radius = hard.cameras * camera.blur + hard.blur * rng.random()
    if radius > 0.2:
        image = image.filter(ImageFilter.GaussianBlur(radius))
    pixels = np.asarray(image, dtype=np.float32).reshape(image.height, image.width, -1)
    infrared = camera.tone is not None
    y, x = np.linspace(-1, 1, image.height, dtype=np.float32), np.linspace(-1, 1, image.width, dtype=np.float32)
    falloff = camera.vignette * (0.5 + 0.5 * hard.cameras if infrared else hard.cameras) / 2
    light = (1 - falloff * (y[:, None] ** 2 + x**2)) * math.exp(rng.normal(0, hard.light))
    light *= 1 + hard.cameras * (camera.gain - 1)
    cast = [1.0] if infrared else 1 + hard.cameras * (np.array(camera.cast) - 1)
    pixels = pixels * light[..., None] * np.asarray(cast, dtype=np.float32)
    pixels += hard.noise * (1.5 if infrared else 1.0) * rng.standard_normal(pixels.shape, dtype=np.float32)
    pixels = np.broadcast_to(pixels.clip(0, 255).astype(np.uint8), (image.height, image.width, 3))
    return Image.fromarray(np.ascontiguousarray(pixels))


# ---------------------------------------------------------------------------------------- who is where, how many times

Counts = dict[int, dict[int, int]]  # person -> camera -> number of images
SPLITS = ("train", "val", "test")
SHARES = {"val": 99 / 491, "test": 96 / 491}
# Sets of cameras with the number of persons they hold, and per camera (images, least, most per person), as in the real
# SYSU-MM01. Nobody of "none" stands in a list of ids.
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


def spread(rng: np.random.Generator, persons: int, total: int, least: int, most: int) -> list[int]:
    """`persons` numbers in least..most with the given total, both ends reached where there is room."""
    counts = rng.normal(total / persons, (most - least) / 8, persons).round().clip(least, most).astype(int)
    if least < most:
        counts[:2] = least, most
    while (gap := total - counts.sum()) != 0:
        # The two ends stay; everybody else moves one step towards the total until it fits.
        movable = 2 + np.flatnonzero(counts[2:] < most if gap > 0 else counts[2:] > least)
        counts[rng.permutation(movable)[: abs(gap)]] += np.sign(gap)
    return rng.permutation(counts).tolist()


def real_sysu(seed: int) -> tuple[dict[str, list[int]], Counts]:
    """Splits and counts with the real set's 513 persons, 30,071 RGB and 15,792 infrared images."""
    rng = np.random.default_rng([seed, SPLIT])
    pids = iter((1 + rng.permutation(sum(sum(sets.values()) for sets in REAL_SETS.values()))).tolist())
    splits, counts = {}, {}
    for split, sets in REAL_SETS.items():
        where = {next(pids): cams for cams, n in sets.items() for _ in range(n)}
        splits[split] = sorted(where)
        counts |= {pid: {} for pid in where}
        for cam, (total, least, most) in enumerate(REAL_IMAGES[split], start=1):
            here = [pid for pid, cams in where.items() if str(cam) in cams]
            for pid, n in zip(here, spread(rng, len(here), total, least, most) if here else [], strict=True):
                counts[pid][cam] = n
    return splits, counts


def small_sysu(ids: int, images: int, seed: int) -> tuple[dict[str, list[int]], Counts]:
    """Splits and counts of `ids` persons with about `images` images in each camera they pass.

    Camera sets follow the real test split, whose persons are in cameras 1 and 2 together or in neither. The first
    person of every split is in all six cameras, so that every search has something to find.
    """
    rng = np.random.default_rng([seed, SPLIT])
    sizes = {"test": max(2, round(ids * SHARES["test"])), "val": max(1, round(ids * SHARES["val"]))}
    order = (1 + rng.permutation(ids)).tolist()
    cut = ids - sizes["val"] - sizes["test"], ids - sizes["test"]
    splits = {"train": order[: cut[0]], "val": order[cut[0] : cut[1]], "test": order[cut[1] :]}
    sets, weights = list(REAL_SETS["test"]), np.array(list(REAL_SETS["test"].values()))
    counts: Counts = {}
    for split, pids in splits.items():
        least = 10 if split == "test" and images >= 12 else 1
        for i, pid in enumerate(pids):
            where = sets[0] if i == 0 else sets[rng.choice(len(sets), p=weights / weights.sum())]
            wobble = {cam: rng.normal(0, 0.2 if cam in "12" else 0.04) for cam in where}  # as uneven as the real ones
            counts[pid] = {int(cam): max(least, round(images * (1 + w))) for cam, w in wobble.items()}
    return splits, counts


# ------------------------------------------------------------------------------------------------------ writing a tree


def draw_person(job: tuple[Path, int, str, int, dict[int, int]]) -> int:
    """Draw and save all images of one person; returns their number."""
    root, seed, difficulty, pid, counts = job
    for number, images in counts.items():
        for index in range(1, images + 1):
            path = root / CAMERAS[number].path.format(pid=pid, index=index)
            if index == 1:
                path.parent.mkdir(parents=True, exist_ok=True)
            draw(seed, pid, number, index, DIFFICULTIES[difficulty]).save(path, quality=90)
    return sum(counts.values())


def write_tree(out: Path, settings: dict, counts: Counts, lists: dict[str, str], workers: int) -> bool:
    """Write images and text files to `out`, whole or not at all; False if the same tree is there already.

    The work goes on in a folder beside `out`, which takes its name once `synthetic.json` is written.
    """
    out = Path(out).resolve()
    if not out.name:
        raise OSError(f"{out} cannot be made: give another --out")
    part = out.with_name(out.name + ".synthetic-partial")
    note = json.dumps(settings | {"version": VERSION, "pillow": PIL.__version__}, indent=1) + "\n"
    if (out / "synthetic.json").is_file() and (out / "synthetic.json").read_bytes() == note.encode():
        return False
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise OSError(f"{out} holds other content or other settings: give another --out, or delete it")
    shutil.rmtree(part, ignore_errors=True)  # what an interrupted run left
    try:
        part.mkdir(parents=True)
        for name, text in lists.items():
            (part / name).parent.mkdir(exist_ok=True)
            (part / name).write_text(text)
        jobs = [(part, settings["seed"], settings["difficulty"], pid, counts[pid]) for pid in sorted(counts)]
        total = sum(sum(where.values()) for where in counts.values())
        with ProcessPoolExecutor(workers) as pool, tqdm(total=total, unit="image", disable=None) as bar:
            for done in (map if workers == 1 else pool.map)(draw_person, jobs):  # an idle pool starts no process
                bar.update(done)
        (part / "synthetic.json").write_text(note)
        part.rename(out)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return True


def make_sysu(
    out: Path, ids: int | None = 130, images: int = 20, seed: int = 0, difficulty: str = "easy", workers: int = 1
) -> bool:
    """Write cam1..cam6/<id>/<image>.jpg and exp/{train,val,test}_id.txt; False if the tree is there already.

    `ids` None stands for the real set's shape, whatever `images` says.
    """
    if ids is not None and not (5 <= ids <= 9999 and 2 <= images <= 999):
        raise OSError(f"sysu takes --ids from 5 to 9999 and --images from 2 to 999, not {ids} and {images}")
    settings = {"dataset": "sysu", "ids": ids, "images": ids and images, "seed": seed, "difficulty": difficulty}
    splits, counts = real_sysu(seed) if ids is None else small_sysu(ids, images, seed)
    lists = {f"exp/{split}_id.txt": ",".join(map(str, sorted(splits[split]))) + "\n" for split in SPLITS}
    return write_tree(out, settings | {"full": ids is None}, counts, lists, workers)


def make_regdb(out: Path, ids: int | None = 130, seed: int = 0, difficulty: str = "easy", workers: int = 1) -> bool:
    """Write {Visible,Thermal}/<id>/*.bmp and ten random halvings in idx/; `ids` None stands for the real set's 412."""
    settings = {"dataset": "regdb", "ids": ids, "images": 10, "seed": seed, "difficulty": difficulty}
    pids = range(1, 1 + (412 if ids is None else ids))
    if not 6 <= len(pids) <= 9999:
        raise OSError(f"regdb takes --ids from 6 to 9999, not {ids}")
    rng, lists, halves = np.random.default_rng([seed, TRIAL]), {}, set()
    while len(halves) < 10:
        train = frozenset((1 + rng.permutation(len(pids))[: len(pids) // 2]).tolist())
        if train in halves:
            continue
        halves.add(train)
        for split, members in (("train", sorted(train)), ("test", sorted(set(pids) - train))):
            for modality, number in (("visible", 7), ("thermal", 8)):
                path = REGDB[number].path.format
                rows = [f"{path(pid=p, index=i)} {label}\n" for label, p in enumerate(members) for i in range(1, 11)]
                lists[f"idx/{split}_{modality}_{len(halves)}.txt"] = "".join(rows)
    return write_tree(out, settings | {"full": ids is None}, {pid: {7: 10, 8: 10} for pid in pids}, lists, workers)


def build_parser() -> argparse.ArgumentParser:
    parser = utils.Parser(
        prog="python -m tools.make_synthetic", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--dataset", choices=("sysu", "regdb"), required=True, help="layout to write")
    add("--out", type=Path, required=True, help="folder to make: new, empty or the same tree")
    add("--ids", type=int, default=130, help="persons in all splits together (%(default)s)")
    add("--images", type=int, default=20, help="sysu: mean images per person and camera (%(default)s)")
    add("--seed", type=utils.number(int, 0), default=0, help="another seed draws other people and rooms (%(default)s)")
    add(
        "--difficulty",
        choices=tuple(DIFFICULTIES),
        default="easy",
        help="how much infrared tells of colours, cameras differ, clutter and noise disturb (%(default)s)",
    )
    add("--full", action="store_true", help="the real set's persons and images; ignores --ids and --images")
    add("--workers", type=utils.number(int, 1), default=os.cpu_count() or 1, help="processes (one per core)")
    return parser


def main() -> None:
    args = build_parser().parse_args()
    ids = None if args.full else args.ids
    if args.dataset == "sysu":
        written = make_sysu(args.out, ids, args.images, args.seed, args.difficulty, args.workers)
    else:
        written = make_regdb(args.out, ids, args.seed, args.difficulty, args.workers)
    print(f"{args.out}: {'written' if written else 'already there'}")


if __name__ == "__main__":
    utils.run(main)
