"""One call of DiffSynth's WanVideoPipeline: its settings, and what is put into it for that call.

Nothing here reads or writes files. torch and diffsynth are imported at module level.
Imports `models` and what lies below it.
"""
