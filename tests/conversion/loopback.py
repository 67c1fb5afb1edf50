"""A Hub of one's own on this machine: as much of its HTTP interface as downloading and uploading a repository takes."""

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

COMMIT = "a" * 40


class Hub:
    """Repositories as dictionaries of file contents.

    Attributes:
        repositories: id → file name → content.
        private: ids of repositories that were created as private ones.
        requested: paths of all requests, in order.
        broken: answer every commit with an error.
    """

    def __init__(self, endpoint: str) -> None:
        self.endpoint = endpoint
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.private: set[str] = set()
        self.requested: list[str] = []
        self.broken = False

    def info(self, repo_id: str) -> dict[str, Any]:
        files = [{"rfilename": name} for name in self.repositories[repo_id]]
        return {"id": repo_id, "modelId": repo_id, "sha": COMMIT, "siblings": files, "private": False, "tags": []}


@contextmanager
def serve() -> Iterator[Hub]:
    """A running hub; `hub.endpoint` is for HF_ENDPOINT."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *arguments: Any) -> None:
            pass

        def answer(self, content: bytes, status: int = 200, headers: dict[str, str] | None = None) -> None:
            self.send_response(status)
            for name, value in ({"Content-Length": str(len(content))} | (headers or {})).items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        def answer_json(self, content: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
            self.answer(json.dumps(content).encode(), status, {"Content-Type": "application/json"} | (headers or {}))

        def missing(self, code: str) -> None:
            self.answer_json({"error": code}, 404, {"X-Error-Code": code, "X-Error-Message": code})

        def do_GET(self) -> None:
            path = self.path.split("?")[0]
            hub.requested.append(path)
            parts = path.strip("/").split("/")
            if parts[:2] == ["api", "whoami-v2"]:
                self.answer_json({"type": "user", "name": "me", "auth": {"type": "access_token"}})
            elif parts[:2] == ["api", "models"] and "/".join(parts[2:4]) in hub.repositories:
                repo_id = "/".join(parts[2:4])
                if "tree" in parts:
                    files = hub.repositories[repo_id].items()
                    self.answer_json([{"type": "file", "path": n, "size": len(c), "oid": "0"} for n, c in files])
                else:
                    self.answer_json(hub.info(repo_id))
            elif len(parts) == 5 and parts[2] == "resolve" and "/".join(parts[:2]) in hub.repositories:
                content = hub.repositories["/".join(parts[:2])].get(parts[4])
                if content is None:
                    self.missing("EntryNotFound")
                else:
                    etag = f'"{hashlib.sha1(content).hexdigest()}"'
                    self.answer(content, headers={"ETag": etag, "X-Repo-Commit": COMMIT})
            else:
                self.missing("RepoNotFound")

        do_HEAD = do_GET

        def do_POST(self) -> None:
            path = self.path.split("?")[0]
            hub.requested.append(path)
            parts = path.strip("/").split("/")
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            repo_id = "/".join(parts[2:4])
            if path == "/api/repos/create":
                request = json.loads(body)
                repo_id = "/".join(filter(None, (request.get("organization"), request["name"])))
                repo_id = repo_id if "/" in repo_id else f"me/{repo_id}"
                hub.repositories.setdefault(repo_id, {})
                if request.get("private") or request.get("visibility") == "private":
                    hub.private.add(repo_id)
                self.answer_json({"url": f"{hub.endpoint}/{repo_id}", "name": repo_id})
            elif "preupload" in parts:
                # small files travel inside the commit
                files = json.loads(body)["files"]
                self.answer_json({"files": [{**f, "uploadMode": "regular", "shouldIgnore": False} for f in files]})
            elif "commit" in parts and not hub.broken:
                for line in body.splitlines():
                    entry = json.loads(line)
                    if entry["key"] == "file":
                        value = entry["value"]
                        hub.repositories[repo_id][value["path"]] = base64.b64decode(value["content"])
                url = f"{hub.endpoint}/{repo_id}/commit/{COMMIT}"
                self.answer_json({"success": True, "commitOid": COMMIT, "commitUrl": url})
            elif "commit" in parts:
                self.answer_json({"error": "the disk of the hub is full"}, 500)
            else:
                # validation of the card
                self.answer_json({"errors": [], "warnings": []})

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub = Hub(f"http://127.0.0.1:{server.server_port}")
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
