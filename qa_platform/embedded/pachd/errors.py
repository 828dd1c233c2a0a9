"""What the rules of Pachyderm answer when they refuse. ``code`` is the name of a gRPC status."""


class PachError(Exception):
    """A refusal. Most of Pachyderm's user errors carry no status of their own and arrive as UNKNOWN."""

    code = "UNKNOWN"


class NotFound(PachError):
    code = "NOT_FOUND"


class AlreadyExists(PachError):
    code = "ALREADY_EXISTS"


class InvalidArgument(PachError):
    """``field`` and ``problem``, where given, travel as a BadRequest detail."""

    code = "INVALID_ARGUMENT"

    def __init__(self, message: str, *, field: str = "", problem: str = "") -> None:
        super().__init__(message)
        self.field = field
        self.problem = problem


class Unimplemented(PachError):
    code = "UNIMPLEMENTED"
