"""Draw synthetic people as the cameras of SYSU-MM01, RegDB and LLCM would see them.

`draw_image` is the way in: a `Person` becomes a `Figure` in a view and a pose, and a `Brush` draws
it before the backdrop of a `Camera`.
"""

import dataclasses
import functools
import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

VERSION = 4  # of the drawing: raise it when the same settings give other images
SUPERSAMPLE = 2  # people are drawn on a canvas of this multiple of the final size

# What a stream of random numbers is for, its first number after the seed. The same seed must give
# the same tree for ever, so the order of draws must never change: even draws whose value is unused
# must stay.
PERSON, IMAGE, SCENE, SPLIT, TRIAL = range(1, 6)


# ---- difficulty ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Difficulty:
    """How much modalities, cameras and images differ; by default, as little as "easy" has it.

    Shares and probabilities are 0..1.
    """

    infrared_independence: float = 0.0  # share of a garment's reflectance not due to its colour
    infrared_texture: float = 0.8  # share of a pattern's contrast that survives in infrared
    camera_strength: float = 0.35  # share of a camera's gain, cast, vignette, scale, blur that acts
    view_habit: float = 0.25  # probability that the camera sets the view; else it is frontal
    pose: float = 0.5  # share of the largest spread of legs and arms
    framing: float = 0.012  # sd of offset (in image heights), of log scale and of tilt (in radians)
    light: float = 0.05  # sd of the log gain of an image
    noise: float = 3.0  # sd of the sensor's noise in grey levels
    blur: float = 0.3  # largest blur in pixels, besides that of the camera
    clutter: float = 0.4  # contrast of the background, and how far images wander over it
    occlusion: float = 0.0  # probability that something stands in front of the person


EASY = Difficulty()
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
# A quarter of the way from easy to hard.
MEDIUM = Difficulty(
    **{
        setting: 0.75 * easy_value + 0.25 * getattr(HARD, setting)
        for setting, easy_value in dataclasses.asdict(EASY).items()
    }
)
DIFFICULTIES = {"easy": EASY, "medium": MEDIUM, "hard": HARD}


# ---- cameras -------------------------------------------------------------------------------------

VIEWS = ("front", "back", "side")  # of a person; from the side, the face looks to the right


class InfraredResponse(NamedTuple):
    """Which grey levels (0..255) an infrared camera gives to what it looks at."""

    garments: tuple[float, float, float]  # of reflectance 0, 1/2 and 1
    skin: int
    background: tuple[float, float]  # of black and of white in the scene


@dataclass(frozen=True)
class Camera:
    """A fixed camera."""

    scene_id: int  # number of the scene behind people: odd ones are rooms, even ones streets
    gain: float
    cast: tuple[float, ...]  # gain of each channel; an infrared camera has one channel
    vignette: float  # loss of light in the corners; in infrared, how the lamp's light falls off
    people_scale: float
    blur: float  # radius in pixels
    view_shares: tuple[float, float, float]  # of each of VIEWS
    infrared: InfraredResponse | None = None  # None: visible light
    image_size: tuple[int, int] | None = None  # height and width; None: they vary


# Dark synthetic fabrics glow in near infrared, so a camera may invert tones. All responses are
# functions of reflectance alone, so a network can learn them, but no fixed filter on RGB gives them
# for free.
SATURATING = InfraredResponse(garments=(70, 205, 250), skin=235, background=(90, 190))
INVERTING = InfraredResponse(garments=(215, 150, 70), skin=205, background=(8, 80))
# Skin is hot, a garment is the colder the better it insulates, the street is cold.
THERMAL = InfraredResponse(garments=(190, 120, 75), skin=245, background=(15, 75))

