"""transformers without its progress bars and advice, for a command line that has its own."""


def quieten() -> None:
    """Errors only, for the rest of this process; nothing where transformers is not installed."""
    try:
        from transformers.utils import logging
    except ImportError:
        return
    logging.set_verbosity_error()
    logging.disable_progress_bar()
