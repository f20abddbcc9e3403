"""Prepared folder: made once, the same bytes every time, repaired when damaged, never half."""

import errno
import hashlib
import json
import os
import re
import shutil
import struct
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

import constants as C
import prepare
from conftest import make_documents, sentence, write_shard
from harness import data
from harness.data import VAL_NAME
from harness.download import ANSWERS
from harness.manifest import load_manifest
from harness.packing import build_rows, pack_rows, report_kept
from harness.run import Run
from harness.tokenizer import Tokenizer
from hub import Hub

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
        patch.setattr("harness.download.hub_constants.HF_HUB_OFFLINE", False)
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
def test_preparing_again_repairs_a_missing_or_damaged_manifest(folder, original, text):
    if text is None:
        (folder / "manifest.json").unlink()
    else:
        (folder / "manifest.json").write_text(text)
    assert load_manifest(folder) == {}
    before = stamps(folder / "rows") | stamps(folder / "tokenizer")
    data.prepare(folder, num_shards=2, workers=2, source="hub")
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
    data.prepare(folder, num_shards=2, workers=2, source="hub")
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


def test_what_is_made_again_is_said_with_its_reason(folder, capsys, monkeypatch):
    flip(row_path(folder, 1))
    cut(folder / "shards" / C.SHARD_NAME.format(0))
    (folder / "shards" / C.SHARD_NAME.format(1)).unlink()
    (folder / "tokenizer" / "ranks.tiktoken").unlink()
    data.prepare(folder, num_shards=2, workers=2)
    said = capsys.readouterr().out
    assert "shard_00000.parquet is damaged: it is fetched again" in said
    assert "shard_00001.parquet is gone: it is fetched again" in said
    assert "missing or damaged" in said and "it is retrained" in said
    assert f"rows/{row_path(folder, 1).name} is damaged: it is repacked" in said
    assert "2 files, 1 packed in" in said
    data.prepare(folder, num_shards=2, workers=2)
    said = capsys.readouterr().out
    assert "retrained" not in said and "repacked" not in said and ", 0 packed in" in said
    monkeypatch.setattr(C, "DATA_RULES", [*C.DATA_RULES, 1])
    data.prepare(folder, num_shards=2, workers=2)
    said = capsys.readouterr().out
    assert "rows: of other shards, tokenizer or rules; they are repacked" in said
    assert "trained" not in said and "fetch" not in said


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

    def stop_early(shard, out, tokenizer, n_rows=None, progress=None, own=False):
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
    left.pop(f"shards/{ANSWERS}")
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


# ---- The split ----------------------------------------------------------------------------------
MARKER = "ѮѰѲѴ"  # letters that no training document has


def prepare_with_validation_text(documents, shard_folder, tmp_path, monkeypatch):
    """Prepare two training shards and this validation text; return the folder."""
    served, out = tmp_path / "served", tmp_path / "out"
    shutil.copytree(shard_folder, served)
    write_shard(served / VAL_NAME, documents)
    with Hub(served) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        data.prepare(out, num_shards=2, workers=2)
    return out


def row_texts(folder, split: str) -> list[str]:
    """Return every row of a split as text, read without the code under test."""
    tokenizer = Tokenizer.load(folder / "tokenizer")
    rows = json.loads((folder / "manifest.json").read_text())["rows"]
    texts = []
    for name, about in rows.items():
        if about["split"] == split:
            body = (folder / "rows" / name).read_bytes()
            texts.append(
                tokenizer.encoding.decode(struct.unpack(f"<{len(body) // 2}H", body))
            )
    return texts


def test_validation_text_reaches_neither_tokenizer_nor_training_rows(
    shard_folder, tmp_path, monkeypatch, full_rules
):
    documents = [
        f"{MARKER} {MARKER}{k} {text}" for k, text in enumerate(make_documents(7, 200))
    ]
    folder = prepare_with_validation_text(documents, shard_folder, tmp_path, monkeypatch)
    assert all(MARKER in text for text in row_texts(folder, "val"))
    train = row_texts(folder, "train")
    assert len(train) == 2 and all(len(text) > 1000 for text in train)
    assert not any(letter in text for letter in MARKER for text in train)
    ranks = Tokenizer.load(folder / "tokenizer").encoding._mergeable_ranks
    assert not any(letter.encode() in token for letter in MARKER for token in ranks)