# scene, gain, cast, vignette, scale of people, blur, view shares, infrared, image size
# fmt: off
SYSU_CAMERAS = {  # cameras 2 and 3 share a room
    1: Camera(1, 1.10, (1.08, 1.00, 0.88), 0.15, 1.00, 0.2, (0.6, 0.2, 0.2)),
    2: Camera(3, 0.92, (0.90, 1.00, 1.12), 0.25, 0.93, 0.5, (0.2, 0.5, 0.3)),
    3: Camera(3, 1.00, (1.00,),            0.55, 0.96, 0.5, (0.5, 0.2, 0.3), SATURATING),
    4: Camera(2, 1.20, (1.00, 1.05, 0.92), 0.10, 1.03, 0.3, (0.3, 0.3, 0.4)),
    5: Camera(4, 0.75, (0.92, 0.97, 1.15), 0.30, 0.90, 0.7, (0.2, 0.3, 0.5)),
    6: Camera(6, 0.90, (1.00,),            0.75, 0.97, 0.6, (0.3, 0.2, 0.5), INVERTING),
}
REGDB_CAMERAS = {
    7: Camera(8, 1.00, (1.00, 1.00, 1.00), 0.10, 1.00, 0.2, (0.4, 0.4, 0.2), None, (128, 64)),
    8: Camera(8, 1.00, (1.00,),            0.10, 1.00, 0.8, (0.4, 0.4, 0.2), THERMAL, (128, 64)),
}
# fmt: on


def llcm_cameras() -> dict[int, Camera]:
    """Return nine cameras in dim light, 11 to 19, and nine infrared ones, 21 to 29, by id."""
    cameras = {}
    for number in range(1, 10):
        scene_id = 20 + number
        blur = 0.1 * number
        cameras[10 + number] = dataclasses.replace(
            SYSU_CAMERAS[1], scene_id=scene_id, gain=0.5 + 0.06 * number, blur=blur
        )
        infrared_model = SYSU_CAMERAS[6] if number % 2 == 1 else SYSU_CAMERAS[3]
        cameras[20 + number] = dataclasses.replace(infrared_model, scene_id=scene_id, blur=blur)
    return cameras


# A camera's id is unique among all datasets.
CAMERAS = SYSU_CAMERAS | REGDB_CAMERAS | llcm_cameras()


# ---- patterns of garments ------------------------------------------------------------------------

PATTERNS = ("plain", "hoops", "stripes", "checks", "logo", "two-tone")
# A rectangle of a garment that is 0..1 wide and 0..1 high: left, top, right, bottom.
Box = tuple[float, float, float, float]


def boxes_of(pattern: str, repeats: int) -> list[Box]:
    """Return the boxes of a garment that have the accent colour."""
    if pattern == "hoops":  # bands across the garment
        return [(0, (row + 0.3) / repeats, 1, (row + 0.8) / repeats) for row in range(repeats)]
    if pattern == "stripes":  # bands from top to bottom
        return [((col + 0.25) / repeats, 0, (col + 0.75) / repeats, 1) for col in range(repeats)]
    if pattern == "logo":  # one box on the chest; more repeats make it higher
        return [(0.25, 0.18, 0.75, 0.3 + 0.06 * repeats)]
    if pattern == "two-tone":  # the lower end of the garment; more repeats make it smaller
        return [(0, 0.2 + 0.08 * repeats, 1, 1)]
    boxes = []
    if pattern == "checks":  # every other field of a chessboard
        for col in range(repeats):
            for row in range((col + 1) % 2, repeats, 2):
                right = (col + 1) / repeats
                bottom = (row + 1) / repeats
                boxes.append((col / repeats, row / repeats, right, bottom))
    return boxes


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
    pattern: str  # one of PATTERNS, of the upper garment
    pattern_repeats: int
    reflectances: dict[str, float]  # part -> its reflectance in infrared, 0..1


def sample_person(seed: int, pid: int) -> Person:
    """Return the person with this id, the same for each call."""
    rng = np.random.default_rng([seed, PERSON, pid])
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
        pattern=rng.choice(PATTERNS),
        pattern_repeats=int(rng.integers(3, 7)),
        reflectances={part: rng.random() for part in PARTS},
    )


def sample_colours(rng: np.random.Generator) -> dict[str, Colour]:
    """Return the colour of each part of a person, in the order of PARTS."""
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
    """Return a colour of this brightness (0..1) and any hue; a third of them are nearly grey."""
    is_nearly_grey = rng.random() < 0.33
    saturation = rng.uniform(0.0, 0.15) if is_nearly_grey else rng.uniform(0.45, 0.95)
    hue = rng.random()
    channels = np.cos(2 * math.pi * (hue - np.arange(3) / 3)) * 0.5 + 0.5
    channels = 1 - saturation * (1 - channels / channels.max())
    return tuple((20 + 235 * brightness) * channels)


