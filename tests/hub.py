"""A stand-in for the Hugging Face hub: serves the shards of a folder on 127.0.0.1.

    python tests/hub.py FOLDER [--port 8000]    prints its address, serves until it is killed
    HF_ENDPOINT=http://127.0.0.1:8000 uv run prepare.py

Like the hub, it answers for a data set's file with the commit, the size and the SHA-256 of the
file in headers and a redirect to a second server, the CDN, which has the bytes and must not see
the token. Tests use it as a context manager, read `requests` and order faults with `fail`.
"""

import argparse
import functools
import hashlib
import re
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from socketserver import TCPServer
from typing import NamedTuple

FILE_URL = re.compile(r"/datasets/[^/]+/[^/]+/resolve/(?P<revision>[^/]+)/(?P<name>[^/?]+)")
HTML = b"<!doctype html><title>Sign in</title><p>Accept the terms of this network to go on."
# What can be ordered with `fail`, and which of the two servers does it unless told otherwise.
FAULTS = {"404": "hub", "500": "hub", "html": "hub", "truncated": "cdn", "changed": "cdn"}


class Request(NamedTuple):
    """One request as it was received; server: "hub" or "cdn"."""

    server: str
    method: str
    path: str
    name: str  # of the file
    headers: dict[str, str]  # names in lower case


class Hub:
    """Two servers on 127.0.0.1, `url` and `cdn_url`, for the shards anywhere below `folder`."""

    def __init__(self, folder: Path | str, port: int = 0):
        self.files = {path.name: path for path in sorted(Path(folder).rglob("shard_*.parquet"))}
        listing = "".join(f"{name} {path.stat().st_size}\n" for name, path in self.files.items())
        self.commit = hashlib.sha1(listing.encode()).hexdigest()  # what revision `main` stands for
        self.requests: list[Request] = []
        self.faults: list[list] = []  # [kind, file name or None, server, how many times yet]
        self.lock = threading.Lock()
        self.servers = [self._listen("hub", port), self._listen("cdn", 0)]
        self.url, self.cdn_url = (f"http://127.0.0.1:{s.server_port}" for s in self.servers)

    def _listen(self, server: str, port: int) -> "Server":
        handler = type("Handler", (_Handler,), {"hub": self, "server_kind": server})
        return Server(("127.0.0.1", port), handler)

    def __enter__(self) -> "Hub":
        for server in self.servers:
            threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        for server in self.servers:
            server.shutdown()
            server.server_close()

    def fail(
        self, kind: str, name: str | None = None, times: float = 1, server: str | None = None
    ) -> None:
        """Let the next `times` requests fail: for file `name` (None: any), at "hub" or "cdn".

        kind: "404"; "500"; "html" (a page with status 200, as a captive portal sends it);
        "truncated" (the connection ends half-way); "changed" (one byte is another).
        """
        if kind not in FAULTS or (FAULTS[kind] == "cdn" and server == "hub"):
            raise ValueError(f"no fault {kind!r} at {server or 'any server'}")
        with self.lock:
            self.faults.append([kind, name, server or FAULTS[kind], times])

    def next_fault(self, server: str, name: str) -> str | None:
        with self.lock:
            for fault in self.faults:
                if fault[1] in (None, name) and fault[2] == server and fault[3] > 0:
                    fault[3] -= 1
                    return fault[0]
        return None

    def count(self, server: str, method: str, name: str | None = None) -> int:
        """Return how many such requests came, for file `name` or for all."""
        seen = [r for r in self.requests if name in (None, r.name)]
        return sum((r.server, r.method) == (server, method) for r in seen)


class Server(ThreadingHTTPServer):
    request_queue_size = 128

    def server_bind(self) -> None:
        TCPServer.server_bind(self)  # HTTPServer's also asks the name service about the host
        self.server_name, self.server_port = self.server_address[:2]

    def handle_error(self, request, client_address) -> None:
        if not isinstance(sys.exc_info()[1], ConnectionError):  # the client may go when it likes
            super().handle_error(request, client_address)


@functools.cache
def sha256(path: Path, size: int, mtime_ns: int) -> str:
    """Return the SHA-256 of a file in hex, read once for each state of the file."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    server_kind: str
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # head and body are two writes
    timeout = 60  # seconds that an idle connection is kept

    def log_message(self, *_) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def answer(self) -> None:
        found, hub = FILE_URL.fullmatch(self.path.partition("?")[0]), self.hub
        name = found["name"] if found else self.path.partition("?")[0].rpartition("/")[2]
        headers = {key.lower(): value for key, value in self.headers.items()}
        hub.requests.append(Request(self.server_kind, self.command, self.path, name, headers))
        fault, path = hub.next_fault(self.server_kind, name), hub.files.get(name)
        if fault == "500":
            self.reply(500, b"internal error\n")
        elif fault == "html":
            self.reply(200, HTML, {"Content-Type": "text/html"})
        elif fault == "404" or path is None:
            self.reply(404, b"Entry not found\n")
        elif self.server_kind == "cdn":
            self.send_file(path, fault)
        elif found is None or found["revision"] not in ("main", hub.commit):
            self.reply(404, b"Revision not found\n")
        else:
            stat = path.stat()
            digest = sha256(path, stat.st_size, stat.st_mtime_ns)
            about = {"X-Repo-Commit": hub.commit, "X-Linked-Size": stat.st_size}
            about |= {"X-Linked-Etag": f'"{digest}"'}
            about |= {"Location": f"{hub.cdn_url}/blobs/{digest}/{name}?signature={digest[:8]}"}
            self.reply(302, b"Found. Redirecting.\n", about)

    def reply(self, status: int, body: bytes, headers: dict | None = None) -> None:
        self.send_response(status)
        for key, value in ({"Content-Length": len(body)} | (headers or {})).items():
            self.send_header(key, str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def send_file(self, path: Path, fault: str | None) -> None:
        size = path.stat().st_size
        self.send_response(200)
        self.send_header("Content-Length", str(size))
        self.send_header("Content-Type", "application/octet-stream")
        self.end_headers()
        if self.command == "HEAD":
            return
        with open(path, "rb") as file:
            if fault == "truncated":
                self.connection.sendfile(file, count=size // 2)
                self.close_connection = True
            elif fault == "changed":
                body = bytearray(file.read())
                body[size // 2] ^= 1
                self.wfile.write(body)
            else:
                self.connection.sendfile(file)


def main() -> None:
    parser = argparse.ArgumentParser(description="Serve shards as the Hugging Face hub does.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--port", type=int, default=8000)
    args = parser.parse_args()
    with Hub(args.folder, args.port) as hub:
        if not hub.files:
            parser.error(f"there is no shard_*.parquet below {args.folder}")
        print(hub.url, flush=True)
        try:
            threading.Event().wait()
        except KeyboardInterrupt:
            pass


if __name__ == "__main__":
    main()
