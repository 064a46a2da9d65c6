"""One run: baselines and cases in turns, so that a ratio compares what the machine did at the same time."""

from __future__ import annotations

import math
import os
import shutil
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from kitemq.bench import procfs
from kitemq.bench.baselines import fdatasync
from kitemq.bench.cluster import Cluster, running_cluster
from kitemq.bench.histogram import Histogram
from kitemq.bench.process import BenchError, Worker, worker
from kitemq.bench.rows import Bar, Cost, Row

U_IN_FLIGHT = 64


@dataclass(frozen=True, slots=True)
class Growth:
    """How big things get in the growth cases."""

    backlog_messages: int = 10_000_000
    topics: int = 10
    queues_per_topic: int = 1_000
    consumers: int = 1_000
    # Longer than a heartbeat's interval, so that each client's is in it.
    idle_s: float = 32.0
    restart_log_bytes: int = 10 * 2**30


@dataclass(frozen=True, slots=True)
class Settings:
    """How long and how much. The defaults are what the bars are stated for; tests take less."""

    seconds: float = 4.0
    warm_up_s: float = 1.0
    baseline_s: float = 1.5
    rounds: int = 3
    body_bytes: int = 1024
    queue_count: int = 8
    drain_messages: int = 1_000_000
    rate: float = 5_000.0
    growth: Growth = Growth()


@dataclass(slots=True)
class Sample:
    """One round of one case.

    usage: what each process spent in it, memory: at its end. other_cores: how many cores were busy with something else.
    """

    messages: int
    seconds: float
    latency: Histogram
    usage: dict[str, procfs.Usage] = field(default_factory=dict)
    memory_bytes: dict[str, int] = field(default_factory=dict)
    reply: dict[str, Any] = field(default_factory=dict)
    other_cores: float = 0.0

    @property
    def per_s(self) -> float:
        return self.messages / self.seconds if self.seconds else 0.0

    def percentile_ms(self, percent: float) -> float:
        return self.latency.percentile_ns(percent) / 1e6


class Measured:
    """All rounds: of each baseline by its name, of each variant of the case by its name."""

    def __init__(self) -> None:
        self.baselines: dict[str, list[float]] = defaultdict(list)
        self.samples: dict[str, list[Sample]] = defaultdict(list)

    def baseline(self, name: str) -> float:
        return median(self.baselines[name])

    def per_s(self, variant: str) -> list[float]:
        return [sample.per_s for sample in self.samples[variant]]

    def percentile_ms(self, variant: str, percent: float) -> list[float]:
        return [sample.percentile_ms(percent) for sample in self.samples[variant]]

    def spent(self, variant: str) -> dict[str, Any]:
        """Costs of a row, medians over the rounds with the memory of the last, and how busy the machine was besides."""
        samples = self.samples[variant]
        costs = []
        for name in samples[0].usage:
            per_million = [1e6 / sample.messages if sample.messages else math.nan for sample in samples]
            cpu = median(s.usage[name].cpu_s * each for s, each in zip(samples, per_million, strict=True))
            written = median(s.usage[name].written_bytes * each for s, each in zip(samples, per_million, strict=True))
            costs.append(Cost(name, cpu, written, samples[-1].memory_bytes[name]))
        return {"costs": costs, "other_cores": max(sample.other_cores for sample in samples)}


