"""Producers of a history: what they send, number, and send again."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field

from kitemq.proto.v1 import message_pb2
from kitemq.protocol.record import tags_code
from kitemq_server.store.batch import ClientBatch
from tests.crash.model import QueueName

KEYS = tuple(f"key-{number}" for number in range(6))
TAGS = ("", "red", "green")
EQUAL_BODY_BYTES = 40


@dataclass(slots=True)
class Sent:
    """A batch as it was first handed in. end_offset: what has to be confirmed; None = the append failed."""

    batch: ClientBatch
    end_offset: int | None = None
    settled: bool = False  # known to be confirmed, or given up

    @property
    def queue(self) -> QueueName:
        """Where it was sent to."""
        return self.batch.topic, self.batch.queue_id

    def identities(self) -> list[tuple[int, int] | str]:
        """By what each message is found again."""
        batch = self.batch
        if batch.first_sequence:
            return [(batch.producer_instance, batch.first_sequence + index) for index in range(len(batch.parts))]
        return list(batch.message_ids)


@dataclass(slots=True)
class Producer:
    """instance: 0 = a client that has no sequences, only message ids."""

    instance: int
    sequences: dict[QueueName, int] = field(default_factory=dict)
    sent: list[Sent] = field(default_factory=list)
    count: int = 0

    def batch(self, queue: QueueName, count: int, rng: random.Random, *, equal: bool) -> Sent:
        """`count` new messages for a queue. equal: records of one size."""
        topic, queue_id = queue
        first = self.sequences.get(queue, 0) + 1
        self.sequences[queue] = first + count - 1
        messages = []
        for index in range(count):
            self.count += 1
            message = message_pb2.Message(
                topic=topic,
                body=rng.randbytes(EQUAL_BODY_BYTES if equal else rng.choice((1, 300, 1200))),
                tag="" if equal else rng.choice(TAGS),
                message_id=f"{self.instance:016x}{self.count:016x}",
                born_timestamp_ms=1,
            )
            if not equal and rng.random() < 0.5:
                message.keys.append(rng.choice(KEYS))
            if self.instance:
                message.producer_instance = self.instance
                message.sequence = first + index
            messages.append(message)
        sent = Sent(
            ClientBatch(
                topic=topic,
                queue_id=queue_id,
                parts=[message.SerializeToString() for message in messages],
                tags_codes=[tags_code(message.tag) for message in messages],
                message_ids=[message.message_id for message in messages],
                keys=[list(message.keys) for message in messages] if any(message.keys for message in messages) else (),
                producer_instance=self.instance,
                first_sequence=first if self.instance else 0,
            )
        )
        self.sent.append(sent)
        return sent

    def unsettled(self) -> Sequence[Sent]:
        """Batches whose outcome is not known, in order."""
        return [sent for sent in self.sent if not sent.settled]

    def settle(self, confirm_offset: int) -> None:
        """The client has been told that everything below is confirmed."""
        for sent in self.sent:
            if sent.end_offset is not None and sent.end_offset <= confirm_offset:
                sent.settled = True
        del self.sent[:-15]
