"""The one error a user is meant to read."""


class UserError(Exception):
    """Wrong input or a run that must not go on: one line with what, why and the way out; exit code 2."""
