"""What feeds and measures train.py. Not edited: a hash of this folder is part of `rules:`.

In the order of the data: download, documents, tokenizer, packing, data (all of them together);
then loader, run (clock and summary), evaluation; beside them attention, gpu, health and peaks.
files and jobs serve all of them.
"""
