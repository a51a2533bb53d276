"""Files made to harm: nothing is executed, nothing hangs, and one error names the file."""

import io
import json
import math
import os
import pickle
import random
import subprocess
import sys
import unicodedata
import zipfile

import pytest
import torch
from community_files import make_controlnet, mutate
from PIL import Image
from safetensors.torch import save_file

from bdm.bench.memory import peak_memory
from bdm.errors import UserError, first_line, printable
from bdm.formats.adapter import split_adapter
from bdm.formats.checkpoint import CONFIG_KEY, Parts, empty_part, load_controlnet, read_parts
from bdm.formats.hashes import file_hashes
from bdm.formats.identify import describe_file, identify_source
from bdm.formats.names import unet_to_original
from bdm.formats.weights import is_finite, json_object, read_weights, read_weights_folder, refuse_not_finite
from bdm.plugins.controlnet import open_picture


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
        Call(os.system, "touch harmed"),
        Call(eval, "open('harmed', 'w')"),
        Call(exec, "open('harmed', 'w')"),
        Call(open, "harmed", "w"),
        Call(__import__, "harmed"),
        Call(subprocess.call, ["touch", "harmed"]),
        Call(torch.load, "harmed"),
        Call(torch.hub.load, "harmed", "x"),
        Call(pickle.loads, b"cos\nsystem\n(Vtouch harmed\ntR."),
        State(),
    ]
    plain = [
        pickle.dumps({"state_dict": {"a": thing}}, protocol) for thing in objects for protocol in (0, 2, 4)
    ]
    names = [
        ("os", "system"),
        ("posix", "system"),
        ("nt", "system"),
        ("builtins", "eval"),
        ("__builtin__", "eval"),
        ("runpy", "run_path"),
        ("torch.serialization", "load"),
        ("torch._utils", "_import_dotted_name"),
        ("torch.jit", "load"),
        ("operator", "attrgetter"),
        ("functools", "partial"),
        ("collections", "__builtins__"),
        ("collections.OrderedDict", "__reduce__"),
        ("pytorch_lightning.callbacks.model_checkpoint", "ModelCheckpoint.__init__"),
        ("torch", "nn.Module"),
    ]
    calls = opcodes(*names)
    stack_global = [
        b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x0ctouch harmed\x85R.",
        b"\x80\x02\x82\x01.",
        b"(S'touch harmed'\nios\nsystem\n.",
    ]
    return [*plain, *calls, *stack_global]


@pytest.mark.parametrize("ending", [".ckpt", ".safetensors", ".SAFETENSORS", ".Pt"])
@pytest.mark.parametrize("archive", [False, True])
def test_nothing_in_a_pickle_is_executed(tmp_path, monkeypatch, archive, ending):
    monkeypatch.chdir(tmp_path)
    for i, content in enumerate(harmful()):
        path = tmp_path / f"{i}{ending}"
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


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("ending", [".safetensors", ".SAFETENSORS", ".CKPT", ".Pt", ".bin", ""])
def test_a_pickle_under_any_ending_is_read_as_one(tmp_path, ending, old):
    path = tmp_path / f"a{ending}"
    torch.save({"emb_params": torch.ones(2, 768)}, path, _use_new_zipfile_serialization=not old)
    assert describe_file(path)["kind"] == "embedding"
    assert "data hash" not in describe_file(path)
    assert torch.equal(read_weights(path).tensors["emb_params"], torch.ones(2, 768))


@pytest.mark.parametrize("ending", [".SAFETENSORS", ".Safetensors", ".ckpt", ".PT", ""])
def test_safetensors_under_any_ending_is_read_and_hashed_as_such(tmp_path, ending):
    save_file({"emb_params": torch.ones(2, 768)}, tmp_path / "plain.safetensors")
    (tmp_path / f"a{ending}").write_bytes((tmp_path / "plain.safetensors").read_bytes())
    plain, renamed = (describe_file(tmp_path / name) for name in ("plain.safetensors", f"a{ending}"))
    assert "data hash" in plain
    assert renamed == plain | {"trigger": "a"}


