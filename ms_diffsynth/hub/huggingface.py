"""Sends files to the Hugging Face Hub: one commit, by huggingface_hub's own client, and compared afterwards.

Large files go as the client decides: over xet where hf_xet is installed and the Hub offers it (``HF_HUB_DISABLE_XET=1``
prevents that), else over plain LFS. After a failed attempt it is plain LFS, whatever failed.
"""
from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

from huggingface_hub import CommitOperationAdd, HfApi, constants, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled
from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

from ms_diffsynth.errors import HubError
from ms_diffsynth.hub.publish import Unreachable, compare, host_of, patiently
from ms_diffsynth.redact import redact, redacted_logs

# huggingface_hub < 1 raises errors of requests, which are OSErrors; 1 and 2 those of httpx, which are not
_NETWORK_ERRORS = (OSError, HfHubHTTPError.__bases__[0])
_REMEDIES = {401: "Log in with 'hf auth login', or set HF_TOKEN to a token that may write",
             403: "Give the token write access to it, or choose a name of your own",
             404: "Check the name, and that the token may see it"}

T = TypeVar("T")


def connect(endpoint: str | None) -> HuggingFace:
    """See `publish.connect`."""
    endpoint = (endpoint or constants.ENDPOINT).rstrip("/")
    host, token = host_of(endpoint), get_token()
    if token is None:
        raise HubError(f"there is no token for {host}. Log in with 'hf auth login', or set HF_TOKEN.")
    return HuggingFace(host, HfApi(endpoint=endpoint, token=token))


class HuggingFace:
    """A `publish.Client`."""

    def __init__(self, host: str, api: HfApi):
        self.host, self.api = host, api

    def send(self, stage: Path, names: Sequence[str], model_id: str, private: bool, message: str,
             is_quiet: bool = False) -> str:
        """See `publish.Client`."""
        with redacted_logs("huggingface_hub"), _progress_bars(not is_quiet):
            made = self._ask(f"{model_id}: making the repository",
                             lambda _: self.api.create_repo(model_id, private=private, exist_ok=True))
            model_id = made.repo_id  # with its owner
            found = self._ask(f"{model_id}: looking at the repository", lambda _: self.api.model_info(model_id))
            if private and not found.private:
                raise HubError(f"{model_id} on {self.host} is public, and a private repository was asked for; nothing "
                               "was sent. Make it private on its page, choose another name, or let it be public: "
                               "hub_private_repo: false of a training, --hub_public of ms-diffsynth push.")
            self._ask(f"{model_id}: the upload",
                      lambda attempt: self._commit(stage, names, model_id, message, attempt))
            commit = self._ask(f"{model_id}: comparing", lambda _: self.api.model_info(model_id)).sha
            stored = self._ask(f"{model_id}: comparing",
                               lambda _: self.api.get_paths_info(model_id, list(names), revision=commit))
        large = {entry.path for entry in stored if entry.lfs}
        compare(model_id, self.host, {name: _identity(stage / name, name in large) for name in names},
                {e.path: (e.size, e.lfs.sha256 if e.lfs else e.blob_id) for e in stored})
        return f"{self.api.endpoint}/{model_id}/commit/{commit}"

    def _commit(self, stage: Path, names: Sequence[str], model_id: str, message: str, attempt: int) -> None:
        with contextlib.ExitStack() as files:
            paths = [stage / name for name in names]
            # the client never sends an open file over xet
            sources = paths if attempt == 1 else [files.enter_context(open(path, "rb")) for path in paths]
            operations = [CommitOperationAdd(name, source) for name, source in zip(names, sources)]
            try:
                self.api.create_commit(model_id, operations, commit_message=message)
            except ValueError as error:
                if "HF ID" not in str(error):
                    raise  # else it is done: 0.36 cannot read a commit's address when the endpoint is an argument

    def _ask(self, what: str, call: Callable[[int], T]) -> T:
        """Ask again where that helps, and say in our words what was answered. Raises: HubError."""
        return patiently(what, lambda attempt: self._once(what, call, attempt))

    def _once(self, what: str, call: Callable[[int], T], attempt: int) -> T:
        try:
            return call(attempt)
        except HFValidationError as error:
            raise HubError(f"{what} is not possible: this is no repository name. Expected owner/name.") from error
        except OfflineModeIsEnabled as error:
            raise HubError(f"{what} is not possible: HF_HUB_OFFLINE is set. Unset it.") from error
        except HfHubHTTPError as error:
            raise self._explained(what, error) from error
        except _NETWORK_ERRORS as error:
            if getattr(error, "errno", None) is not None and not isinstance(error, (ConnectionError, TimeoutError)):
                raise HubError(f"{what} failed on this machine: {error.strerror}. Check the disk, then send it "
                               "again.") from error
            raise Unreachable(f"the connection to {self.host} failed ({type(error).__name__})") from error
        except ValueError as error:  # a model card whose head the hub does not accept, or an answer without sense
            raise HubError(f"{what} was refused: {redact(' '.join(str(error).split()))}") from error
        except Exception as error:  # of a large file's transfer: versions of the client and of hf_xet differ in it
            status = _status(error.__cause__)
            reason = f"answered {status}" if status else f"failed ({type(error.__cause__ or error).__name__})"
            raise Unreachable(f"the storage of {self.host} {reason}") from error

    def _explained(self, what: str, error: HfHubHTTPError) -> Exception:
        status = _status(error)
        if status is None or status in (408, 429) or status >= 500 or "/xet-write-token/" in str(error.response.url):
            after = error.response.headers.get("Retry-After", "") if status else ""
            return Unreachable(f"{self.host} answered {status}", float(after) if after.isdigit() else None)
        remedy = _REMEDIES.get(status, "Check the repository, and what is sent")
        return HubError(f"{what} was refused by {self.host} ({status}). {remedy}.")


def _identity(path: Path, is_large: bool) -> tuple[int, str]:
    """Size and checksum of a file, by the hub's way of storing it: SHA-256 with LFS, else the id of a git blob."""
    size = path.stat().st_size
    digest = hashlib.sha256() if is_large else hashlib.sha1(b"blob %d\0" % size)
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return size, digest.hexdigest()


def _status(error: object) -> int | None:
    return getattr(getattr(error, "response", None), "status_code", None)


@contextlib.contextmanager
def _progress_bars(is_shown: bool) -> Iterator[None]:
    """Without ``is_shown`` the client draws none: they would run through those of training."""
    if is_shown or are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()
