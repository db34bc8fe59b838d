"""Making one prior: choices, plan, the run, and finishing a run that was interrupted.

Imports `prior` and what lies below it.
"""
