"""Reading and writing files, whatever they hold.

Writing: a file takes its name only when it is complete and on the disk; a folder has one writer. Reading: a
file may come from an untrusted person, so its size, kind and content are checked before they are used.

Imports nothing of the package but `errors`.
"""
