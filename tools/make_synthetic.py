"""Make images of synthetic people in the on-disk layout of SYSU-MM01, RegDB or LLCM.

    python -m tools.make_synthetic --dataset sysu  --out data/toy --ids 130 --seed 0
    python -m tools.make_synthetic --dataset regdb --out data/toy_regdb --full

The real datasets are under licence; these trees can stand in for them in tests and demos.

A synthetic person is a set of attributes. Build, hair, bag, garment shapes and patterns show in
both modalities. Colours show in visible light alone, infrared reflectances in infrared alone.
--difficulty sets how far the modalities agree and how much the cameras differ: "easy" people look
alike in all cameras, "hard" ones are too much for a small network.

Each image has its own stream of random numbers. So a tree is the same byte for byte whatever
--workers says, as long as the version of Pillow stays the same.
"""

import argparse
import dataclasses
import enum
import functools
import json
import math
import shutil
import signal
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import PIL
from PIL import Image, ImageDraw, ImageFilter
from tqdm import tqdm

import utils

VERSION = 4  # of the drawing: raise it when the same settings give other images
SUPERSAMPLE = 2  # people are drawn on a canvas of this multiple of the final size


# ---- random numbers ------------------------------------------------------------------------------
# The same seed must give the same tree for ever, so the order of random draws must never change,
# not even where the value of a draw is thrown away.


class Stream(enum.IntEnum):
    """What random numbers are for. Each purpose has streams of its own."""

    PERSON = 1
    IMAGE = 2
    SCENE = 3
    SPLIT = 4
    TRIAL = 5


def random_stream(seed: int, purpose: Stream, *numbers: int) -> np.random.Generator:
    """A generator for one purpose; equal arguments give equal random numbers.

    `numbers` name the person, the image or the scene that it is for.
    """
    return np.random.default_rng([seed, purpose, *numbers])


# ---- difficulty ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Difficulty:
    """How much modalities, cameras and images differ. Shares and probabilities are 0..1."""

    infrared_independence: float  # share of a garment's infrared reflectance not due to its colour
    infrared_texture: float  # share of a pattern's contrast that survives in infrared
    camera_strength: float  # share of each camera's gain, cast, vignette, scale and blur that acts
    view_habit: float  # probability that the camera's habit sets the view; otherwise it is frontal
    pose: float  # share of the largest spread of legs and arms
    framing: float  # sd of offset (in image heights), of log scale and of tilt (in radians)
    light: float  # sd of the log gain of an image
    noise: float  # sd of the sensor's noise in grey levels
    blur: float  # largest blur in pixels, besides that of the camera
    clutter: float  # contrast of the background, and how far images wander over it
    occlusion: float  # probability that something stands in front of the person


EASY = Difficulty(
    infrared_independence=0.0,
    infrared_texture=0.8,
    camera_strength=0.35,
    view_habit=0.25,
    pose=0.5,
    framing=0.012,
    light=0.05,
    noise=3.0,
    blur=0.3,
    clutter=0.4,
    occlusion=0.0,
)
HARD = Difficulty(
    infrared_independence=1.0,
    infrared_texture=0.3,
    camera_strength=1.0,
    view_habit=1.0,
    pose=1.0,
    framing=0.045,
    light=0.25,
    noise=14.0,
    blur=1.2,
    clutter=1.0,
    occlusion=0.4,
)


def mix_difficulties(easy: Difficulty, hard: Difficulty, share_of_hard: float) -> Difficulty:
    """The weighted mean of two difficulties, setting by setting."""
    settings = {}
    for name, easy_value in dataclasses.asdict(easy).items():
        hard_value = getattr(hard, name)
        settings[name] = (1 - share_of_hard) * easy_value + share_of_hard * hard_value
    return Difficulty(**settings)


DIFFICULTIES = {"easy": EASY, "medium": mix_difficulties(EASY, HARD, 0.25), "hard": HARD}


# ---- cameras -------------------------------------------------------------------------------------


VIEWS = ("front", "back", "side")  # of a person


class InfraredResponse(NamedTuple):
    """Which grey levels (0..255) an infrared camera gives to what it looks at."""

    garments: tuple[float, float, float]  # of reflectance 0, 1/2 and 1
    skin: int
    background: tuple[float, float]  # of black and white parts of the scene


@dataclass(frozen=True)
class Camera:
    """A fixed camera."""

    scene_id: int  # number of the scene behind people: odd ones are rooms, even ones streets
    gain: float
    cast: tuple[float, ...]  # gain of each channel; an infrared camera has one channel
    vignette: float  # loss of light in the corners; in infrared, how the lamp's light falls off
    people_scale: float
    blur: float  # radius in pixels
    views: tuple[float, float, float]  # share of each of VIEWS
    infrared: InfraredResponse | None = None  # None: visible light
    image_size: tuple[int, int] | None = None  # width and height; None: boxes of varying size


# A camera's id is unique among all datasets: SYSU-MM01 has 1 to 6, RegDB 7 and 8, LLCM 11 to 29.
# Cameras 2 and 3 share a room. Camera 3 saturates, and camera 6 inverts tones: dark synthetic
# fabrics glow in near infrared. Both are functions of reflectance alone, so a network can learn
# them, but no fixed filter on RGB gives them for free.
SYSU_CAMERAS = {
    1: Camera(
        scene_id=1,
        gain=1.10,
        cast=(1.08, 1.0, 0.88),
        vignette=0.15,
        people_scale=1.00,
        blur=0.2,
        views=(0.6, 0.2, 0.2),
    ),
    2: Camera(
        scene_id=3,
        gain=0.92,
        cast=(0.90, 1.0, 1.12),
        vignette=0.25,
        people_scale=0.93,
        blur=0.5,
        views=(0.2, 0.5, 0.3),
    ),
    3: Camera(
        scene_id=3,
        gain=1.00,
        cast=(1.0,),
        vignette=0.55,
        people_scale=0.96,
        blur=0.5,
        views=(0.5, 0.2, 0.3),
        infrared=InfraredResponse(garments=(70, 205, 250), skin=235, background=(90, 190)),
    ),
    4: Camera(
        scene_id=2,
        gain=1.20,
        cast=(1.0, 1.05, 0.92),
        vignette=0.10,
        people_scale=1.03,
        blur=0.3,
        views=(0.3, 0.3, 0.4),
    ),
    5: Camera(
        scene_id=4,
        gain=0.75,
        cast=(0.92, 0.97, 1.15),
        vignette=0.30,
        people_scale=0.90,
        blur=0.7,
        views=(0.2, 0.3, 0.5),
    ),
    6: Camera(
        scene_id=6,
        gain=0.90,
        cast=(1.0,),
        vignette=0.75,
        people_scale=0.97,
        blur=0.6,
        views=(0.3, 0.2, 0.5),
        infrared=InfraredResponse(garments=(215, 150, 70), skin=205, background=(8, 80)),
    ),
}
REGDB_VISIBLE = 7
REGDB_THERMAL = 8
REGDB_CAMERAS = {
    REGDB_VISIBLE: Camera(
        scene_id=8,
        gain=1.0,
        cast=(1.0, 1.0, 1.0),
        vignette=0.1,
        people_scale=1.0,
        blur=0.2,
        views=(0.4, 0.4, 0.2),
        image_size=(64, 128),
    ),
    # Thermal: skin is hot, a garment is the colder the better it insulates, the street is cold.
    REGDB_THERMAL: Camera(
        scene_id=8,
        gain=1.0,
        cast=(1.0,),
        vignette=0.1,
        people_scale=1.0,
        blur=0.8,
        views=(0.4, 0.4, 0.2),
        infrared=InfraredResponse(garments=(190, 120, 75), skin=245, background=(15, 75)),
        image_size=(64, 128),
    ),
}
# Added to the number that LLCM itself gives a camera.
LLCM_ID_OFFSET = {"vis": 10, "nir": 20}
# LLCM has nine cameras, and all but the third of them also see in near infrared.
LLCM_CAMERA_NUMBERS = {"vis": (1, 2, 3, 4, 5, 6, 7, 8, 9), "nir": (1, 2, 4, 5, 6, 7, 8, 9)}


