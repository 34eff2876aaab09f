"""Self-contained HTML reports: one file, no script or font from elsewhere, light and dark.

Videos and pictures are embedded as data URLs and charts as SVG, so that a report can be mailed, archived and opened
offline. Every string a caller gives is escaped.
"""

from __future__ import annotations

import base64
import html
import math
import re
import struct
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from worldloom.artifacts import atomic_write, code_version
from worldloom.charts import histogram, line_chart
from worldloom.errors import WorldloomError

if TYPE_CHECKING:
    import numpy as np

_PIXELATED_BELOW = 128
"""Videos and pictures narrower than this (pixels) are magnified without smoothing."""

_STYLE = (Path(__file__).parent / "report.css").read_text(encoding="utf-8")

_SCRIPT = """
const still = matchMedia("(prefers-reduced-motion: reduce)").matches;
for (const video of document.querySelectorAll("video")) {
  if (still) { video.removeAttribute("autoplay"); video.pause(); }
  video.addEventListener("click", () => video.paused ? video.play() : video.pause());
}
"""

# Nothing may be fetched: a report is as safe to open as the text in it.
_POLICY = "default-src 'none'; img-src data:; media-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"


class Report:
    """Builds a report top to bottom; each method adds one block and returns the report.

    Args:
        title: the heading, also the page's title.
        subtitle: a line under it.
    """

    def __init__(self, title: str, subtitle: str = "") -> None:
        self.title, self.subtitle = title, subtitle
        self._blocks: list[str] = []
        self._sections: list[tuple[str, str]] = []

    def section(self, title: str) -> Report:
        """Start a section; three or more give the report a table of contents."""
        anchor = f"section-{len(self._sections) + 1}"
        self._sections.append((anchor, title))
        return self._add(f'<h2 id="{anchor}">{html.escape(title)}</h2>')

    def text(self, text: str) -> Report:
        """Paragraphs, ``- `` lists, ``**bold**``, `` `code` `` and fenced code; anything else is shown as it is."""
        return self._add(_markdown(text))

    def facts(self, facts: Mapping[str, object]) -> Report:
        """The few figures that matter, large: label -> value."""
        tiles = "".join(
            f"<div><dt>{html.escape(label)}</dt><dd>{_cell(value)}</dd></div>" for label, value in facts.items()
        )
        return self._add(f'<dl class="facts">{tiles}</dl>')

    def table(self, columns: Sequence[str], rows: Sequence[Sequence[object]], caption: str = "") -> Report:
        """A table; columns of numbers are aligned right, None is a dash, floats get four significant digits.

        Raises:
            WorldloomError: a row whose length is not that of `columns`.
        """
        for row in rows:
            if len(row) != len(columns):
                raise WorldloomError(
                    "a table row has the wrong length", got=list(row), do=f"give {len(columns)} cells: {list(columns)}"
                )
        numeric = [_is_numeric([row[i] for row in rows]) for i in range(len(columns))]
        marks = [' class="number"' if flag else "" for flag in numeric]
        head = "".join(
            f'<th scope="col"{mark}>{html.escape(str(name))}</th>' for name, mark in zip(columns, marks, strict=True)
        )
        body = "\n".join(
            "<tr>" + "".join(f"<td{mark}>{_cell(cell)}</td>" for cell, mark in zip(row, marks, strict=True)) + "</tr>"
            for row in rows
        )
        title = f"<caption>{html.escape(caption)}</caption>" if caption else ""
        return self._add(
            f'<div class="scroll"><table>{title}<thead><tr>{head}</tr></thead><tbody>\n{body}\n</tbody></table></div>'
        )

    def videos(self, videos: Sequence[tuple[str, bytes]], columns: int = 4) -> Report:
        """A grid of looping, silent videos: ``(caption, mp4 bytes)``; fewer columns on a narrow screen."""
        figures = "\n".join(self._video(caption, data) for caption, data in videos)
        return self._add(f'<div class="grid" style="--columns:{max(1, int(columns))}">\n{figures}\n</div>')

    @staticmethod
    def _video(caption: str, data: bytes) -> str:
        size = _mp4_size(data)
        shape = f' width="{size[0]}" height="{size[1]}"' if size else ""
        pixelated = ' class="pixelated"' if size and size[0] < _PIXELATED_BELOW else ""
        source = f"data:video/mp4;base64,{base64.b64encode(data).decode()}"
        label = html.escape(caption, quote=True)
        return (
            f'<figure><video{pixelated}{shape} autoplay loop muted playsinline aria-label="{label}" src="{source}">'
            "</video>"
            f"<figcaption>{html.escape(caption)}</figcaption></figure>"
        )

    def image(self, image: bytes | np.ndarray, caption: str = "") -> Report:
        """A picture: PNG, JPEG or GIF bytes, or a uint8 frame ``(h, w, 3)``.

        Raises:
            WorldloomError: bytes of another format, or an array that is no frame.
        """
        data = image if isinstance(image, bytes) else png(image)
        kinds = {b"\x89PNG": "png", b"\xff\xd8\xff": "jpeg", b"GIF8": "gif"}
        kind = next((kinds[magic] for magic in kinds if data.startswith(magic)), None)
        if kind is None:
            raise WorldloomError(
                "a picture must be PNG, JPEG or GIF", got=data[:8], do="encode it first, or pass a frame"
            )
        narrow = kind == "png" and struct.unpack(">I", data[16:20])[0] < _PIXELATED_BELOW
        source = f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
        mark = ' class="pixelated"' if narrow else ""
        return self._figure(f'<img{mark} alt="{html.escape(caption, quote=True)}" src="{source}">', caption)

    def line_chart(
        self,
        title: str,
        series: Mapping[str, Sequence[tuple[float, float]]],
        x_label: str = "",
        y_label: str = "",
    ) -> Report:
        """Lines over a shared axis: name -> ``[(x, y), ...]``. A y that is not finite breaks its line."""
        return self._figure(line_chart(title, series, x_label, y_label), "", "chart")

    def histogram(self, title: str, values: Sequence[float], threshold: float | None = None) -> Report:
        """How values are spread; bars below the threshold are shown as dropped, and counted."""
        return self._figure(histogram(title, values, threshold), "", "chart")

    def _figure(self, inner: str, caption: str, kind: str = "picture") -> Report:
        below = f"<figcaption>{html.escape(caption)}</figcaption>" if caption else ""
        return self._add(f'<figure class="{kind}">{inner}{below}</figure>')

    def _add(self, block: str) -> Report:
        self._blocks.append(block)
        return self

    def html(self) -> str:
        """The whole page."""
        subtitle = f'<p class="subtitle">{html.escape(self.subtitle)}</p>' if self.subtitle else ""
        links = "".join(f'<a href="#{anchor}">{html.escape(title)}</a>' for anchor, title in self._sections)
        contents = f'<nav aria-label="Contents">{links}</nav>' if len(self._sections) >= 3 else ""
        title = html.escape(self.title)
        body = "\n".join(self._blocks)
        return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="{_POLICY}">
