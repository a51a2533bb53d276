"""Tiny random folders in the layouts of released native-language systems, with the names of 2022."""

import io
import json

import sentencepiece
import torch
from diffusers import PNDMScheduler
from tiny import TEXT_DIM, make_unet, make_vae
from torch import nn
from transformers import (
    BertConfig,
    BertModel,
    CLIPTextConfig,
    CLIPTextModel,
    XLMRobertaConfig,
    XLMRobertaModel,
)

CHARACTERS = "的一是在不了有和人这中大为上个国我以要他红灯笼蓝色背景月饼猫日本人间提灯白青（），。、"
SENTENCES = [
    "赤い提灯と月餅",
    "白い猫がいる",
    "a red lantern, best quality",
    "サラリーマン 油絵",
    "红灯笼，蓝色背景",
] * 20
#: diffusers' names of the VAE's attention before 0.18.
OLD_VAE = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
SMALL = dict(intermediate_size=48, num_hidden_layers=3, num_attention_heads=4)


def piece_model(**rules):
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES), model_writer=written, vocab_size=160, hard_vocab_limit=False,
        num_threads=1, minloglevel=2, **rules,
    )  # fmt: skip
    return written.getvalue()


def write_json(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")


def write_bin(path, tensors):
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({name: tensor.contiguous() for name, tensor in tensors.items()}, path)


def write_common(folder, index, unet=None):
    """UNet, VAE, scheduler and the index of a pipeline, all as ``.bin``."""
    unet, vae = unet or make_unet(), make_vae()
    for part, model in (("unet", unet), ("vae", vae)):
        config = {key: value for key, value in model.config.items() if not key.startswith("_use")}
        write_json(folder / part / "config.json", {**config, "_class_name": type(model).__name__})
    write_bin(folder / "unet" / "diffusion_pytorch_model.bin", unet.state_dict())
    old = {}
    for name, tensor in vae.state_dict().items():
        for new, was in OLD_VAE.items():
            name = name.replace(f"attentions.0.{new}.", f"attentions.0.{was}.")
        old[name] = tensor
    write_bin(folder / "vae" / "diffusion_pytorch_model.bin", old)
    PNDMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", skip_prk_steps=True, steps_offset=1
    ).save_pretrained(folder / "scheduler")
    write_json(
        folder / "feature_extractor" / "preprocessor_config.json",
        {"feature_extractor_type": "CLIPFeatureExtractor", "size": 224, "crop_size": 224},
    )
    parts = {
        "feature_extractor": ["transformers", "CLIPFeatureExtractor"], "safety_checker": [None, None],
        "scheduler": ["diffusers", "PNDMScheduler"], "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }  # fmt: skip
    write_json(folder / "model_index.json", {"_diffusers_version": "0.6.0", **parts, **index})


def write_encoder(folder, model, prefix, **settings):
    """A text encoder with the names and buffers that transformers wrote in 2022."""
    config = {**model.config.to_dict(), **settings}
    write_json(folder / "text_encoder" / "config.json", config)
    weights = {f"{prefix}{name.removeprefix(prefix)}": tensor for name, tensor in model.state_dict().items()}
    embeddings = next(name for name in weights if "embeddings." in name).split("embeddings.")[0]
    positions = torch.arange(model.config.max_position_embeddings)[None]
    write_bin(
        folder / "text_encoder" / "pytorch_model.bin",
        {**weights, f"{embeddings}embeddings.position_ids": positions},
    )


def clip_model(vocabulary):
    torch.manual_seed(1)
    config = CLIPTextConfig(
        vocab_size=vocabulary, hidden_size=TEXT_DIM, bos_token_id=0, eos_token_id=2, pad_token_id=1, **SMALL
    )
    return CLIPTextModel(config).eval()


def write_words(folder, length=77):
    """BERT's vocabulary of single characters."""
    words = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        *dict.fromkeys(CHARACTERS),
        *"abcdefghijklmnopqrstuvwxyz(),.:",
    ]
    (folder / "tokenizer").mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer" / "vocab.txt").write_text("\n".join(words) + "\n", encoding="utf-8")
    write_json(
        folder / "tokenizer" / "tokenizer_config.json",
        {"tokenizer_class": "BertTokenizer", "do_lower_case": True, "model_max_length": length,
         "pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"},
    )  # fmt: skip
    return len(words)