def llcm_cameras() -> dict[int, Camera]:
    """Cameras in dim light by id, made from those of SYSU-MM01."""
    cameras = {}
    for number in LLCM_CAMERA_NUMBERS["vis"]:
        cameras[LLCM_ID_OFFSET["vis"] + number] = dataclasses.replace(
            SYSU_CAMERAS[1], scene_id=20 + number, gain=0.5 + 0.06 * number, blur=0.1 * number
        )
    for number in LLCM_CAMERA_NUMBERS["nir"]:
        model = SYSU_CAMERAS[3]
        if number % 2 == 1:
            model = SYSU_CAMERAS[6]
        cameras[LLCM_ID_OFFSET["nir"] + number] = dataclasses.replace(
            model, scene_id=20 + number, blur=0.1 * number
        )
    return cameras


CAMERAS = SYSU_CAMERAS | REGDB_CAMERAS | llcm_cameras()


# ---- patterns of garments ------------------------------------------------------------------------


class Box(NamedTuple):
    """A rectangle of a garment that is 0..1 wide and 0..1 high, from its top left corner."""

    left: float
    top: float
    right: float
    bottom: float


def plain(repeats: int) -> list[Box]:
    """No boxes: the whole garment has one colour."""
    return []


def hoops(repeats: int) -> list[Box]:
    """Bands across the garment."""
    return [Box(0, (row + 0.3) / repeats, 1, (row + 0.8) / repeats) for row in range(repeats)]


def stripes(repeats: int) -> list[Box]:
    """Bands from top to bottom."""
    return [Box((col + 0.25) / repeats, 0, (col + 0.75) / repeats, 1) for col in range(repeats)]


def checks(repeats: int) -> list[Box]:
    """Every other field of a chessboard."""
    boxes = []
    for col in range(repeats):
        for row in range(repeats):
            if (col + row) % 2 == 1:
                right = (col + 1) / repeats
                bottom = (row + 1) / repeats
                boxes.append(Box(col / repeats, row / repeats, right, bottom))
    return boxes


def logo(repeats: int) -> list[Box]:
    """One box on the chest. More repeats make it higher."""
    return [Box(0.25, 0.18, 0.75, 0.3 + 0.06 * repeats)]


def two_tone(repeats: int) -> list[Box]:
    """The lower part of the garment. More repeats make it smaller."""
    return [Box(0, 0.2 + 0.08 * repeats, 1, 1)]


# Number of repeats -> boxes of the accent colour.
PATTERNS = {
    "plain": plain,
    "hoops": hoops,
    "stripes": stripes,
    "checks": checks,
    "logo": logo,
    "two-tone": two_tone,
}


# ---- people --------------------------------------------------------------------------------------

Colour = tuple[float, float, float]  # red, green, blue, 0..255
Ink = tuple[int, ...]  # (red, green, blue), or (grey,) on the canvas of an infrared camera
Inks = dict[str, Ink]  # part -> ink

PARTS = ("upper", "accent", "lower", "shoes", "bag", "hat", "hair", "skin")


@dataclass(frozen=True)
class Person:
    """One identity, the same at every difficulty. Lengths are multiples of an average body's."""

    colours: dict[str, Colour]  # part -> its colour in visible light
    height: float
    shoulders: float
    build: float
    legs: float  # share of the body's height below the hip
    hair: str
    bag: str
    lower: str
    has_coat: bool
    sleeve: float  # covered share of the arm
    pattern: str
    pattern_repeats: int
    reflectances: dict[str, float]  # part -> its reflectance in infrared, 0..1


def sample_person(seed: int, pid: int) -> Person:
    """The person with this id, the same for each call."""
    rng = random_stream(seed, Stream.PERSON, pid)
    return Person(
        colours=sample_colours(rng),
        height=rng.uniform(0.86, 1.0),
        shoulders=rng.uniform(0.8, 1.2),
        build=rng.uniform(0.75, 1.3),
        legs=rng.uniform(0.45, 0.54),
        hair=rng.choice(
            ["short", "long", "bald", "ponytail", "hat"], p=[0.3, 0.25, 0.1, 0.15, 0.2]
        ),
        bag=rng.choice(["none", "backpack", "shoulder", "hand"], p=[0.35, 0.25, 0.2, 0.2]),
        lower=rng.choice(["trousers", "shorts", "skirt"], p=[0.6, 0.2, 0.2]),
        has_coat=rng.random() < 0.2,
        sleeve=float(rng.choice([0.1, 0.3, 1.0], p=[0.15, 0.35, 0.5])),
        pattern=rng.choice(list(PATTERNS)),
        pattern_repeats=int(rng.integers(3, 7)),
        reflectances={part: rng.random() for part in PARTS},
    )


def sample_colours(rng: np.random.Generator) -> dict[str, Colour]:
    """The colour of each part of a person, in the order of PARTS."""
    brightness = {part: rng.random() for part in PARTS}
    # A pattern must stand out from its cloth.
    brightness["accent"] = (brightness["upper"] + rng.uniform(0.35, 0.65)) % 1
    colours = {part: sample_garment_colour(rng, brightness[part]) for part in PARTS}

    # Skin and hair have colours of their own.
    lightness = rng.uniform(0.45, 1.0)
    colours["skin"] = (245 * lightness, 205 * lightness**1.2, 175 * lightness**1.4)
    greyness = rng.uniform(0.0, 1.0) ** 3
    colours["hair"] = (30 + 150 * greyness, 22 + 130 * greyness, 18 + 90 * greyness)
    return colours


def sample_garment_colour(rng: np.random.Generator, brightness: float) -> Colour:
    """A colour of this brightness (0..1) and any hue; a third of all garments are nearly grey."""
    is_nearly_grey = rng.random() < 0.33
    saturation = rng.uniform(0.0, 0.15) if is_nearly_grey else rng.uniform(0.45, 0.95)
    hue = rng.random()
    channels = np.cos(2 * math.pi * (hue - np.arange(3) / 3)) * 0.5 + 0.5
    channels = 1 - saturation * (1 - channels / channels.max())
    return tuple((20 + 235 * brightness) * channels)


def inks_of(person: Person, camera: Camera, difficulty: Difficulty) -> Inks:
    """How a camera sees each part of a person, before light and noise."""
    if camera.infrared is None:
        return {part: to_ink(colour) for part, colour in person.colours.items()}
    return infrared_inks(person, camera.infrared, difficulty)


def infrared_inks(person: Person, response: InfraredResponse, difficulty: Difficulty) -> Inks:
    """One grey level for each part: some of it follows the part's colour, and the rest does not."""
    independence = difficulty.infrared_independence
    reflectances = {}
    for part in PARTS:
        red, green, blue = person.colours[part]
        luminance = (0.299 * red + 0.587 * green + 0.114 * blue) / 255
        unrelated = person.reflectances[part]
        reflectances[part] = (1 - independence) * luminance + independence * unrelated
    contrast = reflectances["accent"] - reflectances["upper"]
    reflectances["accent"] = reflectances["upper"] + difficulty.infrared_texture * contrast

    inks = {}
    for part, reflectance in reflectances.items():
        inks[part] = to_ink([np.interp(reflectance, (0, 0.5, 1), response.garments)])
    inks["skin"] = (response.skin,)
    return inks


