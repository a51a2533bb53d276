"""A run's states in an S3 server, which is in the tests' own process.

Needs moto[server], s3fs and boto3, which nothing else does.
"""

import threading

import pytest
import torch
from linear_run import Stop, StoppingRecipe, run

from bdm.training import states
from bdm.training.places import place_of

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("default")]


@pytest.fixture
def store(monkeypatch):
    """A bucket named "bdm" that fsspec finds."""
    moto, serving = (pytest.importorskip(name) for name in ("moto.server", "werkzeug.serving"))
    s3fs = pytest.importorskip("s3fs")
    application = moto.DomainDispatcherApplication(moto.create_backend_app)
    server = serving.make_server("127.0.0.1", 0, application, threaded=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "test")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_port}")
    s3fs.S3FileSystem.clear_instance_cache()
    s3fs.S3FileSystem().mkdir("bdm")
    yield "s3://bdm"
    s3fs.S3FileSystem.clear_instance_cache()
    server.shutdown()
    server.server_close()


def test_a_run_whose_states_are_there_goes_on_bit_for_bit(tmp_path, store):
    whole = run(tmp_path / "whole")
    url = f"{store}/run/states"
    with pytest.raises(Stop):
        run(tmp_path / "cut", StoppingRecipe(), states=url)
    assert place_of(url).entries() == ["step-00000008", "step-00000004"]
    again = run(tmp_path / "cut", states=url)
    assert all(torch.equal(whole[key], again[key]) for key in whole)
    assert place_of(url).entries() == ["step-00000012", "step-00000008"]
    assert {name.partition("/")[0] for name in place_of(url).names()} == {"step-00000012", "step-00000008"}
    ours, theirs = states.load_state(url), states.load_state(tmp_path / "whole/states")
    assert all(torch.equal(ours["parts"]["layer"][k], v) for k, v in theirs["parts"]["layer"].items())
