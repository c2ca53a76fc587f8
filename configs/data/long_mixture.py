"""Books and code, cleaned and deduplicated for a long-context mixture.

Command:  lcx data curate --config=configs/data/long_mixture.py --out=data/curated
          (with other texts: --config.sources.books.source.path='texts/*.txt';
          with an evaluation to keep out: --config.decontaminate.path='benchmarks/**/*.jsonl')
Hardware: 2 CPU cores.
Time:     10 seconds of processor time, shared by 2 workers, for 53 MB of books and 12 MB of code.
Result:   of 84 novels of Project Gutenberg all are kept; of 201 modules and packages of Python's standard library 187, without
          11 that are shorter than a kibibyte and 3 of repeated tables or endless words.
"""

from lcx.data.curation.config import curated, defaults


def get_config():
    """Both sources have the filters of the preset `long`, whose rules hold for a book and a repository too."""
    return defaults(
        books=curated("long", source={"kind": "text", "path": "books/**/*.txt"}, length={"min_bytes": 1024}),
        code=curated("long", source={"kind": "stdlib"}, length={"min_bytes": 1024}),
    )
