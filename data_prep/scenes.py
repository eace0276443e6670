"""A small world of drawn objects: what stands in a scene, how it looks, what is known about it.

A scene is a grid of cells, some with an object (shape, colour, texture), sometimes one with a sign
that shows a letter. Each kind of object also has arbitrary names that no picture shows: knowledge,
the same in every split, which a model can only memorise.
"""

from __future__ import annotations

import itertools
import random
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

SHAPES = ("square", "dot", "bar", "post", "cross", "frame")
COLOURS = {
    "red": (224, 48, 48),
    "green": (48, 176, 72),
    "blue": (56, 88, 232),
    "yellow": (236, 208, 48),
    "purple": (160, 64, 208),
    "white": (236, 236, 236),
}
TEXTURES = ("plain", "striped", "checked")
LETTERS = "LTIOXH"
SIGN_CHANCE = 0.35  # that a scene has a sign
ROWS, COLUMNS = ("top", "bottom"), ("left", "right")
PROPERTIES = tuple("name home owner song food tool city game year team pet ship".split())
SYLLABLES = tuple(c + v for c, v in itertools.product("BDFKLMPT", "aeio"))
NAME_LENGTH = 3
CELL = 16  # pixels; one object fills a cell
BACKGROUND = (32, 32, 32)


@dataclass(frozen=True)
class Thing:
    """An object of a scene and the cell that it stands in."""

    shape: str
    colour: str
    texture: str
    row: int
    column: int

    @property
    def phrase(self) -> str:
        return f"{self.colour} {self.texture} {self.shape}"


@dataclass(frozen=True)
class Scene:
    """Objects in reading order; `sign` is a letter and its (row, column), or None."""

    things: tuple[Thing, ...]
    sign: tuple[str, int, int] | None


class Knowledge:
    """The arbitrary facts: (property, shape, colour, texture) -> a name of three syllables."""

    def __init__(self, seed: int) -> None:
        rng = random.Random(f"knowledge {seed}")
        keys = itertools.product(PROPERTIES, SHAPES, COLOURS, TEXTURES)
        self._names = {key: " ".join(rng.choices(SYLLABLES, k=NAME_LENGTH)) for key in keys}

    def __len__(self) -> int:
        return len(self._names)

    def name(self, of: str, thing: Thing) -> str:
        return self._names[of, thing.shape, thing.colour, thing.texture]


def place(row: int, column: int) -> str:
    return f"{ROWS[row]} {COLUMNS[column]}"


def random_scene(rng: random.Random, max_things: int = 3) -> Scene:
    """One to `max_things` objects in distinct cells, and perhaps a sign in another."""
    cells = list(itertools.product(range(len(ROWS)), range(len(COLUMNS))))
    rng.shuffle(cells)
    sign = (rng.choice(LETTERS), *cells.pop()) if rng.random() < SIGN_CHANCE else None
    chosen = sorted(cells[: rng.randint(1, max_things)])
    things = tuple(
        Thing(rng.choice(SHAPES), rng.choice(list(COLOURS)), rng.choice(TEXTURES), row, column)
        for row, column in chosen
    )
    return Scene(things, sign)


def draw(scene: Scene, rng: random.Random) -> Image.Image:
    """The picture of a scene, 2 x 2 cells; objects are shifted by up to a pixel."""
    image = Image.new("RGB", (CELL * len(COLUMNS), CELL * len(ROWS)), BACKGROUND)
    for thing in scene.things:
        tile, mask = _tile(thing)
        corner = (thing.column * CELL + rng.randint(0, 1), thing.row * CELL + rng.randint(0, 1))
        image.paste(tile, corner, mask)
    if scene.sign:
        letter, row, column = scene.sign
        centre = (column * CELL + CELL // 2, row * CELL + CELL // 2)
        font = ImageFont.load_default(size=17)
        ImageDraw.Draw(image).text(centre, letter, "white", font, anchor="mm", stroke_width=1)
    return image


def _tile(thing: Thing) -> tuple[Image.Image, Image.Image]:
    """The object in its colour and texture, and the mask of its shape, 15 x 15 pixels."""
    size, last = CELL - 1, CELL - 3
    boxes = {  # shapes differ in where they are bright, so that a patch tells them apart at once
        "square": [(1, 1, last, last)],
        "bar": [(0, 5, last + 1, 9)],
        "post": [(5, 0, 9, last + 1)],
        "cross": [(0, 5, last + 1, 9), (5, 0, 9, last + 1)],
        "frame": [(0, 0, last + 1, 3), (0, last - 2, last + 1, last + 1)]
        + [(0, 0, 3, last + 1), (last - 2, 0, last + 1, last + 1)],
    }
    mask = Image.new("L", (size, size))
    pen = ImageDraw.Draw(mask)
    if thing.shape == "dot":
        pen.ellipse((3, 3, last - 2, last - 2), fill=255)
    for box in boxes.get(thing.shape, []):
        pen.rectangle(box, fill=255)
    tile = Image.new("RGB", (size, size), COLOURS[thing.colour])
    dark = ImageDraw.Draw(tile)
    for y in range(1, size, 4):
        if thing.texture == "striped":
            dark.rectangle((0, y, size, y + 1), fill=(0, 0, 0))
        elif thing.texture == "checked":
            for x in range(y % 8 // 4 * 4 - 3, size, 8):
                dark.rectangle((x, y - 1, x + 3, y + 2), fill=(0, 0, 0))
    return tile, mask
