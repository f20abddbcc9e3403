"""What all tests share: smoke rules, a cache of their own, no network, a tiny corpus."""

import atexit
import gc
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

CACHE = Path(tempfile.mkdtemp(prefix="autoresearch-tests-"))
atexit.register(shutil.rmtree, CACHE, ignore_errors=True)
PROXIES = [f"{kind}_proxy" for kind in ("http", "https", "all")]
for name in [
    "AUTORESEARCH_SEED",
    "HF_TOKEN",
    "HF_ENDPOINT",
    "HF_TOKEN_PATH",
    "HUGGING_FACE_HUB_TOKEN",
    "REQUESTS_CA_BUNDLE",
    "CURL_CA_BUNDLE",
    "SSL_CERT_FILE",
    "SSL_CERT_DIR",
    *PROXIES,
    *map(str.upper, PROXIES),
]:
    os.environ.pop(name, None)
if os.environ.pop("PYTHONDONTWRITEBYTECODE", ""):
    # Else each of the processes compiles torch's Python by itself, which takes 3 s.
    sys.dont_write_bytecode = False
    sys.pycache_prefix = os.environ["PYTHONPYCACHEPREFIX"] = str(CACHE / "pycache")
if "PYTEST_XDIST_WORKER" in os.environ:  # there are as many of these as cores
    os.environ["OMP_NUM_THREADS"] = "1"
# A script that runs us in the background ignores Ctrl-C, and so would all that we start.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
# Before the first import of constants, which reads them once.
os.environ |= {
    "AUTORESEARCH_SMOKE": "1",
    "AUTORESEARCH_CACHE": str(CACHE),
    "HF_HUB_OFFLINE": "1",
    "HF_HOME": str(CACHE / "huggingface"),  # nobody is logged in there
    "OMP_WAIT_POLICY": "PASSIVE",  # before torch is loaded, as constants.py has it
    "GOMP_SPINCOUNT": "0",
}

import pyarrow as pa  # noqa: E402  (importable only after the environment is set)
import pyarrow.parquet as pq  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402

import constants as C  # noqa: E402
from harness import data, download  # noqa: E402
from harness.files import describe  # noqa: E402
from harness.run import Run  # noqa: E402
from harness.tokenizer import Tokenizer, ensure_tokenizer  # noqa: E402
from hub import Hub  # noqa: E402

# Alphabets of two-, three- and four-byte characters; the words of a corpus are drawn from them.
SCRIPTS = [
    "etaoinshrdlucmfwypvbgk",
    "éèêëàùïîôûçñåøüß",
    "аеиотнсрвлкмдпуябгзй",
    "αβγδεζηθικλμνξοπρστυφχψω",
    "مرحبابالعدغفقكلنهوي",
    "नमस्तेदुनियाकगचजटडतपबयलव",
    "的一是不了人我在有他这中大来上国",
    "ひらがなカタカナ日本語をはにのと",
    "😀😂🥲🤖🔥🚀🌍👩👨👧🏽🇫🇷",
]
STEP_LINE = re.compile(
    r"step \d{5} \(\d+\.\d%\) \| loss: \d+\.\d{4} \| lrm: \d\.\d\d \| dt: \d+ms \| "
    r"tok/sec: [\d,]+ \| epoch: \d+ \| remaining: \d+s"
)
SPECIAL_LOOKING = [
    "<|reserved_0|>",
    "a <|reserved_3|> in the middle, and <|endoftext|> <|bos|> [BOS] </s>",
    "<|reserved_0|><|reserved_0|>",
    "<|reserved_",
]


