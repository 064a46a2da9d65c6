"""The cases of `kitemq bench growth`: cost per message must not grow with the log, the queues or the clients."""

from __future__ import annotations

import time
from contextlib import ExitStack
from statistics import median
from typing import Any

import grpc

from kitemq.bench import procfs
from kitemq.bench.cluster import CALL_TIMEOUT_S, Cluster
from kitemq.bench.harness import Case, Harness, Measured, Sample
from kitemq.bench.histogram import Histogram
from kitemq.bench.holding import QUEUES_PER_CONSUMER
from kitemq.bench.process import BenchError, Worker
from kitemq.bench.rows import Bar, Row
from kitemq.bench.suite import BATCH_MESSAGES, DRAIN_TIMEOUT_S, TOPIC, against
from kitemq.proto.v1 import admin_pb2, admin_pb2_grpc

FREE_BYTES_WANTED = 32 * 10**9
FILL_TIMEOUT_S = 1_200.0
HOLDING_TOPIC = "bench-holding"
HOLDING_PROCESSES = 4
HOLDING_RATE = 200.0
SETTLE_TIMEOUT_S = 120.0
KILL_AFTER_S = 2.0


def backlog(harness: Harness) -> list[Row]:
    """10 M messages behind and 10,000 queues: sends and drains beside an empty broker, memory, start."""
    growth = harness.settings.growth
    with harness.cluster() as grown, harness.cluster() as empty:
        for number in range(growth.topics):
            topic = f"{TOPIC}-{number}"
            grown.create_topic(topic, queue_count=growth.queues_per_topic)
            fill_topic(harness, grown, topic, growth.backlog_messages // growth.topics)
        with ExitStack() as stack:
            sends = {}
            for name, cluster in (("grown", grown), ("empty", empty)):
                load = stack.enter_context(harness.sender(cluster, TOPIC, in_flight=64))
                sends[name] = harness.loader(load, cluster)
            sent = harness.rounds((), sends)
        drained = _drains(harness, {"grown": grown, "empty": empty})
        memory_mb = procfs.memory_bytes(grown.broker.pid) / 1e6
        starts = []
        for _ in range(harness.settings.rounds):
            grown.stop_broker()
            starts.append(grown.start_broker())
    behind = f"{growth.backlog_messages:,} messages behind, {growth.topics * growth.queues_per_topic:,} queues"
    return [
        Row(f"{behind}: send()", "messages/s", sent.per_s("grown"), **sent.spent("grown"), **_as_empty(sent)),
        Row(
            f"{behind}: PullConsumer drains",
            "messages/s",
            drained.per_s("grown"),
            **drained.spent("grown"),
            **_as_empty(drained),
        ),
        Row(f"{behind}: broker's memory", "MB", [memory_mb], Bar("< 400 MB", 400.0, at_least=False)),
        Row(f"{behind}: serving after", "s", starts, Bar("< 3 s", 3.0, at_least=False)),
    ]


def consumers(harness: Harness) -> list[Row]:
    """1,000 connections with pulls held on 8 queues each: what the waiting costs, and how soon a message arrives."""
    growth = harness.settings.growth
    count = growth.consumers
    with harness.cluster() as cluster, ExitStack() as stack:
        cluster.create_topic(HOLDING_TOPIC, queue_count=count * QUEUES_PER_CONSUMER)
        broker = cluster.broker
        sender = stack.enter_context(
            harness.worker(
                "send-to-queues",
                namesrv=cluster.namesrv,
                topic=HOLDING_TOPIC,
                body_bytes=harness.settings.body_bytes,
                rate=HOLDING_RATE,
                broker_name=cluster.name,
                queue_ids=[index * QUEUES_PER_CONSUMER for index in range(count)],
            )
        )
        # Every queue has been written before memory is looked at: it is the waiting that is measured.
        sender.run({"seconds": count / HOLDING_RATE})
        before = procfs.memory_bytes(broker.pid)
        each = count // HOLDING_PROCESSES
        holders = [
            stack.enter_context(
                harness.worker(
                    "holding", address=cluster.broker_address, topic=HOLDING_TOPIC, first=number * each, count=each
                )
            )
            for number in range(HOLDING_PROCESSES)
        ]
        _wait_held(cluster, each * HOLDING_PROCESSES * QUEUES_PER_CONSUMER)
        memory_mb = (procfs.memory_bytes(broker.pid) - before) / 1e6
        idle, began = procfs.usage(broker.pid), time.perf_counter()
        time.sleep(growth.idle_s)
        percent = procfs.usage(broker.pid).since(idle).cpu_s / (time.perf_counter() - began) * 100
        arrivals = [_arrivals(sender, holders, count) for _ in range(harness.settings.rounds)]
    name = f"{count:,} consumers, each holding {QUEUES_PER_CONSUMER} pulls"
    return [
        Row(f"{name}: broker's CPU", "% of a core", [percent], Bar("< 5 %", 5.0, at_least=False)),
        Row(f"{name}: broker's memory", "MB more", [max(0.0, memory_mb)], Bar("< 150 MB", 150.0, at_least=False)),
        Row(
            f"{name}: arrival at {HOLDING_RATE:g} messages/s, p99",
            "ms",
            [sample.percentile_ms(99) for sample in arrivals],
            Bar("< 50 ms", 50.0, at_least=False),
            notes={"p50_ms": median(sample.percentile_ms(50) for sample in arrivals)},
        ),
    ]


def restart(harness: Harness) -> list[Row]:
    """Starting again on 10 GiB of log: after a clean stop, and after kill -9 under load."""
    messages = harness.settings.growth.restart_log_bytes // (harness.settings.body_bytes + 100)
    clean, killed = [], []
    with harness.cluster() as cluster:
        cluster.create_topic(TOPIC, queue_count=harness.settings.queue_count)
        fill_topic(harness, cluster, TOPIC, messages)
        for _ in range(harness.settings.rounds):
            cluster.stop_broker()
            clean.append(cluster.start_broker())
        with harness.sender(cluster, TOPIC, in_flight=64) as load:
            for _ in range(harness.settings.rounds):
                stored = _stored(cluster)
                load.begin({"seconds": harness.settings.seconds + KILL_AFTER_S})
                time.sleep(KILL_AFTER_S)
                cluster.kill_broker()
                killed.append(cluster.start_broker())
                acknowledged = load.result()["messages"]
                if (now := _stored(cluster)) != stored + acknowledged:
                    raise BenchError(f"{stored} messages were stored, then {acknowledged} more: {now} are there")
    name = f"restart with {harness.settings.growth.restart_log_bytes / 2**30:.3g} GiB of log"
    return [
        Row(f"{name}, clean: serving after", "s", clean, Bar("< 1 s", 1.0, at_least=False)),
        Row(f"{name}, after kill -9 under load: serving after", "s", killed, Bar("< 3 s", 3.0, at_least=False)),
    ]


CASES: dict[str, Case] = {"backlog": backlog, "consumers": consumers, "restart": restart}


def fill_topic(harness: Harness, cluster: Cluster, topic: str, messages: int) -> None:
    """Put `messages` (rounded up to whole batches) into a topic that is there."""
    harness.say(f"  {messages:,} messages into {topic}")
    options = {"namesrv": cluster.namesrv, "topic": topic, "body_bytes": harness.settings.body_bytes}
    with harness.worker("send-batch", **options, in_flight=4, batch=BATCH_MESSAGES) as filler:
        filler.run({"messages": messages}, timeout_s=FILL_TIMEOUT_S)


def _as_empty(measured: Measured) -> dict[str, Any]:
    """Bar and baseline: 90 % of what the empty broker did in the same rounds."""
    measured.baselines["empty"] = measured.per_s("empty")
    return against(measured, "empty", 0.9, at_least=True)


def _drains(harness: Harness, clusters: dict[str, Cluster]) -> Measured:
    topic = f"{TOPIC}-drained"
    count = harness.settings.drain_messages
    with ExitStack() as stack:
        variants = {}
        for name, cluster in clusters.items():
            cluster.create_topic(topic, queue_count=harness.settings.queue_count)
            fill_topic(harness, cluster, topic, count)
            load = stack.enter_context(harness.worker("pull", namesrv=cluster.namesrv, topic=topic))
            variants[name] = harness.loader(load, cluster, {"messages": count, "timeout_s": DRAIN_TIMEOUT_S})
        return harness.rounds((), variants)


def _arrivals(sender: Worker, holders: list[Worker], count: int) -> Sample:
    """One message to every consumer; when they had arrived."""
    for holder in holders:
        holder.run({"forget": True})
    sender.run({"seconds": count / HOLDING_RATE})
    total = Sample(0, 0.0, Histogram())
    for holder in holders:
        reply = holder.run({"messages": count // len(holders), "timeout_s": SETTLE_TIMEOUT_S})
        total.messages += reply["messages"]
        total.latency.add(Histogram.from_json(reply["latency"]))
    return total


def _wait_held(cluster: Cluster, count: int) -> None:
    """Until the broker holds so many pulls."""
    deadline = time.monotonic() + SETTLE_TIMEOUT_S
    with grpc.insecure_channel(cluster.broker_address) as channel:
        admin = admin_pb2_grpc.BrokerAdminStub(channel)
        while True:
            held = admin.DescribeBroker(admin_pb2.DescribeBrokerRequest(), timeout=CALL_TIMEOUT_S).held_pull_count
            if held >= count:
                return
            if time.monotonic() > deadline:
                raise BenchError(f"the broker holds {held} pulls, not {count}")
            time.sleep(0.05)


def _stored(cluster: Cluster) -> int:
    """Messages in the topic."""
    with grpc.insecure_channel(cluster.broker_address) as channel:
        admin = admin_pb2_grpc.BrokerAdminStub(channel)
        found = admin.DescribeTopic(admin_pb2.DescribeTopicRequest(topic=TOPIC), timeout=CALL_TIMEOUT_S)
    return sum(queue.max_offset - queue.min_offset for queue in found.queues)
