"""Activation without editing the script, by ``ATTNPATCH=1`` or ``attnpatch run``.

No module here imports torch before the script does.
"""
