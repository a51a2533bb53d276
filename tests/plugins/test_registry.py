"""The contract of plug-ins: attach, change strength, detach.

Whatever happens, the base comes back bit for bit.
"""

import random

import pytest
import torch
from agreement import outputs_agree
from community_files import make_controlnet, write_original
from diffusers import StableDiffusionControlNetPipeline, StableDiffusionPipeline
from PIL import Image
from safetensors.torch import save_file
from tiny import TEXT_DIM, make_unet, make_vae

from bdm.errors import UserError
from bdm.formats import names
from bdm.formats.identify import file_hashes
from bdm.plugins import Plugins
from bdm.plugins.controlnet import canny_edges, control_tensor
from bdm.text.english import encode_english, spell_triggers

ATTENTION = "down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"


@pytest.fixture
def draw(pipe):
    def draw(**settings):
        control = torch.linspace(0, 1, 3 * 64 * 64).view(1, 3, 64, 64)
        pictures = {name: control for name in pipe.plugins.controlnets}
        return pipe(
            "红灯笼", prompt_en="a lantern, mood style", seed=3, num_inference_steps=2, output_type="pt",
            control_images=pictures or None, **settings,
        ).images  # fmt: skip

    return draw


def weights_of(pipe):
    """Copies of all weights that plug-ins reach."""
    parts = {part: getattr(pipe, part) for part in ("unet", "vae", "text_encoder")}
    return {
        f"{part}.{name}": p.detach().clone()
        for part, module in parts.items()
        for name, p in module.named_parameters()
    }


def same_weights(ours, theirs):
    return ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


@pytest.mark.parametrize("name", ["style", "colours", "ink", "shift", "edges", "mood"])
def test_each_acts_and_leaves_nothing_behind(pipe, files, draw, name):
    before, tokens = draw(), len(pipe.tokenizer)
    tokenizer, weights = pipe.tokenizer, weights_of(pipe)
    plugin = pipe.plugins.attach(files[name])
    assert (plugin.name, plugin in list(pipe.plugins)) == (name, True)
    assert not torch.equal(draw(), before)
    pipe.plugins.detach(name)
    assert torch.equal(draw(), before)
    assert pipe.tokenizer is tokenizer
    assert len(pipe.tokenizer) == tokens
    assert same_weights(weights_of(pipe), weights)
    assert len(pipe.plugins) == 0


def test_any_order_of_attaching_and_detaching_restores_the_base(pipe, files, draw):
    before = draw()
    dice = random.Random(4)
    for _ in range(3):
        order = dice.sample(sorted(files), len(files))
        for name in order:
            pipe.plugins.attach(files[name])
        everything = draw()
        # Of two that bring a VAE the later one counts; the others' order makes no difference.
        some = dice.sample(["edges", "ink", "mood", "shift"], 3)
        for name in some:
            pipe.plugins.detach(name)
        assert not torch.equal(draw(), everything)
        for name in some:
            pipe.plugins.attach(files[name])
        torch.testing.assert_close(draw(), everything, atol=1e-4, rtol=0)
        for name in dice.sample(sorted(files), len(files)):
            pipe.plugins.detach(name)
        assert torch.equal(draw(), before)


def test_adapters_add_up_and_strength_is_linear(pipe, files):
    weight = pipe.unet.get_submodule("down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k").weight
    base = weight.detach().clone()
    pipe.plugins.attach(files["ink"])
    change = weight.detach() - base
    pipe.plugins.set_strength("ink", 0.5)
    torch.testing.assert_close(weight.detach() - base, change * 0.5)
    pipe.plugins.attach(files["ink"], "again", strength=2.0)
    torch.testing.assert_close(weight.detach() - base, change * 2.5)
    pipe.plugins.set_strength("ink", 0.0, 1.0)
    pipe.plugins.set_strength("again", 0.0)
    assert torch.equal(weight, base)
    fc1 = next(
        p for name, p in pipe.text_encoder.named_parameters() if name.endswith("layers.0.mlp.fc1.weight")
    )
    pipe.plugins.detach("again")
    with_text = fc1.detach().clone()
    pipe.plugins.detach("ink")
    assert not torch.equal(with_text, fc1)


