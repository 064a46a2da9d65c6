"""What `import kitemq` gives, and what it costs. Source: httpx's test of its exported members."""

from __future__ import annotations

import subprocess
import sys

import kitemq
from kitemq import errors


def test_every_public_name_is_there_once_and_sorted() -> None:
    assert kitemq.__all__ == sorted(set(kitemq.__all__))
    for name in kitemq.__all__:
        assert getattr(kitemq, name).__name__ == name
    assert dir(kitemq) == kitemq.__all__


def test_every_error_of_the_table_is_public() -> None:
    assert set(errors.ERRORS) <= set(kitemq.__all__)


def test_an_unknown_name_is_an_attribute_error() -> None:
    assert not hasattr(kitemq, "Consumer")


def test_public_modules_need_no_import_of_their_own() -> None:
    script = (
        "import kitemq; print(kitemq.sync.Producer.__name__, kitemq.admin.AdminClient.__name__, kitemq.errors.__name__)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["Producer", "AdminClient", "kitemq.errors"]


def test_importing_loads_nothing_that_costs() -> None:
    script = "import sys, kitemq; print(*sorted(sys.modules))"
    loaded = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.split()
    assert "kitemq" in loaded
    assert not {"grpc", "asyncio", "google.protobuf", "tenacity", "rich", "typer"} & set(loaded)
