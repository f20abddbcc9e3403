"""Data preparation, once: the command line over harness/. Not edited.

Writes below ~/.cache/autoresearch (AUTORESEARCH_CACHE moves it):
    shards/shard_00000.parquet           as the hub serves it, checked against its SHA-256
    shards/.answers.jsonl                what the hub said of shards, until all is prepared
    tokenizer/ranks.tiktoken             one line per token: its bytes in base64, its rank
    tokenizer/tokenizer.json             split pattern, special tokens, hash of the ranks
    rows/shard_00000.<key>.u16           packed rows of T + 1 ids, uint16, little endian
    manifest.json                        written last: what is there, its sizes and hashes
Where there is a GPU, it then runs train.py up to its first step: that compiles into compiled/.
It may be killed at any moment and started again: files appear whole or not at all, a
download (shards/.<name>.<hash>.part) goes on where it broke, and a lock keeps a second
preparation waiting.
"""

import argparse
import errno
import os
import shlex
import signal
import sys
from pathlib import Path

import constants as C
from harness.attention import load_flash_attention
from harness.data import check, name_prepared, prepare
from harness.download import DOWNLOADS, with_socks
from harness.files import (
    PREPARE,
    WINDOWS,
    data_dir,
    remove_temporaries,
    smoke_command,
)
from harness.streams import keep_output

# What to do about an error of the operating system, by its number.
NO_SPACE = "free some space or move AUTORESEARCH_CACHE"
NO_FILES = "close programs"
if not WINDOWS:
    NO_FILES += " or raise the limit of open files (`ulimit -n 4096`)"
NO_MEMORY = "free some memory, or write the file with smaller row groups"
NOT_OURS = "make it readable, or take it out of its folder"
FORBIDDEN = "make it writable or set AUTORESEARCH_CACHE to a folder that is"
BAD_DISK = "check the disk or the network mount that it is on"
IN_THE_WAY = "a file or a link to nowhere is in its place: repair or move that"
ADVICE = {
    errno.ENOSPC: NO_SPACE,
    errno.EDQUOT: NO_SPACE,
    errno.EFBIG: NO_SPACE,
    errno.EMFILE: NO_FILES,
    errno.ENFILE: NO_FILES,
    errno.ENOMEM: NO_MEMORY,
    errno.EIO: BAD_DISK,
    errno.ESTALE: BAD_DISK,
    errno.EEXIST: IN_THE_WAY,
    errno.ENOTDIR: IN_THE_WAY,
    errno.EROFS: FORBIDDEN,
    errno.EACCES: FORBIDDEN,
    errno.EPERM: FORBIDDEN,
}


def command_of(args: argparse.Namespace, windows: bool = WINDOWS) -> str:
    """Return the command that prepares as `args` did; windows: in PowerShell's form."""
    words = []
    if args.num_shards is not None:
        words += ["--num-shards", str(args.num_shards)]
    if args.download_workers != DOWNLOADS:
        words += ["--download-workers", str(args.download_workers)]
    if args.source:
        quoted = "'" + args.source.replace("'", "''") + "'"
        words += ["--source", quoted if windows else shlex.quote(args.source)]
    prepare = "uv run prepare.py"
    return " ".join([smoke_command(prepare, windows) if C.SMOKE else prepare, *words])


def explain(error: Exception, args: argparse.Namespace) -> str:
    """Return what an error says and what to do, with the command that goes on."""
    command = command_of(args)
    advice = ADVICE.get(getattr(error, "errno", None))
    if advice is None:
        said = str(error).replace(PREPARE, command)
        return said.replace(with_socks(PREPARE), with_socks(command))
    name = getattr(error, "filename", None)
    path, folder = Path(name or data_dir()).absolute(), data_dir()
    if advice == FORBIDDEN and folder not in (path, *path.parents):
        # A folder that holds ours is still to be written to; else it is the user's text.
        advice = FORBIDDEN if path in folder.parents else NOT_OURS
    return f"{error}; {advice}, and run `{command}` again: it goes on where it stopped"


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Return the command line's flags, `source` as an absolute path; a bad one exits."""
    description = "Download, tokenize and pack the data, once."
    parser = argparse.ArgumentParser(description=description)
    default = f"as many as before, at first {C.DEFAULT_NUM_SHARDS}, or all of --source"
    text = f"training shards, -1 for all (default: {default})"
    parser.add_argument("--num-shards", type=int, help=text)
    text = "shards to fetch side by side (default %(default)s)"
    parser.add_argument("--download-workers", type=int, default=DOWNLOADS, help=text)
    default = "as prepared before, hub at first"
    text = f"a folder of your own shards, or `hub` (default: {default})"
    parser.add_argument("--source", metavar="DIR", help=text)
    text = "verify everything that is prepared; change nothing"
    parser.add_argument("--check", action="store_true", help=text)
    args = parser.parse_args(argv)
    if args.num_shards not in (None, -1, *range(1, C.VAL_SHARD + 1)):
        parser.error(f"--num-shards is 1 to {C.VAL_SHARD}, or -1 for all")
    if not 1 <= args.download_workers <= 64:
        parser.error("--download-workers is 1 to 64")
    if args.source and args.source != "hub":
        args.source = str(Path(args.source).expanduser().absolute())
    return args


def compile_once() -> None:
    """Run train.py up to its first step where there is a GPU, so that the next start is warm."""
    import torch

    if C.SMOKE or not torch.cuda.is_available():
        return
    from harness.rehearsal import rehearse  # imports all that a run does

    print("compile: train.py once, up to its first step: a minute or two", flush=True)
    print(rehearse(Path(C.__file__).parent / "train.py"), flush=True)


def main(argv: list[str] | None = None, compiles: bool = False) -> None:
    """Prepare, or check what is prepared; exits with a sentence if that fails.

    compiles: compile what train.py does as well; not where train.py is what prepares.
    """
    folder = data_dir()
    args = parse_arguments(argv)
    try:
        if args.check:
            problems = check(folder)
            if problems:
                print("\n".join(problems), flush=True)
                them = "it" if len(problems) == 1 else "them"
                advice = f"run `{command_of(args)}` to repair {them}"
                sys.exit(f"prepare.py: {len(problems)} damaged; {advice}")
            print(f"all is well in {folder}", flush=True)
            return
        prepare(folder, args.num_shards, None, args.download_workers, args.source)
        try:
            if not C.SMOKE:
                load_flash_attention()
        except RuntimeError as error:
            why = explain(error, args)
            print(f"attention: FlashAttention-3 was not fetched here; {why}")
        if compiles:
            compile_once()
    except (OSError, ValueError) as error:
        said = explain(error, args)
        prepared = "" if args.check else name_prepared(folder)
        if prepared:
            said += f"; the next run uses what was prepared before, {prepared}"
        sys.exit(f"prepare.py: {said}")
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # one is enough
        remove_temporaries(folder, os.getpid())
        advice = f"run `{command_of(args)}` again, it goes on"
        if args.check:
            advice = "nothing was changed"
        print(f"\nprepare.py: interrupted; {advice}", file=sys.stderr, flush=True)
        # Threads in a library's code or on a stalled server are not waited for.
        os._exit(130)
    print("prepared", flush=True)


if __name__ == "__main__":
    keep_output()
    main(compiles=True)
