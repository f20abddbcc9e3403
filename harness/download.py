"""Shards from the dataset hub, whatever the connection does.

The hub answers for a file with its commit, size and SHA-256 and a redirect to a second
host that has the bytes. Nothing exists under its name before it is complete and its
SHA-256 is right; what has come stays in shards/.<name>.<hash>.part and goes on by HTTP
Range, in a later run too, and what the hub said of a shard is not asked again. Names of
files are made here, never taken from a server. Not edited.
"""

import base64
import itertools
import json
import os
import re
import shutil
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from contextlib import suppress
from email.utils import parsedate_to_datetime
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import urljoin, urlsplit

import requests
import urllib3
from huggingface_hub import constants as hub_constants

import constants as C
from harness.files import PREPARE, content_key, describe, naming
from harness.jobs import Progress, describe_all, metric, run_jobs
from harness.output import clean, plural

HTTP_TIMEOUT = (10, 60)  # seconds: to connect, between two bytes
ANSWER_SECONDS = 120  # until the head of an answer is there, redirects included
DOWNLOADS = 8  # side by side
# Seconds to wait before each try for a shard, while no more of it comes.
RETRY_SECONDS = (0, 1, 2, 4, 8, 16, 32)
# Of these, those before the very first word of a hub, while nothing has come of any shard:
# 15 s cover a network that is coming up, and an interrupted download has all tries.
FIRST_TRIES = 5
MAX_RETRY_AFTER = 600  # seconds that a server may ask to wait
MAX_REDIRECTS = 5
ANSWERS = ".answers.jsonl"  # what the hub said of shards, one a line, beside them
CHUNK = 1 << 16  # bytes that are written at once at most
# A body of which less comes is given up, and asked for again.
FLOOR_BYTES = 60_000
FLOOR_SECONDS = 60
GONE = "does not have the commit"
NO_HUB = (
    "if the hub cannot be reached from here, HF_ENDPOINT names a mirror and "
    "`--source DIR` takes text of your own (docs/install.md)"
)
PROXY_LOGIN = "the proxy wants a login: set HTTPS_PROXY to an address like http://USER:PASSWORD@HOST:PORT"
LOGIN = "run `uvx hf auth login` or set HF_TOKEN, with a token that may read the data set"
REFUSALS = {
    401: f"wants a login: {LOGIN}",
    403: f"forbids it: {LOGIN}",
    404: "does not have it",
    410: "does not have it any more",
}


# What libraries raise when the network fails. Not all of it is wrapped by requests.
NETWORK_ERRORS = (
    requests.RequestException,
    urllib3.exceptions.HTTPError,
    ssl.SSLError,
    ConnectionError,
    TimeoutError,
    ValueError,
)


class Refused(ConnectionError):
    """An answer that another try will not change."""


class Slow(ConnectionError):
    """An answer that came too slowly; what came of it does not count as progress."""


class NoResume(ConnectionError):
    """An answer that is not the rest of a part."""


class Busy(ConnectionError):
    """An answer that asks for another try, after a number of seconds."""

    seconds = 0.0


