"""The benchmarks in miniature: the layout and the columns of their hub repositories, made-up rows.

A folder that `write_miniature` has filled is what a user has after `hf download --local-dir`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml
from datasets import ClassLabel, Dataset, Features, Image, List, Value
from PIL import Image as Pictures
from PIL import ImageDraw

VISION = "lmms-lab-encoder"
SUBJECTS = ("anatomy", "astronomy", "virology")  # of MMLU's 57
SUBSETS = ("boolean_expressions", "navigate")  # of BIG-Bench Hard's 27
TEXT, INTEGER, PICTURE = Value("string"), Value("int64"), Image()
Row = dict[str, Any]


def write_miniature(
    root: Path,
    rows: int = 7,
    *,
    subjects: Sequence[str] = SUBJECTS,
    subsets: Sequence[str] = SUBSETS,
    only: Sequence[str] = (),
) -> Path:
    """All 18 benchmarks and HellaSwag; `only`: repositories with one of these words in their name.

    `rows`: documents of a split that is asked. POPE has 9, MME and MMBench 8, HumanEval 3.
    """
    hub = _Hub(root, only)
    _language(hub, rows, subjects, subsets)
    _vision(hub, rows)
    _more_vision(hub, rows)
    hub.write_cards()
    return root


class _Hub:
    def __init__(self, root: Path, only: Sequence[str]) -> None:
        self._root, self._only = root, only
        self._configs: dict[str, dict[str, list[dict[str, str]]]] = {}

    def add(
        self,
        repository: str,
        config: str,
        split: str,
        rows: int,
        row: Callable[[int], Row],
        types: Row | None = None,
    ) -> None:
        """`types`: of columns that are not text; all of them are given by the rows."""
        if self._only and not any(word in repository for word in self._only):
            return
        made = [row(place) for place in range(rows)]
        features = Features({name: TEXT for name in made[0]} | (types or {}))
        folder = self._root / repository / config
        folder.mkdir(parents=True, exist_ok=True)
        columns = {name: [one[name] for one in made] for name in made[0]}
        table = Dataset.from_dict(columns, features=features)
        table.to_parquet(folder / f"{split}-00000-of-00001.parquet")
        files = self._configs.setdefault(repository, {}).setdefault(config, [])
        files.append({"split": split, "path": f"{config}/{split}-*"})

    def write_cards(self) -> None:
        """README.md says which files are which split of which configuration."""
        for repository, configs in self._configs.items():
            told = [{"config_name": name, "data_files": files} for name, files in configs.items()]
            card = yaml.safe_dump({"configs": told})
            (self._root / repository / "README.md").write_text(f"---\n{card}---\n")


def picture(number: int) -> Pictures.Image:
    made = Pictures.new("RGB", (40 + 8 * (number % 3), 48), (number * 37 % 255, 90, 200))
    ImageDraw.Draw(made).rectangle((4, 4, 20, 20), fill=(255, number * 11 % 255, 0))
    return made


def _question(number: int) -> str:
    return f"What is number {number} made of?"


def _language(hub: _Hub, rows: int, subjects: Sequence[str], subsets: Sequence[str]) -> None:
    for subject in subjects:
        for split, number in (("test", rows), ("validation", 2), ("dev", 5)):

            def of_mmlu(i: int, subject: str = subject, split: str = split) -> Row:
                return {
                    "question": f" {_question(i)} ({split} of {subject})",
                    "subject": subject,
                    "choices": [f"choice {i}{letter}" for letter in "abcd"],
                    "answer": i % 4,
                }

            types: Row = {"choices": List(TEXT), "answer": ClassLabel(names=list("ABCD"))}
            hub.add("cais/mmlu", subject, split, number, of_mmlu, types)
    for split, number in (("train", 8), ("test", rows)):
        hub.add("openai/gsm8k", "main", split, number, _of_gsm8k)
    for subset in subsets:
        hub.add("SaylorTwift/bbh", subset, "test", rows, _of_bbh)
    hub.add("openai/openai_humaneval", "openai_humaneval", "test", 3, _of_humaneval)
    for split, number in (("train", 8), ("validation", rows), ("test", 2)):
        types = {"ind": Value("int32"), "endings": List(TEXT)}
        hub.add("Rowan/hellaswag", "default", split, number, _of_hellaswag, types)


def _of_gsm8k(i: int) -> Row:
    total = f"{i}+{i + 1}=<<{i}+{i + 1}={2 * i + 1}>>{2 * i + 1}"
    question = f"Ann has {i} apples and buys {i + 1}. How many?"
    return {"question": question, "answer": f"{total}\n#### {2 * i + 1}"}


def _of_bbh(i: int) -> Row:
    return {"input": f"not ( True ) and ( {i} > 0 ) is", "target": "False"}


def _of_humaneval(i: int) -> Row:
    return {
        "task_id": f"HumanEval/{i}",
        "prompt": f'def add_{i}(x):\n    """Add {i}."""\n',
        "canonical_solution": f"    return x + {i}\n",
        "test": f"def check(candidate):\n    assert candidate(1) == {1 + i}\n",
        "entry_point": f"add_{i}",
    }


def _of_hellaswag(i: int) -> Row:
    first, second = f"A man stands at wall {i}.", "he"
    return {
        "ind": i,
        "activity_label": "Painting",
        "ctx_a": first,
        "ctx_b": second,
        "ctx": f"{first} {second}",
        "endings": [f"paints it {color}. [title] Then" for color in ("red", "blue", "dry", "up")],
        "source_id": f"activitynet~v_{i}",
        "split": "val",
        "split_type": "indomain",
        "label": str(i % 4),
    }


def _vision(hub: _Hub, rows: int) -> None:
    image = {"image": PICTURE}
    hub.add(f"{VISION}/POPE", "default", "test", 9, _of_pope, image)
    types: Row = image | {"choices": List(TEXT), "answer": Value("int8")}
    hub.add(f"{VISION}/ScienceQA", "ScienceQA-IMG", "test", rows, _of_scienceqa, types)
    texts = dict.fromkeys(("question_tokens", "answers", "image_classes", "ocr_tokens"), List(TEXT))
    numbers = dict.fromkeys(("question_id", "image_width", "image_height"), Value("int32"))
    types = image | texts | numbers
    hub.add(f"{VISION}/textvqa", "default", "validation", rows, _of_textvqa, types)
    instructions, images = "testdev_balanced_instructions", "testdev_balanced_images"
    types = {"isBalanced": Value("bool")}
    hub.add(f"{VISION}/GQA", instructions, "testdev", rows, _of_gqa, types)
    hub.add(f"{VISION}/GQA", images, "testdev", 3, lambda i: {"id": f"n{i}"} | _image(i), image)
    hub.add(f"{VISION}/MMVet", "default", "test", rows, _of_mmvet, image)
    types = image | {"index": INTEGER}
    hub.add(f"{VISION}/MMBench", "en", "dev", 8, _of_mmbench, types)


def _image(number: int) -> Row:
    return {"image": picture(number)}


def _of_pope(i: int) -> Row:
    return _image(i) | {
        "id": str(i),
        "question_id": str(i),
        "question": f"Is there a thing {i} in the image?",
        "answer": "yes" if i % 2 else "no",
        "image_source": f"COCO_{i}",
        "category": ("random", "popular", "adversarial")[i % 3],
    }


def _of_scienceqa(i: int) -> Row:
    said = {"task": "closed choice", "grade": "grade2", "subject": "natural science"}
    more = dict.fromkeys(("topic", "category", "skill", "lecture", "solution"), "physics")
    return _image(i) | {
        "question": _question(i),
        "choices": ["wood", "stone"],
        "answer": i % 2,
        "hint": "" if i % 2 else "Look.",
        **said,
        **more,
    }


def _of_textvqa(i: int) -> Row:
    return _image(i) | {
        "image_id": str(i),
        "question_id": i,
        "question": _question(i),
        "question_tokens": ["what"],
        "image_width": 40,
        "image_height": 48,
        "flickr_original_url": "",
        "flickr_300k_url": "",
        "answers": ["red"] * 7 + ["blue"] * 3,
        "image_classes": ["Wall"],
        "set_name": "val",
        "ocr_tokens": ["STOP"],
    }


def _of_gqa(i: int) -> Row:
    names = {"id": str(i), "imageId": f"n{i % 3}", "question": _question(i), "answer": "wood"}
    return names | {"fullAnswer": "It is wood.", "isBalanced": True, "semanticStr": "select"}


def _of_mmvet(i: int) -> Row:
    return _image(i) | {
        "question_id": f"v1_{i}",
        "image_source": "here",
        "question": _question(i),
        "answer": "wood<AND>stone",
        "capability": "rec,ocr",
        "imagesource": "here",
    }


def _of_mmbench(i: int) -> Row:
    """Every question twice, with its options the other way round: circular evaluation."""
    question, turned = divmod(i, 2)
    options = ("wood", "stone") if not turned else ("stone", "wood")
    return _image(question) | {
        "index": question + 1_000_000 * turned,
        "question": _question(question),
        "hint": "nan",
        "answer": "AB"[turned],
        **dict(zip("ABCD", (*options, "nan", "nan"), strict=True)),
        "category": "object_localization",
        "source": "here",
        "L2-category": "finegrained_perception (instance-level)",
        "comment": "nan",
        "split": "dev",
    }


def _more_vision(hub: _Hub, rows: int) -> None:
    image = {"image": PICTURE}
    pictures = {f"image_{number}": PICTURE for number in range(1, 8)}
    hub.add(f"{VISION}/MMMU", "default", "validation", rows, _of_mmmu, pictures)
    hub.add(f"{VISION}/ai2d", "default", "test", rows, _of_ai2d, image | {"options": List(TEXT)})
    texts = dict.fromkeys(("answers", "answer_type", "operation_reasoning"), List(TEXT))
    hub.add(f"{VISION}/DocVQA", "InfographicVQA", "validation", rows, _of_infovqa, image | texts)
    types: Row = image | {"index": INTEGER}
    types |= {"meta_info": {"source": TEXT, "split": TEXT, "image_path": TEXT}}
    hub.add("Lin-Chen/MMStar", "val", "val", rows, _of_mmstar, types)
    hub.add(f"{VISION}/RealWorldQA", "default", "test", rows, _of_realworldqa, image)
    types = image | {"answer": List(TEXT)}
    hub.add("echo840/OCRBench", "default", "test", rows, _of_ocrbench, types)
    answers = List({"answer": TEXT, "answer_confidence": TEXT, "answer_id": INTEGER})
    types = image | {"answers": answers, "image_id": INTEGER, "question_id": INTEGER}
    hub.add(f"{VISION}/VQAv2", "default", "validation", rows, _of_vqav2, types)
    hub.add(f"{VISION}/MME", "default", "test", 8, _of_mme, image)


def _of_mmmu(i: int) -> Row:
    """Every third question has two pictures, every second one is open."""
    several = i % 3 == 2
    pictures = {f"image_{number}": None for number in range(1, 8)}
    return (
        pictures
        | {"image_1": picture(i), "image_2": picture(i + 1) if several else None}
        | {
            "id": f"validation_Art_{i + 1}",
            "question": "<image 1> " + ("and <image 2> " if several else "") + _question(i),
            "options": "['wood', 'stone']",
            "explanation": "",
            "img_type": "['Photographs']",
            "answer": "A" if i % 2 else "wood",
            "topic_difficulty": "Easy",
            "question_type": "multiple-choice" if i % 2 else "open",
            "subfield": "Sculpture",
        }
    )


def _of_ai2d(i: int) -> Row:
    options = ["leaf", "root", "seed", "bark"]
    return _image(i) | {"question": _question(i), "options": options, "answer": str(i % 4)}


def _of_infovqa(i: int) -> Row:
    return _image(i) | {
        "questionId": str(i),
        "question": _question(i),
        "answers": ["wood", "a wood"],
        "answer_type": ["single span"],
        "image_url": "",
        "operation_reasoning": [],
        "ocr": "",
        "data_split": "val",
    }


def _of_mmstar(i: int) -> Row:
    coarse = i % 2 == 1
    return _image(i) | {
        "index": i,
        "question": f"{_question(i)}\nOptions: A: wood, B: stone, C: tin, D: glass",
        "answer": "ABCD"[i % 4],
        "category": "coarse perception" if coarse else "math",
        "l2_category": "image emotion" if coarse else "geometry",
        "meta_info": {"source": "MMBench", "split": "val", "image_path": f"{i}.jpg"},
    }


def _of_realworldqa(i: int) -> Row:
    letter = "Please answer directly with only the letter of the correct option and nothing else."
    question = f"{_question(i)}\nA. wood\nB. stone\n{letter}"
    return _image(i) | {"question": question, "answer": "AB"[i % 2], "image_path": f"{i}.webp"}


def _of_ocrbench(i: int) -> Row:
    return _image(i) | {
        "dataset": "IIIT5K",
        "question": "what is written in the image?",
        "question_type": "Regular Text Recognition",
        "answer": ["STOP"],
    }


def _of_vqav2(i: int) -> Row:
    answer = {"answer": "red", "answer_confidence": "yes"}
    return _image(i) | {
        "question_type": "what",
        "multiple_choice_answer": "red",
        "answers": [answer | {"answer_id": number} for number in range(1, 11)],
        "image_id": i,
        "answer_type": "other",
        "question_id": i,
        "question": _question(i),
    }


def _of_mme(i: int) -> Row:
    """Two questions a picture, one whose answer is yes and one whose answer is no."""
    category = ("count", "code_reasoning")[i // 4]
    answer = ("Yes", "No")[i % 2]
    return _image(i // 2) | {
        "question_id": f"{category}/{i // 2}.jpg",
        "question": f"Is it {answer}? Please answer yes or no.",
        "answer": answer,
        "category": category,
    }
