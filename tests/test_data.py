"""Prepared folder: made once, the same bytes every time, repaired when damaged, never half."""

import hashlib
import json
import os
import shutil
from pathlib import Path

import pytest
from conftest import write_shard
from hub import Hub

import constants as C
from harness import data
from harness.data import VAL_NAME, load_manifest
from harness.documents import read_documents
from harness.files import data_dir
from harness.packing import build_rows, pack_rows, row_name

ROW_BYTES = 2 * (C.MAX_SEQ_LEN + 1)


def listing(folder: Path) -> dict[str, bytes]:
    """Return name -> bytes of every file below `folder`, hidden ones included."""
    return {
        str(p.relative_to(folder)): p.read_bytes()
        for p in folder.rglob("*")
        if p.is_file()
    }


def stamps(folder: Path) -> dict[str, tuple[int, int]]:
    """Return name -> (inode, time of change): another one shows that a file was written."""
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    return {
        str(p.relative_to(folder)): (p.stat().st_ino, p.stat().st_mtime_ns) for p in files
    }


def manifest_of(folder: Path) -> dict:
    return json.loads((folder / "manifest.json").read_text())


def row_path(folder: Path, number: int) -> Path:
    (path,) = (folder / "rows").glob(
        C.SHARD_NAME.format(number).replace(".parquet", ".*.u16")
    )
    return path


@pytest.fixture(scope="module")
def original(shard_folder, tmp_path_factory) -> Path:
    """A folder with two training shards, prepared from a hub. Not to be changed."""
    folder = tmp_path_factory.mktemp("original")
    with pytest.MonkeyPatch.context() as patch, Hub(shard_folder) as hub:
        patch.setenv("HF_ENDPOINT", hub.url)
        patch.setattr(C, "SMOKE", False)
        data.prepare(folder, num_shards=2, workers=2)
    return folder


@pytest.fixture
def folder(original, tmp_path, hub, full_rules) -> Path:
    """A copy of `original` to be changed; the hub is up."""
    return shutil.copytree(original, tmp_path / "folder")


# ---- What is there ------------------------------------------------------------------------------
def test_manifest_describes_every_shard_and_row_file(original):
    manifest = manifest_of(original)
    for kind in ("shards", "rows"):
        files = listing(original / kind)
        described = {n: (a["size"], a["sha256"]) for n, a in manifest[kind].items()}
        assert described == {
            name: (len(body), hashlib.sha256(body).hexdigest())
            for name, body in files.items()
        }
    assert len(manifest["revision"]) == 40
    assert sorted(a["split"] for a in manifest["rows"].values()) == [
        "train",
        "train",
        "val",
    ]
    assert manifest["rows"][row_path(original, C.VAL_SHARD).name]["split"] == "val"


def test_row_files_are_whole_rows_and_validation_has_its_number(original):
    for number in (0, 1, C.VAL_SHARD):
        size = row_path(original, number).stat().st_size
        assert size > 0 and size % ROW_BYTES == 0
    n_rows = C.EVAL_TOKENS // C.MAX_SEQ_LEN
    assert row_path(original, C.VAL_SHARD).stat().st_size == n_rows * ROW_BYTES


def test_prepared_folder_holds_nothing_else(original):
    tops = {name.partition("/")[0] for name in listing(original)}
    assert tops == {"shards", "tokenizer", "rows", "manifest.json", ".lock"}
    assert len(listing(original)) == 3 + 2 + 3 + 1 + 1
    assert listing(original)[".lock"] == b""


@pytest.mark.parametrize("workers", [1, 4])
def test_rows_are_the_same_for_any_number_of_workers(
    original, hub, tmp_path, full_rules, workers
):
    data.prepare(tmp_path / "other", num_shards=2, workers=workers)
    assert listing(tmp_path / "other") == listing(original)