def test_another_validation_text_changes_the_validation_rows_alone(
    shard_folder, tmp_path, monkeypatch, full_rules
):
    kept = []
    for k in range(2):
        place = tmp_path / str(k)
        documents = make_documents(seed=50 + k, count=200)
        folder = prepare_with_validation_text(documents, shard_folder, place, monkeypatch)
        files = [*(folder / "tokenizer").iterdir(), *(folder / "rows").iterdir()]
        kept.append({path.name: path.read_bytes() for path in files})
    differ = {name for name, _ in kept[0].items() ^ kept[1].items()}
    assert len(differ) == 2 and all(name.startswith("shard_06542.") for name in differ)
    assert len(kept[0]) == 5


# ---- --source -----------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def long_text() -> list[str]:
    """As many documents as validation needs under the smoke rules, none of them empty."""
    return make_documents(seed=2, count=3000)


@pytest.fixture
def own(tmp_path, corpus, long_text) -> Path:
    """A folder of three shards under names of the user's, and a file that is none."""
    write_shard(tmp_path / "own" / "b part.parquet", make_documents(seed=1, count=200))
    write_shard(tmp_path / "own" / "a.parquet", corpus[:500])
    write_shard(tmp_path / "own" / "z.parquet", long_text)
    (tmp_path / "own" / "README.txt").write_text("mine")
    return tmp_path / "own"


@pytest.fixture
def cache(cache, monkeypatch) -> Path:
    """The folder to prepare under the full rules, without a hub."""
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    return cache


def test_own_shards_are_prepared_the_last_by_name_for_validation(own, cache):
    before = listing(own)
    prepare.main(["--source", str(own)])
    manifest = manifest_of(cache)
    assert list(manifest["shards"]) == ["a.parquet", "b part.parquet", "z.parquet"]
    splits = {
        name.partition(".")[0]: row["split"] for name, row in manifest["rows"].items()
    }
    assert splits == {"a": "train", "b part": "train", "z": "val"}
    assert manifest["source"] == str(own)
    assert listing(own) == before and not (cache / "shards").exists()
    run = Run(cache, torch.device("cpu"))
    assert (
        len(run._val_rows) == C.EVAL_TOKENS // C.MAX_SEQ_LEN and len(run._train_rows) > 0
    )


def test_shards_of_the_hub_in_a_folder_give_the_rows_that_the_hub_gives(
    corpus, long_text, cache, tmp_path, monkeypatch
):
    served = tmp_path / "served"
    texts = [text for text in corpus if text]  # the hub's may be empty, and then stay
    write_shard(served / C.SHARD_NAME.format(0), texts[:400])
    write_shard(served / C.SHARD_NAME.format(1), texts[400:])
    write_shard(served / VAL_NAME, long_text)
    made = []
    for argv in (["--num-shards", "2"], ["--source", str(served)]):
        with Hub(served) as hub:
            monkeypatch.setenv("HF_ENDPOINT", hub.url)
            prepare.main(argv)
        rows = listing(cache / "rows")
        made.append({name.partition(".")[0]: body for name, body in rows.items()})
    assert made[0] == made[1] and len(made[0]) == 3


def test_number_of_own_shards_can_be_limited(own, cache):
    prepare.main(["--source", str(own), "--num-shards", "1"])
    assert list(manifest_of(cache)["shards"]) == ["a.parquet", "z.parquet"]
    assert "holds 2 training shards, not 3" in sentence(
        prepare.main, ["--source", str(own), "--num-shards", "3"]
    )


def test_one_training_shard_is_not_said_in_the_plural(own, cache, capsys):
    (own / "b part.parquet").unlink()
    said = sentence(prepare.main, ["--source", str(own), "--num-shards", "3"])
    assert "holds 1 training shard, not 3" in said
    prepare.main(["--source", str(own)])
    assert "M training tokens in 1 file, 2 packed" in capsys.readouterr().out
    flip(*(cache / "rows").glob("z.*"))
    assert sentence(prepare.main, ["--check"]).endswith(" to repair it")


