"""What a person did wrong, told apart from what we did wrong."""


class UserError(ValueError):
    """A mistake in a flag, a file or a folder: one sentence that names it, its value and what to do.

    The command line prints the sentence and exits with status 2, without a traceback.
    """
