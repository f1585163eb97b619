"""A small Hub on this machine, as much of its HTTP as pushing a model takes: huggingface_hub itself talks to it."""

import base64
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TOKEN = "hf_writes"
READS = "hf_reads"


class Hub:
    """What was pushed.

    repos: name -> visibility. files: name -> path -> content. commits: how many each has got.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        self.repos: dict[str, str] = {}
        self.files: dict[str, dict[str, bytes]] = {}
        self.commits: dict[str, int] = {}
        self.uploaded: dict[str, bytes] = {}
        self.asked: list[str] = []
        self.is_full = False

    def answer(self, method: str, path: str, body: bytes, token: str) -> tuple[int, Any]:
        path = path.partition("?")[0]
        self.asked.append(f"{method} {path}")
        if method == "PUT":
            self.uploaded[path.rsplit("/", 1)[1]] = body
            return 200, {}
        if token not in (TOKEN, READS):
            return 401, {"error": "Invalid username or password."}
        if path == "/api/whoami-v2":
            role = "write" if token == TOKEN else "read"
            return 200, {
                "type": "user",
                "name": "ada",
                "orgs": [{"name": "lab"}],
                "auth": {"accessToken": {"role": role}},
            }
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization'] or 'ada'}/{asked['name']}"
            if name in self.repos:
                return 409, {"error": "You already created this model repo", "url": f"{self.url}/{name}"}
            is_private = asked.get("visibility") == "private" or asked.get("private") is True
            self.repos[name], self.files[name] = "private" if is_private else "public", {}
            return 200, {"url": f"{self.url}/{name}", "name": name}
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}
        if path.endswith("/preupload/main"):
            files = json.loads(body)["files"]
            mode = {True: "lfs", False: "regular"}
            return 200, {"files": [{"path": f["path"], "uploadMode": mode[f["path"].endswith(".safetensors")],
                                    "shouldIgnore": False} for f in files]}  # fmt: skip
        if path.endswith(".git/info/lfs/objects/batch"):
            objects = [
                {"oid": o["oid"], "size": o["size"], "actions": {"upload": {"href": f"{self.url}/upload/{o['oid']}"}}}
                for o in json.loads(body)["objects"]
            ]
            return 200, {"transfer": "basic", "objects": objects}
        if path.endswith("/commit/main"):
            if self.is_full:
                return 403, {"error": "Private repository storage limit reached"}
            name = path.removeprefix("/api/models/").removesuffix("/commit/main")
            for line in (json.loads(line) for line in body.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    self.files[name][value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    self.files[name][value["path"]] = self.uploaded[value["oid"]]
            self.commits[name] = self.commits.get(name, 0) + 1
            return 200, {"commitUrl": f"{self.url}/{name}/commit/{'0' * 40}", "commitOid": "0" * 40, "success": True}
        return 404, {"error": f"this Hub has no {method} {path}"}


@contextmanager
def hub() -> Iterator[Hub]:
    class Handler(BaseHTTPRequestHandler):
        def reply(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            token = self.headers.get("Authorization", "").removeprefix("Bearer ")
            status, found = there.answer(self.command, self.path, body, token)
            data = json.dumps(found).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        do_GET = do_POST = do_PUT = do_HEAD = reply

        def log_message(self, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    there = Hub(f"http://127.0.0.1:{server.server_port}")
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield there
    finally:
        server.shutdown()
        server.server_close()
