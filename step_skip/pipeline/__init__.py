"""Call DiffSynth's WanVideoPipeline once, with this package's schedulers, units and model_fn.

Nothing here reads or writes files. torch and diffsynth are imported at module level. Of the package this
folder imports `errors`, `files`, `method` and `models`.
"""
