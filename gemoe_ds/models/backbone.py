"""Backbone: an adapter that says where a model's MoE blocks are; it re-implements no forward."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor, nn

from gemoe_ds.errors import CheckpointError, ConfigError
from gemoe_ds.hf_io.hf_config import as_checkpoint_error, config_of, meta_model
from gemoe_ds.hf_io.key_rules import KeyMap, Shape
from gemoe_ds.hf_io.loader import Weights
from gemoe_ds.hf_io.quantise_folder import quantise_folder
from gemoe_ds.hf_io.quiet import without_bars
from gemoe_ds.hf_io.rewriter import rewrite
from gemoe_ds.models.blocks import Adapters, BlockSpec, find_moe_blocks
from gemoe_ds.models.chat import ChatTemplate
from gemoe_ds.models.images import ImageLayout
from gemoe_ds.models.inputs import ModelInputs
from gemoe_ds.registry import ConfigModel, Registered

HFModel = Any  # the nn.Module of a family, whose parts are known to its backbone alone


@dataclass(frozen=True)
class Golden:
    """What a public model is known to write, greedily, after some token ids."""

    model: str
    vocabulary: int
    prompt: tuple[int, ...]
    continuation: tuple[int, ...]


class Backbone(Registered):
    """One model family. An instance is cheap: it holds options and knows how to load and read."""

    name: ClassVar[str]
    block_adapters: ClassVar[Adapters] = {}
    may_lack: ClassVar[tuple[str, ...]] = ()  # our names that all of a folder's may be without
    published_parameters: ClassVar[int | None] = None  # in its public folder, unused ones included
    published_part: ClassVar[str] = ""  # what that counts: names that begin so
    published_tensors: ClassVar[int | None] = None
    published_unused: ClassVar[Mapping[str, Shape]] = {}  # stored there, and read by nobody
    published_processor: ClassVar[Mapping[str, Any]] = {}  # its preprocessor_config.json
    golden: ClassVar[Golden | None] = None
    keys: ClassVar[KeyMap] = KeyMap()  # of its Hugging Face folders
    chat: ClassVar[ChatTemplate] = ChatTemplate()

    def __init__(self, config: ConfigModel) -> None:
        self.config = config

    @abstractmethod
    def load(self, checkpoint: Path | None, tokenizer_dir: Path) -> nn.Module:
        """The model: freshly initialised in float32, or a meta model for a folder to fill.

        A meta model's parameters have shapes and no memory (hf_config.py); whoever asked fills what
        it keeps, by `keys`. Raises ConfigError for options that contradict the folder,
        CheckpointError for a folder that is missing, damaged or of another family.
        """

    def described(
        self, model_class: type[nn.Module], config_class: Any, folder: Path | None
    ) -> nn.Module:
        """The meta model that config.json describes; CheckpointError if there is none."""
        config = config_of(config_class, folder, self.name)
        assert folder is not None
        with as_checkpoint_error(folder):
            model = meta_model(model_class, config)
            for block in self.moe_blocks(model):
                top_k, experts = block.routing.top_k, block.routing.num_experts
                if not 1 <= top_k <= experts:
                    raise CheckpointError(
                        f"{block.path}: {top_k} experts a token, of {experts}; it must be from 1 "
                        f"to {experts}"
                    )
        return model

    @classmethod
    def published(cls) -> nn.Module:
        """The meta model of the public model at its full size."""
        raise ConfigError(f"backbone {cls.name!r} has no published model")

    @classmethod
    def published_blocks(cls) -> list[BlockSpec]:
        """The MoE blocks of that meta model."""
        return cls(cls.Config()).moe_blocks(cls.published())

    def moe_blocks(self, model: nn.Module) -> list[BlockSpec]:
        """Every MoE block in order of depth."""
        return find_moe_blocks(model, self.block_adapters)

    def context_length(self, model: nn.Module) -> int | None:
        """Positions that the language model of `model` knows; None: unknown."""
        blocks = self.moe_blocks(model)
        root = blocks[0].path.partition(".layers.")[0] if blocks else ""
        config: Any = getattr(model.get_submodule(root), "config", None)
        length = getattr(config, "max_position_embeddings", None)
        rope = getattr(config, "rope_parameters", None) or {}
        if length and "original_max_position_embeddings" not in rope:
            length = int(length * (rope.get("factor") or 1))
        return length

    def image_layout(self, model: HFModel) -> ImageLayout | None:
        """How an image is laid into a sequence; None: this model reads text only."""
        return None

    @abstractmethod
    def hidden(self, model: HFModel, inputs: ModelInputs) -> Tensor:
        """The last hidden states [B, S, D] through the model's own forward."""

    @abstractmethod
    def head(self, model: HFModel) -> nn.Module:
        """The module from hidden states to vocabulary logits."""

    def save_pretrained(self, model: nn.Module, state: dict[str, Tensor], folder: Path) -> None:
        """Write every parameter of `model` (`state`, by its names) as a Hugging Face folder.

        Only models that transformers has can be, those that may start without a folder.
        """
        plain: HFModel = meta_model(type(model), model.config)
        plain.load_state_dict(state, strict=True, assign=True)
        with without_bars():
            plain.save_pretrained(folder)

    def save_trained(
        self,
        model: nn.Module,
        state: Mapping[str, Tensor],
        base: Path | None,
        folder: Path,
        share: tuple[int, int] = (0, 1),
    ) -> None:
        """Write `base` with the parameters of `state` (by name of the model as loaded) replaced.

        All others stay as they are stored there. Without a base all must be in `state`, and the
        first rank writes them. With `share` = (rank, ranks) only this rank's files are written.
        """
        if base is not None:
            weights = self._weights(model, base)
            rewrite(weights, self.with_lacking(model, state, base), folder, share)
        elif share[0] == 0:
            self.save_pretrained(model, dict(state), folder)

    def save_quantised(
        self,
        model: nn.Module,
        state: Mapping[str, Tensor],
        base: Path,
        folder: Path,
        format_of: Mapping[str, str],
    ) -> None:
        """The same with the parameters of `format_of` in one of quantised.FORMATS.

        Without `state` this is the base itself, and `model` may have no memory.
        """
        state = self.with_lacking(model, state, base) if state else state
        quantise_folder(self._weights(model, base), state, folder, format_of, self.keys)

    def with_lacking(
        self, model: nn.Module, state: Mapping[str, Tensor], base: Path
    ) -> Mapping[str, Tensor]:
        """`state` and what a folder that is whole has more than `base`."""
        return state

    def _weights(self, model: nn.Module, base: Path) -> Weights:
        """Of a folder, for the model as it is loaded."""
        plain = meta_model(type(model), model.config)
        return Weights(base, self.keys, plain, self.may_lack)
