"""Plug-ins: checkpoint, VAE, adapter (LoRA family), ControlNet and textual inversion, each attached and
detached alike.
"""

from .registry import Plugin as Plugin
from .registry import Plugins as Plugins
