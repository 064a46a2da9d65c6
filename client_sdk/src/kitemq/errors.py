"""The one error table, shared by broker, namesrv and SDK.

Each class says whether a retry can help (`retriable`), whether the route should be read again first (`refresh_route`),
and whether the request has certainly not taken effect (`not_applied`). Nothing else decides retries. The class name
travels in the trailing metadata `kitemq-error`, or in `Error.name` inside a stream; the text is for people.

    KiteMQError
    ├── InvalidRequestError            INVALID_ARGUMENT
    │   └── InvalidMessageError
    ├── ClientClosedError              (local)
    ├── NotFoundError                  NOT_FOUND
    │   ├── TopicNotFoundError
    │   ├── GroupNotFoundError
    │   └── MessageNotFoundError
    ├── AlreadyExistsError             ALREADY_EXISTS
    ├── NotAllowedError                FAILED_PRECONDITION
    ├── NotMasterError                 FAILED_PRECONDITION    retriable, refresh_route
    ├── NotEnoughReplicasError         FAILED_PRECONDITION    retriable
    ├── NotReadableYetError            FAILED_PRECONDITION    retriable, refresh_route
    ├── OutOfOrderError                ABORTED                retriable
    ├── DivergedError                  ABORTED                retriable, refresh_route
    ├── FencedEpochError               ABORTED                refresh_route
    ├── PermissionDeniedError          PERMISSION_DENIED
    ├── BrokerBusyError                RESOURCE_EXHAUSTED     retriable
    ├── StoreFullError                 RESOURCE_EXHAUSTED     retriable
    ├── BrokerUnavailableError         UNAVAILABLE            retriable, refresh_route
    ├── RequestTimeoutError            DEADLINE_EXCEEDED      retriable (outcome unknown)
    ├── CorruptRecordError             DATA_LOSS
    └── InternalBrokerError            INTERNAL
"""

from __future__ import annotations

import re
from typing import ClassVar

import grpc

from kitemq.proto.v1 import broker_pb2

ERROR_METADATA_KEY = "kitemq-error"
RETRY_AFTER_METADATA_KEY = "kitemq-retry-after-ms"
REQUEST_ID_METADATA_KEY = "kitemq-request-id"


