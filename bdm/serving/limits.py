"""What one request may ask of a server at most."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..drawing.request import Request
from ..errors import UserError

#: Settings of modes that are lengths in pixels.
_LENGTHS = ("left", "top", "right", "bottom", "overlap")
_TEXTS = ("prompt", "negative", "prompt_en", "negative_en")


@dataclass(frozen=True)
class Limits:
    """The bounds; each is what is still allowed.

    Attributes:
        body: bytes of a request's body.
        text: characters of each prompt.
        side: pixels of a picture's width and height, enlarged too.
        steps: of denoising, in each pass.
        pictures: of one request.
        queue: pictures that wait or are drawn at once.
        upload: pixels of a picture that is sent.
        plugins: of a picture.
    """

    body: int = 32 * 2**20
    text: int = 10_000
    side: int = 2048
    steps: int = 150
    pictures: int = 16
    queue: int = 256
    upload: int = 4096 * 4096
    plugins: int = 16

    def check_count(self, count: int) -> None:
        """See that one request asks for so many pictures.

        Raises:
            UserError: for none, or too many.
        """
        _within("the number of pictures", count, 1, self.pictures)

    def check(self, request: Request, start: tuple[int, int] = (512, 512)) -> None:
        """See that a request is within the bounds.

        Args:
            request: as a client gave it.
            start: what is drawn where no size is said: that of the picture that it starts from, or the
                model's own.

        Raises:
            UserError: names what is not, and what is allowed.
        """
        for name in _TEXTS:
            _within(f"{name}: the number of characters", len(getattr(request, name)), 0, self.text)
        _within("branch_schedule: the number of characters", len(request.branch_schedule), 0, self.text)
        _within("steps", request.steps, 1, self.steps)
        _within("clip_skip", request.clip_skip, 1, 12)
        _within("the number of plug-ins", len(request.plugins), 0, self.plugins)
        for name in ("guidance", "english_guidance", "branch_scale"):
            _within(name, getattr(request, name) or 0, -1000, 1000)
        _within("the number of branches beside the model's own", len(request.beside), 0, self.plugins)
        for use in request.beside:
            for name in ("prompt", "negative", "schedule"):
                length = len(getattr(use, name))
                _within(f"beside, {name}: the number of characters", length, 0, self.text)
            _within("beside, scale", use.scale, -1000, 1000)
        for plugin in request.plugins:
            _within(f"{plugin.kind}: the strength", plugin.strength, -1000, 1000)
            _within(f"{plugin.kind}: the text strength", plugin.text_strength or 0, -1000, 1000)
        self._check_size(request, start)

    def _check_size(self, request: Request, start: tuple[int, int]) -> None:
        settings: dict[str, Any] = dict(request.mode.settings)
        for name in _LENGTHS:
            _within(name, settings.get(name, 0), 0, self.side)
        _within("blur", settings.get("blur", 0), 0, 512)
        _within("scale", settings.get("scale", 1), 1, 8)
        _within("second_steps", settings.get("second_steps", 0), 0, self.steps)
        _within("enlarge", request.enlarge, 1, self.side)
        scale = settings.get("scale", 1) * request.enlarge
        for i, (name, sides) in enumerate({"width": ("left", "right"), "height": ("top", "bottom")}.items()):
            own = getattr(request, name)
            if own is not None:
                _within(name, own, 8, self.side)
            side = (own or start[i]) + sum(settings.get(side, 0) for side in sides)
            _within(f"{name}, enlarged,", side * scale, 8, self.side)


def _within(what: str, value: Any, least: float, most: float) -> None:
    if not isinstance(value, int | float) or not least <= value <= most:
        shown = value if isinstance(value, int | float) and abs(value) < 1e30 else "no such number"
        raise UserError(f"{what} is {shown}; this server allows {least:g} to {most:g}")