def test_a_plain_run_goes_on_with_own_shards_and_hub_goes_back(own, cache, capsys):
    prepare.main(["--source", str(own)])
    before = listing(cache)
    prepare.main([])
    assert listing(cache) == before
    assert f"shards: those of {own}; `--source hub` goes back" in capsys.readouterr().out
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("harness.download.RETRY_SECONDS", (0,))
        assert C.DATASET in sentence(prepare.main, ["--source", "hub"])
    assert listing(cache) == before  # and what was there is still there


def test_a_change_of_an_own_shard_is_noticed(own, cache, capsys):
    prepare.main(["--source", str(own)])
    before = listing(cache / "rows")
    write_shard(own / "b part.parquet", make_documents(seed=3, count=300))
    prepare.main([])
    out = capsys.readouterr().out
    assert "tokenizer: of other shards or rules, it is retrained" in out
    assert not set(listing(cache / "rows")) & set(before)


@pytest.mark.parametrize(
    "table, what",
    [
        (
            pa.table({"content": ["a"]}),
            "holds no good column `text` .it has the columns content",
        ),
        (pa.table({"text": pa.array([1])}), "it is of type int64, not string"),
        (None, "holds no good column `text`"),
    ],
)
def test_own_shard_that_cannot_be_used_is_named_before_any_work(own, cache, table, what):
    if table is None:
        (own / "b part.parquet").write_text("text")
    else:
        pq.write_table(table, own / "b part.parquet")
    said = sentence(prepare.main, ["--source", str(own)])
    assert str(own / "b part.parquet") in said and re.search(what, said)
    assert listing(cache) == {".lock": b""}


@pytest.mark.parametrize("names", [[], ["one.parquet"]])
def test_too_few_own_shards_are_an_error_that_says_how_many(tmp_path, cache, names):
    (tmp_path / "few").mkdir()
    for name in names:
        write_shard(tmp_path / "few" / name, ["a"])
    said = sentence(prepare.main, ["--source", str(tmp_path / "few")])
    count = "1 file" if names else "0 files"
    assert f"{tmp_path / 'few'} holds {count} *.parquet; give two or more" in said


def test_a_missing_folder_is_named_as_missing_and_a_file_as_a_file(own, cache):
    said = sentence(prepare.main, ["--source", str(own / "nowhere")])
    assert said.endswith(f"there is no folder {own / 'nowhere'}")
    said = sentence(prepare.main, ["--source", str(own / "a.parquet")])
    assert f"{own / 'a.parquet'} is a file; give the folder that it is in" in said


def test_a_document_of_a_million_blanks_stops_no_shard(own, cache):
    texts = ["good", " " * 1_000_001, f"before{' ' * 1_000_001}behind", "good"]
    write_shard(own / "b part.parquet", texts)
    prepare.main(["--source", str(own)])
    rows = "".join(row_texts(cache, "train"))
    assert "good" in rows and "before " in rows


def test_null_and_empty_documents_are_counted_and_left_out(own, cache, capsys, corpus):
    full = [text for text in corpus if text]
    write_shard(own / "a.parquet", full)
    prepare.main(["--source", str(own)])
    (before,) = (cache / "rows").glob("a.*")
    before = before.read_bytes()
    assert "left out" not in capsys.readouterr().out
    texts = [*full[:100], None, "", *full[100:], None]
    pq.write_table(pa.table({"text": texts}), own / "a.parquet", row_group_size=100)
    prepare.main([])
    count = f"3 of {len(texts)} documents, 3 of a.parquet"
    said = f"rows: left out, empty, null or not UTF-8: {count}\n"
    assert said in capsys.readouterr().out
    (after,) = (cache / "rows").glob("a.*")
    ids = np.frombuffer(after.read_bytes(), "<u2").reshape(-1, C.MAX_SEQ_LEN + 1)
    assert not np.any((ids[:, 1:] == C.BOS_ID) & (ids[:, :-1] == C.BOS_ID))
    assert len(before) == after.stat().st_size


