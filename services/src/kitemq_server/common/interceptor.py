"""The one server interceptor: errors to statuses, latency, the caller's identity.

gRPC asks it once per call for the handler; the wrapped handler of a method is made once and kept, so a call costs one
dictionary look-up and two clock readings more. A stream's messages do not pass through here.

A request is parsed, and a reply encoded, inside the wrapper: gRPC itself would answer what it cannot parse with UNKNOWN
and the text of the exception.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import secrets
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from time import perf_counter
from typing import Any, NoReturn

import grpc
import grpc.aio
from google.protobuf.message import DecodeError

from kitemq.errors import (
    ERROR_METADATA_KEY,
    REQUEST_ID_METADATA_KEY,
    RETRY_AFTER_METADATA_KEY,
    InternalBrokerError,
    InvalidRequestError,
    KiteMQError,
)
from kitemq_server.common.calls import ANONYMOUS, Call, enter_call
from kitemq_server.common.metrics import RpcMetrics

logger = logging.getLogger(__name__)

# Details travel percent-encoded in a header; gRPC refuses a block of headers over 8 KiB.
DETAILS_CHARS_MAX = 1_000
REQUEST_ID_CHARS_MAX = 64

_Parse = Callable[[bytes], Any]
_Context = Any


class ServiceInterceptor(grpc.aio.ServerInterceptor):
    """One per server, which is one per listener."""

    def __init__(self, listener: str, metrics: RpcMetrics) -> None:
        self._call = Call(listener, ANONYMOUS)
        self._metrics = metrics
        self._wrapped: dict[str, grpc.RpcMethodHandler[Any, Any]] = {}

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any] | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        """The wrapped handler of the called method; None (gRPC answers UNIMPLEMENTED) when there is none.

        The task that asks is the one that runs the handler, so what is set here is what the handler sees.
        """
        enter_call(self._call)
        method = handler_call_details.method
        wrapped = self._wrapped.get(method)
        if wrapped is None:
            handler = await continuation(handler_call_details)
            if handler is None:
                return None
            wrapped = self._wrapped[method] = _wrap(handler, method, self._metrics)
        return wrapped


def _wrap(
    handler: grpc.RpcMethodHandler[Any, Any], method: str, metrics: RpcMetrics
) -> grpc.RpcMethodHandler[Any, Any]:
    if handler.response_streaming:
        if handler.request_streaming:
            return grpc.stream_stream_rpc_method_handler(
                _stream(handler.stream_stream, None, method, metrics),
                _guarded(handler.request_deserializer, method),
                handler.response_serializer,
            )
        return grpc.unary_stream_rpc_method_handler(
            _stream(handler.unary_stream, _guarded(handler.request_deserializer, method), method, metrics),
            None,
            handler.response_serializer,
        )
    if handler.request_streaming:
        return grpc.stream_unary_rpc_method_handler(
            _unary(handler.stream_unary, None, handler.response_serializer, method, metrics),
            _guarded(handler.request_deserializer, method),
            None,
        )
    return grpc.unary_unary_rpc_method_handler(
        _unary(
            handler.unary_unary,
            _guarded(handler.request_deserializer, method),
            handler.response_serializer,
            method,
            metrics,
        ),
        None,
        None,
    )


def _guarded(parse: _Parse | None, method: str) -> _Parse | None:
    if parse is None:
        return None

    def guarded(data: bytes) -> Any:
        try:
            return parse(data)
        except DecodeError:
            raise InvalidRequestError(f"the request is not a valid message of {method}") from None

    return guarded


def _unary(
    behavior: Callable[..., Awaitable[Any]] | None,
    parse: _Parse | None,
    encode: Callable[[Any], bytes] | None,
    method: str,
    metrics: RpcMetrics,
) -> Callable[[Any, _Context], Awaitable[Any]]:
    assert behavior is not None
    observe_ok = metrics.observer(method, grpc.StatusCode.OK)

    async def call(request: Any, context: _Context) -> Any:
        started = perf_counter()
        try:
            response = await behavior(request if parse is None else parse(request), context)
            if encode is not None:
                response = encode(response)
        except BaseException as error:
            metrics.observer(method, _code(error, context))(perf_counter() - started)
            await _answer(error, context, method)
        observe_ok(perf_counter() - started)
        return response

    return call


def _stream(
    behavior: Callable[..., Any] | None, parse: _Parse | None, method: str, metrics: RpcMetrics
) -> Callable[[Any, _Context], Awaitable[None]]:
    assert behavior is not None
    generates = inspect.isasyncgenfunction(behavior)

    async def call(request: Any, context: _Context) -> None:
        code = grpc.StatusCode.OK
        metrics.stream_opened(method)
        try:
            if parse is not None:
                request = parse(request)
            if generates:
                async with aclosing(behavior(request, context)) as responses:
                    async for response in responses:
                        await context.write(response)
            else:
                await behavior(request, context)
        except BaseException as error:
            code = _code(error, context)
            await _answer(error, context, method)
        finally:
            metrics.stream_closed(method, code)

    return call


def _code(error: BaseException, context: _Context) -> grpc.StatusCode:
    """What the client is told, or what gRPC has told it already."""
    if isinstance(error, KiteMQError) and error.code is not grpc.StatusCode.UNKNOWN:
        return error.code
    if isinstance(error, grpc.aio.AbortError):
        return context.code() or grpc.StatusCode.UNKNOWN
    # The client has gone, or the server stops.
    if isinstance(error, (asyncio.CancelledError, grpc.aio.BaseError)):
        return grpc.StatusCode.CANCELLED
    return grpc.StatusCode.INTERNAL


async def _answer(error: BaseException, context: _Context, method: str) -> NoReturn:
    """End the call with the status and trailing metadata of `error`."""
    if not isinstance(error, Exception) or isinstance(error, grpc.aio.BaseError):
        raise error
    request_id = _request_id(context)
    if not isinstance(error, KiteMQError) or error.code is grpc.StatusCode.UNKNOWN:
        logger.error("rpc failed method=%s request_id=%s", method, request_id, exc_info=error)
        error = InternalBrokerError("internal error, see broker log")
    metadata = [(ERROR_METADATA_KEY, type(error).__name__), (REQUEST_ID_METADATA_KEY, request_id)]
    if error.retry_after_ms:
        metadata.append((RETRY_AFTER_METADATA_KEY, str(error.retry_after_ms)))
    await context.abort(error.code, error.message[:DETAILS_CHARS_MAX], tuple(metadata))
    raise AssertionError("abort raises")


def _request_id(context: _Context) -> str:
    """The client's own, so that it can be found in both logs; else a new one."""
    for key, value in context.invocation_metadata():
        if key == REQUEST_ID_METADATA_KEY and isinstance(value, str) and 0 < len(value) <= REQUEST_ID_CHARS_MAX:
            return value
    return secrets.token_hex(8)
