"""Words that people choose are never read as structure; what they packed beside an adapter is not lost."""

import pytest
import torch
from safetensors.torch import save_file
from tiny import TEXT_DIM, make_unet

from bdm.convert import convert
from bdm.errors import UserError
from bdm.formats.adapter import split_adapter
from bdm.formats.bundled import bundled_embeddings
from bdm.formats.embedding import embedding_vectors
from bdm.formats.families import family_of_names
from bdm.formats.identify import describe_file, identify, identify_source, require
from bdm.formats.weights import read_tensors, read_weights

KEY = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"
MODULE = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"
WORDS = [
    "calm", "<cat-toy>", "style-v1.5", "wolf_alpha", "big_diff", "my.scalar", "style.weight", "clip_girl",
    "clip_garden-style", "single_blocks", "joint_blocks.1", "double_blocks.0", "label_emb.x", "clip_g",
    "clip_g.nice", "text_encoder_2.look", "lora_te2_", "conditioner.embedders.0", "my.alpha", "dora_scale",
    "a.lora_up.weight", "unet.diff", "text_encoder.alpha", "lora_unet_girl.alpha", "x.diff_b", "hada_w1_a",
    "lokr_w1", "on_input", "ink.on_input", "v_pred", "ztsnr",
    "difference", "shuffle", "control_model.x", "first_stage_model.x", "encoder.down.1", "conv_in.x",
    "model.diffusion_model.x", "string_to_param", "emb_params_2", "bias", "x.bias", "position_ids",
    "transformer.transformer_blocks.0", "龙", "a b", "{}", "*", "0", ".", "..",
    "a..b", "模型.权重", "\U0001f432",
]  # fmt: skip


@pytest.mark.parametrize("word", WORDS)
@pytest.mark.parametrize("shape", [(2, 768), (768,), (75, 768)])
def test_one_tensor_of_the_width_is_an_embedding_under_any_word(tmp_path, word, shape):
    path = tmp_path / "a.safetensors"
    save_file({word: torch.randn(shape)}, path)
    facts = describe_file(path)
    assert (facts["kind"], facts["base"]) == ("embedding", "SD1.5")
    assert embedding_vectors(read_weights(path), 768).shape == (1 if len(shape) == 1 else shape[0], 768)


def bare(word):
    """Words are kept with or without their brackets."""
    return word[1:-1] if word.startswith("<") else word


@pytest.mark.parametrize("word", WORDS)
def test_words_of_embeddings_inside_an_adapter(tmp_path, word):
    path = tmp_path / "a.safetensors"
    factors = {f"{KEY}.lora_down.weight": torch.randn(2, 768), f"{KEY}.lora_up.weight": torch.randn(320, 2)}
    vectors = torch.randn(3, 768)
    for key in ("string_to_param.*", "emb_params", "clip_l"):
        save_file(factors | {f"bundle_emb.{word}.{key}": vectors}, path)
        facts = describe_file(path)
        assert (facts["kind"], facts["base"]) == ("adapter", "SD1.5")
        assert facts["embeddings"] == f"{bare(word)} (3 vectors)"
        assert torch.equal(bundled_embeddings(read_weights(path))[bare(word)], vectors)
    for layout in ("kohya", "diffusers"):
        convert(path, tmp_path / "out.safetensors", layout)
        assert torch.equal(read_tensors(tmp_path / "out.safetensors")[f"bundle_emb.{word}.{key}"], vectors)
    assert split_adapter(read_weights(path), {"unet": [MODULE, "down_blocks.0.resnets.0.conv1"]})[
        "unet"
    ].keys() == {MODULE}


