"""The nodes."""

from __future__ import annotations

from typing import Any

import comfy.conds
import comfy.model_management as management
import torch

from bdm import NativeTextEncoder, PromptRules
from bdm.errors import UserError, quoted
from bdm.text.rules import A1111, OFFICIAL
from bdm.text.script import read_script

from .control import BranchControl
from .folders import BRANCHES, TEXTS, list_models
from .loading import DTYPES, WholePatcher, load_branch, load_native_text

#: ComfyUI's (text features, what else is said) pairs.
Conditioning = list[list[Any]]

RULES = {"A1111": A1111, "official": OFFICIAL}
_PRECISION = (["auto", *DTYPES], {"tooltip": "Precision it computes in; auto is what ComfyUI takes here."})
_TEXT = {"multiline": True, "dynamicPrompts": True}


class LoadBranch:
    """Loads a branch."""

    CATEGORY = "BDM"
    DESCRIPTION = "Loads a branch from models/bdm_branches."
    RETURN_TYPES = ("BDM_BRANCH",)
    RETURN_NAMES = ("branch",)
    FUNCTION = "load"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """What ComfyUI asks for."""
        where = {"tooltip": "A folder in models/bdm_branches."}
        return {"required": {"branch": (list_models(BRANCHES), where), "dtype": _PRECISION}}

    def load(self, branch: str, dtype: str) -> tuple[WholePatcher]:
        """See ``load_branch``."""
        return (load_branch(branch, dtype),)


class LoadNativeText:
    """Loads a native text encoder."""

    CATEGORY = "BDM"
    DESCRIPTION = "Loads the text encoder that a branch was trained with from models/bdm_text."
    RETURN_TYPES = ("BDM_TEXT",)
    RETURN_NAMES = ("native_text",)
    FUNCTION = "load"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """What ComfyUI asks for."""
        where = {"tooltip": "A folder or a file of cn_clip (.pt) in models/bdm_text, or a package's encoder."}
        return {"required": {"native_text": (list_models(TEXTS), where), "dtype": _PRECISION}}

    def load(self, native_text: str, dtype: str) -> tuple[WholePatcher]:
        """See ``load_native_text``."""
        return (load_native_text(native_text, dtype),)


class BilingualPrompts:
    """Puts native texts and a branch beside English conditionings."""

    CATEGORY = "BDM"
    DESCRIPTION = "Puts native prompts and the branch that reads them beside English ones."
    RETURN_TYPES = ("CONDITIONING", "CONDITIONING")
    RETURN_NAMES = ("positive", "negative")
    FUNCTION = "tell"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """What ComfyUI asks for."""
        strong = "Strength of the branch: 1 as it was trained, 0 without it."
        share = {"min": 0.0, "max": 1.0, "step": 0.001}
        return {
            "required": {
                "positive": ("CONDITIONING", {"tooltip": "What is said in English; an empty text will do."}),
                "negative": ("CONDITIONING", {"tooltip": "What is not wanted, in English."}),
                "branch": ("BDM_BRANCH",),
                "native_text": ("BDM_TEXT",),
                "native_positive": ("STRING", {**_TEXT, "tooltip": "What is wanted, in your language."}),
                "native_negative": ("STRING", {**_TEXT, "tooltip": "What is not wanted, in your language."}),
                "scale": (
                    "FLOAT", {"default": 1.0, "min": 0.0, "max": 10.0, "step": 0.01, "tooltip": strong}
                ),
                "start_percent": (
                    "FLOAT", {"default": 0.0, **share, "tooltip": "The branch acts from this share on."}
                ),
                "end_percent": (
                    "FLOAT", {"default": 1.0, **share, "tooltip": "The branch acts up to this share."}
                ),
                "rules": (list(RULES), {"tooltip": "How native prompts are read (see the README)."}),
            }
        }  # fmt: skip

    def tell(
        self,
        positive: Conditioning,
        negative: Conditioning,
        branch: WholePatcher,
        native_text: WholePatcher,
        native_positive: str,
        native_negative: str,
        scale: float,
        start_percent: float,
        end_percent: float,
        rules: str = "A1111",
    ) -> tuple[Conditioning, Conditioning]:
        """Both conditionings with their native features and the branch as their control.

        Raises:
            UserError: a branch that was trained with another text encoder, or native texts that change over
                the steps, are joined by AND or name LoRAs.
        """
        if scale == 0.0:
            return positive, negative
        features = encode_both(native_text, native_positive, native_negative, RULES[rules])
        width = branch.model.model.config["cross_attention_dim"]
        if features.shape[-1] != width:
            raise UserError(
                f"the native text encoder gives features {features.shape[-1]} wide and the branch reads"
                f" {width}; load the text encoder that the branch was trained with"
            )
        # Where positive and negative have the same control, ComfyUI draws them in one batch.
        controls: dict[Any, BranchControl] = {}
        told = [
            [_told(one, own[None], branch, (scale, start_percent, end_percent), controls) for one in side]
            for side, own in zip((positive, negative), features, strict=True)
        ]
        return told[0], told[1]


def encode_both(patcher: WholePatcher, positive: str, negative: str, rules: PromptRules) -> torch.Tensor:
    """Native features of a prompt and its negative, of one length.

    Args:
        patcher: of the text encoder.
        positive: the prompt.
        negative: its negative.
        rules: how they are read.

    Returns:
        (2, L, D), in float32 on the device where ComfyUI keeps conditionings.

    Raises:
        UserError: a text that one conditioning cannot say.
    """
    encoder: NativeTextEncoder = patcher.model.model
    # A system that knew no grammar reads brackets as text (see bdm.text.native).
    rules = rules if encoder.settings.brackets else OFFICIAL
    texts = [_said(positive, rules), _said(negative, rules, composed=False)]
    management.load_models_gpu([patcher])
    with torch.no_grad():
        features = encoder.encode(texts, rules)
    return features.to(management.intermediate_device(), torch.float32)


def _said(text: str, rules: PromptRules, composed: bool = True) -> str:
    """A native text as the encoder reads it."""
    script = read_script(text, 1000, rules, native=True, composed=composed)
    for wrong, what, instead in (
        (len(script.ends) > 1, "changes over the steps", "use two of these nodes with start and end"),
        (script.weights != (1.0,), "is joined by AND or weighed as a whole", "use Conditioning (Combine)"),
        (bool(script.loras), "names a LoRA", "use Load LoRA"),
    ):
        if wrong:
            raise UserError(
                f"the native prompt {quoted(text)} {what}, which this node does not do; {instead}, or the"
                " rules official, by which it is plain text"
            )
    return script.said[0][0]


def _told(
    one: list[Any],
    features: torch.Tensor,
    branch: WholePatcher,
    strength: tuple[float, float, float],
    controls: dict[Any, BranchControl],
) -> list[Any]:
    """One conditioning with native features and the branch; what was given is left as it was."""
    text, said = one[0], dict(one[1])
    earlier = said.get("control")
    if earlier not in controls:
        scale, start, end = strength
        controls[earlier] = BranchControl(branch, earlier)
        controls[earlier].set_cond_hint(None, scale, (start, end))
    control = controls[earlier]
    own = {control.name: comfy.conds.CONDCrossAttn(features)}
    said["model_conds"] = {**said.get("model_conds", {}), **own}
    said.update(control=control, control_apply_to_uncond=False)
    return [text, said]
