"""The part of a broker's configuration that operators may change while it runs."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Annotated, Any

from pydantic import TypeAdapter, ValidationError

from kitemq.errors import InvalidRequestError
from kitemq.proto.v1.admin_pb2 import ConfigItem
from kitemq_server.broker.config import BrokerConfig
from kitemq_server.common.config import in_words, value_text

log = logging.getLogger(__name__)


@dataclass(slots=True)
class LiveSettings:
    """Present values of the changeable keys; names, units and ranges as in BrokerConfig."""

    permission: int
    auto_create_topic_enable: bool
    auto_create_group_enable: bool
    default_topic_queue_count: int
    body_bytes_max: int
    flush_timeout_ms: int
    in_flight_bytes_max: int
    held_pull_count_max: int
    retention_hours: int
    retention_bytes: int
    disk_watermark_percent: int


class Settings:
    """The configuration as it is now. A change lasts until the next start; the file decides what holds then."""

    def __init__(self, config: BrokerConfig) -> None:
        self._config = config
        self.live = LiveSettings(**{field.name: getattr(config, field.name) for field in fields(LiveSettings)})
        self.changed: Callable[[set[str]], None] = lambda _keys: None

    def items(self) -> list[ConfigItem]:
        """Every key with its present value; paths and secrets are left out."""
        return [
            ConfigItem(
                key=key,
                value=value_text(getattr(self.live, key)) if key in LiveSettings.__slots__ else value,
                changeable=key in LiveSettings.__slots__,
                help=text,
            )
            for key, value, text in self._config.items()
        ]

    def change(self, values: Mapping[str, str]) -> None:
        """Set the keys to what the texts say: all of them, or none. Raises InvalidRequestError."""
        parsed = {key: self._parse(key, text) for key, text in values.items()}
        changed = {key for key, value in parsed.items() if getattr(self.live, key) != value}
        for key in changed:
            log.info("config changed key=%s old=%s new=%s", key, getattr(self.live, key), parsed[key])
            setattr(self.live, key, parsed[key])
        if changed:
            self.changed(changed)

    def _parse(self, key: str, text: str) -> Any:
        field = BrokerConfig.model_fields.get(key)
        if field is None:
            raise InvalidRequestError(f"there is no key {key[:60]!r}: 'kitemq broker config' lists them")
        if key not in LiveSettings.__slots__:
            raise InvalidRequestError(f"{key} cannot be changed while the broker runs: set it and restart")
        try:
            adapter: TypeAdapter[Any] = TypeAdapter(Annotated[field.annotation, field])  # type: ignore[arg-type]
            return adapter.validate_python(text)
        except ValidationError as error:
            problem = in_words(dict(error.errors()[0]), given=text[:60])
            raise InvalidRequestError(f"{key}: {problem}") from None
