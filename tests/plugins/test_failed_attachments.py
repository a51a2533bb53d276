"""Whatever fails to attach leaves the pipeline as it was.

Damaged files, networks of another size, thousands of mutants.
"""

import json
import random
from types import SimpleNamespace

import pytest
import torch
from community_files import make_controlnet, mutate, write_original
from safetensors.torch import save_file
from tiny import TEXT_DIM, make_text_encoder, make_unet, make_vae

from bdm.errors import UserError
from bdm.formats.checkpoint import CONFIG_KEY
from bdm.formats.names import vae_to_original
from bdm.plugins import Plugins
from bdm.text.english import spell_triggers
from bdm.text.vocabulary import clip_tokenizer

ATTENTION = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"


@pytest.fixture
def host():
    return SimpleNamespace(
        unet=make_unet(), vae=make_vae(), text_encoder=make_text_encoder(), tokenizer=clip_tokenizer()
    )


def outputs(host):
    """What each part computes from fixed inputs, and what the tokenizer knows."""
    dice = torch.Generator().manual_seed(7)
    latents, text = torch.randn(1, 4, 8, 8, generator=dice), torch.randn(1, 5, TEXT_DIM, generator=dice)
    with torch.no_grad():
        return (
            host.unet(latents, 5, text).sample,
            host.vae.decode(latents).sample,
            host.text_encoder(torch.arange(300, 377)[None]).last_hidden_state,
            torch.tensor(len(host.tokenizer)),
        )


def equal(before, after):
    return all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def write_style(path):
    """A checkpoint of other weights for all parts; returns what it holds and its header."""
    torch.manual_seed(9)
    return write_original(
        SimpleNamespace(unet=make_unet(), vae=make_vae(), text_encoder=make_text_encoder()), path
    )


@pytest.mark.parametrize("damage", ["missing", "shape", "NaN", "unknown"])
@pytest.mark.parametrize(
    "key",
    [
        "model.diffusion_model.out.2.bias", "first_stage_model.decoder.conv_out.bias",
        "cond_stage_model.transformer.text_model.final_layer_norm.bias",
    ],
)  # fmt: skip
def test_damaged_checkpoints_change_nothing(host, tmp_path, key, damage):
    before, plugins = outputs(host), Plugins(host)
    tensors, header = write_style(tmp_path / "style.safetensors")
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    match damage:
        case "missing":
            del tensors[key]
        case "shape":
            tensors[key] = torch.zeros(len(tensors[key]) + 1)
        case "NaN":
            tensors[key][0] = float("nan")
        case "unknown":
            tensors[key.replace(".bias", ".gamma")] = torch.zeros(1)
    save_file(tensors, tmp_path / "style.safetensors", header)
    with pytest.raises(UserError):
        plugins.attach(tmp_path / "style.safetensors")
    assert len(plugins) == 0
    assert equal(outputs(host), before)


def test_values_that_are_not_finite_are_refused_in_every_kind(host, tmp_path):
    before, plugins = outputs(host), Plugins(host)
    vae = {name: tensor.contiguous() for name, tensor in vae_to_original(make_vae().state_dict()).items()}
    vae["decoder.conv_out.bias"] = torch.full((3,), float("inf"))
    save_file(vae, tmp_path / "vae.safetensors")
    save_file({"emb_params": torch.full((2, TEXT_DIM), float("nan"))}, tmp_path / "calm.safetensors")
    controlnet = make_controlnet(host.unet)
    torch.nn.init.constant_(controlnet.controlnet_mid_block.bias, float("nan"))
    controlnet.save_pretrained(tmp_path / "edges")
    for name in ("vae.safetensors", "calm.safetensors", "edges"):
        with pytest.raises(UserError, match="NaN or infinite"):
            plugins.attach(tmp_path / name)
    assert len(plugins) == 0
    assert equal(outputs(host), before)


@pytest.mark.parametrize(
    "changes", [{"block_out_channels": (8, 16, 32, 32)}, {"cross_attention_dim": 40}, {"layers_per_block": 1}]
)
def test_controlnets_of_another_size_change_nothing(host, tmp_path, changes):
    before, plugins = outputs(host), Plugins(host)
    make_controlnet(make_unet(**changes)).save_pretrained(tmp_path / "edges")
    with pytest.raises(UserError, match="does not fit"):
        plugins.attach(tmp_path / "edges")
    assert len(plugins) == 0
    assert equal(outputs(host), before)
    make_controlnet(host.unet).save_pretrained(tmp_path / "whole")
    plugins.attach(tmp_path / "whole", "edges")  # the name is free


