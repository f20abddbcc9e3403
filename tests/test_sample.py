"""The trained model: saved in a plain file beside the result, which it never costs, and used."""

import dataclasses
import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

import constants as C
import sample
import train
from harness.files import data_dir
from harness.run import Run

CPU = torch.device("cpu")
CONFIG = train.GPTConfig(
    C.MAX_SEQ_LEN, C.VOCAB_SIZE, 2, 32, 16, "SL", 32, 10_000.0, 15.0, 1.3, 64
)


@pytest.fixture(autouse=True)
def file(tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr(sample, "MODEL", tmp_path / "checkout" / "model.npz")
    return sample.MODEL


@pytest.fixture
def run(prepared, tmp_path, monkeypatch) -> Run:
    """A run with a result, for prepared data where train.py looks for it."""
    (tmp_path / "smoke").symlink_to(prepared)
    monkeypatch.setenv("AUTORESEARCH_CACHE", str(tmp_path))
    run = Run(prepared, CPU)
    run.val_bpb = 1.25
    return run


@pytest.fixture
def model() -> train.GPT:
    """A model whose every weight was drawn, so that none is 0 or 1 by chance."""
    model = train.build_saved(dataclasses.asdict(CONFIG), CPU)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.3)
    return model


def sentence(argv: list[str]) -> str:
    with pytest.raises(SystemExit) as end:
        train.main(argv)
    assert isinstance(end.value.code, str) and "\n" not in end.value.code
    return end.value.code


# ---- Saved --------------------------------------------------------------------------------------
def test_what_is_saved_is_the_model_in_a_format_without_pickle(run, model, file):
    sample.save(run, model, CONFIG)
    with zipfile.ZipFile(file) as archive:  # numpy's format, by hand
        assert archive.testzip() is None
        bodies = {name: archive.read(name) for name in archive.namelist()}
    assert all(
        body.startswith(b"\x93NUMPY") and b"'|O'" not in body for body in bodies.values()
    )
    about = json.loads(str(np.load(file, allow_pickle=False)["about.json"]))
    assert about["config"] == dataclasses.asdict(CONFIG) and about["val_bpb"] == 1.25
    assert about["rules"] == run.rules and about["commit"] == run.commit
    arrays = {name: a for name, a in np.load(file).items() if name != "about.json"}
    expected = dict(model.named_parameters())
    assert arrays.keys() == expected.keys()
    assert all((arrays[k] == expected[k].detach().numpy()).all() for k in expected)


def test_the_next_run_writes_over_it_and_sweeps_up_what_a_killed_one_left(
    run, model, file
):
    sample.save(run, model, CONFIG)
    before, left = file.read_bytes(), file.with_name(".model.npz.123.tmp")
    left.write_bytes(b"half")
    with torch.no_grad():
        model.wte.weight += 1.0
    sample.save(run, model, CONFIG)
    assert file.read_bytes() != before and list(file.parent.iterdir()) == [file]


def test_weights_in_half_precision_are_saved_as_floats_and_a_compiled_model_by_its_names(
    run, model, file
):
    names = set(model.state_dict())
    sample.save(run, torch.compile(model.bfloat16()), CONFIG)
    arrays = {k: v for k, v in np.load(file).items() if k != "about.json"}
    assert set(arrays) == names and {a.dtype for a in arrays.values()} == {
        np.dtype("float32")
    }


def test_saving_can_be_turned_off_and_that_is_no_rule(run, model, file, monkeypatch):
    monkeypatch.setattr(C, "SAVE", False)
    sample.save(run, model, CONFIG)
    assert not file.parent.exists()
    assert Run(data_dir(), CPU).rules == run.rules


@pytest.mark.parametrize("config", [CONFIG, "no dataclass", None])
def test_a_model_that_cannot_be_saved_costs_a_line_and_no_result(
    run, model, file, config, tmp_path, capsys
):
    if config is CONFIG:
        (tmp_path / "checkout").write_text("a file where the folder should be")
    sample.save(run, model, config)
    (line,) = capsys.readouterr().out.splitlines()
    assert (
        line.startswith(f"the model was not saved in {file} (")
        and "result stands" in line
    )


def test_a_full_disk_leaves_the_model_of_the_run_before(
    run, model, file, monkeypatch, capsys
):
    sample.save(run, model, CONFIG)
    before = file.read_bytes()

    def full(out, **arrays):
        out.write(b"some of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", full)
    sample.save(run, model, CONFIG)
    assert "No space left on device" in capsys.readouterr().out
    assert file.read_bytes() == before and list(file.parent.iterdir()) == [file]


def test_train_py_saves_before_the_summary_which_is_printed_last():
    text = Path(train.__file__).read_text("utf-8")
    assert (
        text.index("run.evaluate(")
        < text.index("sample.save(")
        < text.index("run.print_summary(")
    )


