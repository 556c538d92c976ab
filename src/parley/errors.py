"""What can go wrong for a user. Every message is one line: what was got, what was wanted, what to change."""

from parley.text import one_line, shorten_middle, visible

__all__ = [
    "DataError",
    "DeviceError",
    "ModelError",
    "ParleyError",
    "RunError",
    "TrainingError",
    "UsageError",
    "one_line",
]

LONGEST = 500  # characters of a message: a value that was got may be a whole file


class ParleyError(Exception):
    """Base of all errors a user can fix. `exit_code` is the command line's.

    Every message becomes one line of at most LONGEST characters that a terminal shows as it is, whatever a path, a
    column or a library's own message holds.
    """

    exit_code = 1

    def __init__(self, message: object = "") -> None:
        super().__init__(shorten_middle(visible(" ".join(str(message).split())), LONGEST))


class UsageError(ParleyError, ValueError):
    """A wrong option, key or combination of settings."""

    exit_code = 2


class DataError(ParleyError, ValueError):
    """A data set that cannot be read, recognised or trained on."""


class ModelError(ParleyError, ValueError):
    """A model folder, tokenizer, template or adapter that does not fit."""


class DeviceError(ParleyError, RuntimeError):
    """A device that was requested and is missing, or has too little memory."""


class TrainingError(ParleyError, ArithmeticError):
    """Training that ended with a loss or with weights that are not finite."""


class RewardError(ParleyError, RuntimeError):
    """A reward function that raised, or returned what is no reward."""


class RunError(ParleyError, OSError):
    """A run folder that cannot be written or read."""

    def __str__(self) -> str:
        return str(self.args[0]) if self.args else ""  # OSError would format errno and strerror
