"""A hub on this machine: the part of the Hugging Face Hub's HTTP interface that huggingface_hub reads models through.

    with HubServer() as hub:
        hub.add("owner/name", {"config.json": b"{}"})       -> the commit
        ModelConfig(model_id="owner/name", endpoint=hub.endpoint, cache_dir=tmp_path)
"""
from __future__ import annotations

import hashlib
import json
import re
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace
from urllib.parse import unquote

from huggingface_hub import constants, utils

from ms_diffsynth.hub import download


@dataclass
class Repository:
    """``commits``: commit -> name -> bytes. ``refs``: branch or tag -> commit."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    is_gated: bool = False
    token: str | None = None  # the token a reader must show


def only_this_machine(monkeypatch) -> None:
    """Clients are online, ask no proxy and do not wait before they ask again."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(utils._http, "time", SimpleNamespace(sleep=lambda _: None, time=time.time))
    monkeypatch.setattr(download, "WAIT_SECONDS", 0.0)
    if hasattr(utils, "reset_sessions"):  # huggingface_hub < 1 decides when it makes a session
        utils.reset_sessions()


class HubServer:
    """Serves repositories until the block ends.

    Attributes:
        requests: (method, path, range header or None) of every request, in order.
        cuts: file name -> how many of its next downloads end half-way.
        instead: file name -> what its next downloads send instead, under the name and the digest of the true content.
        hidden: files that are listed but cannot be downloaded.
        status: when not None, every request is answered with it.
    """

    handler: type | None = None

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.requests: list[tuple[str, str, str | None]] = []
        self.cuts: dict[str, int] = {}
        self.instead: dict[str, list[bytes]] = {}
        self.hidden: set[str] = set()
        self.status: int | None = None

    def add(self, name: str, files: dict[str, bytes], ref: str = "main", **settings: object) -> str:
        """A new commit at ``ref``."""
        repository = self.repositories.setdefault(name, Repository())
        for key, value in settings.items():
            setattr(repository, key, value)
        commit = hashlib.sha1(repr((name, len(repository.commits), sorted(files.items()))).encode()).hexdigest()
        repository.commits[commit] = files
        repository.refs[ref] = commit
        return commit

    def downloads(self) -> list[str]:
        """Names of the files that were asked for with GET."""
        return [path.split("/", 5)[5] for method, path, _ in self.requests if method == "GET" and "/resolve/" in path]

    def __enter__(self) -> HubServer:
        handler = type("Handler", (self.handler or _Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        self._thread.start()
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """From now on connections are refused."""
        self._server.shutdown()
        self._server.server_close()


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        self._answer(has_body=True)

    def do_HEAD(self) -> None:
        self._answer(has_body=False)

    def _answer(self, has_body: bool) -> None:
        self.hub.requests.append((self.command, self.path, self.headers.get("Range")))
        path = unquote(self.path.partition("?")[0])
        model = re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(?:revision|tree)/(.+))?", path)
        file = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        found = model or file
        repository = self.hub.repositories.get(found[1]) if found else None
        if self.hub.status is not None:
            return self._send(self.hub.status, {})
        if repository is None:
            return self._send(404, {"X-Error-Code": "RepoNotFound"})
        if repository.is_gated and self.headers.get("Authorization") != f"Bearer {repository.token}":
            return self._send(403, {"X-Error-Code": "GatedRepo"})
        if repository.token is not None and self.headers.get("Authorization") != f"Bearer {repository.token}":
            return self._send(401, {"X-Error-Code": "RepoNotFound"})
        revision = found[2] or "main"
        commit = repository.refs.get(revision, revision)
        if commit not in repository.commits:
            return self._send(404, {"X-Error-Code": "RevisionNotFound"})
        files = repository.commits[commit]
        if model and f"{found[1]}/tree/" in path:  # huggingface_hub >= 1
            tree = [{"type": "file", "path": name, "size": len(data), "oid": "0"} for name, data in files.items()]
            return self._send(200, {"Content-Type": "application/json"}, json.dumps(tree).encode())
        if model:
            body = {"id": found[1], "sha": commit, "siblings": [{"rfilename": name} for name in files]}
            return self._send(200, {"Content-Type": "application/json"}, json.dumps(body).encode())
        if file[3] not in files or file[3] in self.hub.hidden:
            return self._send(404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
        return self._send_file(file[3], files[file[3]], commit, has_body)

    def _send_file(self, name: str, data: bytes, commit: str, has_body: bool) -> None:
        headers = {"ETag": f'"{hashlib.sha256(data).hexdigest()}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        if has_body and self.hub.instead.get(name):
            data = self.hub.instead[name].pop(0)
        wanted = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        start = int(wanted[1]) if wanted else 0
        if start > len(data):
            return self._send(416, {"Content-Range": f"bytes */{len(data)}"})
        if wanted:
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        body = data[start:]
        is_cut = has_body and self.hub.cuts.get(name, 0) > 0
        if is_cut:
            self.hub.cuts[name] -= 1
        self._send(206 if wanted else 200, headers, body, sent=len(body) // 2 if is_cut else len(body))

    def _send(self, status: int, headers: dict[str, str], body: bytes = b"", sent: int | None = None) -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Connection", "close")
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body[:sent])
