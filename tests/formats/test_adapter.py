"""Adapters of every form, against the libraries that write them."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from tiny import TEXT_DIM, make_unet
from torch import nn

from bdm.errors import UserError
from bdm.formats.adapter import split_adapter, split_key
from bdm.formats.change import Change
from bdm.formats.weights import read_weights

LINEAR = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"
CONVOLUTION = "down_blocks.0.resnets.0.conv1"


def randomise(module):
    """Factors that are zero at the start would hide mistakes."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3)


def change_of(tensors, tmp_path, modules, metadata=None):
    path = tmp_path / "adapter.safetensors"
    save_file(
        {k: torch.as_tensor(v).detach().clone().contiguous() for k, v in tensors.items()}, path, metadata
    )
    return split_adapter(read_weights(path), {"unet": modules})["unet"]


CASES = {
    "LoRA": ("locon", {}),
    "LoRA alpha": ("locon", {"alpha": 2}),
    "LoRA Tucker": ("locon", {"use_tucker": True}),
    "LoHa": ("loha", {"alpha": 2}),
    "LoHa Tucker": ("loha", {"use_tucker": True}),
    "LoKr": ("lokr", {"alpha": 2, "factor": 4}),
    "LoKr both factorised": ("lokr", {"alpha": 2, "factor": 4, "decompose_both": True, "lora_dim": 1}),
    "LoKr full": ("lokr", {"lora_dim": 10000}),
    "LoKr Tucker": ("lokr", {"use_tucker": True, "factor": 4, "lora_dim": 1}),
    "DoRA outputs": ("locon", {"weight_decompose": True, "wd_on_out": True}),
    "DoRA inputs": ("locon", {"weight_decompose": True, "wd_on_out": False}),
    "DoHa": ("loha", {"weight_decompose": True}),
    "scalar": ("locon", {"use_scalar": True}),
    "full": ("full", {}),
    "IA3 outputs": ("ia3", {"train_on_input": False}),
    "IA3 inputs": ("ia3", {"train_on_input": True}),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("place", [LINEAR, CONVOLUTION])
def test_change_equals_lycoris(tmp_path, case, place):
    from lycoris.modules.full import FullModule
    from lycoris.modules.ia3 import IA3Module
    from lycoris.modules.locon import LoConModule
    from lycoris.modules.loha import LohaModule
    from lycoris.modules.lokr import LokrModule

    kinds = {
        "locon": LoConModule,
        "loha": LohaModule,
        "lokr": LokrModule,
        "full": FullModule,
        "ia3": IA3Module,
    }
    kind, settings = CASES[case]
    layer = nn.Linear(24, 16) if place == LINEAR else nn.Conv2d(24, 16, 3, padding=1)
    arguments = {"multiplier": 1.0, "lora_dim": 4, "alpha": 4, **settings}
    if kind == "ia3":
        arguments = {"multiplier": 1.0, **settings}
    base, base_bias = layer.weight.detach().clone(), layer.bias.detach().clone()
    module = kinds[kind]("lora_unet_" + place.replace(".", "_"), layer, **arguments)
    if kind == "full":
        module.apply_to()
    magnitude = getattr(module, "dora_scale", None)
    kept = magnitude.detach().clone() if magnitude is not None else None
    randomise(module)
    if magnitude is not None:
        magnitude.data.copy_(kept * (1 + 0.3 * torch.rand_like(kept)))
    if kind == "full":
        with torch.no_grad():
            module.weight.copy_(base + 0.1 * torch.randn_like(base))
            module.bias.copy_(base_bias + 0.1)
    tensors = (
        {f"{module.lora_name}.{k}": v for k, v in module.custom_state_dict().items()}
        if kind != "ia3"
        else {f"{module.lora_name}.{k}": v for k, v in module.state_dict().items()}
    )
    change = change_of(tensors, tmp_path, [LINEAR, CONVOLUTION])[place]
    # What the module was trained with is its forward pass. (The library's merged weights apply alpha twice
    # for LoHa and LoKr.)
    module.eval()
    if kind != "full":
        module.apply_to()
    x = torch.randn(2, 24) if place == LINEAR else torch.randn(2, 24, 5, 5)
    expected = layer(x).detach()
    changed = nn.Linear(24, 16) if place == LINEAR else nn.Conv2d(24, 16, 3, padding=1)
    changed.weight.data = base + change.weight(base)
    changed.bias.data = base_bias + (change.bias(base_bias) if "bias" in change.factors else 0)
    torch.testing.assert_close(changed(x).detach(), expected, atol=2e-5, rtol=1e-4)
    assert change.weight(base).abs().max() > 1e-3


def test_alpha_left_out_means_scale_one():
    up, down = torch.randn(6, 2), torch.randn(2, 5)
    without = Change({"up": up, "down": down}).weight(torch.zeros(6, 5))
    torch.testing.assert_close(without, up @ down)
    halved = Change({"up": up, "down": down, "alpha": torch.tensor(1.0)}).weight(torch.zeros(6, 5))
    torch.testing.assert_close(halved, up @ down / 2)


@pytest.mark.parametrize(
    "key",
    [
        "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k.lora_down.weight",
        "lora_unet_input_blocks_1_1_transformer_blocks_0_attn2_to_k.lora_down.weight",
        "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.lora_A.weight",
        "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.lora.down.weight",
        "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.processor.to_k_lora.down.weight",
        "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.lora_A.weight",
        "base_model.model.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.lora_A.default.weight",
        "lycoris_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k.lora_down.weight",
        "diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.lora_down.weight",
        "lora_unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.lora_down.weight",
    ],
)
def test_every_spelling_finds_its_module(tmp_path, key):
    modules = [name.removesuffix(".weight") for name in make_unet().state_dict() if name.endswith(".weight")]
    found = change_of({key: torch.zeros(2, TEXT_DIM)}, tmp_path, modules)
    assert {name: list(change.factors) for name, change in found.items()} == {LINEAR: ["down"]}


@pytest.mark.parametrize(
    "factors",
    [
        {"up": (200_000, 1), "down": (1, 200_000)},
        {"up": (7, 2), "down": (2, 6)},
        {"diff": (7, 6)},
        {"up": (6, 2), "down": (2, 8)},
        {"w1_a": (9, 2), "w1_b": (2, 7), "w2_a": (9, 2), "w2_b": (2, 7)},
        {"k1": (2, 7), "k2": (4, 1)},
        {"up": (6, 2)},
    ],
)
def test_factors_that_do_not_fit_are_named(factors):
    with pytest.raises(UserError, match="do not fit"):
        Change({name: torch.zeros(shape) for name, shape in factors.items()}).weight(torch.zeros(6, 7))


@pytest.mark.parametrize(
    "factors",
    [
        {"up": (6, 1), "down": (1, 10**8)},
        {"up": (6, 1), "mid": (1, 1, 10**4, 10**4), "down": (1, 7)},
        {"w1_a": (6, 1), "w1_b": (1, 10**8), "w2_a": (6, 1), "w2_b": (1, 7)},
        {"w1_a": (6, 1), "w1_b": (1, 7), "w2_a": (6, 1), "w2_b": (1, 10**8)},
        {
            "w1_a": (1, 6),
            "w1_b": (1, 7),
            "w1_t": (1, 1, 10**4, 10**4),
            "w2_a": (1, 6),
            "w2_b": (1, 7),
            "w2_t": (1, 1, 1, 1),
        },
        {"k1": (2, 10**6), "k2": (3, 10**6)},
        {"k1_a": (2, 1), "k1_b": (1, 10**8), "k2": (3, 7)},
        {"k1": (2, 1), "k2_a": (3, 1), "k2_b": (1, 10**8)},
        {"k1": (2, 1), "k2_a": (1, 3), "k2_b": (1, 7), "k2_t": (1, 1, 10**4, 10**4)},
        {
            "w1_a": (2, 6),
            "w1_b": (10**6, 7),
            "w1_t": (2, 10**6, 1, 1),
            "w2_a": (2, 6),
            "w2_b": (2, 7),
            "w2_t": (2, 2, 1, 1),
        },
    ],
)
def test_sizes_are_checked_before_anything_is_multiplied(factors):
    """Small files whose products would take gigabytes.

    The factors are on a device that holds none, so no product is made.
    """
    wanted = {name: torch.empty(shape, device="meta") for name, shape in factors.items()}
    with pytest.raises(UserError, match=r"\(other (outputs or inputs|rank)\)"):
        Change(wanted).weight(torch.empty(6, 7, device="meta"))


def test_old_text_encoder_processors():
    key = "text_encoder.text_model.encoder.layers.0.self_attn.to_out_lora.up.weight"
    assert split_key(key) == ("text_encoder.text_model.encoder.layers.0.self_attn.out_proj", "up")


def test_alpha_patterns_of_diffusers(tmp_path):
    tensors = {
        f"unet.{LINEAR}.lora_A.weight": torch.randn(4, 6),
        f"unet.{LINEAR}.lora_B.weight": torch.randn(5, 4),
    }
    patterns = {"^attn2.to_k": 1, r"attn2\.to_k": 2, "to_k": 6}  # the first that fits counts
    noted = {
        "unet.r": 8,
        "unet.lora_alpha": 8,
        "unet.rank_pattern": {"to_k": 4},
        "unet.alpha_pattern": patterns,
    }
    change = change_of(
        tensors, tmp_path, [LINEAR, CONVOLUTION], {"lora_adapter_metadata": json.dumps(noted)}
    )[LINEAR]
    expected = tensors[f"unet.{LINEAR}.lora_B.weight"] @ tensors[f"unet.{LINEAR}.lora_A.weight"] / 2
    torch.testing.assert_close(change.weight(torch.zeros(5, 6)), expected)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"unet.lora_alpha": float("nan")}, "note nan for unet.lora_alpha"),
        ({"lora_alpha": 10**400}, "note 1000"),
        ({"lora_alpha": 1, "alpha_pattern": {"to_k": float("inf")}}, "note inf"),
        ({"lora_alpha": 1, "alpha_pattern": {"(x+x+)+y": 1}}, "by the expression"),
        ({"lora_alpha": True}, "note True for lora_alpha"),
        ({"unet.lora_alpha": "8"}, "note 8 for unet.lora_alpha"),
        ({"lora_alpha": 8, "use_rslora": "false"}, "neither true nor false"),
        ({"unet.init_lora_weights": "pissa_niter_4"}, "a base that was changed with it"),
        ({"init_lora_weights": "OLoRA"}, "a base that was changed with it"),
    ],
)
def test_damaged_settings_of_peft(tmp_path, settings, message):
    tensors = {
        f"unet.{LINEAR}.lora_A.weight": torch.randn(4, 6),
        f"unet.{LINEAR}.lora_B.weight": torch.randn(5, 4),
    }
    with pytest.raises(UserError, match=message):
        change_of(tensors, tmp_path, [LINEAR, CONVOLUTION], {"lora_adapter_metadata": json.dumps(settings)})


