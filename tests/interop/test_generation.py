"""Greedy generation of imported models, token for token as transformers generates."""

import functools

import numpy as np
import pytest
import torch

from lcx.interop.families import FAMILIES
from lcx.interop.folder import HfFolder
from lcx.model.architecture import build_architecture
from lcx.model.decode import generate
from lcx.model.execution import ExecutionConfig
from tests.interop import hf_models
from tests.interop.test_families import CASES
from tests.quick import mostly_slow

NEW = 256
CLOSE = 1e-4
"""Where transformers' two best logits are no further apart, rounding decides."""

# Dynamic NTK and LongRoPE change their frequencies while transformers generates, beside keys that it cached under others.
PLAIN = [
    "llama", "llama-yarn", "mistral", "ministral3", "qwen2", "qwen3", "gemma2", "gemma3", "phi3", "olmo2", "smollm3", "mixtral",
    "qwen3-moe",
]  # fmt: skip


def test_every_family_is_here():
    assert {CASES[name][0] for name in PLAIN} == set(FAMILIES)


QUICK = ("llama", 64)
"""What `make test` runs; transformers takes its time over 256 tokens."""


@pytest.mark.parametrize(
    "case", mostly_slow([QUICK, *((name, NEW) for name in PLAIN)], [QUICK]), ids=lambda case: f"{case[0]}-{case[1]}"
)
def test_greedy_generation(case, tmp_path):
    name, count = case
    model_type, changes = CASES[name]
    model = hf_models.make(model_type, tmp_path, **changes)
    source = HfFolder(tmp_path)
    prompts = [hf_models.tokens(length, rows=1, seed=length)[0] for length in (20, 33)]
    arch, buffers = build_architecture(
        source.described.model, ExecutionConfig(), source.described.schemes, max(map(len, prompts)) + count
    )
    found = generate(source.params(), buffers, arch, prompts, count)
    for prompt, ours in zip(prompts, found, strict=True):
        theirs = _transformers(model, prompt, count)
        assert len(ours) == len(theirs) == count
        differ = np.flatnonzero(ours != theirs)
        if len(differ):
            before = np.concatenate([prompt, theirs[: differ[0]]])
            best = np.sort(hf_models.torch_logits(model, before[None])[0, -1])
            assert best[-1] - best[-2] <= CLOSE, f"token {differ[0]} is another"
        assert (differ[0] if len(differ) else count) > 16


def _transformers(model, prompt, count):
    call = functools.partial(
        model.generate, do_sample=False, max_new_tokens=count, min_new_tokens=count, eos_token_id=None, pad_token_id=0
    )
    ids = torch.tensor(prompt[None]).long()
    with torch.no_grad(), hf_models.float64_rotary():
        return call(ids, attention_mask=torch.ones_like(ids))[0, len(prompt) :].numpy().astype(np.int32)
