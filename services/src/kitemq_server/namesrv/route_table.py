"""Who serves what: brokers, their topics, and which of two claims is believed.

Plain code: no I/O, no clock (now_ms is passed in, monotonic), no protobuf. Every change returns the topics whose route
it changed.

Of two claims to be master the one with the higher epoch is believed, then the one that started later.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from kitemq.errors import FencedEpochError, NotAllowedError, NotFoundError
from kitemq.protocol.names import PERMISSION_WRITE
from kitemq_server.common.addresses import DEFAULT_LISTENER

MASTER_ID = 0
GROUPS_MAX = 10_000
MEMBERS_MAX = 100  # of one group

DataVersion = tuple[int, int]


class TopicQueues(NamedTuple):
    """Of one topic on one broker. permission: bits as in RocketMQ (4 read, 2 write, 1 inherit)."""

    read_queue_count: int
    write_queue_count: int
    permission: int


@dataclass(frozen=True, slots=True)
class Broker:
    """What a broker says of itself. addresses: host:port by listener name, at least one. role: a BrokerRole number."""

    cluster_name: str
    broker_name: str
    broker_id: int
    role: int
    epoch: int
    boot_id: str
    boot_timestamp_ms: int
    addresses: Mapping[str, str]

    def __str__(self) -> str:
        return f"{self.broker_name}/{self.broker_id}"

    def address(self, listener: str) -> str:
        """Its address for clients of `listener`; without one the default listener's, or the only one there is."""
        for name in (listener, DEFAULT_LISTENER, min(self.addresses)):
            if name in self.addresses:
                return self.addresses[name]
        raise AssertionError("a broker has an address")


@dataclass(slots=True)
class Member:
    """A registered broker. heard_ms: monotonic."""

    broker: Broker
    data_version: DataVersion
    topics: Mapping[str, TopicQueues]
    expiry_ms: int
    heard_ms: int


@dataclass(slots=True)
class Group:
    """The brokers of one name. writable: an operator may have taken the write permission away."""

    members: dict[int, Member] = field(default_factory=dict)
    writable: bool = True

    @property
    def topics(self) -> Mapping[str, TopicQueues]:
        """The master's; without a master those of the slave with the lowest id."""
        return self.members[min(self.members)].topics if self.members else {}


@dataclass(frozen=True, slots=True)
class Route:
    """A topic's queues and brokers by broker name, sorted; brokers of one name sorted by id."""

    queues: Mapping[str, TopicQueues]
    brokers: Mapping[str, tuple[Broker, ...]]


