"""Help and messages in Chinese: nothing is missing, values stay as they are."""

import argparse
import json
import re

import pytest
from messages import messages

from bdm import cli
from bdm.cli.catalogue import Catalogue
from bdm.cli.columns import columns, wrapped
from bdm.cli.language import LANGUAGES, asked, catalogue, speak, told

FOLDER = cli.language._FOLDER / "zh"
FILES = {path.name: json.loads(path.read_text(encoding="utf-8")) for path in sorted(FOLDER.glob("*.json"))}
PAIRS = [(english, chinese) for said in FILES.values() for english, chinese in said.items()]
CHINESE = re.compile("[\u4e00-\u9fff]")
#: Rooms whose messages a person who draws can meet; those of training and its data are told in English.
ROOMS = (
    "cli", "drawing", "text", "plugins", "pipeline", "method", "models", "speed", "formats", "convert.py",
    "files.py", "extras.py", "errors.py", "shipped.py",
)  # fmt: skip

#: Messages that are put together of others, which are told in all their ways.
COMPOSED = ("says {}; {}", "{} is {}; give {}", "{}: its {}: {}", "{} is {}", "{} is {}; {}")
#: What stays English in Chinese: names and commands.
NAMES = ("pip install", "latent nearest", "bdm inspect", "bdm info")


@pytest.fixture
def chinese():
    speak("zh")
    yield
    speak("en")


def help_texts(parser):
    """All that the help of a parser and its sub-commands says."""
    yield from filter(None, (parser.description, parser.epilog))
    for group in parser._action_groups:
        yield from filter(None, (group.title, group.description))
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            yield from (choice.help for choice in action._choices_actions)
            for command in action.choices.values():
                yield from help_texts(command)
        elif action.help != argparse.SUPPRESS:
            yield action.help


def test_every_help_text_has_its_translation():
    texts = set(help_texts(cli.build_parser()))
    assert len(texts) > 100
    assert not [text for text in texts if catalogue("zh").told(text) is None]
    assert not [text for text in texts if re.search("[a-z]{4} [a-z]", text) and not is_chinese(text)]


def is_chinese(text):
    return CHINESE.search(catalogue("zh").told(text) or "")


def test_help_is_told_in_chinese(chinese, capsys):
    with pytest.raises(SystemExit):
        cli.main(["infer", "--help", "--lang", "zh"])
    said = capsys.readouterr().out
    assert said.startswith("用法：bdm infer")
    assert "母语提示词" in said
    with pytest.raises(SystemExit):
        cli.main(["infer", "--help", "--lang", "en"])
    assert "usage: bdm infer" in capsys.readouterr().out


def filled(template):
    """A message of a template, with a value of its own in each place."""
    numbers = iter(range(100))
    return re.sub(r"\{\}", lambda _: f"X{next(numbers)}Y", template)


def is_told(template):
    """Whether a message is told in Chinese with all of its values; rows' messages stand behind their row.

    An end that is left open may be nothing.
    """
    ways = [template, template.removesuffix("{}")]
    for message in (before + filled(way) for way in ways for before in ("", "line 3 ")):
        said = catalogue("zh").told(message) or ""
        plain = re.sub("|".join(NAMES), "", said)
        english = re.search(r"\b[a-z]{2,} [a-z]{2,}\b", plain)
        values = set(re.findall(r"X\d+Y", message))
        if CHINESE.search(said) and not english and values <= set(re.findall(r"X\d+Y", said)):
            return True
    return False


@pytest.mark.parametrize("room", ROOMS)
def test_every_message_of_a_room_has_its_translation(room):
    found = [(where, text) for where, text in messages(room) if text not in COMPOSED]
    assert not [f"{where}: {text}" for where, text in found if not is_told(text)]


def test_messages_are_found_in_the_code():
    assert sum(1 for room in ROOMS for _ in messages(room)) > 450
    assert not is_told("the {} has no {}; paint it green")


