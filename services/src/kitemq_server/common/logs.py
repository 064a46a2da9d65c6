"""Log lines for people (key=value text) or machines (JSON). Configured by the command line only."""

from __future__ import annotations

import json
import logging
import sys
import time

_UTC = "%Y-%m-%dT%H:%M:%S"


class _TextFormatter(logging.Formatter):
    def __init__(self) -> None:
        super().__init__("%(asctime)s.%(msecs)03dZ %(levelname)-7s %(name)s %(message)s", _UTC)

    def formatMessage(self, record: logging.LogRecord) -> str:
        # A client's text may be quoted in a message: it must not be able to start a line of its own.
        return super().formatMessage(record).replace("\r", "\\r").replace("\n", "\\n")


class _JsonFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": f"{self.formatTime(record, _UTC)}.{int(record.msecs):03d}Z",
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False)


def configure(*, level: str, log_format: str) -> None:
    """Send every log line of the process to stderr. level: DEBUG, INFO, WARNING or ERROR; log_format: text or json."""
    handler = logging.StreamHandler(sys.stderr)
    formatter = _JsonFormatter() if log_format == "json" else _TextFormatter()
    formatter.converter = time.gmtime
    handler.setFormatter(formatter)
    logging.basicConfig(level=level, handlers=[handler], force=True)
    # Their DEBUG lines are about themselves: one per call.
    for library in ("asyncio", "grpc"):
        logging.getLogger(library).setLevel(max(logging.getLevelName(level), logging.INFO))
