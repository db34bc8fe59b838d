"""The command line: flags, prompts files, messages, signals and exit codes.

Imports `sweep` and what lies below it. Importing it doesn't import torch.
"""