def test_hashing_a_file_whose_header_lies_takes_no_memory(tmp_path):
    for length in (2**40, 2**63, 2**64 - 1):
        (tmp_path / "a.safetensors").write_bytes(length.to_bytes(8, "little") + b"{" * 64)
        assert "data hash" not in file_hashes(tmp_path / "a.safetensors")


ODD = "a\x1b[2J\n\u202eb\x07\x85\u2028\ud800".encode("utf-8", "surrogatepass").decode("utf-8", "replace")


def test_texts_of_files_are_shown_without_characters_that_act(tmp_path):
    """A terminal that is told to clear itself, lines that seem to be ours, text that is read backwards."""
    key = f"lora_unet_{ODD}.lora_down.weight"
    texts = {"ss_base_model_version": ODD, "modelspec.title": ODD, "modelspec.trigger_phrase": ODD}
    save_file({key: torch.zeros(2, 8), f"bundle_emb.{ODD}.emb_params": torch.zeros(1, 8)},
              tmp_path / "a.safetensors", texts)  # fmt: skip
    facts = describe_file(tmp_path / "a.safetensors")
    assert len([text for text in facts.values() if "[2J" in text]) == 4
    with pytest.raises(UserError, match=r"match no module") as raised:
        split_adapter(read_weights(tmp_path / "a.safetensors"), {"text_encoder": []})
    for text in (*facts, *facts.values(), str(raised.value)):
        assert not [c for c in text if unicodedata.category(c) in ("Cc", "Cf", "Cs", "Zl", "Zp")], repr(text)


def test_what_is_shown_of_a_text_is_short_and_harmless():
    assert printable("红灯笼　“a” 👩\u200d🔬 é") == "红灯笼　“a” 👩\u200d🔬 é"
    assert printable("a\tb\r\nc") == "a b  c"
    assert printable("\x1b]0;x\x07\x9b\udcff") == r"\x1b]0;x\x07\x9b\udcff"
    assert printable("x" * 100, 10) == "x" * 10 + "…"
    assert str(UserError("a\nerror: b\u202e")) == r"a error: b\u202e"
    assert first_line(ValueError("\x1b[1m\nb")) == r"\x1b[1m"
    for number in range(0x110000):
        shown = printable(chr(number))
        assert chr(number) in "\u200c\u200d" or not [
            c for c in shown if unicodedata.category(c) in ("Cc", "Cf", "Cs", "Zl", "Zp")
        ]


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
    with (
        zipfile.ZipFile(tmp_path / "plain.pt") as plain,
        zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as bomb,
    ):
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
        with pytest.raises(UserError, match="not a whole safetensors file|is an empty file"):
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
    torch.save(
        {"state_dict": {"a.weight": torch.randn(2, 8)}},
        folder / "c.ckpt",
        _use_new_zipfile_serialization=False,
    )
    return [(path.suffix, path.read_bytes()) for path in sorted(folder.iterdir())]


@pytest.mark.parametrize("number", range(4))
def test_mutated_files_are_read_or_refused(tmp_path, number):
    """3,000 mutations: every one is either read or refused with one error, in a process that stays small and
    alive.
    """
    (tmp_path / "seeds").mkdir()
    dice = random.Random(number)
    originals = seeds(tmp_path / "seeds")
    read = refused = 0

    def fuzz():
        nonlocal read, refused
        for _ in range(750):
            suffix, content = dice.choice(originals)
            path = tmp_path / f"m{suffix}"
            path.write_bytes(mutate(content, dice))
            try:
                describe_file(path)
                file = read_weights(path)
                assert (
                    sum(t.numel() * t.element_size() for t in file.tensors.values())
                    <= 2 * path.stat().st_size
                )
                io.StringIO().write(
                    str({k: float(t.double().sum()) for k, t in file.tensors.items() if t.numel()})
                )
                read += 1
            except UserError as error:
                refused += path.name in str(error)
            path.unlink()

    before = peak_memory(lambda: None)  # what is resident now: the process's peak may be an earlier test's
    assert peak_memory(fuzz) - before < 200 << 20, "allocator slack, not sizes that files claim"
    assert min(read, refused) > 20
    assert read + refused == 750


