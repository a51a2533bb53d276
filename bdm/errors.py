"""The one exception for mistakes a user can mend."""


class UserError(ValueError):
    """A mistake in what the user gave: what was seen, what is allowed, what to do.

    Command-line entry points print the message in one line and exit with status 2; library callers get an
    ordinary ``ValueError``.
    """


def first_line(error: Exception, most: int = 120) -> str:
    """The beginning of what an exception of a library says, for messages of one line.

    Its kind where it says nothing.
    """
    lines = str(error).strip().splitlines()
    return lines[0][:most] if lines else type(error).__name__
