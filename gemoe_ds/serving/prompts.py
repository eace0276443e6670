"""The twenty questions that are asked by default, and files of other ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, UnidentifiedImageError

from gemoe_ds.errors import DataError
from gemoe_ds.serving.exchange import Prompt

TEXTS = (
    "What is the capital of France?",
    "Name three animals that live in the sea.",
    "Write one sentence about the weather in spring.",
    "How many days are there in a leap year, and why?",
    "Translate into German: the house is old.",
    "What is 17 times 6? Show the steps.",
    "Why is the sky blue?",
    "List the planets of the solar system from the sun outwards.",
)
ABOUT_PICTURES = (
    "What is in this picture?",
    "Which colours do you see?",
    "How many shapes are there?",
    "Is there a circle?",
    "What is on the left, and what is on the right?",
    "Describe the picture in one sentence.",
)
INSTEAD = (
    "Explain what a neural network is to a child.",
    "What comes next: 2, 4, 8, 16?",
    "Give a synonym of happy and one of sad.",
    "def fibonacci(n):",
    "Once upon a time there was a king who",
    "The opposite of cold is",
    "Who wrote Hamlet, and about when?",
    "Sort these words by length: apple, fig, banana, plum.",
    "What is the boiling point of water at sea level?",
    "Finish the sentence: better late than",
    "Summarise the water cycle in two sentences.",
    "What does this do: print(sum(range(10)))?",
)
SIZES = ((64, 64), (224, 160), (96, 320), (448, 448))  # pixels: square, wide, tall, large


def built_in(sees: bool, folder: Path) -> tuple[Prompt, ...]:
    """Twenty; of a model that sees twelve with a picture, which is drawn into `folder`."""
    if not sees:
        return tuple(map(Prompt, (*TEXTS, *INSTEAD)))
    paths = [draw(folder / f"picture_{n}.png", n) for n in range(len(SIZES))]
    about = [
        Prompt(text, (str(paths[(n + shift) % len(paths)]),))
        for shift in range(2)
        for n, text in enumerate(ABOUT_PICTURES)
    ]
    return (*map(Prompt, TEXTS), *about)


def draw(path: Path, number: int) -> Path:
    """A picture of plain shapes, the same for the same number."""
    width, height = SIZES[number]
    picture = Image.new("RGB", (width, height), (40 * number, 90, 200 - 30 * number))
    pen = ImageDraw.Draw(picture)
    for shape in range(number + 2):
        left, top = width * shape // (number + 3), height * (shape % 3) // 4
        box = (left, top, left + width // 4, top + height // 4)
        colour = ((70 * shape) % 256, (255 - 50 * shape) % 256, (90 + 60 * number) % 256)
        (pen.ellipse if shape % 2 else pen.rectangle)(box, fill=colour)
    picture.save(path)
    return path


def read_prompts(path: Path, sees: bool) -> tuple[Prompt, ...]:
    """JSON lines, `{"text": "...", "images": ["a.png"]}`, paths from the file's own folder.

    Raises DataError, which names the line, for anything else.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"--prompts {path}: {error}; give a file of JSON lines") from error
    found = tuple(
        _prompt(line, f"--prompts {path}, line {number}", path.parent, sees)
        for number, line in enumerate(lines, 1)
        if line.strip()
    )
    if not found:
        raise DataError(f'--prompts {path} has no line; one is {{"text": "Why?"}}')
    return found


def _prompt(line: str, where: str, folder: Path, sees: bool) -> Prompt:
    try:
        row: Any = json.loads(line)
    except ValueError:
        row = None
    form = '{"text": "...", "images": ["file", ...]}'
    if not isinstance(row, dict) or not row.keys() <= {"text", "images"}:
        raise DataError(f"{where}: is not {form}; images may be left out")
    text, images = row.get("text"), row.get("images", [])
    if not isinstance(text, str) or not text.strip():
        raise DataError(f"{where}: text={text!r} is no text; a line is {form}")
    if not isinstance(images, list) or not all(isinstance(one, str) for one in images):
        raise DataError(f"{where}: images={images!r} is no list of files; a line is {form}")
    if images and not sees:
        raise DataError(f"{where}: has images, and this folder has no image processor")
    paths = tuple(str((folder / one).absolute()) for one in images)
    for one in paths:
        _check_picture(Path(one), where)
    return Prompt(text, paths)


def _check_picture(path: Path, where: str) -> None:
    try:
        with Image.open(path) as picture:
            picture.verify()
    except (OSError, SyntaxError, UnidentifiedImageError) as error:
        raise DataError(f"{where}: {path}: no picture that Pillow reads ({error})") from error
