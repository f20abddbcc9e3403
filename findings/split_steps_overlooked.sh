#!/usr/bin/env bash
# gigatoken 0.10.0 (and 0.9.0, 0.6.0) with tokenizers 0.23.3: gigatoken reads a Hugging Face tokenizer
# and splits text as its regular expression says, but overlooks what else says where to split. It
# ignores ByteLevel's use_regex=False, no split at all, and splits as GPT-2 does: a vocabulary that
# was trained across words gets no token that goes on past a space. It ignores Digits and Punctuation
# beside a Split: a vocabulary with numbers that is told to take them digit by digit gets numbers.
# Nothing is raised or said, all ids are valid and decode to the text; they are just not the ids that
# the model was trained on. A regular expression that it does not know it refuses, and its README
# says that it is made to match tokenizers exactly. One would expect the same ids, or an error.
#
# Output seen (2026-12-01, Python 3.12, Linux x86-64): tokens of 2000 documents by both, and documents
# with the same ids
#   ByteLevel()                    tokenizers  73157, gigatoken  73157, the same 2000
#   ByteLevel(use_regex=False)     tokenizers  19298, gigatoken 173371, the same    0
#     422 of 800 tokens have a space behind a character, 0 of them used
#   Split, ByteLevel               tokenizers  73157, gigatoken  73157, the same 2000
#   Split, Digits, ByteLevel       tokenizers  89739, gigatoken  73157, the same    0
#   Split, Punctuation, ByteLevel  tokenizers  76140, gigatoken  73157, the same  251
#   another regular expression: Unknown pre_tokenizer Split regexes
# Fails if that changes. Way out: encode some text with both and compare, before all of it.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q gigatoken==0.10.0 tokenizers==0.23.3 2>"$folder/pip.log" || {
    cat "$folder/pip.log"
    exit 1
}
"$folder/venv/bin/python" - <<'PYTHON'
import random
from importlib.metadata import version

import gigatoken
from tokenizers import Regex, Tokenizer, models
from tokenizers.pre_tokenizers import ByteLevel, Digits, Punctuation, Sequence, Split
from tokenizers.trainers import BpeTrainer

CHOICES = [
    ("The model", "A small net", "One layer", "My tokenizer", "The last run"),
    ("learns", "is split into", "needs", "falls to", "reads no more than", "was not given"),
    ("of the (small) rows", "tokens; the rest comes later", "steps", "bytes, isn't it so"),
]
random.seed(0)


def sentence():
    who, does, what = map(random.choice, CHOICES)
    return f"{who} {does} {random.randrange(2000)} {what}."


texts = [" ".join(sentence() for _ in range(3)) for _ in range(2000)]
whole = ByteLevel(add_prefix_space=False, use_regex=False)  # maps bytes, splits nothing
# GPT-2's, in a form that gigatoken knows.
GPT2 = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


def train(steps):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = steps
    alphabet = ByteLevel.alphabet()
    trainer = BpeTrainer(vocab_size=800, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def compare(name, tokenizer, is_right):
    right = [encoding.ids for encoding in tokenizer.encode_batch(texts)]
    other = gigatoken.Tokenizer(tokenizer)
    assert other.as_hf().encode(texts[0]) == other.encode(texts[0]).tolist()
    found = [other.encode(text).tolist() for text in texts]
    assert [other.decode(ids).decode() for ids in found] == texts
    same = sum(map(list.__eq__, right, found))
    tokens = [sum(map(len, ids)) for ids in (right, found)]
    print(f"{name:29}  tokenizers {tokens[0]:6}, gigatoken {tokens[1]:6}, the same {same:4}")
    assert same == len(texts) if is_right else same < len(texts) / 2, "it has changed"
    return {token for ids in found for token in ids}


print("gigatoken", version("gigatoken"), "tokenizers", version("tokenizers"))
gpt2 = train(ByteLevel(add_prefix_space=False))
compare("ByteLevel()", gpt2, True)
across = train(whole)
used = compare("ByteLevel(use_regex=False)", across, False)
spaced = {i for token, i in across.get_vocab().items() if "Ġ" in token[1:]}  # Ġ is a space
count = len(spaced & used)
print(f"  {len(spaced)} of 800 tokens have a space behind a character, {count} of them used")
assert len(spaced) > 100 and count == 0, "it has changed"
split = Split(Regex(GPT2), "isolated")
gpt2.pre_tokenizer = Sequence([split, whole])
compare("Split, ByteLevel", gpt2, True)
gpt2.pre_tokenizer = Sequence([split, Digits(individual_digits=True), whole])
compare("Split, Digits, ByteLevel", gpt2, False)
gpt2.pre_tokenizer = Sequence([split, Punctuation(), whole])
compare("Split, Punctuation, ByteLevel", gpt2, False)
gpt2.pre_tokenizer = Sequence([Split(Regex(r"\S+|\s+"), "isolated"), whole])
try:
    gigatoken.Tokenizer(gpt2)
except RuntimeError as error:
    print("another regular expression:", str(error).split(",")[0])
else:
    raise SystemExit("it takes any regular expression now")
PYTHON
