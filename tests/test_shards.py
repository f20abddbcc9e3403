"""Shards: complete or absent, never half; a missing one is a failure; the CDN sees no token."""

import hashlib
import json
import math
import re
import shutil
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path

import hub as hub_module
import pytest

import constants as C
import prepare

NAMES = [C.SHARD_NAME.format(number) for number in (0, 1, 2, C.VAL_SHARD)]
FAULTS = [
    ("404", "hub"),
    ("500", "hub"),
    ("html", "hub"),
    ("404", "cdn"),
    ("500", "cdn"),
    ("html", "cdn"),
    ("truncated", "cdn"),
    ("changed", "cdn"),
]


def download(name: str, folder: Path) -> dict:
    """Have one shard, and return its size and SHA-256."""
    return prepare.ensure_shards(folder, [name], {})[1][name]


def listing(folder: Path) -> list[str]:
    """Every file below `folder`, hidden ones included."""
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


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
    monkeypatch.setattr(prepare, "RETRY_SECONDS", (0, 0))
    return url


@pytest.fixture
def cache(tmp_path, monkeypatch, full_rules) -> Path:
    """The folder that `prepare.main` prepares under the full rules, still missing."""
    monkeypatch.setenv("AUTORESEARCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(prepare, "load_flash_attention", lambda: None)
    return tmp_path / "cache" / "climbmix"


# ---- One shard ----------------------------------------------------------------------------------
def test_downloaded_shard_is_what_the_hub_has(hub, tmp_path):
    about = download(NAMES[0], tmp_path)
    assert (tmp_path / NAMES[0]).read_bytes() == hub.files[NAMES[0]].read_bytes()
    assert about == facts(hub.files[NAMES[0]])
    assert listing(tmp_path) == [NAMES[0]]


@pytest.mark.parametrize("kind, server", FAULTS)
def test_failed_download_names_the_shard_and_leaves_nothing(hub, tmp_path, kind, server):
    hub.fail(kind, times=math.inf, server=server)
    with pytest.raises(ConnectionError, match=re.escape(NAMES[1])):
        download(NAMES[1], tmp_path)
    assert listing(tmp_path) == []


@pytest.mark.parametrize("kind, server", FAULTS)
def test_download_recovers_when_a_later_try_is_right(hub, tmp_path, kind, server):
    hub.fail(kind, times=len(prepare.RETRY_SECONDS) - 1, server=server)
    assert download(NAMES[1], tmp_path) == facts(hub.files[NAMES[1]])
    assert (tmp_path / NAMES[1]).read_bytes() == hub.files[NAMES[1]].read_bytes()
    assert listing(tmp_path) == [NAMES[1]]


def test_each_try_waits_its_turn(hub, tmp_path, monkeypatch):
    waits = []
    monkeypatch.setattr(prepare, "RETRY_SECONDS", (0, 1, 2))
    monkeypatch.setattr(prepare.time, "sleep", waits.append)
    hub.fail("500", times=math.inf)
    with pytest.raises(ConnectionError):
        download(NAMES[0], tmp_path)
    assert waits == [0, 1, 2]
    assert hub.count("hub", "HEAD") == 3


def test_identical_file_is_not_downloaded_again(hub, tmp_path):
    first = download(NAMES[0], tmp_path)
    assert hub.count("cdn", "GET") == 1
    assert download(NAMES[0], tmp_path) == first
    assert hub.count("cdn", "GET") == 1


@pytest.mark.parametrize("damage", ["one byte changed", "cut short", "empty"])
def test_corrupt_file_is_replaced(hub, tmp_path, damage):
    good = hub.files[NAMES[0]].read_bytes()
    changed = good[:100] + bytes([good[100] ^ 1]) + good[101:]
    bad = {"one byte changed": changed, "cut short": good[:-1], "empty": b""}[damage]
    (tmp_path / NAMES[0]).write_bytes(bad)
    download(NAMES[0], tmp_path)
    assert (tmp_path / NAMES[0]).read_bytes() == good
    assert listing(tmp_path) == [NAMES[0]]


def test_failed_block_leaves_the_old_file_and_no_temporary_one(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with pytest.raises(KeyboardInterrupt):
        with prepare.atomic_write(path) as file:
            file.write(b"half of the new")
            file.flush()
            assert path.read_bytes() == b"old"
            raise KeyboardInterrupt
    assert (listing(tmp_path), path.read_bytes()) == (["file"], b"old")


# ---- Several shards -----------------------------------------------------------------------------
def test_all_shards_are_fetched_once_and_described(hub, tmp_path):
    revision, shards = prepare.ensure_shards(tmp_path, NAMES, {})
    assert revision == hub.commit
    assert shards == {name: facts(hub.files[name]) for name in NAMES}
    assert list(shards) == NAMES
    assert listing(tmp_path) == sorted(NAMES)
    assert [hub.count("cdn", "GET", name) for name in NAMES] == [1] * len(NAMES)
    place = f"/datasets/{C.DATASET}/resolve/"
    assert all(r.path.startswith(place) for r in hub.requests if r.server == "hub")


def test_any_missing_shard_is_an_error_that_names_it(hub, tmp_path):
    missing = [NAMES[1], NAMES[3]]
    for name in missing:
        hub.fail("404", name, times=math.inf)
    with pytest.raises(ConnectionError) as error:
        prepare.ensure_shards(tmp_path, NAMES, {})
    assert {name: name in str(error.value) for name in NAMES} == {
        name: name in missing for name in NAMES
    }
    assert listing(tmp_path) == [NAMES[0], NAMES[2]]


def test_shard_that_the_hub_does_not_have_is_an_error(hub, tmp_path):
    with pytest.raises(ConnectionError, match="shard_00007.parquet"):
        prepare.ensure_shards(tmp_path, [NAMES[0], "shard_00007.parquet"], {})


def test_everything_after_the_first_contact_asks_for_the_commit(hub, tmp_path):
    prepare.ensure_shards(tmp_path, NAMES, {})
    revisions = [r.path.split("/")[5] for r in hub.requests if r.server == "hub"]
    assert revisions[0] == "main"
    assert len(revisions) > len(NAMES)
    assert set(revisions[1:]) == {hub.commit}


def test_later_downloads_stay_at_the_recorded_commit(hub, tmp_path):
    revision, shards = prepare.ensure_shards(tmp_path, NAMES[:2], {})
    hub.requests.clear()
    manifest = {"revision": revision, "shards": shards}
    assert prepare.ensure_shards(tmp_path, NAMES, manifest)[0] == hub.commit
    asked = [r for r in hub.requests if r.server == "hub"]
    assert {r.path.split("/")[5] for r in asked} == {hub.commit}
    assert {r.name for r in asked} == set(NAMES[2:])


def test_recorded_shards_need_no_network(hub, tmp_path, nowhere):
    shards = {name: facts(path) for name, path in hub.files.items()}
    for path in hub.files.values():
        shutil.copy(path, tmp_path)
    manifest = {"revision": "a" * 40, "shards": shards}
    assert prepare.ensure_shards(tmp_path, NAMES, manifest) == ("a" * 40, shards)
    assert hub.requests == []


@pytest.mark.parametrize("damage", ["cut short", "one byte changed"])
def test_recorded_shard_that_was_damaged_is_fetched_again(hub, tmp_path, damage):
    revision, shards = prepare.ensure_shards(tmp_path, NAMES, {})
    good = (tmp_path / NAMES[2]).read_bytes()
    end = {"cut short": b"", "one byte changed": bytes([good[-1] ^ 1])}[damage]
    (tmp_path / NAMES[2]).write_bytes(good[:-1] + end)
    prepare.ensure_shards(tmp_path, NAMES, {"revision": revision, "shards": shards})
    assert (tmp_path / NAMES[2]).read_bytes() == good
    assert hub.count("cdn", "GET", NAMES[2]) == 2
    assert hub.count("cdn", "GET") == len(NAMES) + 1


def test_token_goes_to_the_hub_and_never_to_the_cdn(hub, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    prepare.ensure_shards(tmp_path, NAMES, {})
    sent = {(r.server, r.headers.get("authorization")) for r in hub.requests}
    assert sent == {("hub", "Bearer hf_secret"), ("cdn", None)}
    assert not any("hf_secret" in r.path for r in hub.requests)


def test_without_a_token_no_authorization_is_sent(hub, tmp_path):
    prepare.ensure_shards(tmp_path, NAMES, {})
    assert not any("authorization" in r.headers for r in hub.requests)


def test_endpoint_may_end_in_a_slash(hub, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", hub.url + "/")
    prepare.ensure_shards(tmp_path, NAMES[:1], {})
    assert listing(tmp_path) == [NAMES[0]]


def test_page_of_a_captive_portal_is_not_taken_for_the_hub(hub, tmp_path):
    hub.fail("html", times=math.inf)
    with pytest.raises(ConnectionError, match="not the hub") as error:
        prepare.ensure_shards(tmp_path, NAMES, {})
    assert hub.url in str(error.value)
    assert listing(tmp_path) == []


def test_unreachable_hub_is_a_connection_error(nowhere, tmp_path):
    with pytest.raises(ConnectionError, match=re.escape(C.DATASET)):
        prepare.ensure_shards(tmp_path, NAMES, {})
    assert listing(tmp_path) == []


# ---- The command --------------------------------------------------------------------------------
def test_command_downloads_and_prepares_from_the_hub(hub, cache, capsys):
    prepare.main(["--num-shards", "2"])
    names = [NAMES[0], NAMES[1], NAMES[3]]
    assert listing(cache / "shards") == sorted(names)
    manifest = json.loads((cache / "manifest.json").read_text())
    assert manifest["revision"] == hub.commit
    assert manifest["shards"] == {name: facts(hub.files[name]) for name in names}
    assert capsys.readouterr().out.endswith("prepared\n")


@pytest.mark.parametrize("kind, server", FAULTS)
def test_command_fails_with_one_sentence_when_a_shard_is_missing(hub, cache, kind, server):
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
    assert not cache.exists() or listing(cache) == []


@pytest.mark.parametrize(
    "argv",
    [
        ["--num-shards", "0"],
        ["--num-shards", "-2"],
        ["--num-shards", str(C.VAL_SHARD + 1)],
        ["--num-shards", "many"],
    ],
)
def test_command_refuses_senseless_numbers(argv, cache, capsys):
    with pytest.raises(SystemExit) as end:
        prepare.main(argv)
    assert end.value.code == 2
    assert argv[0] in capsys.readouterr().err
    assert not cache.exists()


def test_all_shards_means_all_but_the_validation_shard(cache, monkeypatch):
    asked = []
    monkeypatch.setattr(prepare, "prepare", lambda folder, n, *_: asked.append(n))
    prepare.main(["--num-shards", "-1"])
    assert C.SHARD_NAME.format(asked[0] - 1) == "shard_06541.parquet"


# ---- The stand-in itself ------------------------------------------------------------------------
def test_stand_in_serves_a_folder_and_those_below_from_the_command_line(shard_folder, tmp_path):
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
