"""The trained model: saved in a plain file beside the result, which it never costs."""

import dataclasses
import json
import zipfile

import numpy as np
import pytest
import torch

import constants as C
from harness import checkpoint
from harness.files import data_dir
from harness.run import Run
from tiny import Config, Model

CONFIG = Config()


@pytest.fixture
def model() -> Model:
    return Model(CONFIG)


def test_what_is_saved_is_the_model_in_a_format_without_pickle(
    ended_run, model, model_file
):
    checkpoint.save(ended_run, model, CONFIG)
    with zipfile.ZipFile(model_file) as archive:  # numpy's format, by hand
        assert archive.testzip() is None
        bodies = {name: archive.read(name) for name in archive.namelist()}
    assert all(
        body.startswith(b"\x93NUMPY") and b"'|O'" not in body for body in bodies.values()
    )
    about = json.loads(str(np.load(model_file, allow_pickle=False)["about.json"]))
    assert about["config"] == dataclasses.asdict(CONFIG) and about["val_bpb"] == 1.25
    assert about["rules"] == ended_run.rules and about["commit"] == ended_run.commit
    arrays = {name: a for name, a in np.load(model_file).items() if name != "about.json"}
    expected = dict(model.named_parameters())
    assert arrays.keys() == expected.keys()
    assert all((arrays[k] == expected[k].detach().numpy()).all() for k in expected)


def test_a_model_that_was_not_evaluated_is_not_saved_with_anothers_result(
    ended_run, model, model_file, capsys
):
    ended_run.measured = torch.optim.swa_utils.AveragedModel(model)
    checkpoint.save(ended_run, model, CONFIG)
    assert "it is not the one that run.evaluate measured" in capsys.readouterr().err
    assert not model_file.exists()
    ended_run.measured = torch.compile(model)
    checkpoint.save(ended_run, model, CONFIG)
    assert model_file.exists()


def test_the_next_run_writes_over_it_and_sweeps_up_what_a_killed_one_left(
    ended_run, model, model_file
):
    checkpoint.save(ended_run, model, CONFIG)
    before, left = model_file.read_bytes(), model_file.with_name(".model.npz.123.tmp")
    left.write_bytes(b"half")
    with torch.no_grad():
        model.wte.weight += 1.0
    checkpoint.save(ended_run, model, CONFIG)
    assert model_file.read_bytes() != before and list(model_file.parent.iterdir()) == [
        model_file
    ]


def test_weights_in_half_precision_are_saved_as_floats_and_a_compiled_model_by_its_names(
    ended_run, model, model_file
):
    names = set(model.state_dict())
    checkpoint.save(ended_run, torch.compile(model.bfloat16()), CONFIG)
    arrays = {k: v for k, v in np.load(model_file).items() if k != "about.json"}
    assert set(arrays) == names and {a.dtype for a in arrays.values()} == {
        np.dtype("float32")
    }


def test_saving_can_be_turned_off_and_that_is_no_rule(
    ended_run, model, model_file, monkeypatch
):
    monkeypatch.setattr(C, "SAVE", False)
    checkpoint.save(ended_run, model, CONFIG)
    assert not model_file.parent.exists()
    assert Run(data_dir(), torch.device("cpu")).rules == ended_run.rules


@pytest.mark.parametrize("config", [CONFIG, "no dataclass", None])
def test_a_model_that_cannot_be_saved_costs_a_line_and_no_result(
    ended_run, model, model_file, config, tmp_path, capsys
):
    if config is CONFIG:
        (tmp_path / "checkout").write_text("a file where the folder should be")
    checkpoint.save(ended_run, model, config)
    (line,) = capsys.readouterr().err.splitlines()
    assert (
        line.startswith(f"the model was not saved in {model_file} (")
        and "result stands" in line
    )


def test_a_full_disk_leaves_the_model_of_the_run_before(
    ended_run, model, model_file, monkeypatch, capsys
):
    checkpoint.save(ended_run, model, CONFIG)
    before = model_file.read_bytes()

    def full(out, **arrays):
        out.write(b"some of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", full)
    checkpoint.save(ended_run, model, CONFIG)
    assert "No space left on device" in capsys.readouterr().err
    assert model_file.read_bytes() == before and list(model_file.parent.iterdir()) == [
        model_file
    ]


def test_what_was_saved_is_loaded(ended_run, model, model_file):
    checkpoint.save(ended_run, model, CONFIG)
    about, weights = checkpoint.load()
    assert Config(**about["config"]) == CONFIG and about["commit"] == ended_run.commit
    assert about["val_bpb"] == 1.25 and about["tokenizer"] == ended_run.tokenizer.sha256
    expected = model.state_dict()
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


def test_a_missing_model_names_the_smoke_runs_under_the_full_rules_alone(
    model_file, monkeypatch
):
    smoke = "; `AUTORESEARCH_SMOKE=1 uv run sample.py TEXT` takes a smoke run's"
    for is_smoke, end in ((True, ""), (False, smoke)):
        monkeypatch.setattr(C, "SMOKE", is_smoke)
        with pytest.raises(ValueError, match=f"^there is no .*AUTORESEARCH_SAVE=0{end}$"):
            checkpoint.load()
