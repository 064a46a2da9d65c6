"""Finding stored messages: by id, by key, by queue offset, by physical offset."""

from __future__ import annotations

from kitemq.errors import InvalidRequestError, MessageNotFoundError
from kitemq.proto.v1 import admin_pb2
from kitemq.proto.v1.message_pb2 import Message, Segment
from kitemq.protocol.record import KIND_MESSAGE
from kitemq_server.broker.topics import Topics
from kitemq_server.store.message_store import MessageStore, Record

RESULTS_DEFAULT = 32
RESULTS_MAX = 64
# Records of one answer together: it has to fit a gRPC message.
RESULT_BYTES_MAX = 8 * 1024 * 1024


class Queries:
    """Reads of single messages for operators."""

    def __init__(self, store: MessageStore, topics: Topics) -> None:
        self._store = store
        self._topics = topics

    def run(self, request: admin_pb2.QueryMessagesRequest) -> admin_pb2.QueryMessagesResponse:
        """Newest first. Raises MessageNotFoundError when nothing is found."""
        if request.max_count > RESULTS_MAX:
            raise InvalidRequestError(f"max_count is {request.max_count}: at most {RESULTS_MAX}")
        response = admin_pb2.QueryMessagesResponse()
        byte_count = 0
        for message in self._find(request, request.max_count or RESULTS_DEFAULT):
            byte_count += message.ByteSize()
            if response.records and byte_count > RESULT_BYTES_MAX:
                break
            response.records.append(message)
        if not response.records:
            raise MessageNotFoundError("no stored message fits: it was never stored, or has been deleted for its age")
        return response

    def _find(self, request: admin_pb2.QueryMessagesRequest, count_max: int) -> list[Message]:
        match request.WhichOneof("by"):
            case "message_id":
                return _messages(self._store.find_by_id(request.message_id))
            case "key":
                return self._by_key(request.key, count_max)
            case "queue":
                return self._in_queue(request.queue)
            case "physical_offset":
                return _messages(self._store.read_record(request.physical_offset))
            case _:
                raise InvalidRequestError("say by what: message_id, key, queue or physical_offset")

    def _by_key(self, query: admin_pb2.KeyQuery, count_max: int) -> list[Message]:
        self._topics.get(query.topic)
        if not query.key:
            raise InvalidRequestError("key is empty")
        if query.end_timestamp_ms and query.end_timestamp_ms <= query.begin_timestamp_ms:
            raise InvalidRequestError("the time range ends before it begins")
        return _messages(
            *self._store.find_by_key(
                query.topic,
                query.key,
                begin_ms=query.begin_timestamp_ms,
                end_ms=query.end_timestamp_ms,
                count_max=count_max,
            )
        )

    def _in_queue(self, query: admin_pb2.QueueQuery) -> list[Message]:
        queue = self._topics.queue(query.topic, query.queue_id)
        result = self._store.read(queue, query.queue_offset, count_max=1, bytes_max=1)
        if not result.count or result.first_queue_offset != query.queue_offset:
            return []
        return list(Segment.FromString(result.records).records)


def _messages(*records: Record | None) -> list[Message]:
    return [record.message() for record in records if record is not None and record.kind == KIND_MESSAGE]
