"""Released native-language systems: read, named, drawn from and refused where they would be mistaken."""

import json
import sys

import pytest
import sentencepiece
import torch
from agreement import outputs_agree
from diffusers import StableDiffusionPipeline
from released_folders import SENTENCES, alt, japanese, taiyi, word_pieced, write_json
from tiny import TEXT_DIM, make_text_encoder, make_unet
from transformers import BertTokenizer

import bdm
from bdm.cli import main
from bdm.convert import convert
from bdm.errors import UserError
from bdm.formats.identify import describe_file
from bdm.formats.systems import released_system
from bdm.models.backbone import empty_prompt_features, load_backbone
from bdm.text.english import encode_english
from bdm.text.native import NativeTextEncoder
from bdm.text.vocabulary import clip_tokenizer

PROMPTS = ["赤い提灯", "A Red Lantern, (best quality:1.2)", "", "红灯笼，蓝色背景（月饼）", "白い猫 " * 60]
MAKERS = {
    "Japanese Stable Diffusion": japanese,
    "Taiyi Stable Diffusion (Chinese or Chinese-EN)": taiyi,
    "AltDiffusion m2": alt,
    "AltDiffusion m9": lambda folder: alt(folder, nine=True),
    "SkyPaint or PAI-Diffusion": word_pieced,
}


def padded(ids, length, pad, front, end):
    """Ids as ``padding="max_length", truncation=True`` lays them out, and their mask."""
    row = [*front, *ids[: length - len(front) - 1], end]
    return row + [pad] * (length - len(row)), [1] * len(row) + [0] * (length - len(row))


def pieces_of(folder, name):
    return sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer" / name))


@torch.no_grad()
def formula(name, folder, encoder, text):
    """(1, L, D) features as the system's own pipeline computes them."""
    if name == "Japanese Stable Diffusion":
        pieces = pieces_of(folder, "spiece.model")
        ids, _ = padded(pieces.encode(text.lower()), 77, pieces.piece_to_id("[PAD]"), [], 2)
        return encoder(torch.tensor([ids]))[0]
    if name.startswith("AltDiffusion"):
        pieces = pieces_of(folder, "sentencepiece.bpe.model")
        own = [i + 1 if i else 3 for i in pieces.encode(text)]
        ids, mask = padded(own, 77, 1, [0], 2)
        return encoder(torch.tensor([ids]), attention_mask=torch.tensor([mask]))
    tokenizer = BertTokenizer.from_pretrained(folder / "tokenizer")
    ids = tokenizer(text, padding="max_length", max_length=77, truncation=True, return_tensors="pt").input_ids
    return encoder(ids)[0]


@pytest.mark.parametrize("name", MAKERS)
def test_features_are_those_of_the_system_bit_for_bit(name, tmp_path):
    encoder = MAKERS[name](tmp_path)
    pipe = bdm.BridgePipeline.from_pretrained(tmp_path)
    assert (pipe.branch, pipe.text_encoder, pipe.tokenizer) == (None, None, None)
    for text in PROMPTS:
        assert torch.equal(pipe.encode_prompt(text)[0], formula(name, tmp_path, encoder, text)), text
    # The encoder alone, out of the same folder, and saved and loaded again.
    alone = NativeTextEncoder.from_pretrained(tmp_path)
    alone.save_pretrained(tmp_path / "alone")
    again = NativeTextEncoder.from_pretrained(tmp_path / "alone")
    for text in PROMPTS:
        expected = formula(name, tmp_path, encoder, text)
        assert torch.equal(alone.encode([text]), expected)
        assert torch.equal(again.encode([text]), expected)


@pytest.mark.parametrize("name", MAKERS)
def test_it_draws_what_a_stock_pipeline_draws_of_these_features(name, tmp_path):
    encoder = MAKERS[name](tmp_path)
    pipe = bdm.BridgePipeline.from_pretrained(tmp_path)
    pipe.set_progress_bar_config(disable=True)
    drawn = pipe("赤い提灯", "猫", num_inference_steps=2, seed=3, output_type="np").images
    stock = StableDiffusionPipeline(
        pipe.vae, None, None, pipe.unet, pipe.scheduler, None, None, requires_safety_checker=False
    )
    stock.set_progress_bar_config(disable=True)
    expected = stock(
        prompt_embeds=formula(name, tmp_path, encoder, "赤い提灯"),
        negative_prompt_embeds=formula(name, tmp_path, encoder, "猫"),
        num_inference_steps=2, generator=torch.Generator().manual_seed(3), output_type="np",
    ).images  # fmt: skip
    outputs_agree(torch.from_numpy(drawn), torch.from_numpy(expected))