def test_shards_that_are_all_empty_are_left_out_as_spark_writes_them(own, cache, capsys):
    for name, texts in {"a0": [], "zz": [], "zzz": ["", ""]}.items():
        write_shard(own / f"{name}.parquet", texts)
    prepare.main(["--source", str(own)])
    assert list(manifest_of(cache)["shards"]) == [
        "a.parquet",
        "b part.parquet",
        "z.parquet",
    ]
    said = capsys.readouterr().out
    assert "left out, no document: a0.parquet, zz.parquet, zzz.parquet" in said


def test_hidden_files_are_left_out_and_named(own, cache, capsys):
    for name in (
        "._a.parquet",
        "zz/._x.parquet",
        "_delta_log/1.parquet",
        ".git/q.parquet",
    ):
        (own / name).parent.mkdir(exist_ok=True)
        (own / name).write_bytes(b"\0\5\x16\7")
    prepare.main(["--source", str(own)])
    assert len(manifest_of(cache)["shards"]) == 3
    assert (
        "left out, hidden (. or _ begins a name): ._a.parquet" in capsys.readouterr().out
    )


def test_nested_folders_and_data_sets_named_like_files_are_read(own, cache, capsys):
    for name in ("sub/deep/c.parquet", "part.parquet/lang=en/0.parquet", "upper.PARQUET"):
        write_shard(own / name, make_documents(seed=len(name), count=50))
    (own / "circle").symlink_to(own)
    (own / "linked").mkdir()
    (own / "linked" / "q.parquet").symlink_to(own / "b part.parquet")
    prepare.main(["--source", str(own)])
    assert list(manifest_of(cache)["shards"]) == [
        "a.parquet",
        "b part.parquet",
        "part.parquet/lang=en/0.parquet",
        "sub/deep/c.parquet",
        "upper.PARQUET",
        "z.parquet",
    ]
    said = capsys.readouterr().out
    assert "shards: z.parquet is for validation, the last of 7 by name" in said
    assert "left out, a copy of b part.parquet: linked/q.parquet" in said
    prepare.main(["--check"])


def test_a_link_that_leads_nowhere_is_named_and_a_pipe_is_not_waited_for(own, cache):
    os.mkfifo(own / "pipe.parquet")
    (own / "link.parquet").symlink_to(own / "nowhere")
    said = sentence(prepare.main, ["--source", str(own)])
    assert f"{own / 'link.parquet'} is a link that leads nowhere; replace it" in said
    (own / "link.parquet").unlink()
    prepare.main(["--source", str(own)])
    assert len(manifest_of(cache)["shards"]) == 3


@pytest.mark.parametrize(
    "name, odd",
    [("test-00000.parquet", True), ("val/0.parquet", True), ("devices.parquet", False)],
)
def test_the_file_that_validates_is_printed_and_one_that_sounds_like_it(
    own, cache, capsys, name, odd
):
    write_shard(own / name, ["x"])
    prepare.main(["--source", str(own)])
    said = capsys.readouterr().out
    assert "shards: z.parquet is for validation, the last of 4 by name" in said
    assert (f"shards: for training in spite of the name: {name}" in said) == odd


@pytest.mark.parametrize("kind", ["short", "long documents"])
def test_validation_text_that_is_too_short_is_an_error_with_its_tokens(own, cache, kind):
    texts = make_documents(seed=3, count=100)
    advice = "give it about"
    if kind == "long documents":
        texts = [" ".join(make_documents(seed=k, count=500)) for k in range(12)]
        advice = "cut its long documents into pieces, or give it about"
    write_shard(own / "z.parquet", texts)
    said = sentence(prepare.main, ["--source", str(own)])
    assert re.search(
        r"z.parquet is too short: its [\d,]+ tokens fill \d+ rows of 256", said
    )
    rows, times = map(
        int, re.search(r"fill (\d+) rows .* about (\d+) times", said).groups()
    )
    assert rows * (times - 1) < 256 <= rows * times
    assert "and validation needs 256 rows, 65,536 tokens" in said and advice in said
    tokens = int(re.search(r"its ([\d,]+)", said)[1].replace(",", ""))
    tokenizer = Tokenizer.load(cache / "tokenizer")
    assert tokens == sum(len(tokenizer.encode(text)) for text in texts)
    assert not (cache / "manifest.json").exists() and not list(
        (cache / "rows").glob("z.*")
    )