# ---- Once more ----------------------------------------------------------------------------------
def test_preparing_twice_does_no_work(folder, hub):
    before, bytes_before = stamps(folder), listing(folder)
    data.prepare(folder, num_shards=2, workers=2)
    after = stamps(folder)
    assert after.pop("manifest.json") and before.pop("manifest.json")
    assert after == before
    assert listing(folder) == bytes_before
    assert hub.requests == []


def test_preparing_smoke_data_twice_gives_the_same_bytes(prepared, tmp_path):
    folder = shutil.copytree(prepared, tmp_path / "again")
    before = stamps(folder / "rows") | stamps(folder / "tokenizer")
    data.prepare(folder, num_shards=3, workers=2)
    assert listing(folder) == listing(prepared)
    assert stamps(folder / "rows") | stamps(folder / "tokenizer") == before


def test_one_shard_more_adds_one_row_file_and_leaves_the_others(
    tmp_path, hub, full_rules, monkeypatch
):
    monkeypatch.setattr(
        C, "TOKENIZER_SHARDS", 2
    )  # so that the third is not for the tokenizer
    folder = tmp_path / "folder"
    data.prepare(folder, num_shards=2, workers=2)
    before = stamps(folder)
    hub.requests.clear()
    data.prepare(folder, num_shards=3, workers=2)
    after = stamps(folder)
    new = {name for name in after if name not in before}
    third = row_path(folder, 2).name
    assert new == {"shards/shard_00002.parquet", f"rows/{third}"}
    before.pop("manifest.json")
    assert {name: after[name] for name in before} == before
    assert {r.name for r in hub.requests} == {"shard_00002.parquet"}
    assert manifest_of(folder)["rows"][third]["split"] == "train"


def test_one_shard_less_drops_its_row_file(folder):
    dropped = row_path(folder, 1)
    data.prepare(folder, num_shards=1, workers=2)
    assert not dropped.exists()
    assert set(listing(folder / "rows")) == set(manifest_of(folder)["rows"])
    assert len(listing(folder / "rows")) == 2


def test_row_files_of_another_tokenizer_are_deleted(folder, monkeypatch):
    old = set(listing(folder / "rows"))
    monkeypatch.setattr(C, "VOCAB_SIZE", 1000)
    data.prepare(folder, num_shards=2, workers=2)
    new = set(listing(folder / "rows"))
    assert len(new) == 3 and not new & old
    assert set(manifest_of(folder)["rows"]) == new


