"""Contrastive search by hand: candidates of every step go through the cache, and one of them is kept."""

import copy

import pytest
import torch
import transformers

import attnpatch
from attnpatch import Blocks

CANDIDATES, STEPS, WIDTH = 3, 5, 4


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, attn_implementation="eager",
    )).eval()  # fmt: skip


class Search:
    """The steps of a contrastive search (Su et al. 2022).

    Attributes:
        tokens: What is returned.
        sequence: Which sequence of the maps that is, if the way is mapped.
    """

    sequence = 0

    def __init__(self, model, ids):
        self.model, self.tokens, self.cache = model, ids, transformers.DynamicCache(config=model.config)
        self.out = self.run(ids, self.cache)
        self.context = self.out.hidden_states[-1][0]
        for step in range(STEPS):
            top = self.out.logits[0, -1].softmax(-1).topk(CANDIDATES)
            chosen = self.step(step, top)
            self.context = torch.cat([self.context, self.out.hidden_states[-1][0, -1:]])
            self.tokens = torch.cat([self.tokens, top.indices[None, chosen : chosen + 1]], 1)

    def run(self, ids, cache):
        return self.model(ids, past_key_values=cache, output_hidden_states=True)

    def best(self, states, probabilities):
        alike = torch.cosine_similarity(states[:, None], self.context[None], dim=-1).max(1).values
        return int((0.4 * probabilities - 0.6 * alike).argmax())

    def step(self, number, top):
        raise NotImplementedError


class Rows(Search):
    """Candidates are a batch, on a repeated cache of which one row is selected, as transformers did it."""

    def select(self, row):
        self.cache.batch_select_indices(torch.tensor([row]))

    def step(self, number, top):
        self.cache.batch_repeat_interleave(CANDIDATES)
        out = self.run(top.indices[:, None], self.cache)
        chosen = self.best(out.hidden_states[-1][:, -1], top.values)
        self.select(chosen)
        out.logits = out.logits[chosen : chosen + 1]
        out.hidden_states = [each[chosen : chosen + 1] for each in out.hidden_states]
        self.out = out
        return chosen


class Reordered(Rows):
    def select(self, row):
        self.cache.reorder_cache(torch.tensor([row] * CANDIDATES))
        super().select(0)


class Copies(Search):
    """Each candidate has a copy of the cache, and the chosen copy goes on."""

    def step(self, number, top):
        tried = []
        for token in top.indices:
            cache = copy.deepcopy(self.cache)
            tried.append((self.run(token.view(1, 1), cache), cache))
        chosen = self.best(torch.cat([out.hidden_states[-1][:, -1] for out, _ in tried]), top.values)
        self.out, self.cache = tried[chosen]
        self.sequence = 1 + number * CANDIDATES + chosen
        return chosen


class Cropped(Search):
    """Candidates go through one cache, which is cut after each; the chosen one goes through it again."""

    def step(self, number, top):
        states = []
        for token in top.indices:
            states.append(self.run(token.view(1, 1), self.cache).hidden_states[-1][:, -1])
            self.cache.crop(-1)
        chosen = self.best(torch.cat(states), top.values)
        self.out = self.run(top.indices[chosen].view(1, 1), self.cache)
        return chosen


class CopiedRows(Search):
    """Candidates are a batch on a repeated copy; the chosen one goes through the cache itself."""

    def step(self, number, top):
        cache = copy.deepcopy(self.cache)
        cache.batch_repeat_interleave(CANDIDATES)
        out = self.run(top.indices[:, None], cache)
        chosen = self.best(out.hidden_states[-1][:, -1], top.values)
        self.out = self.run(top.indices[chosen].view(1, 1), self.cache)
        return chosen


def searched(way, model, steps="mean"):
    ids = torch.randint(3, 64, (1, 13), generator=torch.Generator().manual_seed(2))
    with torch.no_grad(), attnpatch.capture(model, Blocks.fixed(WIDTH), steps=steps) as maps:
        found = way(model, ids)
    return found, maps


def reduced(rows, low=0):
    """Means over the query tokens of each block, from token ``low`` on, and sums over its keys."""
    count = rows.shape[-1]
    blocks = [range(start, min(start + WIDTH, count)) for start in range(0, count, WIDTH)]
    found = torch.zeros(len(blocks), len(blocks), dtype=torch.float64)
    for i, one in enumerate(blocks):
        own = [row for row in one if low <= row < low + len(rows)]
        for j, other in enumerate(blocks):
            found[i, j] = sum(rows[row - low, list(other)].sum() for row in own) / max(1, len(own))
    return found


@pytest.mark.parametrize("way", [Copies, Cropped, CopiedRows])
def test_the_returned_sequence(model, way):
    """The map of one pass over the returned tokens; other candidates are not in it."""
    found, maps = searched(way, model)
    with torch.no_grad():
        native = model(found.tokens, output_attentions=True).attentions
    assert not maps.left_out
    (one,) = maps.sequences[found.sequence].values()
    for layer, probabilities in zip(one.mass, native, strict=True):
        assert (layer - reduced(probabilities[0].double().mean(0))).abs().max() < 1e-6


@pytest.mark.parametrize("way", [Copies, Cropped, CopiedRows])
def test_steps_of_the_returned_sequence(model, way):
    """One for the prompt and one for each token; candidates that were not kept are no steps."""
    found, maps = searched(way, model, "all")
    with torch.no_grad():
        native = model(found.tokens, output_attentions=True).attentions
    (one,) = maps.sequences[found.sequence].values()
    assert one.steps == tuple(range(1 + STEPS))
    for number, step in enumerate(one.mass):
        rows = slice(0, 13) if number == 0 else slice(12 + number, 13 + number)
        for layer, probabilities in zip(step, native, strict=True):
            expected = reduced(probabilities[0].double().mean(0)[rows], rows.start)
            assert (layer - expected).abs().max() < 1e-6


@pytest.mark.parametrize("way", [Rows, Reordered])
def test_rows_that_are_selected(model, way):
    """Which row is returned is known only later."""
    _, maps = searched(way, model)
    assert set(maps.left_out) == {f"model.layers.{layer}.self_attn" for layer in (0, 1)}
    assert all("contrastive search" in why and "capture one call" in why for why in maps.left_out.values())
