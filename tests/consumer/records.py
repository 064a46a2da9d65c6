"""Records as a broker stores them, and chunks of them."""

from __future__ import annotations

from kitemq.consumer.held_queue import Chunk, HeldQueue
from kitemq.message import MessageQueue
from kitemq.proto.v1 import message_pb2
from kitemq.protocol import record as r

QUEUE = MessageQueue("orders", "broker-a", 0)


def record(queue_offset: int, *, body: bytes = b"x", tag: str = "", queue_id: int = 0, epoch: int = 1) -> bytes:
    """One framed record; its checksum is not right."""
    message = message_pb2.Message(topic="orders", body=body, tag=tag, message_id=f"{queue_offset:032x}")
    fields = [(r.KEY_RECORD_KIND, r.KIND_MESSAGE), (r.KEY_QUEUE_ID, queue_id), (r.KEY_QUEUE_OFFSET, queue_offset)]
    fields += [(r.KEY_PHYSICAL_OFFSET, queue_offset * 100), (r.KEY_STORE_TIMESTAMP, 1_700_000_000_000)]
    fields += [(r.KEY_EPOCH, epoch), (r.KEY_FLUSHED_OFFSET, 0), (r.KEY_FLAGS, 0), (r.KEY_CRC, 0)]
    values = [value for field in fields for value in field]
    payload = message.SerializeToString() + r.TRAILER.pack(*values[:16]) + r.CRC.pack(*values[16:])
    return r.frame_header(len(payload)) + payload


def held_queue(offset: int = 0) -> HeldQueue:
    return HeldQueue(QUEUE, filter="*", offset=offset, committed=None)


def add_chunk(held: HeldQueue, offsets: list[int], *, next_offset: int | None = None) -> Chunk:
    """A reply with these queue offsets arrives."""
    records = [record(offset) for offset in offsets]
    sizes = [len(item) for item in records]
    chunk = Chunk(
        held,
        b"".join(records),
        sizes,
        records_bytes=sum(sizes),
        first_offset=offsets[0],
        sparse=offsets != list(range(offsets[0], offsets[0] + len(offsets))),
    )
    held.add(chunk, next_offset=next_offset or offsets[-1] + 1, last_epoch=1)
    return chunk
