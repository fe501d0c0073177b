"""Sends files to ModelScope (``pip install 'ms_diffsynth[modelscope]'``): one commit, compared afterwards.

It is made of the calls of modelscope_hub's own HubApi, not of its ``upload_folder``: that commits whatever part of a
folder arrived, makes a missing repository public, and prints a report to standard output.
"""
from __future__ import annotations

import base64
import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import metadata_load

from ms_diffsynth.errors import HubError
from ms_diffsynth.hub.publish import compare, host_of, not_reached, refuse_public, refused
from ms_diffsynth.storage.files import sha256_of

PRIVATE = 1  # of ModelScope's numbers for visibility; 3 is internal, 5 public
BRANCH = "master"
_LARGEST_INLINE = 1 << 20  # bytes that travel in the commit itself
_LICENCES = ("apache-2.0", "mit", "cc-by-4.0", "cc-by-sa-4.0", "cc-by-nc-4.0", "cc0-1.0", "gpl-3.0")
_LOGIN = "Set MODELSCOPE_API_TOKEN, or log in with 'modelscope login'"


def connect(endpoint: str | None) -> ModelScope:
    """See `publish.connect`."""
    try:
        from modelscope_hub import HubApi, HubConfig
    except ImportError:
        raise HubError("publishing on ModelScope needs its client: pip install 'ms_diffsynth[modelscope]', or use "
                       "--hub huggingface.") from None
    config = HubConfig(endpoint=endpoint)
    host = host_of(config.endpoint)
    if not config.token:
        raise HubError(f"there is no token for {host}. {_LOGIN}.")
    return ModelScope(host, config, HubApi(config=config))


class ModelScope:
    """A `publish.Client`."""

    def __init__(self, host: str, config: Any, api: Any):
        self.host, self.config, self.api = host, config, api

    def send(self, stage: Path, names: Sequence[str], model_id: str, private: bool, message: str,
             is_quiet: bool = False) -> str:
        """See `publish.Client`; there are no progress bars to silence. Returns: the address of the repository."""
        if model_id.count("/") != 1 or not all(model_id.split("/")):
            raise HubError(f"hub_model_id='{model_id}' is not a repository name: expected owner/name.")
        files = {name: ((stage / name).stat().st_size, sha256_of(stage / name)) for name in names}
        with self._explained(f"{model_id}: making the repository"):
            # the licence that the model card names; the client would say Apache-2.0 of a model that names none
            card = stage / "README.md"
            named = str((metadata_load(card) or {}).get("license", "")) if card.is_file() else ""
            self._make(model_id, private, named if named in _LICENCES else "Other")
        with self._explained(f"{model_id}: the upload"):
            self._commit(stage, files, model_id, message)
        with self._explained(f"{model_id}: comparing"):
            stored = self.api.list_repo_files(model_id, "model")
        sizes = {name: (size, "") for name, (size, _) in files.items()}
        compare(model_id, self.host, sizes, {e.path: (e.size, "") for e in stored})
        sums = {e.path: (e.size, e.sha256) for e in stored if e.sha256}  # told of large files
        compare(model_id, self.host, {name: file for name, file in files.items() if name in sums}, sums)
        return f"{self.config.endpoint}/models/{model_id}"

    def _make(self, model_id: str, private: bool, licence: str) -> None:
        """Make the repository, or see that the one there is may be used."""
        from modelscope_hub.errors import is_repo_exists_error

        try:
            self.api.create_repo(model_id, "model", visibility="private" if private else "public", license=licence)
        except Exception as error:
            if not is_repo_exists_error(error):
                raise
            if private and self.api.legacy.get_repo_info(model_id, "model").get("Visibility") != PRIVATE:
                raise refuse_public(model_id, self.host) from error

    def _commit(self, stage: Path, files: dict[str, tuple[int, str]], model_id: str, message: str) -> None:
        is_large = {name: name.endswith(".safetensors") or size > _LARGEST_INLINE for name, (size, _) in files.items()}
        objects = [{"oid": digest, "size": size} for name, (size, digest) in files.items() if is_large[name]]
        places = self.api.legacy.validate_blobs(model_id, "model", objects) if objects else {}
        actions = []
        for name, (size, digest) in files.items():
            if is_large[name] and (place := places.pop(digest, None)):  # none: the hub has it already
                with open(stage / name, "rb") as file:
                    self.api.legacy.upload_blob(place, file, size)
            content = b"" if is_large[name] else (stage / name).read_bytes()
            actions.append({"action": "create", "path": name, "size": size,
                            "type": "lfs" if is_large[name] else "normal",
                            "sha256": digest if is_large[name] else "",
                            "content": base64.b64encode(content).decode(),
                            "encoding": "" if is_large[name] else "base64"})
        self.api.legacy.create_commit(model_id, "model", actions, message, BRANCH)

    @contextlib.contextmanager
    def _explained(self, what: str) -> Iterator[None]:
        """Say in our words what was answered, without addresses and tokens. Raises: HubError."""
        from modelscope_hub.errors import HubError as ClientError

        try:
            yield
        except ClientError as error:
            status = getattr(error, "status_code", None)
            if status is None and error.retryable:
                raise not_reached(what, self.host, error) from error
            raise refused(what, self.host, status, _LOGIN) from error
        except OSError as error:
            raise not_reached(what, self.host, error) from error
