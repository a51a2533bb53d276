"""A connector: a text encoder's features -> features as wide as a UNet reads them, token by token."""

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


class Connector(ModelMixin, ConfigMixin):
    """A normalization and one linear layer, or two with a GELU between.

    Args:
        width_in: of the text encoder's features.
        width_out: of what the UNet reads.
        hidden: width between the two layers; 0 for one layer.
    """

    @register_to_config
    def __init__(self, width_in: int, width_out: int, hidden: int = 0) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width_in)
        inner = [nn.Linear(width_in, hidden), nn.GELU()] if hidden else []
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
    said = {key: value for key, value in read_json(path).items() if not key.startswith("_")}
    least = {"width_in": 1, "width_out": 1, "hidden": 0}
    for name in {**least, **said}:
        value: Any = said.get(name)
        if type(value) is not int or not least.get(name, _WIDEST) <= value < _WIDEST:
            raise UserError(
                f"{path} says {printable(name, 60)} {printable(value, 40)}; a connector's settings are"
                f" {', '.join(least)}, whole numbers below {_WIDEST}: get the folder again"
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
