"""AutoProcessor of an exported folder: prompts and pictures as training prepared them.

Shapes: B prompts, S tokens of the longest, N tiles (or crops) of all pictures.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import BatchFeature, ProcessorMixin
from transformers.image_processing_base import ImageProcessingMixin
from transformers.image_utils import load_image

from gemoe_ds.data.collate import Collator, Encoded
from gemoe_ds.data.images import as_shown, read_image
from gemoe_ds.export.image_rows import OF_FRAME
from gemoe_ds.export.own_tokenizer import FILES, OwnTokenizer
from gemoe_ds.export.settings import NOT_SAVED, PromptSettings, local_folder, settings_of
from gemoe_ds.models.deepseek_vl2.images import DeepseekVl2Images as Layout
from gemoe_ds.models.images import ProcessedImage

_NEVER_CUT = 2**31


class OwnImageProcessor(ImageProcessingMixin):
    """Pictures as the model takes them. `layout` of preprocessor_config.json are its settings."""

    model_input_names = ["pixel_values"]  # noqa: RUF012 (transformers')

    def __init__(self, layout: dict[str, Any] | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.layout = layout or {}

    @property
    def image_layout(self) -> Any:
        return Layout(**self.layout)

    def __call__(self, images: Any, return_tensors: str | None = "pt") -> BatchFeature:
        """The pictures of ONE prompt, joined: `pixel_values` [N, ...] and what goes with them."""
        processed = self.processed(images if isinstance(images, list | tuple) else [images])
        found = {"pixel_values": np.concatenate([image.pixels for image in processed])}
        for name in processed[0].extras:
            found[f"image_{name}"] = np.concatenate([image.extras[name] for image in processed])
        return BatchFeature(found, tensor_type=return_tensors)

    def processed(self, pictures: Sequence[Any]) -> list[ProcessedImage]:
        """Each with its tokens; how one is cut depends on how many there are, in some models."""
        layout = self.image_layout
        return [layout(as_picture(picture), len(pictures)) for picture in pictures]


class OwnProcessor(ProcessorMixin):
    """`processor(text=..., images=...)` -> what `generate` takes; prompts are padded on the left.

    A prompt is whole: `apply_chat_template` writes one, a picture's mark in it says where the
    picture stands (without a mark it stands before everything). The special tokens that the
    chat's templates name are obeyed in it.
    """

    # `image_rows` go to our own model; transformers' LLaVA finds the places by the token
    gives_rows = True

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        chat_template: str | None = None,
        prompts: PromptSettings | None = None,
    ) -> None:
        assert prompts is not None, "made by from_pretrained"
        super().__init__(image_processor, tokenizer, chat_template=chat_template)
        self.prompts = prompts
        layout = image_processor.image_layout
        self.collator = Collator(tokenizer, layout, prompts.chat, max_length=_NEVER_CUT)

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls, pretrained_model_name_or_path: Any, **kwargs: Any
    ) -> Any:
        folder = local_folder(pretrained_model_name_or_path, kwargs, FILES)
        tokenizer = OwnTokenizer.from_pretrained(folder)
        images = OwnImageProcessor.from_pretrained(folder)
        return cls(images, tokenizer, tokenizer.chat_template, settings_of(folder))

    def __call__(
        self,
        images: Any = None,
        text: str | Sequence[str] | None = None,
        videos: Any = None,
        audio: Any = None,
        audios: Any = None,
        padding: bool | str = True,
        padding_side: str = "left",
        add_special_tokens: bool = False,
        return_tensors: str | None = "pt",
        truncation: bool | str | None = None,
        max_length: int | None = None,
    ) -> BatchFeature:
        """`input_ids` and `attention_mask` [B, S], `pixel_values` [N, ...] and what goes with them.

        Args:
            images: of one prompt a picture or a list; of several a list for each, or one list in
                which they take as many as they have marks. PIL, paths, URLs, uint8 [H, W, 3].
            text: prompts. Nothing is added to them, whatever `add_special_tokens` says.
            videos, audio, audios: nothing, or empty.
            padding: to the longest prompt; False only if all are of one length.
            truncation, max_length: nothing, as a prompt is never cut.

        Raises:
            ValueError: pictures and marks do not fit, or this model cannot read what is given.
        """
        if videos or audio or audios:
            raise ValueError("this model reads text and pictures; leave videos and audio out")
        _refuse_lengths(truncation, max_length, padding)
        if text is None:
            raise ValueError("text is missing: give the prompts, from apply_chat_template")
        prompts = [text] if isinstance(text, str) else list(text)
        cut = [self.collator.conversations.written(p, self.prompts.image_mark) for p in prompts]
        encoded = []
        shares = _shares(images, [len(parts) - 1 for parts in cut], isinstance(text, str))
        for number, (parts, pictures) in enumerate(zip(cut, shares, strict=True)):
            if len(parts) == 1 and pictures:
                parts = self._before_everything(parts[0], len(pictures))
            self._check(number, len(parts) - 1, len(pictures))
            one = Encoded(number, f"prompt {number}")
            one.add_question(parts, self.image_processor.processed(pictures))
            encoded.append(one)
        if not padding and len({len(one.input_ids) for one in encoded}) > 1:
            raise ValueError("the prompts have several lengths; leave padding=True")
        return self._joined(encoded, padding_side, return_tensors)

    def to_dict(self) -> dict[str, Any]:
        """What it prints."""
        return {"processor_class": type(self).__name__} | self.prompts.to_json()

    def save_pretrained(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError(NOT_SAVED)

    def _check(self, number: int, marks: int, pictures: int) -> None:
        mark, chat = self.prompts.image_mark, self.prompts.chat
        if marks != pictures:
            raise ValueError(
                f"prompt {number} has {marks} x {mark} for {pictures} picture(s); write one for "
                "each, or none: pictures then stand before everything"
            )
        if chat.one_image and pictures > 1:
            raise ValueError(f"prompt {number} has {pictures} pictures; this model reads one")

    def _before_everything(self, ids: list[int], number: int) -> list[list[int]]:
        """The parts of a prompt without marks: pictures stand behind the token that begins it."""
        begins = int(bool(ids) and ids[0] in self.collator.special_ids)
        return [ids[:begins], *[[] for _ in range(number - 1)], ids[begins:]]

    def _joined(self, encoded: list[Encoded], side: str, tensors: str | None) -> BatchFeature:
        batch = self.collator.batch(encoded, left=side == "left")
        found: dict[str, Tensor] = {
            "input_ids": batch.input_ids_BS,
            "attention_mask": batch.is_valid_BS.long(),
        }
        if any(one.images for one in encoded):
            images = dict(batch.images)
            feature_BS = images.pop("feature_BS")
            found["pixel_values"] = images.pop("pixels")
            found |= {f"image_{name}": tensor for name, tensor in images.items()}
            if self.gives_rows:
                of_frame_BS = batch.is_vision_BS & (feature_BS < 0)
                found["image_rows"] = torch.where(of_frame_BS, OF_FRAME, feature_BS)
        if tensors == "np":
            return BatchFeature({name: tensor.numpy() for name, tensor in found.items()})
        if tensors is None:
            return BatchFeature({name: tensor.tolist() for name, tensor in found.items()})
        return BatchFeature(found, tensor_type=tensors)


def _refuse_lengths(truncation: Any, max_length: int | None, padding: Any) -> None:
    """ValueError for what would cut prompts or fill them to a length."""
    asked = [f"truncation={truncation!r}"] if truncation not in (None, False) else []
    asked += [f"max_length={max_length}"] if max_length is not None else []
    asked += [f"padding={padding!r}"] if padding == "max_length" else []
    if asked:
        raise ValueError(
            f"{', '.join(asked)}: a prompt is whole, as a cut may go through a picture; prompts "
            "are padded to the longest of them. Leave it out, and shorten texts before the call"
        )


def _shares(images: Any, marks: list[int], is_one: bool) -> list[list[Any]]:
    """The pictures of each prompt."""
    if images is None:
        return [[] for _ in marks]
    if not isinstance(images, list | tuple):
        images = [images]
    if any(isinstance(image, list | tuple) for image in images):
        lists = [list(i) if isinstance(i, list | tuple) else [i] for i in images]
        if len(lists) != len(marks):
            raise ValueError(f"pictures for {len(lists)} prompts, and there are {len(marks)}")
        return lists
    if is_one:
        return [list(images)]
    if not any(marks) and len(images) == len(marks):
        return [[image] for image in images]
    if sum(marks) != len(images):
        raise ValueError(
            f"{len(images)} pictures for prompts with {sum(marks)} marks; give each prompt a list"
        )
    ahead = iter(images)
    return [[next(ahead) for _ in range(number)] for number in marks]


def as_picture(given: Any) -> Image.Image:
    """RGB, upright, on white; as training reads a picture."""
    if isinstance(given, str) and given.startswith(("http://", "https://", "data:")):
        given = load_image(given)
    if isinstance(given, str | Path):
        return read_image(Path(given).read_bytes())
    if isinstance(given, Tensor):
        given = given.numpy()
    if isinstance(given, np.ndarray):
        if given.dtype != np.uint8 or given.ndim != 3 or given.shape[-1] != 3:
            raise ValueError(
                f"a picture of {given.dtype} {list(given.shape)}; give uint8 [height, width, 3]"
            )
        given = Image.fromarray(given)
    return as_shown(given)
