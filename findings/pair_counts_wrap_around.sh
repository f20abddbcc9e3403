#!/usr/bin/env bash
# rustbpe 0.1.0: a pair of bytes that occurs more than 2,147,483,647 times may never be merged. Its
# counts have 32 bits with a sign and wrap around in silence, and a pair with a negative count is
# left out, though it is the most frequent one. One would expect more text to make a better
# tokenizer. Here one more copy of a document turns the first merge from the most frequent pair to
# one that is 40,000 times rarer. Where a tenth of all pairs are two spaces, as in indented code,
# some 20 GB of text are enough. Counts are sums over all of the text; the lines are this long here
# for speed alone.
#
# Output seen (2026-12-01, Python 3.12, Linux x86-64), with the first three merges:
#   100 copies, two spaces 13107100 times, "bc" 300: '  ' '    ' '        '
#   16384 copies, two spaces 2147467264 times, "bc" 49152: '  ' '    ' '        '
#   16385 copies, two spaces 2147598335 times, "bc" 49155: 'bc' ' bc' ' \n'
# Fails if that changes. Way out: train on less than 2 GiB, where no count gets that far.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q rustbpe==0.1.0 2>"$folder/pip.log" || {
    cat "$folder/pip.log"
    exit 1
}
"$folder/venv/bin/python" - <<'PYTHON'
from importlib.metadata import version
from itertools import repeat

import rustbpe

SPACES = 2**17
document = "x" + " " * SPACES + "\n" + "bc " * 3


def first_merges(copies):
    tokenizer = rustbpe.Tokenizer()
    texts = repeat(document, copies)
    tokenizer.train_from_iterator(texts, vocab_size=259, buffer_size=256)
    merges = [bytes(token).decode() for token, _ in tokenizer.get_mergeable_ranks()[256:]]
    pairs = copies * (SPACES - 1)  # of two spaces: one fewer than the spaces of a line
    print(f'{copies} copies, two spaces {pairs} times, "bc" {copies * 3}:', *map(repr, merges))
    return pairs, merges


print("rustbpe", version("rustbpe"))
runs = [" " * 2, " " * 4, " " * 8]
for copies in (100, 16_384):
    pairs, merges = first_merges(copies)
    assert pairs < 2**31 and merges == runs, "it has changed"
pairs, merges = first_merges(16_385)
assert pairs >= 2**31 and merges == ["bc", " bc", " \n"], "it has changed"
PYTHON
