"""KiteMQ: a message queue of the RocketMQ class. This is the client SDK.

async with kitemq.Producer("127.0.0.1:9876", group="shop") as producer:
    receipt = await producer.send(kitemq.Message("orders", b"..."))
"""

import logging

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

logging.getLogger("kitemq").addHandler(logging.NullHandler())
