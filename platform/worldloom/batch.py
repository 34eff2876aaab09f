"""A batch file carried out: a folder for each sample, finished ones found again, failed ones recorded.

<out>/<name>/sample_args.json       the effective arguments; as a batch file they give the same bits
<out>/<name>/vision.mp4             the video, where the mode makes one
<out>/<name>/actions.npy, .json     the actions, where the mode gives some
<out>/<name>/sample_outputs.json    what came of it, with the sidecar's provenance; written last
<out>/summary.json                  all of them in a row
"""

from __future__ import annotations

import json
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from worldloom.artifacts import Store, atomic_write
from worldloom.errors import WorldloomError
from worldloom.generation import Names, Outcome, make_actions, make_sample, require_acts, require_generates
from worldloom.guardrails import Blocked, Guardrails
from worldloom.schema import GenerationRequest
from worldloom.specs import SampleSpec

if TYPE_CHECKING:
    from collections.abc import Sequence

    from worldloom.protocols import Upsamples

ARGS = "sample_args.json"
OUTPUTS = "sample_outputs.json"

Report = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Result:
    """What became of one sample."""

    name: str
    """Its name."""
    status: Literal["success", "error"]
    """As in its ``sample_outputs.json``."""
    id: str = ""
    """Artifact id; empty for one that failed."""
    reused: bool = False
    """Whether it was there already."""
    seconds: float = 0.0
    """Of the generation."""
    error: str = ""
    """Why it failed."""


def run_batch(
    model: Any,
    samples: Sequence[SampleSpec],
    out: str | Path,
    *,
    name: str,
    store: Store | None = None,
    guardrails: Guardrails | None = None,
    upsampler: Upsamples | None = None,
    progress: Report | None = None,
) -> list[Result]:
    """Make every sample in a folder of its own under `out`, whatever becomes of the others, and write the summary.

    Args:
        model: made the samples of the modes that it can; the others fail with what it can do.
        name: what the model is called.
        progress: called with (samples done, samples, what happens now).

    Raises:
        WorldloomError: `out` cannot be written.
    """
    out, started = Path(out), time.monotonic()
    guards = guardrails or Guardrails()
    results: list[Result] = []
    for index, spec in enumerate(samples):

        def report(done: int, total: int, index: int = index, spec: SampleSpec = spec) -> None:
            if progress is not None:
                progress(index, len(samples), f"{spec.name} {done}/{total}")

        if progress is not None:
            progress(index, len(samples), spec.name)
        run = _Run(model, name, spec, out / spec.name)
        results.append(run.carry_out(store, guards, upsampler, report))
    if progress is not None:
        progress(len(samples), len(samples), "")
    counts = {
        "succeeded": sum(result.status == "success" for result in results),
        "failed": sum(result.status == "error" for result in results),
        "reused": sum(result.reused for result in results),
    }
    summary = {
        "model": name,
        **counts,
        "seconds": round(time.monotonic() - started, 3),
        "samples": [asdict(result) for result in results],
    }
    atomic_write(out / "summary.json", json.dumps(summary, indent=1) + "\n")
    return results


class _Run:
    """One sample of a batch."""

    def __init__(self, model: Any, name: str, spec: SampleSpec, folder: Path) -> None:
        self.model, self.name, self.spec, self.folder = model, name, spec, folder

    def carry_out(
        self, store: Store | None, guards: Guardrails, upsampler: Upsamples | None, report: Callable[[int, int], None]
    ) -> Result:
        try:
            outcome = self._make(store, guards, upsampler, report)
        except WorldloomError as error:
            return self._failed(error, str(error))
        # Whatever goes wrong with one sample, the others get their turn; the traceback is in its folder.
        except Exception as error:
            return self._failed(error, f"{type(error).__name__}: {error}", traceback.format_exc())
        return Result(self.spec.name, "success", outcome.sample.id, outcome.reused, outcome.seconds)

    def _make(
        self, store: Store | None, guards: Guardrails, upsampler: Upsamples | None, report: Callable[[int, int], None]
    ) -> Outcome:
        spec, mode = self.spec, self.spec.mode
        names = Names.in_folder(spec.name)
        if mode in ("inverse_dynamics", "policy"):
            model = require_acts(self.model, self.name, mode)
            request = spec.request(self.name)
            self._check_action_dim(model)
            return make_actions(
                model, request, self.folder, horizon=spec.horizon,
                store=store, guardrails=guards, names=names, describe=self._begin,
            )  # fmt: skip
        model = require_generates(self.model, self.name)
        request = spec.request(self.name)
        self._check_action_dim(model)
        return make_sample(
            model, request, self.folder, progress=report,
            store=store, guardrails=guards, upsampler=upsampler, names=names, describe=self._begin,
        )  # fmt: skip

    def _check_action_dim(self, model: Any) -> None:
        wanted, has = self.spec.raw_action_dim, getattr(model, "action_dim", None)
        if wanted is not None and has is not None and wanted != has:
            raise WorldloomError(
                "raw_action_dim is not the size of the model's actions", got=wanted, do=f"leave it out, or give {has}"
            )

    def _begin(self, request: GenerationRequest) -> Mapping[str, Any]:
        """Clear the folder of another try's files and write the effective arguments; what the sidecar says of them."""
        for old in (OUTPUTS, "vision.mp4", "actions.npy", "actions.json"):
            (self.folder / old).unlink(missing_ok=True)
        args = self.spec.effective(request)
        atomic_write(self.folder / ARGS, json.dumps(args, indent=1) + "\n")
        return {"args": args, "status": "success", "message": None}

    def _failed(self, error: Exception, message: str, trace: str | None = None) -> Result:
        for old in (OUTPUTS, "vision.mp4", "actions.npy", "actions.json"):
            (self.folder / old).unlink(missing_ok=True)
        args = {"name": self.spec.name, "model_mode": self.spec.mode}
        args |= self.spec.model_dump(mode="json", exclude_unset=True)
        findings = [finding.view() for finding in error.findings] if isinstance(error, Blocked) else []
        record = {
            "args": args,
            "status": "error",
            "message": message,
            "stack_trace": trace,
            "outputs": [],
            "guardrails": {"checks": findings},
        }
        atomic_write(self.folder / OUTPUTS, json.dumps(record, indent=1) + "\n")
        return Result(self.spec.name, "error", error=message)
