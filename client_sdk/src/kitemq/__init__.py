"""KiteMQ: a message queue of the RocketMQ class. This is the client SDK.

async with kitemq.Producer("127.0.0.1:9876", group="shop") as producer:
    receipt = await producer.send(kitemq.Message("orders", b"..."))
"""

import logging
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kitemq.compression import Compression
    from kitemq.consumer import ConsumeHook, MessageModel, Position, PullConsumer, PushConsumer
    from kitemq.errors import (
        AlreadyExistsError,
        BrokerBusyError,
        BrokerUnavailableError,
        ClientClosedError,
        CorruptRecordError,
        DivergedError,
        FencedEpochError,
        GroupNotFoundError,
        InternalBrokerError,
        InvalidMessageError,
        InvalidRequestError,
        KiteMQError,
        MessageNotFoundError,
        NotAllowedError,
        NotEnoughReplicasError,
        NotFoundError,
        NotMasterError,
        NotReadableYetError,
        OutOfOrderError,
        PermissionDeniedError,
        RequestTimeoutError,
        StoreFullError,
        TopicNotFoundError,
    )
    from kitemq.message import Message, MessageQueue, ReceivedMessage, SendReceipt, SendStatus
    from kitemq.producer import Producer, SendHook
    from kitemq.rpc import TlsConfig

__all__ = [
    "AlreadyExistsError",
    "BrokerBusyError",
    "BrokerUnavailableError",
    "ClientClosedError",
    "Compression",
    "ConsumeHook",
    "CorruptRecordError",
    "DivergedError",
    "FencedEpochError",
    "GroupNotFoundError",
    "InternalBrokerError",
    "InvalidMessageError",
    "InvalidRequestError",
    "KiteMQError",
    "Message",
    "MessageModel",
    "MessageNotFoundError",
    "MessageQueue",
    "NotAllowedError",
    "NotEnoughReplicasError",
    "NotFoundError",
    "NotMasterError",
    "NotReadableYetError",
    "OutOfOrderError",
    "PermissionDeniedError",
    "Position",
    "Producer",
    "PullConsumer",
    "PushConsumer",
    "ReceivedMessage",
    "RequestTimeoutError",
    "SendHook",
    "SendReceipt",
    "SendStatus",
    "StoreFullError",
    "TlsConfig",
    "TopicNotFoundError",
]

# Modules that are part of the API.
_MODULES = frozenset({"admin", "errors", "sync"})
# Where each name is. Loaded on first use: servers and `kitemq --help` need only a part of the SDK.
_HOMES = {
    name: module
    for module, names in (
        ("compression", ("Compression",)),
        ("consumer", ("ConsumeHook", "MessageModel", "Position", "PullConsumer", "PushConsumer")),
        ("message", ("Message", "MessageQueue", "ReceivedMessage", "SendReceipt", "SendStatus")),
        ("producer", ("Producer", "SendHook")),
        ("rpc", ("TlsConfig",)),
    )
    for name in names
}

logging.getLogger("kitemq").addHandler(logging.NullHandler())


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return import_module(f"kitemq.{name}")
    if name not in __all__:
        raise AttributeError(f"module 'kitemq' has no attribute {name!r}")
    value = getattr(import_module(f"kitemq.{_HOMES.get(name, 'errors')}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
