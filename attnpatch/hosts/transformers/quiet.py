"""Switches off transformers' progress bars and warnings, for a command line that has its own output."""


def quieten() -> None:
    """Let transformers log only errors for the rest of this process; does nothing if it is not installed."""
    try:
        from transformers.utils import logging
    except ImportError:
        return
    logging.set_verbosity_error()
    logging.disable_progress_bar()
