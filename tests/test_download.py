"""Shards: complete or absent, never half; a missing one is a failure; the CDN sees no token."""

import base64
import email.utils
import hashlib
import itertools
import json
import math
import random
import re
import shutil
import socket
import ssl
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

import constants as C
import hub as hub_module
import prepare
from conftest import sentence, write_shard
from harness import download

NAMES = [C.SHARD_NAME.format(number) for number in (0, 1, 2, C.VAL_SHARD)]
AT_ONCE = [("401", "hub"), ("404", "hub"), ("loop", "hub")]  # another try would not help
IN_THE_END = [
    ("429", "hub"),
    ("500", "hub"),
    ("html", "hub"),
    ("404", "cdn"),
    ("500", "cdn"),
    ("html", "cdn"),
    ("changed", "cdn"),
    ("endless", "cdn"),
]


def get(name: str, folder: Path) -> dict:
    """Have one shard, and return its size and SHA-256."""
    return download.ensure_shards(folder, [name], {})[1][name]


def listing(folder: Path) -> list[str]:
    """Every file below `folder`, hidden ones included, but what the hub said of shards."""
    files = [p for p in folder.rglob("*") if p.is_file() and p.name != download.ANSWERS]
    return sorted(str(p.relative_to(folder)) for p in files)


def size_of(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def facts(path: Path) -> dict:
    body = path.read_bytes()
    return {"size": len(body), "sha256": hashlib.sha256(body).hexdigest()}


@pytest.fixture
def nowhere(monkeypatch) -> str:
    """An HF_ENDPOINT where nobody listens."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    monkeypatch.setenv("HF_ENDPOINT", url)
    monkeypatch.setattr(download.hub_constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(download, "RETRY_SECONDS", (0, 0))
    return url


@pytest.fixture
def waits(monkeypatch) -> list[float]:
    """The seconds that downloads would have waited, in a list that grows; nobody waits."""
    seen = []
    monkeypatch.setattr(
        download.Progress, "pause", lambda self, seconds: seen.append(seconds)
    )
    return seen


@pytest.fixture
def large_hub(tmp_path_factory, hub, monkeypatch) -> Iterator[hub_module.Hub]:
    """A hub whose shard is many times what is written at once."""
    text = random.Random(0).randbytes(300_000).hex()
    folder = tmp_path_factory.mktemp("large")
    write_shard(
        folder / NAMES[0], [text[k : k + 1000] for k in range(0, len(text), 1000)]
    )
    with hub_module.Hub(folder) as large:
        monkeypatch.setenv("HF_ENDPOINT", large.url)
        yield large


# ---- One shard ----------------------------------------------------------------------------------
def test_downloaded_shard_is_what_the_hub_has(hub, tmp_path):
    about = get(NAMES[0], tmp_path)
    assert (tmp_path / NAMES[0]).read_bytes() == hub.files[NAMES[0]].read_bytes()
    assert about == facts(hub.files[NAMES[0]])
    assert listing(tmp_path) == [NAMES[0]]


@pytest.mark.parametrize("kind, server", AT_ONCE + IN_THE_END)
def test_failed_download_names_the_shard_and_leaves_no_shard(hub, tmp_path, kind, server):
    hub.fail(kind, times=math.inf, server=server)
    with pytest.raises(ConnectionError, match=re.escape(NAMES[1])):
        get(NAMES[1], tmp_path)
    assert not (tmp_path / NAMES[1]).exists()
    tries = 1 if (kind, server) in AT_ONCE else len(download.RETRY_SECONDS)
    asked = [r for r in hub.requests if r.server == server and r.name == NAMES[1]]
    follow = download.MAX_REDIRECTS if kind == "loop" else 0
    assert len(asked) == tries + follow


@pytest.mark.parametrize("kind, server", IN_THE_END)
def test_download_recovers_when_a_later_try_is_right(hub, tmp_path, kind, server):
    hub.fail(kind, times=len(download.RETRY_SECONDS) - 1, server=server)
    assert get(NAMES[1], tmp_path) == facts(hub.files[NAMES[1]])
    assert (tmp_path / NAMES[1]).read_bytes() == hub.files[NAMES[1]].read_bytes()
    assert listing(tmp_path) == [NAMES[1]]


def test_each_try_waits_its_turn(hub, tmp_path, waits, monkeypatch):
    monkeypatch.setattr(download, "RETRY_SECONDS", (0, 1, 2))
    hub.fail("500", times=math.inf)
    with pytest.raises(ConnectionError):
        get(NAMES[0], tmp_path)
    assert waits == [0, 1, 2]
    assert hub.count("hub", "HEAD") == 3


@pytest.mark.parametrize("kind", ["429", "500"])
@pytest.mark.parametrize("after, seconds", [("7", 7), ("0", 1), ("soon", 1), ("-3", 1)])
def test_server_that_asks_to_wait_is_given_its_time(
    hub, tmp_path, waits, monkeypatch, kind, after, seconds
):
    monkeypatch.setattr(download, "RETRY_SECONDS", (0, 1, 2))
    hub.retry_after = after
    hub.fail(kind)
    get(NAMES[0], tmp_path)
    assert waits[:2] == [0, seconds]


def test_server_that_asks_for_hours_ends_it_with_that_number(hub, tmp_path):
    hub.retry_after = "7200"
    hub.fail("429")
    with pytest.raises(
        ConnectionError, match="answered 429 and asks to come back in 7200 s"
    ):
        get(NAMES[0], tmp_path)


def test_clock_that_jumps_changes_no_wait(hub, tmp_path, waits, monkeypatch):
    real, jumps = time.time, itertools.cycle([0, 10**8, -(10**8), 3600])
    hub.retry_after = email.utils.formatdate(real() + 9, usegmt=True)
    hub.fail("429", times=2)
    monkeypatch.setattr(time, "time", lambda: real() + next(jumps))
    monkeypatch.setattr(hub_module._Handler, "date_time_string", lambda *_: at_start)
    at_start = email.utils.formatdate(real(), usegmt=True)
    monkeypatch.setattr(download, "RETRY_SECONDS", (0, 1, 2))
    assert get(NAMES[0], tmp_path) == facts(hub.files[NAMES[0]])
    assert waits[:3] == [0, 9, 9]


# ---- TLS ----------------------------------------------------------------------------------------
@pytest.fixture(scope="session")
def certificate(tmp_path_factory) -> Path:
    return hub_module.make_certificate(tmp_path_factory.mktemp("tls") / "cert.pem")


@pytest.fixture
def tls_hub(hub, certificate, shard_folder, monkeypatch) -> Iterator[hub_module.Hub]:
    """A hub that speaks TLS, with a certificate that is trusted."""
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(certificate))
    with hub_module.Hub(shard_folder, certificate=certificate) as secure:
        monkeypatch.setenv("HF_ENDPOINT", secure.url)
        yield secure


def test_shards_come_over_tls(tls_hub, tmp_path):
    assert tls_hub.url.startswith("https://") and tls_hub.cdn_url.startswith("https://")
    assert download.ensure_shards(tmp_path, NAMES, {})[0] == tls_hub.commit
    assert listing(tmp_path) == sorted(NAMES)


def test_tls_handshake_that_is_cut_is_tried_again(tls_hub, tmp_path, capsys):
    tls_hub.cut_handshakes = 2
    assert get(NAMES[0], tmp_path) == facts(tls_hub.files[NAMES[0]])
    assert capsys.readouterr().out.count("again in") == 2


@pytest.mark.parametrize("server", ["hub", "cdn"])
def test_certificate_of_a_company_is_one_sentence_without_a_signed_address(
    hub, certificate, shard_folder, cache, monkeypatch, capfd, server
):
    with hub_module.Hub(shard_folder, certificate=certificate, secure=(server,)) as other:
        monkeypatch.setenv("HF_ENDPOINT", other.url)
        with pytest.raises(SystemExit) as end:
            prepare.main(["--num-shards", "1"])
        host = download.host_of(other.url if server == "hub" else other.cdn_url)
    said = end.value.code
    assert f"no secure connection to {host}: certificate verify failed" in said
    assert "set SSL_CERT_FILE" in said and "\n" not in said
    out = said + "".join(capfd.readouterr())
    assert "signature" not in out and "Traceback" not in out and "://" not in out
    assert out.count("again in") >= 2  # it was tried again


def test_variable_that_comes_first_is_the_one_that_is_named(monkeypatch):
    error = ssl.SSLCertVerificationError(1, "certificate verify failed")
    assert "set SSL_CERT_FILE to" in download.tell(error)
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", "/a/bundle.pem")
    assert "set REQUESTS_CA_BUNDLE to" in download.tell(error)


def test_plain_http_on_a_tls_port_is_a_connection_error(hub, cache, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", hub.url.replace("http", "https"))
    with pytest.raises(SystemExit, match="no secure connection to 127.0.0.1") as end:
        prepare.main(["--num-shards", "1"])
    assert "\n" not in end.value.code


def test_tls_connection_that_breaks_in_the_middle_goes_on_there(
    tls_hub, large_hub, certificate, tmp_path, monkeypatch
):
    folder = next(iter(large_hub.files.values())).parent
    with hub_module.Hub(folder, certificate=certificate) as secure:
        monkeypatch.setenv("HF_ENDPOINT", secure.url)
        secure.fail("reset")
        assert get(NAMES[0], tmp_path) == facts(secure.files[NAMES[0]])
        ranges = [r.headers.get("range") for r in secure.requests if r.server == "cdn"]
    assert len(ranges) == 2 and ranges[1] is not None


# ---- Where it broke, it goes on -----------------------------------------------------------------
@pytest.mark.parametrize("kind", ["truncated", "unsized", "reset", "stall"])
def test_download_goes_on_where_it_broke_however_often(
    large_hub, tmp_path, monkeypatch, kind
):
    monkeypatch.setattr(download, "HTTP_TIMEOUT", (5, 0.2))
    body = large_hub.files[NAMES[0]].read_bytes()
    large_hub.fail(kind, times=5)  # more than the tries that may fail in a row
    assert get(NAMES[0], tmp_path) == facts(large_hub.files[NAMES[0]])
    assert (tmp_path / NAMES[0]).read_bytes() == body
    ranges = [r.headers.get("range") for r in large_hub.requests if r.server == "cdn"]
    starts = [0] + [int(re.fullmatch(r"bytes=(\d+)-", text)[1]) for text in ranges[1:]]
    assert (
        len(starts) == 6 and starts == sorted(set(starts)) and starts[1] > len(body) // 4
    )
    assert listing(tmp_path) == [NAMES[0]]


def test_download_goes_on_in_a_later_run(large_hub, tmp_path, monkeypatch):
    large_hub.fail("truncated")
    large_hub.fail("404", times=math.inf, server="cdn")
    with pytest.raises(ConnectionError):
        get(NAMES[0], tmp_path)
    (part,) = tmp_path.iterdir()
    there, size = part.stat().st_size, large_hub.files[NAMES[0]].stat().st_size
    assert 0 < there < size
    large_hub.faults.clear()
    large_hub.requests.clear()
    assert get(NAMES[0], tmp_path) == facts(large_hub.files[NAMES[0]])
    asked = [r.headers.get("range") for r in large_hub.requests if r.server == "cdn"]
    assert asked == [f"bytes={there}-"]
    assert listing(tmp_path) == [NAMES[0]]


@pytest.mark.parametrize("kind", ["no ranges", "wrong range", "html", "500"])
def test_server_that_forgot_ranges_spoils_nothing(large_hub, tmp_path, kind):
    large_hub.fail("truncated")
    large_hub.fail(kind, server="cdn")
    assert get(NAMES[0], tmp_path) == facts(large_hub.files[NAMES[0]])
    ranges = [r.headers.get("range") for r in large_hub.requests if r.server == "cdn"]
    assert ranges[1] is not None and len(ranges) == (2 if kind == "no ranges" else 3)
    if kind != "no ranges":  # what had come was not thrown away for a page
        assert ranges[2] == ranges[1]


@pytest.mark.parametrize("kind", ["403 to a range", "416 to a range", "wrong range"])
def test_part_that_a_server_never_goes_on_with_is_begun_again(
    large_hub, tmp_path, monkeypatch, kind
):
    monkeypatch.setattr(download, "RETRY_SECONDS", (0,) * 4)
    large_hub.fail("truncated")
    large_hub.fail(kind, times=math.inf)
    assert get(NAMES[0], tmp_path) == facts(large_hub.files[NAMES[0]])
    ranges = [r.headers.get("range") for r in large_hub.requests if r.server == "cdn"]
    # Twice it was asked for the rest.
    assert ranges[1] and ranges[1:3] == [ranges[1]] * 2 and ranges[3:] == [None]


def test_part_without_the_size_of_the_whole_is_gone_on_with(large_hub, tmp_path):
    large_hub.fail("truncated")
    large_hub.fail("no total")
    assert get(NAMES[0], tmp_path) == facts(large_hub.files[NAMES[0]])
    assert large_hub.count("cdn", "GET") == 2


def test_server_that_sends_a_byte_at_a_time_is_given_up(hub, tmp_path, monkeypatch):
    monkeypatch.setattr(download, "FLOOR_SECONDS", 0.2)
    hub.fail("drip", times=math.inf)
    with pytest.raises(ConnectionError, match=r"sent \d bytes in 0 s, too slow to go on"):
        get(NAMES[0], tmp_path)
    assert hub.count("cdn", "GET") == len(download.RETRY_SECONDS)
    hub.faults.clear()
    assert get(NAMES[0], tmp_path) == facts(hub.files[NAMES[0]])


@pytest.mark.parametrize("server", ["hub", "cdn"])
def test_head_of_an_answer_that_comes_a_byte_at_a_time_is_given_up(
    hub, tmp_path, monkeypatch, server
):
    monkeypatch.setattr(download, "ANSWER_SECONDS", 0.3)
    hub.fail("dripping head", times=math.inf, server=server)
    with pytest.raises(ConnectionError, match="127.0.0.1:.* did not answer within 0.3"):
        get(NAMES[0], tmp_path)
    tries = [r for r in hub.requests if r.server == server]
    assert len(tries) == len(download.RETRY_SECONDS)
    hub.faults.clear()
    assert get(NAMES[0], tmp_path) == facts(hub.files[NAMES[0]])


def test_first_word_comes_before_a_blocked_network_is_waited_for(hub, tmp_path, capsys):
    def ask(*_):
        assert f"asking {download.host_of(hub.url)} for 1 of" in capsys.readouterr().out
        raise download.Refused("enough is known")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(download, "stat_shard", ask)
        with pytest.raises(ConnectionError, match="enough is known"):
            get(NAMES[0], tmp_path)


@pytest.mark.parametrize("size", [10, 10**7])
def test_part_that_is_wrong_or_too_long_is_thrown_away(large_hub, tmp_path, size):
    remote = facts(large_hub.files[NAMES[0]])
    download.part_of(tmp_path / NAMES[0], remote).write_bytes(b"x" * size)
    assert get(NAMES[0], tmp_path) == remote
    assert facts(tmp_path / NAMES[0]) == remote
    assert listing(tmp_path) == [NAMES[0]]


def test_part_of_another_content_is_not_gone_on_with(large_hub, tmp_path):
    other = download.part_of(tmp_path / NAMES[0], {"sha256": "0" * 64})
    other.write_bytes(b"PAR1 of an older revision")
    get(NAMES[0], tmp_path)
    assert [r.headers.get("range") for r in large_hub.requests if r.server == "cdn"] == [
        None
    ]
    assert listing(tmp_path) == [NAMES[0]]


def test_endless_body_does_not_fill_the_disk(hub, tmp_path, monkeypatch):
    sizes, real = [], download.describe
    monkeypatch.setattr(
        download, "describe", lambda p: sizes.append(size_of(p)) or real(p)
    )
    hub.fail("endless", times=math.inf)
    with pytest.raises(ConnectionError, match="SHA-256|more than"):
        get(NAMES[0], tmp_path)
    assert max(sizes) < hub.files[NAMES[0]].stat().st_size + 2**17


def test_identical_file_is_not_downloaded_again(hub, tmp_path):
    first = get(NAMES[0], tmp_path)
    assert hub.count("cdn", "GET") == 1
    assert get(NAMES[0], tmp_path) == first
    assert hub.count("cdn", "GET") == 1


@pytest.mark.parametrize("damage", ["one byte changed", "cut short", "empty"])
def test_corrupt_file_is_replaced(hub, tmp_path, damage):
    good = hub.files[NAMES[0]].read_bytes()
    changed = good[:100] + bytes([good[100] ^ 1]) + good[101:]
    bad = {"one byte changed": changed, "cut short": good[:-1], "empty": b""}[damage]
    (tmp_path / NAMES[0]).write_bytes(bad)
    get(NAMES[0], tmp_path)
    assert (tmp_path / NAMES[0]).read_bytes() == good
    assert listing(tmp_path) == [NAMES[0]]


# ---- Several shards -----------------------------------------------------------------------------
def test_all_shards_are_fetched_once_and_described(hub, tmp_path):
    revision, shards = download.ensure_shards(tmp_path, NAMES, {})
    assert revision == hub.commit
    assert shards == {name: facts(hub.files[name]) for name in NAMES}
    assert list(shards) == NAMES
    assert listing(tmp_path) == sorted(NAMES)
    assert [hub.count("cdn", "GET", name) for name in NAMES] == [1] * len(NAMES)
    place = f"/datasets/{C.DATASET}/resolve/"
    assert all(r.path.startswith(place) for r in hub.requests if r.server == "hub")


@pytest.mark.parametrize("server", ["hub", "cdn"])
def test_any_missing_shard_is_an_error_that_names_it(hub, tmp_path, server):
    missing = [NAMES[1], NAMES[3]]
    for name in missing:
        hub.fail("404", name, times=math.inf, server=server)
    with pytest.raises(ConnectionError) as error:
        download.ensure_shards(tmp_path, NAMES, {})
    assert {name: name in str(error.value) for name in NAMES} == {
        name: name in missing for name in NAMES
    }
    assert listing(tmp_path) == [NAMES[0], NAMES[2]]  # they are not lost to it


def test_dead_network_ends_it_before_every_shard_was_tried(hub, tmp_path):
    hub.fail("500", times=math.inf, server="cdn")
    with pytest.raises(ConnectionError, match="^1 of 4 failed, 0 are done"):
        download.ensure_shards(tmp_path, NAMES, {}, workers=1)
    assert len({r.name for r in hub.requests if r.server == "cdn"}) < 4


def test_shard_that_the_hub_does_not_have_is_an_error(hub, tmp_path):
    with pytest.raises(ConnectionError, match="shard_00007.parquet"):
        download.ensure_shards(tmp_path, [NAMES[0], "shard_00007.parquet"], {})


def test_everything_after_the_first_contact_asks_for_the_commit(hub, tmp_path):
    download.ensure_shards(tmp_path, NAMES, {})
    revisions = [r.path.split("/")[5] for r in hub.requests if r.server == "hub"]
    assert revisions[0] == "main"
    assert len(revisions) > len(NAMES)
    assert set(revisions[1:]) == {hub.commit}


def test_later_downloads_stay_at_the_recorded_commit(hub, tmp_path):
    revision, shards = download.ensure_shards(tmp_path, NAMES[:2], {})
    hub.requests.clear()
    manifest = {"revision": revision, "shards": shards}
    assert download.ensure_shards(tmp_path, NAMES, manifest)[0] == hub.commit
    asked = [r for r in hub.requests if r.server == "hub"]
    assert {r.path.split("/")[5] for r in asked} == {hub.commit}
    assert {r.name for r in asked} == set(NAMES[2:])


def test_recorded_shards_need_no_network(hub, tmp_path, nowhere):
    shards = {name: facts(path) for name, path in hub.files.items()}
    for path in hub.files.values():
        shutil.copy(path, tmp_path)
    manifest = {"revision": "a" * 40, "shards": shards}
    assert download.ensure_shards(tmp_path, NAMES, manifest) == ("a" * 40, shards)
    assert hub.requests == []


@pytest.mark.parametrize("damage", ["cut short", "one byte changed"])
def test_recorded_shard_that_was_damaged_is_fetched_again(hub, tmp_path, damage):
    revision, shards = download.ensure_shards(tmp_path, NAMES, {})
    good = (tmp_path / NAMES[2]).read_bytes()
    end = {"cut short": b"", "one byte changed": bytes([good[-1] ^ 1])}[damage]
    (tmp_path / NAMES[2]).write_bytes(good[:-1] + end)
    download.ensure_shards(tmp_path, NAMES, {"revision": revision, "shards": shards})
    assert (tmp_path / NAMES[2]).read_bytes() == good
    assert hub.count("cdn", "GET", NAMES[2]) == 2
    assert hub.count("cdn", "GET") == len(NAMES) + 1


def test_token_goes_to_the_hub_and_never_to_the_cdn(hub, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))  # would take the token's place
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login somebody password other\n")
    hub.fail("moved", NAMES[1])
    download.ensure_shards(tmp_path / "shards", NAMES, {})
    sent = {(r.server, r.headers.get("authorization")) for r in hub.requests}
    assert ("hub", "Bearer hf_secret") in sent
    assert not any(
        auth and "hf_secret" in auth for server, auth in sent if server == "cdn"
    )
    assert {auth for server, auth in sent if server == "hub"} == {"Bearer hf_secret"}
    assert not any("hf_secret" in r.path for r in hub.requests)
    assert any("/moved/" in r.path for r in hub.requests)


@pytest.mark.parametrize("kind, server", AT_ONCE + IN_THE_END)
def test_token_appears_in_no_message(hub, cache, monkeypatch, capfd, kind, server):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    hub.fail(kind, times=math.inf, server=server)
    with pytest.raises(SystemExit) as end:
        prepare.main(["--num-shards", "1"])
    said = str(end.value.code) + "".join(capfd.readouterr())
    assert (
        "hf_secret" not in said and "signature" not in said
    )  # nor the CDN's signed address


@pytest.mark.parametrize(
    "token", ["hf_se\tcret", "hf_se cret", "hf_secr\N{HORIZONTAL ELLIPSIS}t"]
)
def test_token_that_no_header_can_hold_is_an_error_that_does_not_show_it(
    hub, cache, monkeypatch, token
):
    monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(SystemExit, match="HF_TOKEN holds characters") as end:
        prepare.main(["--num-shards", "1"])
    assert "hf_se" not in end.value.code and hub.requests == []


def test_token_that_is_refused_is_told_apart_from_none_at_all(hub, cache, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_old")
    hub.fail("401", times=math.inf)
    with pytest.raises(SystemExit) as end:
        prepare.main(["--num-shards", "1"])
    assert "it does not accept HF_TOKEN; renew it, or unset it" in end.value.code
    # The hub's own words, without addresses and without the token that it sent back.
    assert "answered 401 (Invalid credentials in Bearer ..., see ...)" in end.value.code
    assert "set HF_TOKEN" not in end.value.code


def test_login_of_the_hub_s_own_command_is_used(hub, tmp_path, monkeypatch):
    (tmp_path / "token").write_text("hf_of_a_login\n")
    path = str(tmp_path / "token")
    monkeypatch.setattr(download.hub_constants, "HF_TOKEN_PATH", path)
    get(NAMES[0], tmp_path / "shards")
    sent = {r.headers.get("authorization") for r in hub.requests if r.server == "hub"}
    assert sent == {"Bearer hf_of_a_login"}
    monkeypatch.setenv("HF_TOKEN", "hf_set")  # comes first
    hub.requests.clear()
    get(NAMES[1], tmp_path / "shards")
    assert hub.requests[0].headers["authorization"] == "Bearer hf_set"
    monkeypatch.setattr(download.hub_constants, "HF_HUB_DISABLE_IMPLICIT_TOKEN", True)
    hub.requests.clear()
    get(NAMES[2], tmp_path / "shards")
    assert not any("authorization" in r.headers for r in hub.requests)


def test_offline_mode_asks_nobody_and_is_named(hub, cache, monkeypatch):
    prepare.main(["--num-shards", "1"])
    monkeypatch.setattr(download.hub_constants, "HF_HUB_OFFLINE", True)
    hub.requests.clear()
    prepare.main([])  # all is there
    with pytest.raises(SystemExit, match="HF_HUB_OFFLINE is set, .*; unset it"):
        prepare.main(["--num-shards", "2"])
    assert hub.requests == []


def test_credentials_of_a_mirror_s_address_are_sent_and_never_shown(
    hub, cache, monkeypatch, capfd
):
    monkeypatch.setenv("HF_ENDPOINT", hub.url.replace("://", "://me:pass%20word@"))
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    prepare.main(["--num-shards", "1"])
    sent = {(r.server, r.headers.get("authorization")) for r in hub.requests}
    basic = "Basic " + base64.b64encode(b"me:pass word").decode()
    assert sent == {("hub", basic), ("cdn", None)}
    hub.fail("401", times=math.inf)
    with pytest.raises(
        SystemExit, match="does not accept the login in HF_ENDPOINT"
    ) as end:
        prepare.main(["--num-shards", "2"])
    said = end.value.code + "".join(capfd.readouterr())
    assert "pass word" not in said and "pass%20" not in said and basic[6:] not in said


def test_certificate_of_the_user_is_believed(
    hub, certificate, shard_folder, tmp_path, monkeypatch
):
    with hub_module.Hub(shard_folder, certificate=certificate) as secure:
        monkeypatch.setenv("HF_ENDPOINT", secure.url)
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
        get(NAMES[0], tmp_path)
    assert listing(tmp_path) == [NAMES[0]]


def test_certificate_file_that_is_not_there_is_named_at_once(cache, nowhere, monkeypatch):
    monkeypatch.setenv("SSL_CERT_FILE", "/nowhere/ca.pem")
    with pytest.raises(SystemExit, match="SSL_CERT_FILE names /nowhere/ca.pem, which is"):
        prepare.main(["--num-shards", "1"])


def test_proxy_that_wants_a_login_is_named(hub, cache, monkeypatch, nowhere):
    # The stand-in plays the proxy: it answers what is sent through it.
    monkeypatch.setenv("HF_ENDPOINT", "http://hub.invalid")
    monkeypatch.setenv("HTTP_PROXY", hub.url)
    hub.fail("407", times=math.inf)
    with pytest.raises(SystemExit, match="the proxy wants a login: set HTTPS_PROXY"):
        prepare.main(["--num-shards", "1"])
    assert len(hub.requests) == 1
    monkeypatch.setenv("HF_ENDPOINT", "https://hub.invalid")  # by a tunnel
    monkeypatch.setenv("HTTPS_PROXY", hub.url)
    monkeypatch.setattr(
        hub_module._Handler,
        "do_CONNECT",
        lambda self: self.reply(407, b""),
        raising=False,
    )
    with pytest.raises(SystemExit, match="the proxy wants a login: set HTTPS_PROXY"):
        prepare.main(["--num-shards", "1"])


@pytest.mark.skipif(bool(find_spec("socks")), reason="pysocks is installed")
def test_socks_proxy_without_its_package_is_named_at_once(hub, cache, monkeypatch):
    monkeypatch.setenv("ALL_PROXY", "socks5h://127.0.0.1:9")
    command = "run `uv run --with pysocks prepare.py --num-shards 1`$"
    with pytest.raises(SystemExit, match=command):
        prepare.main(["--num-shards", "1"])


@pytest.mark.parametrize("endpoint", ["huggingface.co", "ftp://127.0.0.1", "http://"])
def test_endpoint_that_is_no_address_is_named(cache, monkeypatch, endpoint):
    monkeypatch.setenv("HF_ENDPOINT", endpoint)
    with pytest.raises(SystemExit, match="HF_ENDPOINT is no address"):
        prepare.main(["--num-shards", "1"])


def test_login_that_is_needed_is_said_at_once_with_what_to_do(hub, cache):
    hub.fail("401", times=math.inf)
    with pytest.raises(
        SystemExit, match="answered 401: it wants a login: run .* HF_TOKEN"
    ):
        prepare.main(["--num-shards", "1"])
    assert len(hub.requests) == 1


def test_a_plain_run_after_a_number_of_shards_keeps_to_it_and_fetches_no_more(hub, cache):
    prepare.main(["--num-shards", "2"])
    hub.requests.clear()
    prepare.main([])
    assert hub.requests == []
    assert len(json.loads((cache / "manifest.json").read_text())["shards"]) == 3


def test_commit_that_is_gone_from_the_hub_is_said_with_what_to_do(hub, cache):
    prepare.main(["--num-shards", "1"])
    old, hub.commit = hub.commit, "b" * 40  # the history was rewritten
    prepare.main(["--num-shards", "1"])  # nothing is missing: nobody is asked
    with pytest.raises(
        SystemExit, match=f"does not have the commit .* of {old}; delete .*manifest.json"
    ) as end:
        prepare.main(["--num-shards", "2"])
    hub.requests.clear()
    Path(re.search(r"delete (\S+)", end.value.code)[1]).unlink()
    prepare.main(["--num-shards", "2"])
    assert json.loads((cache / "manifest.json").read_text())["revision"] == hub.commit
    assert {r.name for r in hub.requests if r.server == "cdn"} == {NAMES[1]}


def test_data_set_with_a_new_name_is_followed_within_the_hub(hub, tmp_path):
    hub.fail("moved", times=1)
    assert get(NAMES[0], tmp_path) == facts(hub.files[NAMES[0]])
    assert "/moved/" in hub.requests[1].path


def test_names_and_commits_from_a_server_are_not_used_as_paths(hub, tmp_path):
    hub.commit = "../../../../tmp"
    with pytest.raises(ConnectionError, match="not the hub"):
        get(NAMES[0], tmp_path / "shards")
    assert listing(tmp_path) == []


def test_free_disk_is_checked_before_the_first_byte(hub, cache, monkeypatch):
    usage = shutil.disk_usage(cache.parent.parent)._replace(free=50_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(
        SystemExit, match="has 50.00 kB free, and shards and rows need .* free some"
    ):
        prepare.main(["--num-shards", "2"])
    assert hub.count("cdn", "GET") == 0


def test_workers_are_as_many_as_are_asked_for(hub, cache):
    hub.rate, busy, most, real = 100_000, [], [], download.fetch

    def fetch(*args):
        busy.append(1)
        most.append(len(busy))
        real(*args)
        busy.pop()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(download, "fetch", fetch)
        prepare.main(["--num-shards", "3", "--download-workers", "2"])
    assert max(most) == 2


def test_without_a_token_no_authorization_is_sent(hub, tmp_path):
    download.ensure_shards(tmp_path, NAMES, {})
    assert not any("authorization" in r.headers for r in hub.requests)


def test_endpoint_may_end_in_a_slash(hub, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", hub.url + "/")
    download.ensure_shards(tmp_path, NAMES[:1], {})
    assert listing(tmp_path) == [NAMES[0]]


def test_page_of_a_captive_portal_is_not_taken_for_the_hub(hub, tmp_path):
    hub.fail("html", times=math.inf)
    with pytest.raises(ConnectionError, match="not the hub") as error:
        download.ensure_shards(tmp_path, NAMES, {})
    assert "127.0.0.1" in str(error.value)
    assert listing(tmp_path) == []


def test_unreachable_hub_is_a_connection_error(nowhere, tmp_path):
    with pytest.raises(ConnectionError, match=re.escape(C.DATASET)):
        download.ensure_shards(tmp_path, NAMES, {})
    assert listing(tmp_path) == []


# ---- Mirrors ------------------------------------------------------------------------------------
@pytest.mark.parametrize("tls", [False, True])
def test_mirror_that_sends_to_another_host_works_and_that_sees_no_token(
    hub, certificate, shard_folder, tmp_path, monkeypatch, tls
):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    with hub_module.Hub(shard_folder, certificate=certificate if tls else None) as mirror:
        hub.mirror_of = mirror.url  # from http to https, or to another port
        download.ensure_shards(tmp_path / "shards", NAMES, {})
        sent = [r.headers.get("authorization") for r in mirror.requests]
    assert listing(tmp_path / "shards") == sorted(NAMES)
    assert sent and set(sent) == {None}
    assert hub.requests[0].headers["authorization"] == "Bearer hf_secret"


def test_mirror_that_sends_the_files_itself_works(hub, tmp_path):
    hub.direct = True
    revision, shards = download.ensure_shards(tmp_path, NAMES, {})
    assert revision == hub.commit
    assert shards == {name: facts(hub.files[name]) for name in NAMES}
    assert hub.count("cdn", "GET") == 0


def test_mirror_that_leaves_tls_is_not_followed(tls_hub, hub, tmp_path):
    tls_hub.mirror_of = hub.url
    with pytest.raises(
        ConnectionError, match="HF_ENDPOINT names 127.0.0.1:.*fix or unset"
    ):
        get(NAMES[0], tmp_path)
    assert hub.requests == []


# ---- Many shards, and a hub that counts its requests --------------------------------------------
@pytest.fixture
def many(tmp_path_factory, hub, monkeypatch) -> Iterator[hub_module.Hub]:
    """A hub with 12 shards that answers 10 requests in a second."""
    folder = tmp_path_factory.mktemp("many")
    for number in range(12):
        write_shard(folder / C.SHARD_NAME.format(number), [f"shard {number}"])
    with hub_module.Hub(folder) as large:
        large.quota = (10, 1)
        monkeypatch.setenv("HF_ENDPOINT", large.url)
        yield large


def test_many_shards_from_a_hub_that_counts_requests_end(many, tmp_path, capsys):
    download.ensure_shards(tmp_path, list(many.files), {})
    assert listing(tmp_path) == list(many.files)
    # Each shard takes a question and a fetch. No thread has to be told twice to wait.
    asked = many.count("hub", "HEAD") + many.count("hub", "GET")
    assert asked <= 1 + 2 * 12 + 2 * download.DOWNLOADS


def test_limit_of_requests_is_waited_out_as_the_hub_says(many, tmp_path, waits):
    many.quota = (1, 290)
    with pytest.raises(ConnectionError, match="answered 429"):
        download.ensure_shards(tmp_path, list(many.files), {})
    assert waits[0] == 0 and all(280 < seconds <= 291 for seconds in waits[1:])


def test_run_that_was_stopped_asks_only_about_the_rest(many, tmp_path):
    many.quota = None
    many.fail("404", times=math.inf, server="cdn")
    with pytest.raises(ConnectionError):
        download.ensure_shards(tmp_path, list(many.files), {}, workers=4)
    told = {r.name for r in many.requests if r.method == "HEAD"}
    assert 4 <= len(told) < 12
    with open(tmp_path / download.ANSWERS, "ab") as file:
        file.write(b'\n{"name": "shard_00')  # killed in the middle of a line
    many.faults.clear()
    many.requests.clear()
    download.ensure_shards(tmp_path, list(many.files), {})
    asked = [r.name for r in many.requests if r.method == "HEAD"]
    first = next(iter(many.files))  # asked again for the commit that `main` stands for
    assert sorted(asked) == sorted({*many.files} - told | {first})


def test_altered_answer_is_asked_again(many, tmp_path):
    many.quota = None
    names = list(many.files)
    download.ensure_shards(tmp_path, names, {})
    path = tmp_path / download.ANSWERS
    path.write_bytes(path.read_bytes().replace(b'"size": ', b'"size": 1'))
    (tmp_path / names[3]).unlink()
    assert download.ensure_shards(tmp_path, names, {})[1][names[3]] == facts(
        many.files[names[3]]
    )


def test_shard_of_the_manifest_that_is_gone_is_fetched_without_a_question(hub, tmp_path):
    revision, shards = download.ensure_shards(tmp_path, NAMES, {})
    (tmp_path / NAMES[1]).unlink()
    hub.requests.clear()
    download.ensure_shards(tmp_path, NAMES, {"revision": revision, "shards": shards})
    assert (tmp_path / NAMES[1]).read_bytes() == hub.files[NAMES[1]].read_bytes()
    assert [(r.server, r.method) for r in hub.requests] == [
        ("hub", "GET"),
        ("cdn", "GET"),
    ]


def test_shards_are_fetched_while_others_are_not_asked_about_yet(hub, tmp_path):
    download.ensure_shards(tmp_path, NAMES, {}, workers=1)
    kinds = [(r.method, r.name) for r in hub.requests if r.server == "hub"]
    assert kinds.index(("GET", NAMES[0])) < kinds.index(("HEAD", NAMES[3]))


# ---- The command --------------------------------------------------------------------------------
def test_command_downloads_and_prepares_from_the_hub(hub, cache, capsys):
    prepare.main(["--num-shards", "2"])
    names = [NAMES[0], NAMES[1], NAMES[3]]
    assert listing(cache / "shards") == sorted(names)
    manifest = json.loads((cache / "manifest.json").read_text())
    assert manifest["revision"] == hub.commit
    assert manifest["shards"] == {name: facts(hub.files[name]) for name in names}
    assert capsys.readouterr().out.endswith("prepared\n")


@pytest.mark.parametrize("kind, server", AT_ONCE + IN_THE_END)
def test_command_fails_with_one_sentence_when_a_shard_is_missing(
    hub, cache, kind, server
):
    hub.fail(kind, NAMES[1], times=math.inf, server=server)
    with pytest.raises(SystemExit) as end:
        prepare.main(["--num-shards", "2"])
    message = end.value.code  # a text: printed to stderr, exit status 1
    assert isinstance(message, str) and "\n" not in message
    assert message.startswith("prepare.py: ") and NAMES[1] in message
    assert not (cache / "manifest.json").exists()
    assert NAMES[1] not in listing(cache / "shards")


def test_command_fails_with_one_sentence_without_a_network(nowhere, cache):
    with pytest.raises(SystemExit) as end:
        prepare.main(["--num-shards", "1"])
    message = end.value.code
    assert isinstance(message, str) and "\n" not in message
    assert C.DATASET in message
    assert listing(cache) == [".lock"]


def test_a_hub_that_cannot_be_reached_is_said_with_what_does_without_it(
    nowhere, cache, waits
):
    said = sentence(prepare.main, ["--num-shards", "1"])
    assert "Connection refused; run `uv run prepare.py --num-shards 1` again" in said
    assert said.endswith(f"; {download.NO_HUB}")
    page = (Path(C.__file__).parent / "docs" / "install.md").read_text("utf-8")
    assert "HF_ENDPOINT" in page and "--source DIR" in page


def test_a_hub_that_answers_is_not_said_to_be_out_of_reach(hub, cache, waits):
    hub.fail("500", times=math.inf)
    said = sentence(prepare.main, ["--num-shards", "1"])
    assert "answered 500" in said and "mirror" not in said


@pytest.mark.parametrize("there", ["nothing", "a part", "a shard", "an answer"])
def test_the_first_word_of_a_hub_is_waited_for_a_minute_only_if_something_has_come(
    nowhere, cache, waits, monkeypatch, there
):
    monkeypatch.setattr(download, "RETRY_SECONDS", (0, 1, 2, 4, 8, 16, 32))
    shards = cache / "shards"
    shards.mkdir(parents=True)
    if there == "an answer":
        download.save_answer(shards, "a" * 40, NAMES[1], {"size": 1, "sha256": "b" * 64})
    elif there != "nothing":
        name = NAMES[1] if there == "a shard" else f".{NAMES[1]}.{'a' * 12}.part"
        (shards / name).write_bytes(b"PAR1")
    sentence(prepare.main, ["--num-shards", "2"])
    assert sum(waits) == (15 if there == "nothing" else 63)


# ---- The stand-in itself ------------------------------------------------------------------------
def test_stand_in_serves_a_folder_and_those_below_from_the_command_line(
    shard_folder, tmp_path
):
    shutil.copytree(shard_folder, tmp_path / "some" / "where")
    command = [sys.executable, hub_module.__file__, str(tmp_path), "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            url = process.stdout.readline().strip()
            address = f"{url}/datasets/{C.DATASET}/resolve/main/{NAMES[0]}"
            with urllib.request.urlopen(address, timeout=10) as answer:
                body = answer.read()
        finally:
            process.kill()
    assert body == (shard_folder / NAMES[0]).read_bytes()


@pytest.mark.parametrize("url", ["http://192.0.2.1/", "https://huggingface.co/"])
def test_no_test_reaches_the_network(url):
    with pytest.raises(pytest.fail.Exception, match="reached for the network"):
        urllib.request.urlopen(url, timeout=1)
