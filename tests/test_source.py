"""The user's own shards in place of the hub's, and the check of everything prepared."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import make_documents, write_shard

import constants as C
import prepare
from harness.run import Run


def listing(folder: Path) -> dict[str, bytes]:
    return {
        str(p.relative_to(folder)): p.read_bytes()
        for p in folder.rglob("*")
        if p.is_file()
    }


def manifest_of(folder: Path) -> dict:
    return json.loads((folder / "manifest.json").read_text())


@pytest.fixture
def own(tmp_path, corpus) -> Path:
    """A folder of three shards under names of the user's, and a file that is none."""
    write_shard(tmp_path / "own" / "b part.parquet", make_documents(seed=1, count=200))
    write_shard(tmp_path / "own" / "a.parquet", corpus[:500])
    write_shard(tmp_path / "own" / "z.parquet", make_documents(seed=2, count=200))
    (tmp_path / "own" / "README.txt").write_text("mine")
    return tmp_path / "own"


@pytest.fixture
def cache(tmp_path, monkeypatch, full_rules) -> Path:
    """The folder that `prepare.main` prepares under the full rules, still missing; no hub."""
    monkeypatch.setenv("AUTORESEARCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(prepare, "load_flash_attention", lambda: None)
    return tmp_path / "cache" / "climbmix"


def sentence(argv: list[str]) -> str:
    with pytest.raises(SystemExit) as end:
        prepare.main(argv)
    assert isinstance(end.value.code, str) and "\n" not in end.value.code
    return end.value.code


# ---- --source -----------------------------------------------------------------------------------
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
    assert len(run.val_rows) == C.EVAL_TOKENS // C.MAX_SEQ_LEN and len(run.train_rows) > 0


def test_shards_of_the_hub_in_a_folder_give_the_rows_that_the_hub_gives(
    shard_folder, cache, hub, tmp_path
):
    prepare.main(["--num-shards", "3"])
    rows = listing(cache / "rows")
    shutil.rmtree(cache)
    prepare.main(["--source", str(shard_folder)])
    assert listing(cache / "rows") == rows and len(rows) == 4


def test_number_of_own_shards_can_be_limited(own, cache):
    prepare.main(["--source", str(own), "--num-shards", "1"])
    assert list(manifest_of(cache)["shards"]) == ["a.parquet", "z.parquet"]
    assert "holds 2 training shards, not 3" in sentence(
        ["--source", str(own), "--num-shards", "3"]
    )


def test_a_plain_run_goes_on_with_own_shards_and_hub_goes_back(own, cache, capsys):
    prepare.main(["--source", str(own)])
    before = listing(cache)
    prepare.main([])
    assert listing(cache) == before
    assert f"shards: those of {own}; --source hub goes back" in capsys.readouterr().out
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("harness.download.RETRY_SECONDS", (0,))
        assert C.DATASET in sentence(["--source", "hub"])
    assert listing(cache) == before  # and what was there is still there


def test_a_change_of_an_own_shard_is_noticed(own, cache, capsys):
    prepare.main(["--source", str(own)])
    before = listing(cache / "rows")
    write_shard(own / "b part.parquet", make_documents(seed=3, count=300))
    prepare.main([])
    out = capsys.readouterr().out
    assert "tokenizer: of other shards or rules, it is trained anew" in out
    assert not set(listing(cache / "rows")) & set(before)


@pytest.mark.parametrize(
    "table, what",
    [
        (
            pa.table({"content": ["a"]}),
            "holds no good column `text` .it has the columns content",
        ),
        (pa.table({"text": pa.array([1])}), "it is of type int64, not string"),
        (pa.table({"text": pa.array([], pa.string())}), "has no rows"),
        (None, "holds no good column `text`"),
    ],
)
def test_own_shard_that_cannot_be_used_is_named_before_any_work(own, cache, table, what):
    if table is None:
        (own / "b part.parquet").write_text("text")
    else:
        pq.write_table(table, own / "b part.parquet")
    said = sentence(["--source", str(own)])
    assert str(own / "b part.parquet") in said and re.search(what, said)
    assert listing(cache) == {".lock": b""}


@pytest.mark.parametrize("names", [[], ["one.parquet"]])
def test_too_few_own_shards_are_an_error_that_says_how_many(tmp_path, cache, names):
    (tmp_path / "few").mkdir()
    for name in names:
        write_shard(tmp_path / "few" / name, ["a"])
    said = sentence(["--source", str(tmp_path / "few")])
    assert (
        f"{tmp_path / 'few'} holds {len(names)} files *.parquet; give two or more" in said
    )
    assert "holds 0 files" in sentence(["--source", str(tmp_path / "nowhere")])


def test_document_that_cannot_be_tokenized_names_its_shard(own, cache):
    write_shard(own / "b part.parquet", ["good", " " * 2_000_000])
    said = sentence(["--source", str(own)])
    assert (
        str(own / "b part.parquet") in said and "tiktoken gives up on a document" in said
    )
    assert not list((cache / "rows").glob("b*")) and not list((cache / "rows").glob(".*"))


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


def flip(path: Path) -> None:
    body = np.fromfile(path, np.uint8)
    body[len(body) // 2] ^= 1
    body.tofile(path)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-2])


@pytest.mark.parametrize(
    "pattern", ["../../own/a.parquet", "rows/a.*", "rows/z.*", "tokenizer/ranks.tiktoken"]
)
@pytest.mark.parametrize(
    "damage, what",
    [(flip, "bytes changed"), (cut, "damaged: it has"), (Path.unlink, "missing")],
    ids=["a byte changed", "cut short", "gone"],
)
def test_check_names_what_is_damaged_and_prepare_mends_it(
    whole, own, capsys, pattern, damage, what
):
    good, source = listing(whole), listing(own)
    (path,) = whole.glob(pattern)
    damage(path)
    assert "1 damaged; run" in sentence(["--check"])
    line = capsys.readouterr().out.splitlines()[-1]
    if "tokenizer" in pattern:
        assert str(path.parent) in line and "missing or damaged" in line
    else:
        assert path.name in line and what in line
    if "own" in pattern:
        path.write_bytes(source[path.name])  # this one is the user's to mend
    prepare.main([])
    assert listing(whole) == good
    prepare.main(["--check"])


def test_check_names_everything_that_is_damaged(whole, capsys):
    for path in (whole / "rows").iterdir():
        flip(path)
    assert "3 damaged" in sentence(["--check"])
    said = capsys.readouterr().out
    assert all(str(path) in said for path in (whole / "rows").iterdir())


def test_check_notices_rows_of_other_rules(whole, capsys, monkeypatch):
    monkeypatch.setattr("harness.tokenizer.fast_pattern", lambda pattern: pattern)
    about = json.loads((whole / "tokenizer" / "tokenizer.json").read_text())
    monkeypatch.setattr(C, "SPLIT_PATTERN", r"\s+|\S+")
    about["pattern"] = C.SPLIT_PATTERN
    (whole / "tokenizer" / "tokenizer.json").write_text(json.dumps(about))
    assert "1 damaged" in sentence(["--check"])
    assert "are not of these shards and rules" in capsys.readouterr().out


def test_check_where_nothing_is_prepared_says_what_to_do(cache):
    assert re.search(
        "manifest.json is missing, .*; run .*prepare.py", sentence(["--check"])
    )
    assert not cache.exists()
