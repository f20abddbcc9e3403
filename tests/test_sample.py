"""The model of the last run: it continues a text, or says in a sentence why it cannot."""

import contextlib
import json
import os
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch

import constants as C
import forks
import sample
from conftest import sentence
from harness import checkpoint, files
from harness.attention import masked_attention
from harness.files import data_dir
from tiny import TRAIN, Config, Model, build_model

CPU = torch.device("cpu")
ROOT = Path(C.__file__).parent
pytestmark = pytest.mark.usefixtures("model_file")  # never the file of the checkout


@pytest.fixture(autouse=True)
def tiny_train(monkeypatch) -> None:
    """Let the model be that of tiny.py, whatever train.py has."""
    monkeypatch.setattr(sample, "train", TRAIN)


def save(run, config: Config | None = None) -> Model:
    """Save a model as a run does; return it."""
    config = config or Config()
    model = build_model(config, masked_attention, CPU)
    checkpoint.save(run, model, config)
    return model.eval()


# ---- The text -----------------------------------------------------------------------------------
def test_a_text_is_continued_by_the_saved_weights_the_same_each_time(
    ended_run, monkeypatch, capfdbinary
):
    monkeypatch.setattr(sample, "SAMPLE_TOKENS", 12)
    model, outs = save(ended_run), []
    for _ in range(2):
        sample.main(["def main():\n    "])
        out, err = capfdbinary.readouterr()
        outs.append(out)
    assert f"model of commit {ended_run.commit}, val_bpb 1.250000" in err.decode()
    assert outs[0] == outs[1] and outs[0].startswith(b"def main():\n    ")
    # The same by hand: the whole row through the model each time, the seed of the rules.
    ids = ended_run.tokenizer.encode("def main():\n    ").tolist()
    generator = torch.Generator().manual_seed(C.SEED)
    n = len(ids)
    while len(ids) < n + 12:
        with torch.no_grad():
            p = torch.softmax(model(torch.tensor([ids]))[0, -1] / 0.8, 0)
        ids.append(int(torch.multinomial(p, 1, generator=generator)))
        if ids[-1] >= C.BOS_ID:
            ids.pop()
            break
    assert outs[0] == ended_run.tokenizer.encoding.decode_bytes(ids[1:]) + b"\n"


def test_dropout_is_off(ended_run, monkeypatch, capfdbinary):
    monkeypatch.setattr(sample, "SAMPLE_TOKENS", 12)
    save(ended_run, Config(dropout=0.5))
    outs = []
    for seed in range(3):
        torch.manual_seed(seed)
        sample.main(["a text"])
        outs.append(capfdbinary.readouterr().out)
    model, _, _ = sample.restore(CPU)
    assert not model.training and model.dropout.p == 0.5
    assert outs[0] == outs[1] == outs[2]


def test_ctrl_c_ends_the_text_without_a_traceback(ended_run, monkeypatch, capfdbinary):
    def interrupted(*args):
        yield b"one"
        raise KeyboardInterrupt

    monkeypatch.setattr(sample, "continue_text", interrupted)
    save(ended_run)
    sample.main(["count: "])
    assert capfdbinary.readouterr().out == b"count: one\n"


def one_id(wanted: int):
    """A model that is sure of one id."""

    def model(idx):
        assert idx.shape[0] == 1 and idx.shape[1] <= C.MAX_SEQ_LEN
        return 100.0 * torch.eye(C.VOCAB_SIZE)[wanted].expand(*idx.shape, -1)

    return model


def test_a_text_ends_with_its_document_or_when_there_is_enough(
    tiny_tokenizer, monkeypatch
):
    end = sample.continue_text(one_id(tiny_tokenizer.bos_id), tiny_tokenizer, "a", CPU)
    assert list(end) == []
    monkeypatch.setattr(sample, "SAMPLE_TOKENS", 5)
    letters = list(sample.continue_text(one_id(65), tiny_tokenizer, "", CPU))
    assert letters == [tiny_tokenizer.encoding.decode_single_token_bytes(65)] * 5


def test_a_text_longer_than_a_row_is_continued_from_its_end(tiny_tokenizer):
    text = "x y z " * C.MAX_SEQ_LEN
    assert len(next(sample.continue_text(one_id(65), tiny_tokenizer, text, CPU))) == 1


PIPED = """
import sys
import sample
def pieces():
    while True:
        yield b"more and more\\n"
sample.write("a text: ", pieces())
"""


def test_a_reader_that_has_seen_enough_ends_it_without_a_traceback(tmp_path):
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    os.mkfifo(tmp_path / "pipe")
    out, err = str(tmp_path / "pipe"), str(tmp_path / "err")
    forks.start([forks.Job(["-c", PIPED], env, str(tmp_path), out, err, 60)])
    with open(out, "rb") as pipe:  # which is closed as `| head -n 1` does
        assert pipe.readline() == b"a text: more and more\n"
    assert forks.finish() == [0] and Path(err).read_bytes() == b""


def test_a_text_that_cannot_be_written_is_one_sentence(ended_run, monkeypatch):
    save(ended_run)
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        said = sentence(sample.main, ["count: "])
    assert said == "sample.py: [Errno 28] No space left on device"


