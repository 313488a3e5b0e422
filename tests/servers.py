"""HTTP servers on loopback that misbehave on demand: a plain host, and a Hub stand-in."""

import base64
import hashlib
import http.server
import json
import re
import socket
import struct
import threading
from collections import defaultdict
from dataclasses import dataclass, field
from time import sleep  # the tests replace time.sleep


@dataclass
class Fault:
    """How one answer goes wrong; what is left at its default goes well."""

    status: int | None = None  # answer this status, with no file
    headers: dict[str, str] = field(default_factory=dict)
    cut: int | None = None  # send so many bytes of the announced body, then close
    reset: bool = False  # close with RST instead of FIN
    ignore_range: bool = False  # answer 200 and the whole file
    no_length: bool = False  # neither Content-Length nor chunks: the end of the body is the end
    body: bytes | None = None  # another file
    pause: float = 0.0  # seconds before each 16 KiB


@dataclass(frozen=True)
class Seen:
    """One request as the server saw it."""

    method: str
    path: str
    range: str | None


class FileServer:
    """Serves `files` by path; the next of `faults[path]` spoils the next GET of it.

    `faults["HEAD " + path]` spoils HEADs. A list of faults is used up; a single `Fault` stays.
    """

    def __init__(self):
        self.files: dict[str, bytes] = {}
        self.headers: dict[str, dict[str, str]] = defaultdict(dict)
        self.faults: dict[str, list[Fault] | Fault] = {}
        self.seen: list[Seen] = []
        self.lock = threading.Lock()
        outer = self

        class Handler(self.handler):
            server_state = outer

        self.httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.httpd.daemon_threads = True
        self.thread = threading.Thread(
            target=self.httpd.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True
        )

    @property
    def url(self):
        return f"http://127.0.0.1:{self.httpd.server_port}"

    def __enter__(self):
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.httpd.shutdown()
        self.httpd.server_close()

    def next_fault(self, key):
        with self.lock:
            fault = self.faults.get(key)
            if isinstance(fault, list):
                return fault.pop(0) if fault else Fault()
            return fault or Fault()

    def gets(self, path):
        return [seen for seen in self.seen if seen.method == "GET" and seen.path == path]

    def add_hub_file(self, repo, revision, filename, body):
        """A file as the Hub's `resolve` route serves it; returns its path."""
        path = f"/{repo}/resolve/{revision}/{filename}"
        self.files[path] = body
        self.headers[path] = {"X-Repo-Commit": revision}
        return path


class _Handler(http.server.BaseHTTPRequestHandler):
    server_state: FileServer

    def log_message(self, *_):
        """Keep the tests' output clean."""

    def do_HEAD(self):
        self._answer("HEAD ")

    def do_GET(self):
        self._answer("")

    def _answer(self, prefix):
        state = self.server_state
        path = self.path
        if "://" in path:  # asked as a proxy
            path = "/" + path.split("://", 1)[1]
        wanted = self.headers.get("Range")
        with state.lock:
            state.seen.append(Seen(self.command, path, wanted))
        fault = state.next_fault(prefix + path)
        body = fault.body if fault.body is not None else state.files.get(path)
        status = fault.status or (404 if body is None else 200)
        if status >= 400:
            return self._send(status, fault.headers, b"")
        etag = f'"{hashlib.sha256(body).hexdigest()}"'
        headers = {"ETag": etag, "Accept-Ranges": "bytes", **state.headers[path], **fault.headers}
        if wanted and not fault.ignore_range:
            start = int(wanted.removeprefix("bytes=").rstrip("-"))
            if start >= len(body):
                return self._send(416, {"Content-Range": f"bytes */{len(body)}"}, b"")
            headers["Content-Range"] = f"bytes {start}-{len(body) - 1}/{len(body)}"
            status, body = 206, body[start:]
        return self._send(status, headers, body, fault)

    def _send(self, status, headers, body, fault=None):
        fault = fault or Fault()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        if not fault.no_length:
            self.send_header("Content-Length", str(len(body)))
        self.send_header("Connection", "close")
        self.end_headers()
        if self.command == "HEAD":
            return
        part = body if fault.cut is None else body[: fault.cut]
        try:
            for start in range(0, len(part), 1 << 14):
                sleep(fault.pause)
                self.wfile.write(part[start : start + (1 << 14)])
            self.wfile.flush()
        except (BrokenPipeError, ConnectionResetError):
            return
        if fault.reset:
            sleep(0.05)  # let the bytes sent so far arrive before the RST overtakes them
            linger = struct.pack("ii", 1, 0)
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            self.connection.close()


