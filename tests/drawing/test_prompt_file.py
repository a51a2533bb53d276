"""Prompt files with odd rows: each row is read or named, and none ends the others."""

import csv
import io
import json
from pathlib import Path

import pytest

from bdm import Request
from bdm.cli import parse
from bdm.cli.draw_requests import file_jobs
from bdm.drawing.jobs import Failure, Job
from bdm.drawing.prompt_file import BDM870, read_prompt_file
from bdm.drawing.row_jobs import row_jobs
from bdm.errors import UserError


def read(tmp_path, content, ending=".jsonl", base=None, count=1, pattern=None, bdm870=None):
    """(jobs, failures) of a file with such content."""
    file = tmp_path / f"prompts{ending}"
    file.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass"))
    return row_jobs(read_prompt_file(file, bdm870), base or Request(), Path("out"), pattern, count)


def prompts(jobs):
    return [job.request.prompt for job in jobs]


def test_lines_become_pictures(tmp_path):
    base = Request(negative="模糊", seed=7)
    jobs, failed = read(tmp_path, "\ufeff红灯笼，蓝色背景\n\n  月饼 \n", ".txt", base)
    assert jobs == [
        Job(Path("out/00000.png"), Request(prompt="红灯笼，蓝色背景", negative="模糊", seed=7)),
        Job(Path("out/00001.png"), Request(prompt="月饼", negative="模糊", seed=8)),
    ]
    assert not failed
    jobs, _ = read(tmp_path, "红灯笼\n月饼\n", ".txt", base, count=2)
    assert [(str(job.path), job.request.seed) for job in jobs] == [
        ("out/00000-0.png", 7),
        ("out/00000-1.png", 8),
        ("out/00001-0.png", 9),
        ("out/00001-1.png", 10),
    ]


def test_objects_say_their_own(tmp_path):
    rows = [{"prompt": "龙", "negative": "", "seed": 5}, {"prompt": "龙", "prompt_en": "ink", "steps": 3}]
    content = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    jobs, _ = read(tmp_path, content, base=Request(negative="模糊", negative_en="ugly"))
    assert [job.request for job in jobs] == [
        Request(prompt="龙", seed=5, negative_en="ugly"),
        Request(prompt="龙", seed=1, negative="模糊", prompt_en="ink", negative_en="ugly", steps=3),
    ]


@pytest.mark.parametrize("code", [0x0B, 0x0C, 0x1C, 0x1D, 0x1E, 0x85, 0x2028, 0x2029])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_only_line_feeds_and_carriage_returns_end_a_line(tmp_path, code, end):
    wanted = [f"红灯笼{chr(code)}蓝色背景", "月饼"]
    for bom in ("", "\ufeff"):
        jobs, failed = read(tmp_path, bom + end.join([*wanted, ""]), ".txt")
        assert (prompts(jobs), failed) == (wanted, [])
        jobs, failed = read(tmp_path, bom + end.join(["prompt", *wanted, ""]), ".csv")
        assert (prompts(jobs), failed) == (wanted, [])
        if code >= 0x85:  # JSON writes the others as escapes
            lines = [json.dumps({"prompt": prompt}, ensure_ascii=False) for prompt in wanted]
            jobs, failed = read(tmp_path, bom + end.join([*lines, ""]), ".jsonl")
            assert (prompts(jobs), failed) == (wanted, [])


@pytest.mark.parametrize("ending", [".jsonl", ".JSONL", ".Jsonl", ".ndjson"])
def test_endings_in_capitals_are_the_same(tmp_path, ending):
    assert read(tmp_path, '{"prompt": "龙", "seed": 5}', ending)[0][0].request.seed == 5


def test_lines_of_blanks_count_for_nothing(tmp_path):
    jobs, _ = read(tmp_path, "\n \t\n\u3000\u2028\n龙\n\x1f\n月饼", ".txt")
    assert [(str(job.path), job.request.prompt, job.where) for job in jobs] == [
        ("out/00000.png", "龙", "line 4"), ("out/00001.png", "月饼", "line 6"),
    ]  # fmt: skip
    for ending in (".txt", ".jsonl", ".csv"):
        with pytest.raises(UserError, match="holds no prompt"):
            read(tmp_path, "\ufeff\n\u3000\n" if ending != ".csv" else "prompt\n\n", ending)


