"""Where the files of a model are: a local path, a local copy of a repository, or a hub and its cache.

The token is the business of the hub's client (``hf auth login``, ``modelscope login``): it is never a setting here and
never in a message.
"""
from __future__ import annotations

import glob
import logging
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import urlsplit

from huggingface_hub import HfApi, constants, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from ms_diffsynth.errors import ConfigError, HubError, WeightError, listing, nearest
from ms_diffsynth.hub import modelscope_download
from ms_diffsynth.hub.bundled import bundled
from ms_diffsynth.storage.files import sha256_of

# huggingface_hub < 1 raises errors of requests, which are OSErrors; 1 and 2 those of httpx, which are not
NETWORK_ERRORS = (OSError, HfHubHTTPError.__bases__[0])

logger = logging.getLogger(__name__)

SOURCES = ("huggingface", "modelscope")
SOURCE_VARIABLE = "MS_DIFFSYNTH_DOWNLOAD_SOURCE"
ATTEMPTS = 3  # a download resumes where it was cut
TOO_MUCH_IS_HERE = 416  # the answer to a request for what comes after the end of a file
WAIT_SECONDS = 1.0  # before the second attempt, doubled before each further one


@dataclass
class ModelConfig:
    """Names the files of one model.

    Args:
        path: a file, a folder, the name of a bundled model (``"emoji-flux"``), a glob pattern or a list of these;
            nothing else is looked at when it is given.
        model_id: "owner/name" of a repository.
        origin_file_pattern: which of its files: "", "./" or None is all of them, "x/" the folder x, anything else a
            pattern in which ``*`` stays within one folder.
        revision: branch, tag or commit. `resolve` replaces it by the commit that was used.
        local_model_path: a folder with copies of repositories, ``<local_model_path>/<model_id>/...``, looked at first.
        skip_download: never ask the network, take what the cache holds.
        endpoint: address of the hub; None is its client's own (``HF_ENDPOINT``, ``MODELSCOPE_ENDPOINT``).
        cache_dir: None is the client's own (``HF_HOME``, ``MODELSCOPE_CACHE``).
        download_source: ``"huggingface"`` or ``"modelscope"``; None is MS_DIFFSYNTH_DOWNLOAD_SOURCE, or huggingface.
    """

    path: str | os.PathLike[str] | list[str | os.PathLike[str]] | None = None
    model_id: str | None = None
    origin_file_pattern: str | None = None
    revision: str | None = None
    local_model_path: str | os.PathLike[str] | None = None
    skip_download: bool = False
    endpoint: str | None = None
    cache_dir: str | os.PathLike[str] | None = None
    download_source: str | None = None

    def resolve(self, base_path: str | os.PathLike[str] | None = None) -> list[Path]:
        """The files, sorted, or the one folder when a whole folder is named; downloaded when they are not here yet.

        Args:
            base_path: stands in for ``local_model_path`` when that is None.

        Raises: WeightError when a local path does not exist; HubError when the hub or its cache has no such file;
            ConfigError when nothing is named.
        """
        if self.path is not None:
            return _local(self.path if isinstance(self.path, list) else [self.path])
        if not self.model_id:
            raise ConfigError("ModelConfig names nothing: expected a path or a model_id.")
        base = self.local_model_path if self.local_model_path is not None else base_path
        if base is not None:
            folder = Path(base, self.model_id)
            if found := _select(folder, self.origin_file_pattern):
                logger.info("%s: using the local copy %s.", self, folder)
                return found
        if self.source == "modelscope":
            folder, self.revision = modelscope_download.snapshot(
                self, lambda names: _matching(names, self.origin_file_pattern))
        else:
            folder = _Repository(self).snapshot()
            self.revision = folder.name
        found = _select(folder, self.origin_file_pattern)
        if not found:
            raise HubError(f"{self}: no such file in the cache {folder}, which holds {listing(_files_in(folder))}. "
                           "Run once with a connection to download it.")
        return found

    @property
    def source(self) -> str:
        """The hub that is asked. Raises: ConfigError for one that is unknown."""
        source = self.download_source or os.environ.get(SOURCE_VARIABLE) or SOURCES[0]
        if source not in SOURCES:
            where = "download_source" if self.download_source else SOURCE_VARIABLE
            raise ConfigError(f"{where}={source!r}: expected {' or '.join(SOURCES)}.{nearest(source, SOURCES)}")
        return source

    def download_if_necessary(self, base_path: str | os.PathLike[str] | None = None) -> None:
        """`resolve`, and put the result into ``path``: a text for one path, a list for several."""
        found = [str(path) for path in self.resolve(base_path)]
        self.path = found[0] if len(found) == 1 else found

    def __str__(self) -> str:
        if not self.model_id:
            return str(self.path)
        revision = f"@{self.revision}" if self.revision else ""
        return f"{self.model_id}{revision}:{self.origin_file_pattern or ''}"


