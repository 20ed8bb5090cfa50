"""What is raised when the input, not the program, is wrong."""


class InputError(Exception):
    """One clear sentence for a person: what is wrong, where (file, row, setting), and what to do.

    The command line prints it without a traceback and exits with status 2.
    """
