"""What feeds and measures train.py. Not edited: `rules:` holds a hash of this folder.

In the order of the data:

    files          files that appear whole or not at all, hashes, the folder of the data
    jobs           threads side by side, and the progress that is shown of them
    download       shards from the hub
    documents      a shard's documents; shards for a smoke run, or of one's own
    tokenizer      documents to ids: the byte-level BPE, trained once
    packing        ids to rows of T + 1
    manifest       what is prepared, with sizes and hashes
    data           all of that in order, and the check of what is there
    rules          hashes of all that a run rests on, and what changed since the last
    loader         rows to batches on the device
    run            one experiment: clock, steps, checks, summary
    warmup         before the clock: compiles, finds the batch, names a dead edit
    dry_run        the full rules beside a smoke run: shapes without memory
    rehearsal      a run up to its first step, so that the next one starts warm
    guard          what is refused outside the clock: training, and reading the rows
    repeat         whether the commit alone repeats the run
    evaluation     logits to bits per byte, and the checks that a model is one
    checkpoint     the trained model as plain arrays

Beside them:

    attention      the attention kernels, and the choice between them
    ops            fused operations of the model, each with its plain form
    fp8            those that run in fp8, with their gradients
    kernels        the Triton kernels behind them
    kernel_check   whether these are right on this GPU
    compile_cache  where compiled code is kept between runs
    machine        what the machine needs before torch is loaded
    gpu            which GPU there is, and what fits its memory
    health         how fast the GPU is before and after training, and whether it is alone
    peaks          peak speeds of GPUs, for MFU
    output         lines of the log that tools read
    streams        standard output and error, which may be lost
"""
