"""What can go wrong for a user. Every message is one line: what was got, what was wanted, what to change."""


class ParleyError(Exception):
    """Base of all errors a user can mend. `exit_code` is what the command line ends with."""

    exit_code = 1


class UsageError(ParleyError, ValueError):
    """A wrong option, key or combination of settings."""

    exit_code = 2


class DataError(ParleyError, ValueError):
    """A data set that cannot be read, recognised or learned from."""


class ModelError(ParleyError, ValueError):
    """A model folder, tokenizer, template or adapter that does not fit."""


class DeviceError(ParleyError, RuntimeError):
    """A device that was asked for and is not there, or has too little memory."""


class RunError(ParleyError, OSError):
    """A run folder that cannot be written or read."""

    def __str__(self) -> str:
        return str(self.args[0]) if self.args else ""


def one_line(error: BaseException | str, limit: int = 240) -> str:
    """An error's text on one line, at most `limit` characters; the name of its type where it has no text."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= limit else text[: limit - 3] + "..."
