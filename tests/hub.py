"""A stand-in for the Hugging Face hub: serves the shards of a folder on 127.0.0.1.

    python tests/hub.py FOLDER [--port 8000]    prints its address, serves until it is killed
    HF_ENDPOINT=http://127.0.0.1:8000 uv run prepare.py

Like the hub, it answers for a data set's file with the commit, the size and the SHA-256 of the
file in headers and a redirect to a second server, the CDN, which has the bytes, knows ranges and
must not see the token. Tests use it as a context manager, read `requests`, order faults with
`fail` and slow the CDN down with `rate`. It speaks TLS with a certificate of `make_certificate`.
"""

import argparse
import datetime
import functools
import hashlib
import ipaddress
import math
import re
import socket
import ssl
import struct
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from socketserver import TCPServer
from typing import NamedTuple

FILE_URL = re.compile(
    r"/datasets/[^/]+/[^/]+/resolve/(?P<revision>[^/]+)/(?P<name>[^/?]+)"
)
HTML = (
    b"<!doctype html><title>Sign in</title><p>Accept the terms of this network to go on."
)
# What can be ordered with `fail`, and which of the two servers does it unless told otherwise.
FAULTS = {
    "401": "hub",
    "404": "hub",
    "407": "hub",
    "429": "hub",
    "500": "hub",
    "html": "hub",
    "loop": "hub",
    "moved": "hub",
    "truncated": "cdn",
    "unsized": "cdn",
    "changed": "cdn",
    "stall": "cdn",
    "reset": "cdn",
    "no ranges": "cdn",
    "403 to a range": "cdn",
    "416 to a range": "cdn",
    "no total": "cdn",
    "drip": "cdn",
    "dripping head": "hub",
    "wrong range": "cdn",
    "endless": "cdn",
}


class Request(NamedTuple):
    """One request as it was received; server: "hub" or "cdn"."""

    server: str
    method: str
    path: str
    name: str  # of the file
    headers: dict[str, str]  # names in lower case


