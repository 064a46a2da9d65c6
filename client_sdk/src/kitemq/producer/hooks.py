"""Users' code around a send."""

from __future__ import annotations

from kitemq.message import Message, SendReceipt


class SendHook:
    """Derive from it and override what you need. Both run on the loop: keep them quick."""

    def before_send(self, message: Message) -> Message:
        """What to send instead of `message`. An exception here is raised by `send`, and nothing is sent."""
        return message

    def after_send(self, message: Message, receipt: SendReceipt | None, error: BaseException | None) -> None:
        """Called once per message with its receipt or its error. Exceptions are logged."""
