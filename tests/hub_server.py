"""A stand-in for the Hugging Face hub on this machine: as much of it as putting and getting a model takes."""

import base64
import hashlib
import json
import re
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote


class Hub:
    """What the stand-in holds: `files` of every repository by name; `requests` that it was asked."""

    def __init__(self):
        self.files, self.private, self.requests = {}, {}, []

    def commit_of(self, name):
        return hashlib.sha1(repr(sorted(self.files[name].items())).encode()).hexdigest()


class Handler(BaseHTTPRequestHandler):
    hub = Hub()

    def log_message(self, *_):
        pass

    def answer(self, content=b"", status=200, **headers):
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def missing(self, code="RepoNotFound"):
        self.answer({"error": "not found"}, 404, X_Error_Code=code)

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = b""
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
        self.hub.requests.append(("POST", self.path))
        if self.headers.get("Authorization") != "Bearer right":
            return self.answer({"error": "Invalid username or password."}, 401)
        if self.path == "/api/repos/create":
            asked = json.loads(body)
            name = (
                f"{asked.get('organization') or 'user'}/{asked['name']}" if "/" not in asked["name"] else asked["name"]
            )
            self.hub.files.setdefault(name, {})
            self.hub.private[name] = bool(asked.get("private") or asked.get("visibility") == "private")
            return self.answer({"url": f"http://{self.headers['Host']}/{name}", "id": "1", "name": name})
        if self.path == "/api/validate-yaml":
            return self.answer({"errors": [], "warnings": []})
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/preupload/\S+", self.path):
            files = [
                {"path": one["path"], "uploadMode": "regular", "shouldIgnore": False}
                for one in json.loads(body)["files"]
            ]
            return self.answer({"files": files})
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/\S+", self.path):
            for line in body.splitlines():
                entry = json.loads(line)
                if entry["key"] == "file":
                    self.hub.files[found[1]][entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
                elif entry["key"] == "deletedFile":
                    self.hub.files[found[1]].pop(entry["value"]["path"], None)
            commit = self.hub.commit_of(found[1])
            address = f"http://{self.headers['Host']}/{found[1]}/commit/{commit}"
            return self.answer({"commitUrl": address, "commitOid": commit, "success": True})
        return self.missing()

    def do_GET(self):
        self.hub.requests.append((self.command, self.path))
        path = unquote(self.path.split("?")[0])
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/(\S+))?", path):
            if found[1] not in self.hub.files:
                return self.missing()
            commit = self.hub.commit_of(found[1])
            if found[2] not in (None, "main", commit):
                return self.missing("RevisionNotFound")
            files = [{"rfilename": file} for file in self.hub.files[found[1]]]
            return self.answer({"id": found[1], "modelId": found[1], "sha": commit, "siblings": files, "tags": []})
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/\S+", path):
            files = self.hub.files[found[1]].items()
            return self.answer([{"type": "file", "path": p, "size": len(c), "oid": "0"} for p, c in files])
        if found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(\S+)", path):
            content = self.hub.files.get(found[1], {}).get(found[3])
            if content is None:
                return self.missing("EntryNotFound")
            tag = hashlib.sha1(content).hexdigest()
            return self.answer(content, X_Repo_Commit=self.hub.commit_of(found[1]), ETag=f'"{tag}"')
        return self.missing()

    do_HEAD = do_GET


@contextmanager
def hub_server():
    """The stand-in with its `address`."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("OwnHandler", (Handler,), {"hub": hub}))
    hub.address = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
