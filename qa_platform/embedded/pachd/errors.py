"""The errors of the embedded pachd. Each becomes a gRPC status: ``code`` is the name of the status. The texts are Pachyderm's."""


class PachError(Exception):
    """A refused request. Most of Pachyderm's user errors have no status of their own and arrive as UNKNOWN."""

    code = "UNKNOWN"


class NotFound(PachError):
    code = "NOT_FOUND"


class AlreadyExists(PachError):
    code = "ALREADY_EXISTS"


class InvalidArgument(PachError):
    """A malformed request.

    Args:
        message: the text of the status.
        field: the wrong field; empty for none. It is sent with ``problem`` as a BadRequest detail.
        problem: what is wrong with the field.
    """

    code = "INVALID_ARGUMENT"

    def __init__(self, message: str, *, field: str = "", problem: str = "") -> None:
        super().__init__(message)
        self.field = field
        self.problem = problem


class Unimplemented(PachError):
    code = "UNIMPLEMENTED"


class FailedPrecondition(PachError):
    code = "FAILED_PRECONDITION"


class Unauthenticated(PachError):
    code = "UNAUTHENTICATED"


class PermissionDenied(PachError):
    code = "PERMISSION_DENIED"


class HandlerPanic(PachError):
    """A panic in Pachyderm's own handler, which dereferences a message that the request lacks."""

    code = "ABORTED"

    def __init__(self) -> None:
        super().__init__("panic: runtime error: invalid memory address or nil pointer dereference")


class Internal(PachError):
    code = "INTERNAL"
