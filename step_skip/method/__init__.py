"""The method itself, on tensors: differential resume and what it is built from.

Knows neither files nor DiffSynth; imports nothing of the package. torch is imported at module level only
where tensors are computed with.
"""
