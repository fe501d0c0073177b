"""Hubs on this machine that can be written to: the HTTP interfaces the real clients publish through, with faults.

    with UploadServer() as hub:                       the Hugging Face Hub; what was uploaded can be downloaded again
        hub.fail("PUT /lfs/", status=503, times=2)    the next two such requests are answered with 503
    with ModelScopeServer() as hub:                   ModelScope
"""
from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
import time
from dataclasses import dataclass, field
from urllib.parse import parse_qs, unquote, urlsplit

from hub_server import HubServer, Repository, _Handler

TOKEN = "hf_writerwriterwriterwriter0123456789"
MODELSCOPE_TOKEN = "ms-0a1b2c3d-4e5f-6071-8293-a4b5c6d7e8f9"
SIGNATURE = "c0ffee0123456789"
INLINE = (".md", ".json", ".txt", ".py")


@dataclass
class Fault:
    """What happens to requests that begin with ``where``, the next ``times`` of them."""

    where: str
    status: int | None = None
    headers: dict[str, str] = field(default_factory=dict)
    times: int = 1
    is_cut: bool = False  # the connection ends when half of the body has arrived
    seconds: float = 0.0  # before the answer
    until: threading.Event | None = None  # before the answer, ten minutes at most
    body: bytes = b""


class UploadServer(HubServer):
    """Attributes:
        sent: every byte string that arrived in a body, in order.
        blobs: SHA-256 -> content of large files.
        private: repository -> whether it is private.
        offers_xet: choose xet for large files where the client knows it.
        unwritable: files whose content is lost on the way to the repository.
    """

    token = TOKEN

    def __init__(self) -> None:
        super().__init__()
        self.sent: list[bytes] = []
        self.blobs: dict[str, bytes] = {}
        self.private: dict[str, bool] = {}
        self.faults: list[Fault] = []
        self.offers_xet = False
        self.unwritable: set[str] = set()
        self.messages: list[str] = []
        self.lock = threading.Lock()

    def fail(self, where: str, **fault: object) -> None:
        self.faults.append(Fault(where, **fault))

    def calls(self, begin: str) -> int:
        """How many requests began with ``POST /api/...``."""
        return sum(f"{method} {path}".startswith(begin) for method, path, _ in self.requests)

    def files(self, name: str) -> dict[str, bytes]:
        """What a repository holds now."""
        repository = self.repositories[name]
        return repository.commits[repository.refs["main"]]

    def make(self, name: str, private: bool) -> None:
        self.private[name] = private
        self.add(name, {".gitattributes": b""}, token=self.token if private else None)

    def is_allowed(self, headers: object) -> bool:
        return headers.get("Authorization") == f"Bearer {self.token}"


