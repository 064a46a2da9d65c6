"""Between the wire's messages and the route table's values; everything that comes in is checked here."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from kitemq.errors import InvalidRequestError
from kitemq.proto.v1 import message_pb2, namesrv_pb2
from kitemq.protocol.names import QUEUE_COUNT_MAX, check_topic
from kitemq_server.common.addresses import LISTENERS_MAX, check_listener_name, split_address
from kitemq_server.common.names import check_broker_name, check_cluster_name
from kitemq_server.namesrv.route_table import MASTER_ID, Broker, DataVersion, Route, TopicQueues

TOPICS_OF_BROKER_MAX = 100_000
WATCHED_TOPICS_MAX = 4_096
EXPIRY_MS_DEFAULT = 120_000
EXPIRY_MS_MIN = 1_000
EXPIRY_MS_MAX = 3_600_000
PERMISSION_MAX = 15
BOOT_ID_CHARS_MAX = 64

_ORDER_CONFIG = re.compile(r"[A-Za-z0-9_.-]{1,127}:[0-9]{1,5}(;[A-Za-z0-9_.-]{1,127}:[0-9]{1,5})*")


def broker_from_wire(message: namesrv_pb2.BrokerIdentity) -> Broker:
    """Raises InvalidRequestError, naming the field."""
    try:
        check_cluster_name(message.cluster_name)
        check_broker_name(message.broker_name)
        addresses = _addresses(message.addresses)
    except ValueError as error:
        raise InvalidRequestError(f"broker: {error}") from None
    if message.role not in namesrv_pb2.BrokerRole.values():
        raise InvalidRequestError(f"broker.role: {message.role} is not a BrokerRole")
    if (message.role == namesrv_pb2.SLAVE) != (message.broker_id != MASTER_ID):
        raise InvalidRequestError(
            f"broker.broker_id: {message.broker_id} and role {namesrv_pb2.BrokerRole.Name(message.role)} "
            f"contradict each other: a master's id is 0, a slave's is not"
        )
    if not 1 <= len(message.boot_id) <= BOOT_ID_CHARS_MAX:
        raise InvalidRequestError(f"broker.boot_id: needs 1 to {BOOT_ID_CHARS_MAX} characters")
    return Broker(
        cluster_name=message.cluster_name,
        broker_name=message.broker_name,
        broker_id=message.broker_id,
        role=message.role,
        epoch=message.epoch,
        boot_id=message.boot_id,
        boot_timestamp_ms=message.boot_timestamp_ms,
        addresses=addresses,
    )


def _addresses(named: Mapping[str, str]) -> dict[str, str]:
    if not 1 <= len(named) <= LISTENERS_MAX:
        raise ValueError(f"addresses: {len(named)} given, 1 to {LISTENERS_MAX} needed")
    for name, address in named.items():
        check_listener_name(name)
        _, port = split_address(address)
        if port == 0:
            raise ValueError(f"addresses: {address!r} has port 0, which nobody can dial")
    return dict(named)


def broker_to_wire(broker: Broker) -> namesrv_pb2.BrokerIdentity:
    """The inverse of `broker_from_wire`."""
    return namesrv_pb2.BrokerIdentity(
        cluster_name=broker.cluster_name,
        broker_name=broker.broker_name,
        broker_id=broker.broker_id,
        role=namesrv_pb2.BrokerRole.ValueType(broker.role),
        epoch=broker.epoch,
        boot_id=broker.boot_id,
        boot_timestamp_ms=broker.boot_timestamp_ms,
        addresses=broker.addresses,
    )


def data_version_from_wire(message: namesrv_pb2.DataVersion) -> DataVersion:
    """Orders as the wire says: timestamp first."""
    return message.timestamp_ms, message.counter


def topics_from_wire(topics: Iterable[message_pb2.TopicConfig], *, topic_count: int) -> dict[str, TopicQueues]:
    """Raises InvalidRequestError, naming the topic."""
    if topic_count > TOPICS_OF_BROKER_MAX:
        raise InvalidRequestError(f"topics: {topic_count} given, at most {TOPICS_OF_BROKER_MAX}")
    queues: dict[str, TopicQueues] = {}
    for topic in topics:
        name = topic.name
        check_topic(name)
        reads, writes = topic.read_queue_count, topic.write_queue_count
        if reads > QUEUE_COUNT_MAX or writes > QUEUE_COUNT_MAX:
            raise InvalidRequestError(f"topic {name!r} has {max(reads, writes)} queues: at most {QUEUE_COUNT_MAX}")
        if topic.permission > PERMISSION_MAX:
            raise InvalidRequestError(f"topic {name!r} has permission {topic.permission}: 0 to {PERMISSION_MAX}")
        if name in queues:
            raise InvalidRequestError(f"topic {name!r} occurs twice")
        queues[name] = TopicQueues(reads, writes, topic.permission)
    return queues


def expiry_from_wire(expiry_ms: int) -> int:
    """Raises InvalidRequestError outside 1 s .. 1 h."""
    if expiry_ms == 0:
        return EXPIRY_MS_DEFAULT
    if not EXPIRY_MS_MIN <= expiry_ms <= EXPIRY_MS_MAX:
        raise InvalidRequestError(f"expiry_ms: {expiry_ms} is not within {EXPIRY_MS_MIN}..{EXPIRY_MS_MAX}")
    return expiry_ms


def route_to_wire(topic: str, route: Route | None, *, listener: str, order_config: str) -> namesrv_pb2.TopicRoute:
    """The route with the addresses of `listener`; None = no broker has the topic: no queues."""
    message = namesrv_pb2.TopicRoute(topic=topic, order_config=order_config)
    if route is None:
        return message
    for name, queues in route.queues.items():
        message.queues.add(
            broker_name=name,
            read_queue_count=queues.read_queue_count,
            write_queue_count=queues.write_queue_count,
            permission=queues.permission,
        )
    for name, brokers in route.brokers.items():
        group = message.brokers.add(cluster_name=brokers[0].cluster_name, broker_name=name)
        for broker in brokers:
            group.brokers.add(
                broker_id=broker.broker_id,
                address=broker.address(listener),
                epoch=broker.epoch,
                boot_id=broker.boot_id,
                role=namesrv_pb2.BrokerRole.ValueType(broker.role),
            )
    return message


def check_watched(topics: Iterable[str], *, topic_count: int) -> None:
    """Raises InvalidRequestError for too many topics or an illegal name."""
    if not 1 <= topic_count <= WATCHED_TOPICS_MAX:
        raise InvalidRequestError(
            f"topics: {topic_count} given, 1 to {WATCHED_TOPICS_MAX} may be watched by one stream"
        )
    for topic in topics:
        check_topic(topic)


def check_order_config(topic: str, order_config: str) -> None:
    """Raises InvalidRequestError unless it reads "brokerA:4;brokerB:4"."""
    check_topic(topic)
    if not _ORDER_CONFIG.fullmatch(order_config):
        raise InvalidRequestError(f"the order configuration of topic {topic!r} must read brokerA:4;brokerB:4")