def test_adapters_follow_the_checkpoint_beneath(pipe, files):
    weight = pipe.unet.get_submodule("down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k").weight
    base = weight.detach().clone()
    pipe.plugins.attach(files["ink"])
    change = weight.detach() - base
    pipe.plugins.attach(files["style"])
    together = weight.detach().clone()
    pipe.plugins.detach("ink")
    torch.testing.assert_close(together - weight.detach(), change)
    pipe.plugins.detach("style")
    assert torch.equal(weight, base)


def test_strength_for_one_call(pipe, files, draw):
    pipe.plugins.attach(files["ink"], strength=0.7, text_strength=0.3)
    normal = draw()
    weak = draw(plugin_strength={"ink": 0.1})
    assert pipe.plugins["ink"].strength == {"unet": 0.7, "text_encoder": 0.3}
    assert torch.equal(draw(), normal)
    assert not torch.equal(weak, normal)
    pipe.plugins.set_strength("ink", 0.1)
    assert torch.equal(draw(), weak)


def test_failed_attachment_changes_nothing(pipe, files, draw, tmp_path):
    pipe.plugins.attach(files["ink"])
    before, tokens = draw(), len(pipe.tokenizer)
    up, down, alpha = (
        f"lora_unet_{ATTENTION}.{end}" for end in ("lora_up.weight", "lora_down.weight", "alpha")
    )
    wrong = {
        "nan": ({down: torch.full((2, TEXT_DIM), float("nan")), up: torch.zeros(16, 2)}, "NaN"),
        "shape": ({down: torch.zeros(2, 5), up: torch.zeros(16, 2)}, "do not fit"),
        "keys": (
            {"lora_unet_elsewhere.lora_down.weight": torch.zeros(2, 5), alpha: torch.tensor(1.0)},
            "elsewhere",
        ),
        "half": ({down: torch.zeros(2, TEXT_DIM), alpha: torch.tensor(1.0)}, "do not fit"),
        "sdxl": (
            {
                "lora_te2_x.lora_down.weight": torch.zeros(2, 5),
                "lora_te1_x.lora_up.weight": torch.zeros(2, 5),
            },
            "SDXL",
        ),
        "wide": ({"emb_params": torch.zeros(2, 999)}, "width"),
        "nonsense": ({"layer.kernel": torch.zeros(2, 2, 2)}, "unknown kind"),
        "vae": (
            {k: torch.zeros(3) for k in names.vae_to_original(make_vae().state_dict())},
            "latent channels",
        ),
    }
    for name, (tensors, message) in wrong.items():
        save_file(tensors, tmp_path / f"{name}.safetensors")
        with pytest.raises(UserError, match=message):
            pipe.plugins.attach(tmp_path / f"{name}.safetensors")
        assert [plugin.name for plugin in pipe.plugins] == ["ink"]
    for settings in ({"strenght": 1.0}, {"start": 0.1}):
        with pytest.raises(UserError, match="takes no setting"):
            pipe.plugins.attach(files["shift"], **settings)
    with pytest.raises(UserError, match="already"):
        pipe.plugins.attach(files["shift"], "ink")
    with pytest.raises(UserError, match="window"):
        pipe.plugins.attach(files["edges"], start=0.8, end=0.2)
    with pytest.raises(UserError, match="attached are: ink"):
        pipe.plugins.detach("oil")
    assert torch.equal(draw(), before)
    assert len(pipe.tokenizer) == tokens