def test_too_little_training_text_is_an_error_with_its_folder_and_what_is_needed(
    own, cache
):
    write_shard(own / "sub" / "a.parquet", ["a few words", "are not enough"])
    write_shard(own / "sub" / "b.parquet", ["\u00e9" * 7])
    for name in ("a.parquet", "b part.parquet"):
        (own / name).unlink()
    said = sentence(prepare.main, ["--source", str(own)])
    names = re.escape(f"{own / 'sub'} (a.parquet, b.parquet)")
    assert re.search(
        f"the training text in {names} is too short: its 32 characters", said
    )
    assert re.search(
        r"characters give 2\d\d of 1,020 tokens; give it more text, and", said
    )
    need = "validation alone needs 65,536 tokens, 300 k characters or more"
    assert said.endswith(need) and not list(cache.glob("tokenizer/*"))


def test_own_text_that_is_refused_leaves_what_was_prepared_before_as_it_was(
    own, cache, tmp_path
):
    prepare.main(["--source", str(own)])
    before = listing(cache)
    other = tmp_path / "other"
    write_shard(other / "a.parquet", make_documents(seed=4, count=700))
    write_shard(other / "z.parquet", make_documents(seed=3, count=100))
    assert "is too short" in sentence(prepare.main, ["--source", str(other)])
    after = listing(cache)
    assert {name: after.pop(name) for name in before} == before
    # At most whole rows, if their process was faster than the one that refused.
    assert len(after) <= 1 and all(re.fullmatch(r"rows/a\.\w+\.u16", x) for x in after)
    prepare.main(["--check"])


@pytest.mark.parametrize("refused", ["nowhere", "too short", "own, damaged", "the hub"])
def test_text_that_is_refused_is_said_with_the_text_that_is_in_force(
    own, cache, tmp_path, monkeypatch, refused
):
    monkeypatch.setattr("harness.download.RETRY_SECONDS", (0,))
    prepare.main(["--source", str(own)])
    other = tmp_path / "other"
    argv = ["--source", "hub" if refused == "the hub" else str(other)]
    if refused == "too short":
        write_shard(other / "a.parquet", make_documents(seed=4, count=700))
        write_shard(other / "z.parquet", make_documents(seed=3, count=100))
    if refused == "own, damaged":
        (own / "a.parquet").write_text("no parquet")
        argv = []
    said = sentence(prepare.main, argv)
    now = f"; the next run uses what was prepared before, 2 training shards of {own}"
    assert said.endswith(now)
    Run(cache, torch.device("cpu"))  # which it does
    next((cache / "rows").glob("a.*")).unlink()
    assert "prepared before" not in sentence(prepare.main, argv)


def test_text_that_is_refused_first_is_not_said_to_leave_another_in_force(own, cache):
    assert "the next run" not in sentence(prepare.main, ["--source", str(own / "no")])


def test_the_smoke_rules_own_text_is_not_called_that_of_the_hub(prepared_copy, tmp_path):
    said = sentence(prepare.main, ["--source", str(tmp_path / "no")])
    assert "prepared before, 3 training shards of the library of Python 3." in said


def test_the_hub_s_shards_stay_in_force_when_own_text_is_refused(
    shard_folder, own, cache, monkeypatch
):
    with Hub(shard_folder) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        prepare.main(["--num-shards", "2"])
    said = sentence(prepare.main, ["--source", str(own / "no")])
    assert said.endswith("what was prepared before, 2 training shards of the hub")


def test_validation_shard_that_becomes_one_for_training_is_packed_whole(
    own, cache, monkeypatch
):
    monkeypatch.setattr(C, "TOKENIZER_SHARDS", 1)  # the tokenizer stays the same
    prepare.main(["--source", str(own)])
    (before,) = (cache / "rows").glob("z.*")
    assert before.stat().st_size == 256 * ROW_BYTES
    write_shard(own / "zz.parquet", make_documents(seed=9, count=3000))
    prepare.main([])
    (after,) = (cache / "rows").glob("z.*")
    assert after.stat().st_size > 256 * ROW_BYTES


