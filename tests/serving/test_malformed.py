"""Requests that make no sense are answered in one line: no server error, and the server draws on.

``BDM_MALFORMED`` says how many of each kind the slow tests try.
"""

import json
import os
import random
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from serving_running import running
from serving_schema import Described

import bdm
from bdm.drawing.library import DEFAULT_MODEL
from bdm.serving.limits import Limits

COUNT = int(os.environ.get("BDM_MALFORMED", "10000"))

LIMITS = Limits(body=200_000, side=64, steps=20, pictures=3, queue=10)
NUMBERS = [
    0,
    -1,
    1,
    2**31,
    2**63,
    2**63 - 1,
    -(2**70),
    10**400,
    1.5,
    1e308,
    -1e308,
    True,
    "7",
    "x",
    None,
    [],
    {},
]
TEXTS = [
    "",
    "龙",
    "x" * 20_000,
    "\0",
    "\ud800",
    "(((",
    "[a:b:",
    "<lora:",
    "{a|b",
    "a AND b:",
    "\u202e",
    5,
    None,
    ["x"],
]
ROUTES = ["/sdapi/v1/txt2img", "/sdapi/v1/img2img", "/v1/images/generations", "/v1/jobs", "/sdapi/v1/options",
          "/sdapi/v1/png-info", "/v1/split", "/v1/pictures", "/v1/info", "/sdapi/v1/interrupt"]  # fmt: skip
KEYS = {
    "prompt": TEXTS, "negative_prompt": TEXTS, "native_prompt": TEXTS, "seed": NUMBERS, "steps": NUMBERS,
    "width": NUMBERS, "height": NUMBERS, "cfg_scale": NUMBERS, "batch_size": NUMBERS, "n_iter": NUMBERS,
    "n": NUMBERS, "size": [*TEXTS, "0x0", "9x9", "99999x1", "64x64"],
    "sampler_name": [*TEXTS, "Euler a", "DPM fast"],
    "scheduler": [*TEXTS, "karras"], "denoising_strength": NUMBERS, "enable_hr": [True, "x", 1],
    "hr_scale": NUMBERS, "hr_upscaler": TEXTS, "hr_second_pass_steps": NUMBERS, "mask": TEXTS,
    "init_images": [[], ["x"], [""], ["!!"], [5], "x", None, ["aGk="] * 3], "branch_scale": NUMBERS,
    "override_settings": [{}, [], "x", {"sd_model_checkpoint": 5}, {"sd_model_checkpoint": "x"},
                          {"CLIP_stop_at_last_layers": -5}, {"a" * 5000: 1}],
    "alwayson_scripts": [{}, [], {"controlnet": {}}, {"controlnet": {"args": 5}},
                         {"controlnet": {"args": [5]}},
                         {"ControlNet": {"args": [{"model": "x", "image": 5}]}}, {"x": None}],
    "model": TEXTS, "response_format": TEXTS, "output_format": TEXTS, "world": NUMBERS, "text": TEXTS,
    "image": TEXTS, "count": NUMBERS, "sd_vae": TEXTS, "branch_schedule": TEXTS, "unknown": [None],
    "request": [{}, [], "x", None, {"steps": 10**400}, {"steps": 1, "seed": -1}, {"prompt": "\ud800"},
                {"width": 9, "height": 9, "steps": 1},
                {"mode": {"name": "hires", "settings": {"scale": "x"}}},
                {"mode": {"name": "outpaint", "pictures": {"image": {"name": "x"}}}}, {"mode": {"name": 5}},
                {"mode": {"name": "text", "settings": {"tiling": 5}}}, {"enlarge": 10**400}, {"enlarge": 60},
                {"plugins": [{"kind": "adapter", "file": {"name": "x"}}] * 50}, {"plugins": [5]},
                {"model": {"name": "x", "hash": "y" * 9000}}, {"rules": {"emphasis": "x"}}, {"world": 5},
                {"approximation": {"deep_every": 10**30}}, {"branch_schedule": "0:" * 4000},
                {"clip_skip": 99},
                {"precision": "bf16"}, {"versions": {"bdm": 5}}, {"file": "x"}, {"english_guidance": 1e300}],
}  # fmt: skip
BODIES = [b"", b"{", b"[]", b"null", b"5", b'"x"', b"\xff\xfe", b"[" * 50_000, b'{"a":' * 20_000, b"NaN",
          b'{"steps": NaN}', b'{"steps": Infinity}', b'{"prompt": "\\ud800"}', b"\0" * 100, b"1" * 30_000,
          b'{"seed": ' + b"9" * 5000 + b"}", b"x" * 250_000, b"\x89PNG\r\n\x1a\n" + b"\0" * 50]  # fmt: skip


