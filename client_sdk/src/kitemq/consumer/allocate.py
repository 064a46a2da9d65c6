"""Who reads which queue: RocketMQ's strategies as pure functions.

A strategy is called with the consumer's own client id, all queues of one topic and all client ids of the group, both
sorted. Every member calls it with the same lists, so the shares fit together without anybody handing them out.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_left
from collections.abc import Callable, Collection, Iterable, Sequence

from kitemq.message import MessageQueue

Allocation = Callable[[str, Sequence[MessageQueue], Sequence[str]], list[MessageQueue]]

VIRTUAL_NODES = 10


def average(client_id: str, queues: Sequence[MessageQueue], client_ids: Sequence[str]) -> list[MessageQueue]:
    """Contiguous blocks (AVG, the default): the first `queues mod clients` members get one more than the others."""
    if client_id not in client_ids:
        return []
    index = client_ids.index(client_id)
    size, rest = divmod(len(queues), len(client_ids))
    start = index * size + min(index, rest)
    return list(queues[start : start + size + (index < rest)])


def average_by_circle(client_id: str, queues: Sequence[MessageQueue], client_ids: Sequence[str]) -> list[MessageQueue]:
    """Queue i goes to member i modulo the number of members (AVG_BY_CIRCLE)."""
    if client_id not in client_ids:
        return []
    return list(queues[client_ids.index(client_id) :: len(client_ids)])


def consistent_hash(client_id: str, queues: Sequence[MessageQueue], client_ids: Sequence[str]) -> list[MessageQueue]:
    """A ring of 10 points per member (CONSISTENT_HASH): few queues move when one joins or leaves; shares are uneven."""
    if client_id not in client_ids:
        return []
    ring = {_hash(f"{member}-{node}"): member for member in client_ids for node in range(VIRTUAL_NODES)}
    points = sorted(ring)

    def owner(queue: MessageQueue) -> str:
        name = f"MessageQueue [topic={queue.topic}, brokerName={queue.broker_name}, queueId={queue.queue_id}]"
        return ring[points[bisect_left(points, _hash(name)) % len(points)]]

    return [queue for queue in queues if owner(queue) == client_id]


def _hash(key: str) -> int:
    return int.from_bytes(hashlib.md5(key.encode(), usedforsecurity=False).digest()[:4], "big")


def by_config(queues: Iterable[MessageQueue]) -> Allocation:
    """This member reads exactly `queues` (CONFIG), as far as they exist, whoever else is there."""
    mine = frozenset(queues)

    def allocate(client_id: str, queues: Sequence[MessageQueue], client_ids: Sequence[str]) -> list[MessageQueue]:
        return [queue for queue in queues if queue in mine]

    return allocate


def machine_room(rooms: Collection[str]) -> Allocation:
    """Only queues of brokers named `room@name` with a room of `rooms` (MACHINE_ROOM).

    Every member gets a block of equal size; of the queues left over, one goes to each of the first members.
    """
    wanted = frozenset(rooms)

    def allocate(client_id: str, queues: Sequence[MessageQueue], client_ids: Sequence[str]) -> list[MessageQueue]:
        if client_id not in client_ids:
            return []
        index = client_ids.index(client_id)
        here = [queue for queue in queues if _room(queue) in wanted]
        size, rest = divmod(len(here), len(client_ids))
        mine = here[index * size : (index + 1) * size]
        if index < rest:
            mine.append(here[size * len(client_ids) + index])
        return mine

    return allocate


def _room(queue: MessageQueue) -> str | None:
    parts = queue.broker_name.split("@")
    return parts[0] if len(parts) == 2 else None


def machine_room_nearby(
    inner: Allocation, *, room_of_queue: Callable[[MessageQueue], str], room_of_client: Callable[[str], str]
) -> Allocation:
    """Queues of a room go to that room's members (MACHINE_ROOM_NEARBY), shared by `inner`.

    Queues of a room without a member are shared by all.
    """

    def allocate(client_id: str, queues: Sequence[MessageQueue], client_ids: Sequence[str]) -> list[MessageQueue]:
        if client_id not in client_ids:
            return []
        members: dict[str, list[str]] = {}
        for member in client_ids:
            members.setdefault(room_of_client(member), []).append(member)
        rooms: dict[str, list[MessageQueue]] = {}
        for queue in queues:
            rooms.setdefault(room_of_queue(queue), []).append(queue)
        mine: list[MessageQueue] = []
        for room, here in sorted(rooms.items()):
            if room not in members:
                mine += inner(client_id, here, client_ids)
            elif client_id in members[room]:
                mine += inner(client_id, here, members[room])
        return mine

    return allocate
