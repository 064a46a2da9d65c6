"""Sending: Producer → accumulator (what waits per queue) → sender (one stream per broker)."""

from kitemq.producer.hooks import SendHook
from kitemq.producer.producer import Producer

__all__ = ["Producer", "SendHook"]
