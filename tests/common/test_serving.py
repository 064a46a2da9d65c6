"""Servers over real gRPC: errors, listeners, health, reflection, TLS, and how they stop."""

from __future__ import annotations

import asyncio
import logging
import os
import shutil
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from kitemq.errors import (
    BrokerBusyError,
    ClientClosedError,
    InvalidRequestError,
    KiteMQError,
    TopicNotFoundError,
    error_from_rpc,
)
from kitemq.proto.v1 import namesrv_pb2 as pb
from kitemq_server.common.addresses import Listener
from kitemq_server.common.calls import ANONYMOUS, current_call
from kitemq_server.common.metrics import RpcMetrics
from kitemq_server.common.serving import ServeError, Serving, Tls, serve
from tests.certificates import make_certificates

SERVICE = "kitemq.test.Echo"
INTERNAL = Listener("internal", "127.0.0.1", 0)
ERRORS: list[tuple[Exception, type[KiteMQError], str]] = [
    (TopicNotFoundError("no topic 'é'"), TopicNotFoundError, "no topic 'é'"),
    (BrokerBusyError("later", retry_after_ms=250), BrokerBusyError, "later"),
    (InvalidRequestError("x" * 5_000), InvalidRequestError, "x" * 1_000),
    (ValueError("secret /data/path"), KiteMQError, "internal error, see broker log"),
    (ClientClosedError("a class that has no status"), KiteMQError, "internal error, see broker log"),
]


class Echo:
    """Four kinds of calls. `failure` is raised by all of them, by streams after the first reply."""

    def __init__(self) -> None:
        self.failure: Exception | None = None
        self.held = asyncio.Event()
        self.release = asyncio.Event()
        self.ended = asyncio.Event()

    def fail(self) -> None:
        if self.failure is not None:
            raise self.failure

    async def unary(self, request: pb.GetRouteRequest, context: Any) -> pb.TopicRoute:
        self.fail()
        call = current_call()
        assert call.identity is ANONYMOUS
        return pb.TopicRoute(topic=request.topic or call.listener)

    async def generator(self, request: pb.GetRouteRequest, context: Any) -> AsyncIterator[pb.TopicRoute]:
        for number in range(3):
            yield pb.TopicRoute(topic=f"{request.topic}{number}")
            self.fail()

    async def writer(self, requests: Any, context: Any) -> None:
        async for request in requests:
            await context.write(pb.TopicRoute(topic=request.topic))
            self.fail()

    async def collect(self, requests: Any, context: Any) -> pb.TopicRoute:
        topics = [request.topic async for request in requests]
        self.fail()
        return pb.TopicRoute(topic=",".join(topics))

    async def hold(self, request: bytes, context: Any) -> bytes:
        self.held.set()
        try:
            await self.release.wait()
            return b"released"
        finally:
            self.ended.set()

    async def wrong(self, request: bytes, context: Any) -> Any:
        return "not a message"

    def register(self, server: grpc.aio.Server) -> None:
        kinds: dict[str, tuple[Callable[..., Any], Any]] = {
            "Unary": (grpc.unary_unary_rpc_method_handler, self.unary),
            "Generator": (grpc.unary_stream_rpc_method_handler, self.generator),
            "Writer": (grpc.stream_stream_rpc_method_handler, self.writer),
            "Collect": (grpc.stream_unary_rpc_method_handler, self.collect),
            "Wrong": (grpc.unary_unary_rpc_method_handler, self.wrong),
        }
        handlers = {
            name: make(behavior, pb.GetRouteRequest.FromString, pb.TopicRoute.SerializeToString)
            for name, (make, behavior) in kinds.items()
        }
        handlers["Hold"] = grpc.unary_unary_rpc_method_handler(self.hold)
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))


@asynccontextmanager
async def serving(echo: Echo, *listeners: Listener, **options: Any) -> AsyncIterator[Serving]:
    options.setdefault("metrics", RpcMetrics())
    async with serve({SERVICE: echo.register}, listeners=listeners or (INTERNAL,), **options) as served:
        yield served


def dial(served: Serving, listener: str = "internal") -> Any:
    return grpc.aio.insecure_channel(f"127.0.0.1:{served.ports[listener]}")


def method(channel: Any, kind: str, name: str) -> Any:
    return getattr(channel, kind)(
        f"/{SERVICE}/{name}",
        request_serializer=pb.GetRouteRequest.SerializeToString,
        response_deserializer=pb.TopicRoute.FromString,
    )


