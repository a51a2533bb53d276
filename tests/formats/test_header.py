"""Headers read without PyTorch say what PyTorch reads."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from bdm.errors import UserError
from bdm.formats.header import DTYPE_NAMES, TensorHeader, read_header
from bdm.formats.identify import describe_file
from bdm.formats.weights import read_weights

ROOT = Path(__file__).parents[2]


@pytest.fixture
def every_precision(tmp_path):
    dtypes = [getattr(torch, name) for name in DTYPE_NAMES.values()]
    tensors = {f"t{i}": torch.zeros(i, 2, 3).to(dtype) for i, dtype in enumerate(dtypes)}
    save_file(tensors | {"scalar": torch.tensor(1.0)}, tmp_path / "x.safetensors", {"ss_a": "b"})
    return tmp_path / "x.safetensors"


def test_headers_are_those_of_the_tensors(every_precision):
    header, whole = read_header(every_precision), read_weights(every_precision)
    assert header.metadata == whole.metadata == {"ss_a": "b"}
    assert header.tensors.keys() == whole.tensors.keys()
    for name, tensor in whole.tensors.items():
        found = header.tensors[name]
        assert isinstance(found, TensorHeader)
        assert (found.shape, f"torch.{found.dtype}") == (tuple(tensor.shape), str(tensor.dtype))
        assert (found.ndim, found.numel()) == (tensor.ndim, tensor.numel())


def test_empty_tensors_on_the_meta_device_have_them_too(every_precision):
    header, meta = read_header(every_precision), read_weights(every_precision, header_only=True)
    assert all(tensor.is_meta for tensor in meta.tensors.values())
    for name, tensor in meta.tensors.items():
        assert (header.tensors[name].shape, f"torch.{header.tensors[name].dtype}") == (
            tuple(tensor.shape), str(tensor.dtype)
        )  # fmt: skip


def test_files_that_are_cut_short_are_refused(every_precision):
    content = every_precision.read_bytes()
    for length in (0, 7, 40, len(content) - 1):
        every_precision.write_bytes(content[:length])
        with pytest.raises(UserError, match="not a whole safetensors file|is an empty file"):
            read_header(every_precision)


def test_pickles_are_described_as_before(tmp_path, every_precision):
    weights = {"a.weight": torch.zeros(2, 3, dtype=torch.float16), "b": torch.zeros(4)}
    torch.save(weights, tmp_path / "x.pt")
    save_file(weights, tmp_path / "y.safetensors")
    pickled, plain = (describe_file(tmp_path / name) for name in ("x.pt", "y.safetensors"))
    same = ("kind", "base", "layout", "tensors", "dtypes")
    assert [pickled[name] for name in same] == [plain[name] for name in same]


def test_inspecting_imports_no_torch(files):
    files["folder"] = ROOT / "assets/emoji"
    sources = [str(path) for path in files.values() if path.suffix == ".safetensors" or path.is_dir()]
    code = (
        "import sys; from bdm.cli import main\n"
        f"assert main(['inspect', *{sources!r}]) == 0\n"
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert all(source in done.stdout for source in sources)
    assert len(sources) > 4
