"""How much memory a block of code takes on top of what was in use before it.

On Linux CPUs this is the growth of the resident set: the kernel's high-water mark (``VmHWM``, see proc(5)), set back at
entry through ``/proc/self/clear_refs``, less the resident size (``VmRSS``) at entry. It counts the pages of the whole
process, so also what other threads allocate meanwhile and the files that the block maps for the first time (a library
on its first use); run the block once before it is measured. Memory that the block frees and takes again counts once.
Freed memory that the allocator keeps for itself would be handed out again unseen, so it goes back to the kernel at
entry (``malloc_trim``, glibc); what another allocator keeps is not seen. The kernel counts pages per thread in batches:
a few MB either way are noise.

On CUDA it is the peak of the memory that torch's tensors hold, less what they held at entry. What its caching allocator
reserves beyond that, the context and other libraries are left out: the device needs more than this figure.

Elsewhere, and where ``/proc`` is not writable (some containers), there is no measure and it is None.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_RESET_PEAK = "5"  # proc(5): "reset the peak resident set size to the current one"


@dataclass
class Peak:
    """What `peak_memory` measured."""

    bytes: int | None = None
    """Most memory in use at once, in bytes, on top of what was in use at entry; None where nothing measures it, and
    until the block ends."""


@contextmanager
def peak_memory(device: Any = "cpu") -> Iterator[Peak]:
    """Measure a block: ``with peak_memory("cpu") as peak: ...``, then ``peak.bytes``. Blocks do not nest.

    Args:
        device: where the block's tensors are, a name or a ``torch.device``.
    """
    peak = Peak()
    kind = str(device).partition(":")[0]
    if kind == "cuda":
        import torch

        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        yield peak
        torch.cuda.synchronize(device)
        peak.bytes = torch.cuda.max_memory_allocated(device) - before
        return
    start = _reset() if kind == "cpu" else None
    yield peak
    if start is not None:
        peak.bytes = max(_resident("VmHWM") - start, 0)


def _reset() -> int | None:
    """Give freed memory back, set the high-water mark to the resident size, and return that; None where it fails."""
    if not _CLEAR.exists():
        return None
    try:
        _trim()
        _CLEAR.write_text(_RESET_PEAK)
        start = _resident("VmRSS")
    except OSError:
        return None
    # Some sandboxes take the write and do nothing: then the mark is still that of the past.
    return start if _resident("VmHWM") <= start * 1.02 + (4 << 20) else None


def _resident(key: str) -> int:
    """A field of ``/proc/self/status`` in bytes; OSError where there is none."""
    found = re.search(rf"^{key}:\s+(\d+) kB$", _STATUS.read_text(), re.M)
    if found is None:
        raise OSError(f"{_STATUS} has no {key}")
    return int(found[1]) * 1024


def _trim() -> None:
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc alone has it
    if trim is not None:
        trim(0)
