"""The endpoint backend against a real HTTP server that speaks the protocol, errors included, with answers from a model of lcx."""

import json
import threading
import time

import jax
import numpy as np
import pytest

from lcx.core.errors import UserError
from lcx.core.param_spec import initialize
from lcx.data.config import DataConfig
from lcx.data.tokenizers import tokenizers
from lcx.evals.backends.endpoint import EndpointBackend
from lcx.evals.backends.local import LocalBackend
from lcx.evals.base import Item
from lcx.evals.config import EndpointConfig, EvalConfig, QuestionConfig
from lcx.evals.runner import evaluate, evaluate_endpoint
from lcx.model.architecture import build_schemes
from lcx.model.config import ModelConfig
from lcx.model.execution import ExecutionConfig
from lcx.model.params import specs
from tests import model_server

MODEL = ModelConfig(model_dim=32, num_layers=1, num_heads=2, num_kv_heads=2, head_dim=16, mlp_dim=32)
SCHEMES = build_schemes(MODEL, {"default": "rope:theta=100"})
CONFIG = EvalConfig(tasks=("ruler_niah_single_1", "session_state"), lengths=(1024,), questions=QuestionConfig(5))


@pytest.fixture(scope="module")
def params():
    return initialize(specs(MODEL, SCHEMES, 1024), jax.random.key(0))


class Server(model_server.Server):
    """Answers requests with a model; the first ones may meet with a trouble each, from a list."""

    def __init__(self, params, troubles=()):
        backend = LocalBackend(params, MODEL, ExecutionConfig(), SCHEMES, 1024, tokenizer=tokenizers.load("bytes"))
        # Compiled before anybody waits for it.
        list(backend.complete([Item(np.arange(9, dtype=np.int32), np.zeros(0, np.int32))], 9))
        lock, left, self.asked, self.answered = threading.Lock(), list(troubles), [], []
        server = self

        class Handler(model_server.Handler):
            def do_POST(self):
                body = self.body()
                with lock:
                    server.asked.append((self.path, body, self.headers.get("Authorization")))
                    trouble = left.pop(0) if left else None
                if trouble == "stall":
                    time.sleep(12)
                    return
                if trouble == "cut":
                    self.send_response(200)
                    self.send_header("Content-Length", "1000")
                    self.end_headers()
                    self.wfile.write(b'{"choices": [')
                    self.wfile.flush()
                    self.connection.close()
                    return
                if trouble is not None:
                    self.reply(trouble, {"error": {"message": f"trouble {trouble}"}})
                    return
                prompt = body.get("prompt")
                if prompt is None:
                    prompt = "".join(message["content"] for message in body["messages"])
                tokens = np.asarray(tokenizers.load("bytes").encode(prompt) if isinstance(prompt, str) else prompt, np.int32)
                with lock:
                    ((_, text),) = next(backend.complete([Item(tokens[-1024:], tokens[:0])], body["max_tokens"])).items()
                    server.answered.append(tokens.tobytes())
                choice = {"index": 0, "finish_reason": "stop", "text": text, "message": {"role": "assistant", "content": text}}
                self.reply(200, {"id": "1", "object": "x", "created": 0, "model": "m", "choices": [choice]})

        super().__init__(Handler)


@pytest.mark.slow
def test_scores_are_those_of_the_model_and_nothing_is_lost_or_asked_twice(params, tmp_path):
    local = evaluate(params, MODEL, ExecutionConfig(), SCHEMES, DataConfig(), CONFIG, trained=1024, workdir=tmp_path / "local")
    with Server(params, [429, 500, "cut", "stall", 503]) as server:
        endpoint = EndpointConfig(server.url, "m", timeout=10.0, concurrency=2)
        result = evaluate_endpoint(endpoint, DataConfig(), CONFIG, workdir=tmp_path / "far", label="far")
        again = evaluate_endpoint(endpoint, DataConfig(), CONFIG, workdir=tmp_path / "far", label="far")
    assert result.rows == again.rows == local.rows
    assert len(server.answered) == len(set(server.answered)) == 10 and len(server.asked) == 15
    assert all(path == "/v1/completions" and body["temperature"] == 0 for path, body, _ in server.asked)
    answers = [
        {json.loads(line)["asked"]: json.loads(line)["output"] for line in (tmp_path / name / "eval" / "answers.jsonl").open()}
        for name in ("local", "far")
    ]
    assert answers[0] == answers[1] and len(answers[0]) == 10


def test_text_and_messages(params, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    item = Item(
        np.arange(3, dtype=np.int32), np.zeros(0, np.int32), text="a question", turns=("one", "two", "three"), prefix=" It is"
    )
    with Server(params) as server:
        for api in ("text", "chat"):
            list(EndpointBackend(EndpointConfig(server.url, "m", api)).complete([item], 4))
    (first, text, key), (second, chat, _) = server.asked
    assert (first, text["prompt"], text["max_tokens"], key) == ("/v1/completions", "a question", 4, "Bearer secret")
    assert second == "/v1/chat/completions"
    assert [(m["role"], m["content"]) for m in chat["messages"]] == [("user", "one"), ("assistant", "two"), ("user", "three It is")]


@pytest.mark.parametrize(
    ("troubles", "message"),
    [
        ([401], "answered 401 .*trouble 401.*; set OPENAI_API_KEY"),
        ([404], "answered 404 .*; name a model that it serves"),
        ([500, 500], "answered 500 .*; the answers so far are kept; rerun"),
        (["stall", "stall"], "gave no answer within 0.5 s; raise --timeout"),
    ],
)
def test_what_a_server_refuses(params, troubles, message):
    with Server(params, troubles) as server, pytest.raises(UserError, match=message):
        endpoint = EndpointConfig(server.url, "m", retries=1, timeout=0.5)
        list(EndpointBackend(endpoint).complete([Item(np.arange(3, dtype=np.int32), np.zeros(0, np.int32))], 4))


def test_a_refusal_loses_no_other_answer(params):
    items = [Item(np.arange(3 + i, dtype=np.int32), np.zeros(0, np.int32)) for i in range(8)]
    answers = {}
    with Server(params, [401]) as server, pytest.raises(UserError, match="answered 401"):
        for found in EndpointBackend(EndpointConfig(server.url, "m", concurrency=3)).complete(items, 4):
            answers |= found
    # What was not sent by then is not sent any more.
    assert 2 <= len(answers) == len(server.answered) < 7


def test_wrong_endpoints():
    with pytest.raises(UserError, match="cannot be reached .*; is the server running"):
        next(
            EndpointBackend(EndpointConfig("http://127.0.0.1:9/v1", "m")).complete(
                [Item(np.arange(3, dtype=np.int32), np.zeros(0, np.int32))], 4
            )
        )
    with pytest.raises(UserError, match="endpoint.url='localhost:8000' is not an address"):
        EndpointConfig("localhost:8000", "m")
    with pytest.raises(UserError, match="evals.tasks has 'needles', which no server answers; choose tasks in words, such as ruler"):
        evaluate_endpoint(EndpointConfig("http://localhost:1/v1", "m"), DataConfig(), EvalConfig(tasks=("needles",)))
