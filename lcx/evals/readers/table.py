"""The benchmarks that are read from files, each under the name of its task, and where the files come from."""

from __future__ import annotations

from lcx.evals.readers import babilong, bamboo, helmet, infinitebench, leval, longbench, nolima, oolong, openai, zeroscrolls
from lcx.evals.readers.files import Benchmark

_HUB = "https://huggingface.co/datasets"
BENCHMARKS: dict[str, Benchmark] = {
    "longbench": Benchmark(longbench.PARTS, f"{_HUB}/THUDM/LongBench"),
    "longbench_v2": Benchmark(longbench.PARTS_V2, f"{_HUB}/THUDM/LongBench-v2"),
    "infinitebench_files": Benchmark(infinitebench.PARTS, f"{_HUB}/xinrongzhang2022/InfiniteBench"),
    "babilong_files": Benchmark(babilong.PARTS, f"{_HUB}/RMT-team/babilong"),
    "mrcr_files": Benchmark(openai.MRCR, f"{_HUB}/openai/mrcr"),
    "graphwalks_files": Benchmark(openai.GRAPHWALKS, f"{_HUB}/openai/graphwalks"),
    "leval": Benchmark(leval.PARTS, f"{_HUB}/L4NLP/LEval"),
    "zeroscrolls": Benchmark(zeroscrolls.PARTS, f"{_HUB}/tau/zero_scrolls"),
    "bamboo": Benchmark(bamboo.PARTS, "https://github.com/RUCAIBox/BAMBOO"),
    "helmet": Benchmark(helmet.PARTS, f"{_HUB}/princeton-nlp/HELMET, and {helmet.ICL_ORIGIN}"),
    "nolima": Benchmark(nolima.PARTS, f"{_HUB}/amodaresi/NoLiMa"),
    "oolong": Benchmark(oolong.PARTS, f"{_HUB}/oolongbench"),
}
