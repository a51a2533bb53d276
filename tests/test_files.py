"""What is written is there whole or not at all."""

import os

import pytest

from bdm import files
from bdm.files import atomic_write, write_json

LONG = "字" * 84 + ".ab"  # 255 bytes, the most that a name may have


def fill(place, kind, content):
    """A file, or a folder with a file in a folder, that holds ``content``."""
    if kind == "folder":
        (place / "in").mkdir(parents=True)
        place = place / "in" / "content"
    place.write_text(content)


def read(place, kind):
    return (place / "in" / "content" if kind == "folder" else place).read_text()


@pytest.mark.parametrize("name", ["a.txt", ".hidden", LONG])
@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_block_that_ends_replaces_what_was_there(tmp_path, kind, name):
    for content in ("first", "second"):
        with atomic_write(tmp_path / name) as partial:
            fill(partial, kind, content)
            assert partial.parent == tmp_path
            assert content == "first" or read(tmp_path / name, kind) == "first"
        assert read(tmp_path / name, kind) == content
        assert [path.name for path in tmp_path.iterdir()] == [name]


def fail_halfway(path, kind, error):
    with atomic_write(path) as partial:
        fill(partial, kind, "half")
        raise error


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
@pytest.mark.parametrize("kind", ["file", "folder"])
def test_after_any_exception_everything_is_as_before(tmp_path, kind, error):
    with pytest.raises(error):
        fail_halfway(tmp_path / "new", kind, error)
    assert not any(tmp_path.iterdir())
    fill(tmp_path / "old", kind, "whole")
    with pytest.raises(error):
        fail_halfway(tmp_path / "old", kind, error)
    assert [path.name for path in tmp_path.iterdir()] == ["old"]
    assert read(tmp_path / "old", kind) == "whole"


@pytest.mark.parametrize("kind", ["file", "folder"])
@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_what_fails_at_the_end_leaves_what_was_there(tmp_path, monkeypatch, kind, call):
    fill(tmp_path / "old", kind, "whole")
    real, calls = getattr(os, call), []

    def fail(*arguments):
        """Of a folder's two renames the second fails: the old one has stepped aside by then."""
        calls.append(arguments)
        if len(calls) == (2 if (kind, call) == ("folder", "replace") else 1):
            raise OSError(28, "No space left on device")
        return real(*arguments)

    monkeypatch.setattr(files.os, call, fail)
    with pytest.raises(OSError, match="No space"), atomic_write(tmp_path / "old") as partial:
        fill(partial, kind, "half")
    assert [path.name for path in tmp_path.iterdir()] == ["old"]
    assert read(tmp_path / "old", kind) == "whole"


def test_everything_is_synced_before_it_is_renamed(tmp_path, monkeypatch):
    done, real = [], os.replace
    monkeypatch.setattr(files.os, "fsync", lambda descriptor: done.append(os.fstat(descriptor).st_ino))
    monkeypatch.setattr(files.os, "replace", lambda a, b: (done.append("renamed"), real(a, b)))
    with atomic_write(tmp_path / "new") as partial:
        fill(partial, "folder", "whole")
    new = tmp_path / "new"
    assert done == [
        *((new / place).stat().st_ino for place in ("in/content", "in", "")),
        "renamed",
        tmp_path.stat().st_ino,
    ]


def test_what_a_kill_left_is_no_part_of_the_next(tmp_path):
    with atomic_write(tmp_path / "model") as partial:
        name = partial.name
        partial.mkdir()
    (tmp_path / name).mkdir()
    (tmp_path / name / "stale").write_text("")
    with atomic_write(tmp_path / "model") as partial:
        fill(partial, "folder", "whole")
    assert [path.name for path in (tmp_path / "model").iterdir()] == ["in"]


def test_processes_that_share_a_place_have_names_of_their_own(tmp_path, monkeypatch):
    with atomic_write(tmp_path / "kept", shared=True) as first:
        first.write_text("first")
        monkeypatch.setattr(files.os, "getpid", lambda: -1)
        with atomic_write(tmp_path / "kept", shared=True) as second:
            second.write_text("second")
        assert first != second
        assert (tmp_path / "kept").read_text() == "second"
    assert (tmp_path / "kept").read_text() == "first"


def test_texts_are_utf_8_whatever_the_locale(tmp_path):
    write_json(tmp_path / "a.json", {"字": "灯笼"})
    assert (tmp_path / "a.json").read_bytes() == '{\n  "字": "灯笼"\n}\n'.encode()
