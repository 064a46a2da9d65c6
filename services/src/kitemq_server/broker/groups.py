"""Consumer groups of this broker: the table and its rules."""

from __future__ import annotations

import logging

from kitemq.errors import GroupNotFoundError, InvalidRequestError, NotAllowedError, PermissionDeniedError
from kitemq.proto.v1.message_pb2 import GroupConfig, SystemRecord
from kitemq.protocol.names import QUEUE_COUNT_MAX, check_group
from kitemq_server.broker.settings import LiveSettings
from kitemq_server.store.message_store import MessageStore

log = logging.getLogger(__name__)

GROUPS_MAX = 100_000
# As in RocketMQ.
RETRY_MAX_TIMES = 16
CONSUME_TIMEOUT_MINUTES = 15
ATTRIBUTES_MAX = 32
ATTRIBUTE_CHARS_MAX = 1024


class Groups:
    """The group table. Every change is a record in the log."""

    def __init__(self, store: MessageStore, live: LiveSettings, *, broker_name: str) -> None:
        self._store = store
        self._live = live
        self._broker_name = broker_name

    def get(self, group: str) -> GroupConfig:
        """Raises GroupNotFoundError."""
        config = self._store.groups.get(group)
        if config is None:
            raise self._not_found(group)
        return config

    def check(self, group: str) -> None:
        """Raises GroupNotFoundError unless the group is there, or would be as soon as it has a member."""
        if group not in self._store.groups:
            check_group(group, kind="consumer group")
            if not self._live.auto_create_group_enable:
                raise self._not_found(group)

    def ensure(self, group: str) -> GroupConfig:
        """The group, made with RocketMQ's defaults when it is new and may be. Raises GroupNotFoundError."""
        config = self._store.groups.get(group)
        if config is None:
            self.check(group)
            config = GroupConfig(
                name=group,
                consume_enabled=True,
                consume_broadcast_enabled=True,
                retry_max_times=RETRY_MAX_TIMES,
                retry_queue_count=1,
                consume_timeout_minutes=CONSUME_TIMEOUT_MINUTES,
            )
            self._append(config)
        return config

    def for_pull(self, group: str) -> None:
        """Raises an error of the table unless `group` may pull; empty = a reader that belongs to none."""
        if group and not self.ensure(group).consume_enabled:
            raise PermissionDeniedError(f"consumption is switched off for group {group!r}: see `kitemq group describe`")

    def set(self, config: GroupConfig) -> int:
        """Create or change a group; the physical end of the record, 0 = it is like this already."""
        check_group(config.name, kind="consumer group")
        if config.retry_queue_count > QUEUE_COUNT_MAX:
            raise InvalidRequestError(
                f"retry_queue_count is {config.retry_queue_count}: 0..{QUEUE_COUNT_MAX} are allowed"
            )
        if len(config.attributes) > ATTRIBUTES_MAX or any(
            len(key) + len(value) > ATTRIBUTE_CHARS_MAX for key, value in config.attributes.items()
        ):
            raise InvalidRequestError(
                f"a group has at most {ATTRIBUTES_MAX} attributes of {ATTRIBUTE_CHARS_MAX} characters each"
            )
        if self._store.groups.get(config.name) == config:
            return 0
        return self._append(config)

    def delete(self, group: str) -> int:
        """Delete the group with its offsets; the physical end of the record."""
        self.get(group)
        log.info("group deleted group=%s", group)
        return self._store.append_change(SystemRecord(group_deleted=group))

    def _append(self, config: GroupConfig) -> int:
        created = config.name not in self._store.groups
        if created and len(self._store.groups) >= GROUPS_MAX:
            raise NotAllowedError(f"broker {self._broker_name!r} has {GROUPS_MAX} consumer groups: delete some first")
        end = self._store.append_change(SystemRecord(group_set=config))
        log.info("group %s group=%s", "created" if created else "changed", config.name)
        return end

    def _not_found(self, group: str) -> GroupNotFoundError:
        return GroupNotFoundError(
            f"broker {self._broker_name!r} has no consumer group {group[:130]!r}: a consumer that joins creates it, "
            "unless auto_create_group_enable is off"
        )
