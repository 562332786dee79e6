"""The ``gatewise`` command. ``main.py`` puts it together; each larger command has a file of its own."""
