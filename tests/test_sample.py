"""The model of the last run: it continues a text, or says in a sentence why it cannot."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import sentence
from tiny import CONFIG

import constants as C
import sample
import train

CPU = torch.device("cpu")
pytestmark = pytest.mark.usefixtures("model_file")  # never the file of the checkout


def test_a_text_is_continued_by_the_saved_weights_the_same_each_time(
    ended_run, model, model_file, monkeypatch, capfdbinary
):
    monkeypatch.setattr(sample, "SAMPLE_TOKENS", 12)
    sample.save(ended_run, model, CONFIG)
    outs = []
    for _ in range(2):
        train.main(["--sample", "def main():\n    "])
        out, err = capfdbinary.readouterr()
        outs.append(out)
    assert f"model of commit {ended_run.commit}, val_bpb 1.250000" in err.decode()
    assert outs[0] == outs[1] and outs[0].startswith(b"def main():\n    ")
    # The same by hand: the whole row through the model each time, the seed of the rules.
    ids, generator = (
        ended_run.tokenizer.encode("def main():\n    ").tolist(),
        torch.Generator(),
    )
    generator.manual_seed(C.SEED)
    n = len(ids)
    while len(ids) < n + 12:
        with torch.no_grad():
            p = torch.softmax(model(torch.tensor([ids]))[0, -1] / 0.8, 0)
        ids.append(int(torch.multinomial(p, 1, generator=generator)))
        if ids[-1] >= C.BOS_ID:
            ids.pop()
            break
    assert outs[0] == ended_run.tokenizer.encoding.decode_bytes(ids[1:]) + b"\n"


def test_ctrl_c_ends_the_text_without_a_traceback(
    ended_run, model, model_file, monkeypatch, capfdbinary
):
    def interrupted(*args):
        yield b"one"
        raise KeyboardInterrupt

    monkeypatch.setattr(sample, "continue_text", interrupted)
    sample.save(ended_run, model, CONFIG)
    train.main(["--sample", "count: "])
    assert capfdbinary.readouterr().out == b"count: one\n"


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, RuntimeError])
def test_no_room_on_the_gpu_is_one_sentence_in_whoevers_words(
    ended_run, model, model_file, error, monkeypatch
):
    def full(*args):
        raise error("CUDA error: CUBLAS_STATUS_ALLOC_FAILED; out of memory")

    sample.save(ended_run, model, CONFIG)
    monkeypatch.setattr(train, "build_training", full)
    with pytest.raises(
        SystemExit, match="no room on the GPU .*; CUDA_VISIBLE_DEVICES= in front"
    ):
        train.main(["--sample", "count: "])


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


def test_no_model_is_one_sentence(ended_run, model_file):
    said = sentence(train.main, ["--sample", "a"])
    assert said.startswith(
        f"train.py: there is no {model_file}; run uv run train.py first"
    )


@pytest.mark.parametrize("damage", ["cut", "text", "no json", "half"])
def test_a_damaged_model_is_one_sentence(ended_run, model, model_file, damage):
    sample.save(ended_run, model, CONFIG)
    if damage == "cut":
        model_file.write_bytes(model_file.read_bytes()[:-1000])
    elif damage == "text":
        model_file.write_text("no zip")
    else:
        about = {"about.json": np.array('{"config": {}}')} if damage == "half" else {}
        np.savez(model_file, wte=np.zeros(3), **about)
    said = sentence(train.main, ["--sample", "a"])
    assert (
        said.startswith(f"train.py: {model_file} is damaged (")
        and "run uv run train.py" in said
    )


def test_nothing_is_unpickled_from_it(ended_run, model_file, tmp_path):
    class Trap:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "sprung",))

    model_file.parent.mkdir()
    np.savez(model_file, **{"about.json": np.array([Trap()], dtype=object)})
    assert "is damaged" in sentence(train.main, ["--sample", "a"])
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize(
    "change",
    [{"n_layer": 3}, {"n_embd": 64}, {"n_experts": 8}, {"head_dim": 3}],
    ids=["layers", "width", "new knob", "impossible"],
)
def test_a_model_of_another_train_py_is_one_sentence_with_its_commit(
    ended_run, model, model_file, change
):
    ended_run.commit = "abc1234"
    sample.save(ended_run, model, CONFIG)
    with np.load(model_file) as saved:
        arrays = dict(saved)
    about = json.loads(str(arrays.pop("about.json")))
    about["config"] |= change
    np.savez(model_file, **arrays, **{"about.json": np.array(json.dumps(about))})
    said = sentence(train.main, ["--sample", "a"])
    assert said.startswith(
        f"train.py: {model_file} is of another train.py, that of commit abc1234 ("
    )


def test_a_model_of_another_tokenizer_is_one_sentence(ended_run, model, model_file):
    ended_run.tokenizer.sha256 = "of other rules"
    sample.save(ended_run, model, CONFIG)
    assert "was trained with another tokenizer" in sentence(train.main, ["--sample", "a"])


def test_another_option_is_a_mistake(capsys):
    with pytest.raises(SystemExit) as end:
        train.main(["--smaple", "a"])
    assert end.value.code == 2 and "--sample TEXT" in capsys.readouterr().err


# ---- On a GPU -----------------------------------------------------------------------------------
@pytest.mark.gpu
def test_a_text_is_continued_on_a_gpu_as_on_a_cpu(ended_run):
    config = dataclasses.asdict(CONFIG) | {"n_embd": 128, "head_dim": 64}
    model, device = train.build_saved(config, CPU), torch.device("cuda")
    on_gpu = train.build_saved(config, device)
    on_gpu.load_state_dict(model.state_dict())
    with torch.compiler.set_stance("force_eager"):
        out = b"".join(sample.continue_text(on_gpu, ended_run.tokenizer, "def", device))
    assert len(out) > 0
    idx = torch.tensor([ended_run.tokenizer.encode("def main").tolist()])
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        torch.testing.assert_close(
            on_gpu(idx.to(device)).cpu(), model(idx), atol=0.3, rtol=0.05
        )
