"""Whatever comes in, by any method: an answer from the error table, never INTERNAL, and the broker serves on."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from typing import Any

import grpc
import grpc.aio
import pytest
from google.protobuf.descriptor import FieldDescriptor, MethodDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kitemq.errors import ERRORS
from kitemq.proto.v1 import admin_pb2, broker_pb2
from kitemq.proto.v1.broker_pb2 import (
    ConsumerInfo,
    HeartbeatRequest,
    PullRequest,
    QueueBatch,
    SendRequest,
    SendResponse,
)
from kitemq.protocol.names import GRPC_BYTES_MAX
from kitemq_server.broker.server import BrokerHandle
from tests.broker.wire import Client, batch, numbered, until

METHODS: list[MethodDescriptor] = [
    *broker_pb2.DESCRIPTOR.services_by_name["Broker"].methods,
    *admin_pb2.DESCRIPTOR.services_by_name["BrokerAdmin"].methods,
]
# Names that mean something to the broker the tests run on, among any text.
TEXTS = st.one_of(
    st.sampled_from(["orders", "g", "c", "", "*", "a || b", "TBW102", "%RETRY%g", "permission", "x" * 300]),
    st.text(max_size=20),
)
NUMBERS = st.one_of(st.integers(0, 4), st.sampled_from([2**31 - 1, 2**32 - 1]))
BIG_NUMBERS = st.one_of(NUMBERS, st.sampled_from([2**32, 2**63 - 1, 2**63, 2**64 - 1]))
CALM = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)


def value_of(field: FieldDescriptor, depth: int) -> st.SearchStrategy[Any]:
    kinds = FieldDescriptor
    if field.type == kinds.TYPE_MESSAGE:
        return message_of(field.message_type, depth - 1)
    if field.type == kinds.TYPE_STRING:
        return TEXTS
    if field.type == kinds.TYPE_BYTES:
        return st.binary(max_size=64)
    if field.type == kinds.TYPE_BOOL:
        return st.booleans()
    if field.type == kinds.TYPE_ENUM:
        return st.integers(0, 5)
    return BIG_NUMBERS if field.type in (kinds.TYPE_UINT64, kinds.TYPE_FIXED64) else NUMBERS


@st.composite
def message_of(draw: st.DrawFn, descriptor: Any, depth: int = 4) -> Message:
    """A message of this type with any of its fields set to anything."""
    message = GetMessageClass(descriptor)()
    if depth == 0:
        return message
    for field in descriptor.fields:
        if not draw(st.booleans()):
            continue
        value = getattr(message, field.name)
        if field.message_type is not None and field.message_type.GetOptions().map_entry:
            for key, item in draw(st.dictionaries(TEXTS, TEXTS, max_size=2)).items():
                value[key] = item
        elif field.is_repeated:
            items = draw(st.lists(value_of(field, depth), max_size=3))
            value.extend(items)
        elif field.message_type is not None:
            value.CopyFrom(draw(value_of(field, depth)))
        else:
            setattr(message, field.name, draw(value_of(field, depth)))
    return message


@pytest.fixture
async def serving(client: Client, handle: BrokerHandle, caplog: pytest.LogCaptureFixture) -> AsyncIterator[Client]:
    """A client; at the end nothing was a surprise to the broker, and it still stores and delivers."""
    caplog.set_level(logging.ERROR)
    await client.send_stream().send(batch(numbered("orders", 1, 5, tag="a", keys=["k"])))
    await client.broker.Heartbeat(HeartbeatRequest(client_id="c", consumers=[ConsumerInfo(group="g")]))
    items = (await client.admin.GetConfig(admin_pb2.GetConfigRequest())).items
    yield client
    assert not [record for record in caplog.records if "rpc failed" in record.message]
    values = {item.key: item.value for item in items if item.changeable}
    await client.admin.SetConfig(admin_pb2.SetConfigRequest(values=values))
    (result,) = await client.send_stream().send(batch(numbered("alive", 1, 3)))
    assert not result.HasField("error"), result
    pull = client.pull_stream()
    await pull.open("alive")
    assert (await pull.read()).bodies == [b"1", b"2", b"3"]


def check_status(error: grpc.aio.AioRpcError) -> None:
    name = dict(error.trailing_metadata() or ()).get("kitemq-error", "")
    assert name in ERRORS, f"{error.code()} {error.details()}"
    assert error.code() is ERRORS[name].code
    assert error.code() is not grpc.StatusCode.INTERNAL
    assert "/" not in (error.details() or "").replace("kitemq.v1", "") or "data" not in (error.details() or "")


async def call(client: Client, method: MethodDescriptor, request: bytes) -> None:
    path = f"/{method.containing_service.full_name}/{method.name}"
    try:
        if method.client_streaming:
            stream = client.channel.stream_stream(path)()
            await stream.write(request)
            await stream.done_writing()
            async with asyncio.timeout(0.05):
                while (reply := await stream.read()) is not grpc.aio.EOF:
                    GetMessageClass(method.output_type).FromString(reply)
        elif method.server_streaming:
            stream = client.channel.unary_stream(path)(request)
            async with asyncio.timeout(0.05):
                while await stream.read() is not grpc.aio.EOF:
                    pass
        else:
            reply = await client.channel.unary_unary(path)(request, timeout=0.3 if method.name == "PullMessage" else 30)
            GetMessageClass(method.output_type).FromString(reply)
    except TimeoutError:
        stream.cancel()
    except grpc.aio.AioRpcError as error:
        if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED and method.name == "PullMessage":
            return  # a long poll
        check_status(error)


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
async def test_any_bytes_to_any_method(serving: Client, method: MethodDescriptor) -> None:
    loop = asyncio.get_running_loop()

    @CALM
    @given(st.binary(max_size=200))
    def attempts(request: bytes) -> None:
        asyncio.run_coroutine_threadsafe(call(serving, method, request), loop).result(30)

    await asyncio.to_thread(attempts)


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
async def test_any_message_to_any_method(serving: Client, method: MethodDescriptor) -> None:
    loop = asyncio.get_running_loop()

    @CALM
    @given(message_of(method.input_type))
    def attempts(request: Message) -> None:
        asyncio.run_coroutine_threadsafe(call(serving, method, request.SerializeToString()), loop).result(30)

    await asyncio.to_thread(attempts)


@pytest.mark.parametrize("method", ["SendMessage", "Heartbeat", "Send", "Pull"])
async def test_a_message_over_grpcs_limit(serving: Client, method: str) -> None:
    too_much = bytes(GRPC_BYTES_MAX + 1)
    channel: Any = grpc.aio.insecure_channel(serving.address, options=[("grpc.max_send_message_length", -1)])
    path = f"/kitemq.v1.Broker/{method}"
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        if method in ("Send", "Pull"):
            stream = channel.stream_stream(path)()
            await stream.write(too_much)
            await stream.read()
        else:
            await channel.unary_unary(path)(too_much)
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    await channel.close()


async def test_any_batches_on_one_stream(serving: Client) -> None:
    """Good and bad batches mixed: the good ones are stored in order, each request is answered once."""
    loop = asyncio.get_running_loop()
    stored: dict[tuple[str, int], int] = {("orders", 0): 5}
    send = serving.channel.stream_stream("/kitemq.v1.Broker/Send")()
    numbers = iter(range(10**9))

    async def exchange(batches: list[QueueBatch]) -> None:
        number = next(numbers)
        await send.write(SendRequest(number=number, batches=batches).SerializeToString())
        (result,) = SendResponse.FromString(await send.read()).results
        assert result.number == number
        assert len(result.batches) == len(batches)
        for wanted, got in zip(batches, result.batches, strict=True):
            if got.HasField("error"):
                assert got.error.name in ERRORS
                assert got.error.name != "InternalBrokerError"
                continue
            place = (wanted.topic, wanted.queue_id)
            assert sum(run.count for run in got.offsets) == len(wanted.sizes)
            for run in got.offsets:
                if not run.repeated:
                    assert run.first_queue_offset == stored.get(place, 0)
                    stored[place] = run.first_queue_offset + run.count

    good = st.builds(
        lambda first, count, queue, instance, resume: batch(
            numbered("orders", first, count, instance=instance), queue_id=queue, resume=resume
        ),
        st.integers(1, 50),
        st.integers(1, 3),
        st.integers(0, 5),
        st.integers(0, 2),
        st.booleans(),
    )

    @CALM
    @given(st.lists(st.one_of(good, message_of(QueueBatch.DESCRIPTOR)), max_size=4))
    def attempts(batches: list[QueueBatch]) -> None:
        asyncio.run_coroutine_threadsafe(exchange(batches), loop).result(30)

    await asyncio.to_thread(attempts)
    send.cancel()


async def test_any_requests_on_one_pull_stream(serving: Client, handle: BrokerHandle) -> None:
    """Opened, fed and closed in any order: what comes back parses, and nothing is left of it."""
    loop = asyncio.get_running_loop()
    await serving.send_stream().send(batch(numbered("orders", 1, 20, tag="a"), resume=True))

    async def exchange(requests: list[PullRequest]) -> None:
        pull = serving.channel.stream_stream("/kitemq.v1.Broker/Pull")()
        for request in requests:
            await pull.write(request.SerializeToString())
        for number in {request.number for request in requests}:
            await pull.write(PullRequest(number=number, close=True).SerializeToString())
        await pull.done_writing()
        while (reply := await pull.read()) is not grpc.aio.EOF:
            header = broker_pb2.PullResponse.FromString(reply)
            assert header.error.name in ("", *ERRORS)
            assert header.error.name != "InternalBrokerError"
            assert len(header.sizes) == len(header.records)

    request = st.builds(
        PullRequest,
        number=st.integers(0, 2),
        topic=st.sampled_from(["orders", "orders", "nothing", ""]),
        queue_id=st.integers(0, 4),
        queue_offset=st.sampled_from([0, 0, 5, 20, 21, 2**64 - 1]),
        filter=st.sampled_from(["", "a", "b", "||"]),
        credit_messages=st.sampled_from([0, 1, 7, 2**32 - 1]),
        credit_bytes=st.sampled_from([0, 1, 500, 2**64 - 1]),
        reply_bytes_max=st.sampled_from([0, 1, 300, 2**32 - 1]),
        suspend_ms=st.sampled_from([0, 1, 2**32 - 2, 2**32 - 1]),
        close=st.booleans(),
        last_epoch=st.sampled_from([0, 1, 2**32 - 1]),
    )

    @CALM
    @given(st.lists(st.one_of(request, message_of(PullRequest.DESCRIPTOR)), max_size=6))
    def attempts(requests: list[PullRequest]) -> None:
        asyncio.run_coroutine_threadsafe(exchange(requests), loop).result(30)

    await asyncio.to_thread(attempts)
    await until(lambda: handle.broker.pulls.subscription_count == 0 and not len(handle.broker.holds))
