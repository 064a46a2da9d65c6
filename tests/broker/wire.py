"""What tests send to a broker by hand: producers' parts, batches, requests, and streams without the SDK."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import grpc
import grpc.aio

from kitemq.proto.v1 import admin_pb2_grpc, broker_pb2, broker_pb2_grpc
from kitemq.proto.v1.message_pb2 import Message, Segment
from kitemq.protocol.names import GRPC_BYTES_MAX
from kitemq.protocol.record import U32, frame_header

OPTIONS = [("grpc.max_receive_message_length", GRPC_BYTES_MAX), ("grpc.max_send_message_length", GRPC_BYTES_MAX)]
HOLD = 0xFFFF_FFFF
PATIENCE_S = 10.0


def message(
    topic: str,
    body: bytes = b"body",
    *,
    instance: int = 7,
    sequence: int = 1,
    message_id: str | None = None,
    tag: str = "",
    keys: Sequence[str] = (),
    properties: Mapping[str, str] | None = None,
) -> Message:
    return Message(
        topic=topic,
        body=body,
        tag=tag,
        keys=keys,
        properties=properties or {},
        message_id=f"{instance:016x}{sequence:016x}" if message_id is None else message_id,
        born_timestamp_ms=1_700_000_000_000,
        producer_instance=instance,
        sequence=sequence if instance else 0,
        producer_group="tests",
    )


def batch(
    messages: Sequence[Message], *, queue_id: int = 0, resume: bool = False, **fields: Any
) -> broker_pb2.QueueBatch:
    parts = [item.SerializeToString() for item in messages]
    return broker_pb2.QueueBatch(
        topic=messages[0].topic,
        queue_id=queue_id,
        records=b"".join(frame_header(len(part)) + part for part in parts),
        sizes=[len(part) for part in parts],
        resume=resume,
        **fields,
    )


def numbered(topic: str, first: int, count: int, *, instance: int = 7, **fields: Any) -> list[Message]:
    """`count` messages with sequences from `first`, whose bodies say the sequence."""
    return [
        message(topic, f"{sequence}".encode(), instance=instance, sequence=sequence, **fields)
        for sequence in range(first, first + count)
    ]


class SendClient:
    """One Send stream."""

    def __init__(self, channel: Any) -> None:
        self.call = broker_pb2_grpc.BrokerStub(channel).Send()
        self._number = 0

    async def write(self, *batches: broker_pb2.QueueBatch) -> int:
        self._number += 1
        await self.call.write(broker_pb2.SendRequest(number=self._number, batches=batches))
        return self._number

    async def read(self) -> list[broker_pb2.SendResult]:
        async with asyncio.timeout(PATIENCE_S):
            response = await self.call.read()
        assert response is not grpc.aio.EOF, "the stream has ended"
        return list(response.results)

    async def results(self, count: int) -> dict[int, list[broker_pb2.BatchResult]]:
        """The next `count` results by request number."""
        results: dict[int, list[broker_pb2.BatchResult]] = {}
        while len(results) < count:
            for result in await self.read():
                assert result.number not in results
                results[result.number] = list(result.batches)
        return results

    async def send(self, *batches: broker_pb2.QueueBatch) -> list[broker_pb2.BatchResult]:
        number = await self.write(*batches)
        return (await self.results(1))[number]


class Reply:
    """A pull reply, taken apart as the SDK does it."""

    def __init__(self, raw: bytes) -> None:
        assert raw[-5] == 0x7D
        header_bytes = U32.unpack(raw[-4:])[0]
        self.records = raw[: len(raw) - header_bytes]
        self.header = broker_pb2.PullResponse.FromString(raw[len(raw) - header_bytes :])
        assert self.header.header_bytes == header_bytes
        assert sum(self.header.sizes) == len(self.records)
        whole = broker_pb2.PullResponse.FromString(raw)
        self.messages = list(Segment.FromString(self.records).records)
        assert list(whole.records) == self.messages
        assert len(self.messages) == len(self.header.sizes)

    @property
    def bodies(self) -> list[bytes]:
        return [item.body for item in self.messages]


class PullClient:
    """One Pull stream."""

    def __init__(self, channel: Any) -> None:
        self.call = channel.stream_stream(
            "/kitemq.v1.Broker/Pull", request_serializer=broker_pb2.PullRequest.SerializeToString
        )()
        self._number = 0

    async def open(self, topic: str, queue_id: int = 0, **fields: Any) -> int:
        self._number += 1
        fields = {"credit_messages": 1000, "credit_bytes": 1 << 30, "suspend_ms": HOLD, **fields}
        await self.call.write(broker_pb2.PullRequest(number=self._number, topic=topic, queue_id=queue_id, **fields))
        return self._number

    async def write(self, **fields: Any) -> None:
        await self.call.write(broker_pb2.PullRequest(**fields))

    async def read(self) -> Reply:
        async with asyncio.timeout(PATIENCE_S):
            raw = await self.call.read()
        assert raw is not grpc.aio.EOF, "the stream has ended"
        return Reply(raw)


class Client:
    """Everything of one broker over one connection."""

    def __init__(self, address: str, *options: tuple[str, int]) -> None:
        self.address = address
        # Calls are made with raw bytes too, and what comes back is looked into: typed by what the tests assert.
        self.channel: Any = grpc.aio.insecure_channel(address, options=[*OPTIONS, *options])
        self.broker: Any = broker_pb2_grpc.BrokerStub(self.channel)
        self.admin: Any = admin_pb2_grpc.BrokerAdminStub(self.channel)

    def send_stream(self) -> SendClient:
        return SendClient(self.channel)

    def pull_stream(self) -> PullClient:
        return PullClient(self.channel)

    async def close(self) -> None:
        await self.channel.close()


class Refusal:
    """What `refused` caught."""

    error: grpc.aio.AioRpcError

    @property
    def code(self) -> grpc.StatusCode:
        return self.error.code()

    @property
    def text(self) -> str:
        return self.error.details() or ""

    @property
    def name(self) -> str:
        return str(dict(self.error.trailing_metadata() or ()).get("kitemq-error", ""))


@contextmanager
def refused(name: str) -> Iterator[Refusal]:
    """The call inside is refused with this class of the error table."""
    refusal = Refusal()
    try:
        yield refusal
    except grpc.aio.AioRpcError as error:
        refusal.error = error
        assert refusal.name == name, f"{refusal.name or error.code()}: {error.details()}"
    else:
        raise AssertionError(f"not refused, expected {name}")


async def until(condition: Any, *, what: str = "the condition") -> None:
    """Wait until `condition()` is true."""
    try:
        async with asyncio.timeout(PATIENCE_S):
            while not condition():  # noqa: ASYNC110 - the condition is any function
                await asyncio.sleep(0.005)
    except TimeoutError:
        raise AssertionError(f"not in {PATIENCE_S} s: {what}") from None