def inks_of(person: Person, camera: Camera, difficulty: Difficulty) -> Inks:
    """Return how a camera sees each part of a person, before light and noise."""
    if camera.infrared is None:
        return {part: to_ink(colour) for part, colour in person.colours.items()}

    # Some of a reflectance follows the part's colour, and the rest does not.
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
        inks[part] = to_ink([np.interp(reflectance, (0, 0.5, 1), camera.infrared.garments)])
    inks["skin"] = (camera.infrared.skin,)
    return inks


def to_ink(levels: Colour | list[float] | np.ndarray) -> Ink:
    """Round down the levels of one or three channels."""
    return tuple(int(level) for level in levels)


def shade(ink: Ink, factor: float) -> Ink:
    """Return the ink, darker by a factor below 1."""
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
        """Return the pixel of a point in body units."""
        x = point.x
        if self.mirror:
            x = -x
        return Point(
            self.crown.x + x * self.scaled_cos - point.y * self.scaled_sin,
            self.crown.y + x * self.scaled_sin + point.y * self.scaled_cos,
        )

    def polygon(self, points: list[Point], ink: Ink) -> None:
        self.pen.polygon([self.to_canvas(point) for point in points], ink)

    def rectangle(self, left: float, top: float, right: float, bottom: float, ink: Ink) -> None:
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

    def garment(
        self,
        top: float,
        bottom: float,
        half_widths: tuple[float, float],
        ink: Ink,
        boxes: list[Box] | tuple[Box, ...] = ((0, 0, 1, 1),),
    ) -> None:
        """Draw a garment, or some boxes of it. It is symmetric about the body's axis.

        `half_widths` are half of its widths at the top and at the bottom.
        """
        half_top, half_bottom = half_widths
        for left, high, right, low in boxes:
            corners = []
            for u, v in ((left, high), (right, high), (right, low), (left, low)):
                half_width = half_top + v * (half_bottom - half_top)
                corners.append(Point((2 * u - 1) * half_width, top + v * (bottom - top)))
            self.polygon(corners, ink)


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
    view: str  # one of VIEWS
    leg_swing: float  # -1..1
    arm_swing: float  # -1..1

    @property
    def half_chest(self) -> float:
        """Half of the trunk's width at the top."""
        if self.view == "side":
            return 0.075
        return 0.125 * self.person.shoulders

    @property
    def half_waist(self) -> float:
        """Half of the trunk's width at the bottom."""
        if self.view == "side":
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
        if self.view == "side":
            return 0.13
        return 0.03


def draw_body(brush: Brush, figure: Figure) -> None:
    """Draw all but the head, from far to near."""
    if figure.view == "side":
        draw_arm(brush, figure, LEFT)  # behind the trunk
        if figure.person.bag == "backpack":
            back = -figure.half_chest
            bottom = figure.hip_y - 0.08
            brush.rectangle(back - 0.075, NECK_Y + 0.02, back + 0.03, bottom, figure.inks["bag"])
    draw_leg(brush, figure, LEFT)
    draw_leg(brush, figure, RIGHT)
    draw_lower_garments(brush, figure)
    draw_trunk(brush, figure)
    if figure.view != "side":
        draw_arm(brush, figure, LEFT)
    draw_arm(brush, figure, RIGHT)
    draw_bag(brush, figure)


def arm_joints(figure: Figure, direction: int) -> tuple[Point, Point, Point]:
    """Return the shoulder, elbow and hand of the LEFT or RIGHT arm."""
    swing = direction * figure.arm_swing * figure.largest_swing
    if figure.view == "side":
        # Both arms hang from the middle of the trunk.
        shoulder_x = 0.0
        elbow_x = 0.4 * swing
        hand_x = swing + 0.02
    else:
        shoulder_x = direction * (figure.half_chest - 0.012)
        elbow_x = shoulder_x + 0.4 * swing + direction * 0.028
        hand_x = shoulder_x + swing + direction * 0.03
    return (
        Point(shoulder_x, NECK_Y + 0.025),
        Point(elbow_x, NECK_Y + 0.175),
        Point(hand_x, NECK_Y + 0.33),
    )