def test_alpha_patterns_of_a_text_encoder(tmp_path):
    """Older transformers put text_model before every name; files noted then still count."""
    name = "encoder.layers.0.mlp.fc1"
    key = f"text_encoder.text_model.{name}.lora"
    noted = {"text_encoder.lora_alpha": 8, "text_encoder.alpha_pattern": {f"text_model.{name}": 2}}
    factors = {f"{key}_A.weight": torch.randn(4, 6), f"{key}_B.weight": torch.randn(5, 4)}
    save_file(factors, tmp_path / "a.safetensors", {"lora_adapter_metadata": json.dumps(noted)})
    change = split_adapter(read_weights(tmp_path / "a.safetensors"), {"text_encoder": [name]})[
        "text_encoder"
    ][name]
    expected = factors[f"{key}_B.weight"] @ factors[f"{key}_A.weight"] / 2
    torch.testing.assert_close(change.weight(torch.zeros(5, 6)), expected)


def test_dora_of_peft_on_a_convolution(tmp_path):
    """peft keeps the magnitudes of outputs as (1, out, 1, 1), where LyCORIS would mean inputs."""
    import peft

    torch.manual_seed(1)
    base = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1))
    plain = nn.Conv2d(8, 8, 3, padding=1)
    plain.load_state_dict(base[0].state_dict())
    adapted = peft.get_peft_model(
        base, peft.LoraConfig(r=4, lora_alpha=4, use_dora=True, target_modules=["0"], init_lora_weights=False)
    )
    with torch.no_grad():
        for key, parameter in adapted.named_parameters():
            if "magnitude" in key:
                parameter.mul_(1 + 0.3 * torch.rand_like(parameter))
    adapted.save_pretrained(tmp_path)
    file = read_weights(tmp_path / "adapter_model.safetensors")
    renamed = {
        key.replace("base_model.model.", "text_encoder."): tensor for key, tensor in file.tensors.items()
    }
    change = split_adapter(type(file)(file.path, renamed, file.metadata), {"text_encoder": ["0"]})[
        "text_encoder"
    ]["0"]
    plain.weight.data += change.weight(plain.weight.data)
    x = torch.randn(2, 8, 5, 5)
    torch.testing.assert_close(plain(x), adapted(x).detach(), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    "prefix",
    [
        "lora_te_text_model_",
        "lora_te1_text_model_",
        "text_encoder.text_model.",
        "lora_te_",
        "clip_l.text_model.",
    ],
)
def test_text_encoder_spellings(tmp_path, prefix):
    name = "encoder.layers.0.self_attn.q_proj"
    spelled = prefix + (name if "." in prefix else name.replace(".", "_"))
    save_file({f"{spelled}.lora_down.weight": torch.zeros(2, 8)}, tmp_path / "a.safetensors")
    found = split_adapter(read_weights(tmp_path / "a.safetensors"), {"text_encoder": [name]})
    assert list(found["text_encoder"]) == [name]


