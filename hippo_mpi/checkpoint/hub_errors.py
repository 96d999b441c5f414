"""Explains errors of the Hugging Face hub in a sentence that says what to do."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from urllib.parse import urlparse

from huggingface_hub import constants
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
    SafetensorsParsingError,
)

from hippo_mpi.errors import ForeignError, HippoError, ModelError

_LOG_IN = "log in with: hf auth login"


def explain(error: Exception, repo: str, revision: str | None) -> HippoError:
    """Return an error with one line that says why a repo, or a file of it, can't be downloaded from the hub."""
    why = _reason(error, repo, revision)
    return ModelError(why) if why else ForeignError.caused_by(error, f"{repo} can't be downloaded")


def _reason(error: Exception, repo: str, revision: str | None) -> str | None:
    """Return what to tell the user; None for an unexpected error."""
    chain = list(_causes(error))
    host = urlparse(constants.ENDPOINT).netloc
    for cause in chain:
        if isinstance(cause, GatedRepoError):
            return f"{repo} is gated: ask for access at {constants.ENDPOINT}/{repo}, then {_LOG_IN}"
        if isinstance(cause, RepositoryNotFoundError):
            return f"no folder {repo}, and {host} has no such repo; if it is private, {_LOG_IN}"
        if isinstance(cause, RevisionNotFoundError):
            return f"{repo} has no revision {revision or constants.DEFAULT_REVISION}"
        if isinstance(cause, HfHubHTTPError) and cause.response is not None:
            return _explain_status(cause.response.status_code, repo, host)
        if isinstance(cause, HFValidationError):
            return f"no folder {repo}, and that isn't a valid repo name either"
        if isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT):
            return f"{repo} can't be downloaded: the disk with {constants.HF_HOME} is full"
    if constants.HF_HUB_OFFLINE and isinstance(error, OfflineModeIsEnabled | LocalEntryNotFoundError):
        return f"no folder {repo}, and the cache doesn't have all of it; unset HF_HUB_OFFLINE to download it"
    if any(_is_of_network(cause) for cause in chain):
        return f"no network: {host} can't be reached, and {repo} isn't in the cache"
    if isinstance(error, OSError | SafetensorsParsingError):
        return f"{repo} can't be downloaded: {' '.join(str(error).split())}"
    return None


def _explain_status(status: int, repo: str, host: str) -> str:
    if status in (401, 403):
        return f"{host} denies access to {repo}: {_LOG_IN}"
    if status == 429:
        return f"{host} limits your requests: wait a few minutes, or {_LOG_IN}"
    return f"{host} returned status {status}: try {repo} again later"


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


def _is_of_network(error: BaseException) -> bool:
    """Return whether the hub's HTTP library (httpx or requests, depending on its version) got no answer."""
    return type(error).__module__.partition(".")[0] in ("httpx", "httpx2", "httpcore", "httpcore2", "requests") or (
        isinstance(error, ConnectionError | TimeoutError) and not isinstance(error, OfflineModeIsEnabled)
    )
