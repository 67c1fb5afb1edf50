"""A Hub of one's own on this machine: as much of its HTTP interface as uploading and downloading models takes.

Repositories with branches and revisions, private ones, tokens, small files inside commits, weights through the LFS protocol in
one piece or several, ranges, and faults on demand. Nothing is written to disk; nothing leaves 127.0.0.1.
"""

import base64
import hashlib
import json
import re
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

__all__ = ["TOKEN", "Fault", "Hub", "serve"]

# the token of the user `me`
TOKEN = "hf_test"

Files = dict[str, bytes]


@dataclass
class Fault:
    """An error for the next `times` requests that match `method` and the regular expression `path`.

    Attributes:
        status: answer this status; 0: read `after` bytes of the body and cut the connection.
        after: bytes that still pass before the cut: of the request's body, or of the answer's where there is none.
    """

    method: str
    path: str
    status: int = 0
    times: int = 1
    after: int = 0
    headers: dict[str, str] = field(default_factory=dict)

    def takes(self, method: str, path: str) -> bool:
        if self.times < 1 or method != self.method or re.search(self.path, path) is None:
            return False
        self.times -= 1
        return True


@dataclass
class Hub:
    """What the server holds and has seen.

    Attributes:
        repositories: id → file name → content, on the branch `main`; a test may write to it.
        branches: (id, branch) → files, for the other branches.
        snapshots: id → commit → files, of all states that were ever asked for.
        private: ids of repositories that only members of their namespace see.
        tokens: token → its user, who may write to the namespace of that name.
        objects: what was uploaded through LFS, by SHA-256.
        part_size: larger LFS files are uploaded in parts of so many bytes.
        requests: method and path of each request, in order; `requested` gives the paths alone.
        faults: errors to answer with, the first that matches.
        broken: answer every commit with an error.
    """

    endpoint: str
    repositories: dict[str, Files] = field(default_factory=dict)
    branches: dict[tuple[str, str], Files] = field(default_factory=dict)
    snapshots: dict[str, dict[str, Files]] = field(default_factory=dict)
    private: set[str] = field(default_factory=set)
    tokens: dict[str, str] = field(default_factory=lambda: {TOKEN: "me"})
    objects: dict[str, bytes] = field(default_factory=dict)
    part_size: int = 5_000_000
    requests: list[tuple[str, str]] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)
    broken: bool = False

    @property
    def requested(self) -> list[str]:
        return [path for _, path in self.requests]

    def fail(self, method: str, path: str, status: int, times: int = 1, **headers: str) -> None:
        """Answer the next `times` matching requests with `status`; headers are given with `_` for `-`."""
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        self.faults.append(Fault(method, path, status, times, headers=named))

    def cut(self, method: str, path: str, after: int = 0, times: int = 1) -> None:
        """Cut the connection of the next `times` matching requests after some bytes."""
        self.faults.append(Fault(method, path, 0, times, after))

    def count(self, method: str, path: str) -> int:
        """How many requests matched."""
        return sum(seen == method and re.search(path, where) is not None for seen, where in self.requests)

    def branch(self, repo_id: str, name: str) -> Files | None:
        return self.repositories.get(repo_id) if name == "main" else self.branches.get((repo_id, name))

    def commit(self, repo_id: str, files: Files) -> str:
        """The name of a state of a repository: the hash of its content, under which it can be asked for from now on."""
        digest = hashlib.sha1()
        for name in sorted(files):
            digest.update(name.encode() + b"\0" + hashlib.sha1(files[name]).digest())
        self.snapshots.setdefault(repo_id, {})[digest.hexdigest()] = dict(files)
        return digest.hexdigest()

    def resolve(self, repo_id: str, revision: str) -> tuple[str, Files] | None:
        """Commit and files of a branch or commit."""
        files = self.branch(repo_id, revision)
        if files is None:
            files = self.snapshots.get(repo_id, {}).get(revision)
        return None if files is None else (self.commit(repo_id, files), files)


