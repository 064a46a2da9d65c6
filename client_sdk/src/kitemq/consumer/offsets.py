"""Where a group's offsets are kept: on the brokers, or for broadcasting in a file of this machine."""

from __future__ import annotations

import asyncio
import json
import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Protocol

from kitemq.consumer.options import Position, Start, timestamp_ms
from kitemq.errors import BrokerUnavailableError, GroupNotFoundError, KiteMQError
from kitemq.message import MessageQueue
from kitemq.proto.v1 import broker_pb2, broker_pb2_grpc, message_pb2
from kitemq.route import RouteCache
from kitemq.rpc import Channels, call

logger = logging.getLogger(__name__)

OFFSET_TIMEOUT_S = 5.0
OFFSETS_PER_COMMIT = 8192


@dataclass(slots=True)
class Saved:
    """What a commit achieved: the offsets that are kept now, and what went wrong with the others."""

    offsets: dict[MessageQueue, int] = field(default_factory=dict)
    errors: list[KiteMQError] = field(default_factory=list)


class OffsetStore(Protocol):
    """Where offsets are kept."""

    async def load(self, queues: Sequence[MessageQueue]) -> dict[MessageQueue, int | None]:
        """What is committed; None = nothing. A queue whose broker does not answer is missing from the result."""

    async def save(
        self,
        offsets: Mapping[MessageQueue, int],
        *,
        durable: bool,
        reset: bool = False,
        last_epochs: Mapping[MessageQueue, int] | None = None,
    ) -> Saved:
        """Commit. durable: return once it cannot be lost. reset: move backwards too.

        last_epochs: epoch of the last record read, where one is known: history that a crash took is not committed.
        """


class Brokers:
    """Unary calls to the master of a queue's broker group."""

    def __init__(self, routes: RouteCache, channels: Channels) -> None:
        self._routes = routes
        self._channels = channels
        self._stubs: dict[str, broker_pb2_grpc.BrokerAsyncStub] = {}

    def stub(self, address: str) -> broker_pb2_grpc.BrokerAsyncStub:
        stub = self._stubs.get(address)
        if stub is None:
            stub = self._stubs[address] = broker_pb2_grpc.BrokerStub(self._channels.get(address))
        return stub

    async def master(self, broker_name: str, topic: str) -> str:
        """Its address. Raises BrokerUnavailableError while it has none, TopicNotFoundError."""
        route = await self._routes.get(topic)
        address = route.master(broker_name)
        if address is None:
            route = await self._routes.get(topic, refresh=True)
            address = route.master(broker_name)
        if address is None:
            raise BrokerUnavailableError(f"broker {broker_name!r} has no master now", topic=topic)
        return address

    async def after(self, error: KiteMQError, topic: str) -> None:
        """Read the route again where the error says so."""
        if error.refresh_route:
            try:
                await self._routes.get(topic, refresh=True)
            except KiteMQError as failed:
                logger.debug("consumer: no route topic=%s error=%s", topic, failed)

    async def bounds(
        self, broker_name: str, topic: str, queue_ids: Iterable[int], *, at_timestamp_ms: int | None = None
    ) -> dict[int, broker_pb2.QueueOffsets]:
        """What a broker says of some queues of a topic."""
        address = await self.master(broker_name, topic)
        request = broker_pb2.GetQueueOffsetsRequest(
            topic=topic, queue_ids=sorted(queue_ids), timestamp_ms=at_timestamp_ms
        )
        response = await call(
            self.stub(address).GetQueueOffsets, request, timeout_s=OFFSET_TIMEOUT_S, address=address, topic=topic
        )
        return {queue.queue_id: queue for queue in response.queues}

    async def start_offset(self, queue: MessageQueue, start: Start) -> int:
        """The queue offset at `start`. Raises the error table's errors."""
        at = timestamp_ms(start) if isinstance(start, datetime) else None
        bounds = await self.bounds(queue.broker_name, queue.topic, [queue.queue_id], at_timestamp_ms=at)
        return offset_at(bounds[queue.queue_id], start) if queue.queue_id in bounds else 0


def offset_at(bounds: broker_pb2.QueueOffsets, start: Start) -> int:
    """Which of a queue's offsets `start` means."""
    if isinstance(start, datetime):
        return bounds.offset_at_timestamp
    return bounds.min_offset if start is Position.FIRST else bounds.max_offset


