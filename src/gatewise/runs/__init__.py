"""Training runs from recipes.

``recipe.py`` is the YAML file, ``build.py`` makes the adapter and the Trainer's arguments, ``run.py`` carries the run out with the
Trainer in ``trainer.py``, ``folder.py`` is what a run leaves, and ``measure.py`` measures an adapter again.
"""