def seeds(folder, host):
    """Small files that attach, with how many of their bytes are worth damaging.

    Large ones in the header only.
    """
    torch.manual_seed(3)
    factors = {
        f"{ATTENTION}.lora_down.weight": torch.randn(2, TEXT_DIM),
        f"{ATTENTION}.lora_up.weight": torch.randn(16, 2),
    }
    noted = json.dumps({"unet.lora_alpha": 2, "unet.alpha_pattern": {"to_k": 3}})
    save_file(factors, folder / "lora.safetensors", {"lora_adapter_metadata": noted})
    factors = {
        "lokr_w1": torch.randn(4, 4),
        "lokr_w2_a": torch.randn(4, 2),
        "lokr_w2_b": torch.randn(2, TEXT_DIM // 4),
    }
    save_file(
        {f"{ATTENTION}.{name}": tensor for name, tensor in factors.items()}, folder / "lokr.safetensors"
    )
    torch.save({"string_to_param": {"*": torch.randn(2, TEXT_DIM)}, "name": "x"}, folder / "calm.pt")
    controlnet = make_controlnet(host.unet)
    weights = {key: tensor.contiguous() for key, tensor in controlnet.state_dict().items()}
    noted = json.dumps({"controlnet": json.loads(controlnet.to_json_string())})
    save_file(weights, folder / "edges.safetensors", {CONFIG_KEY: noted})
    whole, _ = write_style(folder / "style.safetensors")
    save_file(
        {key: t.contiguous() for key, t in whole.items() if key.startswith("model.")},
        folder / "style.safetensors",
    )
    found = []
    for path in sorted(folder.iterdir()):
        content = path.read_bytes()
        head = 8 + int.from_bytes(content[:8], "little") if len(content) > 10**5 else len(content)
        found.append((path.suffix, content[:head], content[head:]))
    return found


def test_mutants_attach_and_detach_or_are_refused(host, tmp_path):
    before, plugins = outputs(host), Plugins(host)
    (tmp_path / "seeds").mkdir()
    files, dice = seeds(tmp_path / "seeds", host), random.Random(11)
    attached = refused = 0
    for i in range(120):
        suffix, head, rest = files[i % len(files)]
        path = tmp_path / f"m{suffix}"
        path.write_bytes(mutate(head, dice) + rest if i >= len(files) else head + rest)
        try:
            plugins.attach(path)
            plugins.detach("m")
            attached += 1
        except UserError:
            refused += 1
        assert len(plugins) == 0
    assert equal(outputs(host), before)
    assert attached > 10
    assert refused > 20


def test_letters_that_only_look_like_a_trigger_word(host, tmp_path):
    """Case folding takes the dotless i and the long s for i and s, which no file is called by."""
    plugins = Plugins(host)
    for name in ("ink", "star"):
        save_file({"emb_params": torch.zeros(1, TEXT_DIM)}, tmp_path / f"{name}.safetensors")
        plugins.attach(tmp_path / f"{name}.safetensors")
    assert spell_triggers("\u0131nk and \u017ftar, INK", host.tokenizer) == "\u0131nk and \u017ftar, <ink>"


def test_embeddings_need_a_tokenizer(host, tmp_path):
    save_file({"emb_params": torch.zeros(1, TEXT_DIM)}, tmp_path / "ink.safetensors")
    del host.tokenizer
    rows = host.text_encoder.get_input_embeddings().weight.shape
    with pytest.raises(UserError, match="no tokenizer"):
        Plugins(host).attach(tmp_path / "ink.safetensors")
    assert host.text_encoder.get_input_embeddings().weight.shape == rows


@pytest.mark.parametrize(
    "path",
    ["x" * 5000, "x" * 5000 + ".safetensors", "a/" + "x" * 5000, "a\0b", "a\0b.safetensors", 5, None, b"a"],
    ids=range(8),
)
def test_paths_that_no_file_can_have(host, path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    plugins = Plugins(host)
    with pytest.raises(UserError) as error:
        plugins.attach(path)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 700
    assert len(plugins) == 0


def test_a_folder_that_may_not_be_entered(host, tmp_path, monkeypatch):
    """As its owner's permissions have it; the tests may run as one who may everything."""
    (tmp_path / "model").mkdir()
    real = type(tmp_path).is_file

    def refused(path):
        if path.parent == tmp_path / "model":
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(type(tmp_path), "is_file", refused)
    with pytest.raises(UserError, match=r"model.*Permission denied; check the path and its permissions"):
        Plugins(host).attach(tmp_path / "model")


def test_a_plugin_is_shown_on_one_line(host, tmp_path):
    path = tmp_path / "calm\x1b]0;x\x07\n\u202e.safetensors"
    save_file({"emb_params": torch.randn(2, TEXT_DIM)}, path)
    plugins = Plugins(host)
    plugin = plugins.attach(path, "calm")
    assert str(plugin).isprintable()
    assert repr(plugins).isprintable()
    assert "calm" in str(plugin)
