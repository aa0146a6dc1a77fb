"""The one kind of error that is the user's to mend, and how it reaches the screen."""


class UserError(Exception):
    """Bad input, a missing file, a full disk: something the person at the keyboard can mend.

    The message is one line that says what is wrong, where, and how to mend it. Entry points print it without a traceback
    and exit with status 2; any other exception is a defect of this code and keeps its traceback.
    """

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))


class LostRankError(UserError):
    """Another process of an evaluation is gone: nothing that all of them have a part in comes to an end."""


class DamagedSample(UserError):  # noqa: N818
    """One image or record that cannot be used, while the rest of its shard can.

    Training replaces it, counts it and stops past a tolerance; everything else treats it as any `UserError`.
    """
