"""A connector: a text encoder's features -> features as wide as a UNet reads them, as many as they were."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from ..errors import UserError, printable
from ..formats.choice import FileChoice
from ..formats.weights import read_json, read_weights_folder, refuse_not_finite

#: Where a connector lies in its text encoder's folder.
CONNECTOR_FOLDER = "connector"
#: No network reads or gives features so wide.
_WIDEST = 1 << 16


#: Width of an attention head between the two layers, as in CLIP's text encoder.
HEAD_WIDTH = 64


class TokenMixing(nn.Module):
    """Transformer layers that let every token say something of the whole text.

    A UNet was trained with an encoder that puts words in another order, and something of the text on every
    padding token. Token by token no connector can learn that.

    Args:
        width: of the tokens; a multiple of ``HEAD_WIDTH``.
        depth: layers.
        positions: tokens at most, each of which learns its place.
    """

    def __init__(self, width: int, depth: int, positions: int) -> None:
        super().__init__()
        self.positions = nn.Parameter(0.02 * torch.randn(positions, width))
        self.blocks = nn.Sequential(
            *(
                nn.TransformerEncoderLayer(
                    width,
                    width // HEAD_WIDTH,
                    4 * width,
                    dropout=0.0,
                    activation="gelu",
                    batch_first=True,
                    norm_first=True,
                )
                for _ in range(depth)
            ),
            nn.LayerNorm(width),
        )

    def forward(self, features: Tensor) -> Tensor:
        """(B, L, width) -> the same."""
        return self.blocks(features + self.positions[: features.shape[1]])


class Connector(ModelMixin, ConfigMixin):
    """A normalization and one linear layer, or two with a GELU or a transformer between.

    Args:
        width_in: of the text encoder's features.
        width_out: of what the UNet reads.
        hidden: width between the two layers; 0 for one layer.
        depth: layers of the transformer (see ``TokenMixing``); 0 for a GELU, which sees one token at a time.
        positions: tokens that the transformer reads at most; 0 without one.
    """

    @register_to_config
    def __init__(
        self, width_in: int, width_out: int, hidden: int = 0, depth: int = 0, positions: int = 0
    ) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width_in)
        between = TokenMixing(hidden, depth, positions) if depth else nn.GELU()
        inner = [nn.Linear(width_in, hidden), between] if hidden else []
        self.layers = nn.Sequential(*inner, nn.Linear(hidden or width_in, width_out))

    def forward(self, features: Tensor) -> Tensor:
        """(B, L, width_in) -> (B, L, width_out)."""
        return self.layers(self.norm(features))


def read_connector_config(folder: Path) -> dict[str, int] | None:
    """Arguments of the connector beside a text encoder; None where there is none.

    Raises:
        UserError: they cannot be read, or say anything else.
    """
    path = folder / CONNECTOR_FOLDER / "config.json"
    if not path.is_file():
        return None
    read = {key: value for key, value in read_json(path).items() if not key.startswith("_")}
    # Those of a connector without a depth need not name what came with them.
    said = {"depth": 0, "positions": 0, **read}
    least = {"width_in": 1, "width_out": 1, "hidden": 0, "depth": 0, "positions": 0}
    for name in {**least, **said}:
        value: Any = said.get(name)
        if type(value) is not int or not least.get(name, _WIDEST) <= value < _WIDEST:
            raise UserError(
                f"{path} says {printable(name, 60)} {printable(value, 40)}; a connector's settings are"
                f" {', '.join(least)}, whole numbers below {_WIDEST}: get the folder again"
            )
    if said["depth"] and (not said["hidden"] or said["hidden"] % HEAD_WIDTH or not said["positions"]):
        raise UserError(
            f"{path} says depth {said['depth']}, hidden {said['hidden']} and positions {said['positions']};"
            f" a depth needs a hidden that is a multiple of {HEAD_WIDTH}, and positions: get the folder again"
        )
    return said


def load_connector(folder: Path, files: FileChoice) -> Connector | None:
    """The connector beside a text encoder; None where there is none.

    Raises:
        UserError: it is damaged.
    """
    arguments = read_connector_config(folder)
    if arguments is None:
        return None
    place = folder / CONNECTOR_FOLDER
    weights = read_weights_folder(place, files)
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in Connector(**arguments).state_dict().items()}
    if shapes != {name: tensor.shape for name, tensor in weights.items()}:
        raise UserError(f"{place}: its weights are not those that its config.json describes; get it again")
    refuse_not_finite(weights, place)
    connector = Connector(**arguments)
    connector.load_state_dict(weights)
    return connector
