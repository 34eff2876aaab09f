"""A list of words and phrases that a prompt may not hold, and the matching that sees through the usual disguises.

The list is short and of our own making. It names the plainly explicit: it is a fence, not a judge, and it knows
English only. A user's file adds to it, one entry a line::

    # a comment
    some phrase          words in a row
    decapitat*           every word that begins like that
    !naked eye           an exception: these words in a row are let pass
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Iterable
from pathlib import Path

from worldloom.errors import WorldloomError

WORDS = """
sex* nude nudes nudity nudist* naked topless striptease
porn* pornstar hentai erotic* erotica fetish* bdsm orgy orgies orgasm* masturbat* blowjob handjob cumshot creampie
penis penises vagina vaginas genital genitals genitalia nipple nipples dildo dildos gangbang threesome prostitut* whore
rape raped rapes raping rapist rapists molest* incest bestiality necrophil* pedophil* paedophil* lolicon shotacon
gore gory behead* decapitat* dismember* disembowel* eviscerat* mutilat* bloodbath lynching lynched tortur* genocid*
massacr* cannibal* suicid* selfharm swastika* nazi nazis
"""
"""Single words; a star stands for any ending."""

PHRASES = """
child abuse; child pornography; self harm; cut my wrists; slit his throat; slit her throat; severed head; severed limbs;
snuff film; school shooting; mass shooting; pipe bomb; car bomb; make a bomb; build a bomb; bomb vest; heil hitler;
white power; white supremac*; ku klux klan; ethnic cleansing; public execution; burned alive; blood and guts
"""
"""Words in a row."""

EXCEPTIONS = """
naked eye; naked mole; sexton; sextons; sextant; sextants; sextet; sextets; gore tex; same sex
"""
"""What the list above would catch without meaning it."""

_LOOKALIKES = str.maketrans(
    dict(zip("0134579@$!|", "oieastgasil", strict=True))  # digits and signs
    | dict(zip("аеорсухіјѕ", "aeopcyxijs", strict=True))  # Cyrillic
)
_SPELLED = re.compile(r"(?<![^\W_])(?:[^\W_](?:[^\w\s]{1,2}|_|\s)){2,}[^\W_](?![^\W_])")  # p.o.r.n, n u d e
_WORD = re.compile(r"[^\W_]+")


class Blocklist:
    """The built-in list and a user's file.

    Args:
        path: the file, in the format above.

    Raises:
        WorldloomError: it cannot be read, or an entry of it holds no word.
    """

    def __init__(self, path: str | Path | None = None) -> None:
        blocked = [*WORDS.split(), *_phrases(PHRASES)]
        allowed = [*_phrases(EXCEPTIONS)]
        for entry in [] if path is None else _read(Path(path)):
            (allowed if entry.startswith("!") else blocked).append(entry.removeprefix("!"))
        self._blocked, self._allowed = _patterns(blocked), _patterns(allowed)
        text = "\n".join(["2", *blocked, "", *allowed])
        self._fingerprint = hashlib.sha256(text.encode()).hexdigest()

    @property
    def fingerprint(self) -> str:
        """sha256 (hex) of the entries and of the way they are matched."""
        return self._fingerprint

    def check_text(self, text: str) -> str:
        """Why the text is refused; empty where it may pass."""
        for words in _readings(text):
            allowed = {i + k for i, n in _found(words, self._allowed) for k in range(n)}
            for i, n in _found(words, self._blocked):
                if not all(i + k in allowed for k in range(n)):
                    return f"it holds {' '.join(words[i : i + n])!r}"
        return ""


def _phrases(text: str) -> list[str]:
    return [phrase for part in text.split(";") if (phrase := " ".join(part.split()))]


def _read(path: Path) -> list[str]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise WorldloomError(f"the blocklist cannot be read: {error}", got=path, do="give a text file") from error
    entries = [entry for line in lines if (entry := line.partition("#")[0].strip())]
    for entry in entries:
        if not _WORD.search(entry):
            raise WorldloomError(
                "an entry of the blocklist holds no word", got=f"{entry!r} in {path}", do="write one or remove the line"
            )
    return entries


Pattern = tuple[tuple[str, bool], ...]  # words in a row: (word, whether any ending fits)


def _patterns(entries: Iterable[str]) -> dict[str, list[Pattern]]:
    """Patterns by the first three letters of their first word, which even one with an open end has to share."""
    found: dict[str, list[Pattern]] = {}
    for entry in entries:
        parts = [part for piece in entry.split() for part in re.findall(r"[^\W_]+\*?", piece)]
        pattern = tuple((_plain(part.rstrip("*")), part.endswith("*")) for part in parts)
        found.setdefault(pattern[0][0][:3], []).append(pattern)
    return found


def _found(words: list[str], patterns: dict[str, list[Pattern]]) -> list[tuple[int, int]]:
    """(index, length) of every match."""
    return [
        (i, len(pattern))
        for i, word in enumerate(words)
        for key in {word[:3], word[:2], word[:1]}
        for pattern in patterns.get(key, ())
        if i + len(pattern) <= len(words)
        and all(_fits(words[i + k], part, open_end) for k, (part, open_end) in enumerate(pattern))
    ]


def _fits(word: str, part: str, open_end: bool) -> bool:
    return word == part or (open_end and word.startswith(part)) or word == f"{part}s"


def _plain(text: str) -> str:
    """Lower case without accents, widths and invisible characters."""
    text = unicodedata.normalize("NFKD", text).casefold()
    return "".join(c for c in text if unicodedata.category(c) not in ("Mn", "Me", "Cf"))


def _joined(spelled: re.Match[str]) -> str:
    """The word that is spelled out; without its first letter too, which may be an article."""
    word = re.sub(r"[\W_]+", "", spelled[0])
    return f"{word} {word[1:]}"


def _readings(text: str) -> list[list[str]]:
    """How a text can be read: as it is; lookalikes as letters; spaced-out words joined; stretched ones short."""
    plain = _plain(text)
    # "p0rn" is a word with a digit in it; "2077" and "4 5" are numbers.
    letters = re.sub(r"\S*[^\W\d_]\S*", lambda m: m[0].translate(_LOOKALIKES), plain)
    joined = _SPELLED.sub(_joined, letters)
    short = re.sub(r"([^\W\d_])\1{2,}", r"\1", joined)
    readings: list[list[str]] = []
    for reading in (plain, letters, joined, short):
        words = _WORD.findall(reading)
        if words not in readings:
            readings.append(words)
    return readings
