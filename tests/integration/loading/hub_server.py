# Copyright 2026 the latte_flow_hf contributors. Licensed under the Apache License, Version 2.0.
"""A hub on loopback: the few endpoints that huggingface_hub uploads to and downloads from, files kept on disk.

Not a mock of the library: its own client talks to it over HTTP, in a process whose `HF_ENDPOINT` names it. Large files
go the LFS way, as on the real hub (the newer Xet protocol is switched off by `HF_HUB_DISABLE_XET`). Every commit is a
folder of its own, so that a revision stays what it was.
"""

import base64
import hashlib
import json
import re
import shutil
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit


class Hub:
    """Repositories under `root/repos/USER/NAME/COMMIT/`, large objects under `root/lfs/`."""

    def __init__(self, root: Path):
        self.root = root
        self.heads: dict[str, str] = {}
        self.private: dict[str, bool] = {}
        self.requests: list[str] = []
        (root / "lfs").mkdir(parents=True)

    def folder(self, repo: str, commit: str | None = None) -> Path:
        return self.root / "repos" / repo / (commit or self.heads[repo])

    def files(self, repo: str, commit: str | None = None) -> dict[str, Path]:
        folder = self.folder(repo, commit)
        return {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}

    def create(self, repo: str, private: bool) -> bool:
        if repo in self.heads:
            return False
        self.private[repo] = private
        self.heads[repo] = hashlib.sha1(repo.encode()).hexdigest()
        self.folder(repo).mkdir(parents=True)
        return True

    def commit(self, repo: str, entries: list[dict]) -> str:
        oid = hashlib.sha1(json.dumps([self.heads[repo], entries]).encode()).hexdigest()
        shutil.copytree(self.folder(repo), folder := self.folder(repo, oid))
        for entry in entries:
            value = entry["value"]
            if entry["key"] == "header":
                continue
            path = folder / value["path"]
            path.parent.mkdir(parents=True, exist_ok=True)
            if entry["key"] == "file":
                path.write_bytes(base64.b64decode(value["content"]))
            elif entry["key"] == "lfsFile":
                shutil.copyfile(self.root / "lfs" / value["oid"], path)
            else:
                assert entry["key"] == "deletedFile", entry["key"]
                path.unlink()
        self.heads[repo] = oid
        return oid


