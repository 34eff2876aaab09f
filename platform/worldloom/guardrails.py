"""Guardrails: what a prompt and a video are checked for, and a record of every check, also of those that did not run.

Before generation: the blocklist, then every text classifier that is registered. After it: nudity (a video that shows
it is refused), then faces (they are made unrecognisable). A guard that cannot run is never passed over in silence: the
sample's sidecar names it with the reason, and in mode ``require`` nothing is generated without it.

Own guards are catalog lines of the group ``guards`` (entry points ``worldloom.guards``): ``name`` ->
``"module:factory"``, where ``factory(config: GuardrailConfig)`` gives an object that implements `ChecksText` or
`ChecksVideo`, or raises `WorldloomError` where it cannot be had. A `ChecksText` of that group is a classifier.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from worldloom import registry
from worldloom.errors import WorldloomError
from worldloom.protocols import ChecksText, ChecksVideo

if TYPE_CHECKING:
    import numpy as np

Mode = Literal["on", "off", "require"]
_CLASSIFIER = "classifier"  # the record's name where no text classifier is registered


@dataclass(frozen=True)
class GuardrailConfig:
    """Which guards run, and what they answer to."""

    mode: Mode = "on"
    """``on``: those that are installed; ``off``: none; ``require``: all, or nothing is generated."""
    blocklist: Path | None = None
    """A file of more blocked words and phrases, one a line; see `worldloom.blocklist`."""
    skip: tuple[str, ...] = ()
    """Guards to leave out by name; a sample's sidecar says that they were."""
    nudity_threshold: float = 0.5
    """Score of a detection, 0 to 1, from which on a video is refused."""
    nudity_stride: int = 4
    """Every how many frames one is looked at; the last one always is."""
    face_threshold: float = 0.3
    """Score of a detection, 0 to 1, from which on a face is blurred; low, since a face too many does no harm."""

    def __post_init__(self) -> None:
        if self.mode == "require" and self.skip:
            raise WorldloomError("a guard cannot be required and skipped", got=", ".join(self.skip), do="use mode on")
        if not (0 < self.nudity_threshold <= 1 and 0 < self.face_threshold <= 1) or self.nudity_stride < 1:
            raise WorldloomError("guardrails: thresholds lie in (0, 1], the stride is at least 1", got=self)


@dataclass(frozen=True)
class Finding:
    """What one guard made of one prompt or video."""

    guard: str
    """Its name."""
    stage: Literal["before", "after"]
    """Whether it looks at the prompt or at the video."""
    outcome: Literal["passed", "blocked", "changed", "skipped"]
    """What became of it."""
    detail: str = ""
    """Why it was blocked or skipped, or what was changed."""
    facts: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """What was measured."""

    def view(self) -> dict[str, Any]:
        """For a sidecar."""
        shown: dict[str, Any] = {"guard": self.guard, "stage": self.stage, "outcome": self.outcome}
        return shown | ({"detail": self.detail} if self.detail else {}) | dict(self.facts)


class Blocked(WorldloomError):
    """A prompt or a video that a guard refused.

    Args:
        findings: of all guards that had their turn, the one that refused last.
    """

    def __init__(self, what: str, findings: list[Finding], do: str) -> None:
        self.findings = findings
        last = findings[-1]
        super().__init__(what, got=f"{last.guard}: {last.detail}", do=do)


