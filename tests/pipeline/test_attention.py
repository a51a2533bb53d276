"""Which word drew what."""

import pytest
import torch
from PIL import Image

from bdm.drawing.attention_strip import attention_strip, overlay, recorded_strip
from bdm.drawing.complete import complete
from bdm.drawing.library import Library
from bdm.drawing.painter import Painter
from bdm.drawing.request import FileRef, Request
from bdm.errors import UserError
from bdm.pipeline import modes
from bdm.pipeline.attention import AttentionMaps, record_attention
from bdm.text.rules import A1111, OFFICIAL
from bdm.text.words import read_english, read_native

CALL = dict(seed=3, num_inference_steps=2, guidance_scale=3.0, output_type="latent")
SAID = dict(prompt="红灯笼，蓝色背景", prompt_en="a red lantern, blue background")


@pytest.mark.parametrize("extra", [{}, {"english_guidance": 2.0}, {"guidance_scale": 1.0}, {"share": False}])
def test_the_picture_stays_what_it_is_to_the_last_bit(pipe, extra):
    before = pipe(**SAID, **CALL | extra).images
    with record_attention(pipe) as found:
        recorded = pipe(**SAID, **CALL | extra).images
    assert torch.equal(recorded, before)
    assert torch.equal(pipe(**SAID, **CALL | extra).images, before)
    counted = dict(found.native.counts)
    pipe(**SAID, **CALL | extra)
    assert found.native.counts == counted, "nothing is left hanging"


def test_maps_are_the_layers_own_attention(pipe):
    """The attention times the values, projected, is what a layer has computed."""
    seen = []
    layers = [m for name, m in pipe.branch.named_modules() if name.endswith(".attn2")]
    hook = layers[0].register_forward_hook(
        lambda module, args, kwargs, output: seen.append((args, kwargs, output)), with_kwargs=True
    )
    pipe(**SAID, **CALL | dict(num_inference_steps=1, guidance_scale=1.0, share=False))
    hook.remove()
    from bdm.method.step import named_arguments
    from bdm.pipeline.attention import _probabilities

    args, kwargs, output = seen[0]
    layer = layers[0]
    values = named_arguments(layer, args, kwargs)
    probabilities = _probabilities(layer, values, -1)
    assert torch.allclose(probabilities.sum(-1), torch.ones(len(probabilities)), atol=1e-5)
    if layer.heads == 1:
        expected = layer.to_out[0](probabilities @ layer.to_v(values["encoder_hidden_states"])[0])
        torch.testing.assert_close(expected, output[0], atol=1e-5, rtol=3e-5)


def test_all_attention_goes_somewhere(pipe):
    with record_attention(pipe) as found:
        pipe(**SAID, **CALL)
    for maps in (found.native, found.english):
        torch.testing.assert_close(maps.mean(finest=True).sum(0), torch.ones(8, 8), atol=1e-4, rtol=0)
        whole = maps.mean().sum(0)
        assert whole.shape == (8, 8)
        torch.testing.assert_close(whole, torch.ones(8, 8), atol=1e-4, rtol=0)


def test_guided_and_unguided_rows_are_the_prompts_own(pipe):
    """What is recorded is of the positive prompt, whatever the negative one says."""
    latents = torch.randn(1, 4, 8, 8)
    one = CALL | dict(num_inference_steps=1, latents=latents)

    with record_attention(pipe) as unguided:
        pipe(**SAID, **one | dict(guidance_scale=1.0))
    with record_attention(pipe) as guided:
        pipe(**SAID, **one, negative_prompt="模糊", negative_prompt_en="blurry")
    with record_attention(pipe) as composed:
        pipe(**SAID, **one, negative_prompt="模糊", english_guidance=2.0)
    for found in (guided, composed):
        torch.testing.assert_close(found.native.mean(), unguided.native.mean(), atol=1e-5, rtol=3e-5)
    # The backbone's encoder sees the same; its decoder sees the branch's residuals, which composed ones lack.
    torch.testing.assert_close(guided.english.mean(), unguided.english.mean(), atol=1e-4, rtol=1e-3)


def test_words_are_their_tokens(pipe):
    native = read_native("红灯笼，蓝色背景，红灯笼", pipe.native_text_encoder)
    assert native.words() == ["红灯笼", "蓝色背景"]
    assert native.positions("红灯笼") == [1, 2, 3, 10, 11, 12]
    assert native.positions("蓝色") == [5, 6]
    english = read_english("A red lantern, (blue:1.2) background", pipe.text_encoder, pipe.tokenizer)
    assert english.words() == ["A", "red", "lantern", "blue", "background"]
    assert english.positions("lantern") == [3]
    assert english.positions("blue background") == [5, 6]
    mixed = read_native("OK的abcdefgh", pipe.native_text_encoder)
    assert mixed.positions("abcdefgh") == [3, 4, 5, 6]


def test_words_in_later_chunks_lie_behind_inner_markers(pipe):
    prompt = "，".join(["红灯笼"] * 15) + "，蓝色背景"
    native = read_native(prompt, pipe.native_text_encoder)
    # Officially inner markers are dropped, so that content is numbered through behind one in front.
    official = read_native(prompt, pipe.native_text_encoder, OFFICIAL).positions("蓝色")
    assert official == [1 + prompt.index("蓝"), 2 + prompt.index("蓝")]
    # By A1111's rules each chunk keeps both, and what follows the last comma moves on with its chunk.
    features = pipe.native_text_encoder.encode([prompt], A1111)[0]
    alone = pipe.native_text_encoder.encode([prompt.split("，")[-1]])[0]
    places = native.positions("蓝色")
    assert len(features) == 104
    assert places[0] > 52
    assert len(alone) == 52


