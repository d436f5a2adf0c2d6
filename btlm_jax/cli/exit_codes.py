"""Exit codes of the command line, and the error that ends with the second of them."""

DONE, ERROR, USAGE, PREEMPTED, BAD_NUMBERS, INTERRUPTED = 0, 1, 2, 75, 76, 130


class UsageError(Exception):
    """The command line was wrong; the message says how and what would be right."""
