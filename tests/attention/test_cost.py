"""`auto` between a ring, a window's neighbours and a gather, against devices that are walked hop by hop."""

import numpy as np
import pytest

from lcx.attention.parallel.context import choose_strategy
from lcx.attention.parallel.cost import SplitCost
from lcx.attention.parallel.head_groups import Share
from lcx.attention.parallel.ring import RingSchedule, window_hops
from lcx.core.chips import CHIPS
from lcx.core.mask import Mask

HEADS, SAMPLED = 32, 64
"""Heads of the layer, and queries of a chunk by which its pairs are counted."""


def pairs(mask, ring, tokens):
    """Pairs `[devices of queries, devices of keys]` that a mask shows between shards of a zigzag row, counted at some queries."""
    half = tokens // 2
    starts = np.stack([np.arange(ring), 2 * ring - 1 - np.arange(ring)], 1) * half
    queries = starts[..., None] + (np.arange(SAMPLED) + 0.5) / SAMPLED * half
    reach = mask.window or 2 * ring * half
    first = queries - reach
    last = queries if mask.causal else queries + reach
    begins = starts[None, None, None]
    ends = begins + half
    seen = np.clip(np.minimum(last[..., None, None], ends) - np.maximum(first[..., None, None], begins), 0, None)
    return seen.sum((1, 2, 4)) * half / SAMPLED


def walked(cost, work, order):
    """Seconds of both passes: in hop after hop all compute with the keys they have and send them on, and wait for the last."""
    total = 0.0
    for busy, sent in ((1.0, 1.0), (2.5, 3.0)):
        for i, hop in enumerate(order):
            here = max(work[d, (d - hop) % len(work)] for d in range(len(work))) * busy / cost.rate
            total += here if i == len(order) - 1 else max(here, sent * cost.hop)
    return total


def gathered(cost, work):
    """Seconds of both passes where all keys come before any is worked on."""
    chip, n = cost.chip, len(work)
    rate = chip.gathered(n) if cost.near else chip.between
    return 3.5 * work.sum(1).max() / cost.rate + 4 * (n - 1) * cost.keys / rate


@pytest.mark.parametrize("mask", [Mask(), Mask(window=512), Mask(window=6000), Mask(causal=False)], ids=str)
@pytest.mark.parametrize("chip", ["v5e", "v5p", "tpu7x", "h100"])
def test_auto_is_within_five_percent_of_the_fastest(chip, mask):
    taken = set()
    for ring in (8, 16, 64):
        for tokens in (64, 256, 512, 1024, 2048, 4096, 16384):
            work = pairs(mask, ring, tokens)
            for kv_heads in (1, 8, 32):
                share = Share(1, tokens, HEADS, kv_heads, 128, 1, ring)
                cost = SplitCost(share, CHIPS[chip])
                near = window_hops(mask, "zigzag", tokens, ring)
                times = {"ring": walked(cost, work, range(ring)), "gather": gathered(cost, work)}
                if near is not None:
                    times["window"] = walked(cost, work, [*range(near.before + 1), *range(-1, -near.after - 1, -1)])
                found = choose_strategy("auto", mask, "zigzag", share, CHIPS[chip])
                assert times[found.strategy] <= 1.05 * min(times.values()), (ring, tokens, kv_heads, found.reason, times)
                taken.add(found.strategy)
                assert found.strategy != "ring" or found.schedule == RingSchedule(ring - 1)
    assert len(taken) > 1 or chip == "h100"


def test_a_layer_waits_longer_for_slower_links():
    share = Share(1, 1024, HEADS, 32, 128, 1, 16)
    within, across = (SplitCost(share, CHIPS["h100"]), SplitCost(Share(1, 1024, HEADS, 32, 128, 1, 8), CHIPS["h100"]))
    assert not within.near and across.near and within.hop == pytest.approx(9 * across.hop)
