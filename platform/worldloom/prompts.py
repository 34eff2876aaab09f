"""Prompt upsampling: a short prompt is rewritten as the long description that video models are trained on.

By an endpoint that speaks OpenAI's chat completions (vLLM, llama.cpp, Ollama and most hosted models do), or by a local
model that `Answers`. What was asked and what the model was given are both in the sample's sidecar.
"""

from __future__ import annotations

import hashlib
import ipaddress
import json
import os
import re
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from worldloom.errors import WorldloomError
from worldloom.protocols import Answers

if TYPE_CHECKING:
    from torch import Tensor

KEY_VARIABLE = "WORLDLOOM_UPSAMPLE_KEY"
"""Environment variable of the endpoint's key, where it wants one."""

INSTRUCTION = """\
You write prompts for a video model. Rewrite the user's prompt as one paragraph of 80 to 150 words that describes the \
video: who or what is in it, where, what happens from first to last, how things move and touch, the light, and where \
the camera is and how it moves. Keep everything the prompt says, its numbers, colours and directions too, and add only \
what fits it and obeys physics. Plain present tense. No title, no list, no remark about the task: answer with the \
paragraph alone."""

_MOST = 1 << 20  # bytes of an answer
_LONGEST = 8000  # characters of a rewritten prompt


class ChatEndpoint:
    """Rewrites prompts by ``POST <url>/chat/completions``. Implements `Upsamples`.

    Args:
        url: the API's base, e.g. ``http://127.0.0.1:8080/v1``, or the whole address of its chat completions.
        model: the model's name there.
        timeout: seconds without an answer after which it is given up.
        key: sent as ``Authorization: Bearer``; None takes `KEY_VARIABLE`. Over plain http it goes to this machine only.

    Raises:
        WorldloomError: no http or https address, or a key that would travel in the clear.
    """

    def __init__(self, url: str, model: str, *, timeout: float = 60.0, key: str | None = None) -> None:
        parts = urllib.parse.urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise WorldloomError(
                "this is no address of an endpoint", got=url, do="give one such as http://127.0.0.1:8080/v1"
            )
        if parts.username or parts.password or parts.query or parts.fragment:
            # They would be recorded in every sidecar.
            raise WorldloomError(
                "an endpoint's address holds no user, password or query", do=f"set {KEY_VARIABLE} to its key"
            )
        self._key = os.environ.get(KEY_VARIABLE, "") if key is None else key
        if self._key and parts.scheme == "http" and not _loopback(parts.hostname):
            raise WorldloomError("the key would be sent unencrypted", got=url, do=f"use https, or unset {KEY_VARIABLE}")
        path = parts.path.rstrip("/")
        path = path if path.endswith("/chat/completions") else f"{path}/chat/completions"
        self.url = urllib.parse.urlunsplit((parts.scheme, parts.netloc, path, "", ""))
        self.model, self.timeout = model, timeout

    def identity(self) -> Mapping[str, Any]:
        """Address, model and a digest of the instruction. No key."""
        return {"endpoint": self.url, "model": self.model, "instruction": _digest(INSTRUCTION)}

    def upsample(self, prompt: str, start: Tensor | None = None) -> str:
        """The rewritten prompt; the start is not sent.

        Raises:
            WorldloomError: no connection, no answer in time, an HTTP error, or an answer without text.
        """
        return self.chat([{"role": "system", "content": INSTRUCTION}, {"role": "user", "content": prompt}])

    def chat(self, messages: Sequence[Mapping[str, Any]], **options: Any) -> str:
        """The answer to a conversation, as one paragraph.

        Args:
            messages: as the API takes them: ``role``, and ``content`` as a text or a list of parts.
            options: further fields of the request, e.g. ``max_tokens``.

        Raises:
            WorldloomError: as `upsample`.
        """
        request = {"model": self.model, "messages": list(messages), "temperature": 0, "seed": 0, **options}
        body = json.dumps(request).encode()
        headers = {"Content-Type": "application/json", "User-Agent": "worldloom"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        answer = self._post(urllib.request.Request(self.url, body, headers, method="POST"))
        try:
            text = json.loads(answer)["choices"][0]["message"]["content"]
        except (ValueError, KeyError, IndexError, TypeError) as error:
            raise WorldloomError(
                "the endpoint's answer is not a chat completion",
                got=answer[:200].decode(errors="replace"),
                do="give the address of an OpenAI-compatible API, e.g. http://127.0.0.1:8080/v1",
            ) from error
        return _cleaned(text)

    def _post(self, request: urllib.request.Request) -> bytes:
        try:
            with _OPENER.open(request, timeout=self.timeout) as response:
                data = response.read(_MOST + 1)
        except urllib.error.HTTPError as error:
            with error:
                said = error.read(400).decode(errors="replace").strip()
            do = {
                401: f"set {KEY_VARIABLE} to the endpoint's key",
                403: f"set {KEY_VARIABLE} to a key that may use this model",
                404: "check the address and --upsample-model",
                429: "wait: the endpoint takes no more requests now",
            }.get(error.code, "look into the endpoint's log")
            raise WorldloomError(
                f"the prompt endpoint answered {error.code} {error.reason}", got=said or self.url, do=do
            ) from error
        except (OSError, ValueError) as error:  # URLError, time-outs and broken connections are OSErrors
            slow = isinstance(error, TimeoutError) or isinstance(getattr(error, "reason", None), TimeoutError)
            what = f"gave no answer within {self.timeout:g} s" if slow else f"cannot be reached: {error}"
            raise WorldloomError(
                f"the prompt endpoint {what}", got=self.url, do="check that it runs, or leave --upsample out"
            ) from error
        if len(data) > _MOST:
            raise WorldloomError("the prompt endpoint's answer is too long", got=f"more than {_MOST} bytes")
        return data


class LocalUpsampler:
    """Rewrites prompts by a model on this machine. Implements `Upsamples`.

    Args:
        model: answers questions about a video; it is shown what the video begins with, or a grey picture.
        name: what it is called, recorded with every sample.
    """

    def __init__(self, model: Answers, name: str) -> None:
        self.model, self.name = model, name

    def identity(self) -> Mapping[str, Any]:
        """Name and a digest of the instruction."""
        return {"model": self.name, "instruction": _digest(INSTRUCTION)}

    def upsample(self, prompt: str, start: Tensor | None = None) -> str:
        """The rewritten prompt.

        Raises:
            WorldloomError: the model's answer holds no text.
        """
        import torch

        shown = torch.zeros(1, 3, 1, 64, 64) if start is None else start
        return _cleaned(self.model.answer(shown, f"{INSTRUCTION}\n\nThe prompt: {prompt}"))


def _cleaned(text: object) -> str:
    """The paragraph of an answer: without thoughts, fences and quotation marks, in one line."""
    if not isinstance(text, str):
        raise WorldloomError("the rewritten prompt is no text", got=text, do="use another model for --upsample")
    paragraph = re.sub(r"<think>.*?(</think>|\Z)", "", text, flags=re.S)
    paragraph = re.sub(r"^```\w*\n|\n```$", "", paragraph.strip())
    paragraph = " ".join(paragraph.split()).strip("\"“”'` ")
    if not paragraph or len(paragraph) > _LONGEST:
        raise WorldloomError(
            f"the rewritten prompt is empty or longer than {_LONGEST} characters",
            got=repr(text[:200]),
            do="use another model for --upsample",
        )
    return paragraph


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """A redirect is an error: it would take the key to another host."""

    def redirect_request(self, *args: Any, **options: Any) -> None:
        return None


_OPENER = urllib.request.build_opener(_NoRedirects)
