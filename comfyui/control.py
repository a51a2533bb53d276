"""The branch as a control of ComfyUI's: what a sampler asks for residuals at every step."""

from __future__ import annotations

from typing import Any

import comfy.model_management as management
from comfy.controlnet import ControlBase
from torch import Tensor

from bdm import BranchModel
from bdm.errors import UserError

from .loading import WholePatcher


class BranchControl(ControlBase):
    """Adds the residuals of a branch to those of the controls before it.

    The native features come with each conditioning, under a name that no other control reads: under
    ComfyUI's own one, ``cross_attn_controlnet``, every ControlNet beside the branch would be told the native
    text, too, in a width that it does not have.

    Args:
        patcher: of the branch.
        earlier: the control before it, if any.
    """

    def __init__(self, patcher: WholePatcher, earlier: ControlBase | None = None) -> None:
        super().__init__()
        self.patcher = patcher
        self.sampling: Any = None
        self.name = f"bdm_native_text_{_branches(earlier)}"
        self.set_previous_controlnet(earlier)

    @property
    def branch(self) -> BranchModel:
        """The branch itself."""
        return self.patcher.model.model

    def pre_run(self, model: Any, percent_to_timestep_function: Any) -> None:
        """What ComfyUI calls before the first step.

        Raises:
            UserError: the branch is made for another model.
        """
        super().pre_run(model, percent_to_timestep_function)
        _check_fit(self.branch, getattr(getattr(model, "model_config", None), "unet_config", {}))
        self.sampling = model.model_sampling

    def get_control(
        self, x_noisy: Tensor, t: Tensor, cond: dict[str, Any], batched_number: int, *rest: Any
    ) -> Any:
        """Residuals of this step, added to those of the controls before.

        Args:
            x_noisy: (B, 4, h, w) latents with the noise of ``t``, not yet scaled for the model.
            t: (B,) sigmas.
            cond: the conditioning of the batch, by ComfyUI's names.
            batched_number: how many conditionings the batch is made of.
            rest: ComfyUI's transformer_options, for the controls before.

        Raises:
            UserError: a conditioning of the batch has no native text.
        """
        earlier = None
        if self.previous_controlnet is not None:
            earlier = self.previous_controlnet.get_control(x_noisy, t, cond, batched_number, *rest)
        if not self._acts_at(float(t[0])):
            return earlier
        return self.control_merge(self._residuals(x_noisy, t, cond), earlier, output_dtype=None)

    def copy(self) -> BranchControl:
        """Another one with the same settings and the same branch."""
        made = BranchControl(self.patcher)
        made.name = self.name
        self.copy_to(made)
        return made

    def get_models(self) -> list[Any]:
        """What has to be on the device while the sampler draws."""
        return [*super().get_models(), self.patcher]

    def cleanup(self) -> None:
        """Forget the model that was drawn with."""
        self.sampling = None
        super().cleanup()

    def _acts_at(self, sigma: float) -> bool:
        if self.timestep_range is None:
            return True
        first, last = self.timestep_range
        return last <= sigma <= first

    def _residuals(self, x_noisy: Tensor, t: Tensor, cond: dict[str, Any]) -> dict[str, list[Any]]:
        if self.name not in cond:
            raise UserError(
                "a conditioning is drawn with a branch and has no native text; connect both outputs of BDM"
                " Bilingual Prompts, positive and negative"
            )
        dtype = self.branch.dtype
        features = management.cast_to_device(cond[self.name], x_noisy.device, dtype)
        sample = self.sampling.calculate_input(t, x_noisy).to(dtype)
        timesteps = self.sampling.timestep(t).float()
        down, middle = self.branch(sample, timesteps, features, return_dict=False)
        return {"input": [], "middle": [middle], "output": list(down)}


def _branches(control: ControlBase | None) -> int:
    """How many branches there are among a control and those before it."""
    count = 0
    while control is not None:
        count += isinstance(control, BranchControl)
        control = control.previous_controlnet
    return count


def _check_fit(branch: BranchModel, theirs: dict[str, Any]) -> None:
    channels = tuple(theirs.get("model_channels", 0) * factor for factor in theirs.get("channel_mult", ()))
    ours = tuple(branch.config["block_out_channels"])
    if channels != ours:
        raise UserError(
            f"the branch is made for a UNet of {ours} channels and the model has {channels or 'no UNet'}; use"
            " a model of SD1.5, or the branch that belongs to it"
        )
