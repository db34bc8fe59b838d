"""A prior on disk: its files, its metadata, and the checks that they are what was written.

Imports `pipeline` (for settings and tensors' types) and what lies below it; runs no model.
"""
