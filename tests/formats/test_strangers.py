"""Files that are plainly no weights are called by what they are."""

import io
import pickle
import zipfile

import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from safetensors.torch import save

from bdm.errors import UserError
from bdm.formats.header import read_header
from bdm.formats.identify import describe_file
from bdm.formats.strangers import stranger
from bdm.formats.weights import read_weights


def picture(form, **options):
    file = io.BytesIO()
    Image.new("RGB", (8, 8), (200, 40, 40)).save(file, form, **options)
    return file.getvalue()


def noted(text):
    info = PngInfo()
    info.add_text("parameters", text)
    return picture("PNG", pnginfo=info)


def archive(*names):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as made:
        for name in names:
            made.writestr(name, "x")
    return file.getvalue()


STRANGERS = {
    "png": (picture("PNG"), "a picture (PNG); give a file of weights"),
    "a1111": (noted("a cat\nSteps: 20"), "a picture (PNG), whose text `parameters` tells how it was made"),
    "jpeg": (picture("JPEG"), "a picture (JPEG)"),
    "gif": (picture("GIF"), "a picture (GIF)"),
    "webp": (picture("WEBP"), "a picture (WebP)"),
    "tiff": (picture("TIFF"), "a picture (TIFF)"),
    "lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n", "`git lfs pull`"),
    "html": (b"\n<!DOCTYPE html>\n<html><body>Sign in</body></html>", "a web page"),
    "html2": (b"\xef\xbb\xbf<HTML><head>", "a web page"),
    "xml": (b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>', "a web page"),
    "zip": (archive("a.safetensors", "readme.txt"), "a zip archive of 2 files, such as 'a.safetensors'"),
    "zip2": (archive(), "file"),
    "gzip": (b"\x1f\x8b\x08\x00rest", "a gzip archive; unpack it"),
    "7z": (b"7z\xbc\xaf\x27\x1c\x00\x04", "a 7z archive"),
    "rar": (b"Rar!\x1a\x07\x01\x00", "a RAR archive"),
    "pdf": (b"%PDF-1.7\n%\xe2\xe3", "a PDF"),
    "gguf": (b"GGUF\x03\x00\x00\x00\x01\x00", "a GGUF file"),
    "json": (b'{"error": "Unauthorized"}', "a text that begins with '{\"error\": \"Unauthorized\"}'"),
    "yaml": ("模型: 龙\n".encode() * 300, "a text that begins with '模型: 龙'"),
    "long": (b"word " * 10_000, "a text that begins with"),
    "empty": (b"", "an empty file"),
}  # fmt: skip


@pytest.mark.parametrize("name", STRANGERS)
@pytest.mark.parametrize("ending", ["safetensors", "ckpt", "pt", "png", "zip"])
def test_they_are_called_by_what_they_are(tmp_path, name, ending):
    content, message = STRANGERS[name]
    path = tmp_path / f"x.{ending}"
    path.write_bytes(content)
    for read in (read_header, read_weights, describe_file):
        with pytest.raises(UserError) as error:
            read(path)
        assert message in str(error.value)
        assert str(path) in str(error.value)
        assert "\n" not in str(error.value)
        assert len(str(error.value)) < 400


@pytest.mark.parametrize("old", [False, True])
def test_weights_are_no_strangers(tmp_path, old):
    tensors = {"a.weight": torch.randn(3, 4), "v": torch.zeros(2)}
    path = tmp_path / "x.png"  # files are renamed in the wild
    torch.save(tensors, path, _use_new_zipfile_serialization=not old)
    assert stranger(path) == ""
    assert read_weights(path).tensors.keys() == tensors.keys()
    path.write_bytes(save(tensors))
    assert read_weights(path).tensors.keys() == tensors.keys()


@pytest.mark.parametrize(
    "content",
    [pickle.dumps({"a": 1}), b"\x00" * 100, b"\x10\x00\x00\x00\x00\x00\x00\x00{}", b"\xff\xfe\xfa" * 9],
)  # fmt: skip
def test_what_is_not_known_is_not_guessed(tmp_path, content):
    path = tmp_path / "x.pt"
    path.write_bytes(content)
    assert stranger(path) == ""


@pytest.mark.parametrize("cut", [30, 200, 400])
def test_a_torn_torch_file_stays_a_damaged_one(tmp_path, cut):
    path = tmp_path / "x.pt"
    torch.save({"a": torch.randn(30)}, path)
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(UserError, match="damaged or not a torch file"):
        read_weights(path)


def test_texts_in_them_do_not_act_on_the_terminal(tmp_path):
    path = tmp_path / "x.ckpt"
    path.write_text("hello \u202e\u2066 world")
    with pytest.raises(UserError) as error:
        read_weights(path)
    assert str(error.value).isprintable()
