"""Read and write files, whatever they hold.

Writing: a file gets its name only when it is complete and on the disk; a folder has one writer at a time.
Reading: a file may come from an untrusted source, so its size, kind and content are checked before use.

Of the package this folder imports only `errors`.
"""
