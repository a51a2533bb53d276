"""A pass over a corpus in an object store: over HTTP, by processes of two machines, bytes counted there."""

import json
import os
import threading
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import fsspec
import pytest
from fsspec import AbstractFileSystem
from fsspec.spec import AbstractBufferedFile

from bdm.bench.data import write_pictures
from bdm.data.batch import stream
from bdm.data.indexed import IndexedSource
from bdm.data.indexing import Corpus, Maker
from bdm.data.node import Node
from bdm.data.pictures import PictureRules

SHARDS, ROWS, BATCH = 32, 24, 16
#: Of every so many requests the store refuses one.
REFUSED = 7


class Store(BaseHTTPRequestHandler):
    """Answers ranges of files, as S3 does, counts what it sends, and now and then says 503."""

    folder: Path
    sent, asked = 0, 0
    lock = threading.Lock()

    def do_HEAD(self):
        self.answer(body=False)

    def do_GET(self):
        self.answer(body=True)

    def answer(self, body):
        with Store.lock:
            Store.asked += 1
            refused = Store.asked % REFUSED == 0
        if refused:
            self.send_error(503)
            return
        content = (self.folder / self.path.lstrip("/")).read_bytes()
        if span := self.headers.get("Range"):
            first, last = span.removeprefix("bytes=").split("-")
            content = content[int(first) : int(last) + 1]
        self.send_response(206 if span else 200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if body:
            with Store.lock:
                Store.sent += len(content)
            self.wfile.write(content)

    def log_message(self, *_):
        pass


class Objects(AbstractFileSystem):
    """fsspec's view of the store: ``objects://HOST:PORT/NAME``."""

    protocol = "objects"
    cachable = False

    def _ask(self, path, method="GET", **headers):
        url = f"http://{self._strip_protocol(path)}"
        asked = urllib.request.Request(url, method=method, headers=headers)
        with urllib.request.urlopen(asked, timeout=20) as answer:
            return answer.read(), int(answer.headers["Content-Length"])

    def info(self, path, **_):
        return {"name": path, "size": self._ask(path, "HEAD")[1], "type": "file"}

    def _open(self, path, mode="rb", block_size=None, cache_options=None, **options):
        return ObjectFile(self, path, mode, block_size or 2**20, cache_options=cache_options, **options)


class ObjectFile(AbstractBufferedFile):
    def _fetch_range(self, start, end):
        return self.fs._ask(self.path, Range=f"bytes={start}-{end - 1}")[0]


@pytest.fixture
def store(tmp_path):
    fsspec.register_implementation("objects", Objects, clobber=True)
    Store.folder, Store.sent, Store.asked = tmp_path / "data", 0, 0
    write_pictures(Store.folder, SHARDS, ROWS)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Store)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"objects://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def read(folder, urls, process):
    """A process's part of a pass: the samples, in order."""
    source = IndexedSource(
        folder / "index", "shards", urls, partitions=8, local=folder / f"machine{process // 2}",
        size=64, captions={"txt": 1.0},
    )  # fmt: skip
    node = Node(process // 2 * 2, 2, 4)
    batches = stream(source, 0, len(source) // BATCH, BATCH, 0, process=process, processes=4, node=node)
    return [index for batch in batches for index in batch.indices]


@pytest.mark.slow
def test_a_pass_by_two_machines_fetches_the_corpus_about_once(tmp_path, store):
    urls = f"{store}/{{00000..{SHARDS - 1:05d}}}.tar"
    rules = PictureRules(size=64, captions={"txt": 1.0})
    near = f"{tmp_path}/data/{{00000..{SHARDS - 1:05d}}}.tar"
    maker = Maker(Corpus(kind="shards", urls=(near,), rules=rules), tmp_path / "index")
    maker.begin()
    for task in maker.tasks():
        maker.run(task)
    maker.finish()
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
    size = sum(path.stat().st_size for path in sorted(Store.folder.glob("*.tar"))[:-1])
    assert Store.asked > SHARDS
    assert 0.9 < Store.sent / size <= 1.15
