"""Training runs from recipes.

``recipe.py`` is the YAML file, ``schema.py`` its JSON schema. ``run.py`` carries a run out with the Trainer in ``trainer.py``, in
the processes that ``launch.py`` starts; ``dry_run.py`` tells what it would be. ``measure.py`` and ``harness.py`` measure an adapter
again, and ``hub.py`` uploads it.
"""
