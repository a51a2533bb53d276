"""The settings that peft and diffusers keep beside an adapter's factors, in the header or in a file of their
own.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import UserError, printable
from .folders import json_object, read_json
from .header import WeightFile

#: Ways to begin a training that change the base's weights.
_CHANGED = ("pissa", "olora", "corda", "loftq")


@dataclass(frozen=True)
class PeftSettings:
    """What peft and diffusers keep of an adapter beside its factors: alpha, by part and by module.

    Attributes:
        path: of the adapter.
        values: settings by name; diffusers puts the part before the name.
    """

    path: Path
    values: dict[str, Any]

    @staticmethod
    def of(file: WeightFile) -> PeftSettings:
        """The settings in the header (diffusers) or in ``adapter_config.json`` beside the file (peft).

        Empty if there are none.

        Raises:
            UserError: they are damaged, or say that the adapter is for a base that was changed with it.
        """
        settings = PeftSettings._read(file)
        settings._refuse_changed_base()
        return settings

    @staticmethod
    def _read(file: WeightFile) -> PeftSettings:
        noted = file.metadata.get("lora_adapter_metadata")
        if noted is not None:
            return PeftSettings(
                file.path, json_object(noted, f"{file.path}: lora_adapter_metadata in its header")
            )
        beside = file.path.with_name("adapter_config.json")
        peft_keys = any(".lora_A." in key or key.startswith("base_model.model.") for key in file.tensors)
        return PeftSettings(file.path, read_json(beside) if peft_keys and beside.is_file() else {})

    def _refuse_changed_base(self) -> None:
        """Refuse what was trained on a base whose weights were changed when the training began.

        Such files hold the adapter alone: added to the plain base it means something else.
        """
        for name, value in self.values.items():
            changed = name.rpartition(".")[2] == "init_lora_weights" and str(value).lower().startswith(
                _CHANGED
            )
            if changed:
                raise UserError(
                    f"{self.path}: its settings say {name} {printable(value, 40)!r}, so it fits a base that"
                    " was changed with it; convert it with peft (path_initial_model_for_weight_conversion)"
                )

    def scale(self, part: str, module: str, rank: int | None) -> float | None:
        """alpha / rank (alpha / sqrt(rank) for rsLoRA) of a module, or None where nothing is noted.

        Args:
            part: "unet" or "text_encoder".
            module: its name, as diffusers has it.
            rank: of its factors; None if none of them is factorised.

        Raises:
            UserError: damaged settings.
        """
        for prefix in (f"{part}.", ""):
            alpha = self._noted(module, f"{prefix}alpha_pattern", f"{prefix}lora_alpha", f"{prefix}alpha")
            # peft divides by the rank that was asked for, even where it was too large for a LoKr to be
            # factorised.
            divisor = rank or self._noted(module, f"{prefix}rank_pattern", f"{prefix}r")
            if alpha is not None and divisor and divisor > 0:
                return alpha / (divisor**0.5 if self._yes(f"{prefix}use_rslora") else divisor)
        return None

    def _yes(self, key: str) -> bool:
        value = self.values.get(key)
        if not isinstance(value, bool | None):
            raise UserError(
                f"{self.path}: the adapter's settings note {printable(value, 20)!r} for {key}, neither true"
                " nor false; they are damaged, save it again"
            )
        return bool(value)

    def _noted(self, module: str, pattern_key: str, *keys: str) -> float | None:
        """The number noted for a module.

        That of the first pattern that fits its name, as in peft, else that of all modules.
        """
        value = next((self.values[key] for key in keys if key in self.values), None)
        patterns = self.values.get(pattern_key)
        if isinstance(patterns, dict):
            value = next((v for pattern, v in patterns.items() if self._fits(module, pattern)), value)
        if value is None:
            return None
        # JSON knows NaN, and whole numbers of any length.
        if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e9:
            raise UserError(
                f"{self.path}: the adapter's settings note {printable(value, 20)} for {keys[0]}; they are"
                " damaged, save it again"
            )
        return float(value)

    def _fits(self, module: str, pattern: str) -> bool:
        """Whether a module's name ends in a pattern (or, with ^ before it, is the pattern)."""
        name = pattern.removeprefix("^").replace("\\.", ".")
        if not re.fullmatch(r"[\w.\-]+", name):  # some expressions take forever to match
            raise UserError(
                f"{self.path}: the settings name modules by the expression {printable(pattern, 60)!r}; give"
                " whole names instead"
            )
        name = name.removeprefix("text_model.")  # as from the names of modules here
        return module == name or (pattern[0] != "^" and module.endswith(f".{name}"))