@pytest.mark.parametrize("strength", [(1.0, 1.0), (0.0, 0.0), (0.5, 0.0)])
@pytest.mark.parametrize(("part", "shape"), [("unet", 16), ("te", 32)])
def test_files_that_do_not_fit_are_refused_at_any_strength(pipe, files, tmp_path, strength, part, shape):
    module = {"unet": f"lora_unet_{ATTENTION}", "te": "lora_te_text_model_encoder_layers_0_mlp_fc1"}[part]
    pipe.plugins.attach(files["ink"])
    before = weights_of(pipe)
    huge = {
        "lora_up.weight": torch.full((shape, 2), 1e25),
        "lora_down.weight": torch.full((2, TEXT_DIM), 1e25),
    }
    narrow = {"lora_up.weight": torch.zeros(shape, 2), "lora_down.weight": torch.zeros(2, 5)}
    for factors, message in ((huge, "NaN or larger than float32"), (narrow, "do not fit")):
        save_file(
            {f"{module}.{key}": tensor for key, tensor in factors.items()}, tmp_path / "wrong.safetensors"
        )
        with pytest.raises(UserError, match=message):
            pipe.plugins.attach(
                tmp_path / "wrong.safetensors", strength=strength[0], text_strength=strength[1]
            )
    assert [plugin.name for plugin in pipe.plugins] == ["ink"]
    assert same_weights(weights_of(pipe), before)


def test_overflow_of_the_weights_dtype_is_refused(pipe, files, tmp_path):
    """float16 ends at 65504; what float32 holds may be too large for it."""
    factors = {
        "lora_up.weight": torch.full((16, 2), 300.0),
        "lora_down.weight": torch.full((2, TEXT_DIM), 300.0),
    }
    save_file(
        {f"lora_unet_{ATTENTION}.{key}": tensor for key, tensor in factors.items()},
        tmp_path / "loud.safetensors",
    )
    pipe.plugins.attach(tmp_path / "loud.safetensors")
    before = weights_of(pipe)
    with pytest.raises(UserError, match="float32 can hold"):
        pipe.plugins.set_strength("loud", 1e38)
    assert same_weights(weights_of(pipe), before)
    assert pipe.plugins["loud"].strength["unet"] == 1.0
    pipe.plugins.detach("loud")
    pipe.unet.half()
    before = weights_of(pipe)
    with pytest.raises(UserError, match="float16 can hold"):
        pipe.plugins.attach(tmp_path / "loud.safetensors")
    other = type("Other", (), {"unet": make_unet(), "vae": make_vae(), "text_encoder": pipe.text_encoder})()
    other.unet.conv_in.bias.data[0] = 1e6
    write_original(other, tmp_path / "large.safetensors")
    with pytest.raises(UserError, match="float16 can hold"):
        pipe.plugins.attach(tmp_path / "large.safetensors")
    assert same_weights(weights_of(pipe), before)
    pipe.plugins.attach(tmp_path / "loud.safetensors", strength=0.01)


def test_list_says_what_is_attached(pipe, files):
    pipe.plugins.attach(files["ink"], strength=0.8)
    text = repr(pipe.plugins)
    assert "ink: adapter unet 0.8, text_encoder 0.8" in text
    data_hash = file_hashes(files["ink"])["data hash"]
    assert f"[{data_hash}]" in text
    files["ink"].write_bytes(files["shift"].read_bytes())
    assert pipe.plugins["ink"].hash == data_hash, "of the file that was attached"
    files["ink"].unlink()
    assert f"[{data_hash}]" in repr(pipe.plugins)
    pipe.plugins.attach(files["mood"])
    with pytest.raises(UserError, match="no meaning"):
        pipe.plugins.set_strength("mood", 0.5)


def test_controlnet_counts_its_layers_as_it_likes(pipe, tmp_path):
    """One number of layers for all blocks, or one for each."""
    make_controlnet(pipe.unet).save_pretrained(tmp_path / "edges")
    pipe.unet.register_to_config(layers_per_block=(2, 2, 2, 2))
    pipe.plugins.attach(tmp_path / "edges")
    for changes in ({"layers_per_block": 1}, {"cross_attention_dim": 2 * TEXT_DIM}):
        make_controlnet(make_unet(**changes)).save_pretrained(tmp_path / "other")
        with pytest.raises(
            UserError, match=f"ControlNet's {next(iter(changes))} .* does not fit the backbone's"
        ):
            pipe.plugins.attach(tmp_path / "other")


