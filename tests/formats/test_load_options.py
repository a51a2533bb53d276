import json
from typing import get_type_hints

import pytest
import torch
from safetensors.torch import save_file

from bdm.errors import UserError
from bdm.formats.choice import FileChoice
from bdm.formats.load_options import LoadKeywords, read_options
from bdm.formats.weights import read_weights_folder

PARTS = ("unet", "vae")


def read(parts=(), **options):
    return read_options(options, "Model.from_pretrained", torch.bfloat16, parts)


@pytest.mark.parametrize("name", ["dtype", "torch_dtype"])
@pytest.mark.parametrize(
    ("written", "dtype"),
    [
        (torch.float16, torch.float16),
        ("float16", torch.float16),
        ("torch.float16", torch.float16),
        ("fp16", torch.float16),
        ("auto", None),
        (None, torch.bfloat16),
    ],
)
def test_a_dtype_by_either_name_however_it_is_written(name, written, dtype):
    assert read(**{name: written}).dtype is dtype
    assert read(dtype=written, torch_dtype=written).dtype is dtype


def test_dtypes_of_parts():
    options = read(PARTS, dtype={"unet": "fp16", "default": "auto"})
    assert (options.dtype_of("unet"), options.dtype_of("vae")) == (torch.float16, None)
    options = read(PARTS, torch_dtype={"unet": torch.float16})
    assert options.dtype_of("vae") is torch.float32, "what diffusers takes where nothing is said"


@pytest.mark.parametrize(
    ("parts", "options", "message"),
    [
        ((), dict(dtyp=torch.float16), "takes no option 'dtyp'; did you mean dtype?"),
        ((), dict(wings=2), "takes no option 'wings'; it takes dtype, torch_dtype, variant"),
        ((), dict(dtype="fp17"), "'fp17' is no dtype of weights"),
        ((), dict(dtype=torch.int8), "torch.int8 is no dtype of weights"),
        ((), dict(dtype=torch.float16, torch_dtype=torch.float32), "give one of them"),
        ((), dict(dtype={"unet": torch.float16}), "one model has one dtype"),
        (PARTS, dict(dtype={"wings": torch.float16}), "unknown part 'wings'; parts are unet, vae"),
        ((), dict(quantization_config=object()), "does not do quantization_config"),
        ((), dict(device_map="balanced"), "'balanced' is no device"),
        ((), dict(device_map={"unet": "cpu"}), "is no device"),
        ((), dict(variant="../fp16"), "variant '../fp16'"),
        ((), dict(variant=16), "variant 16"),
    ],
)
def test_what_cannot_be_done_is_refused_in_one_line(parts, options, message):
    with pytest.raises(UserError, match="^Model.from_pretrained.*") as refused:
        read(parts, **options)
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)


def test_options_without_a_value_ask_for_nothing():
    """diffusers hands its own options on to parts, all of them and mostly as None."""
    names = [*get_type_hints(LoadKeywords), "max_memory", "offload_folder", "quantization_config", "proxies"]
    assert read(**dict.fromkeys(names), use_flashpack=False, disable_mmap=False) == read()


@pytest.mark.parametrize("written", ["cpu", torch.device("cpu"), {"": "cpu"}])
def test_a_device(written):
    assert read(device_map=written).device == torch.device("cpu")


def test_a_revision_is_one_models_own():
    options = read(revision="v2", cache_dir="there", local_files_only=True, token=None)
    assert options.hub == {"revision": "v2", "cache_dir": "there", "local_files_only": True}
    assert options.elsewhere() == {"cache_dir": "there", "local_files_only": True}


def write(folder, name, value):
    tensors = {"w": torch.full((2,), float(value))}
    save_file(tensors, folder / name) if name.endswith("safetensors") else torch.save(tensors, folder / name)


FILES = {
    "model.safetensors": 0,
    "model.fp16.safetensors": 1,
    "pytorch_model.bin": 2,
    "pytorch_model.fp16.bin": 3,
    "diffusion_pytorch_model.ema.safetensors": 4,
}


@pytest.mark.parametrize(
    ("choice", "value"),
    [
        (FileChoice(), 0),
        (FileChoice("fp16"), 1),
        (FileChoice(use_safetensors=False), 2),
        (FileChoice("fp16", use_safetensors=False), 3),
        (FileChoice("ema"), 4),
        (FileChoice("ema", use_safetensors=True), 4),
        (FileChoice("none", or_plain=True), 0),
    ],
)
def test_which_file_is_read(tmp_path, choice, value):
    for name, content in FILES.items():
        write(tmp_path, name, content)
    assert read_weights_folder(tmp_path, choice)["w"][0] == value


@pytest.mark.parametrize(
    ("name", "choice"),
    [
        ("model.safetensors", FileChoice(use_safetensors=False)),
        ("pytorch_model.bin", FileChoice(use_safetensors=True)),
        ("model.safetensors", FileChoice("fp16")),
        ("model.fp16.safetensors", FileChoice("ema", or_plain=True, use_safetensors=False)),
    ],
)
def test_what_was_not_asked_for_is_not_read(tmp_path, name, choice):
    write(tmp_path, name, 0)
    with pytest.raises(UserError, match="holds no weights; looked for"):
        read_weights_folder(tmp_path, choice)


@pytest.mark.parametrize("ending", ["safetensors", "bin"])
@pytest.mark.parametrize("infix", ["", ".fp16"])
@pytest.mark.parametrize("old", [False, True])
def test_shards_of_a_variant_beside_those_of_another(tmp_path, ending, infix, old):
    """Both spellings that diffusers has had; the other variant's shards lie beside them."""
    stem = "diffusion_pytorch_model"
    for part, value in (("", 1), (".fp16", 2)):
        shard = f"{stem}-00001-of-00001{part}" if old else f"{stem}{part}-00001-of-00001"
        write(tmp_path, f"{shard}.{ending}", value)
        index = json.dumps({"weight_map": {"w": f"{shard}.{ending}"}})
        (tmp_path / f"{stem}.{ending}.index{part}.json").write_text(index)
    read = read_weights_folder(tmp_path, FileChoice(infix.removeprefix(".") or None))
    assert read["w"][0] == (2 if infix else 1)
