"""An S3 server in the tests' own process: a run's states, and a pass over a corpus by two machines.

Needs moto[server], s3fs and boto3, which nothing else does.
"""

import json
import os
import threading

import pytest
import torch
from linear_run import Stop, StoppingRecipe, run

from bdm.bench.data import write_pictures
from bdm.data.batch import stream
from bdm.data.indexed import IndexedSource
from bdm.data.indexing import Corpus, Maker
from bdm.data.node import Node
from bdm.data.pictures import PictureRules
from bdm.training import states
from bdm.training.places import place_of

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("default")]

SHARDS, ROWS, BATCH = 32, 24, 16


class Counted:
    """A WSGI application whose answers' bytes are counted, by the end of the path."""

    def __init__(self, application):
        self.application, self.sent, self.lock = application, {}, threading.Lock()

    def __call__(self, environ, start_response):
        kind = environ["PATH_INFO"].rpartition(".")[2]
        for piece in self.application(environ, start_response):
            if environ["REQUEST_METHOD"] == "GET":
                with self.lock:
                    self.sent[kind] = self.sent.get(kind, 0) + len(piece)
            yield piece


@pytest.fixture
def store(monkeypatch):
    """The server's counts, with a bucket named "bdm" that fsspec finds."""
    moto, serving = (pytest.importorskip(name) for name in ("moto.server", "werkzeug.serving"))
    s3fs = pytest.importorskip("s3fs")
    counted = Counted(moto.DomainDispatcherApplication(moto.create_backend_app))
    server = serving.make_server("127.0.0.1", 0, counted, threaded=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "test")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_port}")
    s3fs.S3FileSystem.clear_instance_cache()
    if not s3fs.S3FileSystem().exists("bdm"):  # the server's memory is the process's
        s3fs.S3FileSystem().mkdir("bdm")
    yield counted
    s3fs.S3FileSystem.clear_instance_cache()
    server.shutdown()
    server.server_close()


def test_a_run_whose_states_are_there_goes_on_bit_for_bit(tmp_path, store):
    whole = run(tmp_path / "whole")
    url = "s3://bdm/run/states"
    with pytest.raises(Stop):
        run(tmp_path / "cut", StoppingRecipe(), states=url)
    assert place_of(url).entries() == ["step-00000008", "step-00000004"]
    again = run(tmp_path / "cut", states=url)
    assert all(torch.equal(whole[key], again[key]) for key in whole)
    assert place_of(url).entries() == ["step-00000012", "step-00000008"]
    assert {name.partition("/")[0] for name in place_of(url).names()} == {"step-00000012", "step-00000008"}
    ours, theirs = states.load_state(url), states.load_state(tmp_path / "whole/states")
    assert all(torch.equal(ours["parts"]["layer"][k], v) for k, v in theirs["parts"]["layer"].items())


def read(folder, urls, process):
    """A process's part of a pass: the samples, in order."""
    source = IndexedSource(
        folder / "index", "shards", urls, partitions=8, local=folder / f"machine{process // 2}",
        size=64, captions={"txt": 1.0},
    )  # fmt: skip
    node = Node(process // 2 * 2, 2, 4)
    batches = stream(source, 0, len(source) // BATCH, BATCH, 0, process=process, processes=4, node=node)
    return [index for batch in batches for index in batch.indices]


def test_a_pass_by_two_machines_fetches_the_corpus_about_once(tmp_path, store):
    write_pictures(tmp_path / "data", SHARDS, ROWS)
    place_files(tmp_path / "data")
    urls = f"s3://bdm/data/{{00000..{SHARDS - 1:05d}}}.tar"
    rules = PictureRules(size=64, captions={"txt": 1.0})
    maker = Maker(Corpus(kind="shards", urls=(urls,), rules=rules), tmp_path / "index")
    maker.begin()
    for task in maker.tasks():
        maker.run(task)
    maker.finish()
    store.sent.clear()
    children = []
    for process in range(4):  # at once, as they are in a run
        child = os.fork()
        if child == 0:
            try:
                (tmp_path / f"{process}.json").write_text(json.dumps(read(tmp_path, urls, process)))
            finally:
                os._exit(0)
        children.append(child)
    for child in children:
        os.waitpid(child, 0)
    seen = [i for process in range(4) for i in json.loads((tmp_path / f"{process}.json").read_text())]
    assert len(set(seen)) == len(seen) == (SHARDS - 1) * ROWS // BATCH * BATCH
    # The last shard is validation's.
    size = sum(path.stat().st_size for path in sorted((tmp_path / "data").glob("*.tar"))[:-1])
    print(f"fetched {store.sent['tar'] / size:.3f} of the corpus")
    assert 0.9 < store.sent["tar"] / size <= 1.15


def place_files(folder):
    """Put a folder's files there."""
    import s3fs

    for path in sorted(folder.glob("*")):
        s3fs.S3FileSystem().put_file(str(path), f"bdm/data/{path.name}")
