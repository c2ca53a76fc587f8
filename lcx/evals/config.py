"""What to measure: the settings of an evaluation."""

from __future__ import annotations

import dataclasses
from typing import Literal

from lcx.core import configs
from lcx.core.errors import UserError
from lcx.evals.zero_shot import check


@dataclasses.dataclass(frozen=True)
class QuestionConfig:
    """Settings of the benchmarks whose questions are composed of text (`lcx.evals.text`).

    `samples` at each length. `prompt_format`: `base` (text to continue), `chat` (a turn of the tokenizer's own chat template,
    or of `data.chat_template`), `auto` (chat where there is a template). `prose`: text files to hide things in (none: the
    documentation of Python's standard library). `qa_1`, `qa_2`: question files laid out like SQuAD's or HotpotQA's. `data`: the
    folder of a benchmark's files (`lcx.evals.readers`). `faithful` keeps RULER v1's quirks, for scores that are to be compared
    with published ones.
    """

    samples: int = 20
    prompt_format: Literal["auto", "base", "chat"] = "auto"
    prose: tuple[str, ...] = ()
    qa_1: str | None = None
    qa_2: str | None = None
    data: str | None = None
    faithful: bool = False

    def __post_init__(self) -> None:
        configs.not_negative("evals.questions", samples=self.samples)


@dataclasses.dataclass(frozen=True)
class EndpointConfig:
    """A model behind an HTTP server that speaks OpenAI's protocol (vLLM, SGLang, llama.cpp, hosted ones).

    `url` ends in the version, as in http://localhost:8000/v1. `api`: `tokens` sends token ids to /completions, so that the
    model reads exactly what was fitted; `text` sends text there; `chat` sends messages to /chat/completions, with the prefix of
    the answer behind the question. At most `concurrency` requests are open at a time. One that fails with 408, 409, 429, 5xx or
    a lost connection, or takes more than `timeout` seconds, is sent again up to `retries` times, later and later. The key is
    that of the environment variable OPENAI_API_KEY, if it is set.
    """

    url: str
    model: str
    api: Literal["tokens", "text", "chat"] = "tokens"
    concurrency: int = 4
    timeout: float = 600.0
    retries: int = 5

    def __post_init__(self) -> None:
        configs.positive("endpoint", concurrency=self.concurrency, timeout=self.timeout)
        configs.not_negative("endpoint", retries=self.retries)
        configs.choice("endpoint.api", self.api, ("tokens", "text", "chat"))
        if not self.url.startswith(("http://", "https://")):
            raise UserError(f"endpoint.url={self.url!r} is not an address; give one like http://localhost:8000/v1")


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """What to measure.

    `tasks` are rows or groups of `lcx.evals.tasks.table`; one whose count of items is 0 is left out. `lengths` in tokens, answers
    included; `depths` from 0 (start) to 1 (just before the question), without which tasks that ask at them are left out;
    `needle_items` in each cell. `zero_shot` are schemes to try as well as the checkpoint's own (`lcx.evals.zero_shot.at_length`),
    with `zero_shot_items` needles a cell (0: perplexity alone). `generation_items` needles a cell are answered by greedy generation
    too (0: none). `perplexity_tokens` held-out tokens are scored at each length (0: none), in windows that move on by `stride`
    (None: the window), and the last `final_tokens` of each span are reported apart (None: half the shortest length). `text` and
    `task` name the parts of the data mixture that give held-out text and needles (None: the first of each kind).
    `tokens_per_forward` bounds memory: rows x length of one pass, one row at least; `share_prefixes` prefills once what several
    questions in words begin with. `evaluator` is a run's workdir, a Hugging Face folder or a GGUF file, whose model says which
    tokens are key tokens of `long_perplexity` (None: the model itself), and `short_context` the tokens that it compares a whole
    context with (None: 4,096, at most an eighth of the longest length). `effective_threshold` is the mean over depths that a length
    must exceed to count as reached (RULER's 85.6%).
    """

    tasks: tuple[str, ...] = ("needles", "generated_needles", "perplexity", "loss_by_kind")
    lengths: tuple[int, ...] = (256, 512, 1024, 2048, 4096)
    depths: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    needle_items: int = 20
    zero_shot: tuple[str, ...] = ()
    zero_shot_items: int = 4
    generation_items: int = 0
    perplexity_tokens: int = 1 << 16
    stride: int | None = None
    final_tokens: int | None = None
    text: str | None = None
    task: str | None = None
    tokens_per_forward: int = 1 << 14
    share_prefixes: bool = True
    evaluator: str | None = None
    short_context: int | None = None
    effective_threshold: float = 0.856
    questions: QuestionConfig = QuestionConfig()
    seed: int = 0

    def __post_init__(self) -> None:
        shown = ",".join(map(str, self.lengths))
        if not self.lengths:
            raise UserError("evals.lengths is empty; give lengths in tokens, such as 256 and 1024")
        if min(self.lengths) < 2:
            raise UserError(f"evals.lengths={shown} has a length of fewer than 2 tokens, which nothing fits into; leave it out")
        if len(set(self.lengths)) < len(self.lengths):
            raise UserError(f"evals.lengths={shown} names a length twice; leave one out")
        for depth in self.depths:
            if not 0 <= depth <= 1:
                raise UserError(f"evals.depths has {depth}; depths are fractions from 0 (start) to 1 (just before the question)")
        configs.positive("evals", tokens_per_forward=self.tokens_per_forward, stride=self.stride, final_tokens=self.final_tokens)
        configs.positive("evals", short_context=self.short_context)
        for name in ("needle_items", "zero_shot_items", "generation_items", "perplexity_tokens", "seed"):
            if getattr(self, name) < 0:
                raise UserError(f"evals.{name}={getattr(self, name)} must not be negative; 0 leaves it out")
        if not 0 < self.effective_threshold < 1:
            raise UserError(f"evals.effective_threshold={self.effective_threshold} must be between 0 and 1")
        for spec in self.zero_shot:
            check(spec, "evals.zero_shot")
