"""What a run rests on: `rules:`, `data:`, and the line on what changed since the last run."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch

import constants as C
import prepare
from conftest import copy_checkout, sentence
from harness.files import content_key
from harness.rules import LAST_RUN, compare_with_last, open_basis
from harness.run import Run

ROOT = Path(C.__file__).parent


def basis_of(folder: Path, root: Path = ROOT):
    return open_basis(root, folder)


def edit_manifest(folder: Path, change) -> None:
    """Change the rows of the manifest, which stays whole."""
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest.pop("key")
    manifest["rows"] = change(manifest["rows"])
    path.write_text(json.dumps(manifest | {"key": content_key(manifest)}))


def without_a_shard(rows: dict) -> dict:
    return dict([*rows.items()][1:])


def with_another_hash(rows: dict) -> dict:
    name = next(iter(rows))
    return rows | {name: rows[name] | {"sha256": "0" * 64}}


def in_another_order(rows: dict) -> dict:
    return dict([*rows.items()][::-1])


@pytest.mark.parametrize("change", [without_a_shard, with_another_hash, in_another_order])
def test_data_stands_for_the_training_rows_and_rules_does_not(prepared_copy, change):
    before = basis_of(prepared_copy)
    assert re.fullmatch("[0-9a-f]{8}", before.data)
    edit_manifest(prepared_copy, change)
    after = basis_of(prepared_copy)
    assert after.data != before.data and after.rules == before.rules


def test_data_is_taken_from_the_manifest_and_not_from_the_rows(prepared_copy):
    before = basis_of(prepared_copy)
    path = before.paths["train"][0]
    body = bytearray(path.read_bytes())
    body[9] ^= 1
    path.write_bytes(body)
    assert basis_of(prepared_copy).data == before.data


def test_validation_rows_copied_over_training_rows_are_found_by_the_check(
    prepared_copy, capsys
):
    """A run does not read all training rows to hash them, so `data:` is the same."""
    before = basis_of(prepared_copy)
    path, (val,) = before.paths["train"][0], before.paths["val"]
    size, body = path.stat().st_size, val.read_bytes()
    path.write_bytes((body * (size // len(body) + 1))[:size])
    assert basis_of(prepared_copy).data == before.data
    assert "1 damaged" in sentence(prepare.main, ["--check"])
    (line,) = capsys.readouterr().out.splitlines()
    assert path.name in line and "bytes changed" in line


def test_another_number_of_shards_is_other_data_and_the_same_again_is_not(prepared_copy):
    before = basis_of(prepared_copy)
    prepare.main(["--num-shards", "2"])
    fewer = basis_of(prepared_copy)
    prepare.main(["--num-shards", "3"])
    again = basis_of(prepared_copy)
    # The tokenizer is trained on what there is, so `rules` may change with so little text.
    assert fewer.data != before.data == again.data and again.rules == before.rules


# ---- Since the last run -------------------------------------------------------------------------
def test_the_first_run_and_one_like_the_last_say_nothing(prepared_copy):
    parts = basis_of(prepared_copy).parts
    assert compare_with_last(prepared_copy, parts) is None
    assert compare_with_last(prepared_copy, basis_of(prepared_copy).parts) is None


@pytest.fixture
def last(prepared_copy, tmp_path):
    """A checkout and a prepared folder on which there was a run."""
    checkout = copy_checkout(tmp_path / "checkout")
    compare_with_last(prepared_copy, basis_of(prepared_copy, checkout).parts)
    return checkout, prepared_copy


def test_fixed_files_that_changed_are_named(last):
    checkout, folder = last
    (checkout / "harness" / "peaks.py").write_text("")
    (checkout / "harness" / "more.py").write_text("")
    (checkout / "train.py").write_text("")  # is no fixed file
    said = compare_with_last(folder, basis_of(folder, checkout).parts)
    assert re.fullmatch(
        r"changed since the last run: rules (smoke-\w{8}), now (?!\1)smoke-\w{8}; "
        r"harness/more\.py, harness/peaks\.py",
        said,
    )
    assert compare_with_last(folder, basis_of(folder, checkout).parts) is None


def test_training_rows_that_changed_are_counted(last):
    checkout, folder = last
    edit_manifest(folder, without_a_shard)
    said = compare_with_last(folder, basis_of(folder, checkout).parts)
    assert re.fullmatch(
        r"changed since the last run: data \w{8}, now \w{8}; "
        r"training rows \(3 files, now 2\)",
        said,
    )


def test_tokenizer_and_validation_rows_are_named(last):
    checkout, folder = last
    parts = basis_of(folder, checkout).parts
    parts |= {"tokenizer": "other", "validation rows": ["other"], "rules": "smoke-0"}
    said = compare_with_last(folder, parts)
    assert said.endswith(", now smoke-0; tokenizer; validation rows")


def test_a_constant_changed_in_memory_is_named(last, monkeypatch):
    checkout, folder = last
    monkeypatch.setattr(C, "TIME_BUDGET", 1)
    said = compare_with_last(folder, basis_of(folder, checkout).parts)
    assert said.endswith("; constants in memory (TIME_BUDGET)")


@pytest.mark.parametrize("body", ["", "[]", "3", '{"rules": 1}', "\0", "null"])
def test_a_damaged_memory_is_as_none(last, body):
    checkout, folder = last
    (folder / LAST_RUN).write_text(body)
    parts = basis_of(folder, checkout).parts
    assert compare_with_last(folder, parts) is None
    assert json.loads((folder / LAST_RUN).read_text()) == parts


def test_a_folder_that_cannot_be_written_is_no_error(prepared, tmp_path):
    parts = basis_of(prepared).parts
    shutil.copy(prepared / "manifest.json", tmp_path / "file")
    assert compare_with_last(tmp_path / "file", parts) is None


def test_a_run_has_both_values(prepared):
    run, basis = Run(prepared, torch.device("cpu")), basis_of(prepared)
    assert (run.rules, run.data) == (basis.rules, basis.data)
