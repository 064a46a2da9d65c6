"""Who else is in the group: heartbeats to every broker of the topics, Notify streams, the list of members.

Every member tells every broker of its topics that it is there, and asks all of them who is. The union of the answers is
what the shares are computed from: a broker that has just restarted and knows nobody yet does not take anyone out.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable, Iterable

import grpc.aio

from kitemq.consumer.offsets import Brokers
from kitemq.consumer.tasks import BackgroundTasks
from kitemq.errors import KiteMQError
from kitemq.proto.v1 import broker_pb2
from kitemq.rpc import call
from kitemq.version import VERSION

logger = logging.getLogger(__name__)

HEARTBEAT_S = 30.0
CALL_TIMEOUT_S = 3.0
LEAVE_TIMEOUT_S = 1.0
BACKOFF_FIRST_S = 0.1
BACKOFF_MAX_S = 2.0
# Who was a member when the connection to a broker broke still counts as one for this long after we are back: others
# need a moment to come back too.
RETURN_GRACE_S = 5.0

Members = dict[str, broker_pb2.ConsumerInfo]


def shares(info: broker_pb2.ConsumerInfo, topic: str) -> bool:
    """True if a member that declares `info` takes a share of the topic's queues."""
    if info.message_model == broker_pb2.BROADCASTING:
        return False
    return not info.subscriptions or any(subscription.topic == topic for subscription in info.subscriptions)


class MemberView:
    """What each broker says of the group, and what to make of it. Pure: times are passed in, in seconds."""

    def __init__(self) -> None:
        self._known: dict[str, Members] = {}
        self._missed: dict[str, tuple[float, Members]] = {}

    def reconnected(self, address: str, now_s: float) -> None:
        """The broker may have restarted, and not know yet who is in the group."""
        before = {**self._missed.get(address, (0.0, {}))[1], **self._known.get(address, {})}
        if before:
            self._missed[address] = now_s + RETURN_GRACE_S, before

    def answered(self, address: str, members: Members) -> None:
        self._known[address] = members

    def keep_only(self, addresses: Iterable[str]) -> None:
        """Forget brokers that are no longer asked."""
        wanted = set(addresses)
        for table in (self._known, self._missed):
            for address in table.keys() - wanted:
                del table[address]

    def members(self, now_s: float) -> Members:
        """Everybody that a broker names, or has named until a moment ago."""
        found: Members = {}
        for address, (until_s, members) in list(self._missed.items()):
            if now_s < until_s:
                found.update(members)
            else:
                del self._missed[address]
        for members in self._known.values():
            found.update(members)
        return found

    @property
    def size(self) -> int:
        """How many members the broker that knows most of them has named."""
        return max(map(len, self._known.values()), default=0)

    def next_change_s(self) -> float | None:
        """When `members` may change by itself."""
        return min((until_s for until_s, _ in self._missed.values()), default=None)


