"""``python -m gatewise``: the command line, for launchers that start modules (``accelerate launch -m gatewise train ...``)."""

from gatewise.cli.main import main

if __name__ == "__main__":
    main()
