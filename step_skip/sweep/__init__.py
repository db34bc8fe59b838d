"""Many priors and many clips: plan and name them, find those that exist, make the others.

One prior or one clip is a sweep of one. Imports `infer`, `generate` and what lies below them. A cluster or a
page is passed in by the caller.
"""
