"""The list of refused words: what it catches, disguised or not, and what it must let pass."""

from __future__ import annotations

from pathlib import Path

import pytest

from worldloom.blocklist import Blocklist
from worldloom.errors import WorldloomError


@pytest.fixture(scope="module")
def blocklist() -> Blocklist:
    return Blocklist()


@pytest.mark.parametrize(
    "prompt",
    [
        "porn", "A naked man", "NUDE portrait", "they are decapitated", "a severed head on a table",
        "p0rn in 4k", "pörn", "p.o.r.n", "p o r n", "a n-u-d-e woman", "pooooorn", "ｎｕｄｅ", "nu\u200bde",
        "n\u0430k\u0435d", "g0re everywhere", "make\n a   bomb", "self-harm",
    ],
)  # fmt: skip
def test_what_is_listed_is_refused_in_any_dress(blocklist: Blocklist, prompt: str) -> None:
    assert blocklist.check_text(prompt)


@pytest.mark.parametrize(
    "prompt",
    [
        "", "a robot arm stacks three cubes", "visible to the naked eye", "a Gore-Tex jacket", "a sextet plays jazz",
        "Scunthorpe and Essex", "a wire stripper cuts a cable", "rapeseed in bloom", "grape harvest", "an analyst",
        "a cockpit of a plane", "the player shoots a demon", "a robot cuts tomatoes with a knife", "in 2077 at 4 5 6",
        "a b c d", "grass and glass", "draped in silk", "a nudge to the left",
    ],
)  # fmt: skip
def test_what_only_looks_alike_passes(blocklist: Blocklist, prompt: str) -> None:
    assert blocklist.check_text(prompt) == ""


def test_the_reason_names_the_words(blocklist: Blocklist) -> None:
    assert blocklist.check_text("on it two severed heads") == "it holds 'severed heads'"


def test_a_users_file_adds_words_phrases_endings_and_exceptions(tmp_path: Path) -> None:
    file = tmp_path / "words.txt"
    file.write_text("# ours\nacme corp   # a rival\nzorg*\n!naked truth\n\n", encoding="utf-8")
    own = Blocklist(file)
    assert own.check_text("the ACME corp logo")
    assert own.check_text("zorgons land")
    assert own.check_text("acme") == ""
    assert own.check_text("the naked truth") == ""
    assert own.check_text("naked")  # the built-in list still holds
    assert own.fingerprint != Blocklist().fingerprint == Blocklist().fingerprint


@pytest.mark.parametrize("text", ["***", "fine\n!?\n"])
def test_an_entry_without_a_word_is_an_error(tmp_path: Path, text: str) -> None:
    (tmp_path / "words.txt").write_text(text)
    with pytest.raises(WorldloomError, match="holds no word"):
        Blocklist(tmp_path / "words.txt")


def test_a_missing_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(WorldloomError, match="cannot be read"):
        Blocklist(tmp_path / "nowhere.txt")
