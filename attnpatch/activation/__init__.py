"""Activation without editing the script: by ``ATTNPATCH=1`` or ``attnpatch run``.

Nothing here imports torch before the script does.
"""