# ---- What cannot be had -------------------------------------------------------------------------
@pytest.mark.parametrize("error", [torch.OutOfMemoryError, RuntimeError])
def test_no_room_on_the_gpu_is_one_sentence_in_whoevers_words(
    ended_run, error, monkeypatch
):
    def full(*args):
        raise error("CUDA error: CUBLAS_STATUS_ALLOC_FAILED; out of memory")

    save(ended_run)
    monkeypatch.setattr(
        sample, "train", types.SimpleNamespace(GPTConfig=Config, build_model=full)
    )
    said = sentence(sample.main, ["count: "])
    assert (
        "no room on the GPU" in said
        and "; `CUDA_VISIBLE_DEVICES=-1 uv run sample.py" in said
    )


def test_no_model_is_one_sentence_that_names_the_smoke_runs(
    ended_run, model_file, monkeypatch
):
    said = sentence(sample.main, ["a"])
    assert said.startswith(
        f"sample.py: there is no {model_file}; run `{files.TRAIN}` first"
    )
    assert "takes a smoke run's" not in said  # these are the smoke rules
    monkeypatch.setattr(C, "SMOKE", False)
    monkeypatch.setattr("harness.gpu.compute_capability", lambda: (0, 0))
    said = sentence(sample.main, ["a"])
    command = "`AUTORESEARCH_SMOKE=1 uv run sample.py TEXT`"
    assert said.endswith(f"; {command} takes a smoke run's")


def test_a_byte_that_is_not_utf_8_is_a_question_mark(ended_run, capfdbinary):
    save(ended_run)
    sample.main([os.fsdecode(b"a \xff b")])
    assert capfdbinary.readouterr().out.startswith(b"a ? b")


@pytest.mark.parametrize("bit", range(0, 64, 9))
def test_a_model_with_a_flipped_bit_is_one_sentence(ended_run, model_file, bit):
    """In the list at the end of the file, from its first entry on."""
    save(ended_run)
    content = bytearray(model_file.read_bytes())
    content[content.index(b"PK\1\2") + 4 + bit // 8] ^= 1 << bit % 8
    model_file.write_bytes(content)
    with contextlib.suppress(SystemExit):  # or it is not read by Python
        sample.main(["a"])


@pytest.mark.parametrize("damage", ["cut", "text", "no json", "half"])
def test_a_damaged_model_is_one_sentence(ended_run, model_file, damage):
    save(ended_run)
    if damage == "cut":
        model_file.write_bytes(model_file.read_bytes()[:-1000])
    elif damage == "text":
        model_file.write_text("no zip")
    else:
        about = {"about.json": np.array('{"config": {}}')} if damage == "half" else {}
        np.savez(model_file, wte=np.zeros(3), **about)
    said = sentence(sample.main, ["a"])
    assert said.startswith(f"sample.py: {model_file} is damaged (")
    assert f"run `{files.TRAIN}`" in said


def test_nothing_is_unpickled_from_it(ended_run, model_file, tmp_path):
    class Trap:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "sprung",))

    model_file.parent.mkdir()
    np.savez(model_file, **{"about.json": np.array([Trap()], dtype=object)})
    assert "is damaged" in sentence(sample.main, ["a"])
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize(
    "change",
    [{"n_layer": 3}, {"n_embd": 64}, {"n_experts": 8}, {"n_embd": 3}],
    ids=["layers", "width", "new knob", "impossible"],
)
def test_a_model_of_another_train_py_is_one_sentence_with_its_commit(
    ended_run, model_file, change
):
    ended_run.commit = "abc1234"
    save(ended_run)
    with np.load(model_file) as saved:
        arrays = dict(saved)
    about = json.loads(str(arrays.pop("about.json")))
    about["config"] |= change
    np.savez(model_file, **arrays, **{"about.json": np.array(json.dumps(about))})
    said = sentence(sample.main, ["a"])
    assert said.startswith(
        f"sample.py: {model_file} is of another train.py, that of commit abc1234 ("
    )


def test_a_train_py_without_the_names_that_are_asked_of_it_is_one_sentence(
    ended_run, monkeypatch
):
    save(ended_run)
    monkeypatch.setattr(sample, "train", types.SimpleNamespace(build_model=build_model))
    assert "is of another train.py" in sentence(sample.main, ["a"])


def test_a_model_of_another_tokenizer_is_one_sentence(ended_run, model_file):
    ended_run.tokenizer.sha256 = "of other rules"
    save(ended_run)
    said = sentence(sample.main, ["a"])
    other = (
        f"is of another tokenizer than that in {data_dir()}; run `{files.TRAIN}` again"
    )
    assert said == f"sample.py: {model_file} {other}"


@pytest.mark.parametrize("argv", [[], ["--smaple", "a"], ["a", "b"]])
def test_a_command_that_is_not_one_text_is_a_mistake(argv, capsys):
    with pytest.raises(SystemExit) as end:
        sample.main(argv)
    assert end.value.code == 2 and "usage: " in capsys.readouterr().err


# ---- On a GPU -----------------------------------------------------------------------------------
@pytest.mark.gpu
def test_a_text_is_continued_on_a_gpu(ended_run, monkeypatch, capfdbinary):
    monkeypatch.setattr(
        "harness.gpu.choose_device", lambda training: torch.device("cuda")
    )
    save(ended_run)
    sample.main(["def"])
    out = capfdbinary.readouterr().out
    assert out.startswith(b"def") and len(out) > len(b"def\n")
