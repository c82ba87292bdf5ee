"""What is added to scores, and scores that no product makes: as large as the scores, and by rows like them."""

import pytest
import torch
from held import Attention, check
from live import Live
from torch import nn
from torch.nn import functional as F

import attnpatch

BATCH, HEADS, TOKENS, WIDTH = 2, 4, 144, 8


def tensor(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def heads(seed):
    return tensor(BATCH, HEADS, TOKENS, WIDTH, seed=seed)


def padding(hidden=-torch.inf):
    found = torch.zeros(BATCH, TOKENS)
    found[1, -9:] = hidden
    return found


CAUSAL = torch.full((TOKENS, TOKENS), -1e9).triu(1)
MERGED = {
    "added": lambda s: s + (CAUSAL + padding()[:, None, None]),
    "of folded heads": lambda s: (
        s.flatten(0, 1) + (CAUSAL[None] + padding().repeat_interleave(HEADS, 0)[:, None])
    ).unflatten(0, (BATCH, HEADS)),
    "truth values": lambda s: s.masked_fill((CAUSAL < 0) | (padding() < 0)[:, None, None], -1e9),
    "what is seen": lambda s: s.masked_fill(
        ~((CAUSAL == 0)[None, None] & (padding() == 0)[:, None, None]), -1e9
    ),
    "zeros and ones": lambda s: (
        lambda seen: s + (1 - seen[:, None, None, :] * seen[:, None, :, None]) * -1e4
    )(padding(-1) + 1),
    "products onto it": lambda s: s + torch.baddbmm(
        CAUSAL[None] + padding(-1e4).repeat_interleave(HEADS, 0)[:, None],
        tensor(BATCH * HEADS, TOKENS, 4).to(s.dtype),
        tensor(BATCH * HEADS, 4, TOKENS).to(s.dtype),
    ).view(s.shape),
}  # fmt: skip


@pytest.mark.parametrize("name", MERGED)
def test_masks_that_are_put_together(name):
    if name == "products onto it":
        formula = lambda q, k, v: MERGED[name](q @ k.mT).softmax(-1) @ v
        model, inputs = Attention(formula), [heads(i) for i in range(3)]
        native = model(*inputs)
        with attnpatch.patched(model, mode="always", rows=16), Live() as live:
            got = model(*inputs)
            report = attnpatch.report(model)
        assert torch.equal(got, native) and report.totals["materialised"] == 0, report
        assert live.largest < BATCH * HEADS * TOKENS**2 * 4, live.what
        return
    check(
        lambda q, k, v: MERGED[name](q @ k.mT).softmax(-1) @ v,
        *(heads(i) for i in range(3)),
        pairs=2 * TOKENS**2,
    )


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("kind", [torch.bool, torch.float32])
def test_torch_module(kind, need_weights):
    """A mask and a padding given to ``nn.MultiheadAttention``, which makes a mask for each sequence and head of them."""
    torch.manual_seed(0)
    model = nn.MultiheadAttention(HEADS * WIDTH, HEADS, batch_first=True)
    x = tensor(BATCH, TOKENS, HEADS * WIDTH)
    mask, hidden = (CAUSAL < 0, padding() < 0) if kind == torch.bool else (CAUSAL, padding())
    arguments = {"attn_mask": mask, "key_padding_mask": hidden, "need_weights": need_weights}

    def run():
        return model(x, x, x, **arguments)[0]

    with torch.no_grad():
        native = run()
        with Live() as whole:
            run()
        with attnpatch.patched(model, mode="always", workspace=2**17), Live() as live:
            got = run()
            report = attnpatch.report(model)
    size = BATCH * HEADS * TOKENS**2 * 4
    assert whole.largest >= size, whole.what
    assert live.largest < size // 2, f"{live.what}\n{report}"
    assert torch.equal(got, native)


NUMBERS = torch.randint(0, 40, (TOKENS, TOKENS), generator=torch.Generator().manual_seed(5))
# [numbers, heads] -> [heads, tokens, tokens]
TABLES = {
    "flat numbers": lambda t: t[NUMBERS.view(-1)].view(TOKENS, TOKENS, -1).permute(2, 0, 1).contiguous(),
    "numbers of pairs": lambda t: t[NUMBERS].permute(2, 0, 1),
    "heads first": lambda t: t.T[:, NUMBERS],
    "embedding": lambda t: F.embedding(NUMBERS, t).permute(2, 0, 1),
    "index_select": lambda t: t.index_select(0, NUMBERS.flatten()).view(TOKENS, TOKENS, -1).permute(2, 0, 1),
    "one for each sequence": lambda t: t[NUMBERS.expand(BATCH, -1, -1)].permute(0, 3, 1, 2),
    "made by a network": lambda t: (
        16 * torch.tanh(torch.tanh(t @ t.T @ t)[NUMBERS.view(-1)].view(TOKENS, TOKENS, -1)).permute(2, 0, 1)
    ),
}  # fmt: skip


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("name", TABLES)
def test_biases_of_a_table(name, first):
    def formula(q, k, v, table):
        scores, bias = q @ k.mT, TABLES[name](table)
        return (bias + scores if first else scores + bias).mul(0.3).softmax(-1) @ v

    check(formula, *(heads(i) for i in range(3)), tables=(tensor(40, HEADS, seed=3),), pairs=2 * TOKENS**2)


def test_a_table_to_a_kernel():
    """As the mask of ``scaled_dot_product_attention``."""

    def formula(q, k, v, table):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=TABLES["flat numbers"](table)[None])

    model = Attention(formula, tensor(40, HEADS, seed=3))
    inputs = [heads(i) for i in range(3)]
    with torch.no_grad():
        native = model(*inputs)
        with attnpatch.patched(model, mode="always", workspace=2**16), Live() as live:
            got = model(*inputs)
    assert live.largest < HEADS * TOKENS**2 * 4, live.what
    assert torch.equal(got, native)