# ---- Damage -------------------------------------------------------------------------------------
def flip(path: Path) -> None:
    body = bytearray(path.read_bytes())
    body[len(body) // 2] ^= 1
    path.write_bytes(body)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


DAMAGES = {
    "one byte changed": flip,
    "cut short": cut,
    "empty": lambda path: path.write_bytes(b""),
    "deleted": lambda path: path.unlink(),
}


@pytest.mark.parametrize("number", [1, C.VAL_SHARD])
@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_row_file_is_rebuilt(folder, original, damage, number):
    DAMAGES[damage](row_path(folder, number))
    data.prepare(folder, num_shards=2, workers=2)
    assert listing(folder) == listing(original)


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_shard_is_fetched_again(folder, original, damage):
    DAMAGES[damage](folder / "shards" / C.SHARD_NAME.format(0))
    data.prepare(folder, num_shards=2, workers=2)
    assert listing(folder) == listing(original)


@pytest.mark.parametrize(
    "text",
    [None, "", "{", "[]", "null", "{}", '{"rules": 1}', "\x00", '{"shards": []}', "7"],
)
def test_preparing_again_mends_a_missing_or_damaged_manifest(folder, original, text):
    if text is None:
        (folder / "manifest.json").unlink()
    else:
        (folder / "manifest.json").write_text(text)
    assert load_manifest(folder) == {}
    before = stamps(folder / "rows") | stamps(folder / "tokenizer")
    data.prepare(folder, num_shards=2, workers=2)
    assert listing(folder) == listing(original)
    assert stamps(folder / "rows") | stamps(folder / "tokenizer") == before


def test_manifest_with_any_byte_changed_is_not_believed(original, tmp_path):
    body = (original / "manifest.json").read_bytes()
    whole = manifest_of(original)
    for at in range(0, len(body), 7):
        changed = body[:at] + bytes([body[at] ^ 1]) + body[at + 1 :]
        (tmp_path / "manifest.json").write_bytes(changed)
        read = load_manifest(tmp_path)
        assert (
            read == {} or {**read, "key": 0} == {**whole, "key": 0} or "key" not in read
        )
        if "key" not in read and read:  # its own name was hit: all the rest is right
            del whole["key"]
            assert len(read) == len(whole) + 1 and whole.items() <= read.items()
            whole = manifest_of(original)


def test_damaged_manifest_costs_no_download_and_no_packing(folder, original, hub, capsys):
    body = (folder / "manifest.json").read_bytes()
    (folder / "manifest.json").write_bytes(body.replace(b'"size": ', b'"size": 1', 1))
    before = (
        stamps(folder / "rows") | stamps(folder / "tokenizer") | stamps(folder / "shards")
    )
    data.prepare(folder, num_shards=2, workers=2)
    assert listing(folder) == listing(original)
    after = (
        stamps(folder / "rows") | stamps(folder / "tokenizer") | stamps(folder / "shards")
    )
    assert before == after and hub.count("cdn", "GET") == 0


@pytest.mark.parametrize("version", ["with a key", "without, as it once was"])
def test_manifest_of_a_readable_folder_is_returned_as_it_is(original, tmp_path, version):
    manifest = manifest_of(original)
    if version != "with a key":
        del manifest["key"]
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    assert load_manifest(tmp_path) == manifest


def test_what_is_made_anew_is_said_with_its_reason(folder, capsys, monkeypatch):
    flip(row_path(folder, 1))
    cut(folder / "shards" / C.SHARD_NAME.format(0))
    (folder / "shards" / C.SHARD_NAME.format(1)).unlink()
    (folder / "tokenizer" / "ranks.tiktoken").unlink()
    data.prepare(folder, num_shards=2, workers=2)
    said = capsys.readouterr().out
    assert "shard_00000.parquet is damaged: it is fetched again" in said
    assert "shard_00001.parquet is gone: it is fetched again" in said
    assert "missing or damaged" in said and "it is trained anew" in said
    assert f"rows/{row_path(folder, 1).name} is damaged: it is packed anew" in said
    assert "2 files, 1 packed in" in said
    data.prepare(folder, num_shards=2, workers=2)
    said = capsys.readouterr().out
    assert (
        "trained anew" not in said
        and "packed anew" not in said
        and ", 0 packed in" in said
    )
    monkeypatch.setattr(C, "DATA_RULES", [*C.DATA_RULES, 1])
    data.prepare(folder, num_shards=2, workers=2)
    said = capsys.readouterr().out
    assert "rows: of other shards, tokenizer or rules; they are packed anew" in said
    assert "trained" not in said and "fetch" not in said


def test_rows_rest_on_the_split_pattern_too(monkeypatch):
    names = []
    for pattern in (C.SPLIT_PATTERN, "x"):
        monkeypatch.setattr(C, "SPLIT_PATTERN", pattern)
        names.append(row_name("shard_00000.parquet", {"sha256": "0"}, "1"))
    assert names[0] != names[1]


@pytest.mark.parametrize("place", ["rows", "shards", "tokenizer", "."])
def test_what_a_killed_run_left_is_swept_away(folder, original, place):
    (folder / place / ".file.4194304.tmp").write_bytes(b"half")
    data.prepare(folder, num_shards=2, workers=2)
    assert listing(folder) == listing(original)


# ---- Interruption -------------------------------------------------------------------------------
class Interrupted(Exception):
    """What no handler in prepare.py expects."""


@pytest.mark.parametrize("number", [0, 1, C.VAL_SHARD])
def test_interrupted_packing_leaves_no_half_file_and_no_manifest(
    original, tmp_path, hub, full_rules, monkeypatch, number
):
    folder, real = tmp_path / "folder", build_rows

    def stop_early(shard, out, tokenizer, n_rows=None, progress=None):
        if shard.name != C.SHARD_NAME.format(number):
            return real(shard, out, tokenizer, n_rows)

        def few(batches, capacity):
            for k, row in enumerate(pack_rows(batches, capacity)):
                if k == 3:
                    raise Interrupted
                yield row

        with monkeypatch.context() as patch:
            patch.setattr("harness.packing.pack_rows", few)
            real(shard, out, tokenizer, n_rows)

    with monkeypatch.context() as patch:
        patch.setattr("harness.packing.build_rows", stop_early)
        with pytest.raises(Interrupted):
            data.prepare(folder, num_shards=2, workers=1)
    left, whole = listing(folder), listing(original)
    assert "manifest.json" not in left
    assert left.items() <= whole.items()
    assert not list((folder / "rows").glob(f"{Path(C.SHARD_NAME.format(number)).stem}*"))
    data.prepare(folder, num_shards=2, workers=1)
    assert listing(folder) == whole


def test_interrupted_training_of_the_tokenizer_leaves_nothing_half(
    original, tmp_path, hub, full_rules, monkeypatch
):
    real, folder = os.replace, tmp_path / "folder"

    def stop_at_the_second_file(source, target):
        if Path(target).name == "tokenizer.json":
            raise Interrupted
        real(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", stop_at_the_second_file)
        with pytest.raises(Interrupted):
            data.prepare(folder, num_shards=2, workers=1)
    assert not any(
        name.endswith(".tmp") or name == "manifest.json" for name in listing(folder)
    )
    data.prepare(folder, num_shards=2, workers=1)
    assert listing(folder) == listing(original)


# ---- Input that cannot work ---------------------------------------------------------------------
@pytest.mark.parametrize("n_rows", [None, 5])
def test_shard_without_documents_is_an_error_and_no_endless_search(
    tiny_tokenizer, tmp_path, monkeypatch, n_rows
):
    shard = write_shard(tmp_path / "shard_00004.parquet", [])
    passes, real = [], read_documents

    def counted(path):
        passes.append(path)
        assert len(passes) < 50
        return real(path)

    monkeypatch.setattr("harness.packing.read_documents", counted)
    with pytest.raises(ValueError, match="shard_00004.parquet"):
        build_rows(shard, tmp_path / "out.u16", tiny_tokenizer, n_rows)
    assert not (tmp_path / "out.u16").exists()


def test_training_shards_that_fill_no_row_are_an_error(tmp_path, monkeypatch, full_rules):
    served = tmp_path / "served"
    rare = "".join(
        chr(0x4E00 + k) for k in range(400)
    )  # one short document, many byte pairs
    write_shard(served / C.SHARD_NAME.format(0), [rare])
    write_shard(served / VAL_NAME, [rare])
    monkeypatch.setattr(C, "MAX_SEQ_LEN", 4096)
    monkeypatch.setattr(C, "VOCAB_SIZE", 300)
    with Hub(served) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        with pytest.raises(ValueError, match="row"):
            data.prepare(tmp_path / "folder", num_shards=1, workers=1)
    assert not (tmp_path / "folder" / "manifest.json").exists()


def test_cache_folder_can_be_moved_and_smoke_has_its_own(monkeypatch, tmp_path):
    monkeypatch.setenv("AUTORESEARCH_CACHE", str(tmp_path / "elsewhere"))
    smoke = data_dir()
    monkeypatch.setattr(C, "SMOKE", False)
    full = data_dir()
    assert smoke.parent == full.parent == tmp_path / "elsewhere"
    assert smoke != full
    monkeypatch.setenv("AUTORESEARCH_CACHE", "~/moved")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert data_dir().parent == tmp_path / "moved"
    monkeypatch.delenv("AUTORESEARCH_CACHE")
    assert data_dir().parent == tmp_path / ".cache" / "autoresearch"
