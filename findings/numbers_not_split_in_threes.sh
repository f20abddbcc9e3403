#!/usr/bin/env bash
# tokenizers 0.23.3 (and 0.22.2, 0.21.4, 0.15.2) with tiktoken 0.14.0: the split pattern of tiktoken's
# cl100k_base, given to Split(Regex(...)), no longer cuts numbers into threes. That pattern ends its
# digits in {1,3}+, which in tiktoken is "one to three, and give none back". The engine behind
# tokenizers, Oniguruma, reads the same text as "one to three, again and again", though it reads ?+,
# ++ and *+ as tiktoken does. Both take the pattern, and text without long numbers is split alike.
# One would expect one split of one pattern. On the same ranks a number of four digits or more can
# get other ids, and a tokenizer that is trained with the pattern learns whole numbers.
#
# Output seen (2026-12-01, Python 3.12, Linux x86-64):
#   cl100k_base: tokenizers splits 1234567890 into 1234567890
#     ids on the same ranks: tiktoken 257 52 53 54 55 56 57 48, tokenizers 264
#     trained on numbers of 1 to 6 digits: the longest token has 6 digits
#   o200k_base (no + there): tokenizers splits 1234567890 into 123 456 789 0
#     ids on the same ranks: tiktoken 257 52 53 54 55 56 57 48, tokenizers the same
#     trained on numbers of 1 to 6 digits: the longest token has 3 digits
# Fails if that changes. Way out: {1,3} without the +, which matches the same, for nothing follows it.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q tokenizers==0.23.3 tiktoken==0.14.0 2>"$folder/pip.log" || {
    cat "$folder/pip.log"
    exit 1
}
"$folder/venv/bin/python" - <<'PYTHON'
import random
from importlib.metadata import version

import tiktoken
import tiktoken_ext.openai_public as public
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

NUMBER = "1234567890"
TEXT = "It's a test:\tnaïve, 123 of 45;\r\n\r\n  two   blanks (and more)...\n\n 7 "
# Ranks: single bytes, then 12, 123 and so on, each made of the one before and one more digit.
ranks = {bytes([i]): i for i in range(256)}
for n in range(2, len(NUMBER) + 1):
    ranks[NUMBER[:n].encode()] = len(ranks)
public.load_tiktoken_bpe = lambda *args, **kwargs: {}  # no download: the patterns are in the code


def pieces_of(pattern, text):
    split = pre_tokenizers.Split(Regex(pattern), "isolated")
    return [piece for piece, _ in split.pre_tokenize_str(text)]


def new_tokenizer(pattern, model):
    tokenizer = Tokenizer(model)
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    split = pre_tokenizers.Split(Regex(pattern), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, to_bytes])
    return tokenizer


def longest_number(pattern):
    tokenizer = new_tokenizer(pattern, models.BPE())
    numbers = (str(random.Random(i).randrange(10 ** (1 + i % 6))) for i in range(20_000))
    trainer = trainers.BpeTrainer(vocab_size=20_000, show_progress=False)
    tokenizer.train_from_iterator(numbers, trainer)
    return max(map(len, filter(str.isdigit, tokenizer.get_vocab())))


print("tokenizers", version("tokenizers"), "tiktoken", version("tiktoken"))
digits = {str(d): 48 + d for d in range(10)}  # a digit's rank is its byte
merges = [(NUMBER[: n - 1], NUMBER[n - 1]) for n in range(2, len(NUMBER) + 1)]
vocab = digits | {NUMBER[:n]: ranks[NUMBER[:n].encode()] for n in range(2, len(NUMBER) + 1)}
for name, has_plus in (("cl100k_base", True), ("o200k_base", False)):
    pattern = public.ENCODING_CONSTRUCTORS[name]()["pat_str"]
    assert r"\p{N}{1,3}" in pattern and (r"\p{N}{1,3}+" in pattern) == has_plus
    theirs = tiktoken.Encoding(
        name, pat_str=pattern, mergeable_ranks=ranks, special_tokens={}
    ).encode(NUMBER)
    ours = new_tokenizer(pattern, models.BPE(vocab, merges)).encode(NUMBER).ids
    pieces, longest = pieces_of(pattern, NUMBER), longest_number(pattern)
    print(f"{name}{'' if has_plus else ' (no + there)'}: tokenizers splits {NUMBER} into", *pieces)
    print("  ids on the same ranks: tiktoken", *theirs, end=", tokenizers ")
    print(*(["the same"] if ours == theirs else ours))
    print(f"  trained on numbers of 1 to 6 digits: the longest token has {longest} digits")
    assert theirs == [257, *b"4567890"]
    if has_plus:
        assert pieces == [NUMBER] and ours == [264] and longest == 6, "it has changed"
        pieces = pieces_of(pattern.replace("{1,3}+", "{1,3}"), NUMBER)
    else:
        assert ours == theirs and longest == 3
    assert pieces == ["123", "456", "789", "0"]
    # tiktoken looks a piece up as a whole first: an id per piece, if it cuts at the same places.
    pieces = pieces_of(pattern, TEXT)
    whole = ranks | {p.encode(): 1000 + i for i, p in enumerate(dict.fromkeys(pieces))}
    same = tiktoken.Encoding(name, pat_str=pattern, mergeable_ranks=whole, special_tokens={})
    assert len(pieces) > 20 and same.encode(TEXT) == [whole[p.encode()] for p in pieces]
for possessive in ("a?+a", "a++a", "a*+a"):  # finds nothing, as it gives nothing back
    assert pieces_of(possessive, "ab") == ["ab"]
assert pieces_of("a?a", "ab") == ["a", "b"]
PYTHON
