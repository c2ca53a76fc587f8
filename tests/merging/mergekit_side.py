"""Merges by mergekit, run by the interpreter that it is installed for: `python mergekit_side.py YAML OUT [YAML OUT ...]`."""

import sys

import yaml
from mergekit.config import MergeConfiguration
from mergekit.merge import MergeOptions, run_merge


def main(words):
    for path, out in zip(words[::2], words[1::2], strict=True):
        with open(path) as file:
            config = MergeConfiguration.model_validate(yaml.safe_load(file))
        run_merge(config, out, MergeOptions(quiet=True, copy_tokenizer=False, random_seed=0))


if __name__ == "__main__":
    main(sys.argv[1:])
