"""What went wrong in huggingface_hub, in words a person can act on."""

from __future__ import annotations

import errno
import re
from typing import Literal

from kiem.core.errors import ExitCode

_LOG_IN = "run `hf auth login` or set HF_TOKEN (tokens: https://huggingface.co/settings/tokens)"
_PASSING_STATUS = (408, 429, 500, 502, 503, 504)
_PASSING_ERRORS = ("ReadError", "ReadTimeout", "RemoteProtocolError", "ChunkedEncodingError")
_MAX_PAUSE_SECONDS = 60


def pause_seconds(error: BaseException, attempt: int) -> int | None:
    """Returns how long to wait before the next try, or None if that would not help."""
    response = getattr(error, "response", None)
    asked = getattr(response, "headers", {}).get("Retry-After", "")
    pause = int(asked) if asked.isdigit() else 2**attempt
    passes = getattr(response, "status_code", None) in _PASSING_STATUS
    passes = passes or type(error).__name__ in _PASSING_ERRORS
    return pause if passes and pause <= _MAX_PAUSE_SECONDS else None


def explain(
    error: BaseException, kind: Literal["dataset", "model"], repo: str, needed_right: str
) -> tuple[str, str, ExitCode]:
    """Returns what went wrong, what to do about it, and the exit code.

    Args:
        error: what huggingface_hub raised.
        kind: what the repository holds.
        repo: its Hub id.
        needed_right: what was to be done with it: "read" or "write to".
    """
    from huggingface_hub import constants, errors

    response, number = getattr(error, "response", None), getattr(error, "errno", None)
    status = getattr(response, "status_code", None)
    has_token = response is not None and "authorization" in response.request.headers
    is_gated = isinstance(error, errors.GatedRepoError)
    page = f"https://huggingface.co/{'datasets/' * (kind == 'dataset')}{repo}"
    again = "Run it again; files that are complete are not downloaded again."
    if is_gated and not has_token:
        what = "you are not logged in, and it has a licence to accept"
        return what, f"Accept the licence on {page}, then {_LOG_IN}.", ExitCode.HUB_LOGIN
    if is_gated and status == 403:
        fix = f"Accept it on {page}. A fine-grained token must be allowed gated repositories too."
        return "your account has not accepted its licence", fix, ExitCode.HUB_LICENCE
    if status in (401, 403) and has_token:
        fix = f"Take a valid one that may {needed_right} this {kind}: {_LOG_IN}."
        return f"the Hub refuses your login token ({status})", fix, ExitCode.HUB_LOGIN
    if status == 401:
        what = "it does not exist, or it is private and you are not logged in"
        return what, f"Check the name on {page}. If it is private, {_LOG_IN}.", ExitCode.HUB_LOGIN
    if status == 404:
        thing = "revision" if isinstance(error, errors.RevisionNotFoundError) else kind
        return f"the Hub has no such {thing}", f"Check the name on {page}.", ExitCode.NOT_FOUND
    if status == 429:
        fix = "Wait a few minutes and run it again. The Hub allows more to who is logged in."
        return "too many requests to the Hub (429)", fix, ExitCode.NETWORK
    if status:
        return f"the Hub answers with error {status}", again, ExitCode.NETWORK
    if number in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(error):
        fix = f"Free some space in {constants.HF_HUB_CACHE}, or set HF_HOME to a larger disk."
        return "the disk is full", fix, ExitCode.DISK_SPACE
    if number in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR):
        fix = f"Make {constants.HF_HUB_CACHE} writable, or set HF_HOME to another folder."
        return "the cache folder cannot be written", fix, ExitCode.NOT_WRITABLE
    if isinstance(error, errors.HFValidationError):
        return "this is not a Hub name", "Write it as OWNER/NAME.", ExitCode.BAD_OPTION
    if type(error).__name__ in ("UnicodeEncodeError", "LocalProtocolError"):
        return "your login token is damaged", f"Repair it: {_LOG_IN}.", ExitCode.HUB_LOGIN
    reason = re.sub(r"(hf_|Bearer |://)[^\s'\"]+", r"\1***", f"{type(error).__name__}: {error}")
    fix = f"Check the network. {again} Without a network, set HF_HUB_OFFLINE=1 to use what is "
    fix += "already downloaded, or name local files or a local folder instead."
    return f"no connection to the Hub ({reason[:200]})", fix, ExitCode.NETWORK
