"""Caption windows: a model describes every window of a clip, through an endpoint that speaks OpenAI's chat completions.

A window has 256 frames of the clip, as in cosmos-curate; a remainder of at least half of that is a window of its own,
and a shorter one belongs to the window before it. Frames are taken `rate` times a second, and sent as JPEG pictures in
one message. The captions are in the clip's metadata (``windows``); the clip's own caption is the first window's.

vLLM, llama.cpp, Ollama and most hosted vision models take such messages. The spans come from the stages before, so that
only what is kept is described; the pictures are read from the source again. An endpoint that fails fails the span: the
ledger says why, and the next run asks again.
"""

from __future__ import annotations

import base64
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from worldloom.errors import WorldloomError
from worldloom_curation.stage import Observer, Source, Span, Verdict
from worldloom_curation.stages.probe import sentence

if TYPE_CHECKING:
    from worldloom_curation.stage import Signals

KEY_VARIABLE = "WORLDLOOM_CAPTION_KEY"
"""Environment variable of the endpoint's key, where it wants one."""

WINDOW = 256
"""Frames of a window."""

INSTRUCTION = """\
These pictures are frames of a video, in order. Describe the video in one paragraph: who or what is in it, where, what \
happens from first to last, how things move and touch, the light, and how the camera moves. Say only what can be seen. \
Plain present tense. Answer with the paragraph alone."""


@dataclass(frozen=True)
class CaptionWindowsConfig:
    """Captions by a model."""

    endpoint: str = ""
    """The API's base, e.g. http://127.0.0.1:8000/v1. Needed."""
    model: str = ""
    """The model's name there. Needed."""
    prompt: str = INSTRUCTION
    """What the model is asked."""
    rate: float = 2.0
    """Frames a second that are sent."""
    most: int = 64
    """Most frames of one window; they are then spread over it."""
    side: int = 448
    """Short side of the pictures that are sent, in pixels; smaller ones are sent as they are."""
    tokens: int = 512
    """Longest answer."""
    timeout: float = 120.0
    """Seconds without an answer after which a window is given up."""
    overwrite: bool = False
    """Replace captions that stages before have given."""

    def __post_init__(self) -> None:
        if min(self.rate, self.most, self.side, self.tokens, self.timeout) <= 0:
            raise WorldloomError("caption_windows: rate, most, side, tokens and timeout are positive", got=self)


def windows(frames: int) -> list[tuple[int, int]]:
    """``[start, end)`` of the windows of a clip, which cover it."""
    starts = list(range(0, frames, WINDOW))
    if len(starts) > 1 and frames - starts[-1] < WINDOW // 2:
        starts.pop()
    return list(zip(starts, [*starts[1:], frames], strict=True))


def sampled(start: int, end: int, fps: float, rate: float, most: int) -> list[int]:
    """The frames of a window that are sent: `rate` a second, at most `most`, at least one, evenly spread."""
    count = min(most, max(1, math.ceil((end - start) / fps * rate)))
    return [start + int((end - start) * (i + 0.5) / count) for i in range(count)]


class CaptionWindowsStage:
    """Gives every span the captions of its windows.

    Raises:
        WorldloomError: no endpoint or model is set, or the address is none.
    """

    name = "caption_windows"
    version = 1
    scope: Literal["source", "run"] = "source"
    measured_with = ()
    Config = CaptionWindowsConfig

    def __init__(self, config: CaptionWindowsConfig) -> None:
        from worldloom.prompts import ChatEndpoint

        if not config.endpoint or not config.model:
            raise WorldloomError(
                "caption_windows needs an endpoint and a model",
                do="set caption_windows.endpoint and caption_windows.model, or leave the stage out",
            )
        key = os.environ.get(KEY_VARIABLE, "")
        self._endpoint = ChatEndpoint(config.endpoint, config.model, timeout=config.timeout, key=key)
        self.config = config

    def observer(self, source: Source, fps: float) -> Observer | None:
        return None

    def decide(self, spans: Sequence[Span], signals: Mapping[str, Signals]) -> list[Verdict]:
        return [self._verdict(span) for span in spans]

    def _verdict(self, span: Span) -> Verdict:
        if span.caption and not self.config.overwrite:
            return Verdict(span, True, reason="it has a caption")
        try:
            told = self._tell(span)
        except (WorldloomError, OSError) as error:
            return Verdict(span, False, reason=sentence(error, span.source.path, "the file"), failed=True)
        notes = {**span.notes, "windows": told, "caption_model": self.config.model}
        caption = str(told[0]["caption"])
        return Verdict(replace(span, caption=caption, notes=notes), True, reason=caption)

    def _tell(self, span: Span) -> list[dict[str, Any]]:
        """Start, end (exclusive) and caption of each window, in frames of the clip."""
        fps = span.fps / span.step
        wanted = {window: sampled(*window, fps, self.config.rate, self.config.most) for window in windows(span.frames)}
        frames = _frames(span, {frame for chosen in wanted.values() for frame in chosen}, self.config.side)
        return [
            {"start_frame": start, "end_frame": end, "caption": self._ask([frames[frame] for frame in chosen])}
            for (start, end), chosen in wanted.items()
        ]

    def _ask(self, pictures: Sequence[np.ndarray]) -> str:
        parts: list[dict[str, Any]] = [{"type": "image_url", "image_url": {"url": _url(p)}} for p in pictures]
        message = {"role": "user", "content": [*parts, {"type": "text", "text": self.config.prompt}]}
        return self._endpoint.chat([message], max_tokens=self.config.tokens)


def _frames(span: Span, wanted: set[int], side: int) -> dict[int, np.ndarray]:
    """Frames of a clip by their number in it, shrunk."""
    from worldloom import media
    from worldloom_curation.sources import load_episode

    source = span.source
    video: Any = load_episode(source).video if source.exact else source.path
    first = span.start + (source.window[0] if source.window else 0)
    last = first + span.end - span.start
    found = {
        number: media.shrink(frame, side)
        for number, frame in enumerate(media.iter_frames(video, first, last, stride=span.step))
        if number in wanted
    }
    if len(found) < len(wanted):
        raise WorldloomError("the source ended before the end of the clip", got=f"{len(found)} frames of {len(wanted)}")
    return found


def _url(picture: np.ndarray) -> str:
    """A data URL."""
    from worldloom_curation import pictures

    cv2 = pictures.opencv()
    _, data = cv2.imencode(".jpg", np.ascontiguousarray(picture[..., ::-1]), [cv2.IMWRITE_JPEG_QUALITY, 90])
    return f"data:image/jpeg;base64,{base64.b64encode(data.tobytes()).decode()}"
