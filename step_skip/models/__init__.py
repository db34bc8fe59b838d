"""List the Wan models, find and load their weights, apply LoRAs, choose the device and estimate memory.

Of the package this folder imports `errors`, `files` and `method`.
"""
