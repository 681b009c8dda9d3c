"""A stand-in of the hub's HTTP interface: it creates repositories, and takes commits with small and large files."""

import base64
import hashlib
import http.server
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager

LARGE = ("safetensors",)


class Hub:
    """State of the stand-in: name -> {"private", "type", "files": {path: bytes}}; the requests; a status to answer."""

    def __init__(self):
        self.repositories: dict[str, dict] = {}
        self.blobs: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.refuse: dict[str, int] = {}  # part of a path -> status
        self.address = ""

    def answer(self, method: str, path: str, body: bytes, token: str | None):
        self.requests.append(f"{method} {path}")
        if token != "right" and not path.startswith("/blob/"):  # the address of a blob is its right
            return 401, {"error": "Invalid user token"}
        for part, status in self.refuse.items():
            if part in path:
                return status, {"error": "You do not have the required rights"}
        if path.startswith("/blob/"):
            self.blobs[path.removeprefix("/blob/")] = body
            return 200, {}
        given = [json.loads(line) for line in body.split(b"\n") if line]
        if path == "/api/repos/create":
            return self.create(**given[0])
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}
        if path.endswith(".git/info/lfs/objects/batch"):
            objects = [{**one, "actions": {"upload": self.place(one["oid"])}} for one in given[0]["objects"]]
            return 200, {"transfer": "basic", "objects": objects}
        _, _, kinds, owner, name, *rest = path.split("/")
        if f"{owner}/{name}" not in self.repositories:
            return 404, {"error": "Repository not found"}
        repository = self.repositories[f"{owner}/{name}"]
        assert repository["type"] == kinds.removesuffix("s")
        if not rest:
            siblings = [{"rfilename": file} for file in repository["files"]]
            about = {"id": f"{owner}/{name}", "private": repository["private"], "sha": "0" * 40, "siblings": siblings}
            return 200, about | {"author": owner, "tags": []}
        if rest[0] == "preupload":
            modes = [self.mode(file["path"]) for file in given[0]["files"]]
            return 200, {"files": modes}
        assert rest[0] == "commit"
        self.commit(repository["files"], given)
        return 200, {"commitUrl": f"{self.address}/{owner}/{name}/commit/1", "commitOid": "1" * 40, "success": True}

    def create(self, name: str, organization: str, type: str = "model", private=None, visibility=None, **_):
        private = private or visibility == "private"
        if (known := f"{organization}/{name}") in self.repositories:
            return 409, {"error": "You already created this repo", "url": f"{self.address}/{known}"}
        self.repositories[known] = {"private": bool(private), "type": type, "files": {}}
        return 200, {"url": f"{self.address}/{known}", "name": known, "id": known}

    def place(self, oid: str) -> dict:
        return {"href": f"{self.address}/blob/{oid}", "header": {"authorization": "Bearer right"}}

    def mode(self, path: str) -> dict:
        return {"path": path, "uploadMode": "lfs" if path.endswith(LARGE) else "regular", "shouldIgnore": False}

    def commit(self, files: dict[str, bytes], operations: list[dict]) -> None:
        for operation in operations:
            value = operation["value"]
            if operation["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif operation["key"] == "lfsFile":
                content = self.blobs[value["oid"]]
                assert hashlib.sha256(content).hexdigest() == value["oid"] and len(content) == value["size"]
                files[value["path"]] = content
            elif operation["key"] == "deletedFile":
                del files[value["path"]]
            else:
                assert operation["key"] == "header" and value["summary"]


@contextmanager
def running(hub: Hub) -> Iterator[str]:
    """Serve the stand-in; its address."""

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self):
            length = int(self.headers.get("Content-Length") or 0)
            token = (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None
            path = self.path.partition("?")[0]
            status, content = hub.answer(self.command, path, self.rfile.read(length), token)
            text = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            if status == 404:
                self.send_header("X-Error-Code", "RepoNotFound")
            if "error" in content:
                self.send_header("X-Error-Message", content["error"])
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        do_GET = do_PUT = do_HEAD = do_POST

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        hub.address = f"http://127.0.0.1:{server.server_port}"
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield hub.address
        server.shutdown()
