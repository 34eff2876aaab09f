"""The service: jobs from request to video, bounds, tokens, cancelling, and a real server process."""

from __future__ import annotations

import base64
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_models
from click.testing import CliRunner
from faces import face
from starlette.testclient import TestClient

from worldloom import media
from worldloom.artifacts import Store, file_digest
from worldloom.cli import main
from worldloom.errors import WorldloomError
from worldloom.generation import make_sample
from worldloom.guardrails import GuardrailConfig
from worldloom.loading import load_model
from worldloom.schema import GenerationRequest
from worldloom.serving import ServerConfig, create_app

pytestmark = pytest.mark.usefixtures("worldloom_home")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.world(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def image() -> str:
    data = media.write_image(None, tiny_models.moving_square(1, 3)[0])
    assert data is not None
    return base64.b64encode(data).decode()


class Slow:
    """A real model whose steps wait for a signal, so that a test decides when a job goes on."""

    def __init__(self, model: Any) -> None:
        self.model, self.go, self.stepped = model, threading.Event(), threading.Event()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    def complete(self, request: GenerationRequest) -> GenerationRequest:
        return self.model.complete(request)

    def provenance(self) -> dict[str, Any]:
        return self.model.provenance()

    def generate(self, request: GenerationRequest, progress: Any = None) -> Any:
        def wait(done: int, total: int) -> None:
            self.stepped.set()
            assert self.go.wait(30)
            progress(done, total)

        return self.model.generate(request, progress=wait)


def client(models: dict[str, Any], config: ServerConfig, **options: Any) -> TestClient:
    return TestClient(create_app(models, config), base_url="http://127.0.0.1:8000", **options)


@pytest.fixture
def served(folder: Path, tmp_path: Path) -> Iterator[TestClient]:
    with client({"tiny": load_model(folder)}, ServerConfig(tmp_path / "out")) as found:
        yield found


@pytest.fixture
def slow(folder: Path, tmp_path: Path) -> Iterator[tuple[TestClient, Slow]]:
    model = Slow(load_model(folder))
    with client({"tiny": model}, ServerConfig(tmp_path / "out", queue=2)) as found:
        yield found, model
        model.go.set()


def wait_for(served: TestClient, job: str, *statuses: str) -> dict[str, Any]:
    until = time.monotonic() + 30
    while (state := served.get(f"/v1/videos/{job}").json())["status"] not in statuses:
        assert time.monotonic() < until, state
        time.sleep(0.02)
    return state


def test_a_job_becomes_the_video_that_generate_makes(
    served: TestClient, folder: Path, image: str, tmp_path: Path
) -> None:
    rows = np.eye(3)[[0, 1, 2, 2, 1, 0, 1, 2]].tolist()
    answer = served.post("/v1/videos", json={"image": image, "actions": rows, "seed": 4})
    assert answer.status_code == 202, answer.text
    state = answer.json()
    assert (state["frames"], state["seed"], state["model"]) == (9, 4, "tiny")
    state = wait_for(served, state["id"], "completed", "failed")
    assert (state["status"], state["progress"], state["error"]) == ("completed", 1.0, None)
    content = served.get(state["content"])
    assert content.headers["content-type"] == "video/mp4"
    assert media.probe(content.content, count=True).frames == 9
    assert served.get(state["content"], headers={"Range": "bytes=0-99"}).status_code == 206

    (tmp_path / "start.png").write_bytes(base64.b64decode(image))
    np.save(tmp_path / "actions.npy", np.array(rows, np.float32))
    request = GenerationRequest(
        "tiny", image=str(tmp_path / "start.png"), actions=str(tmp_path / "actions.npy"), seed=4
    )
    by_hand = make_sample(load_model(folder), request, tmp_path / "by-hand").sample
    assert Path(by_hand.path).read_bytes() == content.content

    record = Store().get(state["artifact"])
    assert record.inputs[0] == f"model:tiny-world@{file_digest(folder / 'model.safetensors')}"
    assert any(entry.endswith(".image") for entry in record.inputs)
    sidecar = json.loads((tmp_path / "out" / record.metadata["sidecar"]).read_text())
    assert sidecar["id"] == record.id


def test_a_video_and_action_names_are_taken_too(served: TestClient) -> None:
    data = media.write_video(None, tiny_models.moving_square(9, 1), 10.0)
    assert data is not None
    url = f"data:video/mp4;base64,{base64.b64encode(data).decode()}"
    answer = served.post("/v1/videos", json={"video": url, "actions": ["left", "fire"] * 2, "frames": 13})
    assert answer.status_code == 202, answer.text
    assert wait_for(served, answer.json()["id"], "completed", "failed")["status"] == "completed"


def test_it_says_what_it_is(served: TestClient) -> None:
    assert served.get("/health").json()["status"] == "ok"
    (model,) = served.get("/v1/models").json()["models"]
    assert model["id"] == "tiny"
    assert set(model["capabilities"]) >= {"generates", "steps"}
    assert (model["height"], model["action_dim"], model["action_names"]) == (32, 3, list(tiny_models.ACTIONS))
    assert "/v1/videos/{video_id}/content" in served.get("/v1/openapi.json").json()["paths"]


@pytest.mark.parametrize(
    ("body", "status", "what"),
    [
        ({}, 400, "a start is needed"),
        ({"image": "!!!"}, 400, "not base64"),
        ({"image": base64.b64encode(b"no image").decode()}, 400, "not an image"),
        ({"image": "IMAGE", "video": base64.b64encode(b"x").decode()}, 400, "a start is needed"),
        ({"image": "IMAGE", "prompt": "a dog"}, 400, "takes no text"),
        ({"image": "IMAGE", "frames": 6}, 400, "1 + 4k"),
        ({"image": "IMAGE", "frames": 100001}, 400, "at most 1025 frames"),
        ({"image": "IMAGE", "steps": 201}, 400, "at most"),
        ({"image": "IMAGE", "actions": [[0.0] * 3] * 2000}, 400, "at most 1025 frames"),
        ({"image": "IMAGE", "actions": [[0.0, 1.0]] * 4}, 400, "another size"),
        ({"image": "IMAGE", "actions": ["jump"] * 4}, 400, "no such action"),
        ({"image": "IMAGE", "actions": [[float("nan")] * 3] * 4}, 400, "finite"),
        ({"image": "IMAGE", "model": "other"}, 400, "no such model"),
        ({"image": "IMAGE", "steps": 0}, 422, "steps"),
        ({"image": "IMAGE", "seed": -1}, 422, "seed"),
        ({"image": "IMAGE", "sede": 1}, 422, "sede"),
        ({"image": "IMAGE", "actions": "left"}, 422, "actions"),
    ],
)
def test_a_wrong_request_is_refused_and_leaves_no_file(
    served: TestClient, image: str, tmp_path: Path, body: dict[str, Any], status: int, what: str
) -> None:
    text = json.dumps({key: image if value == "IMAGE" else value for key, value in body.items()})
    answer = served.post("/v1/videos", content=text, headers={"content-type": "application/json"})
    assert answer.status_code == status, answer.text
    assert what in answer.text
    assert not [p for p in tmp_path.rglob("*") if p.is_file() and "home" not in p.parts]
    assert served.get("/health").json()["queued"] == 0


def test_what_is_not_there_is_404_and_what_is_not_ready_409(slow: tuple[TestClient, Slow], image: str) -> None:
    served, model = slow
    for method, path in (("GET", ""), ("GET", "/content"), ("DELETE", "")):
        assert served.request(method, f"/v1/videos/video-0{path}").status_code == 404
    job = served.post("/v1/videos", json={"image": image, "frames": 5}).json()["id"]
    assert served.get(f"/v1/videos/{job}/content").status_code == 409
    model.go.set()
    wait_for(served, job, "completed")
    assert served.delete(f"/v1/videos/{job}").status_code == 409
    assert served.get(f"/v1/videos/{job}/content").status_code == 200


def test_a_full_queue_says_when_to_come_back(slow: tuple[TestClient, Slow], image: str) -> None:
    served, model = slow
    jobs = []
    for seed in range(3):  # one runs, two wait
        answer = served.post("/v1/videos", json={"image": image, "frames": 5, "seed": seed})
        assert answer.status_code == 202
        jobs.append(answer.json()["id"])
        if seed == 0:
            assert model.stepped.wait(30)
    full = served.post("/v1/videos", json={"image": image, "frames": 5, "seed": 3})
    assert full.status_code == 429
    assert int(full.headers["retry-after"]) > 0
    assert served.get(f"/v1/videos/{jobs[2]}").json()["ahead"] == 1
    assert served.get("/health").json() | {"version": ""} == {
        "status": "ok", "version": "", "queued": 2, "running": 1, "queue": 2
    }  # fmt: skip
    model.go.set()
    assert [wait_for(served, job, "completed", "failed")["status"] for job in jobs] == ["completed"] * 3


def test_cancelling_takes_a_job_out_of_the_queue_and_stops_a_running_one(
    slow: tuple[TestClient, Slow], image: str, tmp_path: Path
) -> None:
    served, model = slow
    running, waiting = (
        served.post("/v1/videos", json={"image": image, "frames": 17, "seed": seed}).json()["id"] for seed in range(2)
    )
    assert model.stepped.wait(30)
    assert served.delete(f"/v1/videos/{waiting}").json()["status"] == "cancelled"
    assert served.delete(f"/v1/videos/{running}").status_code == 200
    model.go.set()
    state = wait_for(served, running, "cancelled", "completed")
    assert state["status"] == "cancelled"
    assert 0 < state["progress"] < 0.5  # it stopped at the next step, not at the end
    assert not list((tmp_path / "out").glob("*.*"))
    assert not Store().find()
    job = served.post("/v1/videos", json={"image": image, "frames": 5}).json()["id"]  # and the worker lives on
    assert wait_for(served, job, "completed", "failed")["status"] == "completed"


def test_a_job_that_breaks_does_not_break_the_next(
    folder: Path, image: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    class Broken(Slow):
        broken = True

        def generate(self, request: GenerationRequest, progress: Any = None) -> Any:
            if self.broken:
                raise RuntimeError("secret path /root")
            return self.model.generate(request, progress=progress)

    model = Broken(load_model(folder))
    with client({"tiny": model}, ServerConfig(tmp_path / "out")) as served:
        job = served.post("/v1/videos", json={"image": image, "frames": 5}).json()["id"]
        state = wait_for(served, job, "failed", "completed")
        assert (state["status"], state["error"]) == ("failed", "internal error: RuntimeError")
        assert "secret path" in capsys.readouterr().err  # the log has it, the client does not
        model.broken = False
        job = served.post("/v1/videos", json={"image": image, "frames": 5}).json()["id"]
        assert wait_for(served, job, "failed", "completed")["status"] == "completed"


def test_stopping_the_server_cancels_what_runs_and_leaves_nothing(folder: Path, image: str, tmp_path: Path) -> None:
    model = Slow(load_model(folder))
    threading.Timer(0.5, model.go.set).start()
    with client({"tiny": model}, ServerConfig(tmp_path / "out")) as served:
        served.post("/v1/videos", json={"image": image, "frames": 33})
        assert model.stepped.wait(30)
    assert not list((tmp_path / "out").glob("*.*"))


def test_a_request_may_only_be_so_large(folder: Path, tmp_path: Path, image: str) -> None:
    config = replace(ServerConfig(tmp_path / "out"), max_body=10_000)
    kind = {"content-type": "application/json"}
    with client({"tiny": load_model(folder)}, config) as served:
        large = json.dumps({"image": "A" * 20_000}).encode()
        assert served.post("/v1/videos", content=large, headers=kind).status_code == 413
        # without a length, in pieces
        assert (
            served.post("/v1/videos", content=iter([large[:15_000], large[15_000:]]), headers=kind).status_code == 413
        )
        assert served.post("/v1/videos", content=b"{}", headers={**kind, "content-length": "x"}).status_code == 413
        assert served.post("/v1/videos", json={"image": image, "frames": 5}).status_code == 202


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/health"),
        ("GET", "/v1/models"),
        ("POST", "/v1/videos"),
        ("GET", "/v1/videos/x"),
        ("GET", "/v1/videos/x/content"),
        ("DELETE", "/v1/videos/x"),
        ("GET", "/v1/openapi.json"),
        ("GET", "/nowhere"),
    ],
)
def test_every_route_asks_for_the_token(folder: Path, tmp_path: Path, method: str, path: str) -> None:
    with client({"tiny": load_model(folder)}, ServerConfig(tmp_path / "out", token="sesame")) as served:
        for header in ({}, {"authorization": "Bearer sesam"}, {"authorization": "sesame"}, {"authorization": "Bearer"}):
            answer = served.request(method, path, headers=header)
            assert answer.status_code == 401
            assert answer.headers["www-authenticate"] == "Bearer"
        assert served.request(method, path, headers={"authorization": "Bearer sesame"}).status_code != 401


