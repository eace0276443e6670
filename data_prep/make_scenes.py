#!/usr/bin/env python3
"""Write the demo's data: seeded drawn scenes with conversations, in LLaVA-1.5's format.

Question kinds: `name` asks for knowledge about an object that the question describes in full,
`find` and `visit` for knowledge about an object that must first be found in the picture, by what
it looks like or by where it stands; `attribute`, `place`, `existence`, `count`, `relation` and
`text` ask what can be seen. Training conversations also hold captions; captions.json has these
alone. Splits share the knowledge and nothing else: every scene is its own.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data_prep.llava_json import Item, Question, write_splits
from data_prep.scenes import (
    COLOURS,
    PROPERTIES,
    SHAPES,
    TEXTURES,
    Knowledge,
    Scene,
    Thing,
    draw,
    place,
    random_scene,
)
from gemoe_ds.console import Progress
from gemoe_ds.errors import DataError, exit_on_error
from gemoe_ds.parser import Parser

YES_NO = {True: "yes", False: "no"}


def caption(scene: Scene) -> Question:
    """Everything that is there, in reading order."""
    parts = [f"{place(t.row, t.column)} {t.phrase}" for t in scene.things]
    if scene.sign:
        letter, row, column = scene.sign
        parts.append(f"{place(row, column)} sign {letter}")
    return Question("caption", "Describe the picture.", ", ".join(parts))


def name(scene: Scene, knowledge: Knowledge, rng: random.Random) -> Question:
    thing, of = rng.choice(scene.things), rng.choice(PROPERTIES)
    return Question("name", f"{of} of the {thing.phrase}?", knowledge.name(of, thing))


def find(scene: Scene, knowledge: Knowledge, rng: random.Random) -> Question | None:
    picked = _pick_unique(scene, rng)
    if picked is None:
        return None
    thing, reference = picked
    of = rng.choice(PROPERTIES)
    return Question("find", f"{of} of the {reference}?", knowledge.name(of, thing))


def visit(scene: Scene, knowledge: Knowledge, rng: random.Random) -> Question:
    thing, of = rng.choice(scene.things), rng.choice(PROPERTIES)
    where = place(thing.row, thing.column)
    return Question("visit", f"{of} at {where}?", knowledge.name(of, thing))


def attribute(scene: Scene, rng: random.Random) -> Question | None:
    picked = _pick_unique(scene, rng)
    if picked is None:
        return None
    thing, reference = picked
    asked = "shape" if reference.endswith("thing") else rng.choice(("colour", "texture"))
    return Question("attribute", f"{asked} of the {reference}?", getattr(thing, asked))


def placement(scene: Scene, rng: random.Random) -> Question:
    thing = rng.choice(scene.things)
    asked = rng.choice(("shape", "colour", "texture"))
    return Question("place", f"{asked} at {place(thing.row, thing.column)}?", getattr(thing, asked))


def existence(scene: Scene, rng: random.Random) -> Question:
    shape, colour = rng.choice(SHAPES), rng.choice(list(COLOURS))
    if rng.random() < 0.5:
        thing = rng.choice(scene.things)
        shape, colour = thing.shape, thing.colour
    there = any((t.shape, t.colour) == (shape, colour) for t in scene.things)
    return Question("existence", f"is there a {colour} {shape}?", YES_NO[there])


def count(scene: Scene, rng: random.Random) -> Question:
    asked = rng.choice(("things", "colour", "shape", "texture"))
    if asked == "things":
        return Question("count", "how many things?", str(len(scene.things)))
    value = getattr(rng.choice(scene.things), asked)
    if rng.random() < 0.3:
        value = rng.choice({"colour": list(COLOURS), "shape": SHAPES, "texture": TEXTURES}[asked])
    number = sum(getattr(thing, asked) == value for thing in scene.things)
    return Question("count", f"how many {value} things?", str(number))


def relation(scene: Scene, rng: random.Random) -> Question | None:
    if len(scene.things) < 2:
        return None
    a, b = rng.sample(scene.things, 2)
    asked = rng.choice(("colour", "shape", "texture"))
    first, second = place(a.row, a.column), place(b.row, b.column)
    same = getattr(a, asked) == getattr(b, asked)
    return Question("relation", f"same {asked} at {first} and {second}?", YES_NO[same])


def text(scene: Scene) -> Question | None:
    return scene.sign and Question("text", "what does the sign say?", scene.sign[0])


def _pick_unique(scene: Scene, rng: random.Random) -> tuple[Thing, str] | None:
    """An object and words that fit no other: its shape, or its colour."""
    options = []
    for thing in scene.things:
        if sum(t.shape == thing.shape for t in scene.things) == 1:
            options.append((thing, thing.shape))
        if sum(t.colour == thing.colour for t in scene.things) == 1:
            options.append((thing, f"{thing.colour} thing"))
    return rng.choice(options) if options else None


def conversation(
    scene: Scene,
    knowledge: Knowledge,
    rng: random.Random,
    names: int,
    others: int,
    caption_too: bool,
) -> list[Question]:
    """`names` knowledge questions and `others` of the remaining kinds, no question twice."""
    asked: dict[str, Question] = {}

    def fill(target: int, draws: Sequence[Callable[[], Question | None]]) -> None:
        for _ in range(8 * target):  # a scene may not have that many different questions
            question = rng.choice(draws)()
            if question and len(asked) < target:
                asked.setdefault(question.text, question)

    fill(names, [lambda: name(scene, knowledge, rng)])
    others_kinds = [
        lambda: find(scene, knowledge, rng),
        lambda: visit(scene, knowledge, rng),
        lambda: attribute(scene, rng),
        lambda: placement(scene, rng),
        lambda: existence(scene, rng),
        lambda: count(scene, rng),
        lambda: relation(scene, rng),
        lambda: text(scene),
    ]
    fill(names + others, others_kinds)
    questions = list(asked.values())
    if caption_too:
        questions.append(caption(scene))
    rng.shuffle(questions)
    return questions


def items(arguments: argparse.Namespace) -> Iterator[Item]:
    """Scenes without end, of their own random streams: the same whatever the split sizes."""
    knowledge = Knowledge(arguments.seed)
    training = range(arguments.validation, arguments.validation + arguments.train)
    total = training.stop + arguments.test
    for number in Progress(range(total), desc="scenes", unit="scene"):
        stream = "test scene" if number >= training.stop else "scene"
        rng = random.Random(f"{arguments.seed} {stream} {number}")
        scene = random_scene(rng, arguments.max_things)
        questions = conversation(
            scene, knowledge, rng, arguments.names, arguments.others, number in training
        )
        yield f"{number:08d}", draw(scene, rng), questions


def main(argv: list[str] | None = None) -> None:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder to write; must not exist")
    parser.add_argument("--seed", type=int, default=0, help="of scenes, questions and knowledge")
    parser.add_argument("--train", type=int, default=24000, help="scenes")
    parser.add_argument("--validation", type=int, default=1500, help="scenes")
    parser.add_argument("--test", type=int, default=2000, help="scenes")
    parser.add_argument("--names", type=int, default=2, help="knowledge questions a scene")
    parser.add_argument("--others", type=int, default=7, help="other questions a scene")
    parser.add_argument("--max-things", type=int, default=3, help="objects a scene, at most 3")
    arguments = parser.parse_or_exit(argv)
    with exit_on_error():
        if not 1 <= arguments.max_things <= 3:
            raise DataError(
                f"--max-things {arguments.max_things}: must be 1 to 3 (4 cells, a sign)"
            )
        if min(arguments.train, arguments.validation, arguments.test) < 1:
            raise DataError("--train, --validation and --test must each be at least 1")
        sizes = {
            "validation": arguments.validation,
            "train": arguments.train,
            "test": arguments.test,
        }
        write_splits(items(arguments), sizes, arguments.out, alone="caption")


if __name__ == "__main__":
    main()