async def everything(channel: Any) -> dict[str, Any]:
    """What each kind of call answers: topics, or the error."""
    request = pb.GetRouteRequest(topic="t")
    answers: dict[str, Any] = {}
    for kind, name in (
        ("unary_unary", "Unary"),
        ("unary_stream", "Generator"),
        ("stream_stream", "Writer"),
        ("stream_unary", "Collect"),
    ):
        call = method(channel, kind, name)(request if kind.startswith("unary") else iter([request, request]))
        try:
            if kind.endswith("stream"):
                answers[name] = [reply.topic async for reply in call]
            else:
                answers[name] = [(await call).topic]
        except grpc.aio.AioRpcError as error:
            answers[name] = error
    return answers


async def test_all_kinds_of_calls() -> None:
    async with serving(Echo()) as served, dial(served) as channel:
        assert await everything(channel) == {
            "Unary": ["t"],
            "Generator": ["t0", "t1", "t2"],
            "Writer": ["t", "t"],
            "Collect": ["t,t"],
        }


@pytest.mark.parametrize(("raised", "expected", "text"), ERRORS, ids=[type(row[0]).__name__ for row in ERRORS])
async def test_errors_cross_the_wire_and_bugs_do_not(
    raised: Exception, expected: type[KiteMQError], text: str, caplog: pytest.LogCaptureFixture
) -> None:
    echo = Echo()
    async with serving(echo) as served, dial(served) as channel:
        echo.failure = raised
        for name, answer in (await everything(channel)).items():
            error = error_from_rpc(answer, address="here")
            assert isinstance(error, expected), name
            assert error.message == text
            assert error.request_id
            assert error.retry_after_ms == getattr(raised, "retry_after_ms", 0)
            if expected is KiteMQError:
                assert answer.code() is grpc.StatusCode.INTERNAL
                assert f"request_id={error.request_id}" in caplog.text


async def test_a_client_s_request_id_comes_back(caplog: pytest.LogCaptureFixture) -> None:
    echo = Echo()
    echo.failure = ValueError("bug")
    async with serving(echo) as served, dial(served) as channel:
        for sent, returned in (("mine-1", True), ("x" * 65, False)):
            with pytest.raises(grpc.aio.AioRpcError) as failure:
                await method(channel, "unary_unary", "Unary")(
                    pb.GetRouteRequest(), metadata=(("kitemq-request-id", sent),)
                )
            assert (error_from_rpc(failure.value, address="").request_id == sent) is returned
    assert "request_id=mine-1" in caplog.text


async def test_what_does_not_parse_is_the_client_s_fault(caplog: pytest.LogCaptureFixture) -> None:
    async with serving(Echo()) as served, dial(served) as channel:
        bad = b"\xff\xff\xff"
        calls = [
            channel.unary_unary(f"/{SERVICE}/Unary")(bad),
            channel.unary_stream(f"/{SERVICE}/Generator")(bad),
            channel.stream_stream(f"/{SERVICE}/Writer")(iter([bad])),
            channel.stream_unary(f"/{SERVICE}/Collect")(iter([bad])),
        ]
        for call in calls:
            assert await call.code() is grpc.StatusCode.INVALID_ARGUMENT
            assert "not a valid message of" in await call.details()
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


async def test_a_reply_that_cannot_be_encoded_tells_nothing() -> None:
    async with serving(Echo()) as served, dial(served) as channel:
        call = channel.unary_unary(f"/{SERVICE}/Wrong")(b"")
        assert await call.code() is grpc.StatusCode.INTERNAL
        assert await call.details() == "internal error, see broker log"


async def test_an_unknown_method_is_unimplemented() -> None:
    async with serving(Echo()) as served, dial(served) as channel:
        assert await channel.unary_unary(f"/{SERVICE}/None")(b"").code() is grpc.StatusCode.UNIMPLEMENTED


async def test_a_handler_knows_the_listener() -> None:
    listeners = (INTERNAL, Listener("external", "127.0.0.1", 0))
    async with serving(Echo(), *listeners) as served:
        for name in ("internal", "external"):
            async with dial(served, name) as channel:
                calls = [method(channel, "unary_unary", "Unary")(pb.GetRouteRequest()) for _ in range(20)]
                assert {(await call).topic for call in calls} == {name}