def test_peft_layers_are_equalled(tmp_path):
    """LoRA, LoHa, LoKr, DoRA and (IA)3 as peft saves them give the outputs peft gives."""
    import peft

    torch.manual_seed(1)
    configs = {
        "lora": peft.LoraConfig(r=4, lora_alpha=2, target_modules=["0", "2"], init_lora_weights=False),
        "rslora": peft.LoraConfig(
            r=4, lora_alpha=2, use_rslora=True, target_modules=["0", "2"], init_lora_weights=False
        ),
        "dora": peft.LoraConfig(
            r=4, lora_alpha=4, use_dora=True, target_modules=["0", "2"], init_lora_weights=False
        ),
        "ia3": peft.IA3Config(target_modules=["0", "2"], feedforward_modules=["2"], init_ia3_weights=False),
        "loha": peft.LoHaConfig(r=8, alpha=4, target_modules=["0", "2"], init_weights=False),
        "lokr": peft.LoKrConfig(r=2, alpha=1, target_modules=["0", "2"], init_weights=False),
        "lokr both": peft.LoKrConfig(
            r=1, alpha=3, decompose_both=True, target_modules=["0", "2"], init_weights=False
        ),
        "lokr whole": peft.LoKrConfig(r=64, alpha=16, target_modules=["0", "2"], init_weights=False),
        "lora patterns": peft.LoraConfig(
            r=4,
            lora_alpha=2,
            rank_pattern={"2": 3},
            alpha_pattern={"2": 5, "^2": 9},
            target_modules=["0", "2"],
            init_lora_weights=False,
        ),
        "loha patterns": peft.LoHaConfig(
            r=4,
            alpha=2,
            rank_pattern={"2": 3},
            alpha_pattern={"2": 5},
            target_modules=["0", "2"],
            init_weights=False,
        ),
        "lokr patterns": peft.LoKrConfig(
            r=64,
            alpha=16,
            rank_pattern={"2": 32},
            alpha_pattern={"2": 5},
            target_modules=["0", "2"],
            init_weights=False,
        ),
    }
    x = torch.randn(3, 12)
    for name, config in configs.items():
        base = nn.Sequential(nn.Linear(12, 20), nn.ReLU(), nn.Linear(20, 6))
        weights = {key: value.clone() for key, value in base.state_dict().items()}
        adapted = peft.get_peft_model(base, config)
        with torch.no_grad():
            for key, parameter in adapted.named_parameters():
                if "ia3" in key or "magnitude" in key:
                    parameter.mul_(1 + 0.3 * torch.rand_like(parameter))
        adapted.save_pretrained(tmp_path / name)
        file = read_weights(tmp_path / name / "adapter_model.safetensors")
        changes = _bare(file)
        plain = nn.Sequential(nn.Linear(12, 20), nn.ReLU(), nn.Linear(20, 6))
        plain.load_state_dict(weights)
        for module, change in changes.items():
            layer = plain[int(module)]
            layer.weight.data += change.weight(layer.weight.data)
            if change.reaches_bias:
                layer.bias.data += change.bias(layer.bias.data)
        torch.testing.assert_close(
            plain(x), adapted(x).detach(), atol=1e-5, rtol=1e-4, msg=lambda text, n=name: f"{n}: {text}"
        )


