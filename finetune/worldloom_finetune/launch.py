"""Several processes on one machine: start them, watch them, end them together.

The parent runs ``python -m worldloom_finetune.launch REQUEST`` once per rank with the variables torchrun sets, so a
run that was started by torchrun itself takes the same path.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from worldloom.artifacts import atomic_write
from worldloom.errors import WorldloomError


def rank_and_world() -> tuple[int, int] | None:
    """(rank, world size) where a launcher has set them, else None."""
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ and "LOCAL_RANK" in os.environ:
        return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    return None


def free_port() -> int:
    """A TCP port of the loopback interface that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def spawn(request: dict[str, Any], processes: int, out: Path, threads: int) -> None:
    """Run the request on `processes` ranks and wait for all of them.

    Raises:
        WorldloomError: a rank failed; its message is on stderr.
    """
    file = out / ".launch.json"
    atomic_write(file, json.dumps(request))
    shared = os.environ | {
        "WORLD_SIZE": str(processes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "OMP_NUM_THREADS": str(threads),
        "WORLDLOOM_PARENT": str(os.getpid()),
    }
    command = [sys.executable, "-m", "worldloom_finetune.launch", str(file)]
    ranks = [
        subprocess.Popen(command, env=shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(processes)
    ]
    try:
        while any(rank.poll() is None for rank in ranks) and not any(rank.poll() for rank in ranks):
            time.sleep(0.05)
        failed = [i for i, rank in enumerate(ranks) if rank.poll()]
        if failed:
            raise WorldloomError(
                f"training process {failed[0]} of {processes} ended with status {ranks[failed[0]].returncode}",
                do="its error is printed above; the same command resumes from the last checkpoint",
            )
    finally:
        for rank in ranks:
            if rank.poll() is None:
                rank.terminate()
        for rank in ranks:
            try:
                rank.wait(10)
            except subprocess.TimeoutExpired:
                rank.kill()
        file.unlink(missing_ok=True)


def die_with_parent(parent: int) -> None:
    """End this process when `parent` is gone, even if that was killed: no rank may write into a rerun's folder."""
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _worker(path: str) -> int:
    parent = int(os.environ["WORLDLOOM_PARENT"])
    die_with_parent(parent)
    from worldloom_finetune.train import fit, from_json

    try:
        fit(*from_json(json.loads(Path(path).read_text())))
    except WorldloomError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(_worker(sys.argv[1]))