def test_pages_of_other_sites_get_nothing(served: TestClient, image: str) -> None:
    """DNS rebinding brings a foreign Host; a form post brings no JSON."""
    assert served.get("/health", headers={"host": "evil.example"}).status_code == 403
    assert served.get("/health", headers={"host": "127.0.0.1.evil.example:8000"}).status_code == 403
    for host in ("localhost:8000", "127.0.0.1", "[::1]:8000"):
        assert served.get("/health", headers={"host": host}).status_code == 200
    body = json.dumps({"image": image, "frames": 5})
    assert served.post("/v1/videos", content=body, headers={"content-type": "text/plain"}).status_code == 415


def test_old_jobs_are_forgotten_and_their_videos_kept(folder: Path, image: str, tmp_path: Path) -> None:
    config = ServerConfig(tmp_path / "out", keep=1)
    with client({"tiny": load_model(folder)}, config) as served:
        jobs = []
        for seed in range(3):
            jobs.append(served.post("/v1/videos", json={"image": image, "frames": 5, "seed": seed}).json()["id"])
            wait_for(served, jobs[-1], "completed")
        assert served.get(f"/v1/videos/{jobs[0]}").status_code == 404
        assert served.get(f"/v1/videos/{jobs[2]}").status_code == 200
    assert len(list((tmp_path / "out").glob("*.mp4"))) == 3