def test_taiyi_is_padded_to_what_its_folder_says(tmp_path):
    encoder = taiyi(tmp_path, length=128)
    features = NativeTextEncoder.from_pretrained(tmp_path).encode(["红灯笼"])
    tokenizer = BertTokenizer.from_pretrained(tmp_path / "tokenizer")
    tokens = tokenizer("红灯笼", padding="max_length", max_length=128)
    with torch.no_grad():
        assert torch.equal(features, encoder(torch.tensor([tokens.input_ids]))[0])


def test_nine_languages_are_known_by_the_weights_too(tmp_path):
    """The first release of the weights came with a configuration that did not say so."""
    encoder = alt(tmp_path, nine=True)
    path = tmp_path / "text_encoder" / "config.json"
    settings = json.loads(path.read_text())
    del settings["has_pre_transformation"]
    write_json(path, settings)
    loaded = NativeTextEncoder.from_pretrained(tmp_path)
    assert torch.equal(loaded.encode(["猫"]), formula("AltDiffusion m9", tmp_path, encoder, "猫"))
    assert loaded.text_dim == TEXT_DIM


def test_a_projection_is_never_lost_without_a_word(tmp_path):
    alt(tmp_path)
    path = tmp_path / "text_encoder" / "config.json"
    settings = json.loads(path.read_text())
    del settings["project_dim"]
    write_json(path, settings)
    with pytest.raises(UserError, match=r"holds 'transformation\.weight', which makes other features"):
        NativeTextEncoder.from_pretrained(tmp_path / "text_encoder")


