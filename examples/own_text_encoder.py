"""A bridge for a language of your own: any text encoder with its tokenizer, and a fresh branch for it."""

from transformers import BertConfig, BertModel, BertTokenizer

import bdm

words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "лампа", "червона", "місяць"]
tokenizer = BertTokenizer(vocab={word: i for i, word in enumerate(words)})
sizes = dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128)
encoder = BertModel(BertConfig(vocab_size=len(words), **sizes), add_pooling_layer=False)
native = bdm.NativeTextEncoder(encoder, tokenizer, bdm.NativeTextSettings(mask=True))
native.save_pretrained("my_text_encoder")  # for recipe.native_text_encoder of a training run

shipped = bdm.BridgePipeline.from_pretrained("assets/emoji")
branch = bdm.BranchModel.from_backbone(shipped.unet, native.text_dim)
branch.save_pretrained("my_branch")
own = dict(branch="my_branch", native_text_encoder="my_text_encoder")
pipe = bdm.BridgePipeline.from_pretrained("assets/emoji", **own)

settings = dict(prompt_en="butterfly", guidance_scale=2.0, num_inference_steps=8, seed=3)
picture = pipe("червона лампа", **settings).images[0]
assert picture == shipped("", branch_scale=0.0, **settings).images[0]  # an untrained branch changes nothing
picture.resize((256, 256), resample=0).save("lamp.png")
print("lamp.png")
