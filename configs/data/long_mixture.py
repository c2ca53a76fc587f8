"""Books and code, cleaned and deduplicated for a long-context mixture.

Command:  lcx data curate --config=configs/data/long_mixture.py --out=data/curated
          (with other texts: --config.sources.books.source.path='texts/*.txt';
          with an evaluation to keep out: --config.decontaminate.path='benchmarks/**/*.jsonl')
Hardware: 2 CPU cores.
Time:     TIME
Result:   RESULT
"""

from lcx.data.curation.config import curated, defaults


def get_config():
    """Both sources have the filters of the preset `long`, whose rules hold for a book and a repository too."""
    return defaults(
        books=curated("long", source={"kind": "text", "path": "books/**/*.txt"}, length={"min_bytes": 1024}),
        code=curated("long", source={"kind": "stdlib"}, length={"min_bytes": 1024}),
    )
