"""A passage becomes a tree with a model that writes.

``extractor`` takes texts, ``batch`` documents, ``served`` asks a server. ``prompts`` says what the model reads; ``course`` what it
may write next, ``constraint`` which tokens that leaves.
"""