@pytest.mark.parametrize("kind", ["loha", "lokr"])
@pytest.mark.parametrize("effective", [False, True])
def test_peft_convolutions_are_equalled(tmp_path, kind, effective):
    import peft

    torch.manual_seed(1)
    plain = nn.Conv2d(8, 8, 3, padding=1)
    base = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1))
    base[0].load_state_dict(plain.state_dict())
    config = {"loha": peft.LoHaConfig, "lokr": peft.LoKrConfig}[kind](
        r=1, alpha=3, target_modules=["0"], init_weights=False, use_effective_conv2d=effective
    )
    adapted = peft.get_peft_model(base, config)
    adapted.save_pretrained(tmp_path)
    change = _bare(read_weights(tmp_path / "adapter_model.safetensors"))["0"]
    assert {"w1_t", "k2_t"} & change.factors.keys() or not effective
    plain.weight.data += change.weight(plain.weight.data)
    x = torch.randn(2, 8, 5, 5)
    torch.testing.assert_close(plain(x), adapted(x).detach(), atol=1e-5, rtol=1e-4)


def _bare(file):
    """Changes of a file over a plain network, which has no UNet's names: through the text encoder's table."""
    renamed = {
        key.replace("base_model.model.", "base_model.model.text_model."): tensor
        for key, tensor in file.tensors.items()
    }
    return split_adapter(type(file)(file.path, renamed, file.metadata), {"text_encoder": ["0", "2"]})[
        "text_encoder"
    ]