def to_ink(levels: Colour | list[float] | np.ndarray) -> Ink:
    """The levels of one or three channels, rounded down."""
    return tuple(int(level) for level in levels)


def shade(ink: Ink, factor: float) -> Ink:
    """The ink, darker by a factor below 1."""
    return to_ink([level * factor for level in ink])


# ---- drawing shapes ------------------------------------------------------------------------------


class Point(NamedTuple):
    """A point in body units (see `Brush`) or in pixels."""

    x: float
    y: float


class Brush:
    """Draws in body units: x to the right of the body's axis, y down from the crown of the head.

    The unit is the body's height.
    """

    def __init__(self, canvas: Image.Image, crown: Point, height: float, tilt: float, mirror: bool):
        """`crown` and `height` are in pixels of the canvas, `tilt` is in radians."""
        self.pen = ImageDraw.Draw(canvas)
        self.crown = crown
        self.scaled_cos = height * math.cos(tilt)
        self.scaled_sin = height * math.sin(tilt)
        self.mirror = mirror

    def to_canvas(self, point: Point) -> Point:
        """The pixel of a point in body units."""
        x = point.x
        if self.mirror:
            x = -x
        return Point(
            self.crown.x + x * self.scaled_cos - point.y * self.scaled_sin,
            self.crown.y + x * self.scaled_sin + point.y * self.scaled_cos,
        )

    def polygon(self, points: list[Point], ink: Ink) -> None:
        """Draw a filled polygon."""
        self.pen.polygon([self.to_canvas(point) for point in points], ink)

    def box(self, left: float, top: float, right: float, bottom: float, ink: Ink) -> None:
        """Draw a rectangle that is tilted as the body is."""
        corners = [Point(left, top), Point(right, top), Point(right, bottom), Point(left, bottom)]
        self.polygon(corners, ink)

    def ellipse(
        self,
        center: Point,
        radius_x: float,
        radius_y: float,
        ink: Ink,
        start: float = 0.0,
        turns: float = 1.0,
    ) -> None:
        """Draw an ellipse, or the segment from `start` on over `turns`, clockwise from the right.

        Both are in full turns: start 0.5 and turns 0.5 give the upper half.
        """
        points = []
        for step in range(15):
            angle = 2 * math.pi * (start + turns * step / 14)
            x = center.x + radius_x * math.cos(angle)
            y = center.y + radius_y * math.sin(angle)
            points.append(Point(x, y))
        self.polygon(points, ink)

    def limb(
        self, start: Point, end: Point, start_width: float, end_width: float, ink: Ink
    ) -> None:
        """Draw a tapering bar with a round joint at its end."""
        dx = end.x - start.x
        dy = end.y - start.y
        # Half of the unit vector across the bar.
        length = 2 * math.hypot(dx, dy)
        across_x = -dy / length
        across_y = dx / length
        corners = [
            Point(start.x + across_x * start_width, start.y + across_y * start_width),
            Point(start.x - across_x * start_width, start.y - across_y * start_width),
            Point(end.x - across_x * end_width, end.y - across_y * end_width),
            Point(end.x + across_x * end_width, end.y + across_y * end_width),
        ]
        self.polygon(corners, ink)
        self.ellipse(end, end_width / 2, end_width / 2, ink)


class Trapezium(NamedTuple):
    """The outline of a garment, symmetric about the body's axis."""

    top: float
    bottom: float
    half_top_width: float
    half_bottom_width: float

    def point(self, u: float, v: float) -> Point:
        """The point at shares u of the width and v of the height, from the top left corner."""
        half_width = self.half_top_width + v * (self.half_bottom_width - self.half_top_width)
        return Point((2 * u - 1) * half_width, self.top + v * (self.bottom - self.top))

    def part(self, box: Box) -> list[Point]:
        """The corners of the part that a box of a pattern covers."""
        return [
            self.point(box.left, box.top),
            self.point(box.right, box.top),
            self.point(box.right, box.bottom),
            self.point(box.left, box.bottom),
        ]


WHOLE_GARMENT = Box(0, 0, 1, 1)


# ---- drawing people ------------------------------------------------------------------------------

LEFT = -1  # in the image, of a person who is not mirrored
RIGHT = 1
NECK_Y = 0.165
ANKLE_Y = 0.965


@dataclass(frozen=True)
class Figure:
    """A person as one image shows them. Lengths are in body units, see `Brush`."""

    person: Person
    inks: Inks
    view: str  # one of VIEWS; from the side, the face looks to the right
    leg_swing: float  # -1..1
    arm_swing: float  # -1..1

    @property
    def from_side(self) -> bool:
        return self.view == "side"

    @property
    def half_chest(self) -> float:
        """Half of the trunk's width at the top."""
        if self.from_side:
            return 0.075
        return 0.125 * self.person.shoulders

    @property
    def half_waist(self) -> float:
        """Half of the trunk's width at the bottom."""
        if self.from_side:
            return 0.07 * self.person.build
        return 0.092 * self.person.build

    @property
    def hip_y(self) -> float:
        return 1 - self.person.legs

    @property
    def thickness(self) -> float:
        """The width of limbs, as a multiple of an average body's."""
        return 0.6 + 0.4 * self.person.build

    @property
    def largest_swing(self) -> float:
        """How far to the side a foot or a hand can be from where it rests."""
        if self.from_side:
            return 0.13
        return 0.03

    @property
    def head_x(self) -> float:
        if self.from_side:
            return 0.012
        return 0.0


def draw_body(brush: Brush, figure: Figure) -> None:
    """Draw all but the head, from the far parts to the near ones."""
    if figure.from_side:
        draw_arm(brush, figure, LEFT)  # behind the trunk
        draw_bag_behind_trunk(brush, figure)
    draw_leg(brush, figure, LEFT)
    draw_leg(brush, figure, RIGHT)
    draw_lower_garments(brush, figure)
    draw_trunk(brush, figure)
    if not figure.from_side:
        draw_arm(brush, figure, LEFT)
    draw_arm(brush, figure, RIGHT)
    draw_bag(brush, figure)


class Arm(NamedTuple):
    """The joints of an arm."""

    shoulder: Point
    elbow: Point
    hand: Point


def arm_of(figure: Figure, direction: int) -> Arm:
    """Where the LEFT or RIGHT arm of a figure is."""
    swing = direction * figure.arm_swing * figure.largest_swing
    if figure.from_side:
        # Both arms hang from the middle of the trunk.
        shoulder_x = 0.0
        elbow_x = 0.4 * swing
        hand_x = swing + 0.02
    else:
        shoulder_x = direction * (figure.half_chest - 0.012)
        elbow_x = shoulder_x + 0.4 * swing + direction * 0.028
        hand_x = shoulder_x + swing + direction * 0.03
    return Arm(
        shoulder=Point(shoulder_x, NECK_Y + 0.025),
        elbow=Point(elbow_x, NECK_Y + 0.175),
        hand=Point(hand_x, NECK_Y + 0.33),
    )


