"""What a process costs, read from /proc: CPU, memory, bytes written. Linux only."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

_TICKS_PER_S = os.sysconf("SC_CLK_TCK")


class Usage(NamedTuple):
    """Totals since the process began. written_bytes: what it caused to be written to storage."""

    cpu_s: float
    written_bytes: int

    def since(self, before: Usage) -> Usage:
        return Usage(self.cpu_s - before.cpu_s, self.written_bytes - before.written_bytes)


def usage(pid: int) -> Usage:
    """User and system time of all threads, and bytes written. Raises OSError when there is no such process."""
    stat = Path(f"/proc/{pid}/stat").read_text()
    fields = stat[stat.rindex(")") + 2 :].split()  # the name before may hold anything
    cpu_s = (int(fields[11]) + int(fields[12])) / _TICKS_PER_S
    return Usage(cpu_s, _field(Path(f"/proc/{pid}/io"), "write_bytes"))


def machine_busy_s() -> float:
    """CPU seconds that all cores together have worked, or had taken away by the host, since the machine began."""
    user, nice, system, _idle, _iowait, irq, softirq, steal = Path("/proc/stat").read_text().split()[1:9]
    return sum(map(int, (user, nice, system, irq, softirq, steal))) / _TICKS_PER_S


def memory_bytes(pid: int) -> int:
    """RssAnon + RssShmem: resident memory that is not a mapped file. Raises OSError when there is no such process."""
    status = Path(f"/proc/{pid}/status")
    return (_field(status, "RssAnon") + _field(status, "RssShmem")) * 1024


def _field(path: Path, name: str) -> int:
    for line in path.read_text().splitlines():
        key, _, value = line.partition(":")
        if key == name:
            return int(value.split()[0])
    raise OSError(f"{path} has no {name}")
