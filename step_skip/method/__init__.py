"""Implement the method on tensors: differential resume (`differential.follow`) and its parts.

This folder uses neither files nor DiffSynth and imports nothing of the package. Only the modules that compute
with tensors import torch at module level.
"""
