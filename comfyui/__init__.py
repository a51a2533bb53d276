"""ComfyUI nodes that draw from prompts in two languages, with a branch of Bridge Diffusion Models.

ComfyUI imports this folder from ``custom_nodes``; the method itself is the package ``bdm``.
"""

from .folders import register_folders
from .nodes import BilingualPrompts, LoadBranch, LoadNativeText

# Now, so that they stand beside ComfyUI's own and in the paths that its settings name.
register_folders()

NODE_CLASS_MAPPINGS = {
    "BDMLoadBranch": LoadBranch,
    "BDMLoadNativeText": LoadNativeText,
    "BDMBilingualPrompts": BilingualPrompts,
}
NODE_DISPLAY_NAME_MAPPINGS = {
    "BDMLoadBranch": "Load BDM Branch",
    "BDMLoadNativeText": "Load BDM Native Text Encoder",
    "BDMBilingualPrompts": "BDM Bilingual Prompts",
}

__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS"]
