"""The ``gatewise`` command, also as ``python -m gatewise`` (``accelerate launch -m gatewise train ...``)."""

import sys


def main() -> None:
    """Runs the command line, or says what to install where only what a Trainer script needs is there."""
    try:
        from gatewise.cli.main import main as run
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing == "gatewise":
            raise
        print(f"error: the gatewise command needs {missing}, which is not installed: pip install 'gatewise[cli]'", file=sys.stderr)
        raise SystemExit(2) from None
    run()


if __name__ == "__main__":
    main()