def hub_endpoint() -> str:
    """Return the hub's address without a slash at its end; ValueError for a bad one."""
    endpoint = (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")
    parts = urlsplit(endpoint)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        problem = "HF_ENDPOINT is no address like https://huggingface.co"
        raise ValueError(f"{problem}; fix or unset it")
    return endpoint


class Session(requests.Session):
    """A session that knows until when the hub wants to be left alone."""

    def __init__(self):
        super().__init__()
        self.resume_at = 0.0  # by time.monotonic()
        self.login = ""  # where the login comes from, "" if there is none
        self.secrets = []  # what no message may show
        self.hooks["response"].append(self.heed_limit)

    def request(self, method: str, url: str, **options) -> requests.Response:
        """As of requests, but Slow if the answer's head takes over ANSWER_SECONDS.

        The timeout of requests is between two bytes: a byte now and then is in time.
        """
        future = Future()

        def ask() -> None:
            try:
                future.set_result(requests.Session.request(self, method, url, **options))
            except BaseException as error:
                future.set_exception(error)

        # One that is given up ends with its connection, or with the process.
        threading.Thread(target=ask, daemon=True).start()
        if not wait([future], ANSWER_SECONDS).done:
            problem = f"did not answer within {ANSWER_SECONDS} s"
            raise Slow(f"{host_of(url)} {problem}")
        return future.result()

    def heed_limit(self, answer: requests.Response, **_) -> None:
        """Note that no request is left, for all threads: else each has to be told."""
        seconds = reset_seconds(answer)
        if host_of(answer.url) == host_of(hub_endpoint()) and seconds <= MAX_RETRY_AFTER:
            self.resume_at = max(self.resume_at, time.monotonic() + seconds)

    def wait_seconds(self) -> float:
        """Return how long no request should be made yet."""
        return max(self.resume_at - time.monotonic(), 0.0)


def with_socks(command: str) -> str:
    """Return a command with the package that SOCKS proxies need."""
    return command.replace("uv run", "uv run --with pysocks", 1)


def check_environment(endpoint: str) -> None:
    """Raise ValueError for what no try can get over: a certificate or a package missing."""
    for name in ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "SSL_CERT_FILE", "SSL_CERT_DIR"):
        path = os.environ.get(name)
        if path and not Path(path).exists():
            raise ValueError(f"{name} names {path}, which is not there; fix or unset it")
    proxies = requests.utils.get_environ_proxies(endpoint)
    proxy = requests.utils.select_proxy(endpoint, proxies) or ""
    if proxy.lower().startswith("socks") and not find_spec("socks"):
        text = "the proxy in HTTPS_PROXY or ALL_PROXY is a SOCKS proxy"
        advice = f"run `{with_socks(PREPARE)}`"
        raise ValueError(f"{text}, which needs the package pysocks; {advice}")


def find_token() -> tuple[str, str]:
    """Return the hub's token and where it comes from, empty texts if there is none.

    As huggingface_hub finds it: HF_TOKEN, the login of `hf auth login`, and others.
    """
    if hub_constants.HF_HUB_DISABLE_IMPLICIT_TOKEN:
        return "", ""
    # Here, for the import takes half a second.
    from huggingface_hub import get_token

    try:
        token = get_token() or ""
    except Exception as error:  # it may read files and ask servers
        text = f"the login for the hub could not be read ({clean(str(error))})"
        raise ValueError(f"{text}; run `uvx hf auth login` again") from error
    origin = "HF_TOKEN" if os.environ.get("HF_TOKEN") else "the token of `hf auth login`"
    if not re.fullmatch("[!-~]*", token):
        raise ValueError(
            f"{origin} holds characters that no token has; set it again or unset it"
        )
    return token, origin if token else ""


def open_session(workers: int) -> Session:
    """Return a session that sends the token to the hub and to no host behind a redirect.

    workers: threads that use it. ValueError if the environment cannot be right,
    ConnectionError if it forbids the network.
    """
    endpoint = hub_endpoint()  # before anything is tried again and again
    if hub_constants.HF_HUB_OFFLINE:
        text = "HF_HUB_OFFLINE is set, and shards have to be fetched"
        raise ConnectionError(f"{text}; unset it, or use `--source DIR`")
    check_environment(endpoint)
    token, origin = find_token()
    user, password = requests.utils.get_auth_from_url(endpoint)

    def authorize(request: requests.PreparedRequest) -> requests.PreparedRequest:
        if user:  # of a mirror; as huggingface_hub, before the token
            return requests.auth.HTTPBasicAuth(user, password)(request)
        if token:
            request.headers["Authorization"] = f"Bearer {token}"
        return request

    session = Session()
    # By `auth`, requests takes it off for a new host, and ~/.netrc does not replace it.
    session.auth = authorize
    session.login = "the login in HF_ENDPOINT" if user else origin
    basic = base64.b64encode(f"{user}:{password}".encode()).decode()
    session.secrets = [text for text in (token, password, user and basic) if text]
    # requests knows only names of its own, and those come first.
    session.verify = os.environ.get("SSL_CERT_FILE") or os.environ.get("SSL_CERT_DIR")
    session.verify = session.verify or True
    session.max_redirects = MAX_REDIRECTS
    # Bytes and ranges are then those of the file.
    session.headers["Accept-Encoding"] = "identity"
    for scheme in ("http://", "https://"):
        session.mount(scheme, requests.adapters.HTTPAdapter(pool_maxsize=workers))
    return session


