"""The Wan family: its models as a table, their weight files, loading them, LoRAs, devices and memory.

Imports `media`, `files` and `method`.
"""
