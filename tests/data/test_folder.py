import json

import pytest
from PIL import Image

from bdm.data.folder import FolderSource
from bdm.data.source import UnreadableExample
from bdm.errors import UserError


@pytest.fixture
def folder(tmp_path):
    rows = []
    for i in range(10):
        picture = Image.new("RGB", (40, 20), (10 * i, 0, 0))
        picture.paste((0, 255, 0), (0, 0, 10, 20))  # what a centre crop of the wide picture cuts off
        picture.save(tmp_path / f"{i}.png")
        rows.append(json.dumps({"file_name": f"{i}.png", "text": f"图{i}"}, ensure_ascii=False))
    (tmp_path / "metadata.jsonl").write_text("\n".join(rows), encoding="utf-8")
    return tmp_path


def test_pictures_are_cropped_not_padded_and_validation_is_apart(folder):
    source = FolderSource(folder, size=16, validation=2)
    assert len(source) == 8
    example = source[3]
    assert example.pixels.shape == (3, 16, 16)
    assert example.pixels[1].max() < 32, "but for the edge that resizing blurs"
    assert example.caption == source.caption(3)
    captions = {source.caption(i) for i in range(8)}
    kept = source.validation
    assert len(kept) == 2
    assert not captions & {kept.caption(i) for i in range(2)}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such file"),
        ("", "has 0 captions"),
        ("{", "line 1 is not a JSON object"),
        ('["a"]', "line 1 is not a JSON object"),
        (
            '{"file_name": "a.png", "caption": "x"}',
            "no field 'text'; it has file_name, caption; set data.caption",
        ),
    ],
)
def test_folders_without_captions_are_named(folder, content, message):
    metadata = folder / "metadata.jsonl"
    metadata.unlink() if content is None else metadata.write_text(content)
    with pytest.raises(UserError, match=message):
        FolderSource(folder)


def test_a_damaged_picture_is_named(folder):
    (folder / "5.png").write_bytes(b"not a picture")
    source = FolderSource(folder, size=16, validation=1)
    index = next(i for i in range(len(source)) if source.rows[i]["file_name"] == "5.png")
    with pytest.raises(UnreadableExample, match=r"5\.png: UnidentifiedImageError"):
        source[index]


def test_only_line_feeds_end_a_row(folder):
    """JSON may hold U+2028 and others that Unicode calls ends of lines; editors may begin with a mark."""
    metadata = folder / "metadata.jsonl"
    text = metadata.read_text(encoding="utf-8").replace("图3", "a\u2028b\x85c")
    metadata.write_text("\ufeff" + text.replace("\n", "\r\n"), encoding="utf-8")
    source = FolderSource(folder, size=16, validation=2)
    assert "a\u2028b\x85c" in {source.caption(i) for i in range(8)}
