"""Administration of a cluster from Python: `async with AdminClient("127.0.0.1:9876") as admin: ...`."""

from kitemq.admin.client import AdminClient
from kitemq.admin.results import (
    BrokerDescription,
    BrokerInfo,
    ConfigItem,
    GroupDescription,
    GroupMember,
    GroupQueue,
    GroupSummary,
    OffsetMove,
    QueueState,
    TopicChange,
    TopicDescription,
    TopicSettings,
    TopicSummary,
    permission_text,
)

__all__ = [
    "AdminClient",
    "BrokerDescription",
    "BrokerInfo",
    "ConfigItem",
    "GroupDescription",
    "GroupMember",
    "GroupQueue",
    "GroupSummary",
    "OffsetMove",
    "QueueState",
    "TopicChange",
    "TopicDescription",
    "TopicSettings",
    "TopicSummary",
    "permission_text",
]
