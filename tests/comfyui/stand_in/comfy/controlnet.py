"""What all controls have in common."""

from __future__ import annotations

from typing import Any


class ControlBase:
    """A link of a chain: each adds its residuals to those of the one before."""

    def __init__(self) -> None:
        self.strength = 1.0
        self.timestep_percent_range = (0.0, 1.0)
        self.timestep_range: tuple[float, float] | None = None
        self.previous_controlnet: Any = None
        self.cond_hint_original: Any = None
        self.extra_hooks: Any = None

    def set_cond_hint(
        self, cond_hint: Any, strength: float = 1.0, timestep_percent_range: Any = (0.0, 1.0)
    ) -> Any:
        self.cond_hint_original, self.strength = cond_hint, strength
        self.timestep_percent_range = timestep_percent_range
        return self

    def set_previous_controlnet(self, controlnet: Any) -> Any:
        self.previous_controlnet = controlnet
        return self

    def pre_run(self, model: Any, percent_to_timestep_function: Any) -> None:
        start, end = map(percent_to_timestep_function, self.timestep_percent_range)
        self.timestep_range = (start, end)
        if self.previous_controlnet is not None:
            self.previous_controlnet.pre_run(model, percent_to_timestep_function)

    def get_models(self) -> list[Any]:
        return [] if self.previous_controlnet is None else list(self.previous_controlnet.get_models())

    def cleanup(self) -> None:
        self.timestep_range = None
        if self.previous_controlnet is not None:
            self.previous_controlnet.cleanup()

    def copy_to(self, c: Any) -> None:
        """All settings but the place in the chain."""
        for name in ("strength", "timestep_percent_range", "cond_hint_original", "extra_hooks"):
            setattr(c, name, getattr(self, name))

    def control_merge(self, control: Any, control_prev: Any, output_dtype: Any) -> dict[str, list[Any]]:
        """Own residuals by the strength, in place, and those of the control before added to them."""
        merged = {}
        for part in ("input", "middle", "output"):
            ours = [each.mul_(self.strength) for each in control.get(part, [])]
            theirs = control_prev[part] if control_prev else []
            both = [a if b is None else a + b for a, b in zip(ours, theirs, strict=False)]
            merged[part] = both + ours[len(both) :] + theirs[len(both) :]
        return merged
