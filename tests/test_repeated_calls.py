"""A module that does the same for every token is followed once; one that begins to do something else is followed again."""

import threading
import warnings

import pytest
import torch
import torch.nn.functional as F
from test_known_facts import captured, cuts, llama, reduced, same, tokens
from torch import nn
from transformers import DynamicCache

from attnpatch import Blocks
from attnpatch.rows.provenance.sources import Sources

PROMPT, STEPS, CHANGE = 6, 10, 5
# Closed and open: of one shape, made before any call.
GATES = [torch.tensor(0.0), torch.tensor(1.0)]


def plain(step, k, v):
    return k, v, list(range(k.shape[2]))


def flipped(step, k, v):
    """From some step on keys lie the other way round: of the same shapes."""
    if step < CHANGE:
        return k, v, list(range(k.shape[2]))
    return k.flip(2), v.flip(2), list(range(k.shape[2]))[::-1]


def picked(step, k, v):
    order = torch.arange(k.shape[2])
    order = order if step < CHANGE else order.flip(0)
    return k.index_select(2, order), v.index_select(2, order), order.tolist()


def window(step, k, v):
    """The last ten keys: all, at first."""
    size = min(10, k.shape[2])
    return k[:, :, -size:], v[:, :, -size:], list(range(k.shape[2]))[-size:]


def without_first(step, k, v):
    first = max(0, k.shape[2] - 10)
    return k[:, :, first:], v[:, :, first:], list(range(first, k.shape[2]))


def rolled(step, k, v):
    """By no place at first, and then by one more at each step: places move as keys grow in number."""
    by = max(0, step - CHANGE)
    return k.roll(by, 2), v.roll(by, 2), torch.arange(k.shape[2]).roll(by).tolist()


def late_window(step, k, v):
    """All keys twice, and then as many as there were at first: what grows is another number by the same amount."""
    size, n = PROMPT + 1, k.shape[2]
    first = n - size if n > size + 1 else 0
    return k[:, :, first:], v[:, :, first:], list(range(first, n))


def crossed(step, k, v):
    """The same functions on the same shapes; only what goes where differs."""
    places = list(range(k.shape[2]))
    keys, values = [k * 1, k.flip(2)], [v * 1, v.flip(2)]
    which = int(step >= CHANGE)
    return keys[which] + 0, values[which] + 0, places[::-1] if which else places


def turned_in_place(step, k, v):
    """What a tensor looks like is changed in place: what was done before can no longer be followed.

    Once there are as many keys as channels, and then keys are channels.
    """
    k = k * 1
    if k.shape[2] != k.shape[3]:
        return k, v, list(range(k.shape[2]))
    turned = k.transpose(2, 3) * 1
    k.transpose_(2, 3)
    return turned, v, None


def written(step, k, v):
    k, v, n = k * 1, v * 1, k.shape[2]
    if step >= CHANGE:
        k[:, :, [0, 1]], v[:, :, [0, 1]] = k[:, :, [1, 0]], v[:, :, [1, 0]]
        return k, v, [1, 0, *range(2, n)]
    return k, v, list(range(n))


def written_elsewhere(step, k, v):
    """Keys lie in one memory, and are written through another tensor of it that nobody saw being made."""
    k, n = k * 1, k.shape[2]
    with torch._C.DisableTorchFunction():
        other = (k if step >= CHANGE else torch.zeros_like(k))[:, :, :]
    other.copy_(k.flip(2))
    return k, v, list(range(n))[::-1] if step >= CHANGE else list(range(n))


@torch.jit.script
def turn(k: torch.Tensor) -> torch.Tensor:
    k.copy_(k.flip(2))
    return torch.zeros(1)


def scripted(step, k, v):
    """Code that no mode sees turns keys round, from some step on."""
    k, places = k * 1, list(range(k.shape[2]))
    turn(k if step >= CHANGE else k.clone())
    return k, v, places[::-1] if step >= CHANGE else places