def parse_path_or_model_id(text: str, default: ModelConfig | None = None, hub: str | None = None) -> ModelConfig | None:
    """A path that exists, or ``owner/name:pattern`` (``owner/name@revision:pattern``). Empty text gives ``default``.

    Args:
        hub: of a name that does not say it; ``ms:owner/name:pattern`` is of ModelScope, ``hf:owner/name:pattern`` of
            Hugging Face. None is that of the environment, as in `ModelConfig`.

    Raises: ConfigError for text that is neither.
    """
    if not text:
        return default
    if os.path.exists(text):
        return ModelConfig(path=text)
    said = {"ms:": "modelscope", "hf:": "huggingface"}.get(text[:3])
    name, colon, pattern = (text[3:] if said else text).rpartition(":")
    model_id, _, revision = name.partition("@")
    if not colon or model_id.count("/") != 1 or model_id.startswith((".", "/")) or model_id.endswith("/"):
        raise ConfigError(f"'{text}' is neither a path that exists nor a model: expected owner/name:pattern, for "
                          "example owner/name:vae/*.safetensors, or owner/name: for all files.")
    return ModelConfig(model_id=model_id, origin_file_pattern=pattern, revision=revision or None,
                       download_source=said or hub)


def parse_model_id_with_origin_paths(text: str, hub: str | None = None) -> list[ModelConfig]:
    """``owner/name:pattern,owner/name:pattern``. Raises: ConfigError naming every entry that is not of this form."""
    configs, problems = [], []
    for entry in text.split(","):
        try:
            configs.append(parse_path_or_model_id(entry.strip(), hub=hub))
        except ConfigError:
            problems.append(f"'{entry}'")
    if problems or None in configs:
        raise ConfigError(f"model_id_with_origin_paths='{text}': {listing(problems) or 'an empty entry'} is not of the "
                          "form owner/name:pattern. Separate entries by commas.")
    return configs


# -- local files ---------------------------------------------------------------------------------------------------


def _local(sources: list[str | os.PathLike[str]]) -> list[Path]:
    found: list[Path] = []
    for source in sources:
        path = bundled(source) or Path(source)
        paths = [path] if path.exists() else [Path(p) for p in sorted(glob.glob(str(source)))]
        if not paths:
            there = sorted(p.name for p in path.parent.iterdir()) if path.parent.is_dir() else []
            raise WeightError(f"{source} does not exist; {path.parent} holds {listing(there) or 'nothing'}."
                              f"{nearest(path.name, there)} For a model of a hub give ModelConfig(model_id=...).")
        found += paths
    return found


def _files_in(folder: Path) -> list[str]:
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


def _matching(names: list[str], pattern: str | None) -> list[str]:
    """Those file names a pattern means; ``*`` stays within one folder."""
    if pattern in (None, "", "./"):
        return names
    parts = PurePosixPath(pattern).parts
    if pattern.endswith("/"):
        return [n for n in names if PurePosixPath(n).parts[:len(parts)] == parts]
    split = {n: PurePosixPath(n).parts for n in names}
    return [n for n, p in split.items() if len(p) == len(parts) and all(map(fnmatchcase, p, parts))]