FileServer.handler = _Handler


@dataclass
class Repo:
    """A repository of the Hub's stand-in."""

    private: bool = False
    gated: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)  # oldest first

    def at(self, revision):
        newest = next(reversed(self.commits), None)
        return self.commits.get(newest if revision == "main" else revision)


class _HubHandler(_Handler):
    """The routes of the Hub that its client uses to make, fill, ask about and read repositories.

    Who sends `TOKEN` may read and write everything but gated repositories, whose terms were
    accepted by nobody but `ACCEPTED`.
    """

    def do_POST(self):
        hub = self.server_state
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        hub.seen.append(Seen("POST", self.path, None))
        if self.path == "/api/validate-yaml":
            return self._json({"errors": [], "warnings": []})
        if self._token() not in (hub.TOKEN, hub.ACCEPTED):
            return self._send(401, {}, b"")
        if self.path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}"
            private = asked.get("private") or asked.get("visibility") == "private"
            known = name in hub.repos
            hub.repos.setdefault(name, Repo(private=bool(private)))
            return self._json({"url": f"{hub.url}/{name}"}, 409 if known else 200)
        route = re.fullmatch(r"/api/models/(.+/.+)/(preupload|commit)/main", self.path)
        if route is None or route[1] not in hub.repos:
            return self._send(404, {"X-Error-Code": "RepoNotFound"}, b"")
        if route[2] == "preupload":
            modes = {"uploadMode": "regular", "shouldIgnore": False}
            return self._json({"files": [one | modes for one in json.loads(body)["files"]]})
        added = [line["value"] for line in map(json.loads, body.splitlines()) if "value" in line]
        files = {one["path"]: base64.b64decode(one["content"]) for one in added if "path" in one}
        commit = hub.commit(route[1], files)
        return self._json(
            {"commitUrl": f"{hub.url}/{route[1]}/commit/{commit}", "commitOid": commit}
        )

    def _answer(self, prefix):
        hub = self.server_state
        about = re.fullmatch(r"/api/models/([^/]+/[^/?]+)(/revision/main)?(\?.*)?", self.path)
        file = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", self.path)
        if not about and not file:
            return super()._answer(prefix)
        name = (about or file)[1]
        hub.seen.append(Seen(self.command, self.path, None))
        if name in hub.renamed:
            there = self.path.replace(name, hub.renamed[name], 1)
            return self._send(307, {"Location": there}, b"")
        repo, token = hub.repos.get(name), self._token()
        if repo is None or (repo.private and token not in (hub.TOKEN, hub.ACCEPTED)):
            return self._send(404 if token else 401, {"X-Error-Code": "RepoNotFound"}, b"")
        if about:
            newest = next(reversed(repo.commits), None)
            return self._json({"id": name, "sha": newest, "private": repo.private, "siblings": []})
        if repo.gated and token != hub.ACCEPTED:
            return self._send(403 if token else 401, {"X-Error-Code": "GatedRepo"}, b"")
        files = repo.at(file[2])
        if files is None or file[3] not in files:
            what = "RevisionNotFound" if files is None else "EntryNotFound"
            return self._send(404, {"X-Error-Code": what}, b"")
        body = files[file[3]]
        commit = next(one for one, held in repo.commits.items() if held is files)
        etag = f'"{hashlib.sha256(body).hexdigest()}"'
        return self._send(200, {"ETag": etag, "X-Repo-Commit": commit}, body)

    def _token(self):
        return self.headers.get("Authorization", "").removeprefix("Bearer ")

    def _json(self, value, status=200):
        self._send(status, {"Content-Type": "application/json"}, json.dumps(value).encode())


class HubServer(FileServer):
    """A stand-in of the Hub that takes uploads; `renamed` maps old names of repositories to new."""

    handler = _HubHandler
    TOKEN, ACCEPTED = "hf_owner", "hf_accepted"

    def __init__(self):
        super().__init__()
        self.repos: dict[str, Repo] = {}
        self.renamed: dict[str, str] = {}

    def commit(self, name, files):
        """Add or replace files of a repository; gives the commit's hash."""
        commits = self.repos[name].commits
        commit = hashlib.sha1(f"{name} {len(commits)}".encode()).hexdigest()
        commits[commit] = {**(self.repos[name].at("main") or {}), **files}
        return commit