class BrokerOffsets:
    """Offsets of a group, each kept by the broker that has the queue."""

    def __init__(self, group: str, client_id: str, brokers: Brokers) -> None:
        self._group = group
        self._client_id = client_id
        self._brokers = brokers

    async def load(self, queues: Sequence[MessageQueue]) -> dict[MessageQueue, int | None]:
        """See OffsetStore."""
        by_topic: dict[tuple[str, str], list[MessageQueue]] = {}
        for queue in queues:
            by_topic.setdefault((queue.broker_name, queue.topic), []).append(queue)
        found: dict[MessageQueue, int | None] = {}

        async def ask(broker_name: str, topic: str, queues: list[MessageQueue]) -> None:
            try:
                address = await self._brokers.master(broker_name, topic)
                response = await call(
                    self._brokers.stub(address).GetOffsets,
                    broker_pb2.GetOffsetsRequest(
                        group=self._group, topic=topic, queue_ids=[queue.queue_id for queue in queues]
                    ),
                    timeout_s=OFFSET_TIMEOUT_S,
                    address=address,
                    topic=topic,
                )
            except GroupNotFoundError:
                found.update(dict.fromkeys(queues))
                return
            except KiteMQError as error:
                logger.info("consumer: offsets unknown group=%s broker=%s error=%s", self._group, broker_name, error)
                await self._brokers.after(error, topic)
                return
            offsets = {item.queue_id: item.queue_offset for item in response.offsets}
            for queue in queues:
                found[queue] = offsets.get(queue.queue_id)

        await asyncio.gather(*(ask(name, topic, items) for (name, topic), items in by_topic.items()))
        return found

    async def save(
        self,
        offsets: Mapping[MessageQueue, int],
        *,
        durable: bool,
        reset: bool = False,
        last_epochs: Mapping[MessageQueue, int] | None = None,
    ) -> Saved:
        """See OffsetStore."""
        by_broker: dict[str, list[MessageQueue]] = {}
        for queue in offsets:
            by_broker.setdefault(queue.broker_name, []).append(queue)
        saved = Saved()
        epochs = last_epochs or {}

        async def commit(broker_name: str, queues: list[MessageQueue]) -> None:
            request = broker_pb2.CommitOffsetsRequest(
                client_id=self._client_id,
                durable=durable,
                last_epochs=[epochs.get(queue, 0) for queue in queues],
                offsets=[
                    message_pb2.GroupOffset(
                        group=self._group,
                        topic=queue.topic,
                        queue_id=queue.queue_id,
                        queue_offset=offsets[queue],
                        reset=reset,
                    )
                    for queue in queues
                ],
            )
            try:
                address = await self._brokers.master(broker_name, queues[0].topic)
                stub = self._brokers.stub(address)
                await call(stub.CommitOffsets, request, timeout_s=OFFSET_TIMEOUT_S, address=address)
                saved.offsets.update({queue: offsets[queue] for queue in queues})
            except KiteMQError as error:
                saved.errors.append(error)
                await self._brokers.after(error, queues[0].topic)

        await asyncio.gather(
            *(
                commit(name, queues[start : start + OFFSETS_PER_COMMIT])
                for name, queues in by_broker.items()
                for start in range(0, len(queues), OFFSETS_PER_COMMIT)
            )
        )
        return saved


class LocalOffsets:
    """Offsets of one broadcasting consumer, in a JSON file or (path None) in memory only.

    The file is replaced as a whole: written to a temporary name, fsynced, renamed, the directory fsynced.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._offsets: dict[MessageQueue, int] | None = None
        self._saving = asyncio.Lock()

    async def load(self, queues: Sequence[MessageQueue]) -> dict[MessageQueue, int | None]:
        """See OffsetStore."""
        offsets = self._offsets
        if offsets is None:
            offsets = self._offsets = {} if self._path is None else await asyncio.to_thread(_read, self._path)
        return {queue: offsets.get(queue) for queue in queues}

    async def save(
        self,
        offsets: Mapping[MessageQueue, int],
        *,
        durable: bool,
        reset: bool = False,
        last_epochs: Mapping[MessageQueue, int] | None = None,
    ) -> Saved:
        """See OffsetStore."""
        async with self._saving:
            kept = self._offsets = {**(self._offsets or {}), **offsets}
            if self._path is not None:
                try:
                    await asyncio.to_thread(_write, self._path, kept)
                except OSError as error:
                    return Saved(errors=[KiteMQError(f"offsets cannot be written to {self._path}: {error.strerror}")])
        return Saved(offsets=dict(offsets))


def _read(path: Path) -> dict[MessageQueue, int]:
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))["offsets"]
        return {
            MessageQueue(entry["topic"], entry["broker_name"], entry["queue_id"]): int(entry["queue_offset"])
            for entry in entries
        }
    except FileNotFoundError:
        return {}
    except (ValueError, KeyError, TypeError) as error:
        aside = path.with_suffix(".damaged")
        path.replace(aside)
        logger.error("consumer: offsets file is damaged, kept as %s, starting without: %s", aside, error)
        return {}


def _write(path: Path, offsets: dict[MessageQueue, int]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    entries = [{**queue._asdict(), "queue_offset": offset} for queue, offset in sorted(offsets.items())]
    with temporary.open("w", encoding="utf-8") as file:
        json.dump({"offsets": entries}, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
