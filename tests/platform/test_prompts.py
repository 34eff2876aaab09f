"""Prompt upsampling against a real HTTP server on this machine, and by a local model."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
import torch

from worldloom.errors import WorldloomError
from worldloom.prompts import INSTRUCTION, KEY_VARIABLE, ChatEndpoint, LocalUpsampler
from worldloom.protocols import Upsamples


class Endpoint:
    """A server that speaks chat completions; a test sets what it answers and sees what it was asked."""

    def __init__(self) -> None:
        self.status, self.headers, self.delay = 200, {"content-type": "application/json"}, 0.0
        self.body: bytes = b""
        self.asked: list[tuple[str, dict[str, str], Any]] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                given = self.rfile.read(int(self.headers["content-length"]))
                outer.asked.append((self.path, dict(self.headers.items()), json.loads(given)))
                time.sleep(outer.delay)
                self.send_response(outer.status)
                for key, value in outer.headers.items():
                    self.send_header(key, value)
                self.send_header("content-length", str(len(outer.body)))
                self.end_headers()
                self.wfile.write(outer.body)

            def log_message(self, format: str, *args: Any) -> None:
                pass

        class Server(ThreadingHTTPServer):
            def handle_error(self, request: Any, client_address: Any) -> None:
                pass  # a client that gave up

        self.server = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/v1"

    def says(self, text: object) -> None:
        self.body = json.dumps({"choices": [{"message": {"role": "assistant", "content": text}}]}).encode()


@pytest.fixture
def endpoint(monkeypatch: pytest.MonkeyPatch) -> Iterator[Endpoint]:
    monkeypatch.delenv(KEY_VARIABLE, raising=False)
    made = Endpoint()
    thread = threading.Thread(target=made.server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield made
    made.server.shutdown()
    thread.join()
    made.server.server_close()


def test_a_prompt_is_sent_and_the_answer_is_the_new_prompt(endpoint: Endpoint) -> None:
    endpoint.says("A small brown dog\ntrots across wet sand.")
    upsampler = ChatEndpoint(endpoint.url, "writer-7b")
    assert isinstance(upsampler, Upsamples)
    assert upsampler.upsample("a dog") == "A small brown dog trots across wet sand."
    ((path, headers, body),) = endpoint.asked
    assert path == "/v1/chat/completions"
    assert "Authorization" not in headers
    assert body["model"] == "writer-7b"
    assert body["messages"] == [
        {"role": "system", "content": INSTRUCTION},
        {"role": "user", "content": "a dog"},
    ]
    assert (body["temperature"], body["seed"]) == (0, 0)


def test_the_whole_address_will_do_and_a_key_is_sent(endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEY_VARIABLE, "sesame")
    endpoint.says("fine")
    upsampler = ChatEndpoint(f"{endpoint.url}/chat/completions/", "m")
    upsampler.upsample("a dog")
    assert endpoint.asked[0][0] == "/v1/chat/completions"
    assert endpoint.asked[0][1]["Authorization"] == "Bearer sesame"
    assert "sesame" not in json.dumps(dict(upsampler.identity()))


@pytest.mark.parametrize(
    ("said", "kept"),
    [
        ('"A dog runs."', "A dog runs."),
        ("```text\nA dog runs.\n```", "A dog runs."),
        ("<think>The user wants a dog.\n</think>\n\nA dog runs.", "A dog runs."),
    ],
)
def test_thoughts_fences_and_quotes_are_taken_off(endpoint: Endpoint, said: str, kept: str) -> None:
    endpoint.says(said)
    assert ChatEndpoint(endpoint.url, "m").upsample("a dog") == kept


@pytest.mark.parametrize("said", ["", "   ", "<think>for ever", None, 3, "x" * 9000])
def test_an_answer_without_a_prompt_is_an_error(endpoint: Endpoint, said: object) -> None:
    endpoint.says(said)
    with pytest.raises(WorldloomError, match="rewritten prompt is"):
        ChatEndpoint(endpoint.url, "m").upsample("a dog")


@pytest.mark.parametrize("body", [b"<html>", b"[]", b'{"choices": []}', b"\xff\xfe", b'{"error": "no"}'])
def test_what_is_no_completion_is_shown(endpoint: Endpoint, body: bytes) -> None:
    endpoint.body = body
    with pytest.raises(WorldloomError, match="not a chat completion"):
        ChatEndpoint(endpoint.url, "m").upsample("a dog")


@pytest.mark.parametrize(
    ("status", "advice"), [(401, KEY_VARIABLE), (404, "--upsample-model"), (429, "wait"), (500, "log"), (503, "log")]
)
def test_an_http_error_says_what_to_do(endpoint: Endpoint, status: int, advice: str) -> None:
    endpoint.status, endpoint.body = status, b"because"
    with pytest.raises(WorldloomError, match=f"answered {status}") as caught:
        ChatEndpoint(endpoint.url, "m").upsample("a dog")
    assert advice in str(caught.value)
    assert "because" in str(caught.value)


def test_a_redirect_is_not_followed(endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEY_VARIABLE, "sesame")
    endpoint.status, endpoint.headers = 302, {"location": f"{endpoint.url}/elsewhere"}
    with pytest.raises(WorldloomError, match="answered 302"):
        ChatEndpoint(endpoint.url, "m").upsample("a dog")
    assert len(endpoint.asked) == 1


def test_no_answer_in_time_is_an_error(endpoint: Endpoint) -> None:
    endpoint.delay = 0.6
    started = time.monotonic()
    with pytest.raises(WorldloomError, match=r"no answer within 0\.1 s"):
        ChatEndpoint(endpoint.url, "m", timeout=0.1).upsample("a dog")
    assert time.monotonic() - started < 0.5


def test_too_long_an_answer_is_not_read_to_the_end(endpoint: Endpoint) -> None:
    endpoint.body = b" " * (2 << 20)
    with pytest.raises(WorldloomError, match="too long"):
        ChatEndpoint(endpoint.url, "m").upsample("a dog")


def test_nobody_there_is_an_error() -> None:
    with pytest.raises(WorldloomError, match="cannot be reached"):
        ChatEndpoint("http://127.0.0.1:9/v1", "m").upsample("a dog")


@pytest.mark.parametrize("url", ["127.0.0.1:8080", "ftp://x/v1", "http://", "file:///etc/passwd"])
def test_what_is_no_address_is_refused(url: str) -> None:
    with pytest.raises(WorldloomError, match="no address of an endpoint"):
        ChatEndpoint(url, "m")


@pytest.mark.parametrize("url", ["https://user:pass@host/v1", "https://host/v1?key=1"])
def test_secrets_in_an_address_are_refused_and_not_repeated(url: str) -> None:
    with pytest.raises(WorldloomError, match="no user, password or query") as caught:
        ChatEndpoint(url, "m")
    assert "pass@" not in str(caught.value)


def test_a_key_does_not_travel_in_the_clear() -> None:
    with pytest.raises(WorldloomError, match="unencrypted"):
        ChatEndpoint("http://models.example/v1", "m", key="sesame")
    ChatEndpoint("https://models.example/v1", "m", key="sesame")
    ChatEndpoint("http://[::1]:80/v1", "m", key="sesame")


def test_a_local_model_is_shown_the_start() -> None:
    class Writer:
        def answer(self, video: torch.Tensor, question: str) -> str:
            return f"{tuple(video.shape)} {question.rpartition(': ')[2]}"

    upsampler = LocalUpsampler(Writer(), "writer")
    assert upsampler.upsample("a dog", torch.zeros(1, 3, 5, 32, 32)) == "(1, 3, 5, 32, 32) a dog"
    assert upsampler.upsample("a dog") == "(1, 3, 1, 64, 64) a dog"
    assert upsampler.identity()["model"] == "writer"