def test_mappings_that_hold_each_other_many_times_end(tmp_path):
    """A few thousand references in a pickle that would be walked 1000^4 times."""
    inner = {"a": torch.zeros(1)}
    for _ in range(4):
        inner = {str(i): inner for i in range(1000)}
    torch.save({"state_dict": inner}, tmp_path / "a.pt")
    assert (tmp_path / "a.pt").stat().st_size < 100_000
    with pytest.raises(UserError, match="more entries"):
        read_weights(tmp_path / "a.pt")


def test_names_that_grow_by_nesting_are_refused(tmp_path):
    torch.save({"x" * 10**6: {str(i): 0 for i in range(1000)}, "a": torch.zeros(1)}, tmp_path / "a.pt")
    with pytest.raises(UserError, match="longer names"):
        read_weights(tmp_path / "a.pt")


def test_keys_that_are_no_names_are_passed_over(tmp_path):
    content = {"a": torch.ones(1), 5: torch.ones(1), ("b", 1): 2, "steps": 7}
    torch.save(content, tmp_path / "a.pt")
    file = read_weights(tmp_path / "a.pt")
    assert (list(file.tensors), file.metadata) == (["a"], {"steps": "7"})


@pytest.mark.filterwarnings("ignore")  # torch deprecates some of these kinds
@pytest.mark.parametrize("kind", ["sparse", "compressed sparse", "complex", "meta", "quantised"])
def test_tensors_that_are_no_plain_weights(tmp_path, kind):
    make = {
        "sparse": lambda: torch.eye(3).to_sparse(),
        "compressed sparse": lambda: torch.eye(3).to_sparse_csr(),
        "complex": lambda: torch.ones(3, dtype=torch.complex64),
        "meta": lambda: torch.empty(3, device="meta"),
        "quantised": lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8),
    }[kind]
    torch.save({"a": make()}, tmp_path / "a.pt")
    with pytest.raises(UserError, match=rf"a\.pt.*{kind.rpartition(' ')[2]}"):
        read_weights(tmp_path / "a.pt")


def test_weights_are_checked_without_a_copy_of_them():
    weights = torch.ones(32 << 20, dtype=torch.float16)
    before = peak_memory(lambda: None)
    assert peak_memory(lambda: refuse_not_finite({"a": weights}, "x")) - before < weights.nbytes
    weights[-1] = float("inf")
    with pytest.raises(UserError, match="a holds NaN"):
        refuse_not_finite({"a": weights}, "x")


@pytest.mark.parametrize(
    "dtype",
    [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2],
)
@pytest.mark.parametrize("count", [1, 7, 100_003])
def test_one_value_that_is_not_finite_is_found_wherever_it_lies(dtype, count):
    largest = torch.finfo(dtype).max
    # With gaps between them, and none may add up beyond the range.
    weights = torch.full((count, 2), largest, dtype=torch.float64).to(dtype)[:, :1]
    assert is_finite(weights)
    for value in (math.nan, math.inf, -math.inf):
        for place in {0, count // 2, count - 1}:
            damaged = weights.clone()
            damaged[place] = torch.tensor(value).to(dtype)  # the largest there is, where there is no infinity
            assert is_finite(damaged) == bool(torch.isfinite(damaged.float()).all())
            assert not is_finite(damaged) or (dtype == torch.float8_e4m3fn and math.isinf(value))


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 100_000, "[1]", "{", "\ud800"])
def test_texts_that_are_no_json_object(tmp_path, text):
    with pytest.raises(UserError, match=r"note.*(cannot be read as JSON|not an object)"):
        json_object(text, "note")


def test_facts_beside_weights_that_cannot_be(tmp_path):
    key = "lora_unet_mid_block_attentions_0_proj_in.lora_down.weight"
    for tags in ('{"a": {"b": Infinity}}', '{"a":' * 100_000, "[]", '{"a": 1}'):
        save_file({key: torch.randn(2, 8)}, tmp_path / "a.safetensors", {"ss_tag_frequency": tags})
        assert "noted trigger words" not in describe_file(tmp_path / "a.safetensors")


def test_folders_whose_json_holds_other_kinds(tmp_path):
    (tmp_path / "config.json").write_text('{"_class_name": []}')
    assert identify_source(tmp_path).kind == "unknown"
    for files in ("[]", '{"a": 1}', "null"):
        (tmp_path / "model.safetensors.index.json").write_text(f'{{"weight_map": {files}}}')
        with pytest.raises(UserError, match="weight_map"):
            read_weights_folder(tmp_path)


