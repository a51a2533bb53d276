"""AltDiffusion's text encoder: XLM-R, and a linear layer that makes CLIP's features of its states.

Chen et al., "AltCLIP" (arXiv 2211.06679), and Ye et al., "AltDiffusion" (arXiv 2308.09991). Its released
folders call it by this class, and their configuration is XLM-R's with the width that the layer gives
(``project_dim``).
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel, XLMRobertaConfig, XLMRobertaModel
from transformers.modeling_outputs import BaseModelOutput

#: Weights by which such an encoder is known, whatever its configuration says.
_LAYERS = ("transformation.weight", "transformation_pre.weight")


class RobertaSeriesModelWithTransformation(PreTrainedModel):
    """Token ids -> what takes the place of CLIP's features.

    Args:
        config: XLM-R's, with ``project_dim``. With ``has_pre_transformation`` (the model of nine languages)
            the states of the last layer but one are normalised, and another layer makes the features of
            them.
    """

    config_class = XLMRobertaConfig
    base_model_prefix = "roberta"
    # As XLM-R, whose attention it is.
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = _supports_attention_backend = True

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.roberta = XLMRobertaModel(config, add_pooling_layer=False)
        self.transformation = nn.Linear(config.hidden_size, config.project_dim)
        self.before_last = bool(getattr(config, "has_pre_transformation", False))
        if self.before_last:
            self.transformation_pre = nn.Linear(config.hidden_size, config.project_dim)
            self.pre_LN = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.post_init()

    @property
    def text_dim(self) -> int:
        """Width of the features, which is not that of the states."""
        return self.config.project_dim

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> BaseModelOutput:
        """(B, L) ids -> ``last_hidden_state``, the (B, L, project_dim) features."""
        states = self.roberta(input_ids, attention_mask=attention_mask, output_hidden_states=self.before_last)
        if not self.before_last:
            return BaseModelOutput(last_hidden_state=self.transformation(states.last_hidden_state))
        features = self.transformation_pre(self.pre_LN(states.hidden_states[-2]))
        return BaseModelOutput(last_hidden_state=features)


def is_transformed(config: Any, weights: Collection[str]) -> bool:
    """Whether a text encoder is AltDiffusion's, by its weights or by what its configuration calls it.

    Of its weights it also takes over whether the layer reads the last states or those before.
    """
    if config.model_type != "xlm-roberta" or not hasattr(config, "project_dim"):
        return False
    config.has_pre_transformation = _LAYERS[1] in weights or bool(
        getattr(config, "has_pre_transformation", False)
    )
    named = RobertaSeriesModelWithTransformation.__name__ in (config.architectures or ())
    return named or any(layer in weights for layer in _LAYERS)
