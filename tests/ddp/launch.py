"""Start a script as the processes of a distributed run."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
RANKS = 2


@dataclass(frozen=True)
class Ended:
    """How a process ended: its exit code, and what it printed."""

    code: int
    output: str


def launch(module: str, *arguments: str, ranks: int = RANKS, timeout: float = 150) -> list[Ended]:
    """Run ``python -m module`` once a rank; what runs too long is killed, which is an error."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = []
    for rank in range(ranks):
        environment = {
            **os.environ,
            "LOCAL_RANK": str(rank),
            "NODE_RANK": "0",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(ROOT),
        }
        command = [sys.executable, "-m", module, *arguments]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        processes.append(subprocess.Popen(command, env=environment, cwd=ROOT, **pipes))
    try:
        outputs = [process.communicate(timeout=timeout)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    ended = [Ended(p.returncode, text) for p, text in zip(processes, outputs, strict=True)]
    for rank, one in enumerate(ended):  # pytest shows it where a test fails
        print(f"rank {rank} ended with {one.code}:\n{one.output}")
    return ended
