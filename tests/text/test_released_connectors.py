"""Connectors of MuLan, GlueGen and ELLA compute what their systems compute, written down apart."""

import math
import warnings

import pytest
import torch
from agreement import outputs_agree
from released_folders import japanese
from tiny import TEXT_DIM, make_unet
from torch import nn
from torch.nn import functional as F

import bdm
from bdm.errors import UserError
from bdm.formats.identify import describe_file
from bdm.text.released_connectors import load_released_connector

WIDE, TOKENS = 24, 7


def linear(x, w, name):
    return F.linear(x, w[f"{name}.weight"], w[f"{name}.bias"])


def mulan(layers=(1, 2)):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of nested tensors
        transformer = nn.Transformer(
            TEXT_DIM, 8, *layers, 4 * TEXT_DIM, 0.0, batch_first=True, norm_first=True
        ).eval()
    proj = nn.Sequential(nn.Linear(WIDE, TEXT_DIM), nn.GELU(), nn.Linear(TEXT_DIM, TEXT_DIM))
    whole = nn.ModuleDict({"transformer": transformer, "proj": proj})
    queries = torch.randn(1, 5, TEXT_DIM)

    def formula(x):
        return transformer(src=proj(x), tgt=queries.repeat(len(x), 1, 1))

    return {**whole.state_dict(), "queries": queries}, formula


def glue_weights(prefix, out, normed):
    weights = {}
    for part, width, end in (("net_tok", TOKENS, TOKENS), ("net_sen", WIDE, out)):
        for k, (a, b) in enumerate(((width, 2 * width), (2 * width, 2 * width), (2 * width, end))):
            place = k * (3 if normed else 2)
            weights[f"{prefix}.{part}.{place}.weight"] = torch.randn(b, a) / math.sqrt(a)
            weights[f"{prefix}.{part}.{place}.bias"] = torch.randn(b)
            if normed:
                weights[f"{prefix}.{part}.{place + 1}.weight"] = torch.rand(b) + 0.5
                weights[f"{prefix}.{part}.{place + 1}.bias"] = torch.randn(b)
    return weights


def gluegen(normed_tail=False):
    weights = glue_weights("tail", TEXT_DIM, normed_tail)
    for i in range(2):
        weights |= glue_weights(f"blocks.{i}", WIDE, True)
    norms = torch.rand(TOKENS, 1) * 30

    def three(x, name, normed):
        for k in range(3):
            place = k * (3 if normed else 2)
            x = F.gelu(x) if k else x
            x = linear(x, weights, f"{name}.{place}")
            if normed:
                norm = f"{name}.{place + 1}"
                x = F.layer_norm(x, x.shape[-1:], weights[f"{norm}.weight"], weights[f"{norm}.bias"])
        return x

    def base(x, name, residual, normed):
        sentence = three(x, f"{name}.net_sen", normed)
        x = (sentence + x if residual else sentence).transpose(1, 2)
        token = three(x, f"{name}.net_tok", normed)
        return (token + x if residual else token).transpose(1, 2)

    def formula(x):
        x = x / 3
        for i in range(2):
            x = F.gelu(base(x, f"blocks.{i}", True, True) + x)
        return base(x, "tail", False, normed_tail) * norms / 2

    return weights, formula, norms