class Harness:
    """What a case needs: its own cluster, workers, and rounds. Make it with `open_harness`."""

    def __init__(self, settings: Settings, folder: Path, stack: ExitStack, say: Callable[[str], None]) -> None:
        self.settings = settings
        self.folder = folder
        self.say = say
        self._stack = stack
        self._echo_client: Worker | None = None
        self._cluster_count = 0

    @contextmanager
    def cluster(self, *, flush_mode: str = "ASYNC_FLUSH") -> Iterator[Cluster]:
        """A new, empty cluster."""
        self._cluster_count += 1
        with running_cluster(f"cluster-{self._cluster_count}", self.folder, flush_mode=flush_mode) as cluster:
            yield cluster

    @contextmanager
    def worker(self, job: str, **options: Any) -> Iterator[Worker]:
        with worker(job, options, log_dir=self.folder) as handle:
            yield handle

    @contextmanager
    def sender(self, cluster: Cluster, topic: str, job: str = "send", **options: Any) -> Iterator[Worker]:
        """A warm sending worker; the topic is made if `cluster` has not got it."""
        if topic not in cluster.topics:
            cluster.create_topic(topic, queue_count=self.settings.queue_count)
        options = {"namesrv": cluster.namesrv, "topic": topic, "body_bytes": self.settings.body_bytes, **options}
        with self.worker(job, **options) as handle:
            handle.run({"seconds": self.settings.warm_up_s})
            yield handle

    def rounds(self, baselines: Sequence[str], variants: Mapping[str, Callable[[], Sample]]) -> Measured:
        """Each round: every baseline, then every variant. After the last: every baseline once more."""
        measured = Measured()
        for _ in range(self.settings.rounds):
            self._measure_baselines(baselines, measured)
            for name, variant in variants.items():
                measured.samples[name].append(variant())
        self._measure_baselines(baselines, measured)
        return measured

    def loader(self, load: Worker, cluster: Cluster, order: dict[str, Any] | None = None) -> Callable[[], Sample]:
        """One round of a worker's load, with what it and the broker spent; for `rounds`."""

        def run() -> Sample:
            with self.spent(broker=cluster.broker.pid, client=load.pid) as sample:
                fill(sample, load.run(order or {"seconds": self.settings.seconds}))
            return sample

        return run

    @contextmanager
    def spent(self, **pids: int) -> Iterator[Sample]:
        """A sample whose usage and memory are those of the processes meanwhile. What was written before is on disk."""
        os.sync()
        sample = Sample(0, 0.0, Histogram())
        before = {name: procfs.usage(pid) for name, pid in pids.items()}
        began, busy = time.perf_counter(), procfs.machine_busy_s()
        yield sample
        busy, seconds = procfs.machine_busy_s() - busy, time.perf_counter() - began
        for name, pid in pids.items():
            sample.usage[name] = procfs.usage(pid).since(before[name])
            sample.memory_bytes[name] = procfs.memory_bytes(pid)
        own = sum(usage.cpu_s for usage in sample.usage.values())
        sample.other_cores = max(0.0, busy - own) / seconds

    def _measure_baselines(self, names: Sequence[str], measured: Measured) -> None:
        for name in names:
            for figure_name, figure in self._baseline(name).items():
                measured.baselines[figure_name].append(figure)

    def _baseline(self, name: str) -> dict[str, float]:
        seconds = self.settings.baseline_s
        match name:
            case "U":
                return {"U": self._unary(U_IN_FLIGHT)["per_s"]}
            case "U p50":
                return {"U p50": self._unary(1)["p50_ms"]}
            case "S":
                return {"S": self._echo.run({"measure": "stream", "seconds": seconds})["bytes_per_s"] / 1e6}
            case "F":
                os.sync()
                synced = fdatasync(self.folder, seconds=min(seconds, 1.0))
                return {"F": synced.per_s, "F p50": synced.p50_ms}
        raise AssertionError(name)

    @property
    def _echo(self) -> Worker:
        """The echo server's client, warm; both are started when they are first wanted."""
        if self._echo_client is None:
            server = self._stack.enter_context(self.worker("echo-server"))
            client = self._stack.enter_context(self.worker("echo-client", port=server.info["port"]))
            client.run({"measure": "unary", "in_flight": U_IN_FLIGHT, "seconds": self.settings.warm_up_s})
            self._echo_client = client
        return self._echo_client

    def _unary(self, in_flight: int) -> dict[str, Any]:
        return self._echo.run({"measure": "unary", "in_flight": in_flight, "seconds": self.settings.baseline_s})


def fill(sample: Sample, reply: dict[str, Any]) -> None:
    """Put a worker's reply into the sample."""
    sample.reply = reply
    sample.messages = reply["messages"]
    sample.seconds = reply["seconds"]
    sample.latency = Histogram.from_json(reply.get("latency", {}))


@contextmanager
def open_harness(
    settings: Settings, *, data: Path, say: Callable[[str], None], free_bytes_wanted: int
) -> Iterator[Harness]:
    """A harness whose data are in a new folder in `data`, removed at the end.

    Raises BenchError when the disk has less than free_bytes_wanted.
    """
    data = data.resolve()
    data.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(data).free
    if free < free_bytes_wanted:
        raise BenchError(
            f"{data} has {free / 1e9:.1f} GB free of the {free_bytes_wanted / 1e9:.0f} GB that this needs: "
            "name another folder with --data"
        )
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="kitemq-bench-", dir=data)))
        yield Harness(settings, folder, stack, say)


Case = Callable[[Harness], list[Row]]


def run_cases(cases: Mapping[str, Case], harness: Harness, *, only: Sequence[str] = ()) -> list[Row]:
    """The rows of all cases, or of those named. A case that fails has one row, without a figure.

    Raises BenchError for a name that there is not.
    """
    if unknown := sorted(set(only) - set(cases)):
        raise BenchError(f"no case {unknown[0]!r}: there are {', '.join(cases)}")
    rows: list[Row] = []
    for name, case in cases.items():
        if not only or name in only:
            harness.say(f"Measuring {name}: {case.__doc__}")
            try:
                rows += case(harness)
            except BenchError as error:
                harness.say(f"Error: {name} could not be measured: {error}")
                rows.append(Row(f"{name}: not measured", "", (), Bar("measured", math.nan, at_least=True)))
    return rows