def test_two_models_are_told_apart(folder: Path, image: str, tmp_path: Path) -> None:
    models = {"one": load_model(folder), "two": load_model(tiny_models.world(tmp_path / "other", seed=5))}
    with client(models, ServerConfig(tmp_path / "out")) as served:
        assert served.post("/v1/videos", json={"image": image}).status_code == 400
        made = []
        for name in models:
            job = served.post("/v1/videos", json={"model": name, "image": image, "frames": 5}).json()["id"]
            made.append(served.get(wait_for(served, job, "completed")["content"]).content)
    assert made[0] != made[1]


def test_what_cannot_generate_is_not_served() -> None:
    class Captioner:
        def answer(self, video: object, question: str) -> str:
            return ""

    with pytest.raises(WorldloomError, match="does not generate"):
        create_app({"captioner": Captioner()}, ServerConfig())


# -- guards ----------------------------------------------------------------------------------------------------------


class Painter:
    """A model that takes text and shows one picture, whatever it reads."""

    def __init__(self, picture: np.ndarray) -> None:
        self.picture = picture

    def complete(self, request: GenerationRequest) -> GenerationRequest:
        return replace(request, frames=request.frames or 2, fps=request.fps or 8.0)

    def generate(self, request: GenerationRequest, progress: Any = None) -> Any:
        assert request.frames is not None
        return media.to_tensor(np.stack([self.picture] * request.frames))

    def provenance(self) -> dict[str, Any]:
        return {"model": {"name": "painter", "path": "", "digest": "0" * 64, "kind": "painter"}}