def ella(latents=6, layers=2, channels=10, time=16):
    w = {"connector.latents": torch.randn(latents, TEXT_DIM)}

    def add(name, out, into):
        w[f"{name}.weight"], w[f"{name}.bias"] = torch.randn(out, into) / math.sqrt(into), torch.randn(out)

    add("time_embedding.linear_1", time, channels)
    add("time_embedding.linear_2", time, time)
    add("connector.time_aware_linear", TEXT_DIM, time)
    add("connector.proj_in", TEXT_DIM, WIDE)
    for i in range(layers):
        block = f"connector.perceiver_blocks.{i}"
        for norm in ("ln_1", "ln_2", "ln_ff"):
            add(f"{block}.{norm}.linear", 2 * TEXT_DIM, time)
        add(f"{block}.mlp.c_fc", 4 * TEXT_DIM, TEXT_DIM)
        add(f"{block}.mlp.c_proj", TEXT_DIM, 4 * TEXT_DIM)
        add(f"{block}.attn.out_proj", TEXT_DIM, TEXT_DIM)
        add(f"{block}.attn.in_proj", 3 * TEXT_DIM, TEXT_DIM)
        for kind in ("weight", "bias"):
            w[f"{block}.attn.in_proj_{kind}"] = w.pop(f"{block}.attn.in_proj.{kind}")

    def formula(x, t):
        rates = torch.exp(-math.log(10000) * torch.arange(channels // 2) / (channels // 2))
        angles = t.float()[:, None] * rates
        waves = torch.cat([angles.cos(), angles.sin()], dim=-1).expand(len(x), -1)
        stretched = F.silu(linear(waves, w, "time_embedding.linear_1"))
        emb = F.silu(linear(stretched, w, "time_embedding.linear_2"))
        out = w["connector.latents"] + linear(emb, w, "connector.time_aware_linear")[:, None]
        x = linear(x, w, "connector.proj_in")
        for i in range(layers):
            block = f"connector.perceiver_blocks.{i}"

            def timed(y, name, block=block):
                shift, scale = linear(emb, w, f"{block}.{name}.linear")[:, None].chunk(2, -1)
                return F.layer_norm(y, y.shape[-1:], eps=1e-6) * (1 + scale) + shift

            query = timed(out, "ln_1")
            both = torch.cat([query, timed(x, "ln_2")], 1)
            wq, wk, wv = w[f"{block}.attn.in_proj_weight"].chunk(3)
            bq, bk, bv = w[f"{block}.attn.in_proj_bias"].chunk(3)
            heads = [
                y.unflatten(-1, (8, -1)).transpose(1, 2)
                for y in (F.linear(query, wq, bq), F.linear(both, wk, bk), F.linear(both, wv, bv))
            ]
            scores = heads[0] @ heads[1].transpose(-1, -2) / math.sqrt(TEXT_DIM // 8)
            read = (scores.softmax(-1) @ heads[2]).transpose(1, 2).flatten(2)
            out = out + linear(read, w, f"{block}.attn.out_proj")
            inner = F.relu(linear(timed(out, "ln_ff"), w, f"{block}.mlp.c_fc")) ** 2
            out = out + linear(inner, w, f"{block}.mlp.c_proj")
        return out

    return w, formula


def saved(weights, path):
    torch.save(weights, path)
    return path


@torch.no_grad()
def test_mulans_queries_read_the_features(tmp_path):
    weights, formula = mulan()
    path = saved(weights, tmp_path / "adapter.pth")
    features = torch.randn(2, 9, WIDE)
    outputs_agree(load_released_connector(path, TEXT_DIM)(features), formula(features))
    assert describe_file(path)["system"] == "MuLan's connector for another text encoder"


@torch.no_grad()
@pytest.mark.parametrize("normed_tail", [False, True])
def test_gluegens_blocks_mix_channels_and_tokens(tmp_path, normed_tail):
    weights, formula, norms = gluegen(normed_tail)
    path = saved(weights, tmp_path / "glue.ckpt")
    features = torch.randn(2, TOKENS, WIDE)
    outputs_agree(load_released_connector(path, TEXT_DIM, norms)(features), formula(features))
    for wrong in (None, norms[1:]):
        with pytest.raises(UserError, match=f"features at {TOKENS} positions"):
            load_released_connector(path, TEXT_DIM, wrong)
    assert "GlueGen" in describe_file(path)["system"]


@torch.no_grad()
def test_ellas_latents_read_the_features_in_every_step(tmp_path):
    weights, formula = ella()
    path = saved(weights, tmp_path / "ella.bin")
    connector, features = load_released_connector(path, TEXT_DIM), torch.randn(2, 9, WIDE)
    for t in (torch.tensor([3]), torch.tensor([981, 20])):
        outputs_agree(connector(features, t), formula(features, t))
    assert "ELLA" in describe_file(path)["system"]
    unet, sample = make_unet(), torch.randn(2, 4, 8, 8)
    expected = unet(sample, 20, formula(features, torch.tensor([20]))).sample
    handle = connector.attach(unet)
    outputs_agree(unet(sample, 20, features).sample, expected)
    outputs_agree(unet(sample, 20, encoder_hidden_states=features, return_dict=False)[0], expected)
    handle.remove()
    outputs_agree(unet(sample, 20, formula(features, torch.tensor([20]))).sample, expected)


def test_a_pipeline_without_a_branch_draws_by_a_connectors_features(tmp_path):
    japanese(tmp_path / "released")
    pipe = bdm.BridgePipeline.from_pretrained(tmp_path / "released", native_text_encoder=None)
    pipe.set_progress_bar_config(disable=True)
    weights, _ = mulan()
    connector = load_released_connector(saved(weights, tmp_path / "adapter.pth"), TEXT_DIM)
    told, empty = (connector(torch.randn(1, 9, WIDE)) for _ in range(2))
    draw = dict(num_inference_steps=1, seed=0, output_type="latent")
    first = pipe(prompt_embeds=told, negative_prompt_embeds=empty, **draw).images
    assert first.isfinite().all()
    assert not torch.equal(first, pipe(prompt_embeds=empty, negative_prompt_embeds=empty, **draw).images)


@pytest.mark.parametrize("make", [mulan, ella])
def test_other_files_and_widths_are_refused_in_a_line(make, tmp_path):
    weights = make()[0]
    path = saved(weights, tmp_path / "one.pth")
    with pytest.raises(UserError, match=r"reads features 32 wide, and this one reads 768.*SD1\.5"):
        load_released_connector(path)
    name = next(key for key in weights if key.endswith("proj_in.weight") or key == "proj.2.weight")
    saved({**weights, name: torch.zeros(3, 3)}, path)
    with pytest.raises(UserError, match="are not those of"):
        load_released_connector(path, TEXT_DIM)
    saved({"a.weight": torch.zeros(3)}, path)
    with pytest.raises(UserError, match="holds no connector of MuLan, GlueGen or ELLA"):
        load_released_connector(path, TEXT_DIM)
