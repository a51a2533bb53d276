"""A request's branches: another in the place of the model's own, and those beside it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..method.branch import BranchModel
from ..text.native import NativeTextEncoder
from .request import BranchUse, Request


def other_branch(request: Request) -> dict[str, Any]:
    """What a pipeline's ``from_pretrained`` takes in place of its own branch: one, and the text encoder of a
    pipeline that it is part of.
    """
    if request.branch is None:
        return {}
    folder = Path(str(request.branch.source))
    if not (folder / "model_index.json").is_file():
        return {"branch": folder}
    return {"branch": folder / "branch", "native_text_encoder": folder / "native_text_encoder"}


def put_branches(pipe: Any, uses: Sequence[BranchUse]) -> None:
    """Have these branches beside a pipeline's own, and no others; none where one of them cannot be.

    Raises:
        UserError: a folder without a branch and its native text encoder, or of another backbone's size.
    """
    _clear(pipe)
    try:
        for i, use in enumerate(uses):
            source = str(use.file.source)
            branch = BranchModel.from_pretrained(source, "branch")
            encoder = NativeTextEncoder.from_pretrained(source, subfolder="native_text_encoder")
            pipe.add_branch(_name(i), branch, encoder)
    except BaseException:
        _clear(pipe)
        raise


def told_beside(requests: Sequence[Request]) -> dict[str, Any] | None:
    """What a call tells them: each request's own texts, and the strengths that all have in common."""
    first = requests[0].beside
    return {
        _name(i): {
            "prompt": [request.beside[i].prompt for request in requests],
            "negative_prompt": [request.beside[i].negative for request in requests],
            "scale": use.scale,
            "start": use.start,
            "end": use.end,
            "schedule": use.schedule or None,
        }
        for i, use in enumerate(first)
    } or None


#: How the pipeline calls them, with their numbers; others are its user's.
_NAME = "beside "


def _name(number: int) -> str:
    return f"{_NAME}{number + 1}"


def _clear(pipe: Any) -> None:
    for name in [name for name in pipe.voices if name.startswith(_NAME)]:
        pipe.remove_branch(name)
