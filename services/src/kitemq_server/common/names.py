"""Names that brokers and clusters may have."""

from __future__ import annotations

import re

# No ':' and ';': an order configuration is "brokerA:4;brokerB:4".
_NAME = re.compile(r"[A-Za-z0-9_.-]{1,127}")


def check_broker_name(name: str) -> None:
    """Raises ValueError unless `name` is 1..127 letters, digits, '_', '-' or '.'."""
    _check("broker name", name)


def check_cluster_name(name: str) -> None:
    """Raises ValueError unless `name` is 1..127 letters, digits, '_', '-' or '.'."""
    _check("cluster name", name)


def _check(kind: str, name: str) -> None:
    if not _NAME.fullmatch(name):
        raise ValueError(f"{kind} {name[:40]!r} must be 1 to 127 letters, digits, '_', '-' or '.'")
