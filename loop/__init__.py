"""The loop behind experiment.py, no part of the rules; the standard library is enough.

ledger.py   results.tsv and what the log of a run says
verdict.py  noise, verdict, changes of the GPU's speed
git.py      git, worktrees, locks
machine.py  whether GPU and data are ready
night.py    one tree's night: runs, repeats, verdicts, the branch
"""