# The files that take longest, in that order: where there are workers, they begin first.
LONGEST = """smoke edits compile_cache cheats night faults guard run""".split()


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Return how many processes share the tests: none for a part of them, which ends sooner so.

    None beside a GPU either, whose speed and memory are measured.
    """
    all_of_them = config.args_source.name == "TESTPATHS"
    all_of_them &= not (
        config.option.keyword
        or config.option.markexpr
        or getattr(config.option, "lf", False)  # not there without its plugin
    )
    return min(os.cpu_count(), 4) if all_of_them and not torch.cuda.is_available() else 0


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if "PYTEST_XDIST_WORKER" in os.environ:
        first = {f"test_{name}.py": k for k, name in enumerate(LONGEST)}
        items.sort(key=lambda item: first.get(item.path.name, len(first)))
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))


def pytest_collection_finish() -> None:
    gc.freeze()  # torch and all tests: a collection that looks at them takes 0.3 s


@pytest.fixture(scope="session", autouse=True)
def own_process():
    """Let no run in this process end it with a status of its own, or refuse it files."""
    patch = pytest.MonkeyPatch()
    patch.setattr("harness.guard.demand_result", lambda run: None)
    patch.setattr("harness.guard.refuse_to_open", lambda folder, root: None)
    yield
    patch.undo()


@pytest.fixture(scope="session", autouse=True)
def only_localhost():
    """Fail a test that connects to, or looks up, any host but 127.0.0.1."""
    patch, allowed = (
        pytest.MonkeyPatch(),
        {"127.0.0.1", b"127.0.0.1", "localhost", "", None},
    )

    def guard(function, host_of):
        def guarded(*args, **kwargs):
            host = host_of(*args, **kwargs)
            if host not in allowed:
                pytest.fail(f"a test reached for the network: {host}")
            return function(*args, **kwargs)

        return guarded

    def host_of_socket(sock, address):
        return address[0] if sock.family in (socket.AF_INET, socket.AF_INET6) else None

    for name in ("connect", "connect_ex"):
        patch.setattr(
            socket.socket, name, guard(getattr(socket.socket, name), host_of_socket)
        )
    patch.setattr(
        socket, "getaddrinfo", guard(socket.getaddrinfo, lambda host, *_, **__: host)
    )
    yield
    patch.undo()


def write_shard(path: Path, documents: list[str], row_group_size: int = 100) -> Path:
    """Write a shard as the data set's are: parquet, one column `text`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(
        pa.table({"text": pa.array(documents, pa.string())}), path, row_group_size
    )
    return path


def sentence(main, *args) -> str:
    """Return what `main` ends the process with: a sentence, which Python prints, and status 1."""
    with pytest.raises(SystemExit) as caught:
        main(*args)
    assert isinstance(caught.value.code, str), "the exit status would be 0"
    assert "\n" not in caught.value.code and len(caught.value.code) < 800
    return caught.value.code


def wait_until(true, seconds: float) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.05)


def wait_for_end(pid: int, seconds: float = 10) -> None:
    """Wait for the end of a process that may be nobody's child, as a zombie or for good."""
    stat = Path("/proc", str(pid), "stat")
    wait_until(lambda: not stat.exists() or ") Z " in stat.read_text(), seconds)


def ends_with_its_parent(parent: subprocess.Popen, pid: Path) -> None:
    """Kill `parent` once its child has written its process id to a file; wait for the child."""
    wait_until(lambda: pid.exists() and pid.read_text(), 60)
    parent.kill()
    parent.wait()
    wait_for_end(int(pid.read_text()))


def copy_checkout(folder: Path) -> Path:
    """Copy the scripts and harness/ to `folder`, as a clone has them."""
    root = Path(C.__file__).parent
    for path in [*root.glob("*.py"), *root.glob("harness/*.py")]:
        copy = folder / path.relative_to(root)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, copy)
    return folder


def make_documents(seed: int, count: int) -> list[str]:
    """Return random documents of 1 to some 300 words; words recur, as BPE needs it."""
    rng = random.Random(seed)
    words = [
        "".join(rng.choices(script, k=rng.randint(1, 7)))
        for script in SCRIPTS
        for _ in range(60)
    ]
    words += [str(rng.randint(0, 10**6)) for _ in range(60)] + [
        "I'm",
        "they'll",
        "WE'VE",
        "don't",
    ]
    spaces = [" "] * 12 + [", ", ".\n", "\n\n", "  ", "\t", "\r\n"]
    documents = []
    for _ in range(count):
        n = int(rng.paretovariate(1.1)) + 4
        drawn = rng.choices(words, k=min(n, 300))
        documents.append("".join(word + rng.choice(spaces) for word in drawn))
    return documents