def make_certificate(path: Path) -> Path:
    """Write a certificate for 127.0.0.1, signed by itself, and its key; return `path`."""
    # Here, for the import takes 0.1 s. The package comes with `kernels`.
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "hub.py")])
    address = x509.IPAddress(ipaddress.ip_address("127.0.0.1"))
    now, day = datetime.datetime.now(datetime.timezone.utc), datetime.timedelta(days=1)
    builder = x509.CertificateBuilder(name, name, key.public_key())
    builder = builder.serial_number(x509.random_serial_number())
    builder = builder.not_valid_before(now - day).not_valid_after(now + day)
    for extension, critical in (
        (x509.SubjectAlternativeName([address]), False),
        (x509.BasicConstraints(ca=True, path_length=None), True),
    ):
        builder = builder.add_extension(extension, critical)
    pem = serialization.Encoding.PEM
    certificate = builder.sign(key, hashes.SHA256()).public_bytes(pem)
    path.write_bytes(
        certificate
        + key.private_bytes(
            pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
    )
    return path


class Hub:
    """Two servers on 127.0.0.1, `url` and `cdn_url`, for the shards anywhere below `folder`.

    certificate: file of the certificate and key of those servers that speak TLS, which are named
    in `secure`.
    """

    def __init__(
        self,
        folder: Path | str,
        port: int = 0,
        certificate: Path | None = None,
        secure: tuple[str, ...] = ("hub", "cdn"),
    ):
        self.files = {
            path.name: path for path in sorted(Path(folder).rglob("shard_*.parquet"))
        }
        listing = "".join(
            f"{name} {path.stat().st_size}\n" for name, path in self.files.items()
        )
        self.commit = hashlib.sha1(
            listing.encode()
        ).hexdigest()  # what revision `main` stands for
        self.requests: list[Request] = []
        self.faults: list[
            list
        ] = []  # [kind, file name or None, server, how many times yet]
        self.retry_after: str | None = None  # header of 429 and 500
        self.quota: tuple[int, int] | None = (
            None  # requests to the hub, in so many seconds
        )
        self.window = [0.0, 0]  # when the last of them began, how many came in it
        self.rate = math.inf  # bytes per second that the CDN sends to each client
        self.mirror_of: str | None = None  # the hub that this one sends to, by a 308
        self.direct = (
            False  # whether the hub has the bytes itself, and says no X-Linked-*
        )
        self.cut_handshakes = 0  # how many TLS connections end before they are made
        self.closing = threading.Event()  # ends what stalls
        self.lock = threading.Lock()
        self.secure = secure if certificate else ()
        if certificate:
            self.tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            self.tls.load_cert_chain(certificate)
        self.servers = [self._listen("hub", port), self._listen("cdn", 0)]
        self.url, self.cdn_url = (
            f"http{'s' * (kind in self.secure)}://127.0.0.1:{server.server_port}"
            for kind, server in zip(("hub", "cdn"), self.servers, strict=True)
        )

    def _listen(self, server: str, port: int) -> "Server":
        handler = type("Handler", (_Handler,), {"hub": self, "server_kind": server})
        return Server(("127.0.0.1", port), handler)

    def begin_tls(self, connection: socket.socket) -> socket.socket:
        """Return the connection with TLS on it; the first read shakes hands."""
        with self.lock:
            cut = self.cut_handshakes > 0
            self.cut_handshakes -= cut
        if cut:
            connection.recv(1)
            raise ConnectionError("as ordered")
        connection.settimeout(10)
        return self.tls.wrap_socket(connection, server_side=True)

    def __enter__(self) -> "Hub":
        for server in self.servers:
            threading.Thread(
                target=server.serve_forever, args=(0.01,), daemon=True
            ).start()
        return self

    def __exit__(self, *_) -> None:
        self.closing.set()
        for server in self.servers:
            server.shutdown()
            server.server_close()

    def fail(
        self,
        kind: str,
        name: str | None = None,
        times: float = 1,
        server: str | None = None,
    ) -> None:
        """Let the next `times` requests fail: for file `name` (None: any), at "hub" or "cdn".

        kind: "401", "404", "407", "429", "500"; "html" (a page with status 200, as a captive portal
        sends it); "loop" (a redirect to itself); "moved" (to another name of the data set, once);
        "truncated" (the connection ends half-way); "unsized" (so it does, and no Content-Length);
        "changed" (one byte is another); "stall" (half, then silence); "reset" (half, then RST);
        "dripping head" (a header without an end, a byte at a time);
        "no ranges" (all with status 200); "403 to a range", "416 to a range" (and all of the file
        without one); "no total" (a part with `*` for the size); "drip" (a byte at a time);
        "wrong range" (a part that was not asked for); "endless" (zeros without an end).
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

    def limit(self) -> dict[str, str]:
        """Count a request to the hub; return its header RateLimit, {} without a quota."""
        if not self.quota:
            return {}
        most, seconds = self.quota
        with self.lock:
            now = time.monotonic()
            if now >= self.window[0] + seconds:
                self.window = [now, 0]
            self.window[1] += 1
            left = most - self.window[1]
            reset = math.ceil(self.window[0] + seconds - now)
        return {"RateLimit": f'"resolvers";r={max(left, 0)};t={reset}', "Over": left < 0}

    def count(self, server: str, method: str, name: str | None = None) -> int:
        """Return how many such requests came, for file `name` or for all."""
        seen = [r for r in self.requests if name in (None, r.name)]
        return sum((r.server, r.method) == (server, method) for r in seen)


class Server(ThreadingHTTPServer):
    request_queue_size = 128

    def server_bind(self) -> None:
        TCPServer.server_bind(
            self
        )  # HTTPServer's also asks the name service about the host
        self.server_name, self.server_port = self.server_address[:2]

    def finish_request(self, request, client_address) -> None:
        handler = self.RequestHandlerClass
        if handler.server_kind in handler.hub.secure:
            request = handler.hub.begin_tls(request)
        super().finish_request(request, client_address)

    def handle_error(self, request, client_address) -> None:
        # The client may go when it likes, and need not like the certificate.
        if not isinstance(sys.exc_info()[1], (ConnectionError, ssl.SSLError)):
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
        hub.requests.append(
            Request(self.server_kind, self.command, self.path, name, headers)
        )
        fault, path = hub.next_fault(self.server_kind, name), hub.files.get(name)
        limit = hub.limit() if self.server_kind == "hub" else {}
        if limit.pop("Over", False):
            self.reply(429, b"We had to rate limit you.\n", limit)
        elif fault in ("429", "500"):
            after = {"Retry-After": hub.retry_after} if hub.retry_after else {}
            self.reply(int(fault), b"not now\n", after)
        elif fault == "401":
            said = {"X-Error-Code": "RepoNotFound"}
            if sent := headers.get("authorization"):  # a hub must not, but may
                said["X-Error-Message"] = f"Invalid credentials in {sent}, see http://x/y"
            self.reply(401, b"Invalid username or password.\n", said)
        elif fault == "407":
            self.reply(407, b"")
        elif fault == "dripping head":
            self.close_connection = True
            self.wfile.write(b"HTTP/1.1 200 OK\r\nX-Padding: ")
            while not hub.closing.wait(0.05):
                self.wfile.write(b"x")
        elif fault in ("loop", "moved"):
            owner = "/datasets/moved/" if fault == "moved" else "/datasets/karpathy/"
            place = self.path.replace("/datasets/karpathy/", owner)
            self.reply(307, b"Moved.\n", {"Location": place})
        elif fault == "html":
            self.reply(200, HTML, {"Content-Type": "text/html"})
        elif fault == "404" or path is None:
            self.reply(404, b"Entry not found\n", {"X-Error-Code": "EntryNotFound"})
        elif self.server_kind == "cdn":
            self.send_file(path, fault)
        elif hub.mirror_of:
            self.reply(308, b"", {"Location": hub.mirror_of + self.path})
        elif found is None or found["revision"] not in ("main", hub.commit):
            self.reply(404, b"Revision not found\n", {"X-Error-Code": "RevisionNotFound"})
        else:
            stat = path.stat()
            digest = sha256(path, stat.st_size, stat.st_mtime_ns)
            if hub.direct:
                about = {"X-Repo-Commit": hub.commit, "ETag": f'"{digest}"'}
                return self.send_file(path, fault, about)
            about = {"X-Repo-Commit": hub.commit, "X-Linked-Size": stat.st_size}
            about |= limit
            about |= {"X-Linked-Etag": f'"{digest}"'}
            about |= {
                "Location": f"{hub.cdn_url}/blobs/{digest}/{name}?signature={digest[:8]}"
            }
            self.reply(302, b"Found. Redirecting.\n", about)

    def reply(self, status: int, body: bytes, headers: dict | None = None) -> None:
        self.send_response(status)
        for key, value in ({"Content-Length": len(body)} | (headers or {})).items():
            self.send_header(key, str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def send_file(
        self, path: Path, fault: str | None, about: dict[str, str] | None = None
    ) -> None:
        body = path.read_bytes()
        size, start = len(body), 0
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        if asked and fault != "no ranges":
            start = int(asked[1])
        if asked and fault in ("403 to a range", "416 to a range"):
            return self.reply(int(fault[:3]), b"")
        if start >= size:
            return self.reply(416, b"", {"Content-Range": f"bytes */{size}"})
        if fault == "changed":
            body = (
                body[: size // 2] + bytes([body[size // 2] ^ 1]) + body[size // 2 + 1 :]
            )
        if fault == "endless":
            body += bytes(50_000_000)
        self.send_response(206 if start else 200)
        for key, value in (about or {}).items():
            self.send_header(key, value)
        if fault not in ("unsized", "endless"):
            self.send_header("Content-Length", str(size - start))
        if start:
            shown = start - 1 if fault == "wrong range" else start
            total = "*" if fault == "no total" else size
            self.send_header("Content-Range", f"bytes {shown}-{size - 1}/{total}")
        self.send_header("Content-Type", "application/octet-stream")
        self.end_headers()
        if self.command == "HEAD":
            return
        if fault == "drip":
            for k in range(size - start):
                self.wfile.write(body[start + k : start + k + 1])
                if self.hub.closing.wait(0.05):
                    break
            self.close_connection = True
            return
        half = fault in ("truncated", "unsized", "stall", "reset")
        self.close_connection = half or fault == "endless"
        self.send_slowly(
            memoryview(body)[start : (start + size + 1) // 2 if half else None]
        )
        if fault == "stall":
            self.hub.closing.wait(30)
        elif fault == "reset":  # no FIN: what the client has not read yet is lost as well
            self.hub.closing.wait(0.05)
            option = struct.pack("ii", 1, 0)
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, option)
            self.connection.close()

    def send_slowly(self, body: memoryview) -> None:
        if self.hub.rate == math.inf:
            self.wfile.write(body)
            return
        step = max(int(self.hub.rate / 50), 1)
        for k in range(0, len(body), step):
            self.wfile.write(body[k : k + step])
            if self.hub.closing.wait(1 / 50):
                return


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Serve shards as the Hugging Face hub does."
    )
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