def draw_arm(brush: Brush, figure: Figure, direction: int) -> None:
    """Draw the LEFT or RIGHT arm, and the sleeve over it."""
    shoulder, elbow, hand = arm_of(figure, direction)
    thickness = figure.thickness
    skin = figure.inks["skin"]
    brush.limb(shoulder, elbow, 0.058 * thickness, 0.046 * thickness, skin)
    brush.limb(elbow, hand, 0.046 * thickness, 0.036 * thickness, skin)

    # Without a shade, the arm would melt into the trunk.
    cloth = shade(figure.inks["upper"], 0.82)
    # The upper arm is half of the arm.
    covered = min(1.0, 2 * figure.person.sleeve)
    sleeve_end = Point(
        shoulder.x + covered * (elbow.x - shoulder.x),
        shoulder.y + covered * (elbow.y - shoulder.y),
    )
    brush.limb(shoulder, sleeve_end, 0.066 * thickness, 0.058 * thickness, cloth)
    if figure.person.sleeve == 1:
        cuff = Point(hand.x * 0.9 + elbow.x * 0.1, hand.y - 0.03)
        brush.limb(elbow, cuff, 0.056 * thickness, 0.046 * thickness, cloth)


def draw_leg(brush: Brush, figure: Figure, direction: int) -> None:
    """Draw the LEFT or RIGHT leg with its shoe."""
    swing = direction * figure.leg_swing * figure.largest_swing
    if figure.from_side:
        hip_x = direction * 0.012
        knee_bend = 0.02
        toe_x = 0.035
        half_shoe = 0.055
    else:
        hip_x = direction * 0.052 * figure.person.build
        knee_bend = 0.0
        toe_x = direction * 0.008
        half_shoe = 0.034
    hip = Point(hip_x, figure.hip_y - 0.02)
    knee = Point(hip_x + swing * 0.35 + knee_bend, (figure.hip_y + ANKLE_Y) / 2)
    foot = Point(hip_x + swing, ANKLE_Y)

    thigh_ink = figure.inks["lower"]
    shin_ink = figure.inks["skin"]
    if figure.person.lower == "trousers":
        shin_ink = figure.inks["lower"]
    if figure.person.lower == "skirt":
        thigh_ink = figure.inks["skin"]
    brightness = 1.0
    if direction == LEFT:
        brightness = 0.85  # to tell the legs apart

    thickness = figure.thickness
    brush.limb(knee, foot, 0.075 * thickness, 0.052 * thickness, shade(shin_ink, brightness))
    brush.limb(hip, knee, 0.105 * thickness, 0.078 * thickness, shade(thigh_ink, brightness))
    shoe = Point(foot.x + toe_x, 0.98)
    brush.ellipse(shoe, half_shoe, 0.02, shade(figure.inks["shoes"], brightness))


def draw_lower_garments(brush: Brush, figure: Figure) -> None:
    """Draw a skirt, then the lower part of a coat, or else the hips."""
    hip = figure.hip_y
    waist = figure.half_waist
    if figure.person.lower == "skirt":
        skirt = Trapezium(hip - 0.04, hip + 0.24, waist, waist + 0.045)
        brush.polygon(skirt.part(WHOLE_GARMENT), figure.inks["lower"])
    if figure.person.has_coat:
        coat = Trapezium(hip - 0.03, hip + 0.2, waist, waist + 0.025)
        brush.polygon(coat.part(WHOLE_GARMENT), shade(figure.inks["upper"], 0.92))
    else:
        hips = Trapezium(hip - 0.05, hip + 0.02, waist, waist)
        brush.polygon(hips.part(WHOLE_GARMENT), figure.inks["lower"])


def draw_trunk(brush: Brush, figure: Figure) -> None:
    """Draw neck, shoulders and the upper garment with its pattern."""
    neck_x = 0.0
    if figure.from_side:
        neck_x = 0.01
    brush.limb(Point(neck_x, 0.1), Point(neck_x, NECK_Y), 0.05, 0.055, figure.inks["skin"])
    upper = figure.inks["upper"]
    brush.ellipse(Point(0.0, NECK_Y + 0.012), figure.half_chest * 0.9, 0.025, upper)

    shirt = Trapezium(NECK_Y + 0.01, figure.hip_y - 0.02, figure.half_chest, figure.half_waist)
    brush.polygon(shirt.part(WHOLE_GARMENT), upper)
    pattern = figure.person.pattern
    if pattern == "logo" and figure.view != "front":
        return
    for box in PATTERNS[pattern](figure.person.pattern_repeats):
        brush.polygon(shirt.part(box), figure.inks["accent"])


def draw_bag_behind_trunk(brush: Brush, figure: Figure) -> None:
    """Draw a backpack from the side."""
    if figure.person.bag == "backpack":
        back = -figure.half_chest
        ink = figure.inks["bag"]
        brush.box(back - 0.075, NECK_Y + 0.02, back + 0.03, figure.hip_y - 0.08, ink)


def draw_bag(brush: Brush, figure: Figure) -> None:
    """Draw whatever bag stands before the trunk and the arms."""
    bag = figure.person.bag
    if bag == "backpack" and figure.view == "back":
        draw_backpack(brush, figure)
    elif bag == "backpack" and figure.view == "front":
        draw_backpack_straps(brush, figure)
    elif bag == "shoulder":
        draw_shoulder_bag(brush, figure)
    elif bag == "hand":
        draw_handbag(brush, figure)


def draw_backpack(brush: Brush, figure: Figure) -> None:
    """Draw a backpack from the back."""
    chest = figure.half_chest
    hip = figure.hip_y
    ink = figure.inks["bag"]
    brush.box(-chest * 0.75, NECK_Y + 0.02, chest * 0.75, hip - 0.09, ink)
    brush.box(-chest * 0.5, hip - 0.22, chest * 0.5, hip - 0.12, shade(ink, 0.75))  # its pocket


def draw_backpack_straps(brush: Brush, figure: Figure) -> None:
    """Draw what one sees of a backpack from the front."""
    for direction in (LEFT, RIGHT):
        side = direction * figure.half_chest
        top = Point(side * 0.6, NECK_Y)
        bottom = Point(side * 0.62, figure.hip_y - 0.16)
        brush.limb(top, bottom, 0.028, 0.028, figure.inks["bag"])


def draw_shoulder_bag(brush: Brush, figure: Figure) -> None:
    """Draw a bag at the hip and its strap across the trunk."""
    waist = figure.half_waist
    hip = figure.hip_y
    ink = figure.inks["bag"]
    strap_top = Point(-figure.half_chest * 0.7, NECK_Y + 0.005)
    brush.limb(strap_top, Point(waist, hip - 0.03), 0.02, 0.02, ink)
    brush.box(waist - 0.055, hip - 0.06, waist + 0.065, hip + 0.075, ink)


def draw_handbag(brush: Brush, figure: Figure) -> None:
    """Draw a bag that hangs from the RIGHT hand."""
    hand = arm_of(figure, RIGHT).hand
    ink = figure.inks["bag"]
    brush.box(hand.x - 0.055, hand.y + 0.02, hand.x + 0.055, hand.y + 0.15, ink)


def draw_head(brush: Brush, figure: Figure) -> None:
    """Draw the head with hair, hat and eyes, from the far parts to the near ones."""
    draw_hair_behind_face(brush, figure)
    brush.ellipse(Point(figure.head_x, 0.075), 0.05, 0.066, figure.inks["skin"])
    if figure.person.hair != "bald":
        draw_hair_on_head(brush, figure)
    if figure.person.hair == "hat":
        draw_hat(brush, figure)
    draw_eyes(brush, figure)


def draw_hair_behind_face(brush: Brush, figure: Figure) -> None:
    """Draw the part of long hair or of a ponytail that the head hides in part."""
    x = figure.head_x
    ink = figure.inks["hair"]
    if figure.person.hair == "long" and figure.view == "front":
        brush.box(x - 0.062, 0.06, x + 0.062, 0.215, ink)
    elif figure.person.hair == "long" and figure.view == "side":
        brush.box(x - 0.062, 0.06, x + 0.01, 0.215, ink)
    elif figure.person.hair == "ponytail" and figure.view == "side":
        brush.limb(Point(x - 0.04, 0.04), Point(x - 0.1, 0.14), 0.03, 0.03, ink)