def test_training_shard_that_is_the_validation_shard_is_an_error(own, cache):
    shutil.copy(own / "z.parquet", own / "k.parquet")
    said = sentence(prepare.main, ["--source", str(own)])
    assert "k.parquet is a copy of z.parquet, the validation shard" in said
    assert "delete" not in said and not (cache / "manifest.json").exists()


def test_text_that_packing_loses_is_said_with_a_warning(own, cache, capsys, long_text):
    prepare.main(["--source", str(own)])
    said = capsys.readouterr().out
    kept = int(re.search(r"packing kept (\d+) % of the training tokens", said)[1])
    assert kept > 50 and "256 of 256 validation rows are distinct" in said
    assert "WARNING" not in said
    long = [" ".join(make_documents(seed=k, count=500)) for k in range(12)]
    for name in ("a.parquet", "b part.parquet"):
        write_shard(own / name, long + [name])
    write_shard(own / "z.parquet", ["".join(long_text)[:2000]] * 300)
    prepare.main([])
    said = capsys.readouterr().out
    kept = int(re.search(r"packing kept (\d+) % of the training tokens", said)[1])
    assert kept < 10 and "WARNING: documents longer than a row of 256 tokens" in said
    distinct = int(
        re.search(r"(\d+) of 256 validation rows (?:is|are) distinct", said)[1]
    )
    assert distinct < 20 and "WARNING: val_bpb rests on little text" in said


def test_tokens_that_packing_loses_in_a_smoke_run_are_no_alarm(capsys, monkeypatch):
    report_kept(0.16, own=False)
    normal = "normal for a smoke run, whose rows are of 256 tokens"
    said = f"rows: packing kept 16 % of the training tokens; {normal}\n"
    assert capsys.readouterr().out == said
    report_kept(0.16, own=True)
    said = capsys.readouterr().out
    assert "smoke" not in said and "WARNING: documents longer than a row" in said
    monkeypatch.setattr(C, "SMOKE", False)
    report_kept(0.7, own=False)
    assert "smoke" not in capsys.readouterr().out


def test_error_on_own_shards_never_says_delete(own, cache, monkeypatch):
    (own / "b part.parquet").write_text("text")
    said = sentence(prepare.main, ["--source", str(own)])
    assert "replace it or take it out of its folder" in said and "delete" not in said
    command = f"uv run prepare.py --source {own}"
    assert said.endswith(f"and run `{command}`")


# ---- --check ------------------------------------------------------------------------------------
@pytest.fixture
def whole(own, cache) -> Path:
    prepare.main(["--source", str(own)])
    return cache


def test_check_of_what_is_whole_says_so_and_changes_nothing(whole, capsys):
    before = {p: p.stat().st_mtime_ns for p in whole.rglob("*")}
    prepare.main(["--check"])
    assert capsys.readouterr().out.splitlines()[-1] == f"all is well in {whole}"
    assert {p: p.stat().st_mtime_ns for p in whole.rglob("*")} == before


@pytest.mark.parametrize(
    "pattern", ["../../own/a.parquet", "rows/a.*", "rows/z.*", "tokenizer/ranks.tiktoken"]
)
@pytest.mark.parametrize(
    "damage, what",
    [(flip, "bytes changed"), (cut, "damaged: it has"), (Path.unlink, "missing")],
    ids=["a byte changed", "cut short", "gone"],
)
def test_check_names_what_is_damaged_and_prepare_repairs_it(
    whole, own, capsys, pattern, damage, what
):
    good, source = listing(whole), listing(own)
    (path,) = whole.glob(pattern)
    damage(path)
    assert "1 damaged; run" in sentence(prepare.main, ["--check"])
    line = capsys.readouterr().out.splitlines()[-1]
    if "own" in pattern:  # as the next run says it; it may be no parquet any more
        assert re.search("a.parquet (has changed|is gone|holds no good column)", line)
    elif "tokenizer" in pattern:
        assert str(path.parent) in line and "missing or damaged" in line
    else:
        assert path.name in line and what in line
    if "own" in pattern:
        path.write_bytes(source[path.name])  # the user repairs this one
    prepare.main([])
    assert listing(whole) == good
    prepare.main(["--check"])