def draw_arm(brush: Brush, figure: Figure, direction: int) -> None:
    """Draw the LEFT or RIGHT arm, and the sleeve over it."""
    shoulder, elbow, hand = arm_joints(figure, direction)
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
    if figure.view == "side":
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
    """Draw a skirt, then a coat from the hip down, or else the hips."""
    hip = figure.hip_y
    waist = figure.half_waist
    if figure.person.lower == "skirt":
        brush.garment(hip - 0.04, hip + 0.24, (waist, waist + 0.045), figure.inks["lower"])
    if figure.person.has_coat:
        cloth = shade(figure.inks["upper"], 0.92)
        brush.garment(hip - 0.03, hip + 0.2, (waist, waist + 0.025), cloth)
    else:
        brush.garment(hip - 0.05, hip + 0.02, (waist, waist), figure.inks["lower"])


def draw_trunk(brush: Brush, figure: Figure) -> None:
    """Draw neck, shoulders and the upper garment with its pattern."""
    neck_x = 0.01 if figure.view == "side" else 0.0
    brush.limb(Point(neck_x, 0.1), Point(neck_x, NECK_Y), 0.05, 0.055, figure.inks["skin"])
    upper = figure.inks["upper"]
    brush.ellipse(Point(0.0, NECK_Y + 0.012), figure.half_chest * 0.9, 0.025, upper)

    top = NECK_Y + 0.01
    bottom = figure.hip_y - 0.02
    half_widths = (figure.half_chest, figure.half_waist)
    brush.garment(top, bottom, half_widths, upper)
    pattern = figure.person.pattern
    if pattern != "logo" or figure.view == "front":
        boxes = boxes_of(pattern, figure.person.pattern_repeats)
        brush.garment(top, bottom, half_widths, figure.inks["accent"], boxes)


def draw_bag(brush: Brush, figure: Figure) -> None:
    """Draw the bag, where it hides the trunk."""
    bag = figure.person.bag
    ink = figure.inks["bag"]
    chest = figure.half_chest
    waist = figure.half_waist
    hip = figure.hip_y
    if bag == "backpack" and figure.view == "back":
        # The backpack and its pocket.
        brush.rectangle(-chest * 0.75, NECK_Y + 0.02, chest * 0.75, hip - 0.09, ink)
        brush.rectangle(-chest * 0.5, hip - 0.22, chest * 0.5, hip - 0.12, shade(ink, 0.75))
    elif bag == "backpack" and figure.view == "front":
        # Its straps are all that one sees.
        for side in (-chest, chest):
            brush.limb(Point(side * 0.6, NECK_Y), Point(side * 0.62, hip - 0.16), 0.028, 0.028, ink)
    elif bag == "shoulder":
        # A strap across the trunk, and the bag at the hip.
        strap_top = Point(-chest * 0.7, NECK_Y + 0.005)
        brush.limb(strap_top, Point(waist, hip - 0.03), 0.02, 0.02, ink)
        brush.rectangle(waist - 0.055, hip - 0.06, waist + 0.065, hip + 0.075, ink)
    elif bag == "hand":
        # It hangs from one hand.
        _, _, hand = arm_joints(figure, RIGHT)
        brush.rectangle(hand.x - 0.055, hand.y + 0.02, hand.x + 0.055, hand.y + 0.15, ink)


def draw_head(brush: Brush, figure: Figure) -> None:
    """Draw the head with hair, hat and eyes, from far to near."""
    x = 0.012 if figure.view == "side" else 0.0
    skin = figure.inks["skin"]
    draw_hair_behind_face(brush, figure, x)
    brush.ellipse(Point(x, 0.075), 0.05, 0.066, skin)
    if figure.person.hair != "bald":
        draw_hair_on_head(brush, figure, x)
    if figure.person.hair == "hat":
        draw_hat(brush, figure, x)
    eye_offsets = {"front": (-0.02, 0.02), "side": (0.035,), "back": ()}
    for offset in eye_offsets[figure.view]:
        brush.ellipse(Point(x + offset, 0.078), 0.007, 0.006, shade(skin, 0.3))


