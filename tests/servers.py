"""HTTP servers on loopback that misbehave on demand: a plain host, and a Hub stand-in."""

import hashlib
import http.server
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

        class Handler(_Handler):
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
