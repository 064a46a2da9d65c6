"""Topics of this broker: who may send to and read from them, how they come and go."""

from __future__ import annotations

import logging
from collections.abc import Callable

from kitemq.errors import (
    AlreadyExistsError,
    InvalidRequestError,
    NotAllowedError,
    PermissionDeniedError,
    TopicNotFoundError,
)
from kitemq.proto.v1.message_pb2 import SystemRecord, TopicConfig
from kitemq.protocol.names import (
    DEFAULT_TOPIC,
    PERMISSION_INHERIT,
    PERMISSION_READ,
    PERMISSION_READ_WRITE,
    PERMISSION_WRITE,
    QUEUE_COUNT_MAX,
    check_sendable,
    check_topic,
    is_system_topic,
)
from kitemq_server.broker.settings import LiveSettings
from kitemq_server.store.consume_queue import ConsumeQueue
from kitemq_server.store.message_store import MessageStore

log = logging.getLogger(__name__)

TOPICS_MAX = 100_000
# What a producer that does not say gets, as in RocketMQ.
PRODUCER_QUEUE_COUNT = 4
BENCHMARK_TOPIC = "BenchmarkTest"
# Attributes that the broker knows, with the values it can honour.
ATTRIBUTES = {
    "message.type": frozenset({"NORMAL", "FIFO"}),
    "cleanup.policy": frozenset({"DELETE"}),
}


