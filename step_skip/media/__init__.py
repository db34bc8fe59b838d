"""Images and videos as people have them and as a model sees them.

Imports `files`.
"""