async def test_latency_and_streams_are_counted() -> None:
    metrics = RpcMetrics()
    echo = Echo()
    async with serving(echo, metrics=metrics) as served, dial(served) as channel:
        await everything(channel)
        echo.failure = TopicNotFoundError("no")
        await everything(channel)
        held = channel.unary_unary(f"/{SERVICE}/Hold")(b"")
        await echo.held.wait()
        held.cancel()
        await echo.ended.wait()
    samples = {
        (sample.name, sample.labels["request_code"], sample.labels.get("response_code")): sample.value
        for family in metrics.collect()
        for sample in family.samples
        if not sample.name.endswith(("_bucket", "_sum", "_created"))
    }
    latency, ended = "rocketmq_rpc_latency_milliseconds_count", "kitemq_rpc_streams_ended_total"
    assert samples == {
        (latency, "Echo/Unary", "OK"): 1,
        (latency, "Echo/Unary", "NOT_FOUND"): 1,
        (latency, "Echo/Collect", "OK"): 1,
        (latency, "Echo/Collect", "NOT_FOUND"): 1,
        (latency, "Echo/Hold", "CANCELLED"): 1,
        ("kitemq_rpc_streams", "Echo/Generator", None): 0,
        ("kitemq_rpc_streams", "Echo/Writer", None): 0,
        (ended, "Echo/Generator", "OK"): 1,
        (ended, "Echo/Generator", "NOT_FOUND"): 1,
        (ended, "Echo/Writer", "OK"): 1,
        (ended, "Echo/Writer", "NOT_FOUND"): 1,
    }


async def test_clients_that_vanish_leave_nothing_behind(caplog: pytest.LogCaptureFixture) -> None:
    metrics = RpcMetrics()
    async with serving(Echo(), metrics=metrics) as served:
        for _ in range(20):
            channel = dial(served)
            stream = method(channel, "stream_stream", "Writer")()
            await stream.write(pb.GetRouteRequest(topic="t"))
            await stream.read()
            await channel.close()
        assert metrics._open[f"/{SERVICE}/Writer"] <= 20
    assert metrics._open[f"/{SERVICE}/Writer"] == 0
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


async def test_a_burst_of_calls_is_served_to_the_last() -> None:
    """As when a service comes back and all of its clients with it."""
    async with serving(Echo()) as served, dial(served) as channel:
        calls = [method(channel, "unary_unary", "Unary")(pb.GetRouteRequest(topic="t")) for _ in range(4_000)]
        answers = await asyncio.gather(*calls, return_exceptions=True)
    assert [answer for answer in answers if isinstance(answer, BaseException)] == []


# ---- health and reflection ----


async def test_health_of_every_service_and_the_goodbye() -> None:
    statuses = health_pb2.HealthCheckResponse
    async with serving(Echo()) as served:
        channel = dial(served)
        stub: Any = health_pb2_grpc.HealthStub(channel)
        for service in ("", SERVICE):
            reply = await stub.Check(health_pb2.HealthCheckRequest(service=service))
            assert reply.status == statuses.SERVING
        assert await stub.Check(health_pb2.HealthCheckRequest(service="no")).code() is grpc.StatusCode.NOT_FOUND
        watches = [stub.Watch(health_pb2.HealthCheckRequest(service=name)) for name in (SERVICE, SERVICE, "no")]
        first = [(await watch.read()).status for watch in watches]
        assert first == [statuses.SERVING, statuses.SERVING, statuses.SERVICE_UNKNOWN]
        watches[0].cancel()
        served.health.set_serving(False)
        assert (await watches[1].read()).status == statuses.NOT_SERVING
        served.health.set_serving(True)
        assert (await watches[1].read()).status == statuses.SERVING
    assert (await watches[1].read()).status == statuses.NOT_SERVING
    assert await watches[1].code() is grpc.StatusCode.OK
    await channel.close()


async def test_reflection_lists_and_describes_services() -> None:
    async with serving(Echo()) as served, dial(served) as channel:
        stub: Any = reflection_pb2_grpc.ServerReflectionStub(channel)
        ask = reflection_pb2.ServerReflectionRequest
        requests = [ask(list_services=""), ask(file_containing_symbol="kitemq.v1.Namesrv")]
        replies = [reply async for reply in stub.ServerReflectionInfo(iter(requests))]
        listed = {service.name for service in replies[0].list_services_response.service}
        assert listed == {SERVICE, "grpc.health.v1.Health", "grpc.reflection.v1alpha.ServerReflection"}
        assert replies[1].file_descriptor_response.file_descriptor_proto


# ---- stopping ----


async def test_held_calls_are_woken_before_the_server_stops() -> None:
    echo = Echo()
    order: list[str] = []

    async def wake() -> None:
        order.append("serving" if served.health._serving[""] else "not serving")
        echo.release.set()

    async with serving(echo, before_stop=wake, grace_s=60.0) as served:
        channel = dial(served)
        call = channel.unary_unary(f"/{SERVICE}/Hold")(b"")
        await echo.held.wait()
    assert order == ["not serving"]
    assert await call == b"released"
    await channel.close()