def _select(folder: Path, pattern: str | None) -> list[Path]:
    """What a pattern means below ``folder``: the folder itself, a folder in it, or files; [] when it is not there."""
    found = _matching(_files_in(folder), pattern) if folder.is_dir() else []
    if found and pattern in (None, "", "./"):
        return [folder]
    if found and pattern.endswith("/"):
        return [folder / pattern]
    return [folder / name for name in found]


# -- the hub -------------------------------------------------------------------------------------------------------


class _Repository:
    """One repository, asked for the files of one configuration."""

    def __init__(self, config: ModelConfig):
        self.config = config
        self.endpoint = config.endpoint or constants.ENDPOINT
        address = urlsplit(self.endpoint)
        self.host = address.hostname or self.endpoint
        if address.username or address.password:
            raise HubError(f"the endpoint of {self.host} holds a user name or a password, which would end up in logs. "
                           "Expected the plain address; log in with 'hf auth login'.")

    def snapshot(self) -> Path:
        """The folder of one commit in the cache, with every file that matches; its name is the commit."""
        if self.config.skip_download:
            return self._cached("skip_download is set", None)
        try:
            info = self._ask(lambda: HfApi(endpoint=self.endpoint).model_info(
                self.config.model_id, revision=self.config.revision))
        except _Unreachable as error:
            return self._cached(str(error), error.__cause__)
        names = sorted(sibling.rfilename for sibling in info.siblings or [])
        if outside := [n for n in names if n.startswith("/") or ".." in PurePosixPath(n).parts]:
            raise HubError(f"{self.config}: the repository holds files that lead out of it: {listing(outside)}. "
                           "Choose another repository.")
        wanted = _matching(names, self.config.origin_file_pattern)
        if not wanted:
            raise HubError(f"{self.config}: no file matches; the repository holds {listing(names, 30) or 'no files'}."
                           f"{nearest(self.config.origin_file_pattern or '', names)}")
        if info.sha != self.config.revision:
            logger.info("%s: revision %s is commit %s.", self.config, self.config.revision or "main", info.sha)
        return self._download(info.sha, wanted)

    def _download(self, commit: str, wanted: list[str]) -> Path:
        revision = self.config.revision or constants.DEFAULT_REVISION  # by its name, so that the cache knows it offline
        is_anew = False
        for attempt in range(1, ATTEMPTS + 1):
            began = time.time()
            try:
                folder = Path(self._ask(partial(self._fetch, revision, wanted, is_anew=is_anew)))
                _refuse_damaged(folder, wanted, began)
                break
            except _Unreachable as error:
                if attempt == ATTEMPTS:
                    raise HubError(f"{self.config}: {listing(self._absent(commit, wanted))} could not be downloaded "
                                   f"from {self.host} in {ATTEMPTS} attempts: {error}. What arrived is kept: run again "
                                   "to go on.") from error.__cause__
                logger.warning("%s: %s; attempt %d of %d follows.", self.config, error, attempt + 1, ATTEMPTS)
                time.sleep(WAIT_SECONDS * 2 ** (attempt - 1))
                # what is too long cannot be resumed; huggingface_hub would try that for ever
                is_anew = ("Consistency check failed" in str(error.__cause__)
                           or status_of(error.__cause__) == TOO_MUCH_IS_HERE)
        absent = [name for name in wanted if not (folder / name).is_file()]
        if folder.name != commit or absent:
            raise HubError(f"{self.config} changed while it was read: expected {listing(absent) or 'its files'} of "
                           f"commit {commit}, got commit {folder.name}. Run again, or give revision='{commit}'.")
        return folder

    def _fetch(self, revision: str, wanted: list[str], is_local: bool = False, is_anew: bool = False) -> str:
        return snapshot_download(
            self.config.model_id, revision=revision, allow_patterns=[glob.escape(name) for name in wanted],
            cache_dir=self.config.cache_dir, endpoint=self.endpoint, local_files_only=is_local, force_download=is_anew)

    def _absent(self, commit: str, wanted: list[str]) -> list[str]:
        try:
            folder = Path(self._fetch(commit, wanted, is_local=True))
        except LocalEntryNotFoundError:
            return wanted
        return [name for name in wanted if not (folder / name).is_file()] or wanted

    def _cached(self, reason: str, cause: BaseException | None) -> Path:
        revision = self.config.revision or constants.DEFAULT_REVISION
        try:
            folder = Path(self._fetch(revision, [], is_local=True))
        except (LocalEntryNotFoundError, HFValidationError):
            raise HubError(f"{self.config} cannot be had: {reason}, and the cache does not hold revision {revision}. "
                           "Run once with a connection, or copy the files and give their path.") from cause
        logger.warning("%s: %s; using commit %s from the cache.", self.config, reason, folder.name)
        return folder

    def _ask(self, call: Callable[[], Any]) -> Any:
        """Call the hub. Raises: HubError for a refusal, _Unreachable for a connection that fails."""
        try:
            return call()
        except HFValidationError as error:
            name = self.config.model_id
            raise HubError(f"model_id='{name}' is not a repository name: expected owner/name.") from error
        except GatedRepoError as error:
            raise self._error("is gated (403)", "Accept its terms on the hub's page and log in with "
                              "'hf auth login'") from error
        except RevisionNotFoundError as error:
            raise self._error(f"has no revision '{self.config.revision}' (404)", "Check the revision") from error
        except RepositoryNotFoundError as error:
            raise self._error(f"does not exist or is private ({status_of(error)})", "Check the name, or log in with "
                              "'hf auth login'") from error
        except LocalEntryNotFoundError as error:  # the connection broke inside huggingface_hub
            raise _Unreachable(f"the connection to {self.host} failed") from error
        except EntryNotFoundError as error:
            raise self._error("lists a file that it does not have (404)", "Give another revision") from error
        except HfHubHTTPError as error:
            status = status_of(error)
            if status is None or status in (TOO_MUCH_IS_HERE, 429) or status >= 500:
                raise _Unreachable(f"{self.host} answered {status}") from error
            raise self._error(f"was refused ({status})", "Log in with 'hf auth login', or check the "
                              "access rights") from error
        except OfflineModeIsEnabled as error:
            raise _Unreachable("HF_HUB_OFFLINE is set") from error
        except NETWORK_ERRORS as error:
            if getattr(error, "errno", None) is not None and not isinstance(error, (ConnectionError, TimeoutError)):
                raise HubError(f"{self.config}: the cache cannot be written ({error.strerror}). Free some space, or "
                               "set HF_HOME to another folder (cache_dir of ModelConfig).") from error
            raise _Unreachable(f"the connection to {self.host} failed ({type(error).__name__})") from error

    def _error(self, what: str, remedy: str) -> HubError:
        return HubError(f"{self.config} on {self.host} {what}. {remedy}; files of the cache alone are used with "
                        "HF_HUB_OFFLINE=1 (skip_download=True of ModelConfig).")


class _Unreachable(Exception):
    """The hub cannot be reached, or sends what it should not; the message says why, without addresses or tokens."""


def _refuse_damaged(folder: Path, names: list[str], since: float) -> None:
    """Remove files that arrived since then with another content than the hub announced; huggingface_hub compares sizes.

    The cache names a large file by its SHA-256, a small one by a digest of git's. Raises: _Unreachable.
    """
    arrived = {name: blob for name in names if (blob := (folder / name).resolve()).is_file()
               and len(blob.name) == 64 and blob.stat().st_mtime >= since}
    damaged = [name for name, blob in arrived.items() if sha256_of(blob) != blob.name]
    for name in damaged:
        (folder / name).unlink()
        arrived[name].unlink(missing_ok=True)  # two names may have one content
    if damaged:
        raise _Unreachable(f"{listing(damaged)} arrived with another SHA-256 than announced")


def status_of(error: object) -> int | None:
    """The status that a hub answered with, if the error is about an answer."""
    return getattr(getattr(error, "response", None), "status_code", None)