def case(random):
    """(address, how it is called) of a request that makes little sense."""
    address = random.choice(ROUTES)
    if random.random() < 0.25:
        kind = random.choice(
            ["application/json", "text/plain", "image/png", "", "application/json; charset=x"]
        )
        return address, {"content": random.choice(BODIES), "headers": {"content-type": kind}}
    chosen = random.sample(sorted(KEYS), random.randint(0, 6))
    body = {"width": 32, "height": 32, "steps": 1} | {key: random.choice(KEYS[key]) for key in chosen}
    return address, {"content": json.dumps(body), "headers": {"content-type": "application/json"}}


def try_all(site, cases):
    codes = set()
    for address, call in cases:
        answer = site.client.post(address, **call)
        assert answer.status_code < 500, (address, call, answer.text)
        if answer.status_code >= 400:
            said = answer.json()["detail"]
            assert "\n" not in said
            assert len(said) < 2100
        codes.add(answer.status_code)
    return codes


def still_draws(site):
    for ticket in site.desk.live:
        ticket.cancel()
    body = {"prompt": "龙", "width": 32, "height": 32, "steps": 1}
    answer = site.client.post("/sdapi/v1/txt2img", json=body)
    assert answer.status_code == 200, answer.text
    return True


@pytest.mark.slow
def test_every_value_of_every_key_is_answered(tmp_path):
    body = {"width": 32, "height": 32, "steps": 1, "prompt": "龙"}
    with running(tmp_path, limits=LIMITS) as site:
        for address in ("/sdapi/v1/txt2img", "/v1/jobs"):
            values = [(key, value) for key, values in KEYS.items() for value in values]
            said = [body | {key: value} if address[1] == "s" else {key: value} for key, value in values]
            try_all(site, [(address, {"content": json.dumps(one), **JSON}) for one in said])
        for content in BODIES:
            try_all(site, [(address, {"content": content, **JSON}) for address in ROUTES])
        assert still_draws(site)


JSON = {"headers": {"content-type": "application/json"}}


def test_bodies_of_no_told_length_are_bounded_too(tmp_path):
    with running(tmp_path, limits=LIMITS) as site:
        for address in ("/sdapi/v1/txt2img", "/v1/pictures"):
            pieces = (b" " * 10_000 for _ in range(30))
            assert site.client.post(address, content=pieces, **JSON).status_code == 413


def test_limits_are_named(tmp_path):
    with running(tmp_path, limits=LIMITS) as site:
        for said, named in (
            ({"width": 128}, "width is 128; this server allows 8 to 64"),
            ({"steps": 21}, "steps is 21; this server allows 1 to 20"),
            ({"batch_size": 2, "n_iter": 2}, "the number of pictures is 4; this server allows 1 to 3"),
            ({"prompt": "a" * 10_001}, "prompt_en: the number of characters is 10001"),
            ({"enable_hr": True, "width": 32, "height": 40, "hr_scale": 2}, "height, enlarged, is 80"),
        ):
            answer = site.client.post("/sdapi/v1/txt2img", json={"steps": 1} | said)
            assert answer.status_code == 422
            assert answer.json()["detail"].startswith(named)


#: Folders that a server may open files in, beside those that the test gives it.
_ITS_OWN = [sys.prefix, sys.base_prefix, Path(bdm.__file__).parent, DEFAULT_MODEL, "/proc", "/sys", "/dev"]
_ITS_OWN += ["/usr", "/lib", "/etc", tempfile.gettempdir() + "/torchinductor"]
#: What a test itself opens: packages, wherever they are, and its own files where it fails.
_ITS_OWN += [path for path in sys.path if path and path != os.getcwd()] + [Path(__file__).parent]