# [batch, tokens, width]
BY_ELEMENT = {
    "product and sum": lambda q, k, w: (q.unsqueeze(-2) * k.unsqueeze(-3)).sum(-1),
    "keys first": lambda q, k, w: (k[:, None] * q[:, :, None]).sum(dim=-1),
    "additive": lambda q, k, w: torch.tanh(q[:, :, None] + k[:, None]) @ w,
    "additive, a layer": lambda q, k, w: F.linear(torch.tanh(q[:, :, None] + k[:, None]), w[None]).squeeze(
        -1
    ),
    "distances": lambda q, k, w: (q[:, :, None] - k[:, None]).abs().sum(-1).neg(),
    "squares": lambda q, k, w: -((q[:, :, None] - k[:, None]) ** 2).mean(-1),
}


@pytest.mark.parametrize("name", BY_ELEMENT)
def test_scores_by_element(name):
    query, keys, value = (tensor(BATCH, TOKENS, WIDTH, seed=i) for i in range(3))
    check(
        lambda q, k, v, w: BY_ELEMENT[name](q, k, w).softmax(-1) @ v,
        *(query, keys, value),
        tables=(tensor(WIDTH, seed=3),),
        pairs=TOKENS**2,
    )


def test_a_figure_of_each_query_and_key():
    """As in graph attention: a sum for each pair, which no product makes."""
    tokens = 520
    check(
        lambda q, k, v, w: F.leaky_relu((q @ w)[:, :, None] + (k @ w)[:, None], 0.2).softmax(-1) @ v,
        *(tensor(1, tokens, WIDTH, seed=i) for i in range(3)),
        tables=(tensor(WIDTH, seed=3),),
        pairs=tokens**2,
    )


OTHERS = {
    "positions are added to a few rows": lambda x: x + tensor(1, 200, WIDTH).repeat(1, 1, 1),
    "a vector for each sequence": lambda x: tensor(1, 200, 64) + x[:, :1, :1] * torch.ones(64),
    "rows of a table": lambda x: tensor(9, 64)[torch.arange(1024) % 9].view(32, 32, 64).sum(),
    "rows by number": lambda x: x[:, torch.arange(199, -1, -1)],
    "heads": lambda x: (x[:, :, None] * torch.linspace(0, 1, 4)[:, None]).flatten(2),
}


@pytest.mark.parametrize("name", OTHERS)
def test_what_is_no_bias(name):
    """What looks a little like it is what it is natively."""
    x = tensor(BATCH, 200, WIDTH)
    model = Attention(OTHERS[name])
    native = model(x)
    with attnpatch.patched(model, mode="always", rows=16):
        got = model(x)
    assert torch.equal(got + 0, native)
