"""Prometheus's view of a broker: RocketMQ's names and labels, and some of our own.

A scrape comes in by a thread of its own. What it asks of tables and queues is gathered on the loop, group by group, so
that it neither races with nor delays anything.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Iterator
from itertools import accumulate
from typing import TYPE_CHECKING

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from kitemq.proto.v1.broker_pb2 import ConsumeType
from kitemq.protocol.names import RETRY_PREFIX
from kitemq_server.broker.metrics import SECONDS_BUCKETS, SIZE_BUCKETS

if TYPE_CHECKING:
    from kitemq_server.broker.server import Broker

GATHER_TIMEOUT_S = 10.0
COMMON_LABELS = ("cluster", "node_type", "node_id")
STORAGE_LABELS = ("storage_type", "storage_medium")
STORAGE = ("local", "disk")
MESSAGE_TYPE = "normal"
PROTOCOL = "grpc"


class BrokerCollector(Collector):
    """Made on the broker's loop, asked from the scraper's thread while that loop runs."""

    def __init__(self, broker: Broker) -> None:
        self._broker = broker
        self._loop = asyncio.get_running_loop()
        self._common = (broker.config.cluster_name, "broker", broker.config.broker_name)

    def collect(self) -> Iterator[Metric]:
        """All families."""
        gathered = asyncio.run_coroutine_threadsafe(self._gather(), self._loop)
        yield from gathered.result(GATHER_TIMEOUT_S)

    async def _gather(self) -> list[Metric]:
        return [
            *self._messages(),
            *await self._lag(),
            *self._connections(),
            *self._tables(),
            *self._storage(),
        ]

    def _gauge(self, name: str, text: str, labels: Iterable[str] = ()) -> GaugeMetricFamily:
        return GaugeMetricFamily(name, text, labels=(*COMMON_LABELS, *labels))

    def _counter(self, name: str, text: str, labels: Iterable[str] = ()) -> CounterMetricFamily:
        return CounterMetricFamily(name, text, labels=(*COMMON_LABELS, *labels))

    def _is_system(self, topic: str) -> str:
        config = self._broker.store.topics.get(topic)
        return "true" if config is not None and config.system else "false"

    def _messages(self) -> list[Metric]:
        labels = ("topic", "message_type", "is_system")
        messages_in = self._counter("rocketmq_messages_in", "Messages stored.", labels)
        bytes_in = self._counter("rocketmq_throughput_in", "Bytes stored.", labels)
        size = HistogramMetricFamily("rocketmq_message_size", "Bytes of a message.", labels=(*COMMON_LABELS, *labels))
        bounds = (*(str(float(bound)) for bound in SIZE_BUCKETS), "+Inf")
        for topic, counts in self._broker.counts.topics.items():
            values = [*self._common, topic, MESSAGE_TYPE, self._is_system(topic)]
            messages_in.add_metric(values, counts.messages)
            bytes_in.add_metric(values, counts.bytes)
            size.add_metric(values, list(zip(bounds, accumulate(counts.sizes), strict=True)), counts.bytes)
        out_labels = ("topic", "consumer_group", "is_system", "is_retry")
        messages_out = self._counter("rocketmq_messages_out", "Messages read.", out_labels)
        bytes_out = self._counter("rocketmq_throughput_out", "Bytes read.", out_labels)
        for (topic, group), out in self._broker.counts.groups.items():
            values = [*self._common, topic, group, self._is_system(topic), _is_retry(topic)]
            messages_out.add_metric(values, out.messages)
            bytes_out.add_metric(values, out.bytes)
        return [messages_in, bytes_in, size, messages_out, bytes_out]

    async def _lag(self) -> list[Metric]:
        labels = ("consumer_group", "topic", "is_retry", "is_system")
        messages = self._gauge("rocketmq_consumer_lag_messages", "Messages not yet committed by a group.", labels)
        latency = self._gauge(
            "rocketmq_consumer_lag_latency_milliseconds", "Age of the oldest message not yet committed.", labels
        )
        lags = self._broker.lags
        now_ms = self._broker.clock.wall_ms()
        for group in list(self._broker.store.offsets.groups()):
            oldest = lags.oldest_ms(group)
            for topic, count in lags.messages(group).items():
                values = (*self._common, group, topic, _is_retry(topic), self._is_system(topic))
                messages.add_metric(values, count)
                latency.add_metric(values, max(0, now_ms - oldest[topic]) if topic in oldest else 0)
            await asyncio.sleep(0)
        return [messages, latency]

    def _connections(self) -> list[Metric]:
        labels = ("language", "version", "protocol_type")
        producers = self._gauge("rocketmq_producer_connections", "Clients that produce.", labels)
        consumers = self._gauge(
            "rocketmq_consumer_connections", "Members of a group.", (*labels, "consumer_group", "consume_mode")
        )
        producing: dict[tuple[str, ...], int] = {}
        consuming: dict[tuple[str, ...], int] = {}
        for client in self._broker.membership.registry:
            who = (client.language, client.version, PROTOCOL)
            if client.producer_groups:
                producing[who] = producing.get(who, 0) + 1
            for group, info in client.consumers.items():
                mode = ConsumeType.Name(info.consume_type) if info.consume_type in ConsumeType.values() else "unknown"
                consuming[(*who, group, mode)] = consuming.get((*who, group, mode), 0) + 1
        for values, count in producing.items():
            producers.add_metric((*self._common, *values), count)
        for values, count in consuming.items():
            consumers.add_metric((*self._common, *values), count)
        return [producers, consumers]

    def _tables(self) -> list[Metric]:
        broker = self._broker
        watermark = self._gauge("rocketmq_processor_watermark", "Requests that wait.", ("processor",))
        watermark.add_metric((*self._common, "send"), broker.sends.waiting_count)
        watermark.add_metric((*self._common, "pull"), len(broker.holds))
        plain = (
            ("rocketmq_topic_number", "Topics.", len(broker.store.topics)),
            ("rocketmq_consumer_group_number", "Consumer groups.", len(broker.store.groups)),
            ("rocketmq_broker_permission", "Bits: 4 read, 2 write.", broker.settings.live.permission),
            ("kitemq_queue_number", "Queues written or read since the start.", broker.store.queue_count),
            ("kitemq_client_number", "Clients by their heartbeats.", len(broker.membership.registry)),
            ("kitemq_subscription_number", "Subscriptions of Pull streams.", broker.pulls.subscription_count),
            ("kitemq_send_waiting_bytes", "Stored, not yet answered.", broker.sends.waiting_bytes),
        )
        return [watermark, *self._plain(plain)]

    def _storage(self) -> list[Metric]:
        store = self._broker.store
        behind = store.written_offset - store.flushed_offset
        plain: tuple[tuple[str, str, float], ...] = (
            ("rocketmq_storage_size_bytes", "Bytes of the log.", store.store_bytes),
            ("rocketmq_storage_flush_behind_bytes", "Written, not yet on disk.", behind),
            (
                "kitemq_storage_confirm_behind_bytes",
                "Written, not yet confirmed.",
                store.written_offset - store.confirm_offset,
            ),
            ("kitemq_storage_disk_free_bytes", "Free on the store's file system.", store.disk_free_bytes),
            ("kitemq_storage_full", "1 = the disk is full and sends are refused.", int(store.full)),
        )
        oldest = store.read_record(store.min_physical_offset)
        if oldest is not None:
            age_ms = max(0, self._broker.clock.wall_ms() - oldest.store_timestamp_ms)
            plain += (("rocketmq_storage_message_reserve_time_milliseconds", "Age of the oldest record.", age_ms),)
        damaged = self._counter("kitemq_damaged_records", "Damaged records found since the start.")
        damaged.add_metric(self._common, store.damaged_record_count)
        lost = self._counter(
            "kitemq_deleted_unconsumed_messages", "Deleted before a group had consumed them.", ("consumer_group",)
        )
        for group, count in store.deleted_unconsumed.items():
            lost.add_metric((*self._common, group), count)
        fsyncs = self._broker.counts.fsyncs
        fsync = HistogramMetricFamily("kitemq_storage_fsync_seconds", "Duration of a flush.", labels=COMMON_LABELS)
        bounds = (*map(str, SECONDS_BUCKETS), "+Inf")
        fsync.add_metric(self._common, list(zip(bounds, accumulate(fsyncs.counts), strict=True)), fsyncs.sum_s)
        return [*self._plain(plain, STORAGE_LABELS, STORAGE), damaged, lost, fsync]

    def _plain(
        self,
        values: Iterable[tuple[str, str, float]],
        labels: tuple[str, ...] = (),
        label_values: tuple[str, ...] = (),
    ) -> Iterator[Metric]:
        for name, text, value in values:
            gauge = self._gauge(name, text, labels)
            gauge.add_metric((*self._common, *label_values), value)
            yield gauge


def _is_retry(topic: str) -> str:
    return "true" if topic.startswith(RETRY_PREFIX) else "false"
