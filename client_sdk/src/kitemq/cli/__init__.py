"""The `kitemq` command. Modules of verbs import the SDK inside their functions, so that `kitemq --help` is quick."""

import sys


def script() -> None:
    """What the installed script calls. The SDK alone installs it too, without what it needs."""
    try:
        from kitemq.cli.main import main as run
    except ModuleNotFoundError as error:
        if error.name not in ("rich", "typer"):
            raise
        sys.exit("kitemq: the command is not installed as a whole: pip install 'kitemq[cli]'")
    run()