def scripted_in_a_row(step, k, v):
    """The same, and then a function that is seen writes to them too."""
    k, v, places = scripted(step, k, v)
    return k.mul_(1.0), v, places


def by_a_thread(step, k, v):
    k, places = k * 1, list(range(k.shape[2]))
    if step >= CHANGE:
        thread = threading.Thread(target=torch.inference_mode(k.is_inference())(lambda: k.copy_(k.flip(2))))
        thread.start()
        thread.join()
    return k * 1, v, places[::-1] if step >= CHANGE else places


def scripted_and_read_elsewhere(step, k, v):
    """Then code outside torch asks for an address: from there on functions are followed one by one."""
    k, v, places = scripted(step, k, v)
    if step >= CHANGE:
        v.data_ptr()
    return k * 1, v, places


def added_in_place(step, k, v):
    k = k * 1
    k += 1.0
    k[:, :, 0] *= 2.0
    return k, v, list(range(k.shape[2]))


def gated(step, k, v):
    """Keys in order beside keys in another, until a gate closes: its value is in a tensor."""
    gate = GATES[step < CHANGE]
    places = list(range(k.shape[2]))
    return k * gate + 0.1 * k.flip(2), v, places if step < CHANGE else places[::-1]


def gated_in_place(step, k, v):
    gate = GATES[step < CHANGE]
    places = list(range(k.shape[2]))
    k = k * gate
    k += 0.1 * k.flip(2) + 0.1 * v.flip(2)
    return k, v, places if step < CHANGE else places[::-1]


def gated_beside(step, k, v):
    gate = GATES[step < CHANGE]
    places = list(range(k.shape[2]))
    keys = torch.cat([(k * gate)[..., :4], 0.1 * k.flip(2)[..., 4:]], -1)
    return keys, v, places if step < CHANGE else places[::-1]


def asks_twice(step, k, v):
    """The same, and then attention to keys in another order (below)."""
    return plain(step, k, v)


class Attention(nn.Module):
    def __init__(self, change):
        super().__init__()
        self.change, self.project, self.seen = change, nn.Linear(32, 96), []

    def forward(self, x, cache):
        step = max(0, cache.get_seq_length() - PROMPT)
        q, k, v = self.project(x).unflatten(-1, (3, 4, 8)).permute(2, 0, 3, 1, 4)
        k, v = cache.update(k, v, 0)
        k, v, places = self.change(step, k, v)
        self.seen.append((q, k, places))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=x.shape[1] > 1)
        if self.change is asks_twice and step >= CHANGE:
            F.scaled_dot_product_attention(q, k.flip(2), v.flip(2))
        return out.transpose(1, 2).flatten(2)


class Model(nn.Module):
    def __init__(self, change):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.attention, self.out = nn.Embedding(97, 32), Attention(change), nn.Linear(32, 97)

    def forward(self, input_ids, past_key_values):
        x = self.embed(input_ids)
        return self.out(x + self.attention(x, past_key_values))


def decode(model, ids):
    cache = DynamicCache()
    model(ids[:, :PROMPT], cache)
    for place in range(PROMPT, ids.shape[1]):
        model(ids[:, place : place + 1], cache)


def looked_at(q, k, places):
    """float64 ``[rows, tokens]``: what each query looks at, by the true places of the keys."""
    scores = q.double() @ k.double().mT / q.shape[-1] ** 0.5
    if q.shape[2] > 1:
        scores = scores.masked_fill(torch.ones(scores.shape[-2:]).triu(1).bool(), -torch.inf)
    rows = torch.zeros(q.shape[2], PROMPT + STEPS, dtype=torch.double)
    rows[:, places] = torch.nan if places is None else scores.softmax(-1).mean((0, 1))
    return rows


def dense(seen, width=4):
    rows = torch.cat([looked_at(*one) for one in seen])
    return torch.stack([part.unflatten(1, (-1, width)).sum(-1).mean(0) for part in rows.split(width)])


