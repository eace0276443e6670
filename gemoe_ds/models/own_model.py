"""The backbones whose model transformers has no class for: it is put together of its parts here.

Such a model says where its language model, its head and its image features are; so training and the
code of an exported folder read it alike. Shapes: B sequences, S tokens, F features, D model.
"""

from __future__ import annotations

from torch import Tensor, nn

from gemoe_ds.models.backbone import Backbone, HFModel
from gemoe_ds.models.inputs import ModelInputs, run_text


class OwnModelBackbone(Backbone):
    """Of a `VisionLanguageModel`."""

    def hidden(self, model: HFModel, inputs: ModelInputs) -> Tensor:
        return run_text(model.text, inputs, model.image_features, put=model.put)

    def head(self, model: HFModel) -> nn.Module:
        head: nn.Module = model.head
        return head