class Membership:
    """This consumer's part in its group.

    info: what to tell the brokers, read at every heartbeat. changed: called when the group may have changed.
    refused: called with the reason when the first broker that answers does not take this consumer, and never will.
    offsets_reset: called with the address of a broker on which somebody has moved the group's offsets.
    """

    def __init__(
        self,
        client_id: str,
        group: str,
        *,
        brokers: Brokers,
        tasks: BackgroundTasks,
        info: Callable[[], broker_pb2.ConsumerInfo],
        changed: Callable[[], None],
        refused: Callable[[KiteMQError], None],
        offsets_reset: Callable[[str], None],
    ) -> None:
        self._client_id = client_id
        self._group = group
        self._brokers = brokers
        self._tasks = tasks
        self._info = info
        self._changed = changed
        self._refused = refused
        self._offsets_reset = offsets_reset
        self._view = MemberView()
        self._followed: dict[str, asyncio.Task[None]] = {}
        # Brokers that know this consumer, and what they were told last.
        self._joined: dict[str, broker_pb2.ConsumerInfo] = {}
        self._ever_joined = False

    @property
    def followed(self) -> set[str]:
        """Addresses of the brokers on which this consumer is a member, or tries to be."""
        return set(self._followed)

    @property
    def size(self) -> int:
        """How many members were known when they were last asked for."""
        return self._view.size

    async def heartbeat_forever(self) -> None:
        """Every 30 s to every broker. Ends by cancellation."""
        while True:
            await asyncio.sleep(HEARTBEAT_S)
            await self.heartbeat()

    async def heartbeat(self) -> None:
        """To every broker that is followed: now, because a subscription has changed or it is time."""
        await asyncio.gather(*(self._beat(address) for address in list(self._joined)))

    def follow(self, addresses: set[str]) -> None:
        """Be a member on exactly these brokers."""
        for address in self._followed.keys() - addresses:
            self._followed.pop(address).cancel()
            self._joined.pop(address, None)
        for address in addresses - self._followed.keys():
            self._followed[address] = self._tasks.start(self._follow(address), name=f"group {self._group} {address}")
        self._view.keep_only(addresses)

    async def members(self) -> Members:
        """Of the group, by client id, as far as brokers answer; without this consumer before its first heartbeat."""
        await asyncio.gather(*(self._ask(address) for address in list(self._joined)))
        return self._view.members(asyncio.get_running_loop().time())

    def next_change_in_s(self) -> float | None:
        """Seconds until the members may change without anybody telling; None = they do not."""
        due = self._view.next_change_s()
        return None if due is None else max(0.0, due - asyncio.get_running_loop().time())

    async def leave(self) -> None:
        """Say goodbye, so that the others take over at once."""
        joined, self._joined = self._joined, {}
        followed, self._followed = self._followed, {}
        for task in followed.values():
            task.cancel()
        await asyncio.gather(*followed.values(), return_exceptions=True)  # no heartbeat may come after the goodbye
        request = broker_pb2.UnregisterRequest(client_id=self._client_id)

        async def one(address: str) -> None:
            try:
                stub = self._brokers.stub(address)
                await call(stub.Unregister, request, timeout_s=LEAVE_TIMEOUT_S, address=address)
            except KiteMQError as error:
                logger.debug("consumer: goodbye failed group=%s broker=%s error=%s", self._group, address, error)

        await asyncio.gather(*(one(address) for address in joined))

    # ---- one broker ----

    async def _beat(self, address: str) -> bool:
        info = self._info()
        request = broker_pb2.HeartbeatRequest(
            client_id=self._client_id, language="PYTHON", version=VERSION, consumers=[info]
        )
        try:
            stub = self._brokers.stub(address)
            await call(stub.Heartbeat, request, timeout_s=CALL_TIMEOUT_S, address=address)
        except KiteMQError as error:
            log = logger.info if error.retriable else logger.warning
            log("consumer: heartbeat failed group=%s broker=%s error=%s", self._group, address, error)
            if not error.retriable and not self._ever_joined:
                self._refused(error)
            return False
        self._ever_joined = True
        if address in self._followed:
            self._joined[address] = info
        return True

    async def _ask(self, address: str) -> None:
        if self._joined.get(address) != self._info():  # or our own entry in the list would be out of date
            await self._beat(address)
        request = broker_pb2.ListGroupMembersRequest(group=self._group)
        try:
            stub = self._brokers.stub(address)
            response = await call(stub.ListGroupMembers, request, timeout_s=CALL_TIMEOUT_S, address=address)
        except KiteMQError as error:
            logger.info("consumer: members unknown group=%s broker=%s error=%s", self._group, address, error)
            return
        if len(response.consumers) == len(response.client_ids):
            self._view.answered(address, dict(zip(response.client_ids, response.consumers, strict=True)))
        else:
            self._view.answered(address, {client_id: broker_pb2.ConsumerInfo() for client_id in response.client_ids})

    async def _follow(self, address: str) -> None:
        """Keeps a Notify stream and the membership it stands for."""
        backoff_s = BACKOFF_FIRST_S
        while True:
            try:
                if await self._listen(address):
                    backoff_s = BACKOFF_FIRST_S
            except grpc.aio.AioRpcError as error:
                logger.debug("consumer: notify stream broke broker=%s code=%s", address, error.code())
                if address in self._joined:
                    backoff_s = BACKOFF_FIRST_S
            self._joined.pop(address, None)
            await asyncio.sleep(random.uniform(0.5, 1.0) * backoff_s)
            backoff_s = min(2 * backoff_s, BACKOFF_MAX_S)

    async def _listen(self, address: str) -> bool:
        """Returns when the stream has ended; False if it could not be joined, or somebody else has taken our place."""
        stopping = False
        stream = self._brokers.stub(address).Notify(broker_pb2.NotifyRequest(client_id=self._client_id))
        try:
            async for notice in stream:
                event = notice.WhichOneof("event")
                if event == "ready":
                    if not await self._beat(address):
                        return False
                    self._view.reconnected(address, asyncio.get_running_loop().time())
                    self._changed()
                elif event == "group_changed" and notice.group_changed == self._group:
                    self._changed()
                elif event == "offsets_reset" and notice.offsets_reset == self._group:
                    self._offsets_reset(address)
                elif event == "stopping":
                    stopping = True
        finally:
            stream.cancel()
        if not stopping:
            logger.warning(
                "consumer: broker ended the notify stream: has another client the same id? client_id=%s broker=%s",
                self._client_id,
                address,
            )
        return stopping