CHANGES = [
    plain, flipped, picked, window, without_first, late_window, rolled, crossed, turned_in_place, written,
    written_elsewhere, asks_twice, scripted, scripted_in_a_row, by_a_thread, scripted_and_read_elsewhere, added_in_place, gated, gated_in_place, gated_beside,
]  # fmt: skip
# Known to the end, or known no longer: either is right.
ALWAYS_KNOWN = {plain, asks_twice, added_in_place}


@pytest.fixture
def follows(monkeypatch):
    """Counts the functions that are followed."""
    count, follow = [], Sources.follow

    def counted(self, func, *given):
        count.append(func)
        return follow(self, func, *given)

    monkeypatch.setattr(Sources, "follow", counted)
    return count


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("change", CHANGES)
def test_right_or_left_out(change, mode):
    """In inference mode tensors have no version that tells how often they were written to."""
    model, ids = Model(change).eval(), tokens(PROMPT + STEPS)
    with warnings.catch_warnings(), mode():
        warnings.simplefilter("ignore")
        maps = captured(model, lambda: decode(model, ids), Blocks.fixed(4))
    if "attention" in maps.left_out:
        assert change not in ALWAYS_KNOWN
    else:
        same(maps["attention"].mass[0], dense(model.attention.seen))


def test_followed_until_it_is_known(follows):
    model, ids = Model(plain).eval(), tokens(PROMPT + STEPS)
    cache, counts = DynamicCache(), []

    def run():
        model(ids[:, :PROMPT], cache)
        for place in range(PROMPT, ids.shape[1]):
            model(ids[:, place : place + 1], cache)
            counts.append(len(follows))

    captured(model, run, Blocks.fixed(4))
    assert counts[0] < counts[1], "after one step it is not known what grows"
    assert counts[1] == counts[-1], "steps that are the same are not followed"


def by_layer(maps, batch):
    """``[layers, batch, blocks, blocks]``."""
    mass = maps.block_map.mass
    return mass[:, None] if batch == 1 else mass.transpose(0, 1)


@pytest.mark.parametrize("batch", [1, 3])
def test_of_a_real_model(batch, follows):
    model, ids = llama(), torch.cat([tokens(30, seed) for seed in range(batch)])

    def run():
        cache = DynamicCache(config=model.config)
        model(ids[:, :16], past_key_values=cache)
        for place in range(16, 30):
            counted = len(follows)
            model(ids[:, place : place + 1], past_key_values=cache)
        assert len(follows) == counted

    maps = captured(model, run)
    eager = llama("eager")
    with torch.no_grad():
        seen = eager(ids, output_attentions=True, use_cache=False).attentions
    for own, probabilities in zip(by_layer(maps, batch), seen, strict=True):
        for mine, each in zip(own, probabilities, strict=True):
            same(mine, reduced(each, cuts(30), cuts(30)))


def test_batch_and_cache_that_change_between_steps():
    """Other sizes are other calls: what grew from one to the next need not be what grows in these."""
    model, found = llama(), []
    for batch, start in [(1, 16), (2, 16), (2, 24), (1, 7)]:
        ids = torch.cat([tokens(30, seed) for seed in range(batch)])

        def run(ids=ids, start=start):
            cache = DynamicCache(config=model.config)
            model(ids[:, :start], past_key_values=cache)
            for place in range(start, 30):
                model(ids[:, place : place + 1], past_key_values=cache)

        found.append((captured(model, run), ids, batch))
    for maps, ids, batch in found:
        with torch.no_grad():
            seen = llama("eager")(ids, output_attentions=True, use_cache=False).attentions
        for own, probabilities in zip(by_layer(maps, batch), seen, strict=True):
            for mine, each in zip(own, probabilities, strict=True):
                same(mine, reduced(each, cuts(30), cuts(30)))
