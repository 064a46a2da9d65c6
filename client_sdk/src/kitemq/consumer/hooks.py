"""What users may hang into a push consumer: logs, traces, metrics."""

from __future__ import annotations

from kitemq.message import ReceivedMessage


class ConsumeHook:
    """Called around every handler, on the event loop: keep it quick. What it raises is logged and otherwise ignored."""

    def before_consume(self, message: ReceivedMessage) -> None:
        """The handler is about to be called."""

    def after_consume(self, message: ReceivedMessage, error: Exception | None) -> None:
        """The handler returned, or raised `error`: then it will be called again."""
