"""The cases of `kitemq bench suite`, each with its own empty cluster, in the order of the table."""

from __future__ import annotations

import time
from contextlib import ExitStack
from statistics import median
from typing import Any

from kitemq.bench import procfs
from kitemq.bench.cluster import running_standalone
from kitemq.bench.harness import Case, Harness, Measured, Sample, fill
from kitemq.bench.histogram import Histogram
from kitemq.bench.rows import Bar, Row

TOPIC = "bench"
SYNC_FLUSH_IN_FLIGHT = 256
BATCH_MESSAGES = 64
FREE_BYTES_WANTED = 12 * 10**9
# A consumer that has received nothing for this long will not any more.
DRAIN_TIMEOUT_S = 120.0
STANDALONE_SETTLE_S = 2.0


def against(measured: Measured, name: str, factor: float, *, at_least: bool) -> dict[str, Any]:
    """Bar and baseline of a row: `factor` times the baseline of that name."""
    return {
        "bar": Bar(f"{'≥' if at_least else '≤'} {factor:g} x {name}", factor * measured.baseline(name), at_least),
        "baseline": name,
        "baseline_runs": measured.baselines[name],
    }


def send(harness: Harness) -> list[Row]:
    """`send()` awaited, 64 in flight."""
    with harness.cluster() as cluster, harness.sender(cluster, TOPIC, in_flight=64) as load:
        measured = harness.rounds(("U", "U p50"), {"send": harness.loader(load, cluster)})
    name = "send() awaited, 64 in flight, ASYNC_FLUSH"
    return [
        Row(
            name,
            "messages/s",
            measured.per_s("send"),
            **measured.spent("send"),
            **against(measured, "U", 10, at_least=True),
        ),
        Row(
            f"{name}: p99",
            "ms",
            measured.percentile_ms("send", 99),
            **against(measured, "U p50", 6, at_least=False),
        ),
    ]


def send_sync_flush(harness: Harness) -> list[Row]:
    """`send()` awaited, 256 in flight, each answered when it is on disk; beside it the same without."""
    with ExitStack() as stack:
        loads = {}
        for mode in ("SYNC_FLUSH", "ASYNC_FLUSH"):
            cluster = stack.enter_context(harness.cluster(flush_mode=mode))
            load = stack.enter_context(harness.sender(cluster, TOPIC, in_flight=SYNC_FLUSH_IN_FLIGHT))
            loads[mode] = harness.loader(load, cluster)
        measured = harness.rounds(("F",), loads)
    asynchronous = median(measured.per_s("ASYNC_FLUSH"))
    fsyncs = measured.baseline("F")
    by_flush_mode = Bar("≥ 0.7 x ASYNC_FLUSH", 0.7 * asynchronous, at_least=True)
    by_disk = Bar("≥ 0.8 x 256 x F", 0.8 * SYNC_FLUSH_IN_FLIGHT * fsyncs, at_least=True)
    disk_decides = by_disk.limit < by_flush_mode.limit
    return [
        Row(
            "send() awaited, 256 in flight, SYNC_FLUSH",
            "messages/s",
            measured.per_s("SYNC_FLUSH"),
            bar=by_disk if disk_decides else by_flush_mode,
            baseline="F" if disk_decides else "ASYNC_FLUSH",
            baseline_runs=measured.baselines["F"] if disk_decides else measured.per_s("ASYNC_FLUSH"),
            **measured.spent("SYNC_FLUSH"),
            notes={"async_flush_per_s": asynchronous, "fdatasync_per_s": fsyncs},
        )
    ]