@pytest.fixture(scope="module")
def opened():
    """Every path that this process opens, while somebody looks."""
    found = []
    looking = [True]

    def note(event, arguments):
        if looking and event == "open" and isinstance(arguments[0], str | bytes):
            path = os.fsdecode(arguments[0])
            found.extend([] if path.startswith("<") else [path])  # Python looks for "<unknown>", too

    sys.addaudithook(note)  # which cannot be taken off
    yield found
    looking.clear()


def outside(opened, *folders):
    """What was opened elsewhere than in folders that a server has something in."""
    allowed = [os.path.realpath(folder) for folder in (*folders, *_ITS_OWN)]
    return {path for path in map(os.path.realpath, opened) if not path.startswith(tuple(allowed))}


@pytest.fixture
def site(tmp_path, own_cache, opened):
    """A server with a folder of models, which has opened nothing outside when it stops."""
    (tmp_path / "models" / "Lora").mkdir(parents=True)
    for name in ("x", "secret"):
        save_file({"a": torch.zeros(1)}, tmp_path / f"{name}.safetensors")
    with running(tmp_path / "history", limits=LIMITS, models=[tmp_path / "models"]) as site:
        opened.clear()
        yield site
        found = outside(opened, tmp_path / "history", tmp_path / "models", own_cache)
    assert not found, found
    assert len(opened) > 5, "the test sees what is opened"
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"models", "history", "x.safetensors", "secret.safetensors"}


def test_options_that_nothing_can_be_drawn_with_are_refused(tmp_path):
    with running(tmp_path, limits=LIMITS) as site:
        for said in ({"CLIP_stop_at_last_layers": 99}, {"CLIP_stop_at_last_layers": -3}, {"sd_vae": "x"}):
            answer = site.client.post("/sdapi/v1/options", json=said)
            assert answer.status_code == 422, answer.text
        assert site.client.post("/sdapi/v1/options", json={"CLIP_stop_at_last_layers": 2}).status_code == 200
        assert still_draws(site)


@pytest.mark.slow
def test_ten_thousand_requests_that_make_no_sense(site):
    chance = random.Random(0)
    codes = try_all(site, [case(chance) for _ in range(COUNT)])
    assert codes >= {200, 413, 422}
    assert still_draws(site)


@pytest.mark.slow
def test_ten_thousand_requests_made_from_the_description(site):
    described = Described(site.client.get("/openapi.json").json(), random.Random(1))
    assert {path for path, *_ in described.operations} >= {"/sdapi/v1/txt2img", "/v1/jobs", "/v1/split"}
    for method, address, call in described.requests(COUNT):
        with site.client.stream(method.upper(), address, **call) as answer:
            assert answer.status_code < 500 or address == "/readyz", (method, address, call, answer.read())
            if answer.status_code >= 400:
                assert "\n" not in json.loads(answer.read())["detail"]
    assert still_draws(site)


@pytest.mark.slow
def test_ten_thousand_requests_of_schemathesis(site, own_cache):
    schemathesis = pytest.importorskip("schemathesis")
    from hypothesis import HealthCheck, given, settings
    from hypothesis.configuration import set_hypothesis_home_dir

    set_hypothesis_home_dir(own_cache)
    schema = schemathesis.openapi.from_url(f"{site.address}/openapi.json")
    operations = [found.ok() for found in schema.get_all_operations()]
    assert len(operations) > 30
    each = settings(
        max_examples=max(1, COUNT // len(operations)),
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )
    for operation in operations:

        @each
        @given(case=operation.as_strategy())
        def tried(case):
            if "/events" in case.path or case.path == "/readyz":
                return
            assert case.call(timeout=60).status_code < 500, case.as_curl_command()
            for ticket in site.desk.live[4:]:
                ticket.cancel()

        tried()
    assert still_draws(site)