def with_english(folder, **parts):
    torch.manual_seed(8)
    pipe = bdm.BridgePipeline.from_pretrained(
        folder, text_encoder=make_text_encoder(), tokenizer=clip_tokenizer(), **parts
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_an_english_prompt_acts_beside_the_native_one(tmp_path):
    encoder = japanese(tmp_path)
    pipe = with_english(tmp_path)
    told = []
    pipe.unet.register_forward_pre_hook(
        lambda _, args, kwargs: told.append(kwargs["encoder_hidden_states"]), with_kwargs=True
    )
    draw = dict(num_inference_steps=1, seed=0, output_type="latent")
    both = pipe("赤い提灯", prompt_en="ink style", **draw).images
    english = encode_english(["ink style", ""], pipe.text_encoder, pipe.tokenizer)
    texts = torch.cat([formula("Japanese Stable Diffusion", tmp_path, encoder, t) for t in ("", "赤い提灯")])
    expected = torch.cat([texts, english.flip(0)], dim=1)
    assert told[0].shape == (2, 77 + 77, TEXT_DIM)
    outputs_agree(told[0], expected)
    alone = pipe("赤い提灯", **draw).images
    assert told[-1].shape == (2, 77, TEXT_DIM)
    assert not torch.equal(both, alone)
    # Prompts with and without English side by side: each as if it were drawn alone.
    mixed = pipe(["赤い提灯", "赤い提灯"], prompt_en=["ink style", ""], **draw | {"seed": None},
                 generator=[torch.Generator().manual_seed(0) for _ in range(2)]).images  # fmt: skip
    outputs_agree(mixed, torch.cat([both, alone]))


def test_english_changes_from_step_to_step_and_is_joined_beside_native_text(tmp_path):
    encoder = japanese(tmp_path)
    pipe = with_english(tmp_path)
    told = []
    pipe.unet.register_forward_pre_hook(
        lambda _, args, kwargs: told.append(kwargs["encoder_hidden_states"]), with_kwargs=True
    )
    draw = dict(num_inference_steps=2, seed=0, output_type="latent")
    native = torch.cat([formula("Japanese Stable Diffusion", tmp_path, encoder, t) for t in ("", "赤い提灯")])

    def features(english, rows):
        said = encode_english(english, pipe.text_encoder, pipe.tokenizer)
        return torch.cat([native[rows], said], dim=1)

    pipe("赤い提灯", prompt_en="[ink style:flat colours:1]", **draw)
    outputs_agree(told[0], features(["", "ink style"], [0, 1]))
    outputs_agree(told[-1], features(["", "flat colours"], [0, 1]))
    pipe("赤い提灯", prompt_en="ink style AND flat colours", **draw)
    outputs_agree(told[-1], features(["", "ink style", "flat colours"], [0, 1, 1]))


def test_unguided_drawing_needs_no_negative(tmp_path):
    japanese(tmp_path)
    pipe = with_english(tmp_path)
    draw = dict(num_inference_steps=1, seed=0, output_type="latent", guidance_scale=1.0)
    for english in ("", "ink style"):
        assert pipe("赤い提灯", prompt_en=english, **draw).images.isfinite().all()
    features = pipe.encode_prompt("赤い提灯")[0]
    outputs_agree(pipe(prompt_embeds=features, **draw).images, pipe("赤い提灯", **draw).images)


def test_without_an_english_encoder_an_english_prompt_is_refused(tmp_path):
    japanese(tmp_path)
    pipe = bdm.BridgePipeline.from_pretrained(tmp_path)
    with pytest.raises(UserError, match="the pipeline has no English text encoder"):
        pipe("赤い提灯", prompt_en="ink style", num_inference_steps=1)


@pytest.mark.parametrize(
    "setting",
    [{"branch_scale": 0.5}, {"branch_start": 0.1}, {"english_guidance": 2.0}, {"world": 0.5},
     {"branch_schedule": "0:0.2:0"},
     {"approximation": bdm.Approximation(branch_every=2)}],
)  # fmt: skip
def test_what_only_a_branch_does_is_refused(setting, tmp_path):
    japanese(tmp_path)
    pipe = bdm.BridgePipeline.from_pretrained(tmp_path)
    with pytest.raises(UserError, match=f"{next(iter(setting))} is .* has no branch"):
        pipe("赤い提灯", num_inference_steps=1, **setting)


def test_a_pipeline_without_a_branch_is_saved_and_loaded(tmp_path):
    alt(tmp_path / "released", nine=True)
    pipe = with_english(tmp_path / "released")
    pipe.save_pretrained(tmp_path / "saved")
    again = bdm.BridgePipeline.from_pretrained(tmp_path / "saved")
    again.set_progress_bar_config(disable=True)
    draw = dict(prompt_en="ink", num_inference_steps=1, seed=0, output_type="latent")
    assert again.branch is None
    outputs_agree(again("猫", **draw).images, pipe("猫", **draw).images)
    assert released_system(tmp_path / "saved") is None


def test_its_parts_are_used_by_other_pipelines(tmp_path):
    japanese(tmp_path)
    pipe = bdm.BridgePipeline.from_pretrained(tmp_path)
    other = bdm.BridgeImg2ImgPipeline.from_pipe(pipe)
    assert other.native_text_encoder is pipe.native_text_encoder
    pipe.optimize(height=64, width=64).undo()


def test_a_text_encoder_of_another_width_is_refused(tmp_path):
    japanese(tmp_path)
    with pytest.raises(UserError, match="features are 32 wide and the UNet reads 24"):
        bdm.BridgePipeline.from_pretrained(tmp_path, unet=make_unet(cross_attention_dim=24))


@pytest.mark.parametrize("name", MAKERS)
def test_inspect_names_the_system(name, tmp_path, capsys):
    MAKERS[name](tmp_path)
    assert describe_file(tmp_path)["system"] == name
    assert main(["inspect", str(tmp_path)]) == 0
    assert name in capsys.readouterr().out


@pytest.mark.parametrize(
    ("called", "rows", "name"),
    [
        ("SkyPaint-v1.0", 0, "SkyPaint"),
        ("pai-diffusion-artist-large-zh", 0, "PAI-Diffusion"),
        ("downloaded", 105_879, "SkyPaint"),
        ("downloaded", 21_128, "PAI-Diffusion"),
    ],
)
def test_systems_of_one_build_are_told_apart_where_something_does(called, rows, name, tmp_path):
    word_pieced(tmp_path / called, rows)
    assert describe_file(tmp_path / called)["system"] == name


def test_names_in_the_index_are_data(tmp_path):
    japanese(tmp_path)
    path = tmp_path / "model_index.json"
    index = json.loads(path.read_text())
    index |= {
        "_class_name": ["antigravity", "JapaneseStableDiffusionPipeline"],
        "text_encoder": ["antigravity", "CLIPTextModel"],
        "scheduler": ["antigravity", "PNDMScheduler"],
    }
    write_json(path, index)
    assert bdm.BridgePipeline.from_pretrained(tmp_path).native_text_encoder is not None
    assert "antigravity" not in sys.modules


@pytest.mark.parametrize("name", MAKERS)
def test_it_is_never_taken_for_an_english_model(name, pipe, tmp_path):
    MAKERS[name](tmp_path / "released")
    pipe.save_pretrained(tmp_path / "bridge")
    released, message = tmp_path / "released", r"its text encoder reads a vocabulary of its own"
    before = {key: tensor.clone() for key, tensor in pipe.unet.state_dict().items()}
    for refused in (
        lambda: load_backbone(released),
        lambda: empty_prompt_features(released),
        lambda: bdm.BridgePipeline.from_pretrained(tmp_path / "bridge", backbone=released),
        lambda: bdm.BridgePipeline.from_pretrained(tmp_path / "bridge", backbone=released, english=False),
        lambda: pipe.plugins.attach(released),
        lambda: convert(released, tmp_path / "made.safetensors", "original"),
    ):
        with pytest.raises(UserError, match=message) as said:
            refused()
        assert name in str(said.value)
        assert "bdm.BridgePipeline.from_pretrained" in str(said.value)
        assert "\n" not in str(said.value)
    assert not (tmp_path / "made.safetensors").exists()
    assert all(torch.equal(before[key], tensor) for key, tensor in pipe.unet.state_dict().items())
    assert load_backbone(released, text_encoder=False).text_encoder is None


OTHERS = {
    "Taiyi-XL": ({"_class_name": "StableDiffusionXLPipeline", "tokenizer": ["transformers", "BertTokenizer"]},
                 {"cross_attention_dim": 2048, "addition_embed_type": "text_time"}, {"model_type": "bert"}),
    "Japanese SDXL": ({"_class_name": ["pipeline_japanese", "JapaneseStableDiffusionXLPipeline"]},
                      {"cross_attention_dim": 2048}, {"model_type": "clip_text_model"}),
    "Kolors": ({"_class_name": "KolorsPipeline"}, {"cross_attention_dim": 2048}, {"model_type": "chatglm"}),
    "HunyuanDiT": ({"_class_name": "HunyuanDiTPipeline"}, {}, {"model_type": "bert"}),
    "AltDiffusion m18": ({"_class_name": "AltDiffusionPipeline"}, {"cross_attention_dim": 1024},
                         {"model_type": "xlm-roberta", "project_dim": 1024}),
}  # fmt: skip


@pytest.mark.parametrize("name", OTHERS)
def test_systems_of_another_shape_are_refused_by_name(name, tmp_path):
    index, unet, encoder = OTHERS[name]
    write_json(tmp_path / "model_index.json", index)
    write_json(tmp_path / "text_encoder" / "config.json", encoder)
    if unet:
        write_json(tmp_path / "unet" / "config.json", {"_class_name": "UNet2DConditionModel", **unet})
    for refused in (load_backbone, bdm.BridgePipeline.from_pretrained, NativeTextEncoder.from_pretrained):
        with pytest.raises(UserError, match=f"is {name}, (which is|a)") as said:
            refused(tmp_path)
        assert "\n" not in str(said.value)
    assert name in describe_file(tmp_path)["system"]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "tokenizer/spiece.model").write_bytes(b"none"), "is no SentencePiece vocabulary"),
        (lambda f: (f / "tokenizer/spiece.model").unlink(), "tokenizer"),
        (lambda f: (f / "text_encoder/pytorch_model.bin").unlink(), "holds no weights"),
        (lambda f: (f / "text_encoder/pytorch_model.bin").write_bytes(b"none"), "pytorch_model.bin"),
        (lambda f: (f / "model_index.json").write_text("{"), "cannot be read as JSON"),
    ],
)
def test_damaged_folders_are_refused_in_a_line(damage, message, tmp_path):
    japanese(tmp_path)
    damage(tmp_path)
    with pytest.raises(UserError, match=message) as said:
        bdm.BridgePipeline.from_pretrained(tmp_path)
    assert "\n" not in str(said.value)


def test_a_single_file_with_another_vocabulary_is_refused(pipe, tmp_path):
    """Its text encoder would be paired with CLIP's vocabulary, which has other rows."""
    from community_files import write_original

    encoder = japanese(tmp_path / "released")
    other = type("Other", (), {"unet": pipe.unet, "vae": pipe.vae, "text_encoder": encoder})()
    write_original(other, tmp_path / "one.safetensors")
    with pytest.raises(UserError, match="get both of one model"):
        load_backbone(tmp_path / "one.safetensors")


def test_sentences_are_not_empty():
    assert len(SENTENCES) > 50