def test_pictures_damaged_in_the_middle(tmp_path):
    path = tmp_path / "a.png"
    Image.effect_noise((400, 400), 90).save(path)
    content = path.read_bytes()
    assert content.count(b"IDAT") > 1
    place = content.rindex(b"IDAT")
    path.write_bytes(content[:place] + b"\x00\x01\x02\x03" + content[place + 4 :])
    with pytest.raises(UserError, match=r"a\.png is not a picture"):
        open_picture(path)


@pytest.fixture
def network(unet):
    """A tiny ControlNet's weights and configuration."""
    controlnet = make_controlnet(unet)
    return {key: tensor.contiguous() for key, tensor in controlnet.state_dict().items()}, json.loads(
        controlnet.to_json_string()
    )


@pytest.mark.parametrize(
    "lie",
    [
        {"layers_per_block": 10**6},
        {"layers_per_block": "x"},
        {"transformer_layers_per_block": 10**6},
        {"block_out_channels": [16] * 10**4},
        {"conditioning_embedding_out_channels": [8] * 10**5},
        {"norm_num_groups": 0},
        {"act_fn": []},
    ],
)
def test_configurations_that_ask_for_more_than_the_weights(tmp_path, network, lie):
    weights, config = network
    path = tmp_path / "a.safetensors"
    save_file(weights, path, {CONFIG_KEY: json.dumps({"controlnet": config})})
    load_controlnet(path)
    save_file(weights, path, {CONFIG_KEY: json.dumps({"controlnet": config | lie})})
    with pytest.raises(UserError, match=r"a\.safetensors"):
        load_controlnet(path)


def text_weights(width, layer="0", positions=77):
    return {
        "embeddings.token_embedding.weight": torch.zeros(10, width),
        "embeddings.position_embedding.weight": torch.zeros(positions, width),
        f"encoder.layers.{layer}.mlp.fc1.weight": torch.zeros(4, width),
        "encoder.layers.0.mlp.fc1.weight": torch.zeros(4, width),
    }


@pytest.mark.parametrize(
    ("weights", "config"),
    [
        (text_weights(200), {}),  # not a multiple of its 3 heads
        (text_weights(64, layer="900000"), {}),
        (text_weights(64), {"num_hidden_layers": 10**6}),
        (text_weights(64), {"max_position_embeddings": 10**10}),
        (text_weights(64), {"hidden_act": "no such"}),
        ({}, {"hidden_size": 64}),
    ],
)
def test_text_encoders_that_cannot_be_built(weights, config):
    with pytest.raises(UserError, match=r"a\.ckpt: its text_encoder is no"):
        empty_part("text_encoder", Parts({"text_encoder": weights}, {"text_encoder": config}), "a.ckpt")


def test_of_a_text_encoders_configuration_only_sizes_count():
    """A file must not choose the code that runs: transformers fetches attention kernels by name."""
    config = {
        "attn_implementation": "someone/kernel",
        "_attn_implementation": "someone/kernel",
        "hidden_size": 64,
    }
    model = empty_part(
        "text_encoder", Parts({"text_encoder": text_weights(64)}, {"text_encoder": config}), "a.ckpt"
    )
    assert "someone" not in str(model.config)


@pytest.mark.parametrize(
    "lie",
    [
        {"layers_per_block": 10**6},
        {"block_out_channels": 5},
        {"transformer_layers_per_block": 10**6},
        {"norm_num_groups": 7},
    ],
)
def test_averaged_weights_with_a_configuration_that_lies(unet, tmp_path, lie):
    weights = {
        f"model_ema.diffusion_model{k.replace('.', '')}": v
        for k, v in unet_to_original(unet.state_dict()).items()
    }
    config = json.loads(unet.to_json_string())
    path = tmp_path / "a.safetensors"
    save_file(weights, path, {CONFIG_KEY: json.dumps({"unet": config})})
    assert read_parts(path).weights["unet"].keys() == unet.state_dict().keys()
    save_file(weights, path, {CONFIG_KEY: json.dumps({"unet": config | lie})})
    with pytest.raises(UserError, match=r"a\.safetensors: its averaged unet"):
        read_parts(path)
