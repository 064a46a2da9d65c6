"""Fixtures that tests of every part use."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import hypothesis
import pytest_asyncio

from tests.cluster import Cluster, running_cluster

# How long an example takes says more about the machine's other work than about the code.
hypothesis.settings.register_profile("kitemq", deadline=None)
hypothesis.settings.load_profile("kitemq")


@pytest_asyncio.fixture
async def cluster(tmp_path: Path) -> AsyncIterator[Cluster]:
    """A namesrv and one broker in this process; see tests/cluster.py for what can be done to them."""
    async with running_cluster(tmp_path) as running:
        yield running
