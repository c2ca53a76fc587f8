"""Settings of synthesis: what is made of curated documents, how, and by which model."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

from lcx.core.configs import choice, not_negative, plain, positive
from lcx.core.errors import UserError
from lcx.data.config import QUESTIONS
from lcx.data.curation.settings import check_method
from lcx.data.curation.synthesize.prompts import STYLES
from lcx.data.synthetic.questions import QuestionsConfig
from lcx.data.tasks.base import TaskConfig
from lcx.data.tasks.table import TASKS

Method = Literal["rephrase", "questions", "task"]
METHODS: tuple[Method, ...] = ("rephrase", "questions", "task")
_CONNECTION = ("url", "concurrency", "timeout", "retries")


def _check_share(path: str, value: float) -> None:
    if not 0 <= value <= 1:
        raise UserError(f"{path}={value!r} must be a share from 0 to 1")


@dataclasses.dataclass(frozen=True)
class EndpointGenerator:
    """The `model` behind a server that speaks OpenAI's protocol at `url`, such as http://localhost:8000/v1.

    At most `concurrency` requests are open at a time; one that takes more than `timeout` seconds or fails is sent again `retries`
    times. The key is that of the environment variable OPENAI_API_KEY, if it is set.
    """

    url: str = ""
    model: str = ""
    concurrency: int = 4
    timeout: float = 600.0
    retries: int = 5

    def __post_init__(self) -> None:
        positive("generator.endpoint", concurrency=self.concurrency, timeout=self.timeout)
        not_negative("generator.endpoint", retries=self.retries)
        if not self.url.startswith(("http://", "https://")) or not self.model:
            raise UserError(
                f"generator.endpoint has url={self.url!r} and model={self.model!r}; give an address such as "
                "http://localhost:8000/v1 and the name of a model there"
            )


@dataclasses.dataclass(frozen=True)
class LocalGenerator:
    """A `model` on this machine: a workdir (the end of `stage`, or the newest checkpoint), a Hugging Face folder or a GGUF file.

    Requests are turns of its chat template if it has one. It reads and writes up to `length` tokens a request (None: 8,192, or as
    many as it was trained on if that is less), and as many requests at a time as fit into `tokens_per_forward`, one at least.
    """

    model: str = ""
    stage: str | None = None
    dtype: str = "float32"
    length: int | None = None
    tokens_per_forward: int = 1 << 14

    def __post_init__(self) -> None:
        positive("generator.local", length=self.length, tokens_per_forward=self.tokens_per_forward)
        if not self.model:
            raise UserError("generator.local.model is missing; name a workdir, a Hugging Face folder or a GGUF file")


@dataclasses.dataclass(frozen=True)
class GeneratorConfig:
    """The model that writes: behind an `endpoint`, or `local`.

    An answer has at most `max_tokens` tokens, and ends before the first of the `stop` strings; one that is cut off is not used. At
    `temperature` 0 it is the most likely one, else drawn with a seed that depends on the request. Answers are kept in the file
    `cache` (empty: in the curation's folder) by the hash of model, settings and request, and asked for once. Prices are in any
    currency, for a million tokens of requests and of answers (0: not known).
    """

    endpoint: EndpointGenerator | None = None
    local: LocalGenerator | None = None
    max_tokens: int = 2048
    temperature: float = 0.0
    stop: tuple[str, ...] = ()
    cache: str = ""
    price_per_million_input: float = 0.0
    price_per_million_output: float = 0.0

    def __post_init__(self) -> None:
        if (self.endpoint is None) == (self.local is None):
            raise UserError("config.generator has to have one of endpoint and local; set one of them")
        positive("generator", max_tokens=self.max_tokens)
        not_negative("generator", temperature=self.temperature)
        not_negative("generator", price_per_million_input=self.price_per_million_input)
        not_negative("generator", price_per_million_output=self.price_per_million_output)
        if "" in self.stop:
            raise UserError(f"generator.stop={self.stop!r} has an empty string, at which every answer would end; leave it out")

    @property
    def model(self) -> str:
        """The model's name, or where it lies."""
        given = self.endpoint or self.local
        assert given is not None
        return given.model

    @property
    def where(self) -> str:
        """The model with its address, for what is said on the screen."""
        return self.model if self.endpoint is None else f"{self.model} at {self.endpoint.url}"

    @property
    def has_prices(self) -> bool:
        """Whether a cost can be told."""
        return self.price_per_million_input > 0 or self.price_per_million_output > 0

    def cost(self, input_tokens: int, output_tokens: int) -> float | None:
        """What so many tokens cost, None where prices are not known."""
        if not self.has_prices:
            return None
        return (input_tokens * self.price_per_million_input + output_tokens * self.price_per_million_output) / 1e6


@dataclasses.dataclass(frozen=True)
class RephraseSettings:
    """Each passage of at most `passage_chars` characters is written anew in a `style` (`lcx.data.curation.synthesize.prompts`).

    `prompt`, if it is not empty, takes the place of the style; `{text}` in it stands for the passage. An answer is not used if its
    length is below `min_ratio` or above `max_ratio` times the passage's in characters, or if the passage has more than the share
    `max_copied` of its sequences of five words. Then the passage stays as it was (`failed="keep"`), or the document is dropped
    (`"drop"`); a document of which nothing was rewritten is dropped in any case.
    """

    style: str = "plain"
    prompt: str = ""
    passage_chars: int = 2000
    min_ratio: float = 0.5
    max_ratio: float = 2.0
    max_copied: float = 0.9
    failed: Literal["keep", "drop"] = "keep"

    def __post_init__(self) -> None:
        choice("rephrase.style", self.style, STYLES)
        choice("rephrase.failed", self.failed, ("keep", "drop"))
        positive("rephrase", passage_chars=self.passage_chars)
        if not 0 <= self.min_ratio < self.max_ratio:
            raise UserError(f"rephrase.min_ratio={self.min_ratio} must be at least 0 and below max_ratio={self.max_ratio}")
        _check_share("rephrase.max_copied", self.max_copied)
        if self.prompt and "{text}" not in self.prompt:
            raise UserError(f"rephrase.prompt={self.prompt[:60]!r} does not say where the passage stands; put {{text}} there")
        if self.prompt and self.style != "plain":
            raise UserError(f"rephrase.style={self.style!r} has no effect with a rephrase.prompt of your own; leave one out")


@dataclasses.dataclass(frozen=True)
class SpanSettings:
    """Questions that need `spans` passages of one document, of at most `span_chars` characters each, which alone the model sees.

    Between two of them lie at least `min_distance` of the document: a share of its characters, or with `unit="tokens"` so many
    tokens of `tokenizer`. Up to `per_document` questions are asked about a document, as turns of one conversation. The first one
    stands in front of the document in the share `question_first` of the conversations, else behind it. `prompt`, if it is not
    empty, takes the place of ours; `{passages}` in it stands for the spans.
    """

    spans: int = 3
    span_chars: int = 1500
    min_distance: float = 0.2
    unit: Literal["share", "tokens"] = "share"
    tokenizer: str | None = None
    per_document: int = 1
    question_first: float = 0.0
    prompt: str = ""

    def __post_init__(self) -> None:
        positive("questions", spans=self.spans, span_chars=self.span_chars, per_document=self.per_document)
        not_negative("questions", min_distance=self.min_distance)
        _check_share("questions.question_first", self.question_first)
        if (self.unit == "tokens") != (self.tokenizer is not None):
            raise UserError(
                "questions.unit='tokens' needs questions.tokenizer to count with; name one, such as 'bytes'"
                if self.tokenizer is None
                else f"questions.tokenizer={self.tokenizer!r} has no effect with unit='share'; set unit='tokens' or leave it out"
            )
        if self.unit == "share" and (self.spans - 1) * self.min_distance >= 1:
            raise UserError(
                f"questions.min_distance={self.min_distance} of a document does not fit between {self.spans} spans of it; lower one"
            )
        if self.prompt and "{passages}" not in self.prompt:
            raise UserError(f"questions.prompt={self.prompt[:60]!r} does not say where the spans stand; put {{passages}} there")


@dataclasses.dataclass(frozen=True)
class TaskSettings:
    """Rows of a generated task over the text of the sources, `length` + 1 tokens of `tokenizer` each.

    `kind`: `questions`, or a row of `lcx.data.tasks.table`, with the settings `questions` or `retrieval`. `form`: `chat`
    (conversations, in which the assistant writes the answers) or `text`. Loss weights are those of the source that reads them.
    """

    kind: str = QUESTIONS
    length: int = 4096
    tokenizer: str = "bytes"
    form: Literal["chat", "text"] = "chat"
    questions: QuestionsConfig = QuestionsConfig()
    retrieval: TaskConfig = TaskConfig()

    def __post_init__(self) -> None:
        choice("task.kind", self.kind, (QUESTIONS, *TASKS))
        choice("task.form", self.form, ("chat", "text"))
        positive("task", length=self.length)
        unused = "retrieval" if self.kind == QUESTIONS else "questions"
        if getattr(self, unused) not in (TaskConfig(), QuestionsConfig()):
            raise UserError(f"task.{unused} has no effect with task.kind={self.kind!r}; leave it out")
        for name in ("questions", "retrieval"):
            given = getattr(self, name)
            for field in dataclasses.fields(given):
                idle = field.name.endswith("_weight") or field.name == "prompt_format"
                if idle and getattr(given, field.name) != field.default:
                    raise UserError(f"task.{name}.{field.name} has no effect on text that is written; leave it out")


@dataclasses.dataclass(frozen=True)
class SynthesizeConfig:
    """A new source made of curated or assembled ones.

    `method`: `rephrase` (documents written anew, passage by passage), `questions` (conversations about spans that are far apart),
    `task` (what `kind="questions"` and the retrieval tasks of a mixture generate, without a model). `sources`: what it is made of
    (empty: all curated ones). At most `documents` of them are used, drawn by a hash of their names and the `seed`; of a task so
    many rows are written. More than the share `max_failed` of answers that cannot be used is an error. The settings of a method are
    under its name; those of another one are refused, as they would have no effect.
    """

    method: Method = "rephrase"
    sources: tuple[str, ...] = ()
    documents: int = 1000
    seed: int = 0
    max_failed: float = 0.5
    rephrase: RephraseSettings = RephraseSettings()
    questions: SpanSettings = SpanSettings()
    task: TaskSettings = TaskSettings()

    def __post_init__(self) -> None:
        check_method("synthesize", self, METHODS)
        positive("synthesize", documents=self.documents)
        _check_share("synthesize.max_failed", self.max_failed)

    @property
    def asks(self) -> bool:
        """Whether a model is asked."""
        return self.method != "task"

    @property
    def is_chat(self) -> bool:
        """Whether conversations are written, not texts."""
        return self.method == "questions" or (self.method == "task" and self.task.form == "chat")


def identity(synthesize: Mapping[str, SynthesizeConfig], generator: GeneratorConfig | None) -> dict[str, Any]:
    """The settings without those on which no written byte depends, so that a rerun may change how a server is reached."""
    sources = {name: {key: value for key, value in plain(one).items() if key != "max_failed"} for name, one in synthesize.items()}
    model = plain(generator)
    if model is not None:
        del model["cache"]
        if model["endpoint"]:
            model["endpoint"] = {key: value for key, value in model["endpoint"].items() if key not in _CONNECTION}
    return {"synthesize": sources, "generator": model}
