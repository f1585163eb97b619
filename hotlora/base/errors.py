"""One base error, few subclasses. Every message names the value, what is allowed, and the fix."""


class HotLoraError(ValueError):
    """A user's mistake, told in one message. Base of all errors that hotlora raises on purpose."""


class ModelError(HotLoraError):
    """A model that cannot be loaded, has no MoE layer, or belongs to a family that is not supported."""


class DataError(HotLoraError):
    """A data source without rows, a row without its fields, a task or split that does not exist."""


class PlanError(HotLoraError):
    """A rule, budget or rank out of range, or a plan that does not fit the model."""


class FileError(HotLoraError):
    """A file that is missing, truncated, or not what its name says."""


class Stopped(SystemExit):
    """Something asked the process to end, SIGTERM or Ctrl-C: what was done is saved, and the same command resumes. Exit
    code 143 or 130, as of a process that the signal ends."""

    def __init__(self, message: str, by: str = "SIGTERM") -> None:
        super().__init__(130 if by == "Ctrl-C" else 143)
        self.message = message

    def __str__(self) -> str:
        return self.message