class Handler(BaseHTTPRequestHandler):
    """Routes requests; `hub` is set by `serve`."""

    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *arguments: Any) -> None:
        pass

    # answers

    def answer(self, content: bytes, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(content))} | (headers or {})).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content[: self.limit])
        if self.limit is not None:
            self.hang_up()

    def answer_json(self, content: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self.answer(json.dumps(content).encode(), status, {"Content-Type": "application/json"} | (headers or {}))

    def refuse(self, status: int, code: str) -> None:
        self.answer_json({"error": code}, status, {"X-Error-Code": code, "X-Error-Message": code})

    def hang_up(self) -> None:
        self.wfile.flush()
        self.connection.shutdown(socket.SHUT_RDWR)
        self.close_connection = True

    # requests

    def body(self, limit: int | None = None) -> bytes:
        """The request's body, or its first `limit` bytes."""
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            length = int(self.headers.get("Content-Length", 0))
            return self.rfile.read(length if limit is None else min(length, limit))
        content = b""
        while limit is None or len(content) < limit:
            size = int(self.rfile.readline(), 16)
            content += self.rfile.read(size)
            self.rfile.readline()
            if size == 0:
                break
        return content

    @property
    def user(self) -> str | None:
        return self.hub.tokens.get(self.headers.get("Authorization", "").removeprefix("Bearer "))

    def handle_request(self) -> None:
        self.limit: int | None = None
        path = urlsplit(self.path).path
        self.hub.requests.append((self.command, path))
        fault = next((fault for fault in self.hub.faults if fault.takes(self.command, path)), None)
        if fault is not None and fault.status:
            self.body()
            self.answer_json({"error": f"fault {fault.status}"}, fault.status, fault.headers)
            return
        if fault is not None and self.command != "GET":
            self.body(fault.after)
            self.hang_up()
            return
        if fault is not None:
            self.limit = fault.after
        parts = [unquote(part) for part in path.strip("/").split("/")]
        content = self.body()
        if self.command in ("GET", "HEAD"):
            self.read(parts)
        elif parts[0] == "lfs":
            self.lfs_store(parts[1:], content)
        elif parts[-4:] == ["info", "lfs", "objects", "batch"]:
            self.lfs_batch("/".join(parts[:2]).removesuffix(".git"), json.loads(content))
        elif parts[:2] == ["api", "validate-yaml"]:
            self.answer_json({"errors": [], "warnings": []})
        else:
            self.write(parts, content)

    do_GET = do_HEAD = do_POST = do_PUT = handle_request

    # reading

    def visible(self, repo_id: str) -> bool:
        """Whether the repository exists for this user; refuses the request if it does not."""
        hub = self.hub
        if repo_id in hub.repositories and (repo_id not in hub.private or self.user == repo_id.split("/")[0]):
            return True
        # as the Hub does: a stranger is told the same of a private repository as of none
        self.refuse(404 if self.user else 401, "RepoNotFound")
        return False

    def read(self, parts: list[str]) -> None:
        hub = self.hub
        if parts[:2] == ["api", "whoami-v2"]:
            if self.user is None:
                self.refuse(401, "Unauthorized")
            else:
                self.answer_json({"type": "user", "name": self.user, "orgs": [], "auth": {"type": "access_token"}})
            return
        api = parts[:2] == ["api", "models"]
        repo_id = "/".join(parts[2:4] if api else parts[:2])
        rest = parts[4:] if api else parts[2:]
        if not self.visible(repo_id):
            return
        if rest == ["refs"]:
            names = ["main", *(branch for owner, branch in hub.branches if owner == repo_id)]
            refs = [
                {
                    "name": name,
                    "ref": f"refs/heads/{name}",
                    "targetCommit": hub.commit(repo_id, hub.branch(repo_id, name) or {}),
                }
                for name in names
            ]
            self.answer_json({"branches": refs, "tags": [], "converts": []})
            return
        found = hub.resolve(repo_id, rest[1] if len(rest) > 1 else "main")
        if found is None:
            self.refuse(404, "RevisionNotFound")
        elif api and rest[:1] == ["tree"]:
            self.tree(found[1], "/".join(rest[2:]))
        elif api:
            commit, files = found
            siblings = [{"rfilename": name} for name in files]
            about = {"id": repo_id, "modelId": repo_id, "sha": commit, "siblings": siblings, "tags": []}
            self.answer_json(about | {"private": repo_id in hub.private})
        elif rest[0] == "resolve" and "/".join(rest[2:]) in found[1]:
            self.file(found[0], found[1]["/".join(rest[2:])])
        else:
            self.refuse(404, "EntryNotFound")

    def tree(self, files: Files, folder: str) -> None:
        entries = [
            {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
            for name, content in files.items()
            if not folder or name.startswith(folder + "/")
        ]
        if folder and not entries:
            self.refuse(404, "EntryNotFound")
        else:
            self.answer_json(entries)

    def file(self, commit: str, content: bytes) -> None:
        headers = {
            "ETag": f'"{hashlib.sha256(content).hexdigest()}"',
            "X-Repo-Commit": commit,
            "Accept-Ranges": "bytes",
        }
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if wanted is None:
            self.answer(content, headers=headers)
            return
        first, last = int(wanted[1]), int(wanted[2] or len(content) - 1)
        headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
        self.answer(content[first : last + 1], 206, headers)

    # writing

    def may_write(self, namespace: str) -> bool:
        if self.user is None:
            self.refuse(401, "Unauthorized")
        elif self.user != namespace:
            self.refuse(403, "Forbidden")
        return self.user == namespace

    def write(self, parts: list[str], content: bytes) -> None:
        hub = self.hub
        if parts == ["api", "repos", "create"]:
            self.create(json.loads(content))
            return
        repo_id, action, branch = "/".join(parts[2:4]), parts[4], parts[5]
        proposing = "create_pr=1" in urlsplit(self.path).query
        # everybody may propose a change to what they see
        if (not (proposing and self.user) and not self.may_write(parts[2])) or not self.visible(repo_id):
            return
        if action == "branch":
            if hub.branch(repo_id, branch) is not None:
                self.refuse(409, "BranchExists")
            else:
                hub.branches[repo_id, branch] = dict(hub.repositories[repo_id])
                self.answer_json({})
        elif hub.branch(repo_id, branch) is None:
            self.refuse(404, "RevisionNotFound")
        elif action == "preupload":
            files = json.loads(content)["files"]
            modes = [{"uploadMode": mode(file["path"]), "shouldIgnore": False} for file in files]
            self.answer_json({"files": [file | how for file, how in zip(files, modes, strict=True)]})
        elif hub.broken:
            self.answer_json({"error": "the disk of the hub is full"}, 500)
        else:
            if proposing:
                branch = f"refs/pr/{1 + sum(owner == repo_id for owner, _ in hub.branches)}"
                hub.branches[repo_id, branch] = dict(hub.repositories[repo_id])
            self.commit(repo_id, branch, [json.loads(line) for line in content.splitlines()])

    def create(self, request: dict[str, Any]) -> None:
        hub = self.hub
        namespace = request.get("organization") or self.user
        if not self.may_write(namespace or ""):
            return
        repo_id = f"{namespace}/{request['name'].split('/')[-1]}"
        url = {"url": f"{hub.endpoint}/{repo_id}", "name": repo_id}
        if repo_id in hub.repositories:
            self.answer_json({"error": "You already created this model repo"} | url, 409)
            return
        hub.repositories[repo_id] = {}
        if request.get("private") or request.get("visibility") == "private":
            hub.private.add(repo_id)
        self.answer_json(url)

    def commit(self, repo_id: str, branch: str, entries: list[dict[str, Any]]) -> None:
        """Apply all entries of a commit or none."""
        hub = self.hub
        current = hub.branch(repo_id, branch)
        assert current is not None
        files = dict(current)
        for entry in entries:
            value = entry["value"]
            if entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                if value["oid"] not in hub.objects:
                    self.refuse(400, "LfsObjectMissing")
                    return
                files[value["path"]] = hub.objects[value["oid"]]
            elif entry["key"] == "deletedFile":
                del files[value["path"]]
        # the state before stays reachable by its name
        hub.commit(repo_id, current)
        current.clear()
        current.update(files)
        commit = hub.commit(repo_id, files)
        url = f"{hub.endpoint}/{repo_id}/commit/{commit}"
        answer = {"success": True, "commitOid": commit, "commitUrl": url}
        if branch.startswith("refs/pr/"):
            answer["pullRequestUrl"] = f"{hub.endpoint}/{repo_id}/discussions/{branch.split('/')[-1]}"
        self.answer_json(answer)

    # large files

    def lfs_batch(self, repo_id: str, request: dict[str, Any]) -> None:
        """Where to upload each object; nowhere if it is there already, which is how an interrupted upload goes on."""
        hub = self.hub
        if self.user is None:
            self.refuse(401, "Unauthorized")
            return
        answers = []
        for wanted in request["objects"]:
            if wanted["oid"] not in hub.objects:
                where = f"{hub.endpoint}/lfs/{wanted['oid']}"
                parts = range(1, -(-wanted["size"] // hub.part_size) + 1)
                header = {str(number): f"{where}/{number}" for number in parts} | {"chunk_size": str(hub.part_size)}
                upload = {"href": where, "header": header if len(parts) > 1 else {}}
                wanted = wanted | {"actions": {"upload": upload}}
            answers.append(wanted)
        self.answer_json({"transfer": "multipart", "objects": answers})

    def lfs_store(self, parts: list[str], content: bytes) -> None:
        """Store an object (PUT), a part of one (PUT with a number), or complete one of its parts (POST)."""
        hub = self.hub
        if self.command == "PUT":
            key = "/".join(parts)
            if len(parts) == 1 and hashlib.sha256(content).hexdigest() != key:
                self.refuse(400, "HashMismatch")
                return
            hub.objects[key] = content
            self.answer(b"", headers={"ETag": f'"{hashlib.md5(content).hexdigest()}"'})
            return
        numbers = [part["partNumber"] for part in json.loads(content)["parts"]]
        whole = b"".join(hub.objects[f"{parts[0]}/{number}"] for number in numbers)
        if hashlib.sha256(whole).hexdigest() != parts[0]:
            self.refuse(400, "HashMismatch")
            return
        hub.objects[parts[0]] = whole
        self.answer_json({"success": True})


def mode(path: str) -> str:
    """How a file is uploaded: weights through LFS, as the Hub's default .gitattributes says."""
    return "lfs" if path.endswith((".safetensors", ".bin", ".pt")) else "regular"


@contextmanager
def serve() -> Iterator[Hub]:
    """A running hub; `hub.endpoint` is for HF_ENDPOINT."""
    handler = type("BoundHandler", (Handler,), {})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    # a kept-alive connection must not hold up the end of a test
    server.daemon_threads = True
    hub = Hub(f"http://127.0.0.1:{server.server_port}")
    handler.hub = hub
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
