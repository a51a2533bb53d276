"""The English prompt, encoded for the backbone as A1111 or the official inference does it."""

from __future__ import annotations

import re
from collections.abc import Sequence

from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from ..errors import UserError, quoted, whole_number
from .chunks import ChunkLayout, check_ids, execution_device, weigh
from .rules import OFFICIAL, PromptRules
from .splitting import Reading, count_chunks, tokenize

#: The official script's limit, shared by both languages.
MAX_CHUNKS = 5


def encode_english(
    prompts: Sequence[str],
    text_encoder: CLIPTextModel,
    tokenizer: CLIPTokenizer,
    clip_skip: int = 1,
    rules: PromptRules = OFFICIAL,
) -> Tensor:
    """Hidden states of CLIP's text encoder, with A1111 emphasis.

    Chunks of 75 tokens plus markers, padded by the end of text, no mask. Features are multiplied by the
    bracket weights, then each chunk is rescaled so that its mean stays what it was. Trigger words of
    embeddings are read as their vectors, which receive gradients if they want them.

    Args:
        prompts: B texts.
        text_encoder: CLIP's.
        tokenizer: CLIP's, with the trigger words of attached embeddings among its tokens.
        clip_skip: whose layer's states, from the end: 1 is the last, 2 the one before it (A1111's numbering).
            The final layer norm is applied to all.
        rules: how prompts are cut into chunks and joined again.

    Returns:
        (B, L, D) in the encoder's dtype; L is 77 for prompts that fit one chunk. Every prompt is padded to
        the longest.

    Raises:
        UserError: ``clip_skip`` is not a layer of the encoder.
    """
    layers = text_encoder.config.num_hidden_layers
    if not 1 <= (whole_number(clip_skip) or 0) <= layers:
        raise UserError(
            f"clip_skip {quoted(clip_skip)}: this text encoder allows 1 (its last layer) to {layers}"
        )
    layout = _layout_of(tokenizer)
    tokens = tokenize(
        prompts, tokenizer, layout, lambda text: spell_triggers(text, tokenizer), _reading(tokenizer, rules)
    )
    batch, chunks, length = tokens.ids.shape
    check_ids(tokens.ids, text_encoder)
    ids = tokens.ids.view(batch * chunks, length).to(execution_device(text_encoder))
    if clip_skip == 1:
        features = text_encoder(ids).last_hidden_state
    else:
        states = text_encoder(ids, output_hidden_states=True).hidden_states[-clip_skip]
        # transformers moved the layer up with version 5.6.
        features = getattr(text_encoder, "text_model", text_encoder).final_layer_norm(states)
    features = features.view(batch, chunks, length, -1)
    return layout.join(weigh(features, tokens.weights), rules)


def english_chunks(prompt: str, tokenizer: CLIPTokenizer, rules: PromptRules = OFFICIAL) -> int:
    """How many chunks an English prompt takes: 1 up to 75 tokens; 5 at most by the official rules."""
    return count_chunks(
        prompt,
        tokenizer,
        _layout_of(tokenizer),
        lambda text: spell_triggers(text, tokenizer),
        _reading(tokenizer, rules),
    )


def _reading(tokenizer: CLIPTokenizer, rules: PromptRules) -> Reading:
    """An embedding's vectors stay in one chunk."""
    added = tokenizer.added_tokens_decoder.items()
    return Reading(rules, joined=frozenset(i for i, token in added if re.search(r"_\d+$", token.content)))


def _layout_of(tokenizer: CLIPTokenizer) -> ChunkLayout:
    return ChunkLayout.of(tokenizer, tokenizer.model_max_length - 2, MAX_CHUNKS)


def trigger_tokens(word: str, vectors: int) -> list[str]:
    """The tokens that stand for an embedding's vectors: "<ink>", "<ink>_1", "<ink>_2" ...

    The brackets keep them apart from words that CLIP knows; the numbering is diffusers' convention, so that
    stock pipelines read "<ink>" as all of them.
    """
    return [f"<{word}>", *(f"<{word}>_{i}" for i in range(1, vectors))]


def spell_triggers(text: str, tokenizer: CLIPTokenizer) -> str:
    """Write words that stand for several vectors as the tokens of these.

    Trigger words of attached embeddings are "ink", "Ink", "embedding:ink" and "<ink>". Words that diffusers'
    ``load_textual_inversion`` taught the tokenizer are found where diffusers finds them: as they were
    loaded, and nowhere else.
    """
    return _spell_loaded(_spell_attached(text, tokenizer), tokenizer)


def loaded_tokens(tokenizer: CLIPTokenizer) -> set[str]:
    """The tokens that others have added to a tokenizer, such as diffusers' ``load_textual_inversion``."""
    return _added_tokens(tokenizer)[1]


def _added_tokens(tokenizer: CLIPTokenizer) -> tuple[set[str], set[str]]:
    """The tokens added for attached embeddings, and those that others added.

    Ours are the ones that the tokenizer takes letter by letter, without its normalisation.
    """
    ours, theirs = set(), set()
    for token in tokenizer.added_tokens_decoder.values():
        if not token.special:
            attached = not token.normalized and re.fullmatch(r"<.+>(_\d+)?", token.content, re.DOTALL)
            (ours if attached else theirs).add(token.content)
    return ours, theirs


def _numbered(token: str, known: set[str]) -> list[str]:
    """A token and those that continue it: "<ink>", "<ink>_1", "<ink>_2" ..."""
    tokens = [token]
    while (following := f"{token}_{len(tokens)}") in known:
        tokens.append(following)
    return tokens


def _spell_attached(text: str, tokenizer: CLIPTokenizer) -> str:
    known = _added_tokens(tokenizer)[0]
    words = sorted((token[1:-1] for token in known if token.endswith(">")), key=len, reverse=True)
    if not words:
        return text
    spelled = {word.lower(): " ".join(_numbered(f"<{word}>", known)) for word in words}
    # All words in one pass, so that none is found inside what another was written as. Letters of scripts
    # without spaces bound a word; Latin letters and digits do not.
    either, done = ("|".join(map(re.escape, each)) for each in (words, spelled.values()))
    pattern = (
        rf"(?:{done})(?!_\d)|<({either})>(?!_\d)|(?<![A-Za-z0-9_<])(?:embedding:)?({either})(?![A-Za-z0-9_>])"
    )
    # Regular expressions also take letters such as the dotless i for another's other case, which is no
    # spelling of the word.
    return re.sub(
        pattern,
        lambda found: spelled.get((found[1] or found[2] or "").lower(), found[0]),
        text,
        flags=re.IGNORECASE,
    )


def _spell_loaded(text: str, tokenizer: CLIPTokenizer) -> str:
    attached, known = _added_tokens(tokenizer)
    spelled = {token: _numbered(token, known) for token in known}
    several = {token: " ".join(tokens) for token, tokens in spelled.items() if len(tokens) > 1}
    if not any(token in text for token in several):
        return text
    # diffusers goes by what the tokenizer makes of the text, so letters in another case do not count.
    seen = several.keys() & set(tokenizer.tokenize(text))
    # The longest is taken, so that nothing is found within other tokens or where it is spelled out already.
    known = sorted({*attached, *known, *several.values()}, key=len, reverse=True)
    pattern = "|".join(map(re.escape, known))
    return re.sub(pattern, lambda found: several[found[0]] if found[0] in seen else found[0], text)
