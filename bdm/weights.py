"""Weight files: safetensors and pickles that hold nothing but tensors. Nothing in a file is ever executed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from .errors import UserError

#: Names of whole-model weight files, preferred first.
WEIGHT_FILES = (
    "model.safetensors",
    "diffusion_pytorch_model.safetensors",
    "diffusion_pytorch_model.fp16.safetensors",
    "pytorch_model.bin",
    "diffusion_pytorch_model.bin",
)


def resolve_folder(source: str | Path, subfolder: str | None = None) -> Path:
    """A local model folder for a path or a hub name (downloaded through ``huggingface_hub``; HF_ENDPOINT is honoured)."""
    path = Path(source)
    if not path.is_dir():
        if path.is_file():
            raise UserError(f"{source} is a file; give the folder that holds config.json and the weights")
        if path.is_absolute() or str(source).startswith((".", "~")) or len(path.parts) != 2:
            raise UserError(f"{source}: no such folder; give a local folder or a hub name of the form owner/model")
        from huggingface_hub import snapshot_download

        try:
            path = Path(snapshot_download(str(source)))
        except Exception as error:  # offline, unknown name, no permission: one line for each
            raise UserError(
                f"{source}: neither a local folder nor a model the hub gives ({type(error).__name__}); "
                "give a local folder, or set HF_ENDPOINT to a mirror"
            ) from None
    return path / subfolder if subfolder else path


def read_weights_folder(folder: Path) -> dict[str, Tensor]:
    """The tensors of the weight file in a folder, sharded or not."""
    for name in WEIGHT_FILES:
        if (folder / name).exists():
            return read_tensors(folder / name)
    index = sorted(folder.glob("*.safetensors.index.json"))
    if index:
        shards = sorted(folder.glob(index[0].name.split(".")[0] + "-*.safetensors"))
        return {key: tensor for shard in shards for key, tensor in read_tensors(shard).items()}
    raise UserError(f"{folder} holds no weights; looked for {', '.join(WEIGHT_FILES)}")


def read_tensors(path: str | Path) -> dict[str, Tensor]:
    """Read a flat mapping of names to tensors.

    Args:
        path: ``.safetensors``, or a torch pickle (``.bin``, ``.pt``, ``.pth``, ``.ckpt``). Pickles go through torch's restricted
            unpickler, which refuses every global but those that rebuild tensors. A top-level ``"state_dict"`` is unwrapped.

    Raises:
        UserError: missing, truncated or malformed file; a pickle that names anything but tensors.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such weight file; check the path")
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except (SafetensorError, OSError, ValueError) as error:
            raise UserError(f"{path} is not a whole safetensors file ({error}); download or save it again") from None
    try:
        content: Any = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds; its text names the refused global
        reason = next((line for line in str(error).splitlines() if "GLOBAL" in line or "Unsupported" in line), None)
        if reason:
            raise UserError(f"{path} is a pickle that holds more than tensors and was not loaded: {reason.strip()[:160]}") from None
        raise UserError(f"{path} is damaged or not a torch file ({type(error).__name__}); download or save it again") from None
    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]
    if not isinstance(content, dict) or not all(isinstance(v, Tensor) for v in content.values()):
        raise UserError(f"{path} holds {type(content).__name__} that is not a mapping of names to tensors; give a weight file")
    return content