def outcomes(state: dict[str, Any]) -> dict[str, str]:
    return {item["guard"]: item["outcome"] for item in state["guardrails"]}


def test_a_prompt_that_a_guard_refuses_is_a_400_with_the_reason(tmp_path: Path) -> None:
    config = ServerConfig(tmp_path / "out", guardrails=GuardrailConfig(skip=("classifier",)))
    with client({"painter": Painter(face(64))}, config) as served:
        answer = served.post("/v1/videos", json={"prompt": "a naked man"})
        assert answer.status_code == 400
        assert "refused by a guard" in answer.json()["detail"]
        assert served.get("/health").json()["queued"] == 0
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(importlib.util.find_spec("nudenet") is None, reason="needs the package nudenet")
def test_a_served_video_goes_through_the_guards_and_the_job_says_so(tmp_path: Path) -> None:
    config = ServerConfig(tmp_path / "out", guardrails=GuardrailConfig(skip=("classifier",)))
    with client({"painter": Painter(face(64))}, config) as served:
        job = served.post("/v1/videos", json={"prompt": "a portrait"}).json()
        assert job["guardrails"] == []
        state = wait_for(served, job["id"], "completed", "failed")
        assert outcomes(state) == {
            "blocklist": "passed", "classifier": "skipped", "nudity": "passed", "faces": "changed"
        }  # fmt: skip
        shown = media.read_frames(served.get(state["content"]).content)
        record = Store().get(state["artifact"])
    sidecar = json.loads((tmp_path / "out" / record.metadata["sidecar"]).read_text())
    assert sidecar["guardrails"]["checks"] == state["guardrails"]
    eyes = face(64)[20:32, 18:46].astype(float)
    assert np.diff(shown[0][20:32, 18:46].astype(float), axis=1).std() < 0.4 * np.diff(eyes, axis=1).std()


