"""Publishes files of a folder on the Hugging Face Hub or on ModelScope, in one commit. First save, then publish.

    choose -> copy to a private folder -> look for secrets -> make the repository -> send -> commit -> compare

Only regular files that a list allows are sent. Tokens come from the environment or the login cache, never from a
setting.
"""
from __future__ import annotations

import contextlib
import logging
import os
import queue
import re
import shutil
import tempfile
import threading
from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from importlib import import_module
from pathlib import Path, PurePosixPath
from typing import Protocol
from urllib.parse import urlsplit

from ms_diffsynth.errors import HubError, listing, nearest
from ms_diffsynth.redact import redact, redact_logs

logger = logging.getLogger(__name__)

HUBS = ("huggingface", "modelscope")

_FOLDERS = ("transformer", "unet", "vae", "text_encoder*", "tokenizer*", "scheduler")
ALLOWED = ("README.md", "LICENSE*", "model.py", "model_index.json", "config.json", "*.safetensors",
           "*.safetensors.index.json", "samples/*.png", "samples/*.webp", "samples/*.mp4",
           *(f"{folder}/*.json" for folder in _FOLDERS), *(f"{folder}/*.safetensors" for folder in _FOLDERS),
           "tokenizer*/*.txt", "tokenizer*/*.model", "tokenizer*/*.jinja")
# never sent, even when named: hidden files, keys, logs, and what resuming needs
_PRIVATE = re.compile(r"^\.|\.(env|pem|key|log|pkl|pickle)$|^id_(rsa|ed25519)|token(\.|$)|"
                      r"(^|[_.-])(optimizer|states?|rng|secrets?|credentials?|passwords?)([_.-]|$)", re.IGNORECASE)
_LARGEST_TEXT = 1 << 20  # bytes of a file that are searched for secrets: 0.4 seconds (2 cores, 2026-11-21)


def publish(folder: str | os.PathLike[str], model_id: str, *, hub: str = "huggingface", private: bool = True,
            endpoint: str | None = None, files: Sequence[str] | None = None,
            message: str = "Upload from ms_diffsynth") -> str:
    """Send files of ``folder`` to the repository ``model_id``, which is made when it does not exist.

    Args:
        hub: "huggingface" or "modelscope".
        private: make a private repository, and refuse one that is public.
        endpoint: address of the hub; None is the client's own (``HF_ENDPOINT``, ``MODELSCOPE_ENDPOINT``).
        files: names or patterns instead of `ALLOWED`; ``*`` stays within one folder.

    Returns: the address of the commit.

    Raises: HubError when there is nothing to send, a file holds a secret, or the hub refuses or cannot be reached;
        its message holds no token and no address beyond the host.
    """
    client = connect(hub, endpoint)
    names = choose(folder, files)
    return _send(client, folder, _stage(Path(folder), names), names, model_id, private, message)


def _send(client: Client, folder: str | os.PathLike[str], stage: Path, names: Sequence[str], model_id: str,
          private: bool, message: str, is_quiet: bool = False) -> str:
    """Send, and remove the stage. Raises: HubError naming every file, and line, with what `redact` would change."""
    try:
        found = []
        for name in names:
            if name.startswith("tokenizer"):
                continue  # the base model's; a vocabulary holds every word, "password" and a number beside it
            with open(stage / name, "rb") as file:  # of safetensors the header may be text
                is_weights = name.endswith(".safetensors")
                size = min(_LARGEST_TEXT, int.from_bytes(file.read(8), "little")) if is_weights else _LARGEST_TEXT
                text = file.read(size).decode("utf-8", errors="replace")
            if redact(text) != text:
                lines = [k for k, line in enumerate(text.splitlines(), 1) if redact(line) != line]
                found.append(f"{name} line {lines[0]}" if lines and not is_weights else name)
        if found:
            raise HubError(f"{folder}: what looks like a token or a password is in {listing(found)}; nothing was sent. "
                           "Remove it, and replace the token: it may have been seen already.")
        return client.send(stage, names, model_id, private, redact(message), is_quiet)
    finally:
        shutil.rmtree(stage, ignore_errors=True)


class Client(Protocol):
    """A hub and a token for it. ``send`` makes one commit of files below ``stage``, and returns its address."""

    def send(self, stage: Path, names: Sequence[str], model_id: str, private: bool, message: str,
             is_quiet: bool = False) -> str:
        """Raises: HubError."""


def connect(hub: str, endpoint: str | None = None) -> Client:
    """The client of a hub; the network is not asked.

    Raises: HubError when the hub is unknown, there is no token, or its client is not installed.
    """
    redact_logs()  # a client logs addresses that are signed
    if hub not in HUBS:
        raise HubError(f"hub='{hub}' is unknown: expected one of {', '.join(HUBS)}.{nearest(hub, HUBS)}")
    return import_module(f"ms_diffsynth.hub.{hub}").connect(endpoint)  # they import this module


