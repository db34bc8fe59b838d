"""Read images and videos as users have them, fit them to a model's size, and write .mp4 files.

Of the package this folder imports `errors` and `files`.
"""