async def test_what_does_not_end_is_cancelled_after_the_grace_time() -> None:
    echo = Echo()
    async with serving(echo, grace_s=0.05) as served:
        channel = dial(served)
        call = channel.unary_unary(f"/{SERVICE}/Hold")(b"")
        await echo.held.wait()
    assert echo.ended.is_set()
    assert await call.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)
    await channel.close()


# ---- addresses ----


async def test_a_taken_port_is_an_error_that_says_so() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(ServeError, match=f"127.0.0.1:{port}: the port is taken"):
            async with serving(Echo(), INTERNAL, Listener("external", "127.0.0.1", port)):
                pass


@pytest.mark.parametrize("host", ["192.0.2.1", "no-such-host.invalid"])
async def test_an_address_of_another_machine(host: str) -> None:
    with pytest.raises(ServeError, match="not an address of this machine"):
        async with serving(Echo(), Listener("internal", host, 0)):
            pass


# ---- TLS ----


async def test_tls_by_listener_with_client_certificates(tmp_path: Path) -> None:
    pem = make_certificates(tmp_path)
    listeners = (INTERNAL, Listener("external", "127.0.0.1", 0))
    tls = Tls(pem.server_cert, pem.server_key, pem.ca)
    ca = pem.ca.read_bytes()
    with_certificate = grpc.ssl_channel_credentials(ca, pem.client_key.read_bytes(), pem.client_cert.read_bytes())
    without = grpc.ssl_channel_credentials(ca)
    async with serving(Echo(), *listeners, tls=tls, tls_listeners=("external",)) as served:
        async with dial(served, "internal") as channel:
            assert (await everything(channel))["Unary"] == ["t"]
        secure = f"127.0.0.1:{served.ports['external']}"
        async with grpc.aio.secure_channel(secure, with_certificate) as channel:
            assert (await everything(channel))["Unary"] == ["t"]
        for credentials in (without, None):
            options = grpc.aio.insecure_channel if credentials is None else grpc.aio.secure_channel
            async with options(*((secure,) if credentials is None else (secure, credentials))) as channel:
                answer = (await everything(channel))["Unary"]
                assert answer.code() is grpc.StatusCode.UNAVAILABLE


async def test_a_renewed_certificate_is_used_without_a_restart(tmp_path: Path) -> None:
    old, new = make_certificates(tmp_path / "old"), make_certificates(tmp_path / "new")
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"

    def install(source: Any, moment_ns: int) -> None:
        shutil.copy(source.server_cert, cert)
        shutil.copy(source.server_key, key)
        for path in (cert, key):
            os.utime(path, ns=(moment_ns, moment_ns))

    async def trusted(authority: bytes) -> bool:
        credentials = grpc.ssl_channel_credentials(authority)
        # Of its own, so that no connection made before is shared.
        options = (("grpc.use_local_subchannel_pool", 1),)
        address = f"127.0.0.1:{served.ports['internal']}"
        async with grpc.aio.secure_channel(address, credentials, options=options) as channel:
            return bool((await everything(channel))["Unary"] == ["t"])

    old_ca, new_ca = old.ca.read_bytes(), new.ca.read_bytes()
    install(old, 1)
    async with serving(Echo(), tls=Tls(cert, key, None)) as served:
        assert await trusted(old_ca)
        assert not await trusted(new_ca)
        install(new, 2)
        assert await trusted(new_ca)
        shutil.copy(old.server_key, key)
        assert await trusted(new_ca), "a key that is not the certificate's: the last good pair stays"
        cert.unlink()
        assert await trusted(new_ca)


@pytest.mark.parametrize("broken", ["cert", "key", "another key", "ca"])
async def test_files_that_are_no_certificates_are_refused_at_the_start(tmp_path: Path, broken: str) -> None:
    pem, other = make_certificates(tmp_path / "pem"), make_certificates(tmp_path / "other")
    garbage = tmp_path / "garbage.pem"
    garbage.write_text("-----BEGIN CERTIFICATE-----\nnot one\n")
    tls = Tls(
        garbage if broken == "cert" else pem.server_cert,
        {"key": garbage, "another key": other.server_key}.get(broken, pem.server_key),
        garbage if broken == "ca" else pem.ca,
    )
    with pytest.raises(ServeError, match="must be PEM"):
        async with serving(Echo(), tls=tls):
            pass
