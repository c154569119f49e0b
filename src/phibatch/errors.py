"""Everything phibatch raises, as a tree.

PhibatchError
├── UserError            something the user can mend; nothing was generated (exit 2)
│   ├── ConfigError      a key or a value of the configuration
│   ├── InputError       the input table: absent, unreadable, or of the wrong columns
│   ├── ModelError       the model: unknown, or a folder that can not be logged
│   └── OutputError      the output: already there, or not to be written
├── RowError             one row can not be answered: becomes that row's `error`, never leaves the model
├── EngineError          the engine can not go on: fails the task, and Spark retries it (exit 1)
├── RunError             Spark gave the run up, for another reason (exit 1)
│   └── WorkerCrash      a process that computed rows died, without a word of its own
└── ErrorRateExceeded    the output is written whole, but too many of its rows failed (exit 3)
"""


class PhibatchError(Exception):
    """Base of all; `exit_code` is what the command line ends with."""

    exit_code = 1


class UserError(PhibatchError):
    """Raised before anything is generated, with one sentence that names what to mend."""

    exit_code = 2


class ConfigError(UserError):
    """Raised when a configuration has an unknown key or a value out of range."""


class InputError(UserError):
    """Raised when the input table is absent, unreadable, or lacks what the job needs."""


class ModelError(UserError):
    """Raised when a model is unknown to the registry, or a folder is not one that phibatch can log."""


class OutputError(UserError):
    """Raised when the output exists already or can not be written."""


class RowError(PhibatchError):
    """Raised for one row that can not be answered; `code` is one of `contract.ErrorCode`."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


class EngineError(PhibatchError):
    """Raised when the engine itself fails, so that no row of the task can be trusted."""


class RunError(PhibatchError):
    """Raised when Spark gives a run up after its own retries: a lost disk, a worker that dies again and again."""


class WorkerCrash(RunError):
    """Raised when a Python worker or its executor died at its rows: killed, out of memory, or by a native fault."""


class ErrorRateExceeded(PhibatchError):
    """Raised after the output is written, when the share of failed rows is above `job.max_error_rate`."""

    exit_code = 3
