"""What stands on a terminal after `fit`, under the Trainer's own progress bars."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
_CONTROL = re.compile(r"\x1b\[([0-9;?]*)([A-Za-z])|\x1b.|([\r\n])|(.)", re.DOTALL)


def run(columns: int, *command: str) -> str:
    """Run a command in a terminal, and give all that it wrote."""
    ours, its = pty.openpty()
    fcntl.ioctl(its, termios.TIOCSWINSZ, struct.pack("HHHH", 50, columns, 0, 0))
    environment = {**os.environ, "TERM": "xterm-256color", "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        command, stdin=its, stdout=its, stderr=its, env=environment, cwd=ROOT
    )
    os.close(its)
    written = b""
    while True:
        try:
            part = os.read(ours, 65536)
        except OSError:  # the other end is closed
            break
        if not part:
            break
        written += part
    os.close(ours)
    assert process.wait(60) == 0, written.decode(errors="replace")
    return written.decode()


def displayed(written: str, columns: int) -> list[str]:
    """The lines that stand on the terminal in the end, those scrolled away included."""
    screen: list[list[str]] = [[]]
    row = column = 0
    for match in _CONTROL.finditer(written):
        argument, command, move, character = match.groups()
        count = int(argument) if argument and argument.isdigit() else 1
        if command == "A":
            row = max(0, row - count)
        elif command == "K":
            screen[row] = [] if argument == "2" else screen[row][:column]
        elif move == "\r":
            column = 0
        elif move == "\n":
            row, column = row + 1, 0
        elif character:
            if column >= columns:
                row, column = row + 1, 0
            screen += [[] for _ in range(row + 1 - len(screen))]
            screen[row] += [" "] * (column + 1 - len(screen[row]))
            screen[row][column] = character
            column += 1
        screen += [[] for _ in range(row + 1 - len(screen))]
    return ["".join(line).rstrip() for line in screen]


@pytest.mark.parametrize("columns", [80, 120])
@pytest.mark.parametrize("kind", ["rich", "tqdm"])
def test_the_report_and_the_bars_leave_each_other_alone(
    tmp_path: Path, kind: str, columns: int
) -> None:
    command = (sys.executable, "-m", "tests.reports.in_terminal", kind, str(tmp_path))
    lines = displayed(run(columns, *command), columns)
    end = lines.index("BETWEEN")
    begin = max(i for i, line in enumerate(lines) if line.startswith("Influence of 60 training"))
    assert lines[end - 1].startswith("Exact replays are rounded to")
    report = lines[begin:end]
    assert sum(bool(re.match(r"[123] +\d+ +-?[-+]\d\.\d\de", line)) for line in report) == 3
    assert not any("Epoch" in line or "it/s" in line for line in report)
    bars = [line for line in lines[:begin] if line.startswith("Epoch 2")]
    assert "10/10" in bars[-1]
    assert not any(
        line.startswith(("exact replay of", "SGD-IE: ")) for line in lines
    )  # our own bars
    assert any("Validation" in line and "2/2" in line for line in lines[end:])  # theirs comes back
    assert "THE END" in lines[-1] + lines[-2]
