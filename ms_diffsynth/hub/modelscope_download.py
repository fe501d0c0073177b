"""Fetches files from ModelScope through its own client (``pip install 'ms_diffsynth[modelscope]'``) and its cache."""
from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ms_diffsynth.errors import HubError, listing, nearest

logger = logging.getLogger(__name__)

BRANCH = "master"


def snapshot(config: Any, matching: Callable[[Sequence[str]], list[str]]) -> tuple[Path, str]:
    """The folder in the client's cache that holds every file of a repository that is asked for, and its revision.

    The client compares each file with the size and the SHA-256 that the hub tells.

    Args:
        config: a `hub.download.ModelConfig`.
        matching: from the names of a repository's files to those that are asked for.

    Raises: HubError.
    """
    api, client, host = _client(config)
    revision, cache = config.revision or BRANCH, config.cache_dir
    how = {"repo_id": config.model_id, "repo_type": "model", "revision": revision, "cache_dir": cache}

    def cached(reason: str, cause: Exception | None) -> tuple[Path, str]:
        try:
            folder = api.download_repo(**how, local_files_only=True)
        except client.CacheNotFound:
            raise HubError(f"{config} cannot be had: {reason}, and ModelScope's cache does not hold revision "
                           f"{revision}. Run once with a connection, or copy the files and give their "
                           "path.") from cause
        logger.warning("%s: %s; using what ModelScope's cache holds.", config, reason)
        return folder, revision

    if config.model_id.count("/") != 1 or not all(config.model_id.split("/")):
        raise HubError(f"model_id='{config.model_id}' is not a repository name: expected owner/name.")
    if config.skip_download:
        return cached("skip_download is set", None)
    try:
        files = _files(api, config)
    except client.NetworkError as error:
        return cached(f"the connection to {host} failed", error)
    except client.APIError as error:
        raise _refused(config, host, error) from error
    names = sorted(file["Path"] for file in files)
    if outside := [name for name in names if name.startswith("/") or ".." in Path(name).parts]:
        raise HubError(f"{config}: the repository holds files that lead out of it: {listing(outside)}. Choose another "
                       "repository.")
    wanted = set(matching(names))
    if not wanted:
        raise HubError(f"{config}: no file matches; the repository on {host} holds {listing(names, 30) or 'no files'}."
                       f"{nearest(config.origin_file_pattern or '', names)}")
    try:
        folder = api.download_repo(**how, file_list=[file for file in files if file["Path"] in wanted])
    except client.FileDownloadError as error:
        first = next(iter(error.failed_files.values()))
        raise HubError(f"{config}: {listing(sorted(error.failed_files))} could not be downloaded from {host} "
                       f"({type(first).__name__}). What arrived is kept: run again to go on.") from error
    except OSError as error:
        raise HubError(f"{config}: ModelScope's cache cannot be written ({error.strerror}). Free some space, or give "
                       "another cache_dir.") from error
    return folder, revision


def sizes(config: Any) -> dict[str, int]:
    """Name -> bytes of every file of a repository. Raises: HubError."""
    api, client, host = _client(config)
    if config.skip_download:
        raise HubError(f"{config} is not listed: skip_download is set.")
    try:
        return {file["Path"]: int(file.get("Size") or 0) for file in _files(api, config)}
    except client.NetworkError as error:
        raise HubError(f"{config} cannot be listed: the connection to {host} failed.") from error
    except client.APIError as error:
        raise _refused(config, host, error) from error


def _client(config: Any) -> tuple[Any, Any, str]:
    """ModelScope's client, its errors, and the name of its host. Raises: HubError where it is not installed."""
    try:
        from modelscope_hub import HubApi, HubConfig, errors as client
    except ImportError:
        raise HubError(f"{config} is asked for on ModelScope, which needs its client: pip install "
                       "'ms_diffsynth[modelscope]', or set download_source to huggingface.") from None
    settings = HubConfig(endpoint=config.endpoint)
    return HubApi(config=settings), client, settings.endpoint.partition("://")[2].partition("/")[0]


def _files(api: Any, config: Any) -> list[dict[str, Any]]:
    return [f for f in api.legacy.list_repo_files(config.model_id, "model", revision=config.revision or BRANCH,
                                                  recursive=True) if f.get("Type") != "tree"]


def _refused(config: Any, host: str, error: Any) -> HubError:
    status = getattr(error, "status_code", None)
    if status in (401, 403, 404):
        return HubError(f"{config} on {host} does not exist or is private ({status}). Check the name and the revision, "
                        "or log in with 'modelscope login'; download_source says which hub is asked.")
    return HubError(f"{config} on {host} was refused ({status or 'without a status'}). Run again later; files of the "
                    "cache alone are used with skip_download=True.")
