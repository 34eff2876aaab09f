from __future__ import annotations

import base64
import io
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from worldloom import WorldloomError, charts
from worldloom.report import Report, png

VOID = {"meta", "img", "br", "link", "input", "hr"}
EVIL = "<script>alert(1)</script>&\"'"


class Page(HTMLParser):
    """Fails on a tag that is closed wrongly; keeps tags, attributes and text."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert self.open == [], f"left open: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("style", "script"):
            self.text += data

    def all(self, name: str) -> list[dict[str, str | None]]:
        return [attributes for tag, attributes in self.tags if tag == name]


def mp4(width: int, height: int) -> bytes:
    import av

    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=5)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for level in (0, 128, 255):
            frame = av.VideoFrame.from_ndarray(np.full((height, width, 3), level, np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return buffer.getvalue()


def everything() -> Report:
    report = Report(EVIL, EVIL).section(EVIL).text(EVIL).facts({EVIL: EVIL}).table([EVIL], [[EVIL]], EVIL)
    report.line_chart(EVIL, {EVIL: [(0, 1), (1, 2)]}, EVIL, EVIL).histogram(EVIL, [1, 2, 3], 2)
    return report.image(np.zeros((4, 4, 3), np.uint8), EVIL).videos([(EVIL, b"")])


def test_every_string_is_escaped_and_every_tag_closed() -> None:
    page = Page(everything().html())
    [script] = page.all("script")  # the page's own
    assert script == {}
    assert page.text.count(EVIL) == 19
    assert {attributes["alt"] for attributes in page.all("img")} == {EVIL}
    assert {attributes["aria-label"] for attributes in page.all("video")} == {EVIL}


def test_nothing_is_fetched() -> None:
    page = Page(everything().html())
    for _, attributes in page.tags:
        for name in ("src", "href", "action", "data", "poster"):
            value = attributes.get(name)
            assert value is None or value.startswith(("data:", "#"))
    assert not page.all("link")
    assert "url(" not in everything().html()
    assert "@import" not in everything().html()
    [policy] = [meta["content"] for meta in page.all("meta") if "http-equiv" in meta]
    assert policy is not None
    assert policy.startswith("default-src 'none'")


def test_it_is_readable_in_the_dark_and_on_a_phone() -> None:
    page = Report("T").html()
    assert "prefers-color-scheme: dark" in page
    names = [meta.get("name") for meta in Page(page).all("meta")]
    assert {"viewport", "color-scheme"} <= set(names)
    light, dark = re.findall(r":root \{(.*?)\}", page, re.S)
    assert set(re.findall(r"--[\w-]+(?=:)", dark)) == set(re.findall(r"--[\w-]+(?=:)", light))
    used = set(re.findall(r"var\((--[\w-]+)\)", page)) - {"--columns"}
    assert used <= set(re.findall(r"--[\w-]+(?=:)", light))


def test_sections_make_a_table_of_contents_from_three_on() -> None:
    two, three = Report("T"), Report("T")
    for name in ("one", "two"):
        two.section(name)
        three.section(name)
    three.section("three")
    assert not Page(two.html()).all("nav")
    page = Page(three.html())
    links = [(link["href"] or "").removeprefix("#") for link in page.all("a")]
    assert links == [heading["id"] for heading in page.all("h2")]
    assert len(links) == 3


def test_text_is_a_small_markdown() -> None:
    text = (
        "First **bold** and `a < b`\nsecond line\n\n- one\n- two **2**\n\n```sh\nworldloom **doctor**\n```\nAfter 2*3"
    )
    page = Report("T").text(text).html()
    assert "<p>First <strong>bold</strong> and <code>a &lt; b</code><br>second line</p>" in page
    assert "<ul><li>one</li><li>two <strong>2</strong></li></ul>" in page
    assert '<pre class="scroll"><code>worldloom **doctor**\n</code></pre>' in page
    assert "<p>After 2*3</p>" in page
    Page(page)


def test_table_cells() -> None:
    columns = ["name", "psnr", "clips", "ok", "mixed"]
    rows = [["a", 27.123456, 12345, True, 1], ["b", np.float32(-0.5), None, False, "x"], ["c", math.nan, 3, None, 2.0]]
    page = Report("T").table(columns, rows, "Caption").html()
    cells = re.findall(r"<td(.*?)>(.*?)</td>", page)
    assert [text for _, text in cells] == [
        *("a", "27.12", "12\u202f345", "yes", "1"),
        *("b", "\u22120.5", "–", "no", "x"),
        *("c", "nan", "3", "–", "2"),
    ]
    assert [bool(mark) for mark, _ in cells[:5]] == [False, True, True, False, False]
    with pytest.raises(WorldloomError, match="wrong length"):
        Report("T").table(["a", "b"], [[1]])


def test_videos_are_embedded_and_small_ones_stay_sharp() -> None:
    small, large = mp4(64, 48), mp4(160, 96)
    page = Page(
        Report("T").videos([("small", small), ("large", large), ("not a video", b"\x00" * 99)], columns=3).html()
    )
    first, second, third = page.all("video")
    assert (first["width"], first["height"], first["class"]) == ("64", "48", "pixelated")
    assert (second["width"], second["height"]) == ("160", "96")
    assert "class" not in second
    assert "width" not in third
    assert {"autoplay", "loop", "muted", "playsinline"} <= set(first)
    prefix, _, data = (first["src"] or "").partition(",")
    assert prefix == "data:video/mp4;base64"
    assert base64.b64decode(data) == small
    assert any(div.get("style") == "--columns:3" for div in page.all("div"))


def box(kind: bytes, *parts: bytes) -> bytes:
    body = b"".join(parts)
    return (len(body) + 8).to_bytes(4, "big") + kind + body


def test_the_size_is_that_of_the_first_track_that_has_one() -> None:
    def track(width: int, height: int) -> bytes:
        return box(
            b"trak", box(b"tkhd", bytes(76), (width << 16).to_bytes(4, "big"), (height << 16).to_bytes(4, "big"))
        )

    video = box(b"moov", track(0, 0), track(320, 240))  # sound first
    [tag] = Page(Report("T").videos([("x", video)]).html()).all("video")
    assert (tag["width"], tag["height"]) == ("320", "240")


def test_a_box_that_claims_no_length_ends_the_search() -> None:
    stuck = (1).to_bytes(4, "big") + b"free" + bytes(8) + box(b"moov")  # a 64-bit size of 0
    Page(Report("T").videos([("x", stuck)]).html())


@given(st.binary(max_size=200), st.booleans())
def test_any_bytes_may_be_called_a_video(data: bytes, as_boxes: bool) -> None:
    if as_boxes:
        for name in (b"tkhd", b"trak", b"moov"):
            data = (len(data) + 8).to_bytes(4, "big") + name + data
    Page(Report("T").videos([("x", data)]).html())


def test_png_is_read_back_by_another_library() -> None:
    from PIL import Image

    frame = np.random.default_rng(0).integers(0, 256, (37, 53, 3), np.uint8)
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(png(frame)))), frame)
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(png(frame[:, ::-1])))), frame[:, ::-1])


@pytest.mark.parametrize("frame", [np.zeros((4, 4), np.uint8), np.zeros((4, 4, 3)), np.zeros((0, 4, 3), np.uint8)])
def test_what_is_no_frame_is_refused(frame: np.ndarray) -> None:
    with pytest.raises(WorldloomError, match="uint8"):
        png(frame)


def test_pictures() -> None:
    page = Page(Report("T").image(np.zeros((40, 60, 3), np.uint8), "small").image(b"\xff\xd8\xff\xe0", "jpeg").html())
    small, jpeg = page.all("img")
    assert small["class"] == "pixelated"
    assert (jpeg["src"] or "").startswith("data:image/jpeg;base64,")
    with pytest.raises(WorldloomError, match="PNG, JPEG or GIF"):
        Report("T").image(b"<svg/>")


def test_a_line_chart_draws_each_series_inside_its_frame() -> None:
    drawing = charts.line_chart(
        "Loss", {"train": [(i, 1 / (i + 1)) for i in range(30)], "val": [(0, 1), (29, 0.1)]}, "s", "l"
    )
    lines = re.findall(r'<polyline class="line (s\d)" points="([^"]*)"', drawing)
    assert [name for name, _ in lines] == ["s0", "s1"]
    points = [tuple(map(float, pair.split(","))) for pair in lines[0][1].split()]
    assert len(points) == 30
    xs, ys = [x for x, _ in points], [y for _, y in points]
    assert xs == sorted(xs)
    assert ys == sorted(ys)  # the loss falls, and pixels count downwards
    assert (min(xs), max(xs)) == (64.0, 704.0)
    assert min(ys) > 12
    assert max(ys) < 254
    assert drawing.count("<circle") == 32
    assert "train" in drawing
    assert "val" in drawing


def test_a_gap_breaks_the_line() -> None:
    drawing = charts.line_chart("x", {"a": [(0, 1), (1, 2), (2, math.nan), (3, 4), (4, math.inf), (5, 1)]}, "", "")
    assert [len(points.split()) for points in re.findall(r'points="([^"]*)"', drawing)] == [2, 1, 1]


def test_a_long_line_is_thinned_and_keeps_its_spikes() -> None:
    line = [(float(i), 0.0) for i in range(100_000)]
    line[54_321] = (54_321.0, 7.0)
    drawing = charts.line_chart("x", {"a": line}, "", "")
    [points] = re.findall(r'points="([^"]*)"', drawing)
    assert len(points.split()) <= 2000
    heights = {pair.split(",")[1] for pair in points.split()}
    assert len(heights) == 2  # the floor and the spike


@pytest.mark.parametrize("values", [[], [math.nan]])
def test_a_chart_of_nothing_says_so(values: list[float]) -> None:
    assert "no data" in charts.line_chart("x", {"a": [(0.0, value) for value in values]}, "", "")
    assert "no data" in charts.histogram("x", values, 1.0)


def test_a_histogram_counts_what_the_threshold_drops() -> None:
    drawing = charts.histogram("motion", [0.1] * 3 + [0.5] * 6 + [0.9], threshold=0.3)
    assert "3 below 0.3" in drawing
    assert "7 kept" in drawing
    heights = dict.fromkeys(("dropped", "kept"), 0.0)
    for mark, height in re.findall(r'<rect class="bar (\w+)"[^>]* height="([\d.]+)"', drawing):
        heights[mark] += float(height)
    assert heights["kept"] / heights["dropped"] == pytest.approx(7 / 3, rel=0.01)


@given(st.lists(st.floats(-1e30, 1e30), min_size=1, max_size=50), st.none() | st.floats(-1e30, 1e30))
def test_any_values_can_be_drawn(values: list[float], threshold: float | None) -> None:
    drawing = charts.histogram("x", values, threshold) + charts.line_chart("x", {"a": list(enumerate(values))}, "", "")
    Page(drawing)
    assert "nan" not in drawing
    for height in re.findall(r' height="(-?[\d.]+)"', drawing):
        assert 0 <= float(height) <= 300
    for x, y in re.findall(r' c?x="([^"]+)" c?y="([^"]+)"', drawing):
        assert -1 <= float(x) <= 721
        assert -1 <= float(y) <= 301


@given(st.floats(-1e9, 1e9), st.floats(1e-6, 1e9))
def test_ticks_are_few_round_and_inside(low: float, length: float) -> None:
    high = low + length
    if high - low < 1e-9 * max(abs(low), abs(high)):
        return
    ticks = charts.ticks(low, high)
    slack = 1e-6 * (high - low)
    assert 2 <= len(ticks) <= 8
    assert all(low - slack <= tick <= high + slack for tick in ticks)
    step = (ticks[-1] - ticks[0]) / (len(ticks) - 1)
    digits = step / 10 ** math.floor(math.log10(step * 1.0001))
    assert min(abs(digits - factor) for factor in (1, 2, 5)) < 1e-3


@pytest.mark.parametrize(("high", "expected"), [(1.05, [0, 1]), (3.15, [0, 1, 2, 3]), (42, [0, 10, 20, 30, 40])])
def test_counts_have_whole_ticks(high: float, expected: list[float]) -> None:
    assert charts.ticks(0, high, whole=True) == expected
    assert charts.histogram("x", [1.0] * int(high), None).count('text-anchor="end"') == len(expected)


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0"), (0.1 + 0.2, "0.3"), (-1.5, "\u22121.5"), (20000.0, "20000"), (250000.0, "250k"), (3e-5, "3e\u221205")],
)
def test_tick_labels(value: float, text: str) -> None:
    assert charts.number(value) == text


def test_save_is_whole_and_repeatable(tmp_path: Path) -> None:
    path = everything().save(tmp_path / "deep" / "report.html")
    assert path.read_text(encoding="utf-8") == everything().html()
    assert [item.name for item in path.parent.iterdir()] == ["report.html"]
