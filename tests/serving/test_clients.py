"""Clients that exist, against the real server."""

import base64
import io

import openai
import pytest
import webuiapi
from PIL import Image
from serving_running import running

from bdm.drawing.picture_reading import texts_in


@pytest.fixture
def site(tmp_path):
    with running(tmp_path / "history") as found:
        yield found


def test_webuiapi_draws(site):
    api = webuiapi.WebUIApi(host="127.0.0.1", port=site.port, sampler="Euler a", steps=3)
    result = api.txt2img(
        prompt="红灯笼，masterpiece",
        negative_prompt="模糊",
        seed=7,
        width=32,
        height=40,
        batch_size=2,
        cfg_scale=2,
    )
    assert [image.size for image in result.images] == [(32, 40)] * 2
    assert [image.getpixel((0, 0))[0] for image in result.images] == [7, 8]
    assert result.info["all_seeds"] == [7, 8]
    assert (result.info["native_prompt"], result.info["english_prompt"]) == ("红灯笼", "masterpiece")
    assert "restore_faces" in result.info["ignored"]
    assert "prompt" not in result.info["ignored"]
    assert "Negative prompt: 模糊" in result.info["infotexts"][0]
    assert api.png_info(result.image).info == result.info["infotexts"][0]


def test_webuiapi_starts_from_pictures(site):
    api = webuiapi.WebUIApi(host="127.0.0.1", port=site.port, steps=3)
    start, mask = Image.new("RGB", (32, 32), "red"), Image.new("L", (32, 32), 255)
    result = api.img2img(
        [start], prompt="龙", mask_image=mask, denoising_strength=0.5, width=32, height=32, seed=3
    )
    assert result.info["denoising_strength"] == 0.5
    assert result.image.size == (32, 32)


def test_webuiapi_asks_what_there_is(site):
    api = webuiapi.WebUIApi(host="127.0.0.1", port=site.port)
    assert "Euler a" in api.util_get_sampler_names()
    assert "karras" in api.util_get_scheduler_names()
    assert api.util_get_current_model() == "emoji"
    api.util_set_model("emoji")
    assert api.util_get_model_names()[0].startswith("emoji [")
    assert api.get_loras() == []
    assert api.get_embeddings()["loaded"] == {}
    assert {row["name"] for row in api.get_upscalers()} >= {"Latent", "Lanczos"}
    assert api.get_progress()["state"]["job_count"] == 0
    api.util_wait_for_ready()
    assert set(api.get_scripts()) == {"txt2img", "img2img"}
    api.set_options({"CLIP_stop_at_last_layers": 2})
    assert api.txt2img(prompt="龙", steps=2, width=32, height=32).info["clip_skip"] == 2
    api.refresh_checkpoints()


def test_openais_client_draws(site):
    client = openai.OpenAI(base_url=f"{site.address}/v1", api_key="none")
    answer = client.images.generate(
        prompt="a lantern",
        n=2,
        size="32x40",
        model="dall-e-2",
        response_format="b64_json",
        extra_body={"seed": 5},
    )
    contents = [base64.b64decode(one.b64_json) for one in answer.data]
    pictures = [Image.open(io.BytesIO(content)) for content in contents]
    assert [picture.size for picture in pictures] == [(32, 40)] * 2
    assert [picture.getpixel((0, 0))[0] for picture in pictures] == [5, 6]
    assert "English prompt: a lantern" in texts_in(contents[0])[0]
    assert [model.id for model in client.models.list()] == ["emoji"]


def test_openais_client_is_told_mistakes(site):
    client = openai.OpenAI(base_url=f"{site.address}/v1", api_key="none", max_retries=0)
    with pytest.raises(openai.UnprocessableEntityError, match="give one such as"):
        client.images.generate(prompt="x", size="large", model="emoji")
    with pytest.raises(openai.UnprocessableEntityError, match="b64_json"):
        client.images.generate(prompt="x", response_format="url")
    with pytest.raises(openai.UnprocessableEntityError, match="no checkpoint is called"):
        client.images.generate(prompt="x", model="other")


def test_other_formats_carry_the_request_too(site):
    body = {"prompt": "龙", "size": "32x32", "seed": 9, "output_format": "webp"}
    answer = site.client.post("/v1/images/generations", json=body).json()
    content = base64.b64decode(answer["data"][0]["b64_json"])
    assert Image.open(io.BytesIO(content)).format == "WEBP"
    assert '"seed": 9' in texts_in(content)[1]
