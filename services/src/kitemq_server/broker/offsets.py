"""Consumer offsets and queue bounds: commit, look up, move."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from kitemq.errors import (
    InvalidRequestError,
    NotAllowedError,
    RequestTimeoutError,
)
from kitemq.proto.v1 import admin_pb2, broker_pb2
from kitemq.proto.v1.message_pb2 import GroupOffset, TopicConfig
from kitemq_server.broker.groups import Groups
from kitemq_server.broker.membership import Membership, check_client_id
from kitemq_server.broker.pull import diverged_at, diverged_error
from kitemq_server.broker.topics import Topics
from kitemq_server.store.message_store import MessageStore

OFFSETS_PER_COMMIT_MAX = 16_384
CONFIRM_TIMEOUT_S = 5.0


async def confirmed(store: MessageStore, end_offset: int) -> None:
    """Return once the log is confirmed up to here. Raises RequestTimeoutError when the disk takes too long."""
    if end_offset > store.confirm_offset and not await store.wait_confirmed(end_offset, CONFIRM_TIMEOUT_S):
        raise RequestTimeoutError("written, but the disk has not confirmed it in time: it may or may not last")


class Offsets:
    """What consumer groups have done and may do with their offsets."""

    def __init__(self, store: MessageStore, topics: Topics, groups: Groups, membership: Membership) -> None:
        self._store = store
        self._topics = topics
        self._groups = groups
        self._membership = membership

    async def commit(self, request: broker_pb2.CommitOffsetsRequest) -> None:
        """All of them, or none and an error of the table."""
        check_client_id(request.client_id)
        if len(request.offsets) > OFFSETS_PER_COMMIT_MAX:
            raise InvalidRequestError(
                f"commit has {len(request.offsets)} offsets: at most {OFFSETS_PER_COMMIT_MAX} in one request"
            )
        if request.last_epochs and len(request.last_epochs) != len(request.offsets):
            raise InvalidRequestError("last_epochs names one epoch for each offset, or none at all")
        last_epochs = request.last_epochs or [0] * len(request.offsets)
        for offset, last_epoch in zip(request.offsets, last_epochs, strict=True):
            self._check(offset, last_epoch)
        for group in {offset.group for offset in request.offsets}:
            self._groups.ensure(group)
        end = self._store.commit_offsets(request.offsets, durable=request.durable)
        if request.durable:
            await confirmed(self._store, end)

    def get(self, request: broker_pb2.GetOffsetsRequest) -> broker_pb2.GetOffsetsResponse:
        """What the group has committed. Raises GroupNotFoundError."""
        self._groups.check(request.group)
        if request.topic:
            self._topics.get(request.topic)
        wanted = set(request.queue_ids)
        return broker_pb2.GetOffsetsResponse(
            offsets=[
                GroupOffset(group=request.group, topic=topic, queue_id=queue_id, queue_offset=queue_offset)
                for (topic, queue_id), queue_offset in sorted(self._store.offsets.of_group(request.group).items())
                if (not request.topic or topic == request.topic) and (not wanted or queue_id in wanted)
            ]
        )

    async def bounds(self, request: broker_pb2.GetQueueOffsetsRequest) -> broker_pb2.GetQueueOffsetsResponse:
        """Bounds of the queues, and the first offset at or after a time where one is given."""
        config = self._topics.get(request.topic)
        timestamp_ms = request.timestamp_ms if request.HasField("timestamp_ms") else None
        response = broker_pb2.GetQueueOffsetsResponse()
        for queue_id in self.queue_ids(config, request.queue_ids):
            response.queues.append(self.queue_offsets(request.topic, queue_id, timestamp_ms))
            await asyncio.sleep(0)  # a topic may have thousands of queues, and each look reads the disk
        return response

    def queue_offsets(self, topic: str, queue_id: int, timestamp_ms: int | None = None) -> broker_pb2.QueueOffsets:
        queue = self._topics.queue(topic, queue_id)
        return broker_pb2.QueueOffsets(
            queue_id=queue_id,
            min_offset=queue.min_offset,
            max_offset=queue.max_offset,
            last_store_timestamp_ms=self._store.store_timestamp(queue, queue.max_offset - 1),
            offset_at_timestamp=0 if timestamp_ms is None else self._store.search_timestamp(queue, timestamp_ms),
        )

    async def reset(self, request: admin_pb2.ResetOffsetsRequest) -> admin_pb2.ResetOffsetsResponse:
        """Move the group's offsets in one topic; with dry_run only say what would move."""
        config = self._topics.get(request.topic)
        self._groups.get(request.group)
        moves = [self._move(request, queue_id) for queue_id in self.queue_ids(config, request.queue_ids)]
        if not request.dry_run:
            self._check_no_members(request)
            end = self._store.commit_offsets(
                [
                    GroupOffset(
                        group=request.group,
                        topic=request.topic,
                        queue_id=move.queue_id,
                        queue_offset=move.new_offset,
                        reset=True,
                    )
                    for move in moves
                ],
                durable=True,
            )
            await confirmed(self._store, end)
            self._membership.tell_offsets_reset(request.group)
        return admin_pb2.ResetOffsetsResponse(moves=moves)

    def _check(self, offset: GroupOffset, last_epoch: int) -> None:
        queue = self._topics.queue(offset.topic, offset.queue_id)
        if (diverged := diverged_at(self._store, queue, offset.queue_offset, last_epoch)) is not None:
            raise diverged_error(diverged)
        max_offset = queue.max_offset
        if offset.queue_offset > max_offset:
            raise InvalidRequestError(
                f"group {offset.group!r} commits offset {offset.queue_offset} in queue {offset.queue_id}, "
                f"which ends at {max_offset}",
                topic=offset.topic,
            )
        if offset.deleted:
            raise InvalidRequestError("`deleted` is written by brokers only", topic=offset.topic)

    def queue_ids(self, config: TopicConfig, wanted: Sequence[int]) -> Sequence[int]:
        for queue_id in wanted:
            self._topics.check_queue(config, queue_id)
        return sorted(set(wanted)) if wanted else range(config.read_queue_count)

    def _move(self, request: admin_pb2.ResetOffsetsRequest, queue_id: int) -> admin_pb2.OffsetMove:
        queue = self._topics.queue(request.topic, queue_id)
        match request.WhichOneof("target"):
            case "first":
                new_offset = queue.min_offset
            case "last":
                new_offset = queue.max_offset
            case "timestamp_ms":
                new_offset = self._store.search_timestamp(queue, request.timestamp_ms)
            case "queue_offset":
                new_offset = request.queue_offset
                if not queue.min_offset <= new_offset <= queue.max_offset:
                    raise InvalidRequestError(
                        f"queue {queue_id} holds offsets {queue.min_offset}..{queue.max_offset}: "
                        f"{new_offset} is not among them",
                        topic=request.topic,
                    )
            case _:
                raise InvalidRequestError("say where to: first, last, timestamp_ms or queue_offset")
        old_offset = self._store.offsets.get(request.group, request.topic, queue_id)
        return admin_pb2.OffsetMove(queue_id=queue_id, old_offset=old_offset, new_offset=new_offset)

    def _check_no_members(self, request: admin_pb2.ResetOffsetsRequest) -> None:
        members = self._membership.registry.members(request.group)
        if members and not request.force:
            raise NotAllowedError(
                f"group {request.group!r} has {len(members)} active members, which would commit over it: "
                "stop them first, or reset with force"
            )
