"""Which model family a file is made for, by names that only occur in models of that family.

Names are read as structure only where programs write it: at the beginning of a key, or between its dots
(kohya writes underscores for them). Words that people choose, such as an embedding's, tell nothing.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

#: Before the name of a module: nothing, or what trainers and programs put there.
_START = r"^(?:base_model[._]model[._])?(?:lora_unet_|lycoris_(?:unet_)?|lora_transformer_|unet\.|model\.)?"
_START += r"(?:diffusion_model[._])?"

#: Beginnings of keys (patterns) by the family that alone has them.
_FAMILIES = {
    rf"{_START}joint_blocks[._]\d": "SD3",
    rf"{_START}(?:double_blocks|single_blocks)[._]\d": "FLUX",
    r"^(?:.*[._])?single_transformer_blocks[._]\d": "FLUX",
    # FLUX, SD3, Qwen-Image, LTX-Video and more are named alike there.
    r"^(?:base_model\.model\.)?transformer\.transformer_blocks\.\d": "a diffusion transformer",
    r"^conditioner\.embedders\.": "SDXL",
    rf"{_START}label_emb[._]\d": "SDXL",
    rf"{_START}add_embedding[._]linear_1[._]": "SDXL",
    r"^lora_te2_": "SDXL",
    r"^(?:base_model\.model\.)?text_encoder_2\.": "SDXL",
    r"^(?:text_encoders\.|lora_|lycoris_)?clip_g[._]": "SDXL",
    r"^cond_stage_model\.model\.": "SD2",
}
_PATTERNS = [(re.compile(pattern), family) for pattern, family in _FAMILIES.items()]
#: SD1.5 has one transformer block in a place where SDXL has up to ten.
_SECOND_BLOCK = re.compile(
    r"(?:attentions|input_blocks|middle_block|output_blocks)[._\d]+transformer_blocks[._][1-9]"
)


def family_of_names(keys: Iterable[str]) -> str:
    """The family that alone has keys of such names; "" if nothing tells.

    Args:
        keys: of a model or an adapter, without the names of embeddings that are packed beside it.
    """
    keys = list(keys)
    for pattern, family in _PATTERNS:
        if any(pattern.match(key) for key in keys):
            return family
    return "SDXL" if any(_SECOND_BLOCK.search(key) for key in keys) else ""
