"""Prompt files with odd lines: each line is read or named, and none ends the others."""

import json
from pathlib import Path

import pytest

from bdm.drawing.requests import Failure, read_requests
from bdm.errors import UserError


def read(tmp_path, content, ending=".jsonl", **options):
    """(prompts, failures) of a file with such content."""
    file = tmp_path / f"prompts{ending}"
    file.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass"))
    failed = []
    requests = read_requests(file, Path("out"), 0, failed=failed, **options)
    return requests, failed


@pytest.mark.parametrize("code", [0x0B, 0x0C, 0x1C, 0x1D, 0x1E, 0x85, 0x2028, 0x2029])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_only_line_feeds_and_carriage_returns_end_a_line(tmp_path, code, end):
    prompts = [f"红灯笼{chr(code)}蓝色背景", "月饼"]
    for bom in ("", "\ufeff"):
        requests, failed = read(tmp_path, bom + end.join([*prompts, ""]), ".txt")
        assert ([r.prompt for r in requests], failed) == (prompts, [])
        if code >= 0x85:  # JSON writes the others as escapes
            lines = [json.dumps({"prompt": prompt}, ensure_ascii=False) for prompt in prompts]
            requests, failed = read(tmp_path, bom + end.join([*lines, ""]), ".jsonl")
            assert ([r.prompt for r in requests], failed) == (prompts, [])


@pytest.mark.parametrize("ending", [".jsonl", ".JSONL", ".Jsonl"])
def test_endings_in_capitals_are_the_same(tmp_path, ending):
    assert read(tmp_path, '{"prompt": "龙", "seed": 5}', ending)[0][0].seed == 5


def test_lines_of_blanks_count_for_nothing(tmp_path):
    requests, _ = read(tmp_path, "\n \t\n\u3000\u2028\n龙\n\x1f\n月饼", ".txt")
    assert [(str(r.path), r.prompt, r.line) for r in requests] == [
        ("out/00000.png", "龙", 4), ("out/00001.png", "月饼", 6),
    ]  # fmt: skip
    with pytest.raises(UserError, match="holds no prompt"):
        read(tmp_path, "\ufeff\n\u3000\n", ".txt")


ODD = {
    "{": "is not JSON",
    "[]": "has no prompt",
    "null": "has no prompt",
    '{"prompt": null}': "has no prompt",
    '{"prompt": ["a"]}': "says that prompt is ['a']; give a text",
    '{"prompt": "a", "seed": true}': "says that seed is True; give a whole number",
    '{"prompt": "a", "seed": 1.0}': "says that seed is 1.0; give a whole number",
    '{"prompt": "a", "seed": NaN}': "says that seed is nan",
    '{"prompt": "a", "seed": 1e30}': "says that seed is 1e+30",
    '{"prompt": "a", "seed": 99999999999999999999999}': "asks for seed 99999999999999999999999: give a whole",
    '{"prompt": "a", "seed": 9223372036854775808}': "asks for seed 9223372036854775808",
    '{"prompt": "a", "seed": -1}': "asks for seed -1",
    '{"prompt": "a", "seed": ' + "9" * 5000 + "}": "is not JSON",
    '{"prompt": "a", "guidance": 3}': "says 'guidance'; allowed are prompt, negative",
    '{"prompt": "a", "\\u001b[2J": 3}': "says '\\\\x1b[2J'; allowed",
    '{"prompt": "龙\\ud83d"}': "is no text: the text '龙\\ud83d' holds half a character",
    '{"prompt": "龙", "negative_en": "\\udcff"}': "is no text",
    '{"prompt": ' + "[" * 100_000: "is not JSON",
    '{"prompt": "a"} {"prompt": "b"}': "is not JSON",
    '{"prompt": "a\tb"}': "is not JSON",
    '\ufeff{"prompt": "a"}': "is not JSON",
}


@pytest.mark.parametrize("line", ODD, ids=range(len(ODD)))
def test_an_odd_line_is_named_and_ends_no_other(tmp_path, line):
    good = '{"prompt": "月饼"}'
    requests, failed = read(tmp_path, f"{good}\n{line}\n{good}\n")
    assert [(str(r.path), r.prompt, r.seed, r.line) for r in requests] == [
        ("out/00000.png", "月饼", 0, 1), ("out/00002.png", "月饼", 2, 3),
    ]  # fmt: skip
    (failure,) = failed
    assert failure.what == "line 2"
    assert ODD[line] in failure.why
    assert len(failure.why) < 400
    with pytest.raises(UserError, match=r"prompts\.jsonl, line 2 "):
        read_requests(tmp_path / "prompts.jsonl", Path("out"), 0)


def test_bytes_of_another_encoding_are_named(tmp_path):
    requests, failed = read(tmp_path, "龙\n".encode() + "月饼\n".encode("gbk") + "红包\n".encode(), ".txt")
    assert [r.prompt for r in requests] == ["龙", "红包"]
    assert [f.what for f in failed] == ["line 2"]
    assert "is no UTF-8" in failed[0].why
    for encoding in ("utf-16", "utf-16-be"):
        content = "龙\n".encode(encoding)
        content = content if content[:2] in (b"\xff\xfe", b"\xfe\xff") else b"\xfe\xff" + content
        with pytest.raises(UserError, match="is in UTF-16; save it as UTF-8"):
            read(tmp_path, content, ".txt")


def test_files_that_cannot_be_read(tmp_path):
    for place in (tmp_path, tmp_path / "none", tmp_path / ("x" * 5000)):
        with pytest.raises(UserError, match="cannot be read"):
            read_requests(place, Path("out"), 0)


def test_seeds_that_run_over_are_their_lines_failures(tmp_path):
    last = 2**63 - 1
    requests, failed = read(tmp_path, f'{{"prompt": "龙", "seed": {last}}}\n{{"prompt": "龙"}}', count=2)
    assert failed == [Failure("line 1", f"asks for seed {last + 1}: give a whole number from 0 to {last}")]
    assert [(str(r.path), r.seed) for r in requests] == [("out/00001-0.png", 2), ("out/00001-1.png", 3)]


def test_a_line_with_nothing_but_ascii_controls_is_a_prompt_like_any_other(tmp_path):
    requests, failed = read(tmp_path, "\x00\x1b[2J\x7f\n", ".txt")
    assert [r.prompt for r in requests] == ["\x00\x1b[2J\x7f"]
    assert not failed
