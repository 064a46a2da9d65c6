"""Pull and push consumers: pull_stream brings chunks, held_queue keeps count, core takes and hands over queues."""

from kitemq.consumer.hooks import ConsumeHook
from kitemq.consumer.options import MessageModel, Position
from kitemq.consumer.pull_consumer import PullConsumer
from kitemq.consumer.push_consumer import Handler, PushConsumer

__all__ = ["ConsumeHook", "Handler", "MessageModel", "Position", "PullConsumer", "PushConsumer"]
