"""A curation that names each file when it is there, and waits, so that a test can kill it: CONFIG.pickle OUT WORKERS."""

import os
import pathlib
import pickle
import sys
import time

from lcx.data.curation.pipeline import curate

replace = os.replace


def slow(source, target):
    replace(source, target)
    print(target, flush=True)
    time.sleep(0.02)


if __name__ == "__main__":
    os.replace = slow
    curate(pickle.loads(pathlib.Path(sys.argv[1]).read_bytes()), sys.argv[2], workers=int(sys.argv[3]))