@pytest.mark.parametrize("damage", ["removed", "altered", "added"])
@pytest.mark.parametrize("name", ["a.parquet", "z.parquet"])
def test_check_and_the_next_run_both_say_that_an_own_shard_changed(
    whole, own, capsys, damage, name
):
    write_shard(own / "m.parquet", make_documents(seed=11, count=3000))
    prepare.main([])
    assert "since the last preparation m.parquet is new" in capsys.readouterr().out
    if damage == "removed":
        (own / name).unlink()
    else:
        name = f"{name[0]}{name}" if damage == "added" else name
        write_shard(own / name, make_documents(seed=12, count=3000))
    assert "damaged; run" in sentence(prepare.main, ["--check"])
    what = {"removed": "is gone", "altered": "has changed", "added": "is new"}[damage]
    checked = capsys.readouterr().out
    assert f"{own}: {name} {what} since the last preparation" in checked
    prepare.main([])
    said = capsys.readouterr().out
    assert f"shards: since the last preparation {name} {what}" in said
    becomes = "the validation shard is "
    other_validates = damage != "altered" and name[0] == "z"
    assert (becomes in checked) == (becomes in said) == other_validates
    prepare.main(["--check"])
    prepare.main([])
    assert "since the last" not in capsys.readouterr().out


def test_a_damaged_manifest_does_not_send_own_shards_to_the_hub(whole, own, capsys):
    good = listing(whole)
    flip(whole / "manifest.json")
    before = listing(whole)
    said = sentence(prepare.main, [])
    assert f"{whole / 'manifest.json'} is damaged" in said
    hub = "run `uv run prepare.py --source hub --num-shards 2`, or `--source DIR`"
    assert hub in said
    assert listing(whole) == before
    prepare.main(["--source", str(own)])
    assert "manifest.json is damaged: all that" in capsys.readouterr().out
    assert listing(whole) == good


def test_a_manifest_that_cannot_be_read_is_not_one_that_is_damaged(whole, monkeypatch):
    def fail(path, *_):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "read_text", fail)
        said = sentence(prepare.main, [])
    assert re.search("denied: '.*manifest.json'; make it writable", said)


def test_a_limited_number_of_own_shards_stays_in_later_runs(own, cache):
    prepare.main(["--source", str(own), "--num-shards", "1"])
    prepare.main([])
    assert list(manifest_of(cache)["shards"]) == ["a.parquet", "z.parquet"]
    (own / "a.parquet").unlink()
    prepare.main([])
    assert list(manifest_of(cache)["shards"]) == ["b part.parquet", "z.parquet"]
    prepare.main(["--num-shards", "-1"])
    (own / "q.parquet").write_bytes((own / "b part.parquet").read_bytes())
    prepare.main([])
    assert list(manifest_of(cache)["shards"]) == ["b part.parquet", "z.parquet"]


def test_check_names_everything_that_is_damaged(whole, capsys):
    for path in (whole / "rows").iterdir():
        flip(path)
    assert "3 damaged" in sentence(prepare.main, ["--check"])
    said = capsys.readouterr().out
    assert all(str(path) in said for path in (whole / "rows").iterdir())


def test_check_notices_rows_of_other_rules(whole, capsys, monkeypatch):
    monkeypatch.setattr("harness.tokenizer.fast_pattern", lambda pattern: pattern)
    about = json.loads((whole / "tokenizer" / "tokenizer.json").read_text())
    monkeypatch.setattr(C, "SPLIT_PATTERN", r"\s+|\S+")
    about["pattern"] = C.SPLIT_PATTERN
    (whole / "tokenizer" / "tokenizer.json").write_text(json.dumps(about))
    assert "1 damaged" in sentence(prepare.main, ["--check"])
    assert "are not of these shards and rules" in capsys.readouterr().out


def test_check_where_nothing_is_prepared_says_what_to_do(cache):
    assert re.search(
        "nothing is prepared in .*; run .*prepare.py",
        sentence(prepare.main, ["--check"]),
    )
    assert not cache.exists()