def _entry(name: str, path: Path) -> dict:
    content = path.read_bytes()
    entry = {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
    if path.suffix == ".safetensors":
        entry["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 130}
    return entry


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: "ThreadingHTTPServer"

    def log_message(self, *_):
        pass

    @property
    def hub(self) -> Hub:
        return self.server.hub  # type: ignore[attr-defined]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.server_port}"

    def answer(self, body: object = None, status: int = 200, **headers: str) -> None:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Content-Type", "application/octet-stream" if isinstance(body, bytes) else "application/json")
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def refuse(self, code: str) -> None:
        self.answer({"error": code}, 404, X_Error_Code=code)

    def handle_request(self) -> None:
        parts = urlsplit(self.path)
        path = unquote(parts.path)
        self.hub.requests.append(f"{self.command} {path}")
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        for method, pattern, action in _ROUTES:
            found = re.fullmatch(pattern, path)
            if found and self.command in method.split("|"):
                repo = found.groupdict().get("repo")
                if repo is not None and repo not in self.hub.heads:
                    return self.refuse("RepoNotFound")
                revision = found.groupdict().get("revision")
                if revision not in (None, "main") and not self.hub.folder(repo, revision).is_dir():
                    return self.refuse("RevisionNotFound")
                commit = None if repo is None else self.hub.heads[repo] if revision in (None, "main") else revision
                return action(self, body, repo, commit, **{k: v for k, v in found.groupdict().items() if k == "name"})
        return self.refuse("EntryNotFound")

    do_GET = do_HEAD = do_POST = do_PUT = handle_request  # noqa: N815

    def create_repo(self, body, repo, commit):
        asked = json.loads(body)
        repo = f"{asked['organization'] or 'user'}/{asked['name']}"
        made = self.hub.create(repo, asked.get("visibility") == "private")
        self.answer({"url": f"{self.url}/{repo}"}, 200 if made else 409)

    def validate_yaml(self, body, repo, commit):
        self.answer({"warnings": [], "errors": []})

    def preupload(self, body, repo, commit):
        files = [
            {"path": f["path"], "uploadMode": "lfs" if f["path"].endswith(".safetensors") else "regular"}
            for f in json.loads(body)["files"]
        ]
        self.answer({"files": [{**file, "shouldIgnore": False, "oid": None} for file in files]})

    def lfs_batch(self, body, repo, commit):
        objects = [
            {**wanted, "actions": {"upload": {"href": f"{self.url}/lfs/{wanted['oid']}", "header": {}}}}
            for wanted in json.loads(body)["objects"]
        ]
        self.answer({"transfer": "basic", "objects": objects})

    def lfs_upload(self, body, repo, commit, name):
        assert hashlib.sha256(body).hexdigest() == name
        (self.hub.root / "lfs" / name).write_bytes(body)
        self.answer({})

    def commit(self, body, repo, commit):
        oid = self.hub.commit(repo, [json.loads(line) for line in body.splitlines()])
        self.answer({"commitUrl": f"{self.url}/{repo}/commit/{oid}", "commitOid": oid})

    def info(self, body, repo, commit):
        names = [{"rfilename": name} for name in self.hub.files(repo, commit)]
        about = {"id": repo, "sha": commit, "private": self.hub.private[repo], "tags": [], "siblings": names}
        self.answer(about)

    def tree(self, body, repo, commit, name=None):
        below = f"{name}/" if name else ""
        found = [_entry(n, path) for n, path in self.hub.files(repo, commit).items() if n.startswith(below)]
        if parse_qs(urlsplit(self.path).query).get("recursive", ["false"])[0].lower() != "true":
            found = [entry for entry in found if "/" not in entry["path"].removeprefix(below)]
        return self.answer(found) if found or not name else self.refuse("EntryNotFound")

    def paths_info(self, body, repo, commit):
        asked = json.loads(body)["paths"] if body[:1] == b"{" else parse_qs(body.decode())["paths"]
        files = self.hub.files(repo, commit)
        self.answer([_entry(name, files[name]) for name in asked if name in files])

    def resolve(self, body, repo, commit, name):
        path = self.hub.files(repo, commit).get(name)
        if path is None:
            return self.refuse("EntryNotFound")
        entry = _entry(name, path)
        etag = entry.get("lfs", entry)["oid"]
        self.answer(path.read_bytes(), X_Repo_Commit=commit, ETag=f'"{etag}"', Accept_Ranges="bytes")


_REPO = "(?P<repo>[^/]+/[^/]+)"
_REVISION = "(?P<revision>[^/]+)"
_ROUTES = [
    ("POST", "/api/repos/create", _Handler.create_repo),
    ("POST", "/api/validate-yaml", _Handler.validate_yaml),
    ("POST", f"/api/models/{_REPO}/preupload/{_REVISION}", _Handler.preupload),
    ("POST", f"/{_REPO}.git/info/lfs/objects/batch", _Handler.lfs_batch),
    ("PUT", "/lfs/(?P<name>[0-9a-f]{64})", _Handler.lfs_upload),
    ("POST", f"/api/models/{_REPO}/commit/{_REVISION}", _Handler.commit),
    ("GET", f"/api/models/{_REPO}(/revision/{_REVISION})?", _Handler.info),
    ("GET", f"/api/models/{_REPO}/tree/{_REVISION}(/(?P<name>.+))?", _Handler.tree),
    ("POST", f"/api/models/{_REPO}/paths-info/{_REVISION}", _Handler.paths_info),
    ("GET|HEAD", f"/{_REPO}/resolve/{_REVISION}/(?P<name>.+)", _Handler.resolve),
]


@contextmanager
def running_hub(root: Path):
    """A hub on a free port of loopback, with its `url` and its `environment` for a child process."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    hub = Hub(root)
    server.hub = hub  # type: ignore[attr-defined]
    hub.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


def environment(hub: Hub, home: Path) -> dict[str, str]:
    """What a process needs to take this hub for the hub; `home` is its cache."""
    return {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(home),
        "HF_TOKEN": "hf_of_a_test",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_OFFLINE": "0",
        "NO_PROXY": "127.0.0.1",
        "no_proxy": "127.0.0.1",
    }