class _Writer(_Handler):
    """Faults, bodies and answers, whichever hub."""

    hub: UploadServer

    def do_GET(self) -> None:
        self._serve(lambda body: self.get(urlsplit(self.path)))

    def do_POST(self) -> None:
        self._serve(lambda body: self.post(unquote(urlsplit(self.path).path), body))

    def do_PUT(self) -> None:
        self._serve(lambda body: self.put(body))

    def _serve(self, answer: object) -> None:
        if self.command != "GET":
            self.hub.requests.append((self.command, self.path, self.headers.get("Range")))
        fault = self._fault()
        length = int(self.headers.get("Content-Length") or 0)
        if fault and fault.is_cut:
            self.rfile.read(length // 2)
            self.connection.close()
            return
        body = self.rfile.read(length)
        if body:
            self.hub.sent.append(body)
        if fault:
            time.sleep(fault.seconds)
            if fault.until:
                fault.until.wait(600)
        if fault and fault.status:
            return self.reply(fault.status, fault.body, fault.headers)
        if not self.hub.is_allowed(self.headers) and not (self.command == "PUT" or self.command == "GET"):
            return self.reply(401, {"error": "Invalid credentials in Authorization header"})
        with self.hub.lock:
            return answer(body)

    def _fault(self) -> Fault | None:
        with self.hub.lock:
            for fault in self.hub.faults:
                if fault.times and f"{self.command} {self.path}".startswith(fault.where):
                    fault.times -= 1
                    return fault
        return None

    def put(self, body: bytes) -> None:
        digest = hashlib.sha256(body).hexdigest()
        if digest != self.path.rpartition("/")[2].partition("?")[0]:
            return self.reply(400, {"error": "BadDigest"})
        self.hub.blobs[digest] = body
        return self.reply(200, b"")

    def reply(self, status: int, body: object = b"", headers: dict[str, str] | None = None) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for key, value in {"Content-Type": "application/json", "Content-Length": str(len(data)),
                           "Connection": "close", **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        self.wfile.write(data)


def _missing(hub: UploadServer, objects: list[dict], signature: str = "") -> list[dict]:
    """The answer to an LFS batch request: where to put what is not here yet."""
    found = []
    for entry in objects:
        entry = {"oid": entry["oid"], "size": entry["size"]}
        if entry["oid"] not in hub.blobs:
            entry["actions"] = {"upload": {"href": f"{hub.endpoint}/lfs/{entry['oid']}{signature}"}}
        found.append(entry)
    return found


class _HuggingFace(_Writer):
    def get(self, url: object) -> None:
        self._answer(has_body=True)

    def do_HEAD(self) -> None:
        self._answer(has_body=False)

    def _send(self, status: int, headers: dict[str, str], body: bytes = b"", sent: int | None = None) -> None:
        name = re.fullmatch(r"/api/models/([^/]+/[^/]+?)(?:/revision/.+)?", unquote(self.path.partition("?")[0]))
        if name and status == 200:
            body = json.dumps(json.loads(body) | {"private": self.hub.private[name[1]]}).encode()
        super()._send(status, headers, body, sent)

    def post(self, path: str, body: bytes) -> None:
        if path == "/api/validate-yaml":
            return self.reply(200, {"errors": [], "warnings": []})
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        batch = re.fullmatch(r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", path)
        call = re.fullmatch(r"/api/models/([^/]+/[^/]+)/(preupload|commit|paths-info)/(.+)", path)
        if not (batch or call) or (batch or call)[1] not in self.hub.repositories:
            return self.reply(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
        if batch:
            given = json.loads(body)
            chosen = "xet" if self.hub.offers_xet and "xet" in given["transfers"] else "basic"
            found = [] if chosen == "xet" else _missing(self.hub, given["objects"], f"?X-Amz-Signature={SIGNATURE}")
            return self.reply(200, {"transfer": chosen, "objects": found})
        return getattr(self, call[2].replace("-", "_"))(call[1], call[3], body)

    def _create(self, given: dict) -> None:
        name = f"{given.get('organization') or 'writer'}/{given['name']}"
        url = {"url": f"{self.hub.endpoint}/{name}"}
        if name in self.hub.repositories:
            return self.reply(409, url | {"error": "You already created this model repo"})
        self.hub.make(name, bool(given.get("private")) or given.get("visibility") == "private")  # the client's 1 and 2
        return self.reply(200, url)

    def preupload(self, name: str, revision: str, body: bytes) -> None:
        held = self.hub.files(name)
        files = []
        for entry in json.loads(body)["files"]:
            mode = "regular" if entry["path"].endswith(INLINE) else "lfs"
            data = held.get(entry["path"])
            known = None if data is None else _identity(data, mode == "lfs")
            files.append({"path": entry["path"], "uploadMode": mode, "shouldIgnore": False, "oid": known})
        self.reply(200, {"files": files})

    def commit(self, name: str, revision: str, body: bytes) -> None:
        files = dict(self.hub.files(name))
        for line in body.decode().splitlines():
            entry = json.loads(line)
            if entry["key"] == "header":
                self.hub.messages.append(entry["value"]["summary"])
            elif entry["key"] == "file":
                files[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
            elif entry["key"] == "lfsFile":
                files[entry["value"]["path"]] = self.hub.blobs[entry["value"]["oid"]]
        files = {n: data for n, data in files.items() if n not in self.hub.unwritable}
        oid = self.hub.add(name, files)
        self.reply(200, {"commitUrl": f"{self.hub.endpoint}/{name}/commit/{oid}", "commitOid": oid})

    def paths_info(self, name: str, revision: str, body: bytes) -> None:
        given = parse_qs(body.decode())
        wanted = given["paths"] if "paths" in given else json.loads(body)["paths"]
        found = []
        for path in wanted:
            if (data := self.hub.repositories[name].commits[revision].get(path)) is not None:
                entry = {"type": "file", "path": path, "size": len(data), "oid": _identity(data, False)}
                if not path.endswith(INLINE):
                    entry["lfs"] = {"oid": _identity(data, True), "size": len(data), "pointerSize": 134}
                found.append(entry)
        self.reply(200, found)


def _identity(data: bytes, is_large: bool) -> str:
    return (hashlib.sha256(data) if is_large else hashlib.sha1(b"blob %d\0" % len(data) + data)).hexdigest()


UploadServer.handler = _HuggingFace


class _ModelScope(_Writer):
    hub: ModelScopeServer

    def _serve(self, answer: object) -> None:
        if self.command == "GET":
            self.hub.requests.append((self.command, self.path, None))
        super()._serve(answer)

    def data(self, data: object) -> None:
        self.reply(200, {"Code": 200, "Success": True, "Data": data})

    def get(self, url: object) -> None:
        path, query = unquote(url.path), parse_qs(url.query)
        found = re.fullmatch(r"/api/v1/models/([^/]+/[^/]+)(/repo/files|/repo|/revisions)?", path)
        if not found or found[1] not in self.hub.repositories or not self.hub.is_allowed(self.headers):
            return self.reply(404, {"Code": 10010205001, "Message": "not found"})
        files = self.hub.files(found[1])
        if found[2] is None:
            return self.data({"Path": found[1].split("/")[0], "Name": found[1].split("/")[1],
                              "Visibility": self.hub.visibility[found[1]]})
        if found[2] == "/repo/files":
            return self.data({"Files": [{"Path": n, "Name": n, "Type": "blob", "Size": len(d), "Revision": "c",
                                         "Sha256": _identity(d, True)} for n, d in files.items()]})
        if found[2] == "/revisions":
            return self.data({"RevisionMap": {"Branches": [{"Revision": "master"}], "Tags": []}})
        name = query["FilePath"][0]
        data = files[name] if name not in self.hub.damaged else files[name][::-1]
        return self.reply(200, data, {"Content-Type": "application/octet-stream"})

    def post(self, path: str, body: bytes) -> None:
        given = json.loads(body)
        if path == "/api/v1/models":
            name = f"{given['Path']}/{given['Name']}"
            if name in self.hub.repositories:
                return self.reply(400, {"Code": 10010101001, "Message": "model already exists", "Success": False})
            self.hub.make(name, given["Visibility"])
            self.hub.licences[name] = given["License"]
            return self.data(given)
        call = re.fullmatch(r"/api/v1/repos/models/([^/]+/[^/]+)/(info/lfs/objects/batch|commit/master)", path)
        if not call or call[1] not in self.hub.repositories:
            return self.reply(404, {"Code": 10010205001, "Message": "not found"})
        if call[2].startswith("info"):
            return self.data({"objects": [o for o in _missing(self.hub, given["objects"]) if "actions" in o]})
        files = dict(self.hub.files(call[1]))
        for action in given["actions"]:
            large = action["type"] == "lfs"
            files[action["path"]] = self.hub.blobs[action["sha256"]] if large else base64.b64decode(action["content"])
        self.hub.messages.append(given["commit_message"])
        return self.data({"oid": self.hub.add(call[1], files)})


class ModelScopeServer(UploadServer):
    """``visibility``: repository -> 1 (private), 3 or 5 (public). ``licences``: what it was made with. ``damaged``:
    names of files that are sent with other content.
    """

    token = MODELSCOPE_TOKEN
    handler = _ModelScope

    def __init__(self) -> None:
        super().__init__()
        self.visibility: dict[str, int] = {}
        self.licences: dict[str, str] = {}
        self.damaged: set[str] = set()

    def make(self, name: str, visibility: int) -> None:
        self.visibility[name] = visibility
        self.repositories[name] = Repository()
        self.add(name, {})