def draw_hair_behind_face(brush: Brush, figure: Figure, x: float) -> None:
    """Draw what the face at `x` hides in part of long hair or of a ponytail."""
    ink = figure.inks["hair"]
    if figure.person.hair == "long" and figure.view == "front":
        brush.rectangle(x - 0.062, 0.06, x + 0.062, 0.215, ink)
    elif figure.person.hair == "long" and figure.view == "side":
        brush.rectangle(x - 0.062, 0.06, x + 0.01, 0.215, ink)
    elif figure.person.hair == "ponytail" and figure.view == "side":
        brush.limb(Point(x - 0.04, 0.04), Point(x - 0.1, 0.14), 0.03, 0.03, ink)


def draw_hair_on_head(brush: Brush, figure: Figure, x: float) -> None:
    """Draw the hair on the head at `x`, and from behind all of it."""
    ink = figure.inks["hair"]
    segments = {"front": (0.5, 0.5), "side": (0.3, 0.5), "back": (0.0, 1.0)}  # start and turns
    start, turns = segments[figure.view]
    brush.ellipse(Point(x, 0.063), 0.056, 0.063, ink, start, turns)
    if figure.person.hair == "ponytail" and figure.view == "front":
        brush.ellipse(Point(x, 0.0), 0.026, 0.022, ink)
    elif figure.person.hair == "ponytail" and figure.view == "back":
        brush.limb(Point(x, 0.06), Point(x, 0.19), 0.04, 0.03, ink)
    elif figure.person.hair == "long" and figure.view == "back":
        brush.rectangle(x - 0.06, 0.06, x + 0.06, 0.225, ink)


def draw_hat(brush: Brush, figure: Figure, x: float) -> None:
    """Draw a hat with a brim on the head at `x`."""
    ink = figure.inks["hat"]
    brush.ellipse(Point(x, 0.05), 0.062, 0.062, ink, start=0.5, turns=0.5)
    brim_left = x - 0.065
    brim_right = x + 0.065
    if figure.view == "side":
        # The brim points forward.
        brim_left += 0.02
        brim_right += 0.035
    brush.rectangle(brim_left, 0.042, brim_right, 0.058, shade(ink, 0.7))


# ---- drawing scenes ------------------------------------------------------------------------------

SCENE_HEIGHT = 440
SCENE_WIDTH = 520
FLOOR_Y = 250


@functools.lru_cache(maxsize=32)
def backdrop(seed: int, camera: Camera, clutter: float) -> Image.Image:
    """Return a camera's scene without people, as the camera sees it: RGB, or grey in infrared.

    It is SCENE_HEIGHT x SCENE_WIDTH pixels. The lower the clutter, the lower its contrast.
    """
    scene = draw_scene(seed, camera.scene_id)
    pixels = np.asarray(scene, dtype=np.float32)
    if camera.infrared is not None:
        black, white = camera.infrared.background
        pixels = black + (white - black) * pixels.mean(2) / 255
    mean_colour = pixels.mean((0, 1))
    pixels = mean_colour + clutter * (pixels - mean_colour)
    return to_image(pixels)


def draw_scene(seed: int, scene_id: int) -> Image.Image:
    """Draw a room (odd ids) or a street (even ids) in RGB."""
    rng = np.random.default_rng([seed, SCENE, scene_id])
    is_street = scene_id % 2 == 0
    wall_or_sky_ink = sample_tint(rng, 130, 200)
    canvas = Image.new("RGB", (SCENE_WIDTH, SCENE_HEIGHT), wall_or_sky_ink)
    pen = ImageDraw.Draw(canvas)
    if is_street:
        draw_houses(pen, rng)
    floor_ink = sample_tint(rng, 70, 150)
    line_ink = sample_tint(rng, 50, 100)
    pen.rectangle((0, FLOOR_Y, SCENE_WIDTH, SCENE_HEIGHT), floor_ink)
    # Floorboards or paving run to a vanishing point. Above them is a skirting board.
    middle = SCENE_WIDTH / 2
    for i in range(-8, 9):
        pen.line((middle + 30 * i, FLOOR_Y, middle + 110 * i, SCENE_HEIGHT), line_ink, 2)
    pen.rectangle((0, FLOOR_Y - 6, SCENE_WIDTH, FLOOR_Y), line_ink)
    for _ in range(7):
        x = int(rng.integers(0, SCENE_WIDTH))
        height = int(rng.integers(60, 200))
        if is_street:
            draw_tree(pen, rng, x, height)
        else:
            draw_furniture(pen, rng, x, height, line_ink)
    return canvas.filter(ImageFilter.GaussianBlur(1.5))