class KiteMQError(Exception):
    """Base of everything that KiteMQ raises on purpose.

    topic, address ("host:port" of the broker or namesrv) and request_id are None where they do not apply.
    retry_after_ms: what the broker asked for, 0 = nothing.
    """

    code: ClassVar[grpc.StatusCode] = grpc.StatusCode.UNKNOWN
    retriable: ClassVar[bool] = False
    refresh_route: ClassVar[bool] = False
    not_applied: ClassVar[bool] = True

    def __init__(
        self,
        message: str,
        *,
        topic: str | None = None,
        address: str | None = None,
        request_id: str | None = None,
        retry_after_ms: int = 0,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.topic = topic
        self.address = address
        self.request_id = request_id
        self.retry_after_ms = retry_after_ms

    def __str__(self) -> str:
        where = [
            f"{name}={value}"
            for name, value in (("topic", self.topic), ("address", self.address), ("request", self.request_id))
            if value
        ]
        return f"{self.message} [{' '.join(where)}]" if where else self.message


class InvalidRequestError(KiteMQError):
    """The request can never succeed as it is: a bad name, number or expression."""

    code = grpc.StatusCode.INVALID_ARGUMENT


class InvalidMessageError(InvalidRequestError):
    """The message breaks a limit or a rule; it was not stored."""


class ClientClosedError(KiteMQError):
    """The producer or consumer is not started, or already closed."""


class NotFoundError(KiteMQError):
    """What was asked for does not exist."""

    code = grpc.StatusCode.NOT_FOUND


class TopicNotFoundError(NotFoundError):
    """No broker has the topic, and it is not created by itself."""

    refresh_route = True


class GroupNotFoundError(NotFoundError):
    """The broker does not know the consumer group."""

    refresh_route = True


class MessageNotFoundError(NotFoundError):
    """No stored message has this id, key or offset."""


class AlreadyExistsError(KiteMQError):
    """There is one of this name already, with another configuration."""

    code = grpc.StatusCode.ALREADY_EXISTS


class NotAllowedError(KiteMQError):
    """The state of the topic, group or broker forbids it; the text says how to go on."""

    code = grpc.StatusCode.FAILED_PRECONDITION


class NotMasterError(KiteMQError):
    """This broker does not take writes for its group (any more)."""

    code = grpc.StatusCode.FAILED_PRECONDITION
    retriable = True
    refresh_route = True


class NotEnoughReplicasError(KiteMQError):
    """Fewer replicas are in sync than the broker must have; refused before the append."""

    code = grpc.StatusCode.FAILED_PRECONDITION
    retriable = True


class NotReadableYetError(KiteMQError):
    """A slave, or a new master, is behind the offset asked for: wait, or ask the master."""

    code = grpc.StatusCode.FAILED_PRECONDITION
    retriable = True
    refresh_route = True


class OutOfOrderError(KiteMQError):
    """An earlier batch of this queue was refused on this stream: resume from that one."""

    code = grpc.StatusCode.ABORTED
    retriable = True


class DivergedError(KiteMQError):
    """The history that was read has been cut off by a failover: rewind to `queue_offset`."""

    code = grpc.StatusCode.ABORTED
    retriable = True
    refresh_route = True


class FencedEpochError(KiteMQError):
    """A newer master has been seen; this claim is ignored."""

    code = grpc.StatusCode.ABORTED
    refresh_route = True


class PermissionDeniedError(KiteMQError):
    """The topic, group or broker does not permit it; the text names the missing right."""

    code = grpc.StatusCode.PERMISSION_DENIED


class BrokerBusyError(KiteMQError):
    """A queue of the broker is full; come back after `retry_after_ms`, or go to another broker."""

    code = grpc.StatusCode.RESOURCE_EXHAUSTED
    retriable = True


class StoreFullError(KiteMQError):
    """The broker's disk is full; the text names the broker and its free bytes."""

    code = grpc.StatusCode.RESOURCE_EXHAUSTED
    retriable = True


class BrokerUnavailableError(KiteMQError):
    """The broker or namesrv cannot be reached, or is stopping. A request under way may have taken effect."""

    code = grpc.StatusCode.UNAVAILABLE
    retriable = True
    refresh_route = True
    not_applied = False


class RequestTimeoutError(KiteMQError, TimeoutError):
    """No answer in time: the request may or may not have taken effect."""

    code = grpc.StatusCode.DEADLINE_EXCEEDED
    retriable = True
    not_applied = False


class CorruptRecordError(KiteMQError):
    """A stored record fails its checksum."""

    code = grpc.StatusCode.DATA_LOSS


class InternalBrokerError(KiteMQError):
    """A bug in the broker; its log has the details under the request id."""

    code = grpc.StatusCode.INTERNAL
    not_applied = False


def _table() -> dict[str, type[KiteMQError]]:
    classes: dict[str, type[KiteMQError]] = {}
    stack: list[type[KiteMQError]] = [KiteMQError]
    while stack:
        cls = stack.pop()
        classes[cls.__name__] = cls
        stack.extend(cls.__subclasses__())
    return classes


ERRORS: dict[str, type[KiteMQError]] = _table()

_OPENSSL_REASON = re.compile(r"OPENSSL_internal:(\w+)")

# What a status means when the peer is not ours (a proxy) or died before it could say more.
_BY_CODE: dict[grpc.StatusCode, type[KiteMQError]] = {
    grpc.StatusCode.INVALID_ARGUMENT: InvalidRequestError,
    grpc.StatusCode.NOT_FOUND: NotFoundError,
    grpc.StatusCode.PERMISSION_DENIED: PermissionDeniedError,
    grpc.StatusCode.UNAUTHENTICATED: PermissionDeniedError,
    grpc.StatusCode.RESOURCE_EXHAUSTED: BrokerBusyError,
    grpc.StatusCode.UNAVAILABLE: BrokerUnavailableError,
    grpc.StatusCode.CANCELLED: BrokerUnavailableError,
    grpc.StatusCode.DEADLINE_EXCEEDED: RequestTimeoutError,
    grpc.StatusCode.DATA_LOSS: CorruptRecordError,
}


def unreached_reason(details: str) -> str:
    """Why a connection failed, out of gRPC's words, which name every address and layer."""
    if openssl := _OPENSSL_REASON.search(details):
        return f"TLS handshake failed ({openssl[1].lower().replace('_', ' ')})"
    return details.rpartition(": ")[2].lower().rstrip("]")


def error_from_rpc(error: grpc.aio.AioRpcError, *, address: str, topic: str | None = None) -> KiteMQError:
    """The table's error for a failed call."""
    metadata = {key: value for key, value in (error.trailing_metadata() or ()) if isinstance(value, str)}
    cls = ERRORS.get(metadata.get(ERROR_METADATA_KEY, "")) or _BY_CODE.get(error.code(), InternalBrokerError)
    retry_after = metadata.get(RETRY_AFTER_METADATA_KEY, "")
    text = error.details() or error.code().name
    if ERROR_METADATA_KEY not in metadata:
        if cls is BrokerUnavailableError:
            text = f"cannot reach it: {unreached_reason(text)}"
        elif error.code() is grpc.StatusCode.UNIMPLEMENTED:
            text = "it does not know this request: is this the port of another service, or an older version?"
    return cls(
        text,
        topic=topic,
        address=address,
        request_id=metadata.get(REQUEST_ID_METADATA_KEY),
        retry_after_ms=int(retry_after) if retry_after.isdigit() else 0,
    )


def error_from_stream(error: broker_pb2.Error, *, address: str, topic: str | None = None) -> KiteMQError:
    """The table's error for a refusal inside a stream."""
    cls = ERRORS.get(error.name, InternalBrokerError)
    return cls(error.message, topic=topic, address=address, retry_after_ms=error.retry_after_ms)


def error_to_stream(error: KiteMQError) -> broker_pb2.Error:
    """What a stream carries for `error`."""
    return broker_pb2.Error(name=type(error).__name__, message=error.message, retry_after_ms=error.retry_after_ms)