ODD = {
    "{": "is not JSON",
    "[]": "has no prompt",
    "null": "has no prompt",
    '{"prompt": ""}': "has no prompt",
    '{"prompt": null}': "says that prompt is None; give a text",
    '{"prompt": ["a"]}': "says that prompt is ['a']; give a text",
    '{"prompt": "a", "seed": true}': "says that seed is True; give a whole number",
    '{"prompt": "a", "seed": 1.0}': "says that seed is 1.0; give a whole number",
    '{"prompt": "a", "seed": "1"}': "says that seed is '1'; give a whole number",
    '{"prompt": "a", "seed": NaN}': "says that seed is nan",
    '{"prompt": "a", "seed": 1e30}': "says that seed is 1e+30",
    '{"prompt": "a", "seed": 99999999999999999999999}': "asks for seed 99999999999999999999999: give a whole",
    '{"prompt": "a", "seed": 9223372036854775808}': "asks for seed 9223372036854775808",
    '{"prompt": "a", "seed": -1}': "asks for seed -1",
    '{"prompt": "a", "seed": ' + "9" * 5000 + "}": "is not JSON",
    '{"prompt": "a", "guidence": 3}': "says 'guidence'; allowed are prompt, negative",
    '{"prompt": "a", "guidance": "3"}': "says that guidance is '3'; give a number",
    '{"prompt": "a", "sampler": "Eular"}': "unknown sampler 'Eular'",
    '{"prompt": "a", "steps": 0}': "asks for steps 0",
    '{"prompt": "a", "count": 0}': "says that count is 0",
    '{"prompt": "a", "restore_faces": true}': "says 'restore_faces'; which is not done here",
    '{"prompt": "a", "cfg_scale": 3, "guidance": 4}': "says guidance twice",
    '{"prompt": "a", "\\u001b[2J": 3}': "says '\\\\x1b[2J'; allowed",
    '{"prompt": "龙\\ud83d"}': "is no text: prompt '龙\\ud83d' holds half a character",
    '{"prompt": "龙", "negative_en": "\\udcff"}': "is no text",
    '{"prompt": ' + "[" * 100_000: "is not JSON",
    '{"prompt": "a"} {"prompt": "b"}': "is not JSON",
    '{"prompt": "a\tb"}': "is not JSON",
    '\ufeff{"prompt": "a"}': "is not JSON",
    '["a", "b"]': "is a list of 2; a row of BDM-870 has 7 texts",
}


@pytest.mark.parametrize("line", ODD, ids=range(len(ODD)))
def test_an_odd_line_is_named_and_ends_no_other(tmp_path, line):
    good = '{"prompt": "月饼"}'
    jobs, failed = read(tmp_path, f"{good}\n{line}\n{good}\n")
    assert [(str(job.path), job.request.prompt, job.request.seed, job.where) for job in jobs] == [
        ("out/00000.png", "月饼", 0, "line 1"), ("out/00002.png", "月饼", 2, "line 3"),
    ]  # fmt: skip
    (failure,) = failed
    assert failure.what == "line 2"
    assert ODD[line] in failure.why
    assert len(failure.why) < 500


#: The same five pictures, in all forms.
ROWS = [
    {"prompt": "红灯笼，蓝色背景", "seed": 5},
    {"prompt": 'a "quoted", one', "seed": 6, "negative": "模糊", "guidance": 3.5},
    {"prompt": "龙", "seed": 7, "prompt_en": "ink, style", "steps": 3, "sampler": "Euler a"},
    {"prompt": "月饼", "seed": 8, "width": 64, "height": 72, "clip_skip": 2},
    {"prompt": "(饺子:1.2)\\", "seed": 9, "file": "餃子"},
]


def line_of(row):
    named = {"negative": "negative_prompt", "guidance": "cfg_scale", "sampler": "sampler_name"}

    def quoted(text):
        return '"' + str(text).replace("\\", "\\\\").replace('"', '\\"') + '"'

    return " ".join(f"--{named.get(key, key)} {quoted(value)}" for key, value in row.items())


def table_of(rows, delimiter=","):
    names = list(dict.fromkeys(key for row in rows for key in row))
    out = io.StringIO()
    writer = csv.writer(out, delimiter=delimiter)
    writer.writerow(names)
    writer.writerows([row.get(name, "") for name in names] for row in rows)
    return out.getvalue()