class RouteTable:
    """All groups, and the topics that each serves."""

    def __init__(self) -> None:
        self._groups: dict[str, Group] = {}
        self._names_by_topic: dict[str, set[str]] = {}

    @property
    def topic_count(self) -> int:
        """Topics with a route."""
        return len(self._names_by_topic)

    def has_topic(self, topic: str) -> bool:
        """True when some broker has the topic."""
        return topic in self._names_by_topic

    def topics(self, cluster_name: str = "") -> list[str]:
        """Names of all topics, or of those that a cluster's brokers have, sorted."""
        if not cluster_name:
            return sorted(self._names_by_topic)
        found: set[str] = set()
        for group in self._groups.values():
            if any(member.broker.cluster_name == cluster_name for member in group.members.values()):
                found.update(group.topics)
        return sorted(found)

    def cluster_names(self) -> list[str]:
        """The cluster of every broker. May be called from another thread."""
        return [
            member.broker.cluster_name
            for group in list(self._groups.values())
            for member in list(group.members.values())
        ]

    def members(self) -> Iterator[tuple[Member, bool]]:
        """Every broker, sorted by name and id, and whether its group is writable."""
        for _, group in sorted(self._groups.items()):
            for _, member in sorted(group.members.items()):
                yield member, group.writable

    def master(self, broker_name: str) -> Broker | None:
        """The master of a group, if it has one."""
        group = self._groups.get(broker_name)
        member = group.members.get(MASTER_ID) if group else None
        return member.broker if member else None

    def route(self, topic: str) -> Route | None:
        """Where the topic's queues are; None when no broker has it."""
        names = self._names_by_topic.get(topic)
        if not names:
            return None
        queues: dict[str, TopicQueues] = {}
        brokers: dict[str, tuple[Broker, ...]] = {}
        for name in sorted(names):
            group = self._groups[name]
            of_topic = group.topics[topic]
            if not group.writable:
                of_topic = of_topic._replace(permission=of_topic.permission & ~PERMISSION_WRITE)
            queues[name] = of_topic
            brokers[name] = tuple(member.broker for _, member in sorted(group.members.items()))
        return Route(queues, brokers)

    def register(
        self,
        broker: Broker,
        data_version: DataVersion,
        topics: Mapping[str, TopicQueues],
        *,
        expiry_ms: int,
        now_ms: int,
    ) -> set[str]:
        """Take over what a broker says of itself and its topics.

        Raises FencedEpochError for a claim older than one that is known, NotAllowedError when the name belongs to
        another cluster or the table is full.
        """
        group = self._groups.get(broker.broker_name) or Group()
        replaced = judge(group, broker)
        for broker_id, member in group.members.items():
            if broker_id not in replaced and member.broker.cluster_name != broker.cluster_name:
                raise NotAllowedError(
                    f"broker name {broker.broker_name!r} belongs to cluster {member.broker.cluster_name!r}: "
                    f"give each broker group a name of its own"
                )
        known = group.members.get(broker.broker_id)
        no_room = len(group.members) >= MEMBERS_MAX if group.members else len(self._groups) >= GROUPS_MAX
        if known is None and no_room:
            raise NotAllowedError(
                f"this namesrv takes at most {GROUPS_MAX} broker groups of {MEMBERS_MAX} brokers: no room for {broker}"
            )
        if known is not None and known.broker.boot_id == broker.boot_id and data_version < known.data_version:
            # Overtaken on the way by a newer registration of the same process.
            data_version, topics = known.data_version, known.topics
        before = group.topics
        same_members = replaced == {broker.broker_id} and known is not None and known.broker == broker
        for broker_id in replaced:
            del group.members[broker_id]
        group.members[broker.broker_id] = Member(broker, data_version, topics, expiry_ms, now_ms)
        self._groups[broker.broker_name] = group
        return self._changed(broker.broker_name, before, group.topics, everything=not same_members)

    def heartbeat(self, broker: Broker, data_version: DataVersion, *, now_ms: int) -> bool:
        """The broker lives. True: it must register in full, because something about it is unknown here."""
        group = self._groups.get(broker.broker_name)
        member = group.members.get(broker.broker_id) if group else None
        if member is None or member.broker.boot_id != broker.boot_id:
            return True
        member.heard_ms = now_ms
        return member.broker != broker or member.data_version != data_version

    def unregister(self, broker: Broker) -> set[str]:
        """The broker stops. A newer process of the same broker stays."""
        group = self._groups.get(broker.broker_name)
        member = group.members.get(broker.broker_id) if group else None
        if group is None or member is None or member.broker.boot_id != broker.boot_id:
            return set()
        return self._leave(broker.broker_name, group, [broker.broker_id])

    def expire(self, *, now_ms: int, asleep_ms: int = 0) -> tuple[list[Broker], set[str]]:
        """Take out every broker that was not heard of for its expiry time; who they were, and the topics changed.

        asleep_ms: how long this process itself could not listen; nobody is taken out for that.
        """
        gone: list[Broker] = []
        changed: set[str] = set()
        for name, group in list(self._groups.items()):
            silent = []
            for broker_id, member in group.members.items():
                member.heard_ms += asleep_ms
                if now_ms - member.heard_ms > member.expiry_ms:
                    silent.append(broker_id)
                    gone.append(member.broker)
            if silent:
                changed |= self._leave(name, group, silent)
        return gone, changed

    def set_writable(self, broker_name: str, *, writable: bool) -> set[str]:
        """Take or give back the write permission of all topics of a group, until its last broker leaves.

        Raises NotFoundError for a name that is not registered.
        """
        group = self._groups.get(broker_name)
        if group is None:
            raise NotFoundError(f"no broker named {broker_name[:127]!r} is registered here")
        if group.writable == writable:
            return set()
        group.writable = writable
        return {topic for topic, queues in group.topics.items() if queues.permission & PERMISSION_WRITE}

    def _leave(self, name: str, group: Group, broker_ids: list[int]) -> set[str]:
        before = group.topics
        for broker_id in broker_ids:
            del group.members[broker_id]
        if not group.members:
            del self._groups[name]
        return self._changed(name, before, group.topics, everything=True)

    def _changed(
        self, name: str, before: Mapping[str, TopicQueues], after: Mapping[str, TopicQueues], *, everything: bool
    ) -> set[str]:
        """Keep the index by topic; everything: also topics whose own queues are as before have another route."""
        added, removed = after.keys() - before.keys(), before.keys() - after.keys()
        for topic in added:
            self._names_by_topic.setdefault(topic, set()).add(name)
        for topic in removed:
            names = self._names_by_topic[topic]
            names.discard(name)
            if not names:
                del self._names_by_topic[topic]
        if everything:
            return {*before, *after}
        return added | removed | {topic for topic in before.keys() & after.keys() if before[topic] != after[topic]}


def judge(group: Group, claim: Broker) -> set[int]:
    """Ids in the group that `claim` replaces, its own among them if it is there.

    Raises FencedEpochError when the claim is older than one that the group has.
    """
    replaced: set[int] = set()
    for broker_id, member in group.members.items():
        known = member.broker
        if claim.broker_id == MASTER_ID and claim.epoch < known.epoch:
            raise _fenced(claim, known)
        # One process, and one address, has one id: a switch of roles takes the other one away.
        if broker_id == claim.broker_id or known.boot_id == claim.boot_id or _share_address(known, claim):
            if not _is_newer(claim, known):
                raise _fenced(claim, known)
            replaced.add(broker_id)
    return replaced


def _is_newer(claim: Broker, known: Broker) -> bool:
    if claim.boot_id == known.boot_id:
        return claim.epoch >= known.epoch
    if claim.broker_id == known.broker_id:
        if claim.broker_id == MASTER_ID and claim.epoch > known.epoch:
            return True
        # An address has one living process, and it is the one that speaks: its clock need not be asked.
        if _share_address(claim, known):
            return True
    return claim.boot_timestamp_ms > known.boot_timestamp_ms


def _share_address(one: Broker, other: Broker) -> bool:
    return not set(one.addresses.values()).isdisjoint(other.addresses.values())


def _fenced(claim: Broker, known: Broker) -> FencedEpochError:
    return FencedEpochError(
        f"broker {claim} with epoch {claim.epoch} is refused: {known} with epoch {known.epoch} is registered from "
        f"{known.address(DEFAULT_LISTENER)}; if these are two brokers, give each its own name or id"
    )
