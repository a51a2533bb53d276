"""The queue: places, cancelling, clients that leave, limits, stopping.

``BDM_CLIENTS`` says how many clients leave in the slow test.
"""

import json
import os
import socket
import threading
import time

import httpx
import pytest
from serving_running import running

from bdm.serving.limits import Limits

CLIENTS = int(os.environ.get("BDM_CLIENTS", "200"))


def until(condition, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "this never came"
        time.sleep(0.01)


def jobs(site, **request):
    return site.client.post("/v1/jobs", json={"request": {"steps": 5, **request}})


def test_a_job_is_made_watched_and_looked_up(tmp_path):
    with running(tmp_path, seconds=0.15) as site:
        (job,) = jobs(site, prompt="龙", seed=4).json()["jobs"]
        events = told(site.client, job["events"])
        names = [name for name, _ in events]
        assert names.index("step") < names.index("preview") < names.index("done")
        assert names[-2:] == ["done", "end"]
        assert "image" in dict(events)["preview"]
        found = site.client.get(f"/v1/jobs/{job['id']}").json()
        assert (found["status"], found["step"], found["seed"]) == ("done", 5, 4)
        picture = site.client.get(found["picture"])
        assert picture.headers["content-type"] == "image/png"
        (first,) = site.client.get("/v1/history").json()["pictures"]
        assert (first["id"], first["request"]["prompt"], first["request"]["seed"]) == (job["id"], "龙", 4)
        assert site.client.delete(f"/v1/history/{job['id']}").status_code == 200
        assert site.client.get(found["picture"]).status_code == 404


def told(client, address, **more):
    with client.stream("GET", address, **more) as answer:
        return list(events_in(answer.iter_lines()))


def events_in(lines):
    name = ""
    for line in lines:
        if line.startswith("event: "):
            name = line.removeprefix("event: ")
        elif line.startswith("data: "):
            yield name, json.loads(line.removeprefix("data: "))


def test_a_cancelled_job_frees_its_place(tmp_path):
    with running(tmp_path, seconds=0.1) as site:
        first, second = (jobs(site, steps=100, seed=seed).json()["jobs"][0] for seed in (1, 2))
        until(lambda: site.client.get(f"/v1/jobs/{first['id']}").json()["status"] == "running")
        for job in (first, second):
            site.client.delete(f"/v1/jobs/{job['id']}")
        until(lambda: not site.desk.live)
        states = [site.client.get(f"/v1/jobs/{job['id']}").json()["status"] for job in (first, second)]
        assert states == ["cancelled"] * 2


@pytest.mark.parametrize("count", [10, pytest.param(CLIENTS, marks=pytest.mark.slow)])
def test_clients_that_leave_lose_their_places(tmp_path, count):
    with running(tmp_path, seconds=0.05) as site:
        body = json.dumps({"prompt": "龙", "steps": 100, "width": 32, "height": 32}).encode()
        head = b"POST /sdapi/v1/txt2img HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
        for i in range(count):
            connection = socket.create_connection(("127.0.0.1", site.port))
            connection.sendall(head + b"Content-Length: %d\r\n\r\n" % len(body) + body)
            until(lambda i=i: accepted(site, "sdapi") == i + 1)
            connection.close()
        for _ in range(count // 5):  # and some that leave in the middle of what they say
            connection = socket.create_connection(("127.0.0.1", site.port))
            connection.sendall(head + b"Content-Length: %d\r\n\r\n" % len(body) + body[:20])
            connection.close()
        headers = {"accept": "text/event-stream"}
        for _ in range(1 + count // 20):
            request = {"request": {"steps": 100}}
            with site.client.stream("POST", "/v1/jobs", json=request, headers=headers) as answer:
                next(events_in(answer.iter_lines()))
        until(lambda: not site.desk.live)
        text = site.client.get("/metrics").text
        assert f'bdm_pictures_ended_total{{end="cancelled",way="sdapi"}} {count}.0' in text
        assert f'bdm_pictures_ended_total{{end="cancelled",way="jobs"}} {1 + count // 20}.0' in text
        assert all(job.over.is_set() for job in site.desk.engine.waiting)
        assert jobs(site, steps=1).status_code == 202


def accepted(site, way):
    return site.desk.metrics.accepted.labels(way)._value.get()


def test_many_waiting_are_refused_with_a_time(tmp_path):
    with running(tmp_path, seconds=0.1, limits=Limits(queue=3)) as site:
        made = [jobs(site, steps=100) for _ in range(4)]
        assert [answer.status_code for answer in made] == [202, 202, 202, 429]
        assert int(made[3].headers["retry-after"]) >= 1
        assert site.client.get("/readyz").status_code == 503
        api = site.client.post("/sdapi/v1/txt2img", json={"prompt": "x", "batch_size": 2})
        assert api.status_code == 429
        for ticket in site.desk.live:
            site.client.delete(f"/v1/jobs/{ticket.id}")
        until(lambda: not site.desk.live)


def test_interrupt_ends_what_a1111s_clients_have_running(tmp_path):
    with running(tmp_path, seconds=0.05) as site:
        (other,) = jobs(site, steps=20).json()["jobs"]
        until(lambda: site.client.get(f"/v1/jobs/{other['id']}").json()["status"] == "running")
        answers = []
        body = {"prompt": "x", "steps": 100, "width": 32, "height": 32}
        thread = threading.Thread(
            target=lambda: answers.append(
                httpx.post(f"{site.address}/sdapi/v1/txt2img", json=body, timeout=60)
            )
        )
        thread.start()
        until(lambda: any(one.way == "sdapi" and one.status == "running" for one in site.desk.live))
        progress = site.client.get("/sdapi/v1/progress").json()
        assert 0 <= progress["progress"] < 1
        assert progress["state"]["sampling_steps"] in (20, 100)
        assert site.client.post("/sdapi/v1/interrupt").json() == {"cancelled": 1}
        thread.join()
        assert answers[0].status_code == 200
        assert json.loads(answers[0].json()["info"])["interrupted"] is True
        assert site.client.get(f"/v1/jobs/{other['id']}").json()["status"] == "done"


def test_what_cannot_be_drawn_is_told(tmp_path):
    with running(tmp_path) as site:
        answer = site.client.post(
            "/sdapi/v1/txt2img", json={"prompt": "this fails", "width": 32, "height": 32}
        )
        assert (answer.status_code, answer.json()["detail"]) == (422, "the picture came out as NaN")
        (job,) = jobs(site, prompt_en="this fails").json()["jobs"]
        until(lambda: not site.desk.live)
        assert site.client.get(f"/v1/jobs/{job['id']}").json()["error"] == "the picture came out as NaN"


def test_a_stop_finishes_what_was_accepted_and_hands_back_the_rest(tmp_path):
    with running(tmp_path, seconds=0.05, grace=5) as site:
        answers = {}
        site.desk.engine.gate.clear()
        site.desk.engine.hold_at = 100

        def ask(name, steps):
            body = {"prompt": name, "steps": steps, "width": 32, "height": 32}
            answers[name] = httpx.post(f"{site.address}/sdapi/v1/txt2img", json=body, timeout=60)

        threads = [threading.Thread(target=ask, args=pair) for pair in (("short", 5), ("long", 150))]
        for count, thread in enumerate(threads, 1):
            thread.start()
            until(lambda count=count: len(site.desk.live) == count)
        long = site.desk.live[1].id
        site.http.should_exit = True
        site.desk.engine.gate.set()
        for thread in threads:
            thread.join()
        assert answers["short"].status_code == 200
        assert answers["long"].status_code == 503
        assert "retry-after" in answers["long"].headers
        site.thread.join()
    with running(tmp_path) as again:
        found = again.client.get(f"/v1/jobs/{long}").json()
        assert (found["status"], found["request"]["steps"]) == ("returned", 150)
        assert again.served.history.lost == []


def test_a_stop_waits_for_jobs_that_nobody_is_waiting_for(tmp_path):
    with running(tmp_path, seconds=0.05) as site:
        (job,) = jobs(site, steps=10).json()["jobs"]
        site.http.should_exit = True
        site.thread.join()
    with running(tmp_path) as again:
        assert again.client.get(f"/v1/jobs/{job['id']}").json()["status"] == "done"


def test_figures_are_told_to_prometheus(tmp_path):
    with running(tmp_path) as site:
        site.client.post("/sdapi/v1/txt2img", json={"prompt": "x", "width": 32, "height": 32})
        text = site.client.get("/metrics").text
        assert 'bdm_pictures_ended_total{end="done",way="sdapi"} 1.0' in text
        assert 'bdm_pictures{state="queued"} 0.0' in text
        assert "bdm_engine_steps 1.0" in text