def send_batch(harness: Harness) -> list[Row]:
    """`send_batch` of 64 messages, 4 in flight, in bytes of bodies."""
    with (
        harness.cluster() as cluster,
        harness.sender(cluster, TOPIC, "send-batch", in_flight=4, batch=BATCH_MESSAGES) as load,
    ):
        measured = harness.rounds(("S",), {"batch": harness.loader(load, cluster)})
    per_s = measured.per_s("batch")
    return [
        Row(
            "send_batch 64 x 1 KiB, 4 in flight",
            "MB/s",
            [rate * harness.settings.body_bytes / 1e6 for rate in per_s],
            **measured.spent("batch"),
            notes={"messages_per_s": median(per_s)},
            **against(measured, "S", 0.5, at_least=True),
        )
    ]


def send_one(harness: Harness) -> list[Row]:
    """`send()` with 1 in flight, in both flush modes."""
    with ExitStack() as stack:
        variants = {}
        for mode in ("ASYNC_FLUSH", "SYNC_FLUSH"):
            cluster = stack.enter_context(harness.cluster(flush_mode=mode))
            load = stack.enter_context(harness.sender(cluster, TOPIC, in_flight=1))
            variants[mode] = harness.loader(load, cluster)
        measured = harness.rounds(("U p50", "F"), variants)
    unary = measured.baseline("U p50")
    synced = Bar("≤ 0.8 x U p50 + 2 x F p50", 0.8 * unary + 2 * measured.baseline("F p50"), at_least=False)
    return [
        Row(
            "send() 1 in flight, ASYNC_FLUSH: p50",
            "ms",
            measured.percentile_ms("ASYNC_FLUSH", 50),
            **measured.spent("ASYNC_FLUSH"),
            **against(measured, "U p50", 0.8, at_least=False),
        ),
        Row(
            "send() 1 in flight, SYNC_FLUSH: p50",
            "ms",
            measured.percentile_ms("SYNC_FLUSH", 50),
            bar=synced,
            baseline="U p50",
            baseline_runs=measured.baselines["U p50"],
            **measured.spent("SYNC_FLUSH"),
            notes={"fdatasync_p50_ms": measured.baseline("F p50")},
        ),
    ]


def drain(harness: Harness) -> list[Row]:
    """A backlog drained by a PullConsumer, and by a PushConsumer that commits."""
    count = harness.settings.drain_messages
    with ExitStack() as stack:
        cluster = stack.enter_context(harness.cluster())
        with harness.sender(cluster, TOPIC, "send-batch", in_flight=4, batch=BATCH_MESSAGES) as filler:
            filler.run({"messages": count}, timeout_s=DRAIN_TIMEOUT_S)
        variants = {}
        for name, job, options in (
            ("pull", "pull", {}),
            ("pull, every body read", "pull", {"read_bodies": True}),
            ("push", "push", {}),
        ):
            load = stack.enter_context(harness.worker(job, namesrv=cluster.namesrv, topic=TOPIC, **options))
            order = {"messages": count, "timeout_s": DRAIN_TIMEOUT_S}
            variants[name] = harness.loader(load, cluster, order)
        measured = harness.rounds(("U",), variants)
    bodies = median(measured.per_s("pull, every body read"))
    return [
        Row(
            f"PullConsumer drains {count:,} messages",
            "messages/s",
            measured.per_s("pull"),
            **measured.spent("pull"),
            notes={"every_body_read_per_s": bodies},
            **against(measured, "U", 60, at_least=True),
        ),
        Row(
            f"PushConsumer drains {count:,} messages",
            "messages/s",
            measured.per_s("push"),
            **measured.spent("push"),
            **against(measured, "U", 35, at_least=True),
        ),
    ]