def test_a_words_map_is_its_tokens_together(pipe):
    with record_attention(pipe) as found:
        pipe(**SAID, **CALL)
    for relative in (True, False):
        maps = found.native_words(SAID["prompt"], ["蓝色", "蓝", "色"], relative=relative)
        torch.testing.assert_close(maps["蓝色"], maps["蓝"] + maps["色"])
    shares = found.native_words(SAID["prompt"])
    torch.testing.assert_close(sum(shares.values()), torch.ones(8, 8))
    assert set(found.english_words(SAID["prompt_en"])) == {"a", "red", "lantern", "blue", "background"}
    with pytest.raises(UserError, match="'绿色' is not in the prompt"):
        found.native_words(SAID["prompt"], ["绿色"])


def test_other_sizes_and_modes(pipe):
    with record_attention(pipe) as found:
        pipe(**SAID, **CALL, width=96, height=64)
    assert found.native_words(SAID["prompt"])["红灯笼"].shape == (8, 12)
    with record_attention(pipe) as found:
        modes.image_to_image(pipe, Image.new("RGB", (40, 72)), **SAID, **CALL)
    assert found.english_words(SAID["prompt_en"])["red"].shape == (9, 5)


def test_what_cannot_be_told_apart_is_refused_and_leaves_nothing(pipe):
    before = pipe(**SAID, **CALL).images
    for extra in ({"num_images_per_prompt": 2}, {"num_images_per_prompt": 2, "guidance_scale": 1.0}):
        with pytest.raises(UserError, match="2 pictures are drawn at once"), record_attention(pipe):
            pipe(**SAID, **CALL | extra)
    for prompt in ("红灯笼 AND 蓝色背景", "[红灯笼:月饼:0.5]"):
        with pytest.raises(UserError, match="say the same in all steps"), record_attention(pipe):
            pipe(prompt, **CALL)
    with pytest.raises(UserError, match="no attention was recorded"):
        AttentionMaps().mean()
    assert torch.equal(pipe(**SAID, **CALL).images, before)


def test_the_strip_shows_the_picture_and_a_map_for_each_word():
    picture = Image.effect_noise((64, 48), 80).convert("RGB")
    bright = torch.zeros(6, 8)
    bright[:, 4:] = 1
    strip = attention_strip(picture, {"红灯笼": bright}, {"lantern": 1 - bright, "red": bright})
    assert strip.width >= 4 * 64
    assert strip.height > 48
    shown = torch.tensor(list(overlay(picture, bright).convert("L").tobytes())).view(48, 64).float()
    assert shown[:, 40:].mean() > 2 * shown[:, :24].mean()
    assert overlay(picture, torch.ones(6, 8)).size == picture.size


def test_a_request_is_drawn_with_its_strip(pipe, tmp_path):
    pipe.save_pretrained(tmp_path / "model")
    said = Request(**SAID, model=FileRef.to(tmp_path / "model"), steps=2, seed=5)
    request, painter = complete(said, Library(), "fp32"), Painter("cpu")
    (plain,) = painter.draw([request])
    drawn, strip = painter.draw_with_strip(request, ["蓝色"])
    assert plain is not None
    assert drawn.image == plain.image
    width = strip.width
    assert width == 2 * (128 + 4) + 4, "the picture and one word, twice as large"
    _, strip = painter.draw_with_strip(request)
    assert strip.width == 8 * (128 + 4) + 4, "two native parts and five English words"
    _, both = painter.draw_with_strip(request, ["蓝色", "Lantern"])
    assert both.width == 3 * (128 + 4) + 4
    with pytest.raises(UserError, match="the word '绿色' is in no prompt"):
        painter.draw_with_strip(request, ["绿色"])


def test_a_strip_shows_what_each_network_was_told(pipe, tmp_path):
    """Quality tags are the backbone's, and what is not said has no map."""
    pipe.save_pretrained(tmp_path / "model")
    model, painter = FileRef.to(tmp_path / "model"), Painter("cpu")

    def shown(words=(), **said):
        request = complete(Request(model=model, steps=2, **said), Library(), "fp32")
        pipe = painter.pipeline(request)
        with record_attention(pipe) as found:
            (drawn,) = painter.draw([request])
        strips = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                "bdm.drawing.attention_strip.attention_strip",
                lambda picture, native, english, scale: strips.append((list(native), list(english))),
            )
            recorded_strip(found, drawn.image, request, words)
        return strips[0]

    assert shown(prompt="红灯笼，masterpiece") == (["红灯笼"], ["masterpiece"])
    assert shown(prompt="龙", prompt_en="dragon", world=0.0) == (["龙"], [])
    assert shown(prompt="龙", prompt_en="dragon", branch_scale=0.0) == ([], ["dragon"])
    assert shown(["dragon"], prompt="龙", prompt_en="dragon") == ([], ["dragon"])
    with pytest.raises(UserError, match="is in no prompt that is said; give words that stand in '龙'"):
        shown(["dragon"], prompt="龙", prompt_en="dragon", world=0.0)
    with pytest.raises(UserError, match="no prompt says a word"):
        shown(prompt="")