FORMS = {
    ".txt": lambda rows: "\n".join(map(line_of, rows)),
    ".json": lambda rows: json.dumps(rows, ensure_ascii=False, indent=1),
    ".jsonl": lambda rows: "\n".join(json.dumps(row, ensure_ascii=False) for row in rows),
    ".csv": table_of,
    ".tsv": lambda rows: table_of(rows, "\t"),
}
ENCODINGS = ["utf-8", "utf-8-sig", "utf-16", "gb18030"]


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("ending", FORMS)
def test_all_forms_and_encodings_ask_for_the_same(tmp_path, ending, encoding):
    jobs, failed = read(tmp_path, FORMS[ending](ROWS).encode(encoding), ending)
    assert not failed
    wanted, _ = read(tmp_path, FORMS[".jsonl"](ROWS))
    assert jobs == wanted
    assert [job.request.prompt for job in jobs] == [row["prompt"] for row in ROWS]
    assert jobs[4].path == Path("out/餃子.png")
    assert (jobs[2].request.sampler, jobs[2].request.steps) == ("Euler a", 3)


def test_bytes_of_another_encoding_are_named(tmp_path):
    jobs, failed = read(tmp_path, "龙\n".encode() + "月饼\n".encode("gbk") + "红包\n".encode(), ".txt")
    assert prompts(jobs) == ["龙", "红包"]
    assert [f.what for f in failed] == ["line 2"]
    assert "is no UTF-8" in failed[0].why
    table = b"prompt,seed\n" + "龙,1\n".encode() + "月饼,2\n".encode("gbk") + "红包,3\n".encode()
    jobs, failed = read(tmp_path, table, ".csv")
    assert prompts(jobs) == ["龙", "红包"]
    assert [f.what for f in failed] == ["line 3"]


def test_a_short_line_of_gb18030_that_is_utf_8_by_chance(tmp_path):
    """The lines vote: 墨木 in GB18030 is UTF-8 too."""
    wanted = ["墨木", "红灯笼，蓝色背景", "月饼"]
    assert "墨木".encode("gbk").decode("utf-8") != "墨木"
    jobs, failed = read(tmp_path, "\n".join(wanted).encode("gbk"), ".txt")
    assert (prompts(jobs), failed) == (wanted, [])


def test_files_that_cannot_be_read(tmp_path):
    for place in (tmp_path, tmp_path / "none", tmp_path / ("x" * 5000)):
        with pytest.raises(UserError, match="cannot be read"):
            read_prompt_file(place)
    with pytest.raises(UserError, match="begins as UTF-16 and is none"):
        read(tmp_path, b"\xff\xfe\x00", ".txt")
    with pytest.raises(UserError, match="is not JSON"):
        read(tmp_path, "[{", ".json")
    with pytest.raises(UserError, match="none of which is prompt"):
        read(tmp_path, "seed,text\n1,龙\n", ".csv")


def test_rows_of_a_list_are_named(tmp_path):
    jobs, failed = read(tmp_path, '["月饼", {"promt": "龙"}, 3, {"prompt": "龙"}]', ".json")
    assert prompts(jobs) == ["月饼", "龙"]
    assert [failure.what for failure in failed] == ["item 2", "item 3"]
    assert jobs[1].path == Path("out/00003.png")
    assert prompts(read(tmp_path, '{"prompt": "龙"}', ".json")[0]) == ["龙"]


TABLES = {
    "prompt,seed\n龙,x\n": "line 2 says that seed is 'x'; give a whole number",
    "prompt,seed\n龙,1,2\n": "line 2 has 3 cells and the first line 2",
    "prompt,sead\n龙,1\n": "line 2 says 'sead'",
    "prompt,seed\n,1\n": "line 2 has no prompt",
}


@pytest.mark.parametrize("table", TABLES)
def test_rows_of_a_table_are_named_by_their_lines(tmp_path, table):
    (failure,) = read(tmp_path, table, ".csv")[1]
    assert TABLES[table] in str(failure)


def test_tables_of_other_programs(tmp_path):
    assert prompts(read(tmp_path, "提示词;种子\n龙;1\n", ".csv")[0]) == ["龙"]
    jobs, _ = read(tmp_path, 'prompt,seed\n"两\n行",7.0\n虎,\n', ".csv", Request(seed=3))
    assert [(job.request.prompt, job.request.seed, job.where) for job in jobs] == [
        ("两\n行", 7, "line 2"),
        ("虎", 4, "line 4"),
    ]