def test_unknown_keys_are_named(tmp_path):
    path = tmp_path / "a.safetensors"
    save_file({"lora_unet_no_such_block.lora_down.weight": torch.zeros(2, 2)}, path)
    with pytest.raises(UserError, match="no_such_block"):
        split_adapter(read_weights(path), {"unet": [LINEAR, "conv_in", CONVOLUTION]})


def test_factors_that_do_not_fit_are_an_error():
    with pytest.raises(UserError, match="do not fit a weight"):
        Change({"up": torch.zeros(6, 2), "down": torch.zeros(2, 5)}).weight(torch.zeros(6, 7))


def test_split_key_ignores_ordinary_weights():
    assert split_key("down_blocks.0.resnets.0.conv1.bias") == ("", "")


ALPHAS = {
    "0 dimensions": torch.tensor(1.0),
    "shape (1,)": torch.ones(1),
    "shape (1, 1)": torch.ones(1, 1),
    "half": torch.tensor(1.0).half(),
    "bfloat16": torch.tensor(1.0).bfloat16(),
    "double": torch.tensor(1.0).double(),
    "int64": torch.tensor(1),
    "int": 1,
    "float": 1.0,
    "text": "1.0",
    "numpy float32": np.float32(1.0),
    "numpy float64": np.float64(1.0),
    "numpy float16": np.float16(1.0),
    "numpy int64": np.int64(1),
}


