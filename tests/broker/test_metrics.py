"""What Prometheus gets to see."""

from __future__ import annotations

import asyncio
import urllib.request

from prometheus_client.parser import text_string_to_metric_families

from kitemq.proto.v1.broker_pb2 import CommitOffsetsRequest, ConsumerInfo, HeartbeatRequest
from kitemq.proto.v1.message_pb2 import GroupOffset
from kitemq_server.broker.metrics import MessageCounts
from kitemq_server.store.batch import OffsetRun
from tests.broker.conftest import Start
from tests.broker.wire import Client, batch, message, numbered

COMMON = {"cluster": "DefaultCluster", "node_type": "broker", "node_id": "broker-a"}


async def scrape(port: int | None) -> dict[str, list[tuple[dict[str, str], float]]]:
    def fetch() -> str:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as response:
            return str(response.read(), "utf-8")

    samples: dict[str, list[tuple[dict[str, str], float]]] = {}
    for family in text_string_to_metric_families(await asyncio.to_thread(fetch)):
        for sample in family.samples:
            samples.setdefault(sample.name, []).append((sample.labels, sample.value))
    return samples


async def test_rocketmqs_names_and_labels(start: Start) -> None:
    async with start(metrics_listen="127.0.0.1:0") as handle:
        client = Client(handle.address)
        send, pull = client.send_stream(), client.pull_stream()
        await send.send(
            batch([message("orders", b"x" * size, sequence=n) for n, size in ((1, 10), (2, 2000), (3, 10))])
        )
        await send.send(batch(numbered("orders", 1, 3), resume=True))  # repeats are not counted again
        await pull.open("orders", group="g", credit_messages=2)
        assert len((await pull.read()).messages) == 2
        offset = GroupOffset(group="g", topic="orders", queue_id=0, queue_offset=1)
        await client.broker.CommitOffsets(CommitOffsetsRequest(client_id="c", offsets=[offset]))
        consumers = [ConsumerInfo(group="g")]
        await client.broker.Heartbeat(
            HeartbeatRequest(client_id="c", language="py", version="1", producer_groups=["p"], consumers=consumers)
        )
        samples = await scrape(handle.metrics_port)

        def value(name: str, **labels: str) -> float:
            found = [value for got, value in samples[name] if labels.items() <= got.items()]
            assert len(found) == 1, (name, labels, samples[name])
            return found[0]

        topic = {**COMMON, "topic": "orders", "is_system": "false"}
        assert value("rocketmq_messages_in_total", **topic, message_type="normal") == 3
        assert value("rocketmq_throughput_in_total", **topic) > 2020
        assert value("rocketmq_message_size_bucket", **topic, le="1024.0") == 2
        assert value("rocketmq_message_size_bucket", **topic, le="4096.0") == 3
        assert value("rocketmq_messages_out_total", **topic, consumer_group="g") == 2
        assert value("rocketmq_consumer_lag_messages", **topic, consumer_group="g", is_retry="false") == 2
        assert value("rocketmq_consumer_lag_latency_milliseconds", consumer_group="g") >= 0
        assert value("rocketmq_producer_connections", **COMMON, language="py", version="1") == 1
        assert value("rocketmq_consumer_connections", consumer_group="g", consume_mode="CONSUME_ACTIVELY") == 1
        assert value("rocketmq_topic_number", **COMMON) == 3
        assert value("rocketmq_consumer_group_number", **COMMON) == 1
        assert value("rocketmq_broker_permission", **COMMON) == 6
        assert value("rocketmq_processor_watermark", processor="send") == 0
        assert value("rocketmq_storage_size_bytes", storage_medium="disk") > 2020
        assert value("rocketmq_storage_flush_behind_bytes") >= 0
        assert value("rocketmq_storage_message_reserve_time_milliseconds") >= 0
        assert value("kitemq_damaged_records_total") == 0
        assert value("kitemq_storage_fsync_seconds_count") >= 0
        calls = {"request_code": "Broker/Heartbeat", "response_code": "OK"}
        assert value("rocketmq_rpc_latency_milliseconds_count", **calls) == 1
        await client.close()


def test_a_repeat_in_part_counts_what_is_new() -> None:
    counts = MessageCounts()
    runs = [OffsetRun(0, 2, repeated=True, unknown=False, queue_id=0), OffsetRun(2, 1, False, False, 0)]
    counts.count_in("t", [b"a", b"bb", b"ccc"], runs)
    assert (counts.topics["t"].messages, counts.topics["t"].bytes) == (1, 3)
    counts.count_in("t", [b"a"], [OffsetRun(0, 1, repeated=True, unknown=False, queue_id=0)])
    assert counts.messages_in == 1
    counts.out("t", "g").messages += 1
    counts.forget_topic("t")
    assert not counts.topics
    assert not counts.groups
