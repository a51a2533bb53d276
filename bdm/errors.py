"""The one exception for mistakes a user can mend."""


class UserError(ValueError):
    """A mistake in what the user gave: what was seen, what is allowed, what to do.

    Command-line entry points print the message in one line and exit with status 2; library callers get an ordinary
    ``ValueError``.
    """