class Topics:
    """The topic table with its rules. Every change is a record in the log; `changed` is called after each."""

    def __init__(self, store: MessageStore, live: LiveSettings, *, broker_name: str) -> None:
        self._store = store
        self._live = live
        self._broker_name = broker_name
        self.changed: Callable[[str], None] = lambda _topic: None
        self.deleted: Callable[[str], None] = lambda _topic: None

    def get(self, topic: str) -> TopicConfig:
        """Raises TopicNotFoundError."""
        config = self._store.topics.get(topic)
        if config is None:
            raise self._not_found(topic)
        return config

    def for_send(self, topic: str, *, queue_id: int | None, wanted_queue_count: int) -> TopicConfig:
        """The topic that a message may be appended to; created by the default-topic rule when it is not there.

        queue_id: None = the broker will choose. Raises an error of the table that says why not.
        """
        if not self._live.permission & PERMISSION_WRITE:
            raise self._denied(topic, "write", "broker")
        config = self._store.topics.get(topic)
        if config is None:
            config = self._create_for_send(topic, wanted_queue_count)
        if not config.permission & PERMISSION_WRITE:
            raise self._denied(topic, "write", "topic")
        # A producer whose route is old may still use a queue that is being shrunk away: consumers read it on.
        if queue_id is not None and queue_id >= max(config.write_queue_count, config.read_queue_count):
            raise InvalidRequestError(
                f"topic {topic!r} has {config.write_queue_count} write queues on broker {self._broker_name!r}: "
                f"there is no queue {queue_id}",
                topic=topic,
            )
        return config

    def for_pull(self, topic: str, queue_id: int) -> TopicConfig:
        """The topic, when this queue of it may be read. Raises an error of the table that says why not."""
        if not self._live.permission & PERMISSION_READ:
            raise self._denied(topic, "read", "broker")
        config = self._store.topics.get(topic)
        if config is None:
            check_topic(topic)
            raise self._not_found(topic)
        if not config.permission & PERMISSION_READ:
            raise self._denied(topic, "read", "topic")
        self.check_queue(config, queue_id)
        return config

    def check_queue(self, config: TopicConfig, queue_id: int) -> None:
        """Raises InvalidRequestError unless consumers may read this queue."""
        if queue_id >= config.read_queue_count:
            raise InvalidRequestError(
                f"topic {config.name!r} has {config.read_queue_count} read queues on broker {self._broker_name!r}: "
                f"there is no queue {queue_id}",
                topic=config.name,
            )

    def queue(self, topic: str, queue_id: int) -> ConsumeQueue:
        """A queue of the topic. Raises TopicNotFoundError or InvalidRequestError."""
        self.check_queue(self.get(topic), queue_id)
        queue = self._store.queue(topic, queue_id)
        assert queue is not None
        return queue

    def registered(self) -> list[TopicConfig]:
        """What the namesrvs are told: every topic, without the rights that the whole broker lacks."""
        permission = self._live.permission
        configs = []
        for config in self._store.topics.values():
            if config.permission & PERMISSION_READ_WRITE & ~permission:
                masked = TopicConfig()
                masked.CopyFrom(config)
                masked.permission = config.permission & (permission | PERMISSION_INHERIT)
                configs.append(masked)
            else:
                configs.append(config)
        return configs

    def set(self, wanted: TopicConfig, *, create_only: bool) -> tuple[TopicConfig, bool, int]:
        """Create or change a topic: (as it is now, created, physical end of the record; 0 = nothing changed).

        Zero counts and permission mean the present ones, or for a new topic the broker's default and read-write. No
        attributes mean the present ones; one with an empty value is removed.
        """
        name = wanted.name
        check_topic(name)
        present = self._store.topics.get(name)
        if is_system_topic(name) or wanted.system or (present is not None and present.system):
            raise InvalidRequestError(f"topic {name!r} belongs to the system: choose another name", topic=name)
        config = TopicConfig()
        config.CopyFrom(wanted)
        count = self._live.default_topic_queue_count
        config.read_queue_count = wanted.read_queue_count or (present.read_queue_count if present else count)
        config.write_queue_count = wanted.write_queue_count or (present.write_queue_count if present else count)
        config.permission = wanted.permission or (present.permission if present else PERMISSION_READ_WRITE)
        if present is not None and not wanted.attributes:
            config.attributes.update(present.attributes)
        for key in [key for key, value in config.attributes.items() if not value]:
            del config.attributes[key]
        _check_config(config)
        if present == config:
            return present, False, 0
        if present is not None and create_only:
            raise AlreadyExistsError(
                f"topic {name!r} is there already on broker {self._broker_name!r}, with other settings: update it",
                topic=name,
            )
        return config, present is None, self._append(config)

    def delete(self, topic: str) -> int:
        """Delete a topic with its queues and the groups' offsets in it; the physical end of the record."""
        config = self.get(topic)
        if config.system or is_system_topic(topic):
            raise InvalidRequestError(f"topic {topic!r} belongs to the system: it stays", topic=topic)
        end = self._store.append_change(SystemRecord(topic_deleted=topic))
        log.info("topic deleted topic=%s", topic)
        self.deleted(topic)
        self.changed(topic)
        return end

    def create_system_topics(self) -> None:
        """The topics that RocketMQ's tools expect, as far as there is something behind them."""
        wanted = [(BENCHMARK_TOPIC, 1024, PERMISSION_READ_WRITE)]
        if self._live.auto_create_topic_enable:
            template = PERMISSION_READ_WRITE | PERMISSION_INHERIT
            wanted.append((DEFAULT_TOPIC, self._live.default_topic_queue_count, template))
        for name, count, permission in wanted:
            config = TopicConfig(
                name=name, read_queue_count=count, write_queue_count=count, permission=permission, system=True
            )
            if self._store.topics.get(name) != config:
                self._append(config)

    def _create_for_send(self, topic: str, wanted_queue_count: int) -> TopicConfig:
        check_topic(topic)
        check_sendable(topic)
        default = self._store.topics.get(DEFAULT_TOPIC)
        if (
            not self._live.auto_create_topic_enable
            or default is None
            or not default.permission & PERMISSION_INHERIT
            or is_system_topic(topic)
        ):
            raise self._not_found(topic)
        count = min(
            wanted_queue_count or PRODUCER_QUEUE_COUNT,
            default.write_queue_count,
            self._live.default_topic_queue_count,
        )
        config = TopicConfig(
            name=topic,
            read_queue_count=count,
            write_queue_count=count,
            permission=default.permission & ~PERMISSION_INHERIT,
        )
        self._append(config)
        return config

    def _append(self, config: TopicConfig) -> int:
        created = config.name not in self._store.topics
        if created and len(self._store.topics) >= TOPICS_MAX:
            raise NotAllowedError(f"broker {self._broker_name!r} has {TOPICS_MAX} topics: delete some first")
        end = self._store.append_change(SystemRecord(topic_set=config))
        log.info(
            "topic %s topic=%s read_queues=%d write_queues=%d permission=%d",
            "created" if created else "changed",
            config.name,
            config.read_queue_count,
            config.write_queue_count,
            config.permission,
        )
        self.changed(config.name)
        return end

    def _not_found(self, topic: str) -> TopicNotFoundError:
        return TopicNotFoundError(
            f"broker {self._broker_name!r} has no topic {topic[:130]!r}: create it with `kitemq topic create`",
            topic=topic,
        )

    def _denied(self, topic: str, right: str, whose: str) -> PermissionDeniedError:
        subject = f"topic {topic!r}" if whose == "topic" else "the whole broker"
        return PermissionDeniedError(
            f"{right} permission is missing on {subject} (topic {topic!r}, broker {self._broker_name!r})", topic=topic
        )


def _check_config(config: TopicConfig) -> None:
    for kind, count in (("read", config.read_queue_count), ("write", config.write_queue_count)):
        if not 1 <= count <= QUEUE_COUNT_MAX:
            raise InvalidRequestError(
                f"{kind}_queue_count is {count}: 1..{QUEUE_COUNT_MAX} are allowed", topic=config.name
            )
    if config.permission not in (PERMISSION_READ, PERMISSION_WRITE, PERMISSION_READ_WRITE):
        raise InvalidRequestError(
            f"permission is {config.permission}: 2 (write), 4 (read) or 6 (both) are allowed", topic=config.name
        )
    for key, value in config.attributes.items():
        values = ATTRIBUTES.get(key)
        if values is None:
            raise InvalidRequestError(
                f"attribute {key[:60]!r} is not known: {', '.join(sorted(ATTRIBUTES))} are", topic=config.name
            )
        if value not in values:
            raise InvalidRequestError(
                f"attribute {key} is {value[:60]!r}: {', '.join(sorted(values))} are supported", topic=config.name
            )
