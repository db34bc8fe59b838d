"""Many priors and many clips: planning them, naming them, finding which exist, making the others.

One prior or one clip is a sweep of one. Imports `infer`, `generate` and what lies below them; is handed the
functions that a cluster or a page adds.
"""