@pytest.mark.parametrize("window", [(0.0, 1.0), (0.0, 0.5), (0.4, 1.0)])
def test_controlnet_is_stock_diffusers_without_the_branch(pipe, files, window):
    """Two ControlNets through hooks on a stock pipeline equal diffusers' own two-ControlNet pipeline."""
    from diffusers import ControlNetModel

    parts = {key: getattr(pipe, key) for key in ("vae", "text_encoder", "tokenizer", "unet", "scheduler")}
    none = {"safety_checker": None, "feature_extractor": None}
    controlnets = [ControlNetModel.from_pretrained(files["edges"]) for _ in range(2)]
    peer = StableDiffusionControlNetPipeline(
        **parts, **none, controlnet=controlnets, requires_safety_checker=False
    )
    stock = StableDiffusionPipeline(**parts, **none, requires_safety_checker=False)
    pictures = [torch.rand(1, 3, 64, 64), torch.rand(1, 3, 64, 64)]
    embeds = encode_english(["a cat", ""], pipe.text_encoder, pipe.tokenizer)
    settings = dict(
        prompt_embeds=embeds[:1],
        negative_prompt_embeds=embeds[1:],
        num_inference_steps=5,
        output_type="latent",
        num_images_per_prompt=2,
    )
    plugins = Plugins(stock)
    plugins.attach(files["edges"], "one", strength=0.9, start=window[0], end=window[1])
    plugins.attach(files["edges"], "two", strength=0.4)
    with plugins.during_call(
        {"one": pictures[0], "two": pictures[1]}, steps=lambda: stock._num_timesteps, images_per_prompt=2
    ):
        ours = stock(**settings, generator=torch.Generator().manual_seed(1)).images
    plugins.clear()
    theirs = peer(
        **settings,
        image=pictures,
        generator=torch.Generator().manual_seed(1),
        controlnet_conditioning_scale=[0.9, 0.4],
        control_guidance_start=[window[0], 0.0],
        control_guidance_end=[window[1], 1.0],
    ).images
    outputs_agree(ours, theirs)


def test_control_pictures_are_checked(pipe, files, monkeypatch):
    with pytest.raises(UserError, match="attached ControlNets: none"):
        pipe("龙", control_images={"edges": Image.new("RGB", (64, 64))}, num_inference_steps=1)
    pipe.plugins.attach(files["edges"])
    with pytest.raises(UserError, match="no control picture"):
        pipe("龙", num_inference_steps=1)
    with pytest.raises(UserError, match="mode RGBA"):
        pipe("龙", control_images=Image.new("RGBA", (64, 64)), num_inference_steps=1)
    with monkeypatch.context() as nothing_runs:
        nothing_runs.setattr(pipe, "_english_features", None)
        for size, picture in (
            ({}, "32x64"),
            ({"height": 64}, "32x64"),
            ({"height": 32, "width": 32}, "64x64"),
        ):
            with pytest.raises(
                UserError,
                match=f"{picture}, the picture to draw is {'32x32' if 'width' in size else '64x64'}",
            ):
                pipe(
                    "龙",
                    control_images=Image.new("RGB", tuple(map(int, picture.split("x")))),
                    num_inference_steps=1,
                    **size,
                )
    # Latents have a size of their own.
    wide = torch.randn(1, 4, 8, 16)
    pipe("龙", control_images=Image.new("RGB", (128, 64)), num_inference_steps=1, latents=wide)
    with pytest.raises(UserError, match="the picture to draw is 128x64"):
        pipe("龙", control_images=Image.new("RGB", (64, 64)), num_inference_steps=1, latents=wide)
    pipe("龙", control_images=Image.new("L", (64, 64)), num_inference_steps=1)


