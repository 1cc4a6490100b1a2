"""The one exception that is a user's mistake and not ours."""


class UserError(ValueError):
    """A mistake in what the user gave: its message says what was given, what was expected, what to do.

    The command line prints the message on one line and exits with 2; from Python it is an ordinary ``ValueError``.
    """
