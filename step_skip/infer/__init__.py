"""Making one clip from a prior: choices, steps, plan, inputs, the run, and the report beside the clip.

Imports `prior` and what lies below it, never `generate`.
"""