<title>{title}</title>
<style>
{_STYLE}</style>
</head>
<body>
<main>
<header><h1>{title}</h1>{subtitle}{contents}</header>
{body}
<footer>Made by {html.escape(code_version())}</footer>
</main>
<script>{_SCRIPT}</script>
</body>
</html>
"""

    def save(self, path: str | Path) -> Path:
        """Write the page, atomically; returns its path."""
        atomic_write(path, self.html())
        return Path(path)


def _is_numeric(cells: Sequence[object]) -> bool:
    held = [cell for cell in cells if cell is not None]
    return bool(held) and all(_number(cell) is not None for cell in held)


def _number(cell: object) -> float | int | None:
    """A Python or numpy number as a Python one; None for anything else (booleans are not numbers here)."""
    if hasattr(cell, "item") and getattr(cell, "shape", None) == ():
        cell = cell.item()  # pyright: ignore[reportAttributeAccessIssue] - a numpy or torch scalar
    return cell if isinstance(cell, (int, float)) and not isinstance(cell, bool) else None


def _cell(cell: object) -> str:
    number = _number(cell)
    if cell is None:
        return "–"
    if isinstance(cell, bool):
        return "yes" if cell else "no"
    if isinstance(number, int):
        return f"{number:,}".replace(",", "\u202f")
    if number is not None:
        return f"{number:.4g}".replace("-", "\u2212") if math.isfinite(number) else str(number)
    return _inline(str(cell))


def _inline(text: str) -> str:
    """`code` and **bold** inside escaped text."""
    text = re.sub(r"`([^`]+)`", r"<code>\1</code>", html.escape(text))
    return re.sub(r"\*\*([^*]+)\*\*", r"<strong>\1</strong>", text)


def _markdown(text: str) -> str:
    blocks: list[str] = []
    for i, part in enumerate(re.split(r"^```[^\n]*\n(.*?)^```[ \t]*$", text.strip(), flags=re.M | re.S)):
        if i % 2:  # between fences
            blocks.append(f'<pre class="scroll"><code>{html.escape(part)}</code></pre>')
            continue
        for block in re.split(r"\n\s*\n", part):
            lines = block.strip().splitlines()
            if lines and all(line.startswith("- ") for line in lines):
                items = "".join(f"<li>{_inline(line[2:])}</li>" for line in lines)
                blocks.append(f"<ul>{items}</ul>")
            elif lines:
                blocks.append(f"<p>{'<br>'.join(map(_inline, lines))}</p>")
    return "\n".join(blocks)


def png(frame: np.ndarray) -> bytes:
    """A uint8 frame ``(h, w, 3)`` as PNG bytes (RFC 2083), with the standard library alone.

    Raises:
        WorldloomError: another shape or dtype.
    """
    if getattr(frame, "ndim", 0) != 3 or frame.shape[2] != 3 or str(frame.dtype) != "uint8" or 0 in frame.shape:
        given = f"{getattr(frame, 'dtype', type(frame).__name__)} {getattr(frame, 'shape', '')}"
        raise WorldloomError(
            "a frame must be uint8 (h, w, 3)", got=given, do="convert it with worldloom.media.to_frames"
        )
    height, width, _ = frame.shape
    # Each row begins with its filter type: 0, none.
    rows = b"".join(b"\x00" + row.tobytes() for row in frame)

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)  # 8 bits a channel, colour type 2: RGB
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows, 6)) + chunk(b"IEND", b"")


def _mp4_size(data: bytes) -> tuple[int, int] | None:
    """Width and height from the first track header that has any (ISO 14496-12, 8.3.2); None if there is none."""
    for moov in _boxes(data, b"moov"):
        for track in _boxes(moov, b"trak"):
            for header in _boxes(track, b"tkhd"):
                width, height = (value >> 16 for value in struct.unpack(">II", header[-8:]))  # 16.16 fixed point
                if width and height:
                    return width, height
    return None


def _boxes(data: bytes, kind: bytes) -> list[bytes]:
    """The bodies of the boxes of one kind at the top level of `data`."""
    found: list[bytes] = []
    at = 0
    while at + 8 <= len(data):
        size, name = struct.unpack(">I4s", data[at : at + 8])
        body = 8
        if size == 1 and at + 16 <= len(data):  # a 64-bit size follows
            size, body = struct.unpack(">Q", data[at + 8 : at + 16])[0], 16
        elif size == 0:  # to the end of the file
            size = len(data) - at
        if size < body:
            break
        if name == kind:
            found.append(data[at + body : at + size])
        at += size
    return [box for box in found if len(box) >= 8]