class Guardrails:
    """The guards of a config, ready to be used.

    Raises:
        WorldloomError: mode ``require`` and a guard cannot be had; a blocklist that cannot be read; an unknown name
            in ``skip``.
    """

    def __init__(self, config: GuardrailConfig | None = None) -> None:
        self.config = config or GuardrailConfig()
        self._text: dict[str, ChecksText | str] = {}
        """Name -> the guard, or why it does not run."""
        self._video: dict[str, ChecksVideo | str] = {}
        factories = _factories()
        if unknown := [name for name in self.config.skip if name not in factories and name != _CLASSIFIER]:
            raise WorldloomError("there is no such guard", got=unknown[0], do=f"use {', '.join(factories)}")
        for name, (stage, make) in factories.items():
            self._add(name, stage, make)
        for number, problem in enumerate(registry.group("guards").problems, 1):
            self._text[f"catalog {number}"] = problem  # nobody can say which guards it would have had
        if not set(self._text) - {"blocklist"}:
            off = "switched off by the caller" if self._off(_CLASSIFIER) else ""
            self._text[_CLASSIFIER] = off or "no text classifier is registered (entry point group worldloom.guards)"
        absent = {name: why for name, why in (*self._text.items(), *self._video.items()) if isinstance(why, str)}
        if self.config.mode == "require" and absent:
            raise WorldloomError(
                "a guard that is required cannot run",
                got="; ".join(f"{name}: {why}" for name, why in absent.items()),
                do="install it, or generate with --guardrails on, which records what was skipped",
            )

    def _off(self, name: str) -> bool:
        return self.config.mode == "off" or name in self.config.skip

    def _add(self, name: str, stage: str, make: Callable[[GuardrailConfig], Any]) -> None:
        guard: Any = "switched off by the caller"
        if not self._off(name):
            try:
                guard = make(self.config)
            except WorldloomError as error:
                if name == "blocklist":
                    raise  # a user's file, not a package: it is never just missing
                guard = f"{error.what}; {error.do}" if error.do else error.what
        if isinstance(guard, ChecksText) or (isinstance(guard, str) and stage == "before"):
            self._text[name] = guard
        elif isinstance(guard, (ChecksVideo, str)):
            self._video[name] = guard
        else:
            raise WorldloomError(
                "a registered guard checks neither text nor video", got=name, do="see worldloom.protocols"
            )

    def identity(self) -> dict[str, str]:
        """Name -> fingerprint of each guard that runs, or why it does not: part of a sample's key."""
        return {
            name: guard if isinstance(guard, str) else guard.fingerprint
            for name, guard in (*self._text.items(), *self._video.items())
        }

    def before(self, text: str) -> list[Finding]:
        """Check a prompt.

        Raises:
            Blocked: a guard refuses it.
        """
        findings: list[Finding] = []
        for name, guard in self._text.items():
            if isinstance(guard, str) or not text.strip():
                why = guard if isinstance(guard, str) and (text.strip() or self._off(name)) else "there is no text"
                findings.append(Finding(name, "before", "skipped", why))
                continue
            reason = guard.check_text(text)
            findings.append(Finding(name, "before", "blocked" if reason else "passed", reason))
            if reason:
                raise Blocked("the prompt was refused by a guard", findings, "describe something else")
        return findings

    def after(self, frames: np.ndarray | None) -> tuple[np.ndarray | None, list[Finding]]:
        """Check a video, uint8 ``(t, h, w, 3)``; gives it back, with faces blurred where there were any.

        Args:
            frames: None where the result is no video; the guards then say so.

        Raises:
            Blocked: a guard refuses it.
        """
        findings: list[Finding] = []
        for name, guard in self._video.items():
            if isinstance(guard, str) or frames is None:
                why = guard if isinstance(guard, str) else "there is no video"
                findings.append(Finding(name, "after", "skipped", why))
                continue
            verdict = guard.check_video(frames)
            outcome = "blocked" if verdict.blocked else "passed" if verdict.frames is None else "changed"
            findings.append(Finding(name, "after", outcome, verdict.blocked or verdict.detail, verdict.facts))
            if verdict.blocked:
                raise Blocked("the video was refused by a guard", findings, "change the prompt, the input or the seed")
            frames = frames if verdict.frames is None else verdict.frames
        return frames, findings


Factory = Callable[[GuardrailConfig], Any]


def _factories() -> dict[str, tuple[str, Factory]]:
    """Name -> its stage, needed where it cannot be had, and what makes it. Text first, faces last."""

    def blocklist(config: GuardrailConfig) -> Any:
        from worldloom.blocklist import Blocklist

        return Blocklist(config.blocklist)

    def nudity(config: GuardrailConfig) -> Any:
        from worldloom.detectors import NudityGuard

        return NudityGuard(config.nudity_threshold, config.nudity_stride)

    def faces(config: GuardrailConfig) -> Any:
        from worldloom.detectors import FaceGuard

        return FaceGuard(config.face_threshold)

    def registered(name: str) -> Factory:
        return lambda config: registry.load("guards", name)(config)

    found: dict[str, tuple[str, Factory]] = {"blocklist": ("before", blocklist)}
    ours = {"nudity": ("after", nudity), "faces": ("after", faces)}
    for name in registry.names("guards"):
        if name in found or name in ours:
            raise WorldloomError("a registered guard has the name of one of ours", got=name, do="rename it")
        found[name] = (str(registry.entry("guards", name).meta.get("stage", "before")), registered(name))
    return found | ours