@pytest.mark.parametrize(
    ("pictures", "message"),
    [
        (torch.zeros(1, 3, 8, 8, dtype=torch.uint8), "torch.uint8"),
        (torch.full((1, 3, 8, 8), 255.0), "from 255 to 255"),
        (torch.linspace(-1, 1, 192).view(1, 3, 8, 8), "from -1 to 1"),
        (torch.full((1, 3, 8, 8), float("nan")), "nan"),
        (torch.zeros(0, 3, 8, 8), r"shape \(0, 3"),
        (torch.zeros(1, 1, 8, 8), r"shape \(1, 1"),
    ],
)
def test_control_tensors_hold_pictures(pictures, message):
    with pytest.raises(UserError, match=message):
        control_tensor(pictures)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_control_tensors_stay_as_they_are(dtype):
    pictures = torch.rand(2, 3, 8, 8).to(dtype)
    assert control_tensor(pictures) is pictures


def test_canny_finds_the_edge_of_a_square():
    picture = Image.new("RGB", (32, 32), "black")
    picture.paste("white", (8, 8, 24, 24))
    edges = torch.tensor(list(canny_edges(picture).convert("L").getdata())).view(32, 32)
    assert edges.max() == 255
    assert edges[12:20, 12:20].sum() == 0
    assert edges[:6].sum() == 0
    assert 40 < (edges > 0).sum() < 140


def test_embedding_is_its_vectors(pipe, files):
    """The trigger word puts the file's rows where CLIP reads token embeddings, in each of its spellings."""
    vectors = torch.load(files["mood"], weights_only=True)["string_to_param"]["*"]
    seen = []
    table = pipe.text_encoder.get_input_embeddings()
    handle = table.register_forward_hook(lambda _, __, output: seen.append(output))
    pipe.plugins.attach(files["mood"])
    for text in ("a mood picture", "a embedding:mood picture", "a MOOD picture", "a (mood:1.3) picture"):
        encode_english([text], pipe.text_encoder, pipe.tokenizer)
        assert torch.equal(seen[-1][0, 2:5], vectors), text
    encode_english(["a moody picture"], pipe.text_encoder, pipe.tokenizer)
    assert not (seen[-1][0, :, None] == vectors[0]).all(-1).any()
    # A second embedding keeps its own rows when the first goes.
    save_file({"emb_params": torch.ones(1, TEXT_DIM)}, files["mood"].with_name("calm.safetensors"))
    pipe.plugins.attach(files["mood"].with_name("calm.safetensors"))
    pipe.plugins.detach("mood")
    encode_english(["calm"], pipe.text_encoder, pipe.tokenizer)
    assert torch.equal(seen[-1][0, 1], torch.ones(TEXT_DIM))
    handle.remove()


@pytest.mark.parametrize("form", ["A1111 safetensors", "diffusers", "one vector"])
def test_embedding_forms(pipe, tmp_path, form):
    path = tmp_path / "calm.safetensors"
    tensors = {
        "A1111 safetensors": {"emb_params": torch.randn(2, TEXT_DIM)},
        "diffusers": {"<calm>": torch.randn(2, TEXT_DIM)},
        "one vector": {"<calm>": torch.randn(TEXT_DIM)},
    }[form]
    if form == "diffusers":
        path = path.with_suffix(".bin")
        torch.save(tensors, path)
    else:
        save_file(tensors, path)
    rows = pipe.text_encoder.get_input_embeddings().weight.shape[0]
    pipe.plugins.attach(path)
    table = pipe.text_encoder.get_input_embeddings().weight
    assert torch.equal(table[rows:], next(iter(tensors.values())).reshape(-1, TEXT_DIM))