@pytest.mark.parametrize("name", FILES)
def test_templates_say_the_same_values_on_both_sides(name):
    for english, chinese in FILES[name].items():
        count = english.count("{}") + english.count("{n}")
        places = re.findall(r"\{(\d?)\}", chinese)
        numbered = [int(place) for place in places if place]
        assert sorted(numbered) == list(range(count)) if any(numbered) else len(places) == count, english
        assert "{}{}" not in english, "nothing would tell where one ends"


def test_each_template_stands_once():
    assert len({english for english, _ in PAIRS}) == len(PAIRS)


def test_values_stay_and_unknown_messages_are_left():
    zh = Catalogue(
        {
            "{} of {} are {}": "{1} 中有 {0} 个{2}",
            "red": "红的",
            "line {n}": "第 {} 行",
            "{} is odd": "{}很怪",
        }
    )
    assert zh.told("3 of 5 are red") == "5 中有 3 个红的"
    assert zh.told("line 3 is odd; line 4 is odd") == "第 3 行很怪；第 4 行很怪"
    assert zh.told("line 3 is odd; and more") == "第 3 行很怪；and more"
    assert zh.told("no message of ours") is None
    assert zh.told("a; b") is None
    assert zh.told("") is None
    assert zh.told("red, red") == "红的，红的"
    assert zh.told("red, blue") is None


def test_lists_of_messages_are_told_one_by_one():
    told = catalogue("zh").told
    rows = (
        "line 1 has no value behind --seed; line 2 has no prompt; give one, such as {}; line 3 (a.png) cannot"
    )
    assert told(f"3 gave no picture and 1 did: {rows} be drawn: odd") == (
        "3 张没有画成，1 张画成：第 1 行的 --seed 后面没有值；第 2 行没有提示词；请给一个，如 {}；"
        "第 3 行（a.png）无法绘制：odd"
    )
    missing = (
        "not here: vae a (hash 1); vae b (hash 2). Give the folders that hold them with --models, or put"
    )
    assert told(f"{missing} them beside the picture").startswith(
        "这里没有：vae a（哈希 1）；vae b（哈希 2）。"
    )


def test_the_template_that_says_most_is_taken():
    zh = Catalogue({"{} is {}": "短", "{} is no {}": "长", "file {} is no {}": "最长"})
    assert zh.told("a is b") == "短"
    assert zh.told("a is no b") == "长"
    assert zh.told("file a is no b") == "最长"


@pytest.mark.parametrize(
    ("arguments", "environment", "language"),
    [
        ([], {}, "en"),
        (["infer", "龙", "--lang", "zh"], {}, "zh"),
        (["--lang=zh_CN", "infer"], {}, "zh"),
        (["infer"], {"LANG": "zh_CN.UTF-8"}, "zh"),
        (["infer"], {"LC_ALL": "C.UTF-8", "LANG": "zh_CN.UTF-8"}, "en"),
        (["infer"], {"LC_ALL": "", "LC_MESSAGES": "zh_TW", "LANG": "en_GB"}, "zh"),
        (["infer", "--lang", "en"], {"LC_ALL": "zh_CN"}, "en"),
        (["infer", "--", "--lang", "zh"], {}, "en"),
        (["infer"], {"LANG": "de_DE"}, "en"),
    ],
)
def test_the_language_is_asked_for(arguments, environment, language):
    assert asked(arguments, environment) == language


def test_english_is_left_as_it_is():
    assert LANGUAGES == ("en", "zh")
    assert told("none") == "none"


@pytest.mark.parametrize(
    "text", ["母语提示词，如 “红灯笼，蓝色背景”。" * 5, "plain English words " * 9, "x" * 90, ""]
)
def test_lines_fit_their_columns(text):
    lines = wrapped(text, 30)
    assert "".join(lines).replace(" ", "") == text.replace(" ", "")
    assert all(columns(line) <= 32 for line in lines) or "x" in text
    assert not [line for line in lines if line[:1] in tuple("，。”")]
