"""The error for mistakes of a user. Any other exception is a bug of ours."""


class UserError(ValueError):
    """A mistake in a flag, a file or a folder: one sentence that names it, its value and what to do.

    The command line prints the sentence and exits with status 2, without a traceback.
    """
