"""Files made to harm: nothing is executed, nothing hangs, and one error names the file."""

import io
import os
import pickle
import random
import subprocess
import sys
import zipfile

import pytest
import torch
from safetensors.torch import save_file

from bdm.errors import UserError
from bdm.formats.identify import describe_file
from bdm.weights import read_weights


class Call:
    """Pickles into a call of ``function(*arguments)`` on loading."""

    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments


class State:
    """Pickles into an object whose state is set by a hook of the named class."""

    def __reduce__(self):
        return subprocess.Popen, (["true"],), {"x": 1}


def opcodes(*names):
    """Pickles of protocol 0 and 4 that look a global up in ways of their own."""
    return [f"c{module}\n{name}\n(Vtouch harmed\ntR.".encode() for module, name in names]


def harmful():
    objects = [
        Call(os.system, "touch harmed"), Call(eval, "open('harmed', 'w')"), Call(exec, "open('harmed', 'w')"),
        Call(open, "harmed", "w"), Call(__import__, "harmed"), Call(subprocess.call, ["touch", "harmed"]),
        Call(torch.load, "harmed"), Call(torch.hub.load, "harmed", "x"), Call(pickle.loads, b"cos\nsystem\n(Vtouch harmed\ntR."),
        State(),
    ]  # fmt: skip
    plain = [pickle.dumps({"state_dict": {"a": thing}}, protocol) for thing in objects for protocol in (0, 2, 4)]
    names = [
        ("os", "system"), ("posix", "system"), ("nt", "system"), ("builtins", "eval"), ("__builtin__", "eval"),
        ("runpy", "run_path"),
        ("torch.serialization", "load"), ("torch._utils", "_import_dotted_name"), ("torch.jit", "load"), ("operator", "attrgetter"),
        ("functools", "partial"), ("collections", "__builtins__"), ("collections.OrderedDict", "__reduce__"),
        ("pytorch_lightning.callbacks.model_checkpoint", "ModelCheckpoint.__init__"), ("torch", "nn.Module"),
    ]  # fmt: skip
    calls = opcodes(*names)
    stack_global = [
        b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x0ctouch harmed\x85R.",
        b"\x80\x02\x82\x01.",
        b"(S'touch harmed'\nios\nsystem\n.",
    ]
    return [*plain, *calls, *stack_global]


@pytest.mark.parametrize("archive", [False, True])
def test_nothing_in_a_pickle_is_executed(tmp_path, monkeypatch, archive):
    monkeypatch.chdir(tmp_path)
    for i, content in enumerate(harmful()):
        path = tmp_path / f"{i}.ckpt"
        if archive:
            with zipfile.ZipFile(path, "w") as file:
                file.writestr("archive/data.pkl", content)
                file.writestr("archive/version", "3")
                file.writestr("archive/byteorder", "little")
        else:
            path.write_bytes(content)
        with pytest.raises(UserError, match=path.name):
            read_weights(path)
        with pytest.raises(UserError, match=path.name):
            read_weights(path, header_only=True)
    assert not (tmp_path / "harmed").exists()


def test_stand_ins_only_keep_what_they_get(tmp_path):
    """The classes that old files name load as empty shells: their own code is not there to run."""
    content = b"cpytorch_lightning.callbacks.model_checkpoint\nModelCheckpoint\n(Vtouch harmed\ntR."
    (tmp_path / "a.ckpt").write_bytes(content)
    with pytest.raises(UserError, match=r"a\.ckpt"):
        read_weights(tmp_path / "a.ckpt")
    assert "pytorch_lightning" not in sys.modules


def test_compressed_archive_is_refused(tmp_path):
    path = tmp_path / "bomb.pt"
    torch.save({"a": torch.zeros(1000, 1000)}, tmp_path / "plain.pt")
    with zipfile.ZipFile(tmp_path / "plain.pt") as plain, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as bomb:
        for entry in plain.infolist():
            bomb.writestr(entry.filename, plain.read(entry))
    assert path.stat().st_size < 20_000
    with pytest.raises(UserError, match="compressed archive"):
        read_weights(path)


def test_views_that_claim_more_than_the_file(tmp_path):
    torch.save({"a": torch.zeros(1).expand(100_000_000)}, tmp_path / "a.pt")
    with pytest.raises(UserError, match="larger than the file"):
        read_weights(tmp_path / "a.pt")


@pytest.mark.parametrize("cut", [0, 4, 7, 8, 9, 60, -1])
def test_truncated_safetensors(tmp_path, cut):
    path = tmp_path / "a.safetensors"
    save_file({"a": torch.zeros(8, 8)}, path)
    path.write_bytes(path.read_bytes()[:cut])
    for header_only in (True, False):
        with pytest.raises(UserError, match="not a whole safetensors file"):
            read_weights(path, header_only)


@pytest.mark.parametrize("length", [0, 1, 10**6, 2**40, 2**63, 2**64 - 1])
def test_header_lengths_that_lie(tmp_path, length):
    path = tmp_path / "a.safetensors"
    path.write_bytes(length.to_bytes(8, "little") + b"{" * 64)
    with pytest.raises(UserError, match="not a whole safetensors file"):
        describe_file(path)


def seeds(folder):
    save_file(
        {"lora_unet_mid_block_attentions_0_proj_in.lora_down.weight": torch.randn(2, 8)},
        folder / "a.safetensors",
        {"ss_network_dim": "2"},
    )
    torch.save({"string_to_param": {"*": torch.randn(2, 8)}, "name": "x"}, folder / "b.pt")
    torch.save({"state_dict": {"a.weight": torch.randn(2, 8)}}, folder / "c.ckpt", _use_new_zipfile_serialization=False)
    return [(path.suffix, path.read_bytes()) for path in sorted(folder.iterdir())]


def mutate(content, dice):
    content = bytearray(content)
    for _ in range(dice.choice((1, 1, 2, 4, 16))):
        kind, at = dice.randrange(5), dice.randrange(len(content))
        if kind == 0:
            content[at] = dice.randrange(256)
        elif kind == 1:
            del content[at : at + dice.choice((1, 8, 200))]
        elif kind == 2:
            content[at:at] = bytes(dice.randrange(256) for _ in range(dice.choice((1, 8))))
        elif kind == 3:
            content[at : at + 8] = dice.choice((2**63 - 1, 2**64 - 1, 0, 2**32)).to_bytes(8, "little")
        else:
            content[at : at + 1] = bytes([content[at] ^ (1 << dice.randrange(8))])
        if not content:
            return b""
    return bytes(content)


@pytest.mark.parametrize("number", range(4))
def test_mutated_files_are_read_or_refused(tmp_path, number):
    """3,000 mutations: every one is either read or refused with one error, in a process that stays small and alive."""
    (tmp_path / "seeds").mkdir()
    dice = random.Random(number)
    originals = seeds(tmp_path / "seeds")
    import resource

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    read = refused = 0
    for _ in range(750):
        suffix, content = dice.choice(originals)
        path = tmp_path / f"m{suffix}"
        path.write_bytes(mutate(content, dice))
        try:
            describe_file(path)
            file = read_weights(path)
            assert sum(t.numel() * t.element_size() for t in file.tensors.values()) <= 2 * path.stat().st_size
            io.StringIO().write(str({k: float(t.double().sum()) for k, t in file.tensors.items() if t.numel()}))
            read += 1
        except UserError as error:
            refused += path.name in str(error)
        path.unlink()
    assert min(read, refused) > 20
    assert read + refused == 750
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # KiB: allocator slack, not file-sized claims
