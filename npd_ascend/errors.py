"""The one error a user is meant to read."""


class UserError(Exception):
    """Wrong input or a run that must not go on: one line with what, why and the way out."""

    exit_code = 2


class LostRankError(UserError):
    """This process is sound, but one that it works with is gone or silent; started again they may come through."""

    exit_code = 75  # EX_TEMPFAIL of sysexits.h
