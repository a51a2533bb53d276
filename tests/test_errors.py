"""Values and paths of others, as messages show them."""

import errno
from fractions import Fraction

import numpy as np
import pytest
import torch

from bdm.errors import LONGEST_MESSAGE, UserError, quoted, refused_paths, whole_number
from bdm.formats.identify import describe_file
from bdm.formats.weights import resolve_folder
from bdm.models.backbone import load_backbone
from bdm.pipeline.groups import as_count, as_seed
from bdm.plugins.kind import finite


class Odd:
    def __repr__(self):
        raise RuntimeError("no")


WHOLE = [
    5, np.int64(5), np.uint8(5), np.array(5), torch.tensor(5), torch.tensor(5, dtype=torch.uint8),
    torch.tensor(5, dtype=torch.int16),
]  # fmt: skip
NO_WHOLE = [
    True, False, np.True_, np.array(True), torch.tensor(True), 5.0, 0.5, np.float32(5), np.array(5.0),
    torch.tensor(5.0), torch.tensor([5, 6]), torch.empty(0, dtype=torch.int64), float("nan"), float("inf"),
    "5", b"5", None, [5], 5j, Fraction(5), Odd(), object(), torch.empty((), dtype=torch.int64, device="meta"),
]  # fmt: skip


@pytest.mark.parametrize("value", WHOLE, ids=repr)
def test_whole_numbers_of_any_library(value):
    assert as_seed(value) == as_count(value) == 5
    assert type(as_seed(value)) is int


@pytest.mark.parametrize("value", NO_WHOLE, ids=lambda value: type(value).__name__)
def test_whatever_else_is_no_seed(value):
    assert whole_number(value) is None
    with pytest.raises(UserError, match="give a whole number from 0 to") as error:
        as_seed(value)
    assert "\n" not in str(error.value)
    if value is not None:  # one picture each
        with pytest.raises(UserError, match="give a whole number from 1 on"):
            as_count(value)


@pytest.mark.parametrize("value", [-1, 2**63, 10**5000, -(10**5000)], ids=["-1", "2^63", "long", "-long"])
def test_seeds_that_torch_does_not_take(value):
    with pytest.raises(UserError, match="give a whole number from 0 to") as error:
        as_seed(value)
    assert len(str(error.value)) < 200


@pytest.mark.parametrize(
    "value",
    [
        True, np.True_, torch.tensor(0.5), "0.8", None, float("nan"), float("-inf"), 1e7, 10**5000,
        np.float32("nan"), Fraction(10**5000), Odd(), [0.5], 1j,
    ],
    ids=lambda value: type(value).__name__,
)  # fmt: skip
def test_strengths_that_are_no_finite_numbers(value):
    with pytest.raises(UserError, match="give one") as error:
        finite(value)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 300


@pytest.mark.parametrize("value", [1, 0.5, np.float32(0.5), np.int64(1), Fraction(1, 2), -3], ids=repr)
def test_strengths_of_any_library(value):
    assert finite(value) == float(value)
    assert type(finite(value)) is float


def test_values_are_shown_cut_and_on_one_line():
    assert quoted("a\nb\x1b") == r"'a\nb\x1b'"
    assert len(quoted("x" * 10_000)) < 70
    assert quoted(10**5000) == "a int that cannot be shown"
    assert quoted(Odd()) == "a Odd that cannot be shown"


def test_messages_end_somewhere():
    message = str(UserError("a\x1b" * 100_000))
    assert message.isprintable()
    assert len(message) < 10 * LONGEST_MESSAGE


LONG = "x" * 5000


@pytest.mark.parametrize(
    "path",
    [LONG, f"{LONG}.safetensors", f"a/{LONG}", f"/tmp/{LONG}/b", "a\0b", "a\0b.safetensors", "a/b\0",
     "/".join("ab" * 3000), f"{'龙' * 90}.safetensors"],
    ids=range(9),
)  # fmt: skip
@pytest.mark.parametrize("use", [describe_file, resolve_folder, load_backbone])
def test_paths_that_no_file_can_have(use, path, tmp_path, monkeypatch):
    from pathlib import Path

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError) as error:
        use(Path(path))
    assert "\n" not in str(error.value)
    assert "\0" not in str(error.value)
    assert len(str(error.value)) < 700


def test_what_the_system_refuses_is_one_line():
    with pytest.raises(UserError, match="a: Permission denied; check the path"), refused_paths("a"):
        raise PermissionError(errno.EACCES, "Permission denied")
    with pytest.raises(UserError, match="b: too odd; check the path"), refused_paths("b"):
        raise OSError("too odd\nfor one line")
