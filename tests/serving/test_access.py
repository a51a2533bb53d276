"""Who may use a server, and that keys are compared in constant time."""

import base64
import hmac

import httpx
import pytest
from serving_running import running

from bdm.errors import UserError
from bdm.serving import keys
from bdm.serving.keys import Access, is_loopback

KEY = "a key of some length"
hmac_equal = hmac.compare_digest
ROUTES = (
    "/sdapi/v1/options",
    "/v1/models",
    "/v1/jobs",
    "/v1/history",
    "/v1/server",
    "/metrics",
    "/openapi.json",
)


def test_elsewhere_than_on_loopback_a_key_and_origins_are_needed():
    for host in ("0.0.0.0", "::", "192.168.1.5", "example.org", "127.0.0.1.example.org"):
        assert not is_loopback(host)
        with pytest.raises(UserError, match="an API key and --cors ORIGIN"):
            Access(host)
        with pytest.raises(UserError, match="for which --cors ORIGIN must"):
            Access(host, KEY)
        with pytest.raises(UserError, match="for which an API key must"):
            Access(host, "", ("https://example.org",))
        Access(host, KEY, ("https://example.org",))
    assert all(map(is_loopback, ("127.0.0.1", "127.1.2.3", "::1", "localhost")))


@pytest.mark.parametrize("origin", ["*", "example.org", "https://example.org/path", "null", "https://"])
def test_origins_are_origins(origin):
    with pytest.raises(UserError, match="give origins such as"):
        Access("0.0.0.0", KEY, (origin,))


def test_short_keys_are_refused():
    with pytest.raises(UserError, match="give 16 at least"):
        Access("127.0.0.1", "short")


def test_the_key_is_needed_wherever_something_is_told_or_done(tmp_path):
    access = Access("127.0.0.1", KEY, ("https://pictures.example.org",))
    with running(tmp_path, access=access) as site:
        assert {site.client.get(path).status_code for path in ROUTES} == {401}
        assert site.client.post("/sdapi/v1/txt2img", json={}).status_code == 401
        assert {site.client.get(path).status_code for path in ("/healthz", "/readyz")} == {200}
        for header in (
            {"authorization": f"Bearer {KEY}"},
            {"x-api-key": KEY},
            {"authorization": "Basic " + base64.b64encode(f"user:{KEY}".encode()).decode()},
        ):
            assert site.client.get("/sdapi/v1/samplers", headers=header).status_code == 200
        for header in (
            {"authorization": f"Bearer {KEY}x"},
            {"authorization": f"Bearer {KEY[:-1]}"},
            {"authorization": "Bearer"},
            {"authorization": "Basic %%%"},
            {"x-api-key": ""},
            {"x-api-key": b"\xff\xfe"},
        ):
            assert site.client.get("/sdapi/v1/samplers", headers=header).status_code == 401


def test_keys_are_compared_by_digests_in_constant_time(monkeypatch):
    compared = []
    monkeypatch.setattr(keys.hmac, "compare_digest", lambda a, b: compared.append((a, b)) or hmac_equal(a, b))
    access = Access("127.0.0.1", KEY)
    assert not access.accepts([(b"x-api-key", b"wrong"), (b"authorization", b"Bearer " + b"x" * 5000)])
    assert len(compared) == 2
    assert {len(side) for pair in compared for side in pair} == {32}


def test_other_pages_and_other_names_are_refused(tmp_path):
    with running(tmp_path) as site:
        get = site.client.get
        assert get("/v1/jobs", headers={"origin": "https://evil.example.org"}).status_code == 403
        assert get("/v1/jobs", headers={"origin": site.address}).status_code == 200
        assert get("/v1/jobs", headers={"host": "evil.example.org"}).status_code == 400
        assert get("/v1/jobs", headers={"host": f"localhost:{site.port}"}).status_code == 200
        post = {"content": b'{"prompt": "x"}', "headers": {"content-type": "text/plain"}}
        assert site.client.post("/sdapi/v1/txt2img", **post).status_code == 422


def test_pages_of_the_list_may_call(tmp_path):
    access = Access("127.0.0.1", KEY, ("https://pictures.example.org",))
    asking = {"origin": "https://pictures.example.org", "access-control-request-method": "POST"}
    with running(tmp_path, access=access) as site:
        asked = site.client.options("/v1/jobs", headers=asking)
        assert asked.status_code == 200
        assert asked.headers["access-control-allow-origin"] == "https://pictures.example.org"
        other = site.client.options("/v1/jobs", headers=asking | {"origin": "https://evil.example.org"})
        assert "access-control-allow-origin" not in other.headers


def test_answers_forbid_what_pages_could_do_with_them(tmp_path):
    with running(tmp_path) as site, httpx.Client() as plain:
        headers = plain.get(f"{site.address}/v1/jobs").headers
        assert headers["x-content-type-options"] == "nosniff"
        assert "frame-ancestors 'none'" in headers["content-security-policy"]
        assert "server" not in headers
