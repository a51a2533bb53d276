"""A stand-in for the parts of ComfyUI that the nodes touch, written from what they ask of it.

Names, arguments and effects are those that nodes may rely on; nothing else of ComfyUI is here.
"""
