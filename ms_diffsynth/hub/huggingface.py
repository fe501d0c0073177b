"""Sends files to the Hugging Face Hub: one commit, by huggingface_hub's own client, and compared afterwards.

The client asks again where that helps, and decides how large files go: over xet where hf_xet is installed and the Hub
offers it (``HF_HUB_DISABLE_XET=1`` prevents that), else over plain LFS.
"""
from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from huggingface_hub import HfApi, constants, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled
from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

from ms_diffsynth.errors import HubError
from ms_diffsynth.hub.download import NETWORK_ERRORS, status_of
from ms_diffsynth.hub.publish import compare, host_of, not_reached, refuse_public, refused

_LOGIN = "Log in with 'hf auth login', or set HF_TOKEN to a token that may write"


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
        with _progress_bars(not is_quiet):
            with self._explained(f"{model_id}: making the repository"):
                model_id = self.api.create_repo(model_id, private=private, exist_ok=True).repo_id  # with its owner
                found = self.api.model_info(model_id)
            if private and not found.private:
                raise refuse_public(model_id, self.host)
            with self._explained(f"{model_id}: the upload"):
                try:
                    self.api.upload_folder(repo_id=model_id, folder_path=stage, commit_message=message)
                except ValueError as error:
                    if "HF ID" not in str(error):
                        raise  # else it is done: 0.36 cannot read a commit's address when the endpoint is an argument
            with self._explained(f"{model_id}: comparing"):
                commit = self.api.model_info(model_id).sha
                stored = self.api.get_paths_info(model_id, list(names), revision=commit)
        large = {entry.path for entry in stored if entry.lfs}
        compare(model_id, self.host, {name: _identity(stage / name, name in large) for name in names},
                {e.path: (e.size, e.lfs.sha256 if e.lfs else e.blob_id) for e in stored})
        return f"{self.api.endpoint}/{model_id}/commit/{commit}"

    @contextlib.contextmanager
    def _explained(self, what: str) -> Iterator[None]:
        """Say in our words what was answered, without addresses and tokens. Raises: HubError."""
        try:
            yield
        except HFValidationError as error:
            raise HubError(f"{what} is not possible: this is not a repository name. Expected owner/name.") from error
        except OfflineModeIsEnabled as error:
            raise HubError(f"{what} is not possible: HF_HUB_OFFLINE is set. Unset it.") from error
        except HfHubHTTPError as error:
            raise refused(what, self.host, status_of(error), _LOGIN) from error
        except NETWORK_ERRORS as error:
            raise not_reached(what, self.host, error) from error
        except ValueError as error:  # a model card whose head the hub does not accept, or an answer without sense
            raise HubError(f"{what} was refused: {' '.join(str(error).split())}") from error
        except Exception as error:  # of a large file's transfer: versions of the client and of hf_xet differ in it
            if status := status_of(error.__cause__):
                raise refused(what, f"the storage of {self.host}", status, _LOGIN) from error
            raise not_reached(what, f"the storage of {self.host}", error.__cause__ or error) from error


def _identity(path: Path, is_large: bool) -> tuple[int, str]:
    """Size and checksum of a file, by the hub's way of storing it: SHA-256 with LFS, else the id of a git blob."""
    size = path.stat().st_size
    digest = hashlib.sha256() if is_large else hashlib.sha1(b"blob %d\0" % size)
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return size, digest.hexdigest()


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
