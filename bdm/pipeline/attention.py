"""Which word drew what: the cross-attention of branch and backbone, recorded while a picture is drawn.

A word's map is the attention that the picture's places pay to its tokens, averaged over heads, layers and
steps, each layer's map enlarged to the latents' size (after DAAM, arXiv 2210.04885).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from ..errors import UserError
from ..method.bridge import bridges_of
from ..method.composed import COMPOSED
from ..method.condition import NativeCondition
from ..method.hooks import hang_after, hang_before
from ..method.step import named_arguments
from ..text.rules import A1111, PromptRules
from ..text.words import ReadTokens, read_english, read_native


@dataclass
class AttentionMaps:
    """What a network's cross-attentions looked at.

    Attributes:
        sums: by height and width of the layers: (L, h, w) sums over all that was recorded, of the latents'
            size.
        counts: likewise how many layers in how many steps that were.
    """

    sums: dict[tuple[int, int], Tensor] = field(default_factory=dict)
    counts: dict[tuple[int, int], int] = field(default_factory=dict)

    def add(self, probabilities: Tensor, size: tuple[int, int]) -> None:
        """Add (n, L) attention of the n places of a layer to L tokens, for latents of a size."""
        layer = _places(len(probabilities), size)
        maps = interpolate(probabilities.T.reshape(1, -1, *layer), size, mode="bilinear")[0].cpu()
        if any(known.shape != maps.shape for known in self.sums.values()):
            self.sums, self.counts = {}, {}
        self.sums[layer] = self.sums[layer] + maps if layer in self.sums else maps
        self.counts[layer] = self.counts.get(layer, 0) + 1

    def mean(self, finest: bool = False) -> Tensor:
        """(L, h, w) attention of each place to each token; what it pays to all tokens is 1.

        Args:
            finest: of the layers with the most places alone.

        Raises:
            UserError: nothing was recorded.
        """
        if not self.sums:
            raise UserError("no attention was recorded; draw a picture inside the block")
        layers = [max(self.sums)] if finest else list(self.sums)
        total: Tensor = sum(self.sums[layer] for layer in layers)  # pyright: ignore[reportAssignmentType]
        return total / sum(self.counts[layer] for layer in layers)


@dataclass
class Attention:
    """The maps of one drawn picture.

    Attributes:
        native: the branch's.
        english: the backbone's.
    """

    pipe: Any
    native: AttentionMaps = field(default_factory=AttentionMaps)
    english: AttentionMaps = field(default_factory=AttentionMaps)

    def native_words(
        self,
        prompt: str,
        words: Sequence[str] | None = None,
        rules: PromptRules = A1111,
        relative: bool = True,
        finest: bool = True,
    ) -> dict[str, Tensor]:
        """Maps (h, w) of words of the native prompt.

        Args:
            prompt: that the picture was drawn for.
            words: parts of it; by default what stands between punctuation.
            rules: by which the prompt was read.
            relative: of what each place pays to all of the prompt's words, the share that goes to this one;
                False gives the attention itself, most of which goes to markers and padding, and more of the
                rest to any word where there is something to draw.
            finest: of the layers with the most places alone, which say best where; False takes all.

        Raises:
            UserError: a word that is not in it, or nothing was recorded.
        """
        tokens = read_native(prompt, self.pipe.native_text_encoder, rules)
        return _maps(self.native.mean(finest), tokens, words, relative)

    def english_words(
        self,
        prompt: str,
        words: Sequence[str] | None = None,
        rules: PromptRules = A1111,
        relative: bool = True,
        finest: bool = True,
    ) -> dict[str, Tensor]:
        """Maps (h, w) of words of the English prompt; by default of all of them.

        Raises:
            UserError: see ``native_words``.
        """
        tokens = read_english(prompt, self.pipe.text_encoder, self.pipe.tokenizer, rules)
        return _maps(self.english.mean(finest), tokens, words, relative)


@contextmanager
def record_attention(pipe: Any) -> Iterator[Attention]:
    """Record the cross-attentions of all that is drawn inside the ``with`` block.

    The picture stays bit for bit what it is: hooks look at what the layers are given, and compute their
    attention beside them. Of pictures that are drawn one after the other the last one's size counts.

    Args:
        pipe: a bilingual pipeline, or anything with ``unet`` and ``branch``.

    Raises:
        UserError: several pictures are drawn at once.
    """
    found = Attention(pipe)
    size = [0, 0]

    def see_latents(module: Any, args: Any, kwargs: Any) -> None:
        size[:] = named_arguments(module, args, kwargs)["sample"].shape[-2:]
        for bridge in bridges_of(module):
            _refuse_several(bridge.told)

    def see(maps: AttentionMaps, native: bool) -> Any:
        def look(module: Any, args: Any, kwargs: Any, output: Any) -> None:
            values = named_arguments(module, args, kwargs)
            row = _row_of(len(values["hidden_states"]), native)
            maps.add(_probabilities(module, values, row), (size[0], size[1]))

        return look

    with ExitStack() as stack:
        for network in (pipe.unet, pipe.branch):  # a bridge may run the branch before the UNet is seen
            hang_before(stack, network, see_latents)
        for network, maps, native in ((pipe.branch, found.native, True), (pipe.unet, found.english, False)):
            for name, module in network.named_modules():
                if name.endswith(".attn2"):
                    hang_after(stack, module, see(maps, native))
        yield found


def _refuse_several(told: NativeCondition | None) -> None:
    """Refuse a drawing of which nobody could say what was read in which row."""
    if told is not None and told.samples != 1:
        raise UserError(
            f"{told.samples} pictures are drawn at once, and attention is recorded of one at a time; draw one"
            " prompt with one image"
        )
    parts = told.parts() if told is not None and told.parts is not None else ()
    if told is not None and (len(told.stages) > 1 or any(isinstance(part, int) for part in parts)):
        raise UserError(
            "attention is recorded of prompts that say the same in all steps; leave AND, [a:b:0.5] and [a|b]"
            " out of them"
        )


def _row_of(rows: int, native: bool) -> int:
    """The row of a layer's batch that is drawn for the prompt.

    Guided steps are [negative, positive], composed ones [negative, native, English]; equal rows may be
    computed once (see ``bdm.speed.sharing``).
    """
    return 1 if native and rows == len(COMPOSED) else -1


@torch.no_grad()
def _probabilities(module: Any, values: dict[str, Any], row: int) -> Tensor:
    """(n, L) attention of a layer, averaged over its heads."""
    hidden, text = values["hidden_states"], values["encoder_hidden_states"]
    text = text[0] if isinstance(text, tuple) else text  # an IP-Adapter's picture comes beside it
    # What keeps its results for the very same text is not given another.
    query, key = module.to_q(hidden)[row:][:1], module.to_k(text)[row:][:1]
    query, key = (value.unflatten(-1, (module.heads, -1)).transpose(1, 2)[0] for value in (query, key))
    scores = query.float() @ key.float().transpose(1, 2) * module.scale
    return scores.softmax(-1).mean(0)


def _places(count: int, size: tuple[int, int]) -> tuple[int, int]:
    """Height and width of a layer with so many places, for latents of a size."""
    height, width = size
    while height * width > count and height * width > 1:
        height, width = -(-height // 2), -(-width // 2)
    assert height * width == count, f"{count} places of latents {size}"
    return height, width


def _maps(mean: Tensor, tokens: ReadTokens, words: Sequence[str] | None, relative: bool) -> dict[str, Tensor]:
    chosen = tokens.words() if words is None else words
    maps = {word: mean[tokens.positions(word)].sum(0) for word in chosen}
    if not relative:
        return maps
    content = {place for word in tokens.words() for place in tokens.positions(word)}
    content |= {place for word in chosen for place in tokens.positions(word)}
    whole = mean[sorted(content)].sum(0)
    return {word: each / whole.clamp(min=1e-12) for word, each in maps.items()}