def reset_seconds(answer: requests.Response) -> float:
    """Return the seconds until the hub counts requests from 0 again, 0 if some are left.

    It says so by RateLimit, as in `"resolvers";r=0;t=55`: no request left for 55 s.
    """
    said = answer.headers.get("RateLimit", "")
    found = re.search(r";\s*r\s*=\s*(\d{1,9})\s*;\s*t\s*=\s*(\d{1,9})\s*(?:$|[;,])", said)
    return float(found[2]) if found and int(found[1]) == 0 else 0.0


def retry_after(answer: requests.Response) -> float:
    """Return the seconds that `answer` asks to wait, 0 if it does not say."""
    after = answer.headers.get("Retry-After", "")
    if re.fullmatch(r"\d{1,9}", after):
        return float(after)
    try:  # a date: set against the server's own clock, for ours may be wrong
        until = parsedate_to_datetime(after)
        now = parsedate_to_datetime(answer.headers.get("Date", ""))
        return (until - now).total_seconds()
    except (ValueError, TypeError):
        return reset_seconds(answer)


def hub_message(session: Session, answer: requests.Response) -> str:
    """Return what the hub itself says of a refusal, " (...)", without secrets."""
    said = clean(answer.headers.get("X-Error-Message", ""))
    for secret in session.secrets:
        said = said.replace(secret, "...")
    said = "".join(letter for letter in said if letter.isprintable())
    return f" ({said[:200]})" if said else ""


def check_status(session: Session, answer: requests.Response) -> None:
    """Raise Refused or Busy for an answer without the data.

    The text names the host and no more: addresses and headers hold secrets.
    """
    host = host_of(answer.url)
    status = answer.status_code
    if status < 400:
        return
    text = f"{host} answered {status}"
    if status == 404 and answer.headers.get("X-Error-Code") == "RevisionNotFound":
        raise Refused(f"{host} {GONE} of {C.DATASET} (any more)")
    at_hub = host == host_of(hub_endpoint())
    if status == 407:
        raise Refused(f"{text}: {PROXY_LOGIN}")
    if at_hub:
        text += hub_message(session, answer)
    if at_hub and status in (401, 403) and session.login:
        advice = "renew it, or unset it for public data"
        raise Refused(f"{text}: it does not accept {session.login}; {advice}")
    if at_hub and status in REFUSALS:  # elsewhere it is a signed address that ran out
        raise Refused(f"{text}: it {REFUSALS[status]}")
    if at_hub and status < 500 and status not in (408, 425, 429):
        raise Refused(text)
    busy = Busy(text)
    busy.seconds = retry_after(answer)
    if busy.seconds > MAX_RETRY_AFTER:
        raise Refused(f"{text} and asks to come back in {busy.seconds:.0f} s")
    raise busy


def host_of(url: str) -> str:
    """Return host and port of an address, and nothing of it that may be a secret."""
    return urlsplit(url).netloc.rpartition("@")[2]


def tell(error: Exception) -> str:
    """Return what the innermost of an error's causes says, without addresses."""
    request = getattr(error, "request", None)
    while error.args and isinstance(error.args[0], Exception):
        reason = getattr(error.args[0], "reason", None)
        # An ssl.SSLError has one too, which is a text.
        error = reason if isinstance(reason, Exception) else error.args[0]
    # That of a proxy keeps its cause in an attribute.
    error = getattr(error, "original_error", error)
    said = str(error)
    if error.args and isinstance(error.args[0], str):
        said = error.args[0]
    if isinstance(error, ssl.SSLError) or "SSL" in said:
        host = host_of(request.url) if request is not None else "the server"
        said = re.sub(r"^\[.*?\] | ?\(_ssl\.c:\d+\)", "", said)
        advice = ""
        if isinstance(error, ssl.SSLCertVerificationError):
            # In the order in which they are believed.
            names = ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "SSL_CERT_FILE")
            name = next(filter(os.environ.get, names), "SSL_CERT_FILE")
            advice = f"; if your network signs itself, set {name} to its certificate"
        said = f"no secure connection to {host}: {said}{advice}"
    return clean(said)