def draw_hair_on_head(brush: Brush, figure: Figure) -> None:
    """Draw the hair on the head, and from behind all of it."""
    x = figure.head_x
    ink = figure.inks["hair"]
    center = Point(x, 0.063)
    if figure.view == "front":
        brush.ellipse(center, 0.056, 0.063, ink, start=0.5, turns=0.5)
        if figure.person.hair == "ponytail":
            brush.ellipse(Point(x, 0.0), 0.026, 0.022, ink)
    elif figure.view == "side":
        brush.ellipse(center, 0.056, 0.063, ink, start=0.3, turns=0.5)
    else:
        brush.ellipse(center, 0.056, 0.063, ink)
        if figure.person.hair == "long":
            brush.box(x - 0.06, 0.06, x + 0.06, 0.225, ink)
        elif figure.person.hair == "ponytail":
            brush.limb(Point(x, 0.06), Point(x, 0.19), 0.04, 0.03, ink)


def draw_hat(brush: Brush, figure: Figure) -> None:
    """Draw a hat with a brim."""
    x = figure.head_x
    ink = figure.inks["hat"]
    brush.ellipse(Point(x, 0.05), 0.062, 0.062, ink, start=0.5, turns=0.5)
    brim_left = x - 0.065
    brim_right = x + 0.065
    if figure.from_side:
        # The brim points forward.
        brim_left += 0.02
        brim_right += 0.035
    brush.box(brim_left, 0.042, brim_right, 0.058, shade(ink, 0.7))


def draw_eyes(brush: Brush, figure: Figure) -> None:
    """Draw two eyes, from the side one, from behind none."""
    offsets = {"front": (-0.02, 0.02), "side": (0.035,), "back": ()}
    for offset in offsets[figure.view]:
        eye = Point(figure.head_x + offset, 0.078)
        brush.ellipse(eye, 0.007, 0.006, shade(figure.inks["skin"], 0.3))


# ---- drawing scenes ------------------------------------------------------------------------------

SCENE_WIDTH = 520
SCENE_HEIGHT = 440
FLOOR_Y = 250


def draw_scene(seed: int, scene_id: int) -> Image.Image:
    """A room (odd ids) or a street (even ids) in RGB."""
    rng = random_stream(seed, Stream.SCENE, scene_id)
    is_street = scene_id % 2 == 0
    wall_or_sky_ink = sample_tint(rng, 130, 200)
    canvas = Image.new("RGB", (SCENE_WIDTH, SCENE_HEIGHT), wall_or_sky_ink)
    pen = ImageDraw.Draw(canvas)
    if is_street:
        draw_houses(pen, rng)
    floor_ink = sample_tint(rng, 70, 150)
    line_ink = sample_tint(rng, 50, 100)
    draw_floor(pen, floor_ink, line_ink)
    for _ in range(7):
        x = int(rng.integers(0, SCENE_WIDTH))
        height = int(rng.integers(60, 200))
        if is_street:
            draw_tree(pen, rng, x, height)
        else:
            draw_furniture(pen, rng, x, height, line_ink)
    return canvas.filter(ImageFilter.GaussianBlur(1.5))


def sample_tint(rng: np.random.Generator, darkest: float, brightest: float) -> Ink:
    """A colour that is nearly grey."""
    grey = rng.uniform(darkest, brightest)
    return to_ink(grey + rng.uniform(-22, 22, 3))


def draw_houses(pen: ImageDraw.ImageDraw, rng: np.random.Generator) -> None:
    """Draw a row of houses with windows against the sky."""
    left = 0
    while left < SCENE_WIDTH:
        right = left + int(rng.integers(60, 130))
        top = int(rng.integers(0, 120))
        pen.rectangle((left, top, right, FLOOR_Y), sample_tint(rng, 70, 180))
        glass_ink = sample_tint(rng, 40, 110)
        for window_x in range(left + 10, right - 18, 28):
            for window_y in range(top + 14, FLOOR_Y - 40, 42):
                pen.rectangle((window_x, window_y, window_x + 14, window_y + 22), glass_ink)
        left = right


def draw_floor(pen: ImageDraw.ImageDraw, floor_ink: Ink, line_ink: Ink) -> None:
    """Draw floorboards or paving that run to a vanishing point, and a skirting board."""
    pen.rectangle((0, FLOOR_Y, SCENE_WIDTH, SCENE_HEIGHT), floor_ink)
    middle = SCENE_WIDTH / 2
    for i in range(-8, 9):
        pen.line((middle + 30 * i, FLOOR_Y, middle + 110 * i, SCENE_HEIGHT), line_ink, 2)
    pen.rectangle((0, FLOOR_Y - 6, SCENE_WIDTH, FLOOR_Y), line_ink)


