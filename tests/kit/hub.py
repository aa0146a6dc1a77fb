"""A Hugging Face hub on the loopback, of the calls that the hub's own client makes here: repositories made, filled
by commits, and read at a revision. All files go the way of small ones, within the commit; it does not speak Xet.

    with hub(monkeypatch, tmp_path) as server:
        ...  # huggingface_hub talks to it
"""

import base64
import contextlib
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import huggingface_hub
import pytest

TOKEN = "hf_made_up"


class Hub:
    """What is on it.

    Attributes:
        commits: of each repository (`models/USER/NAME`) by revision, its files; `main` is the newest.
        private: whether each is.
        asked: method and path of each request.
    """

    def __init__(self) -> None:
        self.commits: dict[str, dict[str, dict[str, bytes]]] = {}
        self.private: dict[str, bool] = {}
        self.url = ""
        self.asked: list[str] = []
        self.status: int | None = None  # in place of every answer

    def put(self, repository: str, files: dict[str, bytes]) -> str:
        """Make a commit; return its name."""
        made = hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()
        self.commits.setdefault(repository, {})[made] = self.commits.setdefault(repository, {})["main"] = files
        return made

    def find(self, repository: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
        """The commit that a revision is of, and its files."""
        files = self.commits.get(repository, {}).get(revision)
        if files is None:
            return None
        names = [name for name, found in self.commits[repository].items() if found is files and name != "main"]
        return names[-1], files

    def answer(self, method: str, path: str, body: bytes, authorised: bool) -> tuple[int, Any, dict[str, str]]:
        """Status, content (bytes, or what becomes JSON) and headers."""
        if self.status is not None:
            return self.status, {"error": "as asked for"}, {}
        if not authorised and (method == "POST" or path == "/api/whoami-v2"):
            return 401, {"error": "Invalid credentials"}, {}
        if path == "/api/whoami-v2":
            return 200, {"name": "user", "type": "user", "auth": {}}, {}
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"models/{asked.get('organization') or 'user'}/{asked['name']}"
            if name in self.commits:
                return 409, {"error": "it exists", "url": f"{self.url}/{name}"}, {}
            self.private[name] = asked["visibility"] == "private"
            self.put(name, {})
            return 200, {"url": f"{self.url}/{name.removeprefix('models/')}"}, {}
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}, {}
        if match := re.fullmatch(
            r"/api/(\w+/[^/]+/[^/]+)(?:/(revision|preupload|commit|tree|paths-info)/([^/]+)(.*))?", path
        ):
            return self._repository(match[1], match[2], match[3] or "main", match[4] or "", body)
        if match := re.fullmatch(r"/(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            found = self.find(f"{match[1] or 'models/'}{match[2]}", match[3])
            if found is None or match[4] not in found[1]:
                return 404, {}, {"X-Error-Code": "EntryNotFound" if found else "RepoNotFound"}
            content = found[1][match[4]]
            return 200, content, {"ETag": f'"{_oid(content)}"', "X-Repo-Commit": found[0], "Accept-Ranges": "bytes"}
        return 404, {"error": f"this hub has no {path}"}, {}

    def _repository(
        self, name: str, call: str | None, revision: str, below: str, body: bytes
    ) -> tuple[int, Any, dict[str, str]]:
        found = self.find(name, revision)
        if found is None:
            missing = "RevisionNotFound" if name in self.commits else "RepoNotFound"
            return 404, {"error": missing}, {"X-Error-Code": missing}
        commit, files = found
        entries = [
            {"type": "file", "path": path, "size": len(content), "oid": _oid(content)}
            for path, content in files.items()
        ]
        if call in (None, "revision"):
            siblings = [{"rfilename": path} for path in files]
            return 200, {"id": name.partition("/")[2], "sha": commit, "siblings": siblings, "tags": []}, {}
        if call == "preupload":
            asked = json.loads(body)["files"]
            modes = [{"path": item["path"], "uploadMode": "regular", "shouldIgnore": False} for item in asked]
            return 200, {"files": modes, "commitOid": commit}, {}
        if call == "commit":
            made = dict(files)
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    made[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
                elif line["key"] == "deletedFile":
                    del made[line["value"]["path"]]
            oid = self.put(name, made)
            return 200, {"commitUrl": f"{self.url}/{name}/commit/{oid}", "commitOid": oid, "success": True}, {}
        if call == "paths-info":
            return 200, [item for item in entries if item["path"] in unquote(body.decode())], {}
        top = unquote(below).strip("/")
        within = [item for item in entries if not top or str(item["path"]).startswith(f"{top}/")]
        return 200, within, {}


def _oid(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()


@contextlib.contextmanager
def hub(monkeypatch: pytest.MonkeyPatch, cache: Path) -> Iterator[Hub]:
    """A hub that `huggingface_hub` talks to, with a token and a cache of its own."""
    server = Hub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _answer(self) -> None:
            body = self._body()
            path = unquote(self.path.partition("?")[0])
            server.asked.append(f"{self.command} {path}")
            authorised = self.headers["Authorization"] == f"Bearer {TOKEN}"
            status, content, headers = server.answer(self.command, path, body, authorised)
            sent = content if isinstance(content, bytes) else json.dumps(content).encode()
            wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers["Range"] or "")
            if wanted and status == 200:
                start, end = int(wanted[1]), min(int(wanted[2] or len(sent) - 1), len(sent) - 1)
                status, headers["Content-Range"] = 206, f"bytes {start}-{end}/{len(sent)}"
                sent = sent[start : end + 1]
            self.send_response(status)
            for key, value in {"Content-Type": "application/json", **headers, "Content-Length": str(len(sent))}.items():
                self.send_header(key, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(sent)

        def _body(self) -> bytes:
            if self.headers["Transfer-Encoding"] != "chunked":
                return self.rfile.read(int(self.headers["Content-Length"] or 0))
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)

        do_GET = do_HEAD = do_POST = _answer

        def log_message(self, format: str, *arguments: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as served:
        threading.Thread(target=served.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        url = server.url = f"http://127.0.0.1:{served.server_port}"
        constants = huggingface_hub.constants
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setenv("INSTRUCTBLIP_CACHE", str(cache / "instructblip"))
        monkeypatch.setattr(constants, "ENDPOINT", url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache / "hub"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        try:
            yield server
        finally:
            served.shutdown()