def test_stock_pipeline_reads_several_vectors_too(pipe, files):
    parts = {key: getattr(pipe, key) for key in ("vae", "text_encoder", "tokenizer", "unet", "scheduler")}
    stock = StableDiffusionPipeline(
        **parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False
    )
    plugins = Plugins(stock)
    plugins.attach(files["mood"])
    theirs = stock.encode_prompt("a <mood> picture", "cpu", 1, False)[0]
    outputs_agree(theirs, encode_english(["a mood picture"], stock.text_encoder, stock.tokenizer))
    plugins.clear()


def test_clip_skip_is_a1111s(pipe):
    ids = pipe.tokenizer(["a cat"], padding="max_length", return_tensors="pt").input_ids
    states = pipe.text_encoder(ids, output_hidden_states=True).hidden_states
    norm = next(m for name, m in pipe.text_encoder.named_modules() if name.endswith("final_layer_norm"))
    for skip in (1, 2):
        outputs_agree(encode_english(["a cat"], pipe.text_encoder, pipe.tokenizer, skip), norm(states[-skip]))
    assert (norm(states[-1]) - norm(states[-2])).abs().max() > 0.01
    with pytest.raises(UserError, match="clip_skip 3"):
        encode_english(["a cat"], pipe.text_encoder, pipe.tokenizer, 3)


def test_pipelines_with_every_part_work_on_a_bare_backbone(pipe, files):
    from bdm.models.backbone import Backbone

    backbone = Backbone(pipe.vae, pipe.text_encoder, pipe.tokenizer, pipe.unet, pipe.scheduler)
    plugins = Plugins(backbone)
    for name in ("style", "ink", "mood"):
        plugins.attach(files[name])
    assert len(backbone.tokenizer) == len(pipe.tokenizer) + 3
    plugins.clear()
    assert backbone.tokenizer is pipe.tokenizer


def test_triggers_are_found_whole_and_once(pipe, tmp_path):
    for name in ("hands", "bad-hands-5", "坏词"):
        save_file({"emb_params": torch.randn(2, TEXT_DIM)}, tmp_path / f"{name}.safetensors")
        pipe.plugins.attach(tmp_path / f"{name}.safetensors")
    spell = lambda text: spell_triggers(text, pipe.tokenizer)  # noqa: E731
    assert spell("bad-hands-5, Hands") == "<bad-hands-5> <bad-hands-5>_1, <hands> <hands>_1"
    assert spell("一个坏词的图") == "一个<坏词> <坏词>_1的图"
    assert spell("shorthands handset") == "shorthands handset"
    assert spell("<hands> embedding:hands") == "<hands> <hands>_1 <hands> <hands>_1"


@pytest.mark.parametrize("name", ["a<b", "|endoftext|", "calm", " ", "\udcff"])
def test_trigger_words_that_cannot_be(pipe, tmp_path, name):
    save_file({"emb_params": torch.randn(2, TEXT_DIM)}, tmp_path / "calm.safetensors")
    pipe.plugins.attach(tmp_path / "calm.safetensors")
    rows, tokenizer = pipe.text_encoder.get_input_embeddings().weight.shape[0], pipe.tokenizer
    with pytest.raises(UserError):
        pipe.plugins.attach(tmp_path / "calm.safetensors", name)
    assert pipe.text_encoder.get_input_embeddings().weight.shape[0] == rows
    assert pipe.tokenizer is tokenizer


@pytest.mark.parametrize("strength", [float("nan"), float("inf"), "0.8", (1.0, 2.0, 3.0)])
def test_strengths_are_finite_numbers(pipe, files, draw, strength):
    pipe.plugins.attach(files["ink"], strength=0.5)
    before = draw()
    with pytest.raises(UserError, match=r"number"):
        pipe.plugins.set_strength("ink", strength)
    with pytest.raises(UserError, match=r"number"):
        draw(plugin_strength={"ink": strength})
    with pytest.raises(UserError, match=r"number"):
        pipe.plugins.attach(files["ink"], "again", strength=strength)
    assert pipe.plugins["ink"].strength == {"unet": 0.5, "text_encoder": 0.5}
    assert torch.equal(draw(), before)


