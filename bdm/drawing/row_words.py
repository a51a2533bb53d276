"""What rows of prompt files may say, under the names that people and other programs use."""

from __future__ import annotations

import re
import typing
from collections.abc import Mapping
from typing import Any

from ..errors import UserError, printable, quoted
from .other_names import our_name
from .request import Request
from .typed_json import has_half_characters, read_as

#: What A1111's lines say that has no meaning here, and would change the picture there.
_NOT_HERE = (
    "styles", "subseed", "subseed_strength", "seed_resize_from_h", "seed_resize_from_w", "restore_faces",
    "tiling", "sampler_index", "sd_model",
)  # fmt: skip
#: What they say that changes no picture.
_IGNORED = (
    "outpath_samples",
    "outpath_grids",
    "prompt_for_display",
    "do_not_save_samples",
    "do_not_save_grid",
)

_TYPES = typing.get_type_hints(Request) | {
    "file": str, "count": int, "n_iter": int, "batch_size": int, "beside_prompt": str,
}  # fmt: skip
#: Beside a request's own fields: the file's name, how many pictures, what the branch of --beside is told.
_BESIDE = ("file", "count", "n_iter", "batch_size", "beside_prompt")
NAMES = (
    *(name for name in _TYPES if name not in (*_BESIDE, "versions")), "file", "count", "beside_prompt"
)  # fmt: skip


def read_row(said: Mapping[str, Any], texts: bool = False) -> dict[str, Any]:
    """What a row says, under our names and as the types of a request's fields.

    Args:
        said: by any of the names.
        texts: all values are texts, as in tables and lines; numbers are read off them, and empty ones say
            nothing.

    Raises:
        UserError: an unknown name, one that is said twice, a value of another kind, no prompt.
    """
    found: dict[str, Any] = {}
    for key, value in said.items():
        name = our_name(key)
        if name in _IGNORED or name == "versions" or (texts and not str(value).strip()):
            continue
        if name in found:
            raise UserError(f"says {name} twice")
        if name not in NAMES and name not in _BESIDE:
            why = "which is not done here" if name in _NOT_HERE else f"allowed are {', '.join(NAMES)}"
            raise UserError(f"says {printable(key, 60)!r}; {why}")
        found[name] = _typed(name, value, texts)
    if not found.get("prompt"):
        raise UserError('has no prompt; give one, such as {"prompt": "红灯笼"}')
    each, times = found.pop("n_iter", 1), found.pop("batch_size", 1)
    if each * times != 1:
        found["count"] = found.get("count", 1) * each * times
    if not 1 <= found.get("count", 1) <= 10_000:
        raise UserError(f"says that count is {found['count']}; give a whole number from 1 to 10000")
    return found


def _typed(name: str, value: Any, text: bool) -> Any:
    if isinstance(value, str) and has_half_characters(value):
        escaped = any("\udc80" <= character <= "\udcff" for character in value)
        hint = "; save the file as UTF-8" if escaped and text else ""
        raise UserError(f"is no text: {name} {quoted(value)} holds half a character{hint}")
    kind = _TYPES[name]
    if text and isinstance(value, str):
        value = _of_text(kind, value)
    try:
        return read_as(kind, value, name)
    except UserError as error:
        raise UserError(f"says that {error}") from None


def _of_text(kind: Any, text: str) -> Any:
    """A number where a field wants one, if the text is one."""
    wanted = [one for one in typing.get_args(kind) or (kind,) if one in (int, float)]
    for number in wanted:
        try:
            return number(text.strip())
        except ValueError:
            continue
    if wanted == [int] and re.fullmatch(r"\s*-?\d+\.0+\s*", text):  # tables write 7 as 7.0
        return int(float(text))
    return text