@pytest.fixture(scope="session")
def corpus() -> list[str]:
    """Documents of every awkward kind: empty, very long, many scripts, special-looking; 600."""
    documents = make_documents(seed=0, count=580)
    documents += [*SPECIAL_LOOKING, "", "", " ", "\n", "\0", "\x7f\x1b[0m", "x"]
    documents += [
        "\ufeff",
        "\ufffd",
        "e\u0301 \u200d\u202e zero width",
        "\U0010ffff\ue000",
    ]
    documents += ["a" * 1000, "é" * 700, "1234567890" * 9, "\r\n" * 9]
    documents += ["".join(make_documents(seed=1, count=400))]
    random.Random(0).shuffle(documents)
    return documents


@pytest.fixture(scope="session")
def tiny_tokenizer(corpus: list[str], tmp_path_factory) -> Tokenizer:
    """A tokenizer of C.VOCAB_SIZE ids, trained on `corpus`."""
    folder = tmp_path_factory.mktemp("tiny")
    shard = write_shard(folder / C.SHARD_NAME.format(0), corpus)
    return ensure_tokenizer(folder / "tokenizer", {shard: describe(shard)})


@pytest.fixture(scope="session")
def prepared(tmp_path_factory) -> Path:
    """A folder as `prepare` leaves it under the smoke rules. Copy it before you damage it."""
    folder = tmp_path_factory.mktemp("prepared")
    data.prepare(folder, num_shards=3, workers=2)
    return folder


@pytest.fixture(scope="session")
def shard_folder(corpus: list[str], tmp_path_factory) -> Path:
    """Shards 0, 1, 2 and the validation shard, tiny, to be served by a hub. Not to be changed."""
    folder = tmp_path_factory.mktemp("served")
    for k, number in enumerate([0, 1, 2, C.VAL_SHARD]):
        documents = corpus[:500] if k == 0 else make_documents(seed=100 + k, count=200)
        write_shard(folder / C.SHARD_NAME.format(number), documents)
    return folder


@pytest.fixture
def hub(shard_folder: Path, monkeypatch) -> Iterator[Hub]:
    """The stand-in for the hub, as HF_ENDPOINT, over `shard_folder`; retries do not wait."""
    with Hub(shard_folder) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        monkeypatch.setattr(download.hub_constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(download, "RETRY_SECONDS", (0, 0, 0))
        yield hub


@pytest.fixture
def full_rules(monkeypatch) -> None:
    """Let `prepare` ask the hub for shards, as under the full rules; sizes stay those of smoke."""
    monkeypatch.setattr(C, "SMOKE", False)
    monkeypatch.setattr(download.hub_constants, "HF_HUB_OFFLINE", False)


@pytest.fixture
def cache(tmp_path, monkeypatch, full_rules) -> Path:
    """The folder that prepare.py prepares under the full rules, still missing."""
    monkeypatch.setenv("AUTORESEARCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("prepare.load_flash_attention", lambda: None)
    return tmp_path / "cache" / "climbmix"


@pytest.fixture
def prepared_copy(prepared, tmp_path, monkeypatch) -> Path:
    """A copy of what was prepared under the smoke rules, to be changed, as the folder of runs."""
    monkeypatch.setenv("AUTORESEARCH_CACHE", str(tmp_path / "cache"))
    fresh = shutil.ignore_patterns("last_run.json")  # of other tests
    return Path(shutil.copytree(prepared, tmp_path / "cache" / "smoke", ignore=fresh))


@pytest.fixture
def model_file(tmp_path, monkeypatch) -> Path:
    """Where models are saved in a test, in a folder that is not there yet."""
    monkeypatch.setattr("harness.checkpoint.MODEL", tmp_path / "checkout" / "model.npz")
    return tmp_path / "checkout" / "model.npz"


@pytest.fixture
def ended_run(prepared, tmp_path, monkeypatch) -> Run:
    """A run with a result, on prepared data where train.py looks for it."""
    (tmp_path / "smoke").symlink_to(prepared)
    monkeypatch.setenv("AUTORESEARCH_CACHE", str(tmp_path))
    run = Run(prepared, torch.device("cpu"))
    run.val_bpb = 1.25
    return run
