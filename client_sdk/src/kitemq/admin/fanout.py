"""Calls to one, several or all of a cluster's namesrvs and brokers, and how their answers and failures add up."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any, TypeVar

from kitemq.admin.results import BrokerInfo
from kitemq.errors import BrokerUnavailableError, KiteMQError, NotFoundError, RequestTimeoutError
from kitemq.proto.v1 import admin_pb2_grpc, broker_pb2_grpc, namesrv_pb2
from kitemq.route import NAMESRV_TIMEOUT_S, Namesrvs
from kitemq.rpc import Channels, UnaryMethod, call

RequestT = TypeVar("RequestT")
ResponseT = TypeVar("ResponseT")

NO_BROKER = "no broker is registered with the namesrv: start one, or wait for it"


class Stubs:
    """Both services of one broker's port."""

    def __init__(self, channels: Channels, address: str) -> None:
        channel = channels.get(address)
        self.admin: admin_pb2_grpc.BrokerAdminAsyncStub = admin_pb2_grpc.BrokerAdminStub(channel)
        self.broker: broker_pb2_grpc.BrokerAsyncStub = broker_pb2_grpc.BrokerStub(channel)


# Takes a method off a broker's stubs: `lambda stubs: stubs.admin.ListTopics`.
Pick = Callable[[Stubs], UnaryMethod[RequestT, ResponseT]]


class ClusterCalls:
    """One question to whoever must answer it. Belongs to one loop."""

    def __init__(
        self,
        addresses: list[str],
        channels: Channels,
        *,
        timeout_s: float,
        on_unanswered: Callable[[str, KiteMQError], None] | None,
    ) -> None:
        self.namesrvs = Namesrvs(addresses, channels)
        self._channels = channels
        self._timeout_s = timeout_s
        self._on_unanswered = on_unanswered

    async def brokers(self) -> list[BrokerInfo]:
        """Every broker that the namesrv knows, sorted by cluster, name and id."""
        answer = await self.namesrvs.call("GetCluster", namesrv_pb2.GetClusterRequest())
        brokers = [BrokerInfo.from_proto(one) for one in answer.brokers]
        return sorted(brokers, key=lambda one: (one.cluster_name, one.broker_name, one.broker_id))

    async def broker(self, broker_name: str, broker_id: int | None) -> BrokerInfo:
        """The broker of that name: of that id, or the one to read from. Raises NotFoundError."""
        known = await self.brokers()
        for broker in known:
            if broker.broker_name == broker_name and broker_id in (None, broker.broker_id):
                return broker
        wanted = broker_name if broker_id is None else f"{broker_name} with id {broker_id}"
        raise NotFoundError(f"the namesrv knows no broker {wanted}; it knows {_names(known) or 'none'}")

    async def masters(self, names: Collection[str] = ()) -> list[BrokerInfo]:
        """The master of every group, or of the groups named. Raises NotFoundError, BrokerUnavailableError for none."""
        known = await self.brokers()
        masters = [broker for broker in known if broker.is_master and (not names or broker.broker_name in names)]
        missing = sorted(set(names) - {broker.broker_name for broker in masters})
        if missing:
            raise NotFoundError(f"no master {', '.join(missing)}; the namesrv knows {_names(known) or 'none'}")
        if not masters:
            raise BrokerUnavailableError(NO_BROKER)
        return masters

    async def readable(self) -> list[BrokerInfo]:
        """One broker of every group: its master, else the slave with the lowest id."""
        chosen: dict[str, BrokerInfo] = {}
        for broker in await self.brokers():
            chosen.setdefault(broker.broker_name, broker)
        if not chosen:
            raise BrokerUnavailableError(NO_BROKER)
        return list(chosen.values())

    async def call(self, broker: BrokerInfo, pick: Pick[RequestT, ResponseT], request: RequestT) -> ResponseT:
        """One broker's answer."""
        method = pick(Stubs(self._channels, broker.address))
        return await call(method, request, timeout_s=self._timeout_s, address=broker.address)

    async def ask(self, pick: Pick[RequestT, ResponseT], request: RequestT) -> list[tuple[BrokerInfo, ResponseT]]:
        """What those broker groups answer that know the thing asked about: none when nobody does.

        A broker that gives no answer goes to `on_unanswered`, unless nobody else answered.
        """
        answers, failures = await self._gather([(broker, request) for broker in await self.readable()], pick)
        if failures and (not answers or self._on_unanswered is None):
            raise failures[0][1]
        for broker, error in failures:
            if not isinstance(error, BrokerUnavailableError | RequestTimeoutError):
                raise error
            assert self._on_unanswered is not None
            self._on_unanswered(broker.broker_name, error)
        return answers

    async def tell(
        self,
        requests: Sequence[tuple[BrokerInfo, RequestT]],
        pick: Pick[RequestT, ResponseT],
        *,
        absent_ok: bool = False,
    ) -> list[tuple[BrokerInfo, ResponseT]]:
        """Have every broker do its request; when one fails, say which have done it.

        absent_ok: a broker that does not know the thing is left out of the answers.
        """
        answers, failures = await self._gather(requests, pick, absent_ok=absent_ok)
        if failures:
            broker, error = failures[0]
            done = f"; done on {_names(one for one, _ in answers)}" if answers else ""
            where = "" if broker.broker_name in error.message else f"{broker.broker_name}: "
            raise type(error)(
                f"{where}{error.message}{done}",
                topic=error.topic,
                address=broker.address,
                request_id=error.request_id,
            )
        return answers

    async def _gather(
        self,
        requests: Sequence[tuple[BrokerInfo, RequestT]],
        pick: Pick[RequestT, ResponseT],
        *,
        absent_ok: bool = True,
    ) -> tuple[list[tuple[BrokerInfo, ResponseT]], list[tuple[BrokerInfo, KiteMQError]]]:
        outcomes = await asyncio.gather(
            *(self.call(broker, pick, request) for broker, request in requests), return_exceptions=True
        )
        answers: list[tuple[BrokerInfo, ResponseT]] = []
        failures: list[tuple[BrokerInfo, KiteMQError]] = []
        for (broker, _), outcome in zip(requests, outcomes, strict=True):
            if isinstance(outcome, KiteMQError):
                if not (absent_ok and isinstance(outcome, NotFoundError)):
                    failures.append((broker, outcome))
            elif isinstance(outcome, BaseException):
                raise outcome
            else:
                answers.append((broker, outcome))
        return answers, failures

    async def tell_namesrvs(self, method: str, request: Any) -> list[Any]:
        """Have every namesrv do the request: they never talk to each other. When one fails, say which have done it."""
        addresses = self.namesrvs.addresses
        outcomes = await asyncio.gather(
            *(
                call(
                    getattr(self.namesrvs.stub(address), method),
                    request,
                    timeout_s=NAMESRV_TIMEOUT_S,
                    address=address,
                )
                for address in addresses
            ),
            return_exceptions=True,
        )
        done = [address for address, one in zip(addresses, outcomes, strict=True) if not isinstance(one, BaseException)]
        for outcome in outcomes:
            if isinstance(outcome, KiteMQError):
                suffix = f"; done on {', '.join(done)}: say it again when all namesrvs are back" if done else ""
                raise type(outcome)(outcome.message + suffix, address=outcome.address, request_id=outcome.request_id)
            if isinstance(outcome, BaseException):
                raise outcome
        return outcomes


def _names(brokers: Iterable[BrokerInfo]) -> str:
    return ", ".join(sorted({broker.broker_name for broker in brokers}))