# -- what is sent --------------------------------------------------------------------------------------------------


def choose(folder: str | os.PathLike[str], files: Sequence[str] | None = None) -> list[str]:
    """The files of a folder that may be sent, by relative name: those `ALLOWED`, or those ``files`` names.

    Raises: HubError when there are none, when one that is named does not exist, or may never be sent.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise HubError(f"{folder} is not a folder. Give the output folder of a run, or of a saved model.")
    found = []
    for parent, folders, files_here in os.walk(folder):
        folders[:] = [f for f in folders if not f.startswith(".")]  # also spares the walk through .git
        paths = [Path(parent, name) for name in files_here]
        # a link is not a regular file, wherever it leads
        found += [p.relative_to(folder).as_posix() for p in paths if p.is_file() and not p.is_symlink()]
    found.sort()
    sent = [n for n in found if not any(_PRIVATE.search(part) for part in PurePosixPath(n).parts)]
    lost = [f for f in files or () if not any(_matches(n, f) for n in sent)]
    if lost:
        why = " (hidden files, links, keys, logs and optimizer states are never sent)" if os.path.lexists(
            folder / lost[0]) else nearest(lost[0], sent)
        raise HubError(f"{folder} has no file {listing(lost)} to send{why}. It has {listing(sent) or 'none at all'}.")
    names = [n for n in sent if any(_matches(n, f) for f in (files or ALLOWED))]
    if not names:
        raise HubError(f"{folder} has nothing to send: none of its {len(found)} files is a model card, weights, a "
                       "configuration of a model, or a sample image. Name files with --files.")
    return names


def _matches(name: str, pattern: str) -> bool:
    parts, wanted = PurePosixPath(name).parts, PurePosixPath(pattern).parts
    return len(parts) == len(wanted) and all(map(fnmatchcase, parts, wanted))


def _stage(folder: Path, names: Sequence[str]) -> Path:
    """A private folder that holds the named files as they are now, whatever is written to ``folder`` later.

    Weights are linked: they are only ever replaced as a whole. Everything else is copied.

    Raises: HubError when this cannot be done; nothing is left behind.
    """
    try:
        stage = Path(tempfile.mkdtemp(prefix=".upload-", dir=folder))  # on the same disk, so that links are possible
    except OSError:
        stage = Path(tempfile.mkdtemp(prefix="ms-diffsynth-upload-"))
    try:
        for name in names:
            source, target = folder / name, stage / name
            target.parent.mkdir(parents=True, exist_ok=True)
            _take(source, target)
        links = [n for n in names if (stage / n).is_symlink()]
        if links:
            raise HubError(f"{folder}: {listing(links)} became a link meanwhile. Send it again.")
    except BaseException as error:
        shutil.rmtree(stage, ignore_errors=True)
        if isinstance(error, OSError):
            raise HubError(f"{folder} cannot be copied for sending: {error.strerror or error}. Check the disk, then "
                           f"run ms-diffsynth push {folder}.") from error
        raise
    return stage


def _take(source: Path, target: Path) -> None:
    if target.suffix == ".safetensors":
        with contextlib.suppress(OSError):  # another disk, or one without links
            os.link(source, target, follow_symlinks=False)
            return
    shutil.copyfile(source, target, follow_symlinks=False)


# -- how it is sent ------------------------------------------------------------------------------------------------


def refused(what: str, host: str, status: int | None, login: str) -> HubError:
    """The error for an answer of a hub; the client has asked again where it does that."""
    remedies = {401: login, 403: "Give the token write access to it, or choose a name of your own",
                404: "Check the name, and that the token may see it"}
    remedy = remedies.get(status, "Check the repository, and what is sent")
    if status is None or status in (408, 429) or status >= 500:
        remedy = "What is on this disk is complete: send it again later with ms-diffsynth push"
    return HubError(f"{what} was refused by {host} ({status or 'without a status'}). {remedy}.")


def not_reached(what: str, host: str, error: OSError | Exception) -> HubError:
    """The error for a connection that failed, or for a disk here that did."""
    if getattr(error, "errno", None) is not None and not isinstance(error, (ConnectionError, TimeoutError)):
        return HubError(f"{what} failed on this machine: {error.strerror}. Check the disk, then send it again.")
    return HubError(f"{what} failed: the connection to {host} failed ({type(error).__name__}). What is on this disk is "
                    "complete: send it again later with ms-diffsynth push.")


def refuse_public(model_id: str, host: str) -> HubError:
    """The error for a repository that is public when a private one was asked for."""
    return HubError(f"{model_id} on {host} is public, and a private repository was asked for; nothing was sent. Make "
                    "it private on its page, choose another name, or let it be public: hub_private_repo: false of a "
                    "training, --hub_public of ms-diffsynth push.")


def host_of(endpoint: str) -> str:
    """The host of a hub's address.

    Raises: HubError for an address that would give the token away: one with a password in it, or without encryption.
    """
    address = urlsplit(endpoint)
    host = address.hostname or ""
    if address.username or address.password:
        raise HubError(f"the endpoint of {host} holds a user name or a password, which would end up in logs. "
                       "Expected the plain address; log in instead.")
    if not host or (address.scheme != "https" and host not in ("localhost", "127.0.0.1", "::1")):
        raise HubError(f"endpoint={address.scheme}://{host} is not an address to which a token may be sent: expected "
                       "https://host.")
    return host


def compare(model_id: str, host: str, expected: dict[str, tuple[int, str]], stored: dict[str, tuple[int, str]]) -> None:
    """Raises: HubError unless the hub has every file in the size, and with the checksum, it was sent with."""
    wrong = [name for name, sent in expected.items() if stored.get(name) != sent]
    if wrong:
        raise HubError(f"{model_id} on {host} does not hold {listing(wrong)} as sent. Check the repository (a "
                       ".gitignore in it drops files), then send it again.")


# -- during a training --------------------------------------------------------------------------------------------


class BackgroundUpload:
    """Publishes a folder from one thread during a training. Args: as those of `publish`.

    What is wrong at the start is raised, by `connect`; what fails later is not.

    Args:
        tell: called with what happens, by the thread of the upload: ``tell("upload_begun", upload=message, files=3)``,
            ``"upload_finished"`` with ``url``, ``"upload_failed"`` with ``reason``.

    Attributes:
        published: what was uploaded last, and where it is; an empty text before.
        failures: one line for each upload that failed.
    """

    def __init__(self, model_id: str, *, hub: str = "huggingface", private: bool = True, endpoint: str | None = None,
                 tell: Callable[..., None] | None = None):
        self.model_id, self.published = model_id, ""
        self.failures: list[str] = []
        self._client, self._private, self._tell = connect(hub, endpoint), private, tell or (lambda *_, **__: None)
        self._waiting: queue.Queue[tuple[Path, Path, list[str], str] | None] = queue.Queue()
        self._given_up = False
        self._thread = threading.Thread(target=self._work, name="upload", daemon=True)
        self._thread.start()

    def submit(self, folder: str | os.PathLike[str], message: str = "Upload from ms_diffsynth",
               files: Sequence[str] | None = None) -> None:
        """Take what the folder holds now and publish it soon. What waits of the same folder is replaced by it."""
        try:
            names = choose(folder, files)
            stage = _stage(Path(folder), names)
        except Exception as error:  # training continues, whatever is wrong with the folder
            self.failed(error)
            return
        with self._waiting.mutex:
            old = [job for job in self._waiting.queue if job and job[0] == Path(folder)]
            for job in old:
                self._waiting.queue.remove(job)
        for job in old:
            shutil.rmtree(job[1], ignore_errors=True)
        self._waiting.put((Path(folder), stage, names, message))

    def close(self, timeout: float = 600.0) -> list[str]:
        """Wait for what is under way, at most ``timeout`` seconds. Returns: `failures`, which are logged once more."""
        self._waiting.put(None)
        if self._thread.is_alive():
            logger.info("waiting for the upload to %s, at most %.0f seconds.", self.model_id, timeout)
        self._thread.join(timeout)
        if self._thread.is_alive():
            self._given_up = True
            self.failed(TimeoutError(f"not done after {timeout:.0f} seconds"))
        if self.failures:
            logger.warning("%d uploads to %s failed; the files are complete on this disk, ms-diffsynth push sends "
                           "them. The last failure: %s", len(self.failures), self.model_id, self.failures[-1])
        return self.failures

    def failed(self, error: Exception) -> None:
        """Tell that something about an upload failed; training continues."""
        line = redact(" ".join(f"{type(error).__name__}: {error}".split()))
        self.failures.append(line)
        logger.warning("upload to %s failed, training continues: %s", self.model_id, line)
        self._tell("upload_failed", reason=line)

    def _work(self) -> None:
        while (job := self._waiting.get()) is not None and not self._given_up:
            folder, stage, names, message = job
            try:
                self._tell("upload_begun", upload=message, files=len(names))
                url = _send(self._client, folder, stage, names, self.model_id, self._private, message, is_quiet=True)
                logger.info("uploaded %d files: %s", len(names), url)
                self.published = f"{message}: {url}"
                self._tell("upload_finished", upload=message, url=url)
            except Exception as error:  # of any client, in any version: training continues
                self.failed(error)