def persist(
    session: Session,
    action: Callable,
    name: str,
    progress: Progress,
    size: Callable = lambda: 0,
    first_tries: int = 0,
):
    """Return action(), tried again while the network fails; ConnectionError at last.

    size: returns the bytes that are there; while they become more, tries are not counted.
    first_tries: that it may take until the hub says anything, where it has said nothing yet;
    0: it has.
    """
    tries = 0
    wait_seconds = RETRY_SECONDS[0]
    most = size()
    while True:
        progress.pause(max(wait_seconds, session.wait_seconds()))
        try:
            return action()
        except requests.TooManyRedirects as error:
            raise ConnectionError(f"{name}: the hub redirects in a circle") from error
        except Refused as error:
            raise ConnectionError(f"{name}: {error}") from error
        except NETWORK_ERRORS as error:
            if isinstance(error, requests.exceptions.ProxyError) and "407" in tell(error):
                raise ConnectionError(f"{name}: {PROXY_LOGIN}") from error
            problem = f"{name}: {tell(error)}"
            there = size()
            more = there > most and not isinstance(error, Slow)
            tries = 1 if more else tries + 1
            most = max(most, there)
            unheard = first_tries and not isinstance(error, Busy)
            most_tries = first_tries if unheard else len(RETRY_SECONDS)
            if tries >= min(most_tries, len(RETRY_SECONDS)):
                advice = f"run `{PREPARE}` again, it goes on"
                if unheard:
                    advice += f"; {NO_HUB}"
                raise ConnectionError(f"{problem}; {advice}") from error
            wait_seconds = max(RETRY_SECONDS[tries], getattr(error, "seconds", 0.0))
            progress.note(f"{problem}; again in {wait_seconds:.0f} s")


def address(revision: str, name: str) -> str:
    """Return where the hub answers for a shard."""
    return f"{hub_endpoint()}/datasets/{C.DATASET}/resolve/{revision}/{name}"


def stat_shard(session: Session, revision: str, name: str) -> tuple[str, dict]:
    """Ask the hub about a shard; return its commit and size + SHA-256.

    The last are as `describe` returns them. Raises ConnectionError or ValueError.
    """
    endpoint = hub_endpoint()
    url = place = address(revision, name)
    for _ in range(MAX_REDIRECTS + 1):
        options = {"allow_redirects": False, "timeout": HTTP_TIMEOUT}
        if session.should_strip_auth(url, place):  # not the hub's token
            options["auth"] = requests.utils.get_netrc_auth(place) or (
                lambda asked: asked
            )
        answer = session.head(place, **options)
        check_status(session, answer)
        keys = ("X-Repo-Commit", "X-Linked-Size", "X-Linked-Etag")
        commit, size, sha256 = (answer.headers.get(key, "").strip('"') for key in keys)
        if (
            answer.status_code == 200 and not sha256
        ):  # a mirror that sends the file itself
            size = answer.headers.get("Content-Length", "")
            sha256 = answer.headers.get("ETag", "").removeprefix("W/").strip('"')
        found = f"{commit} {size} {sha256}"
        if re.fullmatch("[0-9a-f]{40} [0-9]{1,18} [0-9a-f]{64}", found):
            return commit, {"size": int(size), "sha256": sha256}
        before = urlsplit(place).scheme
        place = urljoin(place, answer.headers.get("Location", "?"))
        # A mirror may send elsewhere, but not from TLS to plain HTTP.
        if not answer.is_redirect or (before, urlsplit(place).scheme) not in (
            ("http", "http"),
            ("http", "https"),
            ("https", "https"),
        ):
            problem = "did not say size, SHA-256 and commit: not the hub?"
            if os.environ.get("HF_ENDPOINT"):
                problem += f" HF_ENDPOINT names {host_of(endpoint)}; fix or unset it"
            raise ValueError(f"{host_of(answer.url)} {problem}")
    raise requests.TooManyRedirects  # a data set with a new name takes one


def read_chunks(answer: requests.Response, host: str) -> Iterator[bytes]:
    """Yield a body as it comes; Slow if it comes at less than a floor rate."""
    begun, came = time.monotonic(), 0
    # read1 hands out what is there, where iter_content would wait for a whole chunk.
    while chunk := answer.raw.read1(CHUNK, decode_content=True):
        yield chunk
        came += len(chunk)
        seconds = time.monotonic() - begun
        if seconds > FLOOR_SECONDS:
            if came < FLOOR_BYTES:
                problem = f"sent {plural(came, 'byte')} in {seconds:.0f} s"
                raise Slow(f"{host} {problem}, too slow to go on")
            begun, came = time.monotonic(), 0


