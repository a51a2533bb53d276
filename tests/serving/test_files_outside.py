"""No name in a request reaches a file outside the folders of models, nor a pickle, nor the network."""

import base64
import io
import os
import pickle

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from serving_running import running

from bdm.drawing.known_hashes import known_hash

DOWN = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k.lora_down.weight"
UP = DOWN.replace("lora_down", "lora_up")


def write_lora(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({DOWN: torch.zeros(1, 4), UP: torch.zeros(4, 1)}, path)


class Executed:
    def __reduce__(self):
        return os.mkdir, (os.environ["BDM_TEST_EXECUTED"],)


@pytest.fixture
def site(tmp_path, monkeypatch):
    """A server whose models' folder holds a good file, a link out, a link in, and a pickle."""
    monkeypatch.setenv("BDM_TEST_EXECUTED", str(tmp_path / "executed"))
    monkeypatch.chdir(tmp_path)
    models = tmp_path / "models" / "Lora"
    for path in (
        models / "ink.safetensors",
        tmp_path / "outside.safetensors",
        models / "sub" / "deep.safetensors",
    ):
        write_lora(path)
    (models / "way out.safetensors").symlink_to(tmp_path / "outside.safetensors")
    (models / "linked").symlink_to(tmp_path)
    (models / "way in.safetensors").symlink_to(models / "ink.safetensors")
    (models / "evil.pt").write_bytes(pickle.dumps(Executed()))
    with running(tmp_path / "history", models=[tmp_path / "models"]) as found:
        found.folder = tmp_path
        yield found
    assert not (tmp_path / "executed").exists()


def ask(site, file, kind="adapter", **more):
    request = {"prompt": "龙", "steps": 1, "plugins": [{"kind": kind, "file": file, **more}]}
    return site.client.post("/v1/jobs", json={"request": request})


def test_what_is_listed_lies_inside_and_is_no_pickle(site):
    listed = {row["name"] for row in site.client.get("/sdapi/v1/loras").json()}
    assert "ink" in listed | {"way in"}
    assert not listed & {"way out", "outside", "evil"}
    text = site.client.get("/v1/library").text + site.client.get("/sdapi/v1/loras").text
    assert str(site.folder) not in text


def test_what_is_listed_can_be_drawn_with(site):
    assert ask(site, {"name": "ink"}).status_code == 202
    assert ask(site, {"name": "sub/deep.safetensors"}).status_code == 202
    digits = known_hash(site.folder / "models/Lora/ink.safetensors", "adapter")
    assert ask(site, {"name": "whatever", "hash": digits}).status_code == 202


NAMES = [
    "../outside.safetensors", "../../outside", "outside", "outside.safetensors", "./outside.safetensors",
    "way out", "way out.safetensors", "linked/outside", "evil", "evil.pt", "/etc/passwd", "~/x", "$HOME/x",
    "http://127.0.0.1:9/x.safetensors", "https://huggingface.co/x/y", "file:///etc/passwd", "owner/name",
    "\\\\host\\share\\x.safetensors", "//host/share/x", "C:\\x.safetensors", "..\\outside.safetensors",
    "ink.safetensors\0", "Lora/../Lora/ink", "", " ", ".", "..", "%2e%2e/outside", "x" * 5000, "ink/../../x",
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_other_names_are_refused(site, name):
    opened = []
    real = os.path.realpath(site.folder / "outside.safetensors")
    for kind in ("adapter", "checkpoint", "vae", "embedding"):
        answer = ask(site, {"name": name}, kind)
        assert answer.status_code == 422, (kind, answer.text)
        assert str(site.folder) not in answer.text
    assert site.client.post("/v1/jobs", json={"request": {"model": {"name": name}}}).status_code == 422
    override = {"override_settings": {"sd_model_checkpoint": name, "sd_vae": name}, "width": 32, "height": 32}
    answer = site.client.post("/sdapi/v1/txt2img", json=override)
    assert answer.status_code == (200 if not name.strip() else 422)
    assert real not in opened


def test_absolute_paths_of_files_that_are_listed_are_refused_too(site):
    assert ask(site, {"name": str(site.folder / "models/Lora/ink.safetensors")}).status_code == 422
    assert ask(site, {"name": str(site.folder / "outside.safetensors")}).status_code == 422


def test_hashes_of_files_outside_find_nothing(site):
    outside = site.folder / "other.safetensors"
    save_file({DOWN: torch.ones(1, 4), UP: torch.ones(4, 1)}, outside)
    answer = ask(site, {"name": "other.safetensors", "hash": known_hash(outside, "adapter")})
    assert (answer.status_code, "not here" in answer.json()["detail"]) == (422, True)


def test_pictures_are_found_by_what_was_sent_alone(site):
    Image.new("RGB", (32, 32), "red").save(site.folder / "secret.png")
    for file in ({"name": "secret.png"}, {"name": "../../secret.png", "hash": "../../secret"}):
        mode = {"name": "image", "pictures": {"image": file}}
        answer = site.client.post("/v1/jobs", json={"request": {"mode": mode}})
        assert (answer.status_code, "send it first" in answer.json()["detail"]) == (422, True)
    for said in (
        "/etc/passwd",
        "http://127.0.0.1/x.png",
        "file:///x",
        "secret.png",
        "data:image/png;base64,/etc",
    ):
        answer = site.client.post("/sdapi/v1/img2img", json={"init_images": [said]})
        assert answer.status_code == 422


def test_a_prompt_calls_only_what_is_listed(site):
    def drawn(prompt):
        site.client.post("/sdapi/v1/txt2img", json={"prompt": prompt, "width": 32, "height": 32})
        return site.client.get("/v1/history?limit=1").json()["pictures"][0]["request"]["plugins"]

    assert [plugin["name"] for plugin in drawn("龙 <lora:ink:0.5>")] == ["ink"]
    for name in ("outside", "way out", "evil", "../outside", "../../outside.safetensors"):
        assert drawn(f"龙 <lora:{name}:0.5>") == []


def test_identifiers_of_jobs_are_no_paths(site):
    for name in (
        "..",
        "../journal",
        "%2e%2e%2fjournal.jsonl",
        "..%5c..",
        "x\0",
        "20200101000000-000000-0000000g",
    ):
        for address in (f"/v1/jobs/{name}/picture", f"/v1/jobs/{name}", f"/v1/history/{name}"):
            call = site.client.delete if "history" in address else site.client.get
            assert call(address.replace("\0", "%00")).status_code in (404, 405)


def test_annotators_that_would_load_weights_are_refused(site):
    picture = site.client.post("/v1/pictures", content=png(Image.new("RGB", (32, 32)))).json()
    answer = ask(site, {"name": "ink"}, "adapter", annotator="openpose", picture=picture)
    assert (answer.status_code, "canny alone" in answer.json()["detail"]) == (422, True)


def png(picture):
    written = io.BytesIO()
    picture.save(written, "png")
    return written.getvalue()


def test_bombs_are_refused_before_they_are_decoded(site, monkeypatch):
    bomb = png(Image.new("1", (20_000, 20_000)))
    decoded = []
    monkeypatch.setattr(Image.Image, "convert", lambda *_: decoded.append(1))
    body = {"init_images": [base64.b64encode(bomb).decode()], "prompt": "x"}
    for answer in (
        site.client.post("/sdapi/v1/img2img", json=body),
        site.client.post("/v1/pictures", content=bomb),
        site.client.post("/v1/info", content=bomb),
        site.client.post("/sdapi/v1/png-info", json={"image": body["init_images"][0]}),
    ):
        assert answer.status_code == 422, answer.text
    assert decoded == []