def test_changed_hosts_are_named(pipe, files):
    pipe.plugins.attach(files["ink"])
    old, pipe.unet = pipe.unet, make_unet()
    with pytest.raises(UserError, match="put the old one back, detach, then exchange"):
        pipe.plugins.detach("ink")
    pipe.unet = old
    pipe.plugins.detach("ink")
    pipe.unet = make_unet()
    pipe.plugins.attach(files["ink"])
    # Parts that no plug-in is on can be exchanged meanwhile.
    pipe.vae = make_vae()
    pipe.plugins.attach(files["colours"])


@pytest.mark.parametrize("name", ["ink", "edges", "style"])
def test_pipelines_that_share_parts_do_not_stack_their_plugins(pipe, files, name):
    """Each would take the other's weights for the base, and leave them behind."""
    other = Plugins(type("Other", (), {"unet": pipe.unet})())
    before = weights_of(pipe)
    pipe.plugins.attach(files[name])
    for theirs in ("shift", "edges"):
        with pytest.raises(UserError, match="another pipeline that shares this unet"):
            other.attach(files[theirs])
    pipe.plugins.detach(name)
    other.attach(files["shift"])
    with pytest.raises(UserError, match="another pipeline"):
        pipe.plugins.attach(files[name])
    pipe.plugins.attach(files["colours"])  # the VAE is its own
    other.clear()
    pipe.plugins.attach(files[name])
    pipe.plugins.clear()
    assert same_weights(weights_of(pipe), before)


def test_a_dropped_pipeline_is_not_in_the_way(pipe, files):
    dropped = type("Dropped", (), {"unet": pipe.unet})()
    dropped.plugins = Plugins(dropped)
    dropped.plugins.attach(files["edges"])
    del dropped
    pipe.plugins.attach(files["shift"])
    pipe.plugins.attach(files["edges"])
    assert [plugin.name for plugin in pipe.plugins] == ["shift", "edges"]


def test_file_that_is_not_there_is_not_looked_for_on_the_hub(pipe):
    with pytest.raises(UserError, match="no such file"):
        pipe.plugins.attach("loras/ink.safetensors")


def test_vae_of_another_family_is_refused_by_its_scale(pipe, tmp_path):
    vae = make_vae()
    vae.register_to_config(scaling_factor=0.13025)
    vae.save_pretrained(tmp_path / "xl")
    with pytest.raises(UserError, match=r"0\.13025"):
        pipe.plugins.attach(tmp_path / "xl")
    whole = type("Whole", (), {"unet": make_unet(), "vae": vae, "text_encoder": pipe.text_encoder})()
    write_original(whole, tmp_path / "whole.safetensors")
    for kind in ("checkpoint", "vae"):
        with pytest.raises(UserError, match=r"0\.13025"):
            pipe.plugins.attach(tmp_path / "whole.safetensors", kind=kind)
    assert len(pipe.plugins) == 0


def test_vae_out_of_a_checkpoint_is_its_vae_alone(pipe, files):
    before = weights_of(pipe)
    assert pipe.plugins.attach(files["style"], kind="vae").kind == "vae"
    changed = {
        key.split(".")[0] for key, weight in weights_of(pipe).items() if not torch.equal(weight, before[key])
    }
    assert changed == {"vae"}
    pipe.plugins.detach("style")
    assert same_weights(weights_of(pipe), before)


@pytest.mark.parametrize(
    ("kind", "message"), [("adapter", "allowed here: adapter"), ("lora", "allowed: checkpoint, vae, adapter")]
)
def test_another_kind_than_asked_for_is_refused(pipe, files, kind, message):
    with pytest.raises(UserError, match=message):
        pipe.plugins.attach(files["style"], kind=kind)
    assert len(pipe.plugins) == 0
