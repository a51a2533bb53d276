"""Trigger words: attached ones, those that diffusers loads, and both together."""

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import save_file
from tiny import TEXT_DIM

from bdm.errors import UserError
from bdm.text.english import encode_english, spell_triggers


@pytest.fixture
def stock(pipe):
    parts = {key: getattr(pipe, key) for key in ("vae", "text_encoder", "tokenizer", "unet", "scheduler")}
    none = {"safety_checker": None, "feature_extractor": None}
    return StableDiffusionPipeline(**parts, **none, requires_safety_checker=False)


@pytest.fixture
def calm(tmp_path):
    torch.manual_seed(8)
    save_file({"emb_params": torch.randn(3, TEXT_DIM)}, tmp_path / "calm.safetensors")
    return tmp_path / "calm.safetensors"


def theirs(stock, prompt):
    """As a stock pipeline reads a prompt."""
    return stock.encode_prompt(prompt, "cpu", 1, False)[0]


def ours(stock, prompt):
    return encode_english([prompt], stock.text_encoder, stock.tokenizer)


@pytest.mark.parametrize("token", ["<ink>", "zqink", "<ink-wash 2>", "zq.5", "<墨>", "<Ink>"])
@pytest.mark.parametrize("vectors", [1, 4])
@pytest.mark.parametrize(
    "prompt",
    ["a {} picture", "{}", "{}, {} and {}", "a{}b", "an ink zqinkwash", "{0}_2 alone", "a {upper} picture"],
)
def test_words_loaded_by_diffusers_act_as_there(stock, token, vectors, prompt):
    stock.load_textual_inversion({token: torch.randn(vectors, TEXT_DIM)})
    prompt = prompt.format(token, token, token, upper=token.upper())
    torch.testing.assert_close(ours(stock, prompt), theirs(stock, prompt))


def test_several_loaded_words_do_not_mix(stock):
    for token, vectors in (("<ink>", 2), ("<ink>s", 3), ("zqoil", 2), ("<zqoil>", 1)):
        stock.load_textual_inversion({token: torch.randn(vectors, TEXT_DIM)})
    assert spell_triggers("<ink>s of <ink>", stock.tokenizer) == "<ink>s <ink>s_1 <ink>s_2 of <ink> <ink>_1"
    spelled = "zqoil zqoil_1, <zqoil>, <ink> <ink>_1"
    assert spell_triggers("zqoil, <zqoil>, <ink>", stock.tokenizer) == spelled
    assert spell_triggers("<ink> <ink>_1", stock.tokenizer) == "<ink> <ink>_1", "spelled out already"


def test_loaded_words_stand_beside_attached_ones(pipe, stock, calm):
    """Each keeps its own rows; bare words are triggers only where they were attached."""
    pipe.load_textual_inversion({"<oil>": torch.full((2, TEXT_DIM), 0.5)})
    pipe.plugins.attach(calm)
    assert spell_triggers("calm oil, <oil>, (Calm)", pipe.tokenizer) == (
        "<calm> <calm>_1 <calm>_2 oil, <oil> <oil>_1, (<calm> <calm>_1 <calm>_2)"
    )
    seen = []
    table = pipe.text_encoder.get_input_embeddings()
    handle = table.register_forward_hook(lambda _, __, output: seen.append(output))
    encode_english(["<oil> calm"], pipe.text_encoder, pipe.tokenizer)
    handle.remove()
    vectors = pipe.text_encoder.get_input_embeddings().weight[-3:]
    assert torch.equal(seen[0][0, 1:6], torch.cat([torch.full((2, TEXT_DIM), 0.5), vectors]))
    spelled = "<calm> <calm>_1 <calm>_2, <oil> <oil>_1"
    assert spell_triggers(spelled, pipe.tokenizer) == spelled
    pipe.plugins.detach("calm")
    assert spell_triggers("calm <oil>", pipe.tokenizer) == "calm <oil> <oil>_1"


def test_what_diffusers_loads_later_is_not_lost(pipe, calm):
    tokenizer, table = pipe.tokenizer, pipe.text_encoder.get_input_embeddings().weight.clone()
    pipe.plugins.attach(calm)
    pipe.load_textual_inversion({"<oil>": torch.randn(2, TEXT_DIM)})
    assert spell_triggers("calm <oil>", pipe.tokenizer) == "<calm> <calm>_1 <calm>_2 <oil> <oil>_1"
    for change in (lambda: pipe.plugins.detach("calm"), lambda: pipe.plugins.attach(calm, "storm")):
        with pytest.raises(UserError, match="unload_textual_inversion"):
            change()
    assert spell_triggers("calm <oil>", pipe.tokenizer) == "<calm> <calm>_1 <calm>_2 <oil> <oil>_1"
    pipe.unload_textual_inversion(["<oil>", "<oil>_1"])
    pipe.plugins.detach("calm")
    assert pipe.tokenizer is tokenizer
    assert torch.equal(pipe.text_encoder.get_input_embeddings().weight, table)


def test_unloading_all_leaves_what_can_be_detached(pipe, calm):
    tokenizer, table = pipe.tokenizer, pipe.text_encoder.get_input_embeddings().weight.clone()
    pipe.plugins.attach(calm)
    pipe.unload_textual_inversion()
    pipe.tokenizer = tokenizer
    pipe.plugins.detach("calm")
    assert pipe.tokenizer is tokenizer
    assert torch.equal(pipe.text_encoder.get_input_embeddings().weight, table)


