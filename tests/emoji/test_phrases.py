"""Free phrases mean concepts of the world, and no caption has them."""

import pytest

from bdm.emoji.phrases import _PHRASES, read_phrases
from bdm.emoji.world import EmojiSource, World
from bdm.errors import UserError


@pytest.fixture(scope="module")
def world():
    return World()


def test_there_are_enough_of_them_and_each_means_a_concept(world):
    phrases = read_phrases(world)
    assert len(phrases) >= 200
    assert len(phrases) == sum(
        len(line.split("|")) for text in _PHRASES.values() for line in text.split("\n") if line.strip()
    )
    assert len({(p.language, p.text) for p in phrases}) == len(phrases)
    assert sum(world.concepts[p.concept].group == "native" for p in phrases) >= 60


@pytest.mark.parametrize("language", list(_PHRASES))
def test_no_caption_has_them(world, language):
    captions = {row.caption.lower() for row in EmojiSource(world, language, held_out="all").rows}
    phrases = read_phrases(world, (language,))
    assert phrases
    assert not [p.text for p in phrases if p.text.lower() in captions]


def test_a_language_without_phrases_is_named(world):
    with pytest.raises(UserError, match="no phrases in 'tr'"):
        read_phrases(world, ("tr",))
