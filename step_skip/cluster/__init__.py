"""Many priors and clips on a Ray cluster: a driver reads and writes files, workers compute.

Imports `sweep` and what lies below it.
"""
