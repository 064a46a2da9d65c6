"""What the clients of a history do: producers that send and send again, administrators, consumers."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

from kitemq.errors import BrokerBusyError, BrokerUnavailableError, StoreFullError
from kitemq.proto.v1 import message_pb2
from kitemq_server.store.batch import OffsetRun
from kitemq_server.store.message_store import MessageStore
from tests.crash import checks
from tests.crash.crash_disk import CrashDisk
from tests.crash.fault_plan import PowerLossError
from tests.crash.model import UNKNOWN, Model, StoredMessage
from tests.crash.producers import Producer, Sent

TOPICS = ("orders", "audit")
QUEUE_COUNT = 2
GROUPS = ("billing", "shipping")


class Clients:
    """Everything that is asked of a store, and what the model makes of the answers."""

    def __init__(self, disk: CrashDisk, *, equal: bool) -> None:
        self.disk = disk
        self.equal = equal  # records of one size
        self.store: MessageStore | None = None
        self.model = Model()
        self.producers = [Producer(0), Producer(0xA1), Producer(0xB2)]
        self.refused_count = 0  # appends for want of space

    @property
    def opened(self) -> MessageStore:
        """The store, which is open."""
        assert self.store is not None
        return self.store

    def send(self, rng: random.Random) -> None:
        """One append of new messages to one or more queues."""
        batches: list[Sent] = []
        for _ in range(rng.choice((1, 1, 2, 3))):
            queue = (rng.choice(TOPICS), rng.randrange(QUEUE_COUNT))
            producer = rng.choice(self.producers)
            if all(other.batch.topic != queue[0] or other.batch.queue_id != queue[1] for other in batches):
                batches.append(producer.batch(queue, rng.choice((1, 1, 2, 5)), rng, equal=self.equal))
        self.append(batches)

    def send_again(self, rng: random.Random) -> None:
        """A repeat, as a client sends it whose answer was lost: of one batch, settled or not."""
        producer = rng.choice(self.producers)
        # A sequence that has been overtaken by a lost one is never sent again: a client keeps the order of a queue.
        unsettled = {sent.queue for sent in producer.unsettled()}
        candidates = [sent for sent in producer.sent if sent.queue not in unsettled]
        if candidates:
            self.append([rng.choice(candidates)])

    def append(self, batches: list[Sent]) -> None:
        """Hands batches to the store, and what becomes of them to the model."""
        start_offset = self.opened._log.end_offset
        before = [[self.stored_at(sent, identity) for identity in sent.identities()] for sent in batches]
        try:
            receipt = self.opened.append([sent.batch for sent in batches])
        except (StoreFullError, BrokerBusyError):
            self.refused_count += 1
            return
        except BrokerUnavailableError:
            # Stored, or not, or in part: the next start tells.
            for sent in batches:
                self.add_to_model(sent, start_offset, UNKNOWN)
            raise
        assert receipt.end_offset <= self.opened._log.end_offset
        for sent, known, runs in zip(batches, before, receipt.runs, strict=True):
            sent.end_offset = receipt.end_offset
            self.add_to_model(sent, start_offset, self.opened._log.end_offset)
            self.check_runs(sent, known, runs)

    def stored_at(self, sent: Sent, identity: tuple[int, int] | str) -> int | None:
        """Queue offset of the first copy."""
        return self.model.queue_offset(sent.queue, identity)

    def add_to_model(self, sent: Sent, start_offset: int, end_offset: int) -> None:
        """Messages of the batch that are not stored yet."""
        for identity, part in zip(sent.identities(), sent.batch.parts, strict=True):
            if self.stored_at(sent, identity) is None:
                self.model.add(StoredMessage(sent.queue, identity, bytes(part)), start_offset, end_offset)

    def check_runs(self, sent: Sent, known: list[int | None], runs: list[OffsetRun]) -> None:
        """The receipt names every message's offset, and says which are repeats. known: offsets before the append."""
        told = []
        for run in runs:
            assert not run.unknown
            assert run.queue_id == sent.batch.queue_id
            told += [(run.first_queue_offset + index, run.repeated) for index in range(run.count)]
        wanted = [
            (self.stored_at(sent, identity), old is not None)
            for identity, old in zip(sent.identities(), known, strict=True)
        ]
        assert told == wanted, f"told {told}, wanted {wanted}"

    def change(self, rng: random.Random) -> None:
        """A change of the tables."""
        change = message_pb2.SystemRecord()
        kind = rng.choice(("topic", "topic", "group", "group gone", "value", "value", "value gone", "topic gone"))
        name = rng.choice(TOPICS)
        match kind:
            case "topic":
                change.topic_set.CopyFrom(
                    message_pb2.TopicConfig(name=name, read_queue_count=rng.randint(1, 8), write_queue_count=2)
                )
            case "topic gone":
                change.topic_deleted = name
            case "group":
                change.group_set.CopyFrom(
                    message_pb2.GroupConfig(name=rng.choice(GROUPS), retry_max_times=rng.randint(0, 9))
                )
            case "group gone":
                change.group_deleted = rng.choice(GROUPS)
            case "value":
                change.key_value_set.CopyFrom(message_pb2.KeyValue(key=rng.choice("ab"), value=str(rng.random())))
            case "value gone":
                change.key_value_deleted = rng.choice("ab")
        self.append_change(change)

    def append_change(self, change: message_pb2.SystemRecord) -> None:
        """Hands a change to the store and the model."""
        start_offset = self.opened._log.end_offset
        with self.offsets_watched():
            try:
                end_offset = self.opened.append_change(change)
            except (StoreFullError, BrokerBusyError):
                self.refused_count += 1
                return
            except BrokerUnavailableError:
                self.model.change(change, start_offset, UNKNOWN)
                raise
            self.model.change(change, start_offset, end_offset)
        if change.WhichOneof("change") == "topic_deleted":
            for producer in self.producers:
                producer.sent = [sent for sent in producer.sent if sent.batch.topic != change.topic_deleted]

    def commit(self, rng: random.Random) -> None:
        """A group commits what it has consumed."""
        group, topic, queue_id = rng.choice(GROUPS), rng.choice(TOPICS), rng.randrange(QUEUE_COUNT)
        offset = message_pb2.GroupOffset(
            group=group, topic=topic, queue_id=queue_id, queue_offset=rng.randint(0, 30), reset=rng.random() < 0.2
        )
        durable = rng.random() < 0.4
        start_offset = self.opened._log.end_offset
        with self.offsets_watched():
            try:
                end_offset = self.opened.commit_offsets([offset], durable=durable)
            except (StoreFullError, BrokerBusyError):
                self.refused_count += 1
                return
            except BrokerUnavailableError:
                self.model.commit((group, topic, queue_id), offset.queue_offset, reset=offset.reset)
                raise
            self.model.commit((group, topic, queue_id), offset.queue_offset, reset=offset.reset)
            if durable:
                self.model.offsets_recorded(start_offset, end_offset)

    @contextmanager
    def offsets_watched(self) -> Iterator[None]:
        """Tells the model when offsets that waited for their record have got it."""
        store = self.opened
        start_offset = store._log.end_offset
        end_offset = UNKNOWN
        try:
            yield
            end_offset = store._log.end_offset
        finally:
            if end_offset == UNKNOWN or not store._commits._pending:
                self.model.offsets_recorded(start_offset, end_offset)

    def read(self, rng: random.Random) -> None:
        """A consumer reads what is confirmed, now, while appends wait for their flush."""
        with self.unless_dead():
            for name, queue in checks.queues_of(self.opened).items():
                expected = self.model.now.queues.get(name, [])
                for record in checks.read_queue(self.opened, queue, rng):
                    assert record.part == expected[record.message.queue_offset].part

    @contextmanager
    def unless_dead(self) -> Iterator[None]:
        """A read skips what the disk does not give back: on a dead disk, that is no finding."""
        try:
            yield
        except AssertionError as error:
            if self.disk.faults.dead:
                raise PowerLossError from error
            raise

    def settle_producers(self) -> None:
        """Clients have got their answers."""
        for producer in self.producers:
            producer.settle(self.opened.confirm_offset)

    def send_unsettled(self, rng: random.Random) -> None:
        """Clients send again what they have no answer for, in order, or give it up."""
        for producer in self.producers:
            unsettled = producer.unsettled()
            if rng.random() < 0.7:
                for sent in unsettled:
                    self.append([sent])
            else:
                producer.sent = [sent for sent in producer.sent if sent.settled]