def latency(harness: Harness) -> list[Row]:
    """From born to handler at 5,000 messages a second; born is when the schedule wanted the send."""
    rate = harness.settings.rate
    with harness.cluster() as cluster:
        cluster.create_topic(TOPIC, queue_count=harness.settings.queue_count)
        with (
            harness.worker("push-latency", namesrv=cluster.namesrv, topic=TOPIC) as consumer,
            harness.sender(cluster, TOPIC, "send-paced", rate=rate) as producer,
        ):

            def born_to_handler() -> Sample:
                consumer.run({"forget": True})
                with harness.spent(broker=cluster.broker.pid, producer=producer.pid, client=consumer.pid) as sample:
                    sent = producer.run({"seconds": harness.settings.seconds})
                    received = consumer.run({"messages": sent["messages"], "timeout_s": 30.0})
                    fill(sample, {**sent, **received})
                return sample

            measured = harness.rounds(("U p50",), {"latency": born_to_handler})
    name = f"born to handler at {rate:,.0f} messages/s"
    late = [Histogram.from_json(sample.reply["lateness"]) for sample in measured.samples["latency"]]
    notes = {"generator_late_p50_ms": median([h.percentile_ns(50) / 1e6 for h in late])}
    notes["generator_late_p99_ms"] = median([h.percentile_ns(99) / 1e6 for h in late])
    return [
        Row(
            f"{name}: p50",
            "ms",
            measured.percentile_ms("latency", 50),
            **measured.spent("latency"),
            notes=notes,
            **against(measured, "U p50", 2, at_least=False),
        ),
        Row(
            f"{name}: p99",
            "ms",
            measured.percentile_ms("latency", 99),
            **against(measured, "U p50", 20, at_least=False),
        ),
    ]


def sync_producer(harness: Harness) -> list[Row]:
    """`kitemq.sync`: one thread beside the async producer with 1 in flight, and 16 threads."""
    with harness.cluster() as cluster, ExitStack() as stack:
        variants = {}
        for name, job, options in (
            ("async", "send", {"in_flight": 1}),
            ("1 thread", "send-sync", {"threads": 1}),
            ("16 threads", "send-sync", {"threads": 16}),
        ):
            load = stack.enter_context(harness.sender(cluster, TOPIC, job, **options))
            variants[name] = harness.loader(load, cluster)
        measured = harness.rounds(("U",), variants)
    asynchronous = measured.percentile_ms("async", 50)
    return [
        Row(
            "kitemq.sync producer, 1 thread: p50",
            "ms",
            measured.percentile_ms("1 thread", 50),
            bar=Bar("≤ 1.5 x async", 1.5 * median(asynchronous), at_least=False),
            baseline="async",
            baseline_runs=asynchronous,
            **measured.spent("1 thread"),
        ),
        Row(
            "kitemq.sync producer, 16 threads",
            "messages/s",
            measured.per_s("16 threads"),
            **measured.spent("16 threads"),
            **against(measured, "U", 2.5, at_least=True),
        ),
    ]


def standalone(harness: Harness) -> list[Row]:
    """`kitemq-server standalone`: its start, and what it takes when nothing happens."""
    starts, memory, cpu = [], [], []
    for _ in range(harness.settings.rounds):
        with running_standalone(harness.folder) as (process, start_s):
            starts.append(start_s)
            time.sleep(STANDALONE_SETTLE_S)  # what it does once after its start is not its idling
            before, began = procfs.usage(process.pid), time.perf_counter()
            time.sleep(harness.settings.seconds)
            spent = procfs.usage(process.pid).since(before)
            cpu.append(spent.cpu_s / (time.perf_counter() - began) * 100)
            memory.append(procfs.memory_bytes(process.pid) / 1e6)
    return [
        Row("kitemq-server standalone: serving after", "s", starts, Bar("< 1 s", 1.0, at_least=False)),
        Row("kitemq-server standalone: idle memory", "MB", memory, Bar("< 100 MB", 100.0, at_least=False)),
        Row("kitemq-server standalone: idle CPU", "% of a core", cpu, Bar("~ 0 %", 1.0, at_least=False)),
    ]


CASES: dict[str, Case] = {
    "send": send,
    "send-sync-flush": send_sync_flush,
    "send-batch": send_batch,
    "send-one": send_one,
    "drain": drain,
    "latency": latency,
    "sync-producer": sync_producer,
    "standalone": standalone,
}
