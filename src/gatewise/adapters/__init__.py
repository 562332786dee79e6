"""Adapters on disk: their files and the one reader (``files.py``), loading, the factors of LoRA layers, export as plain LoRA."""