def japanese(folder):
    model = piece_model(unk_id=0, bos_id=1, eos_id=2, pad_id=3, pad_piece="[PAD]")
    (folder / "tokenizer").mkdir(parents=True)
    (folder / "tokenizer" / "spiece.model").write_bytes(model)
    write_json(folder / "tokenizer" / "special_tokens_map.json", {"eos_token": "</s>", "pad_token": "[PAD]"})
    write_json(
        folder / "tokenizer" / "tokenizer_config.json", {"tokenizer_class": "T5Tokenizer", "extra_ids": 0}
    )
    encoder = clip_model(sentencepiece.SentencePieceProcessor(model_proto=model).get_piece_size())
    write_encoder(folder, encoder, "text_model.", architectures=["CLIPTextModel"])
    write_common(folder, {
        "_class_name": "JapaneseStableDiffusionPipeline", "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "T5Tokenizer"],
    })  # fmt: skip
    return encoder


def taiyi(folder, length=77):
    torch.manual_seed(2)
    rows = write_words(folder, length)
    encoder = BertModel(
        BertConfig(vocab_size=rows, hidden_size=TEXT_DIM, max_position_embeddings=512, **SMALL)
    ).eval()
    write_encoder(folder, encoder, "", architectures=["BertModel"])
    write_common(folder, {
        "_class_name": "StableDiffusionPipeline", "text_encoder": ["transformers", "BertModel"],
        "tokenizer": ["transformers", "BertTokenizer"],
    })  # fmt: skip
    return encoder


def word_pieced(folder, rows=0):
    """SkyPaint's and PAI-Diffusion's build."""
    encoder = clip_model(max(rows, write_words(folder)))
    write_encoder(folder, encoder, "text_model.", architectures=["CLIPTextModel"])
    write_common(folder, {
        "_class_name": "StableDiffusionPipeline", "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "BertTokenizer"],
    })  # fmt: skip
    return encoder


class Transformed(nn.Module):
    """AltDiffusion's text encoder by its formula, written down apart from the library's."""

    def __init__(self, config, nine):
        super().__init__()
        self.roberta = XLMRobertaModel(config)
        self.transformation = nn.Linear(config.hidden_size, TEXT_DIM)
        self.nine, self.config = nine, config
        if nine:
            self.pre_LN = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
            self.transformation_pre = nn.Linear(config.hidden_size, TEXT_DIM)

    def forward(self, ids, attention_mask):
        states = self.roberta(ids, attention_mask=attention_mask, output_hidden_states=True)
        if self.nine:
            return self.transformation_pre(self.pre_LN(states.hidden_states[-2]))
        return self.transformation(states.last_hidden_state)


def alt(folder, nine=False):
    torch.manual_seed(3)
    model = piece_model()
    (folder / "tokenizer").mkdir(parents=True)
    (folder / "tokenizer" / "sentencepiece.bpe.model").write_bytes(model)
    write_json(
        folder / "tokenizer" / "tokenizer_config.json",
        {"tokenizer_class": "XLMRobertaTokenizer", "model_max_length": 77, "pad_token": "<pad>"},
    )
    rows = sentencepiece.SentencePieceProcessor(model_proto=model).get_piece_size() + 2
    config = XLMRobertaConfig(vocab_size=rows, hidden_size=40, max_position_embeddings=90, **SMALL)
    encoder = Transformed(config, nine).eval()
    write_encoder(
        folder, encoder, "", architectures=["RobertaSeriesModelWithTransformation"], project_dim=TEXT_DIM,
        use_attention_mask=True, pooler_fn="cls", learn_encoder=False,
        **({"has_pre_transformation": True} if nine else {}),
    )  # fmt: skip
    write_common(folder, {
        "_class_name": "AltDiffusionPipeline", "tokenizer": ["transformers", "XLMRobertaTokenizer"],
        "text_encoder": ["alt_diffusion", "RobertaSeriesModelWithTransformation"],
    })  # fmt: skip
    return encoder
