"""Errors of remote file systems, told as what, where, and what to do."""

from __future__ import annotations

import errno
from contextlib import contextmanager
from typing import TYPE_CHECKING

from asyncckpt.errors import AsyncCkptError, StoreError

if TYPE_CHECKING:
    from collections.abc import Iterator

_HINTS = {
    "NoCredentialsError": "give credentials in storage_options, in the environment or in a profile",
    "PartialCredentialsError": "give both the key and the secret",
    "PermissionError": "check the credentials and what they may do there",
    "TypeError": "check the names in storage_options",
    "InvalidRetryConfigurationError": "check the names in storage_options",
    "EndpointConnectionError": "check endpoint_url and the network",
}


@contextmanager
def told(doing: str, where: str, *, absent_ok: bool = False) -> Iterator[None]:
    """Turn what a file system raises into a StoreError.

    Args:
        doing: what the operation does, to be read after "while".
        where: the directory.
        absent_ok: let FileNotFoundError pass as it is: the file is one that the caller named.
    """
    try:
        yield
    except AsyncCkptError:
        raise
    except FileNotFoundError as error:
        if absent_ok:
            raise
        raise store_error(error, doing, where) from error
    except Exception as error:  # clients raise whatever they like
        raise store_error(error, doing, where) from error


def store_error(error: Exception, doing: str, where: str) -> StoreError:
    """Return the error that a user is told, in one line."""
    hint = _HINTS.get(type(error).__name__)
    said = (error.strerror if isinstance(error, OSError) else None) or str(error)
    text = said.strip().partition("\n")[0] or type(error).__name__
    attempts = _attempts(error)
    text = f"{text} (tried {attempts} times)" if attempts > 1 else text
    number = error.errno if isinstance(error, OSError) and error.errno else errno.EIO
    return StoreError(number, f"while {doing}: {text}" + (f"; {hint}" if hint else ""), where)


def _attempts(error: BaseException) -> int:
    """Return how often the client made the request, where it tells."""
    response = getattr(error.__cause__, "response", None) or getattr(error, "response", None) or {}
    return 1 + int(response.get("ResponseMetadata", {}).get("RetryAttempts", 0))