# ---- Used ---------------------------------------------------------------------------------------
def test_a_text_is_continued_by_the_saved_weights_the_same_each_time(
    run, model, file, monkeypatch, capfdbinary
):
    monkeypatch.setattr(sample, "SAMPLE_TOKENS", 12)
    sample.save(run, model, CONFIG)
    outs = []
    for _ in range(2):
        train.main(["--sample", "def main():\n    "])
        out, err = capfdbinary.readouterr()
        outs.append(out)
    assert f"model of commit {run.commit}, val_bpb 1.250000" in err.decode()
    assert outs[0] == outs[1] and outs[0].startswith(b"def main():\n    ")
    # The same by hand: the whole row through the model each time, the seed of the rules.
    ids, generator = run.tokenizer.encode("def main():\n    ").tolist(), torch.Generator()
    generator.manual_seed(C.SEED)
    n = len(ids)
    while len(ids) < n + 12:
        with torch.no_grad():
            p = torch.softmax(model(torch.tensor([ids]))[0, -1] / 0.8, 0)
        ids.append(int(torch.multinomial(p, 1, generator=generator)))
        if ids[-1] >= C.BOS_ID:
            ids.pop()
            break
    assert outs[0] == run.tokenizer.encoding.decode_bytes(ids[1:]) + b"\n"


def test_ctrl_c_ends_the_text_without_a_traceback(
    run, model, file, monkeypatch, capfdbinary
):
    def interrupted(*args):
        yield b"one"
        raise KeyboardInterrupt

    monkeypatch.setattr(sample, "continue_text", interrupted)
    sample.save(run, model, CONFIG)
    train.main(["--sample", "count: "])
    assert capfdbinary.readouterr().out == b"count: one\n"


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, RuntimeError])
def test_no_room_on_the_gpu_is_one_sentence_in_whoevers_words(
    run, model, file, error, monkeypatch
):
    def full(*args):
        raise error("CUDA error: CUBLAS_STATUS_ALLOC_FAILED; out of memory")

    sample.save(run, model, CONFIG)
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


def test_no_model_is_one_sentence(run, file):
    said = sentence(["--sample", "a"])
    assert said.startswith(f"train.py: there is no {file}; run uv run train.py first")


@pytest.mark.parametrize("damage", ["cut", "text", "no json", "half"])
def test_a_damaged_model_is_one_sentence(run, model, file, damage):
    sample.save(run, model, CONFIG)
    if damage == "cut":
        file.write_bytes(file.read_bytes()[:-1000])
    elif damage == "text":
        file.write_text("no zip")
    else:
        about = {"about.json": np.array('{"config": {}}')} if damage == "half" else {}
        np.savez(file, wte=np.zeros(3), **about)
    said = sentence(["--sample", "a"])
    assert (
        said.startswith(f"train.py: {file} is damaged (")
        and "run uv run train.py" in said
    )


def test_nothing_is_unpickled_from_it(run, file, tmp_path):
    class Trap:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "sprung",))

    file.parent.mkdir()
    np.savez(file, **{"about.json": np.array([Trap()], dtype=object)})
    assert "is damaged" in sentence(["--sample", "a"])
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize(
    "change",
    [{"n_layer": 3}, {"n_embd": 64}, {"n_experts": 8}, {"head_dim": 3}],
    ids=["layers", "width", "new knob", "impossible"],
)
def test_a_model_of_another_train_py_is_one_sentence_with_its_commit(
    run, model, file, change
):
    run.commit = "abc1234"
    sample.save(run, model, CONFIG)
    with np.load(file) as saved:
        arrays = dict(saved)
    about = json.loads(str(arrays.pop("about.json")))
    about["config"] |= change
    np.savez(file, **arrays, **{"about.json": np.array(json.dumps(about))})
    said = sentence(["--sample", "a"])
    assert said.startswith(
        f"train.py: {file} is of another train.py, that of commit abc1234 ("
    )


def test_a_model_of_another_tokenizer_is_one_sentence(run, model, file):
    run.tokenizer.sha256 = "of other rules"
    sample.save(run, model, CONFIG)
    assert "was trained with another tokenizer" in sentence(["--sample", "a"])


def test_another_option_is_a_mistake(capsys):
    with pytest.raises(SystemExit) as end:
        train.main(["--smaple", "a"])
    assert end.value.code == 2 and "--sample TEXT" in capsys.readouterr().err


# ---- On a GPU -----------------------------------------------------------------------------------
@pytest.mark.gpu
def test_a_text_is_continued_on_a_gpu_as_on_a_cpu(run):
    config = dataclasses.asdict(CONFIG) | {"n_embd": 128, "head_dim": 64}
    model, device = train.build_saved(config, CPU), torch.device("cuda")
    on_gpu = train.build_saved(config, device)
    on_gpu.load_state_dict(model.state_dict())
    with torch.compiler.set_stance("force_eager"):
        out = b"".join(sample.continue_text(on_gpu, run.tokenizer, "def", device))
    assert len(out) > 0
    idx = torch.tensor([run.tokenizer.encode("def main").tolist()])
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        torch.testing.assert_close(
            on_gpu(idx.to(device)).cpu(), model(idx), atol=0.3, rtol=0.05
        )
