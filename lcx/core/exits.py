"""The statuses with which commands end, for schedulers and for whoever starts them again."""

DONE = 0
WRONG = 1
"""Something that starting again does not cure; a sentence on standard error says what."""
RESTART = 75
"""Another process did not start, was lost, or hangs: the same command, started on all hosts, goes on from the last checkpoint."""
INTERRUPTED = 130
"""Ctrl-C; training has saved."""
PREEMPTED = 143
"""SIGTERM; training has saved, and the same command goes on from there."""