def test_a_video_that_a_guard_refuses_is_a_failed_job_and_leaves_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from worldloom import guardrails
    from worldloom.schema import VideoVerdict

    class Refuses:
        fingerprint = "1"

        def check_video(self, frames: np.ndarray) -> VideoVerdict:
            return VideoVerdict(blocked="too dark")

    known = guardrails._factories()
    monkeypatch.setattr(
        guardrails, "_factories", lambda: {"blocklist": known["blocklist"], "dark": ("after", lambda _: Refuses())}
    )
    with client({"painter": Painter(np.zeros((32, 32, 3), np.uint8))}, ServerConfig(tmp_path / "out")) as served:
        job = served.post("/v1/videos", json={}).json()["id"]
        state = wait_for(served, job, "completed", "failed")
    assert state["status"] == "failed"
    assert "dark: too dark" in state["error"]
    assert outcomes(state)["dark"] == "blocked"
    assert not list((tmp_path / "out").glob("*.*"))


# -- the command -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "what"),
    [
        (("--host", "0.0.0.0"), "needs a token"),
        (("--port", "99999"), "cannot listen there"),
        (("--queue", "0"), "at least one job"),
        (("--blocklist", "nowhere.txt"), "does not exist"),
        (("--guardrails", "maybe"), "maybe"),
        (("--device", "cuda:55"), "no such device"),
    ],
)
def test_a_server_that_would_be_wrong_does_not_start(folder: Path, words: tuple[str, ...], what: str) -> None:
    done = CliRunner().invoke(main, ["serve", str(folder), *words])
    assert done.exit_code == 2
    assert what in done.stderr


def test_a_real_server_makes_a_video_and_stops(folder: Path, image: str, tmp_path: Path) -> None:
    import httpx

    command = [sys.executable, "-m", "worldloom", "serve", str(folder), "--port", "0", "--out", str(tmp_path / "out")]
    before = signal.signal(signal.SIGINT, signal.SIG_DFL)  # ignored where the tests run in the background of a shell
    try:
        process = subprocess.Popen(
            command, stderr=subprocess.PIPE, text=True, env={**os.environ, "WORLDLOOM_TOKEN": "sesame"}
        )
    finally:
        signal.signal(signal.SIGINT, before)
    with process:
        try:
            assert process.stderr is not None
            line = process.stderr.readline()
            address = re.search(r"http://127\.0\.0\.1:\d+", line)
            assert address is not None, line + process.stderr.read()
            with httpx.Client(base_url=address[0], timeout=30) as plain:
                assert plain.get("/health").status_code == 401
            headers = {"authorization": "Bearer sesame"}
            with httpx.Client(base_url=address[0], timeout=30, headers=headers) as found:
                job = found.post("/v1/videos", json={"image": image, "frames": 9}).json()["id"]
                until = time.monotonic() + 30
                while (state := found.get(f"/v1/videos/{job}").json())["status"] not in ("completed", "failed"):
                    assert time.monotonic() < until
                    time.sleep(0.05)
                assert state["status"] == "completed"
                assert media.probe(found.get(state["content"]).content, count=True).frames == 9
            busy = CliRunner().invoke(main, ["serve", str(folder), "--port", address[0].rpartition(":")[2]])
            assert "cannot listen there" in busy.stderr
            process.send_signal(signal.SIGINT)
            assert process.wait(20) == 0
            assert "stopped" in process.stderr.read()
        finally:
            process.kill()