def sample_tint(rng: np.random.Generator, darkest: float, brightest: float) -> Ink:
    """Return a colour that is nearly grey."""
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


# ---- one image -----------------------------------------------------------------------------------


def draw_image(
    seed: int, pid: int, camera_id: int, index: int, difficulty: Difficulty
) -> Image.Image:
    """Draw image number `index` of a person in a camera of CAMERAS.

    It is RGB, and 128 x 64 pixels in RegDB, else 144 to 176 x 64 to 80 (height x width).
    """
    rng = np.random.default_rng([seed, IMAGE, pid, camera_id, index])
    person = sample_person(seed, pid)
    camera = CAMERAS[camera_id]
    inks = inks_of(person, camera, difficulty)
    canvas = cut_backdrop(seed, camera, difficulty, rng)
    view = "front"
    if rng.random() < difficulty.view_habit:
        view = rng.choice(VIEWS, p=camera.view_shares)
    brush = place_person(canvas, person, camera, difficulty, rng)
    leg_swing = difficulty.pose * rng.uniform(-1, 1)
    arm_swing = difficulty.pose * rng.uniform(-1, 1)
    figure = Figure(person, inks, view, leg_swing, arm_swing)
    draw_body(brush, figure)
    draw_head(brush, figure)
    if rng.random() < difficulty.occlusion:
        draw_obstacle(canvas, rng)
    return develop(canvas, camera, difficulty, rng)


def cut_backdrop(
    seed: int, camera: Camera, difficulty: Difficulty, rng: np.random.Generator
) -> Image.Image:
    """Cut out what is behind a person, at SUPERSAMPLE times the final size."""
    if camera.image_size is None:
        width, height = rng.integers((64, 144), (81, 177))
    else:
        height, width = camera.image_size
    size = SUPERSAMPLE * np.array([width, height])
    scene = backdrop(seed, camera, difficulty.clutter)
    # At the centre of the scene; with full clutter, anywhere.
    position = 0.5 + difficulty.clutter * rng.uniform(-0.5, 0.5, 2)
    corner = ((np.array(scene.size) - size) * position).astype(int)
    left, top = corner
    right, bottom = corner + size
    return scene.crop((left, top, right, bottom))


def place_person(
    canvas: Image.Image,
    person: Person,
    camera: Camera,
    difficulty: Difficulty,
    rng: np.random.Generator,
) -> Brush:
    """Return a brush that knows where on the canvas a person is, how large and how tilted."""
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
    pen = ImageDraw.Draw(canvas)
    if rng.random() < 0.5:
        pen.rectangle((post_left, 0, post_left + post_width, canvas.height), ink)
    else:
        pen.rectangle((0, counter_top, canvas.width, canvas.height), ink)


def develop(
    canvas: Image.Image, camera: Camera, difficulty: Difficulty, rng: np.random.Generator
) -> Image.Image:
    """Return what optics and sensor make of a canvas: an RGB image of the final size.

    The camera's blur, light and cast come first, then the noise of its sensor.
    """
    image = canvas.reduce(SUPERSAMPLE)
    radius = difficulty.camera_strength * camera.blur + difficulty.blur * rng.random()
    if radius > 0.2:  # less would hardly show
        image = image.filter(ImageFilter.GaussianBlur(radius))
    pixels = np.asarray(image, dtype=np.float32)
    pixels = pixels.reshape(image.height, image.width, -1)  # (height, width, channels)
    light = light_of_image(image.height, image.width, camera, difficulty, rng)
    cast = 1 + difficulty.camera_strength * (np.array(camera.cast) - 1)
    pixels = pixels * light[..., None] * cast.astype(np.float32)
    noise = difficulty.noise
    if camera.infrared is not None:
        noise *= 1.5  # infrared sensors have more
    pixels += noise * rng.standard_normal(pixels.shape, dtype=np.float32)
    return to_image(pixels.squeeze()).convert("RGB")


def light_of_image(
    height: int, width: int, camera: Camera, difficulty: Difficulty, rng: np.random.Generator
) -> np.ndarray:
    """Return the (height, width) gain of each pixel: of vignette, image and camera."""
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
    """Clip (height, width) or (height, width, 3) grey levels to 0..255, as an image."""
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