def fetch(
    session: Session,
    url: str,
    part: Path,
    size: int,
    progress: Progress,
    resume: bool = True,
) -> None:
    """Add to `part` what it lacks of `size` bytes, or without `resume` begin it again.

    An OSError, of which ConnectionError is one, leaves in it what has come. Anew is also
    begun where a server answers, but not with the rest.
    """
    start = part.stat().st_size if part.exists() and resume else 0
    headers = {"Range": f"bytes={start}-"} if start else {}
    with session.get(url, headers=headers, stream=True, timeout=HTTP_TIMEOUT) as answer:
        if start and answer.status_code in (403, 412, 416):
            raise NoResume(f"{host_of(answer.url)} answered {answer.status_code}")
        check_status(session, answer)
        host = urlsplit(answer.url).hostname
        chunks = read_chunks(answer, host)
        whole = answer.status_code == 200  # also when the server does not know ranges
        if whole:
            first = next(chunks, b"")
            while len(first) < 4 and (more := next(chunks, b"")):
                first += more
            if first[:4] != b"PAR1":
                problem = "sent no parquet: the login page of a network?"
                raise ConnectionError(f"{host} {problem}")
            chunks = itertools.chain([first], chunks)
            progress.add(-(part.stat().st_size if part.exists() else 0))
            start = 0
        else:
            said = answer.headers.get("Content-Range", "")
            # Some do not say the size of the whole; the SHA-256 is checked in any case.
            if said not in (
                f"bytes {start}-{size - 1}/{size}",
                f"bytes {start}-{size - 1}/*",
            ):
                problem = f"sent another part than bytes {start} to {size}"
                raise NoResume(f"{host} {problem}")
        with naming(part), open(part, "wb" if whole else "ab") as file:
            try:
                for chunk in chunks:
                    file.write(chunk)
                    progress.add(len(chunk))
                    start += len(chunk)
                    if start > size:
                        raise ConnectionError(f"{host} sent more than {size} bytes")
            finally:
                file.flush()
            os.fsync(file.fileno())
    if start < size:
        came = f"{start} of {size} bytes"
        raise ConnectionError(f"the connection to {host} ended after {came}")


def part_of(path: Path, remote: dict) -> Path:
    """Return where the bytes of shard `path` wait until all are there and checked."""
    return path.with_name(f".{path.name}.{remote['sha256'][:12]}.part")


def download_shard(
    session: Session, url: str, path: Path, remote: dict, progress: Progress
) -> None:
    """Have a shard at `path` as the hub has it, of size and SHA-256 `remote`.

    OSError if that cannot be done; what has come is kept.
    """
    part = part_of(path, remote)
    refusals = 0  # of the rest of a part

    def size() -> int:
        return part.stat().st_size if part.exists() else 0

    def get() -> None:
        nonlocal refusals
        if size() > remote["size"]:
            progress.add(-size())
            part.unlink()
        if size() < remote["size"]:
            # Once may be chance, and what has come is dear; then the part is no use.
            resume = refusals < 2
            try:
                fetch(session, url, part, remote["size"], progress, resume)
            except NoResume:
                refusals += 1
                raise
        if describe(part) != remote:
            progress.add(-size())
            part.unlink()
            raise ConnectionError("what came is not what the hub describes (SHA-256)")

    # What came beyond the end is no progress.
    persist(session, get, path.name, progress, lambda: min(size(), remote["size"]))
    os.replace(part, path)