def test_bundled_embeddings_of_another_kind(tmp_path):
    factors = {f"{KEY}.lora_down.weight": torch.randn(2, 768), f"{KEY}.lora_up.weight": torch.randn(320, 2)}
    cases = {
        "made for SDXL": {
            "bundle_emb.x.clip_l": torch.ones(1, 768),
            "bundle_emb.x.clip_g": torch.ones(1, 1280),
        },
        "no embedding": {"bundle_emb.x.string_to_param.*": torch.ones(1, 1, 768)},
        "NaN": {"bundle_emb.x.emb_params": torch.full((1, 768), float("nan"))},
        "'bundle_emb.'": {"bundle_emb.": torch.ones(1, 768)},
        "two embeddings for the word": {
            "bundle_emb.x.string_to_param.a": torch.ones(1, 768),
            "bundle_emb.x.string_to_param.b": torch.ones(1, 768),
        },
    }
    for message, embeddings in cases.items():
        save_file(factors | embeddings, tmp_path / "a.safetensors")
        with pytest.raises(UserError, match=message):
            bundled_embeddings(read_weights(tmp_path / "a.safetensors"))
        with pytest.raises(UserError, match=message):
            convert(tmp_path / "a.safetensors", tmp_path / "out.safetensors", "kohya")
        assert not (tmp_path / "out.safetensors").exists()


@pytest.mark.parametrize("words", [("wolf_alpha", "big_diff"), ("clip_girl", "single_blocks"), ("a", "b")])
def test_two_words_are_two_embeddings(tmp_path, words):
    save_file({word: torch.randn(768) for word in words}, tmp_path / "a.safetensors")
    assert identify_source(tmp_path / "a.safetensors").kind == "embedding"
    assert identify_source(tmp_path / "a.safetensors").base == "SD1.5"
    with pytest.raises(UserError, match="holds 2 embeddings"):
        embedding_vectors(read_weights(tmp_path / "a.safetensors"), 768)


def test_widths_tell_the_base_of_an_embedding():
    widths = {"SD1.5": (768,), "SD2": (1024,), "SDXL": (768, 1280)}
    for base, sizes in widths.items():
        found = identify({f"clip_girl_{width}": torch.zeros(2, width) for width in sizes})
        assert (found.kind, found.base) == ("embedding", base)


def test_what_lies_beside_an_embedding_is_known_or_refused(tmp_path):
    content = {"string_to_token": {"*": torch.tensor(265)}, "string_to_param": {"*": torch.ones(2, 768)},
               "step": torch.tensor(5), "name": "wolf_alpha", "sd_checkpoint_name": "clip_g"}  # fmt: skip
    torch.save(content, tmp_path / "a.pt")
    assert embedding_vectors(read_weights(tmp_path / "a.pt"), 768).shape == (2, 768)
    torch.save(content | {"rotation": torch.eye(3)[None]}, tmp_path / "a.pt")
    with pytest.raises(UserError, match="'rotation' beside its embedding"):
        embedding_vectors(read_weights(tmp_path / "a.pt"), 768)


BLOCK = "down_blocks.0.motion_modules.0.temporal_transformer"


@pytest.mark.parametrize(
    "shapes",
    [
        {
            f"{BLOCK}.transformer_blocks.0.attention_blocks.0.to_q.weight": (8, 8),
            f"{BLOCK}.norm.weight": (8,),
        },
        {f"{BLOCK}.transformer_blocks.{i}.attention_blocks.0.to_q.weight": (8, 8) for i in range(4)},
        {"image_proj.proj.weight": (8, 8), "ip_adapter.1.to_k_ip.weight": (8, 8), "x.norm.bias": (8,)},
        {"adapter.body.0.in_conv.weight": (8, 8, 1, 1), "adapter.body.0.block1.weight": (8, 8, 3, 3)},
        {"my_joint_blocks.weight": (8, 8, 3), "is_double_blocks_like.weight": (8, 8, 3)},
    ],
)
def test_files_of_other_kinds_are_refused_without_a_base_that_they_are_not_made_for(tmp_path, shapes):
    save_file({key: torch.zeros(shape) for key, shape in shapes.items()}, tmp_path / "a.safetensors")
    with pytest.raises(UserError, match="is of an unknown kind") as raised:
        require(identify_source(tmp_path / "a.safetensors"), ("checkpoint", "adapter"), "a.safetensors")
    assert not any(base in str(raised.value) for base in ("FLUX", "SD3", "SDXL", "SD2"))