LINES = {
    "--prompt 龙 --seed": "has no value behind --seed",
    "--prompt 龙 虎": "has '虎' where an option should be",
    '--prompt "龙': "cannot be read (No closing quotation)",
    "--seed 5": "has no prompt",
    "--prompt 龙 --prompt 虎": "says --prompt twice",
    "--prompt 龙 --styles anime": "says 'styles'; which is not done here",
    "--prompt 龙 --steps many": "says that steps is 'many'; give a whole number",
}


@pytest.mark.parametrize("line", LINES)
def test_options_that_cannot_be_read(tmp_path, line):
    (failure,) = read(tmp_path, line, ".txt")[1]
    assert LINES[line] in failure.why


def test_a1111_lines(tmp_path):
    lines = [
        '--prompt "红灯笼, (蓝色背景:1.2)" --negative_prompt "模糊" --steps 12 --cfg_scale 5.5 --seed 3',
        "--prompt=龙 --n_iter 2 --batch_size 2 --seed -1 --do_not_save_grid --sampler_name 'Euler a'",
        "a prompt with --dashes in it",
    ]
    jobs, failed = read(tmp_path, "\n".join(lines), ".txt")
    assert not failed
    first, *four, last = jobs
    assert first.request == Request(
        prompt="红灯笼, (蓝色背景:1.2)", negative="模糊", steps=12, guidance=5.5, seed=3
    )
    assert [(job.request.prompt, job.request.seed, job.request.sampler) for job in four] == [
        ("龙", 1 + i, "Euler a") for i in range(4)
    ]
    assert [job.path.name for job in four] == [f"00001-{i}.png" for i in range(4)]
    assert last.request.prompt == "a prompt with --dashes in it"


def test_rows_of_bdm_870(tmp_path):
    rows = [
        ["001.png", "红灯笼", "red lantern", "一个红灯笼", "a red lantern", "concept", "物"],
        ["002.png", "龙", "dragon", "一条龙", "a dragon", "concept", "兽"],
        ["x", "y"],
    ]
    for ending, content in ((".json", json.dumps(rows)), (".jsonl", "\n".join(map(json.dumps, rows)))):
        jobs, failed = read(tmp_path, content, ending)
        assert [(job.path.name, job.request.prompt, job.request.prompt_en) for job in jobs] == [
            ("001.png", "红灯笼", ""), ("002.png", "龙", ""),
        ]  # fmt: skip
        assert "is a list of 2; a row of BDM-870" in failed[0].why
        jobs, _ = read(tmp_path, content, ending, bdm870=BDM870(long=True, translations=True))
        assert [(job.request.prompt, job.request.prompt_en) for job in jobs] == [
            ("一个红灯笼", "a red lantern"), ("一条龙", "a dragon"),
        ]  # fmt: skip


def test_seeds_that_run_over_are_their_rows_failures(tmp_path):
    last = 2**63 - 1
    jobs, failed = read(tmp_path, f'{{"prompt": "龙", "seed": {last}}}\n{{"prompt": "龙"}}', count=2)
    assert failed == [Failure("line 1", f"asks for seed {last + 1}: give a whole number from 0 to {last}")]
    assert [(str(job.path), job.request.seed) for job in jobs] == [
        ("out/00001-0.png", 2),
        ("out/00001-1.png", 3),
    ]


def test_a_line_with_nothing_but_ascii_controls_is_a_prompt_like_any_other(tmp_path):
    jobs, failed = read(tmp_path, "\x00\x1b[2J\x7f\n", ".txt")
    assert prompts(jobs) == ["\x00\x1b[2J\x7f"]
    assert not failed


def test_the_official_translations_come_with_a_warning(tmp_path, caplog):
    row = [["a.png", "龙", "a dragon", "一条龙", "a long dragon", "t", "c"]]
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(row), encoding="utf-8")
    arguments = ["infer", "--prompts", str(path), "--out", str(tmp_path / "out")]
    for more in ([], ["--translations"]):
        (job,) = file_jobs(parse([*arguments, *more]), Request(), [])
        assert job.request.prompt_en == ("a dragon" if more else "")
        assert ("trained beside an empty English prompt" in caplog.text) == bool(more)