def check_free_space(folder: Path, needed: int) -> None:
    """Raise OSError if `folder` has fewer than `needed` bytes left."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        text = f"{folder} has {metric(free, 'B')} free, and shards and rows need"
        advice = "free some, move AUTORESEARCH_CACHE or lower `--num-shards`"
        raise OSError(f"{text} {metric(needed, 'B')}; {advice}")


def ensure_shards(
    folder: Path, names: list[str], manifest: dict, workers: int = DOWNLOADS
) -> tuple[str, dict[str, dict]]:
    """Have shards in `folder`; return their commit, and size + SHA-256 of each by name.

    ConnectionError says which could not be had; OSError that there is no space for them.
    """
    known = manifest.get("shards", {})
    revision = manifest.get("revision", C.REVISION)
    shards = describe_all(folder, [name for name in names if name in known])
    for name in [name for name in shards if shards[name] != known[name]]:
        state = "damaged" if (folder / name).exists() else "gone"
        print(f"{name} is {state}: it is fetched again", flush=True)
        del shards[name]
    missing = [name for name in names if name not in shards]
    if missing:
        folder.mkdir(parents=True, exist_ok=True)
        session = open_session(workers)
        # Before the first wait for a network that may be slow or dead.
        text = f"shards: asking {host_of(hub_endpoint())} for {len(missing)}"
        print(f"{text} of {C.DATASET}", flush=True)
        try:
            new = [name for name in missing if name not in known]
            answers = {name: known[name] for name in missing if name in known}
            if new:  # the others need no question
                ask = partial(stat_shard, session, revision, new[0])
                asking = Progress("asking the hub", " shards", 1)
                begun = known or any(folder.iterdir())  # a download was interrupted, say
                most = len(RETRY_SECONDS) if begun else FIRST_TRIES
                name = f"{new[0]} of {C.DATASET}"
                told = persist(session, ask, name, asking, first_tries=most)
                revision, answers[new[0]] = told
            shards |= fetch_shards(session, folder, missing, revision, answers, workers)
        except ConnectionError as error:
            if "revision" not in manifest or GONE not in str(error):
                raise
            path = folder.parent / "manifest.json"
            advice = f"delete {path} to go on with the present ones"
            text = f"{error}; the data here is of {revision}; {advice}"
            raise ConnectionError(f"{text}: what is the same stays") from error
    else:
        with suppress(OSError):  # as of a cache that is read-only
            (folder / ANSWERS).unlink(missing_ok=True)
    for part in folder.glob(".*.part"):  # of shards that are not asked for any more
        part.unlink()
    size = metric(sum(about["size"] for about in shards.values()), "B")
    print(f"shards: {len(names)} are there and verified, {size}", flush=True)
    return revision, {name: shards[name] for name in names}


def load_answers(folder: Path, revision: str) -> dict[str, dict]:
    """Return what the hub said before of shards at commit `revision`, by name.

    A line that is torn or altered does not count.
    """
    answers = {}
    path = folder / ANSWERS
    for line in path.read_bytes().splitlines() if path.is_file() else ():
        with suppress(ValueError, TypeError, KeyError, AttributeError):
            entry = json.loads(line)
            about = {"size": entry["size"], "sha256": entry["sha256"]}
            if entry["key"] == content_key(revision, entry["name"], about):
                answers[entry["name"]] = about
    return answers


def save_answer(folder: Path, revision: str, name: str, about: dict) -> None:
    """Keep what the hub said of a shard, so that a later run need not ask again."""
    entry = {"name": name, **about, "key": content_key(revision, name, about)}
    path = folder / ANSWERS
    # One write for a line, begun on a line of its own whatever an earlier run left.
    with naming(path), open(path, "ab", buffering=0) as file:
        file.write(f"\n{json.dumps(entry)}".encode())


def fetch_shards(
    session: Session,
    folder: Path,
    names: list[str],
    revision: str,
    answers: dict[str, dict],
    workers: int,
) -> dict[str, dict]:
    """Have shards in `folder` as of commit `revision`; return size + SHA-256 by name.

    answers: that of one of them at least. The others are asked about when their turn
    comes: the hub counts questions, and there are 6543. ConnectionError says which could
    not be had; OSError that there is no space for them.
    """
    answers = load_answers(folder, revision) | answers
    sizes = [about["size"] for about in answers.values()]
    typical = sum(sizes) // len(sizes)  # of a shard that was not asked about yet
    counted = {
        # What has its name is complete, as a rule.
        name: 0
        if (folder / name).exists()
        else answers.get(name, {"size": typical})["size"]
        for name in names
    }
    there = sum(
        p.stat().st_size for name in names for p in folder.glob(f".{name}.*.part")
    )
    total = sum(counted.values())
    check_free_space(folder, 2 * total - there)  # rows are about as large as the shards
    if total:
        count = sum(map(bool, counted.values()))
        text = f"shards: fetching {count} of {C.DATASET} at {revision}"
        to_come = metric(max(total - there, 0), "B")
        print(f"{text}, about {to_come} to come", flush=True)
    progress = Progress("fetching", "B", total, there)

    def have(name: str) -> dict:
        remote = answers.get(name)
        if not remote:
            ask = partial(stat_shard, session, revision, name)
            _, remote = persist(session, ask, name, progress)
            save_answer(folder, revision, name, remote)
        present = describe(folder / name) == remote
        progress.expect((0 if present else remote["size"]) - counted[name])
        if not present:
            url = address(revision, name)
            download_shard(session, url, folder / name, remote, progress)
        return remote

    return run_jobs({name: partial(have, name) for name in names}, workers, progress)