@pytest.mark.parametrize("token", ["zqcalm", "<zqcalm>", "<Zqcalm>", "<zqcalm>_1", "ZQCALM"])
def test_words_that_were_loaded_are_taken(pipe, calm, token):
    pipe.load_textual_inversion({token: torch.randn(1, TEXT_DIM)})
    with pytest.raises(UserError, match="'zqcalm' is taken"):
        pipe.plugins.attach(calm, "zqcalm")
    pipe.plugins.attach(calm)


def test_an_exchanged_tokenizer_is_not_put_back_unseen(pipe, calm):
    from bdm.text.vocabulary import clip_tokenizer

    pipe.plugins.attach(calm)
    mine, pipe.tokenizer = pipe.tokenizer, clip_tokenizer()
    with pytest.raises(UserError, match="tokenizer was exchanged"):
        pipe.plugins.detach("calm")
    pipe.tokenizer = mine
    pipe.plugins.detach("calm")


TO_K = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"


@pytest.fixture
def bundle(tmp_path):
    """Writes an adapter that bundles embeddings."""

    def write(embeddings, name="pivotal.safetensors"):
        torch.manual_seed(6)
        factors = {
            f"{TO_K}.lora_down.weight": torch.randn(2, TEXT_DIM),
            f"{TO_K}.lora_up.weight": torch.randn(16, 2),
        }
        save_file(
            factors | {f"bundle_emb.{key}": tensor for key, tensor in embeddings.items()}, tmp_path / name
        )
        return tmp_path / name

    return write


@pytest.mark.parametrize("form", ["string_to_param.*", "emb_params", "string_to_param.a"])
def test_embeddings_in_an_adapters_file_are_trigger_words(pipe, bundle, calm, form):
    table = pipe.text_encoder.get_input_embeddings().weight
    before, tokenizer = table.clone(), pipe.tokenizer
    vectors = {"moody": torch.randn(2, TEXT_DIM), "ver.5": torch.randn(TEXT_DIM)}
    path = bundle({f"{word}.{form}": each for word, each in vectors.items()})
    pipe.plugins.attach(calm)
    plugin = pipe.plugins.attach(path, strength=0.5)
    assert plugin.words == ("moody", "ver.5")
    assert "bringing 'moody', 'ver.5'" in str(plugin)
    assert spell_triggers("Moody, ver.5 calm", pipe.tokenizer) == (
        "<moody> <moody>_1, <ver.5> <calm> <calm>_1 <calm>_2"
    )
    pipe.plugins.set_strength("pivotal", 2.0)
    pipe.plugins.detach("calm")
    rows = [vectors["moody"], vectors["ver.5"][None]]
    assert torch.equal(table[len(before) :], torch.cat(rows)), "whatever the adapter's strength"
    ids = pipe.tokenizer.convert_tokens_to_ids(["<moody>", "<moody>_1", "<ver.5>"])
    assert torch.equal(table[ids], torch.cat(rows))
    pipe.plugins.detach("pivotal")
    assert torch.equal(pipe.text_encoder.get_input_embeddings().weight, before)
    assert pipe.tokenizer is tokenizer


def test_a_word_in_brackets_is_the_word(pipe, bundle):
    pipe.plugins.attach(bundle({"<moody>.string_to_param.*": torch.randn(2, TEXT_DIM)}))
    assert spell_triggers("a <moody> moody", pipe.tokenizer) == "a <moody> <moody>_1 <moody> <moody>_1"


@pytest.mark.parametrize(
    ("embeddings", "message"),
    [
        ({"moody.clip_g": torch.zeros(2, 1280)}, "made for SDXL"),
        ({"moody": torch.zeros(2, TEXT_DIM)}, "bundles 'bundle_emb.moody'"),
        ({"moody.string_to_param.*": torch.zeros(2, 5)}, "2 vectors of width 5"),
        ({"moody.string_to_param.*": torch.full((2, TEXT_DIM), float("inf"))}, "NaN or infinite"),
        ({"moody.string_to_param.*": torch.zeros(2, 2, TEXT_DIM)}, "no embedding for SD1.5"),
        ({"moody.emb_params": torch.zeros(2, TEXT_DIM), "<moody>.emb_params": torch.zeros(1, TEXT_DIM)},
         "two embeddings for the word 'moody'"),
        ({"calm.emb_params": torch.zeros(1, TEXT_DIM)}, "trigger word 'calm', which is taken; detach"),
        ({"a<b.emb_params": torch.zeros(1, TEXT_DIM)}, "'a<b', which cannot be"),
        ({"moody.emb_params": torch.zeros(1, TEXT_DIM), "Moody.emb_params": torch.zeros(1, TEXT_DIM)},
         "'[mM]oody', which is taken"),
    ],
)  # fmt: skip
def test_bundled_embeddings_that_cannot_be_used_are_named(pipe, bundle, calm, embeddings, message):
    pipe.plugins.attach(calm)
    before = {name: p.detach().clone() for name, p in pipe.unet.named_parameters()}
    with pytest.raises(UserError, match=message):
        pipe.plugins.attach(bundle(embeddings))
    assert [plugin.name for plugin in pipe.plugins] == ["calm"]
    assert all(torch.equal(p, before[name]) for name, p in pipe.unet.named_parameters())


def test_bundled_embeddings_need_a_text_encoder(pipe, bundle):
    pipe.text_encoder = None
    path = bundle({"moody.emb_params": torch.zeros(1, TEXT_DIM)})
    with pytest.raises(UserError, match=r"changes the text encoder \(bundle_emb.moody.emb_params\)"):
        pipe.plugins.attach(path)
