"""The ``gatewise`` command, also as ``python -m gatewise`` (``accelerate launch -m gatewise train ...``)."""


def main() -> None:
    """Runs the command line, or says what to install where only what a Trainer script needs is there."""
    try:
        from gatewise.cli.main import main as run
    except ModuleNotFoundError as error:
        raise SystemExit(
            f"error: the gatewise command needs {error.name}, which is not installed: pip install 'gatewise[cli]'"
        ) from None
    run()


if __name__ == "__main__":
    main()