def test_families_are_told_by_structure_alone():
    theirs = {
        "lora_unet_joint_blocks_0_x_block_attn_qkv.lora_down.weight": "SD3",
        "model.diffusion_model.joint_blocks.0.x_block.attn.proj.weight": "SD3",
        "lora_unet_single_blocks_7_linear2.lora_down.weight": "FLUX",
        "double_blocks.0.img_attn.proj.weight": "FLUX",
        "diffusion_model.double_blocks.0.img_attn.proj.lora_A.weight": "FLUX",
        "transformer.single_transformer_blocks.0.attn.to_k.lora_A.weight": "FLUX",
        "lora_transformer_single_transformer_blocks_0_attn_to_k.alpha": "FLUX",
        "transformer.transformer_blocks.0.attn.to_k.lora_A.weight": "a diffusion transformer",
        "base_model.model.transformer.transformer_blocks.0.to_k.lora_A.weight": "a diffusion transformer",
        "conditioner.embedders.0.transformer.text_model.x": "SDXL",
        "model.diffusion_model.label_emb.0.0.weight": "SDXL",
        "add_embedding.linear_1.weight": "SDXL",
        "lora_te2_text_model_encoder_layers_0_mlp_fc1.alpha": "SDXL",
        "text_encoder_2.text_model.encoder.layers.0.mlp.fc1.lora_A.weight": "SDXL",
        "text_encoders.clip_g.transformer.text_model.x": "SDXL",
        "clip_g.transformer.text_model.x": "SDXL",
        "cond_stage_model.model.ln_final.weight": "SD2",
    }
    assert {key: family_of_names([key]) for key in theirs} == theirs
    assert not family_of_names(make_unet().state_dict())
    assert not family_of_names(f"lora_unet_{key}.alpha".replace(".", "_") for key in make_unet().state_dict())


TEXT = "encoder.layers.0.mlp.fc1"


@pytest.mark.parametrize(
    "prefix",
    [
        "lora_te_text_model_", "lora_te1_text_model_", "lora_te.text_model.", "text_encoder.text_model.",
        "text_encoders.clip_l.transformer.text_model.", "text_encoders.clip_l.text_model.",
        "clip_l.transformer.text_model.", "clip_l.text_model.", "cond_stage_model.transformer.text_model.",
        "lycoris_te_text_model_", "lycoris_te1_text_model_", "lycoris_text_model_", "text_model.",
        "base_model.model.text_model.", "base_model.model.text_encoder.text_model.", "text_encoder.",
        "lora_te_", "text_encoders.clip_l.transformer.",
    ],
)  # fmt: skip
def test_every_name_of_the_text_encoder_finds_its_module(tmp_path, prefix):
    module = TEXT.replace(".", "_") if prefix.endswith("_") else TEXT
    save_file({f"{prefix}{module}.lora_down.weight": torch.zeros(2, TEXT_DIM)}, tmp_path / "a.safetensors")
    modules = {"unet": [MODULE, "down_blocks.0.resnets.0.conv1"], "text_encoder": [TEXT]}
    found = split_adapter(read_weights(tmp_path / "a.safetensors"), modules)
    assert found["text_encoder"].keys() == {TEXT}
    assert not found["unet"]


def test_converted_embeddings_keep_their_word(tmp_path):
    for word in ("wolf_alpha", "style.weight", "clip_girl"):
        save_file({word: torch.randn(2, 768)}, tmp_path / f"{word}.safetensors")
        convert(tmp_path / f"{word}.safetensors", tmp_path / "a.safetensors", "A1111")
        assert read_tensors(tmp_path / "a.safetensors").keys() == {"emb_params"}
        convert(tmp_path / f"{word}.safetensors", tmp_path / "b.safetensors", "diffusers")
        assert read_tensors(tmp_path / "b.safetensors").keys() == {word}
