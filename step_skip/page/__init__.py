"""The page of a sweep: its clips side by side, as HTML and as a contact sheet.

    python prior_utils.py page FOLDER

Imports `cli` and what lies below it.
"""