@pytest.mark.parametrize("name", ALPHAS)
@pytest.mark.parametrize("wrapped", [False, True])
def test_alpha_counts_in_whatever_form_a_pickle_holds_it(tmp_path, name, wrapped):
    down, up = torch.randn(4, 6), torch.randn(5, 4)
    content = {f"unet.{LINEAR}.lora_down.weight": down, f"unet.{LINEAR}.lora_up.weight": up,
               f"unet.{LINEAR}.alpha": ALPHAS[name]}  # fmt: skip
    torch.save({"state_dict": content} if wrapped else content, tmp_path / "a.pt")
    change = split_adapter(read_weights(tmp_path / "a.pt"), {"unet": [LINEAR, CONVOLUTION]})["unet"][LINEAR]
    torch.testing.assert_close(change.weight(torch.zeros(5, 6)), up @ down / 4)


@pytest.mark.parametrize(
    ("alpha", "message"),
    [
        (True, "alpha is 'True'; give a number"),
        (float("nan"), "alpha is 'nan'; give a number"),
        (float("inf"), "alpha is 'inf'"),
        (10**400, "alpha is of the kind int"),
        ("four", "alpha is 'four'"),
        ([1.0], "alpha is of the kind list"),
        (None, "alpha is of the kind NoneType"),
        (np.ones(3), "alpha is of the kind"),
        (torch.ones(2), r"alpha has shape \(2,\)"),
        (torch.ones(0), r"alpha has shape \(0,\)"),
    ],
)
def test_alphas_that_are_no_numbers_are_refused_and_not_left_out(tmp_path, alpha, message):
    content = {f"unet.{LINEAR}.lora_down.weight": torch.randn(4, 6),
               f"unet.{LINEAR}.lora_up.weight": torch.randn(5, 4), f"unet.{LINEAR}.alpha": alpha}  # fmt: skip
    torch.save(content, tmp_path / "a.pt")
    with pytest.raises(UserError, match=message):
        split_adapter(read_weights(tmp_path / "a.pt"), {"unet": [LINEAR, CONVOLUTION]})


def test_numbers_that_are_no_factors_do_no_harm(tmp_path):
    content = {f"unet.{LINEAR}.diff": torch.randn(5, 6), "epoch": 3, "notes": None, "loss": np.float64(1)}
    torch.save(content, tmp_path / "a.pt")
    assert split_adapter(read_weights(tmp_path / "a.pt"), {"unet": [LINEAR, CONVOLUTION]})["unet"].keys() == {
        LINEAR
    }


@pytest.mark.parametrize(
    "factors",
    [
        {"weight": (5,)},  # a normalisation's whole weight, or (IA)3 without what tells
        {"diff": (5, 6), "lora_up.weight": (5, 4), "lora_down.weight": (4, 6)},
        {"hada_w1_a": (5, 1), "lora_up.weight": (5, 4), "lora_down.weight": (4, 6)},
        {"lokr_w1": (5, 6), "lokr_w2": (1, 1), "hada_t1": (1, 1, 1, 1)},
        {"ia3_l": (5, 1), "alpha": ()},
        {"alpha": ()},
        {"scalar": ()},
        {"on_input": ()},
        {"lora_mid.weight": (4, 4, 1, 1)},
    ],
)
def test_factors_of_which_some_would_not_be_used(tmp_path, factors):
    tensors = {f"lora_unet.{LINEAR}.{name}": torch.ones(shape) for name, shape in factors.items()}
    with pytest.raises(UserError, match=r"of no known form together|without on_input"):
        change_of(tensors, tmp_path, [LINEAR, CONVOLUTION])


def test_one_factor_under_two_names_is_damage(tmp_path):
    names = (f"unet.{LINEAR}.lora_A.weight", f"lora_unet_{LINEAR.replace('.', '_')}.lora_down.weight")
    with pytest.raises(UserError, match="both hold the down"):
        change_of({name: torch.randn(4, 6) for name in names}, tmp_path, [LINEAR, CONVOLUTION])
