"""Data preparation, once: the command line over harness/. Not edited.

Writes below ~/.cache/autoresearch (AUTORESEARCH_CACHE moves it):
    shards/shard_00000.parquet           as the hub serves it, checked against its SHA-256
    tokenizer/ranks.tiktoken             a line a token: its bytes in base64, its rank
    tokenizer/tokenizer.json             split pattern, special tokens, hash of the ranks
    rows/shard_00000.<key>.u16           packed rows of T + 1 ids, uint16, little endian
    manifest.json                        written last: what is there, with sizes and hashes
It may be killed at any moment and started again: files appear whole or not at all, a download
(shards/.<name>.<hash>.part) goes on where it broke, and a lock keeps a second one waiting.
"""

import argparse
import errno
import os
import signal
import sys
from pathlib import Path

import constants as C
from harness.attention import load_flash_attention
from harness.data import check, prepare
from harness.download import DOWNLOADS
from harness.files import PREPARE, data_dir, remove_temporaries


def explain(error: Exception) -> str:
    """Return what an error says and, for one of the operating system, what to do about it."""
    if (number := getattr(error, "errno", None)) in (
        errno.ENOSPC,
        errno.EDQUOT,
        errno.EFBIG,
    ):
        advice = "free some space or move AUTORESEARCH_CACHE"
    elif number in (errno.EROFS, errno.EACCES, errno.EPERM):
        advice = "make it writable or set AUTORESEARCH_CACHE to a folder that is"
    else:
        return str(error)
    return f"{error}; {advice}, and run {PREPARE} again: it goes on where it stopped"


def main(argv: list[str] | None = None) -> None:
    last, folder = C.VAL_SHARD, data_dir()
    parser = argparse.ArgumentParser(
        description="Download, tokenize and pack the data, once."
    )
    add = parser.add_argument
    text = "training shards, -1 for all (default: as many as before, at first "
    text += f"{C.DEFAULT_NUM_SHARDS}, or all of --source)"
    add("--num-shards", type=int, help=text)
    text = "shards to fetch side by side (default %(default)s)"
    add("--download-workers", type=int, default=DOWNLOADS, help=text)
    text = "a folder of your own shards, or `hub` (default: as prepared before, hub at first)"
    add("--source", metavar="DIR", help=text)
    add(
        "--check",
        action="store_true",
        help="verify everything that is prepared; change nothing",
    )
    args = parser.parse_args(argv)
    if args.num_shards not in (None, -1, *range(1, last + 1)):
        parser.error(f"--num-shards is 1 to {last}, or -1 for all")
    if not 1 <= args.download_workers <= 64:
        parser.error("--download-workers is 1 to 64")
    if (source := args.source) and source != "hub":
        source = str(Path(source).expanduser().absolute())
    try:
        if args.check:
            if problems := check(folder):
                print("\n".join(problems), flush=True)
                sys.exit(
                    f"prepare.py: {len(problems)} damaged; run {PREPARE} to mend them"
                )
            print(f"all is well in {folder}", flush=True)
            return
        prepare(folder, args.num_shards, None, args.download_workers, source)
        try:
            if not C.SMOKE:
                load_flash_attention()
        except RuntimeError as error:
            print(f"attention: FlashAttention-3 was not fetched here; {error}")
    except (OSError, ValueError) as error:
        sys.exit(f"prepare.py: {explain(error)}")
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # one is enough
        remove_temporaries(folder, os.getpid())
        print(
            f"\nprepare.py: interrupted; run {PREPARE} again, it goes on", file=sys.stderr
        )
        sys.stderr.flush()
        os._exit(
            130
        )  # threads in a library's code or on a stalled server are not waited for
    print("prepared", flush=True)


if __name__ == "__main__":
    main()
