"""Sending: Producer → accumulator (what waits per queue) → sender (one stream per broker)."""

from kitemq.producer.hooks import SendHook
from kitemq.producer.producer import CLOSE_TIMEOUT_S, Producer

__all__ = ["CLOSE_TIMEOUT_S", "Producer", "SendHook"]
