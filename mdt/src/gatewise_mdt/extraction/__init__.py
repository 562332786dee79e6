"""A passage becomes a tree.

``batch`` takes documents, ``extractor`` texts. ``prompts`` says what the model reads; ``course`` what it may write next,
``constraint`` which tokens that leaves, ``writing`` has it write. ``measuring`` says how well that goes.
"""