def draw_tree(pen: ImageDraw.ImageDraw, rng: np.random.Generator, x: int, height: int) -> None:
    """Draw a trunk of this height with a round crown."""
    top = FLOOR_Y - height
    pen.rectangle((x - 4, top, x + 4, FLOOR_Y + 10), sample_tint(rng, 40, 80))
    radius = int(rng.integers(15, 45))
    green = int(rng.integers(40, 100))
    leaf_ink = (green * 7 // 10, green, green // 2)
    pen.ellipse((x - radius, top - radius, x + radius, top + radius), leaf_ink)


def draw_furniture(
    pen: ImageDraw.ImageDraw, rng: np.random.Generator, x: int, height: int, line_ink: Ink
) -> None:
    """Draw a cabinet or a door that stands on the floor, or a poster on the wall."""
    if rng.random() < 0.7:
        top = FLOOR_Y - height
        bottom = FLOOR_Y + 12
    else:
        top = int(rng.integers(20, 100))
        bottom = top + 70
    width = int(rng.integers(35, 90))
    pen.rectangle((x, top, x + width, bottom), sample_tint(rng, 40, 210), line_ink)


@functools.lru_cache(maxsize=32)
def backdrop(seed: int, camera: Camera, clutter: float) -> Image.Image:
    """A camera's scene without people, as the camera sees it: RGB, or grey in infrared.

    It is 520 x 440 pixels. The lower the clutter, the lower its contrast.
    """
    scene = draw_scene(seed, camera.scene_id)
    pixels = np.asarray(scene, dtype=np.float32)
    if camera.infrared is not None:
        black, white = camera.infrared.background
        pixels = black + (white - black) * pixels.mean(2) / 255
    mean_colour = pixels.mean((0, 1))
    pixels = mean_colour + clutter * (pixels - mean_colour)
    return to_image(pixels)


# ---- one image -----------------------------------------------------------------------------------


def draw_image(
    seed: int, pid: int, camera_id: int, index: int, difficulty: Difficulty = EASY
) -> Image.Image:
    """Image number `index` of a person in a camera of CAMERAS.

    It is RGB, and 64 x 128 pixels in RegDB, else 64 to 80 x 144 to 176 (width x height).
    """
    rng = random_stream(seed, Stream.IMAGE, pid, camera_id, index)
    person = sample_person(seed, pid)
    camera = CAMERAS[camera_id]
    canvas = sample_canvas(seed, camera, difficulty, rng)
    inks = inks_of(person, camera, difficulty)
    view = sample_view(camera, difficulty, rng)
    brush = sample_brush(canvas, person, camera, difficulty, rng)
    leg_swing = difficulty.pose * rng.uniform(-1, 1)
    arm_swing = difficulty.pose * rng.uniform(-1, 1)
    figure = Figure(person, inks, view, leg_swing, arm_swing)
    draw_body(brush, figure)
    draw_head(brush, figure)
    if rng.random() < difficulty.occlusion:
        draw_obstacle(canvas, rng)
    return develop(canvas, camera, difficulty, rng)


def sample_canvas(
    seed: int, camera: Camera, difficulty: Difficulty, rng: np.random.Generator
) -> Image.Image:
    """The piece of the camera's backdrop behind a person, at SUPERSAMPLE times the final size."""
    if camera.image_size is None:
        final_size = rng.integers((64, 144), (81, 177))
    else:
        final_size = np.array(camera.image_size)
    size = SUPERSAMPLE * final_size
    scene = backdrop(seed, camera, difficulty.clutter)
    # The piece is at the centre of the scene; with full clutter, it may be anywhere.
    position = 0.5 + difficulty.clutter * rng.uniform(-0.5, 0.5, 2)
    corner = ((np.array(scene.size) - size) * position).astype(int)
    left, top = corner
    right, bottom = corner + size
    return scene.crop((left, top, right, bottom))


def sample_view(camera: Camera, difficulty: Difficulty, rng: np.random.Generator) -> str:
    """From where the camera sees the person: one of VIEWS."""
    if rng.random() < difficulty.view_habit:
        return str(rng.choice(VIEWS, p=camera.views))
    return "front"


def sample_brush(
    canvas: Image.Image,
    person: Person,
    camera: Camera,
    difficulty: Difficulty,
    rng: np.random.Generator,
) -> Brush:
    """A brush for a person: it knows where on the canvas they are, how large and how tilted."""
    offset_x = canvas.height * rng.normal(0, difficulty.framing)
    offset_y = canvas.height * rng.normal(0, difficulty.framing)
    zoom = math.exp(rng.normal(0, difficulty.framing))
    tilt = rng.normal(0, difficulty.framing)
    mirror = rng.random() < 0.5
    camera_scale = 1 + difficulty.camera_strength * (camera.people_scale - 1)
    height = 0.95 * canvas.height * person.height * zoom * camera_scale
    # The tilt turns the body about its middle, and offset 0 puts the feet near the lower edge.
    crown = Point(
        canvas.width / 2 + offset_x + height * math.sin(tilt) / 2,
        0.98 * canvas.height - height + offset_y,
    )
    return Brush(canvas, crown, height, tilt, mirror)


def draw_obstacle(canvas: Image.Image, rng: np.random.Generator) -> None:
    """Draw a post in front of the person, or a counter before the legs."""
    n_channels = len(canvas.getbands())
    grey = rng.uniform(30, 200)
    ink = to_ink(grey + rng.uniform(-20, 20, n_channels))
    post_left = rng.uniform(0, canvas.width)
    post_width = rng.uniform(0.08, 0.25) * canvas.width
    counter_top = rng.uniform(0.6, 0.85) * canvas.height
    if rng.random() < 0.5:
        box = (post_left, 0, post_left + post_width, canvas.height)
    else:
        box = (0, counter_top, canvas.width, canvas.height)
    ImageDraw.Draw(canvas).rectangle(box, ink)


def develop(
    canvas: Image.Image, camera: Camera, difficulty: Difficulty, rng: np.random.Generator
) -> Image.Image:
    """What optics and sensor make of a canvas: an RGB image of the final size.

    The camera's blur, light and cast come first, then the noise of its sensor.
    """
    image = canvas.reduce(SUPERSAMPLE)
    radius = difficulty.camera_strength * camera.blur + difficulty.blur * rng.random()
    if radius > 0.2:  # less would hardly show
        image = image.filter(ImageFilter.GaussianBlur(radius))
    pixels = np.asarray(image, dtype=np.float32)
    pixels = pixels.reshape(image.height, image.width, -1)  # (height, width, channels)
    light = sample_light(image.height, image.width, camera, difficulty, rng)
    cast = 1 + difficulty.camera_strength * (np.array(camera.cast) - 1)
    pixels = pixels * light[..., None] * cast.astype(np.float32)
    noise = difficulty.noise
    if camera.infrared is not None:
        noise *= 1.5  # infrared sensors have more
    pixels += noise * rng.standard_normal(pixels.shape, dtype=np.float32)
    return to_image(pixels.squeeze()).convert("RGB")


def sample_light(
    height: int, width: int, camera: Camera, difficulty: Difficulty, rng: np.random.Generator
) -> np.ndarray:
    """(height, width) gain of each pixel: of vignette, image and camera."""
    strength = difficulty.camera_strength
    vignette_strength = strength
    if camera.infrared is not None:
        vignette_strength = 0.5 + 0.5 * strength  # a lamp never lights evenly
    falloff = camera.vignette * vignette_strength / 2
    y = np.linspace(-1, 1, height, dtype=np.float32)
    x = np.linspace(-1, 1, width, dtype=np.float32)
    light = 1 - falloff * (y[:, None] ** 2 + x**2)
    light *= math.exp(rng.normal(0, difficulty.light))
    light *= 1 + strength * (camera.gain - 1)
    return light


def to_image(pixels: np.ndarray) -> Image.Image:
    """(height, width) or (height, width, 3) grey levels, clipped to 0..255."""
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


# ---- trees ---------------------------------------------------------------------------------------


class ImageKey(NamedTuple):
    """Which image a file holds: the arguments of `draw_image`."""

    pid: int
    camera_id: int
    index: int


@dataclass
class Tree:
    """The content of a dataset's folder, by path within the folder."""

    images: dict[str, ImageKey] = field(default_factory=dict)
    texts: dict[str, str] = field(default_factory=dict)


# ---- SYSU-MM01 -----------------------------------------------------------------------------------


class ImageTotals(NamedTuple):
    """Numbers of images of a camera: all, and the least and the most of one person."""

    total: int
    least: int
    most: int


# Of the real set: the number of persons in each set of cameras. Persons of "none" are in no list.
REAL_CAMERA_SETS = {
    "train": {
        "123456": 180,
        "345": 92,
        "12356": 11,
        "3456": 5,
        "12456": 3,
        "35": 2,
        "34": 2,
        "23456": 1,
    },
    "val": {"345": 96, "34": 3},
    "test": {"123456": 53, "3456": 37, "12456": 2, "456": 1, "346": 1, "12356": 1, "356": 1},
    "none": {"45": 10, "1245": 6, "6": 2, "12": 2, "145": 1, "36": 1},
}
# Of the real set: split -> camera -> numbers of images.
REAL_IMAGE_TOTALS = {
    "train": {
        1: ImageTotals(4721, 2, 50),
        2: ImageTotals(5753, 7, 88),
        3: ImageTotals(5929, 20, 40),
        4: ImageTotals(4821, 8, 30),
        5: ImageTotals(4989, 9, 27),
        6: ImageTotals(4000, 20, 20),
    },
    "val": {
        3: ImageTotals(1980, 20, 20),
        4: ImageTotals(990, 10, 10),
        5: ImageTotals(984, 10, 30),
    },
    "test": {
        1: ImageTotals(1374, 13, 42),
        2: ImageTotals(1565, 18, 40),
        3: ImageTotals(1883, 20, 26),
        4: ImageTotals(1918, 20, 27),
        5: ImageTotals(1918, 20, 24),
        6: ImageTotals(1920, 20, 20),
    },
    "none": {
        1: ImageTotals(194, 16, 29),
        2: ImageTotals(210, 11, 39),
        3: ImageTotals(20, 20, 20),
        4: ImageTotals(301, 10, 24),
        5: ImageTotals(333, 10, 50),
        6: ImageTotals(60, 20, 20),
    },
}


class SysuPlan(NamedTuple):
    """Who is in which split, and how many images of whom there are."""

    splits: dict[str, list[int]]  # split -> person ids
    counts: dict[int, dict[int, int]]  # person id -> camera -> number of images


def real_sysu(seed: int) -> SysuPlan:
    """The real set's sizes: 513 persons, 30,071 RGB images and 15,792 infrared images."""
    rng = random_stream(seed, Stream.SPLIT)
    pids = 1 + rng.permutation(513)
    unused_pids = iter(pids.tolist())
    splits = {}
    counts = {}
    for split, persons_by_cameras in REAL_CAMERA_SETS.items():
        cameras_of = {}
        for cameras, n_persons in persons_by_cameras.items():
            for _ in range(n_persons):
                cameras_of[next(unused_pids)] = cameras
        splits[split] = sorted(cameras_of)
        for camera_id, totals in REAL_IMAGE_TOTALS[split].items():
            pids_here = [pid for pid in cameras_of if str(camera_id) in cameras_of[pid]]
            for pid, count in sample_counts(pids_here, totals, rng).items():
                counts.setdefault(pid, {})[camera_id] = count
    return SysuPlan(splits, counts)


def sample_counts(pids: list[int], totals: ImageTotals, rng: np.random.Generator) -> dict[int, int]:
    """Each person's number of images in one camera, with the given sum and extremes.

    The first person has the least and the second one the most.
    """
    counts = dict.fromkeys(pids, totals.least)
    most_extra = totals.most - totals.least
    n_extra = totals.total - totals.least * len(pids)
    if len(pids) > 1:
        counts[pids[1]] += most_extra
        n_extra -= most_extra
    # A lottery for the other extra images. The number of tickets limits what one person can win.
    tickets = rng.permutation(np.repeat(pids[2:], most_extra))
    for pid in tickets[:n_extra].tolist():
        counts[pid] += 1
    return counts


def small_sysu(ids: int, images: int, seed: int) -> SysuPlan:
    """A set of `ids` persons with about `images` images in each camera they pass.

    Camera sets follow the real test split, whose persons are in cameras 1 and 2 together or in
    neither. The first person of every split is in all six cameras, so that every query and gallery
    selection holds an image.
    """
    rng = random_stream(seed, Stream.SPLIT)
    n_val = max(1, round(ids * 99 / 491))
    n_test = max(2, round(ids * 96 / 491))
    n_train = ids - n_val - n_test
    pids = (1 + rng.permutation(ids)).tolist()
    splits = {
        "train": pids[:n_train],
        "val": pids[n_train : n_train + n_val],
        "test": pids[n_train + n_val :],
    }
    camera_sets = list(REAL_CAMERA_SETS["test"])
    n_persons = np.array(list(REAL_CAMERA_SETS["test"].values()))
    camera_set_shares = n_persons / n_persons.sum()
    counts = {}
    for split, split_pids in splits.items():
        least = 1
        if split == "test" and images >= 9:
            least = 10  # a multi-shot gallery has ten images of each person and camera
        for pid in split_pids:
            if pid == split_pids[0]:
                cameras = "123456"
            else:
                cameras = rng.choice(camera_sets, p=camera_set_shares)
            counts[pid] = {}
            for camera in cameras:
                # As uneven as in the real set.
                sd = 0.2 if camera in "12" else 0.04
                deviation = rng.normal(0, sd)
                counts[pid][int(camera)] = max(least, round(images * (1 + deviation)))
    return SysuPlan(splits, counts)


def sysu_tree(ids: int | None, images: int | None, seed: int) -> Tree:
    """cam<n>/<id>/<image>.jpg and exp/{train,val,test}_id.txt. ids None: the real set's size."""
    plan = real_sysu(seed) if ids is None else small_sysu(ids, images, seed)
    tree = Tree()
    for pid, counts in plan.counts.items():
        for camera_id, count in counts.items():
            for index in range(1, count + 1):
                path = f"cam{camera_id}/{pid:04d}/{index:04d}.jpg"
                tree.images[path] = ImageKey(pid, camera_id, index)
    for split in ("train", "val", "test"):
        tree.texts[f"exp/{split}_id.txt"] = comma_separated(sorted(plan.splits[split]))
    return tree


def comma_separated(pids: list[int]) -> str:
    """One line, as in the lists of person ids of SYSU-MM01 and LLCM."""
    return ",".join(str(pid) for pid in pids) + "\n"


# ---- RegDB ---------------------------------------------------------------------------------------

REGDB_CAMERA_IDS = {"visible": REGDB_VISIBLE, "thermal": REGDB_THERMAL}


def regdb_tree(ids: int | None, images: int, seed: int) -> Tree:
    """{Visible,Thermal}/<id>/*.bmp and ten random halvings in idx/; ids None: 412 persons."""
    n_persons = ids or 412
    tree = Tree()
    for pid in range(1, n_persons + 1):
        for modality, camera_id in REGDB_CAMERA_IDS.items():
            for index in range(1, images + 1):
                tree.images[regdb_path(modality, pid, index)] = ImageKey(pid, camera_id, index)
    for trial, halving in enumerate(regdb_halvings(n_persons, seed), start=1):
        for modality in REGDB_CAMERA_IDS:
            for subset, pids in halving.items():
                name = f"idx/{subset}_{modality}_{trial}.txt"
                tree.texts[name] = regdb_list(modality, pids, images)
    return tree


def regdb_path(modality: str, pid: int, index: int) -> str:
    """For example Visible/7/person_v_0001.bmp."""
    return f"{modality.capitalize()}/{pid}/person_{modality[0]}_{index:04d}.bmp"


def regdb_halvings(n_persons: int, seed: int) -> list[dict[str, list[int]]]:
    """Person ids for training and testing in each of ten trials, no two of them alike."""
    rng = random_stream(seed, Stream.TRIAL)
    halvings = []
    while len(halvings) < 10:
        pids = (1 + rng.permutation(n_persons)).tolist()
        train = sorted(pids[: n_persons // 2])
        test = sorted(pids[n_persons // 2 :])
        halving = {"train": train, "test": test}
        if halving not in halvings:
            halvings.append(halving)
    return halvings


def regdb_list(modality: str, pids: list[int], images: int) -> str:
    """One line an image, with its path and its label."""
    lines = []
    for label, pid in enumerate(pids):
        for index in range(1, images + 1):
            lines.append(f"{regdb_path(modality, pid, index)} {label}\n")
    return "".join(lines)


# ---- LLCM ----------------------------------------------------------------------------------------


def llcm_tree(ids: int | None, images: int, seed: int) -> Tree:
    """{vis,nir}/<id>/*.jpg, test_{vis,nir}/cam<n>/<id>/*.jpg, and the lists of idx/.

    Each person passes three cameras in each modality, with `images` images each. ids None stands
    for 1064 persons.
    """
    n_persons = ids or 1064
    n_train = round(n_persons * 713 / 1064)
    rng = random_stream(seed, Stream.SPLIT)
    pids = (1 + rng.permutation(n_persons)).tolist()
    labels = {pid: label for label, pid in enumerate(sorted(pids[:n_train]))}
    tree = Tree()
    tree.texts["idx/test_id.txt"] = comma_separated(sorted(pids[n_train:]))
    for modality, numbers in LLCM_CAMERA_NUMBERS.items():
        training_lines = []
        for pid in range(1, n_persons + 1):
            for number in sorted(rng.choice(numbers, 3, replace=False).tolist()):
                for index in range(1, images + 1):
                    path = llcm_path(modality, pid, number, index, is_training=pid in labels)
                    tree.images[path] = ImageKey(pid, LLCM_ID_OFFSET[modality] + number, index)
                    if pid in labels:
                        training_lines.append(f"{path} {labels[pid]}\n")
        tree.texts[f"idx/train_{modality}.txt"] = "".join(training_lines)
    return tree


def llcm_path(modality: str, pid: int, number: int, index: int, is_training: bool) -> str:
    """For example vis/0007/0007_c01_0001_vis.jpg, or test_vis/cam1/ and the rest."""
    folder = modality
    if not is_training:
        folder = f"test_{modality}/cam{number}"
    return f"{folder}/{pid:04d}/{pid:04d}_c{number:02d}_{index:04d}_{modality}.jpg"


# ---- writing a tree ------------------------------------------------------------------------------

TREES = {"sysu": sysu_tree, "regdb": regdb_tree, "llcm": llcm_tree}
# Images per person and camera in the real set. SYSU-MM01 has a number for each person and camera
# (see `real_sysu`), LLCM about this many.
REAL_IMAGES = {"sysu": None, "regdb": 10, "llcm": 7}


def make_sysu(
    out: Path,
    ids: int | None = 130,
    images: int = 20,
    seed: int = 0,
    difficulty: str = "easy",
    workers: int = 1,
) -> bool:
    """Write a tree in the layout of SYSU-MM01, see `make_tree`."""
    return make_tree("sysu", out, ids, images, seed, difficulty, workers)


def make_regdb(
    out: Path, ids: int | None = 130, seed: int = 0, difficulty: str = "easy", workers: int = 1
) -> bool:
    """Write a tree in the layout of RegDB, see `make_tree`."""
    return make_tree("regdb", out, ids, REAL_IMAGES["regdb"], seed, difficulty, workers)


def make_llcm(
    out: Path,
    ids: int | None = 130,
    images: int = 20,
    seed: int = 0,
    difficulty: str = "easy",
    workers: int = 1,
) -> bool:
    """Write a tree in the layout of LLCM, see `make_tree`."""
    return make_tree("llcm", out, ids, images, seed, difficulty, workers)


def make_tree(
    dataset: str,
    out: Path,
    ids: int | None,
    images: int,
    seed: int,
    difficulty: str,
    workers: int,
) -> bool:
    """Write a tree as a whole or not at all; False if `out` holds the same one already.

    Args:
        dataset: a key of TREES.
        out: folder that is new, empty or holds the same tree.
        ids: number of persons; None stands for the persons and images of the real set.
        images: images per person and camera; RegDB always has ten.
        seed: another seed gives other people and scenes.
        difficulty: a key of DIFFICULTIES.
        workers: number of processes.

    Raises:
        InputError: a number is out of range, or `out` holds something else.
    """
    if seed < 0:
        raise utils.InputError(f"--seed {seed}: give 0 or more")
    if ids is not None:
        check_range("--ids", ids, 5, 9999)
        check_range("--images", images, 2, 999)
    if ids is None or dataset == "regdb":
        images = REAL_IMAGES[dataset]
    settings = {
        "dataset": dataset,
        "ids": ids,
        "images": images,
        "seed": seed,
        "difficulty": difficulty,
        "full": ids is None,
        "version": VERSION,
        "pillow": PIL.__version__,
    }
    note = json.dumps(settings, indent=1) + "\n"
    out = Path(out).resolve()
    if is_made(out, note):
        return False
    tree = TREES[dataset](ids, images, seed)
    tree.texts["synthetic.json"] = note
    partial = out.with_name(out.name + ".synthetic-partial")
    shutil.rmtree(partial, ignore_errors=True)  # what an interrupted run left
    for path, text in tree.texts.items():
        file = partial / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    save_images(partial, tree.images, seed, difficulty, workers)
    partial.rename(out)
    return True


def check_range(flag: str, value: int, least: int, most: int) -> None:
    """Raise an InputError if a value is too small or too large."""
    if not least <= value <= most:
        raise utils.InputError(f"{flag} {value}: give a number from {least} to {most}")


def is_made(out: Path, note: str) -> bool:
    """Whether a folder holds the tree with this note; an InputError if it holds something else."""
    note_file = out / "synthetic.json"
    if note_file.is_file() and note_file.read_bytes() == note.encode():
        return True
    is_empty_folder = out.is_dir() and not any(out.iterdir())
    if out.exists() and not is_empty_folder:
        raise utils.InputError(
            f"--out {out} holds other content or other settings: give another --out, or delete it"
        )
    return False


def save_images(
    folder: Path, images: dict[str, ImageKey], seed: int, difficulty: str, workers: int
) -> None:
    """Draw images and save them below a folder, with a progress bar."""
    save = functools.partial(save_image, folder, seed, difficulty)
    if workers == 1:
        show_progress(map(save, images.keys(), images.values()), len(images))
        return
    # Ctrl-C goes to all processes, but is for the main one, which then ends the others.
    ignore_ctrl_c = (signal.SIGINT, signal.SIG_IGN)
    pool = ProcessPoolExecutor(workers, initializer=signal.signal, initargs=ignore_ctrl_c)
    try:
        show_progress(pool.map(save, images.keys(), images.values()), len(images))
    finally:
        pool.shutdown(cancel_futures=True)  # after an error, the images left are not drawn


def save_image(folder: Path, seed: int, difficulty: str, path: str, key: ImageKey) -> None:
    """Draw one image and save it."""
    file = folder / path
    file.parent.mkdir(parents=True, exist_ok=True)
    image = draw_image(seed, key.pid, key.camera_id, key.index, DIFFICULTIES[difficulty])
    image.save(file, quality=90)


def show_progress(saved_images: Iterator[None], total: int) -> None:
    """Go through an iterator to its end; on a terminal, a bar shows how far it is."""
    for _ in tqdm(saved_images, total=total, unit="image", disable=None):
        pass


# ---- command -------------------------------------------------------------------------------------


def build_parser() -> argparse.ArgumentParser:
    """All flags with their defaults."""
    parser = utils.new_parser(__doc__)
    parser.add_argument("--dataset", choices=list(TREES), required=True, help="layout to write")
    parser.add_argument(
        "--out", type=Path, required=True, help="folder to make: new, empty or the same tree"
    )
    size = parser.add_mutually_exclusive_group()
    size.add_argument(
        "--ids",
        type=utils.positive_int,
        default=130,
        help="persons in all splits together (%(default)s)",
    )
    size.add_argument("--full", action="store_true", help="the real set's persons and images")
    parser.add_argument(
        "--images",
        type=utils.positive_int,
        default=20,
        help="images per person and camera; RegDB always has 10 (%(default)s)",
    )
    parser.add_argument(
        "--seed",
        type=utils.non_negative_int,
        default=0,
        help="another seed gives other people and scenes (%(default)s)",
    )
    parser.add_argument(
        "--difficulty", choices=list(DIFFICULTIES), default="easy", help="see above (%(default)s)"
    )
    parser.add_argument(
        "--workers",
        type=utils.positive_int,
        default=utils.default_workers(),
        help="processes (%(default)s)",
    )
    return parser


def main() -> None:
    """Make the tree that the command line asks for, or say that it is there already."""
    args = utils.parse(build_parser())
    ids = args.ids
    if args.full:
        ids = None
    is_new = make_tree(
        args.dataset, args.out, ids, args.images, args.seed, args.difficulty, args.workers
    )
    if is_new:
        print(f"{args.out}: written")
    else:
        print(f"{args.out}: already there")


if __name__ == "__main__":
    utils.run(main)
