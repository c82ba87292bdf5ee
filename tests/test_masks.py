"""Masks and position biases are made by rows: never whole unless something needs them whole, and then counted."""

import copy
import functools
import pickle
import threading

import pytest
import torch
from compat.sweep import Whole
from live import Live
from torch import nn

import attnpatch
from attnpatch.hosts.transformers import masks as host_masks
from attnpatch.rows.creation import row_masks
from attnpatch.rows.deferred.tensor import DeferredTensor, is_pending
from attnpatch.rows.evaluate import toeplitz as distances

TOKENS = 1024
SIZES = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "pad_token_id": 0,
}  # fmt: skip
DECODER = {**SIZES, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": TOKENS}


def config_of(kind: str, attention: str = "eager"):
    import transformers

    more = {
        "Llama": DECODER,
        "Mistral": {**DECODER, "sliding_window": 100},
        "Gemma2": {**DECODER, "sliding_window": 100, "query_pre_attn_scalar": 8},
        "GptOss": {**DECODER, "sliding_window": 100, "num_local_experts": 2, "num_experts_per_tok": 1},
        "Bert": {**SIZES, "max_position_embeddings": TOKENS},
        "T5": {
            "vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 4, "pad_token_id": 0,
            "decoder_start_token_id": 0,
        },
    }[kind]  # fmt: skip
    return getattr(transformers, f"{kind}Config")(**more, attn_implementation=attention)


def model_of(kind: str, attention: str) -> nn.Module:
    import transformers

    torch.manual_seed(0)
    return getattr(transformers, f"{kind}Model")(config_of(kind, attention)).eval()


def operations(site) -> dict[str, int]:
    """What was materialised, without the lines that asked for it."""
    return {name.partition(" (")[0]: count for name, count in site.materialised_by.items()}


def inputs_of(kind: str, length: int = TOKENS, side: str = "left") -> dict[str, torch.Tensor]:
    ids = torch.randint(3, 60, (2, length), generator=torch.Generator().manual_seed(0))
    mask = torch.ones(2, length, dtype=torch.long)
    mask[1, slice(0, 9) if side == "left" else slice(-9, None)] = 0
    return {
        "input_ids": ids,
        "attention_mask": mask,
        **({"decoder_input_ids": ids} if kind == "T5" else {}),
    }


# Their masks are as those of the others.
SLOW = [("T5", "eager"), ("Gemma2", "eager"), ("Mistral", "sdpa"), ("Bert", "eager")]
CASES = [
    pytest.param(kind, attention, marks=[pytest.mark.long] if (kind, attention) in SLOW else [])
    for kind in ("Llama", "Mistral", "Gemma2", "GptOss", "Bert", "T5")
    for attention in ("eager", "sdpa")
    if (kind, attention) not in (("GptOss", "sdpa"), ("Gemma2", "sdpa"))
]


@pytest.mark.parametrize(("kind", "attention"), CASES)
def test_no_storage_of_queries_times_keys(kind, attention):
    """The same bits, and nothing that is made holds as many bytes as there are pairs of a query and a key."""
    model, inputs = model_of(kind, attention), inputs_of(kind)
    with torch.no_grad():
        native = model(**inputs)[0]
        with Live() as whole:
            model(**inputs)
        with attnpatch.patched(model, mode="always", workspace=2**20), Live() as live:
            got = model(**inputs)[0]
            report = attnpatch.report(model)
    assert whole.largest >= TOKENS**2, "the host makes no such mask any more: the test shows nothing"
    assert live.largest < TOKENS**2, live.what
    assert torch.equal(got, native)
    assert report.totals["materialised"] == 0 and report.totals["native"] == 0, report


# --------------------------------------------------------------------------------------- the functions of transformers


class Host(nn.Module):
    """A model that only makes a mask."""

    class Attention(nn.Module):
        def forward(self, x):
            return x

    def __init__(self, function, config, **more):
        super().__init__()
        self.inner = self.Attention()
        self.function, self.config, self.more = function, config, more

    def forward(self, x, mask=None, cache=None):
        return self.function(
            config=self.config, inputs_embeds=x, attention_mask=mask, past_key_values=cache, **self.more
        )


def _every_seventh(batch_idx, head_idx, q_idx, kv_idx):
    return kv_idx % 7 == q_idx % 7


PACKED = torch.cat([torch.arange(20), torch.arange(30), torch.arange(14)])[None]
BLOCKS = torch.tensor([[-1] * 5 + [0] * 30 + [-1] * 4 + [1] * 25, [-1] * 64])
FUNCTIONS = {
    "causal": ("create_causal_mask", {}),
    "sliding": ("create_sliding_window_causal_mask", {}),
    "chunked": ("create_chunked_causal_mask", {}),
    "bidirectional": ("create_bidirectional_mask", {}),
    "bidirectional sliding": ("create_bidirectional_sliding_window_mask", {}),
    "packed": ("create_causal_mask", {"position_ids": PACKED.expand(2, -1)}),
    "blocks": ("create_causal_mask", {"block_sequence_ids": BLOCKS}),
    "or, under vmap": ("create_causal_mask", {"or_mask_function": _every_seventh}),
    "and, under vmap": ("create_bidirectional_mask", {"and_mask_function": _every_seventh}),
}


def host_of(name: str, attention: str, **more) -> Host:
    from transformers import masking_utils

    function, own = FUNCTIONS[name]
    config = config_of("Mistral", attention)
    config.sliding_window, config.attention_chunk_size = 11, 13
    return Host(getattr(masking_utils, function), config, **own, **more)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("padding", [False, True])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_function(name, padding, attention):
    """Whole, a few rows, one row, one sequence: what the host makes, or ``None`` where it makes none."""
    model, x = host_of(name, attention), torch.zeros(2, 64, 8)
    mask = None
    if padding:
        mask = torch.ones(2, 64, dtype=torch.long)
        mask[1, :9] = 0
    native = model(x, mask)
    with attnpatch.patched(model, mode="always"):
        got = model(x, mask)
        again = model(x, mask)
    if native is None:
        assert got is None
        return
    assert is_pending(got) and got.shape == native.shape and got.dtype == native.dtype
    assert torch.equal(got[:, :, 5:9].clone(), native[:, :, 5:9])
    assert torch.equal(got[1, 0, -1].clone(), native[1, 0, -1])
    assert torch.equal(got[..., 3:50].clone(), native[..., 3:50])
    assert is_pending(got)
    assert torch.equal(got + 0 if attention == "eager" else got.clone(), native)
    assert torch.equal(pickle.loads(pickle.dumps(again)), native)
    assert torch.equal(copy.deepcopy(again), native)


def test_a_cache_shifts_the_rows():
    """Some tokens are in a cache: the rows begin after them, in a static one at a place that is a tensor."""
    from transformers import DynamicCache, StaticCache

    model, x = host_of("causal", "sdpa"), torch.zeros(2, 40, 8)
    mask = torch.ones(2, 64, dtype=torch.long)
    mask[1, :9] = 0
    cache = DynamicCache()
    cache.update(torch.zeros(2, 2, 24, 8), torch.zeros(2, 2, 24, 8), 0)
    native = model(x, mask, cache)
    assert native.shape == (2, 1, 40, 64)
    static = StaticCache(config=config_of("Llama"), max_cache_len=64)
    static.update(torch.zeros(2, 2, 24, 8), torch.zeros(2, 2, 24, 8), 0)
    native_static = model(x, mask[:, :40], static)
    with attnpatch.patched(model, mode="always"):
        got = model(x, mask, cache)
        assert is_pending(got)
        got_static = model(x, mask[:, :40], static)
        assert is_pending(got_static)
        static.update(torch.zeros(2, 2, 8, 8), torch.zeros(2, 2, 8, 8), 0)
    assert torch.equal(got.clone(), native) and torch.equal(got_static.clone(), native_static)


def test_a_mask_says_what_it_said_when_it_was_made():
    """Whoever overwrites a padding mask afterwards changes no mask that is still to be computed."""
    model, x = host_of("blocks", "sdpa"), torch.zeros(2, 64, 8)
    mask = torch.ones(2, 64, dtype=torch.bool)
    mask[1, :9] = False
    native = model(x, mask)
    with attnpatch.patched(model, mode="always"), torch.inference_mode():
        got = model(x, mask)
    mask.fill_(True)
    assert torch.equal(got.clone(), native)


def test_a_function_that_reads_something_unknown_is_left_to_the_host():
    class Table:
        seen = torch.arange(64)

    table = Table()
    function = lambda b, h, q, k: k <= table.seen[q]
    model = host_of("bidirectional", "sdpa", and_mask_function=function)
    with attnpatch.patched(model, mode="always"):
        assert type(model(torch.zeros(2, 64, 8))) is torch.Tensor
        (site,) = (site for site in attnpatch.report(model).sites if site.materialised_by)
    assert operations(site) == {"a mask that reads a Table": 1}


def test_copies_of_functions():
    """What functions refer to is copied: cells, defaults, partials, a function that refers to itself."""
    values = torch.arange(4)

    def inner(i, more=values):
        return outer if i is None else values[i] + more[i]

    def outer(i):
        return inner(i)

    kept = row_masks.keeping(functools.partial(outer))
    values.zero_()
    assert kept(3) == 6 and outer(3) == 0
    with pytest.raises(row_masks.Unknown):
        row_masks.keeping([threading.Lock()])


# ------------------------------------------------------------------------------------------------------------- when


def test_only_where_the_rule_says_so(monkeypatch):
    model, mask = host_of("sliding", "eager"), torch.ones(2, TOKENS, dtype=torch.long)
    x = torch.zeros(2, TOKENS, 8)

    def kind(**policy):
        with attnpatch.patched(model, **policy):
            return type(model(x, mask))

    monkeypatch.setenv("ATTNPATCH_FREE_MEMORY", "1MB")
    assert kind(min_tokens=100) is DeferredTensor
    assert kind(min_tokens=TOKENS) is torch.Tensor
    assert kind(mode="never") is torch.Tensor
    # A mask of 2 x 1024 x 1024: 2 MiB in bool, 8 MiB in float32, and 96 MiB of scores in four heads.
    monkeypatch.setenv("ATTNPATCH_FREE_MEMORY", "3GB")
    assert kind(min_tokens=100) is torch.Tensor
    monkeypatch.setenv("ATTNPATCH_FREE_MEMORY", "150MB")
    assert kind(min_tokens=100, min_free=0) is DeferredTensor
    model.config._attn_implementation = "sdpa"
    assert kind(min_tokens=100, min_free=0) is torch.Tensor
    assert type(model(x, mask)) is torch.Tensor


def test_only_while_the_model_is_called():
    """transformers' table is its own before and after, also after an exception, and for other threads always."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS as TABLE

    before = dict(TABLE.items())
    model, x = host_of("sliding", "sdpa"), torch.zeros(2, 64, 8)
    seen = {}

    class Failing(nn.Module):
        def forward(self, x):
            seen["inside"] = dict(TABLE.items())
            thread = threading.Thread(target=lambda: seen.update(other=type(model(x))))
            thread.start()
            thread.join()
            raise KeyError("on purpose")

    failing = Failing()
    failing.inner = Host.Attention()
    with attnpatch.patched(failing, mode="always"):
        assert dict(TABLE.items()) == before
        with pytest.raises(KeyError):
            failing(x)
    assert seen["inside"] != before and seen["other"] is torch.Tensor
    assert dict(TABLE.items()) == before


def test_functions_that_others_register_meanwhile_stay():
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS as TABLE
    from transformers.masking_utils import sdpa_mask

    def theirs(**kwargs):
        return sdpa_mask(**kwargs)

    class Registering(nn.Module):
        def forward(self, x):
            TABLE.register("sdpa", theirs)

    model = Registering()
    model.inner = Host.Attention()
    try:
        with attnpatch.patched(model, mode="always"):
            model(torch.zeros(2, 64, 8))
        assert TABLE["sdpa"] is theirs
    finally:
        TABLE.register("sdpa", sdpa_mask)


def test_compiled_models_make_their_own():
    model = host_of("sliding", "sdpa")
    x = torch.zeros(2, 64, 8)
    with attnpatch.patched(model, mode="always"):
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        assert type(compiled(x)) is torch.Tensor
    assert type(torch.vmap(lambda y: model(y[None]).float())(x)) is torch.Tensor


# ----------------------------------------------------------------------------------------------- what is done to them

ROW_WISE = {
    "slice of keys": lambda m: m[:, :, :, :40],
    "to float": lambda m: m.to(torch.float32),
    "inverted": lambda m: ~m,
    "logical_not": lambda m: m.logical_not(),
    "additive": lambda m: torch.where(m, 0.0, -1e9),
    "one minus": lambda m: (1.0 - m.float()) * -1e9,
    "equals": lambda m: m == 0,
    "with another": lambda m: m & torch.ones(64, 64, dtype=torch.bool).triu(-3),
    "expanded": lambda m: m.expand(2, 4, 64, 64),
    "blind rows": lambda m: m.float().mul(~torch.all(~m, dim=-1, keepdim=True)),
    "squeezed": lambda m: m.squeeze(1)[:, None],
    "moved": lambda m: m.to("cpu"),
    "typed": lambda m: m.type(torch.bfloat16),
    "flip": lambda m: m.flip(-1),
    "repeat": lambda m: m.repeat(1, 4, 1, 1),
    "tril": lambda m: m.float().tril(),
}
WHOLE = {
    "sum": lambda m: m.sum(),
    "nonzero": lambda m: m.nonzero(),
    "unique": lambda m: m.unique(),
}


@pytest.mark.parametrize("name", [*ROW_WISE, *WHOLE])
def test_operations(name):
    """What goes by rows stays deferred; anything else makes the mask whole, once, is right, and is in the report."""
    change = {**ROW_WISE, **WHOLE}[name]

    class Changing(nn.Module):
        def __init__(self):
            super().__init__()
            self.host, self.inner = host_of("sliding", "sdpa"), Host.Attention()

        def forward(self, x):
            return change(self.host(x))

    model, x = Changing(), torch.zeros(2, 64, 8)
    native = model(x)
    with attnpatch.patched(model, mode="always"):
        got = model(x)
        report = attnpatch.report(model)
    if name in ROW_WISE:
        assert is_pending(got) and report.totals["materialised"] == 0, report
        assert torch.equal(got[:, :, 7:12].clone(), native[:, :, 7:12])
    else:
        (site,) = (site for site in report.sites if site.materialised_by)
        assert site.name == "(model)" and operations(site) == {name: 1}, report
        assert name in str(report)
    assert torch.equal(got.clone(), native) and got.dtype == native.dtype


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_a_part_that_is_called_on_its_own(attention):
    """``generate`` calls the encoder, not the model: its masks are by rows too, and it is as it was afterwards."""
    model, inputs = model_of("T5", attention), inputs_of("T5")
    del inputs["decoder_input_ids"]
    before = dict(vars(model.encoder)), type(model.encoder)
    with torch.no_grad():
        native = model.encoder(**inputs)[0]
        with attnpatch.patched(model, mode="always", workspace=2**20), Live() as live:
            got = model.encoder(**inputs)[0]
            report = attnpatch.report(model)
    assert torch.equal(got, native) and live.largest < TOKENS**2, live.what
    assert {site.name for site in report.sites if site.counts["by_rows"]} == {
        f"encoder.block.{i}.layer.0.SelfAttention" for i in range(2)
    }
    assert (dict(vars(model.encoder)), type(model.encoder)) == before


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_training_with_checkpoints(attention, reentrant):
    """A mask goes through checkpointed layers, which run twice; gradients are those of the unpatched model."""
    from transformers import MistralForCausalLM

    torch.manual_seed(0)
    model = MistralForCausalLM(config_of("Mistral", attention)).train()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    inputs = inputs_of("Mistral", 150)

    def gradients():
        model.zero_grad()
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
        return torch.cat([p.grad.flatten() for p in model.parameters()])

    native = gradients()
    with attnpatch.patched(model, mode="always", rows=40):
        got = gradients()
        totals = attnpatch.report(model).totals
    assert totals["by_rows"] and not totals["materialised"], totals
    assert torch.allclose(got, native, atol=1e-7, rtol=1e-4)


def test_devices_are_handled_as_accelerate_does():
    """Hooks send a layer's inputs to its device, masks in dicts included."""
    from accelerate.utils import send_to_device

    model, x = host_of("sliding", "sdpa"), torch.zeros(2, 64, 8)
    native = model(x)
    with attnpatch.patched(model, mode="always"):
        sent = send_to_device({"full": model(x)}, torch.device("cpu"))["full"]
        away = send_to_device(model(x), torch.device("meta"))
    assert is_pending(sent) and torch.equal(sent.clone(), native)
    assert away.device.type == "meta" and away.shape == native.shape


# ----------------------------------------------------------------------------------------- what sites make of positions


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_gradients_of_a_learned_bias(attention):
    """T5's table of distances gets the gradients it gets unpatched."""
    model, inputs = model_of("T5", attention), inputs_of("T5", 150)

    def gradients():
        model.zero_grad()
        with torch.enable_grad():
            model(**inputs)[0].square().mean().backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    native = gradients()
    with attnpatch.patched(model, mode="always", rows=40):
        got = gradients()
    assert any("relative_attention_bias" in name for name in native)
    for name, gradient in native.items():
        assert torch.allclose(got[name], gradient, atol=1e-7, rtol=1e-4), name


class Positions(nn.Module):
    """Hand-written attention with a bias made of positions."""

    def __init__(self, bias):
        super().__init__()
        self.bias = bias

    def forward(self, x):
        bias = self.bias(torch.arange(x.shape[-2])[:, None], torch.arange(x.shape[-2])[None, :])
        return torch.softmax(x @ x.transpose(-2, -1) + bias, -1) @ x


class PositionsAttention(Positions):
    pass


BIASES = {
    "distance": lambda q, k: (q - k).abs() * -0.1,
    "causal": lambda q, k: torch.where(k <= q, 0.0, -1e9),
    "window": lambda q, k: torch.where((q - k).abs() < 9, torch.zeros_like(q - k), -1e9).float(),
    "buckets": lambda q, k: torch.nn.functional.embedding(
        (k - q).clamp(-5, 5) + 5, torch.linspace(-1, 1, 11)[:, None]
    ).squeeze(-1),
    "keys first": lambda q, k: ((k.T - q.T) * 0.01).T,
    "looked up": lambda q, k: torch.linspace(-1, 1, 200)[(k - q) + 100],
    "padded": lambda q, k: torch.nn.functional.pad((k - q)[:, 2:] * 0.01, (0, 2), value=-0.5),
    "padded before": lambda q, k: torch.nn.functional.pad((k - q)[:, 1:] * 0.01, (1, 0)),
    "turned round": lambda q, k: ((k - q) * 0.01).flip(0),
    "of heads": lambda q, k: (
        torch.nn.functional.embedding((k - q).clamp(-5, 5) + 5, torch.linspace(-1, 1, 33).view(11, 3))
        .permute(2, 0, 1)
        .unsqueeze(0)
    ),
    "from both sides": lambda q, k: torch.where((k <= q) & (k + 9 > q), (q - k) * -0.1, -1e9),
    "from further on": lambda q, k: (k - (q + 7)).abs() * -0.1,
    "every second": lambda q, k: (2 * k - q).abs() * -0.1,
    "packed": lambda q, k: (k % 20 - q % 20) * 0.1,
    "a part of the keys": lambda q, k: (k - q).abs().masked_fill(k % 3 == 0, 50) * -0.1,
    "two kinds": lambda q, k: (k - q).abs() * -0.1 + (k - 2 * q) * 0.01,
    "cast at last": lambda q, k: (k - q).abs().neg().clamp(-5).float(),
    "running": lambda q, k: (k - q).cumsum(-1) * 1e-3,
}
# Of which nothing depends on distances only, or not all of it.
NO_DISTANCES = {"every second", "packed", "padded", "padded before", "turned round"}


@pytest.mark.parametrize("is_inference", [False, True])
@pytest.mark.parametrize("name", BIASES)
def test_positions_against_positions(name, is_inference, monkeypatch):
    """A tile of what depends on a distance is made of two of its rows, but not where gradients may be asked for."""
    model, copied = PositionsAttention(BIASES[name]), []
    x = torch.randn(2, 3, 61, 8, generator=torch.Generator().manual_seed(0))
    native = model(x)
    spread = distances.spread
    monkeypatch.setattr(distances, "spread", lambda *args: copied.append(spread(*args)) or copied[-1])
    with (
        torch.inference_mode(is_inference),
        attnpatch.patched(model, mode="always", rows=8, heads=2),
    ):
        got = model(x)
        totals = attnpatch.report(model).totals
    assert torch.equal(got, native)
    assert totals["by_rows"] == 1
    assert not totals["materialised"], totals
    if name not in NO_DISTANCES:
        assert bool([tile for tile in copied if tile is not None]) == is_inference


def test_what_heads_share_is_not_overwritten():
    """A step may write over its first operand, but not over rows that the next heads read."""

    class Attention(nn.Module):
        def forward(self, x):
            positions = torch.arange(x.shape[-2])
            bias = (positions[:, None] - positions[None, :]).float()[None, None]
            return torch.softmax(bias * -0.1 + x @ x.transpose(-2, -1), -1) @ x

    model, x = Attention(), torch.randn(1, 6, 61, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        native = model(x)
        with attnpatch.patched(model, mode="always", rows=8, heads=1):
            got = model(x)
            assert attnpatch.report(model).totals["materialised"] == 0
    assert torch.allclose(got, native, atol=1e-6, rtol=0)  # one head at a time may round otherwise


@pytest.mark.parametrize("heads", [None, 2])
def test_made_once_for_all_heads(heads, monkeypatch):
    """Rows of a mask that all heads share are not made again for each tile of heads."""
    model, inputs = model_of("Bert", "eager"), inputs_of("Bert", 128)
    made = []
    compute = row_masks.RowFunctionNode.compute
    monkeypatch.setattr(
        row_masks.RowFunctionNode,
        "compute",
        lambda self, tile, run: made.append(dict(tile)) or compute(self, tile, run),
    )
    with torch.no_grad(), attnpatch.patched(model, mode="always", rows=32, heads=heads):
        model(**inputs)
    # Two layers, four steps of rows, and two sequences where heads are cut.
    assert len(made) == 2 * 4 * (2 if heads else 1)


# ------------------------------------------------------------------------------ what models make of positions before it


def deberta(kind: str):
    import transformers

    sizes = {
        "vocab_size": 64, "hidden_size": 32, "intermediate_size": 16, "num_attention_heads": 4, "num_hidden_layers": 2,
        "max_position_embeddings": 512, "relative_attention": True, "max_relative_positions": 16,
        "pos_att_type": ["c2p", "p2c"], "position_biased_input": False,
    }  # fmt: skip
    torch.manual_seed(0)
    return getattr(transformers, f"{kind}Model")(getattr(transformers, f"{kind}Config")(**sizes)).eval()


def t5():
    import transformers

    sizes = {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 16, "num_layers": 2, "num_heads": 4}
    torch.manual_seed(0)
    return transformers.T5EncoderModel(transformers.T5Config(**sizes, attn_implementation="eager")).eval()


@pytest.mark.parametrize("kind", ["Deberta", "DebertaV2"])
def test_relative_positions_made_by_the_encoder(kind):
    """Distances and a padding of both sides are made once, before any attention, and read two ways by every layer."""
    model, inputs = deberta(kind), inputs_of("Bert", 307)
    with torch.no_grad():
        native = model(**inputs)[0]
        with attnpatch.patched(model, mode="always", rows=16):
            with Whole([307]) as whole:
                got = model(**inputs)[0]
            totals = attnpatch.report(model).totals
    assert torch.equal(got, native)
    assert totals["by_rows"] == 2 and not totals["materialised"]
    assert not whole.made


@pytest.mark.parametrize("kind", ["T5", "DebertaV2"])
def test_the_fused_kernel_is_given_rows_of_a_bias_of_positions(kind):
    """Under ``fuse`` positions are put off whatever memory there is."""
    model, inputs = t5() if kind == "T5" else deberta(kind), inputs_of("Bert", 307)
    if kind == "T5":
        # transformers makes one mask for all layers, which is there where there is memory.
        del inputs["attention_mask"]
    with torch.no_grad():
        native = model(**inputs)[0]
        with attnpatch.patched(model, fuse=True, min_tokens=64, rows=32):
            with Whole([307]) as whole:
                got = model(**inputs)[0]
            totals = attnpatch.report(model).totals
    torch.testing.assert_close(got, native, atol=1e-5, rtol=1e-5)
    assert totals["fused"] == 2 and not totals["by_rows"] and not totals["materialised"]
    assert not whole.made


def test_relative_positions_of_a_short_call_are_the_hosts():
    model, inputs = deberta("DebertaV2"), inputs_of("Bert", 307)
    with torch.no_grad(), attnpatch.patched(model, min_tokens=307), Whole([307]) as whole:
        model(**inputs)
    assert any("build_relative_position" in made for made in whole.made), whole.made


@pytest.mark.parametrize(
    ("given", "short"),
    [
        ({"input_ids": torch.zeros(2, 512)}, True),
        ({"input_ids": torch.zeros(1, 1025)}, False),
        ({"inputs_embeds": torch.zeros(1, 1, 4096)}, True),
        ({"inputs_embeds": torch.zeros(1, 1025, 8)}, False),
        ({"input_features": torch.zeros(1, 80, 3000)}, False),
        ({"input_ids": torch.zeros(1, 1), "attention_mask": torch.ones(1, 5000)}, True),
    ],
)
def test_a_step_of_a_generation_is_short(given, short):
    """Nothing is prepared for it, and nothing watches it."""
    assert host_masks.is_short(attnpatch.Policy(), (), given) is short
    assert not host_masks.is_short(attnpatch.Policy(mode="always"), (), given)


def test_only_the_shape_of_scores():
    """A mask is given the shape of scores: that needs none of them."""

    class Attention(nn.Module):
        def forward(self, x):
            scores = x @ x.transpose(-2, -1)
            mask = (torch.arange(x.shape[-2]) < 9).view(1, -1)
            scores.masked_fill_(mask.expand_as(scores), -1e9)
            bias = torch.linspace(0, 1, scores.numel()).view_as(scores)
            return torch.softmax(scores + bias.type_as(scores), -1) @ x

    model, x = Attention(), torch.randn(2, 3, 61, 8, generator=torch.Generator().manual_seed(0))
    native = model(x)
    with attnpatch.patched(model, mode="always", rows=8, heads=2):
        got = model(x)
        totals = attnpatch.report(model).totals
    assert torch.equal(got, native)
    assert totals["by_rows"] == 1 and not totals["materialised"], totals


class ByDistance(nn.Module):
    def forward(self, x, distances):
        return torch.softmax(x @ x.transpose(-2, -1) - 0.1 * distances.abs(), -1) @ x


class Distances(nn.Module):
    """Makes distances, overwrites what they are made of, and attends."""

    def __init__(self, whole):
        super().__init__()
        self.attention, self.whole = ByDistance(), whole
        self.seen: torch.Tensor | None = None

    def forward(self, x):
        positions = torch.arange(x.shape[-2])
        distances = positions[:, None] - positions.view(1, -1).repeat(len(positions), 1)
        torch.add(positions, 5, out=positions)
        self.seen = distances
        x = self.attention(x, distances)
        return self.attention(x, distances.unique(dim=0) if self.whole else distances.T)


@pytest.mark.parametrize("whole", [False, True])
def test_distances_made_before(whole):
    model, x = Distances(whole), torch.randn(2, 61, 8, generator=torch.Generator().manual_seed(0))
    native = model(x)
    with attnpatch.patched(model, sites=["attention"], mode="always", rows=8):
        got = model(x)
        totals = attnpatch.report(model).totals
    assert is_pending(model.seen) is not whole
    assert torch.equal(got, native) and totals["by_rows"] == 2
    assert totals["materialised"] == whole, totals


class Lengths(nn.Module):
    """Makes a padding of lengths, and embeds it."""

    def __init__(self):
        super().__init__()
        self.attention = ByDistance()

    def forward(self, x):
        padding = torch.arange(x.shape[-2])[None, :] < torch.tensor([50, 61])[:, None]
        self.seen = torch.arange(x.shape[-2]).repeat(len(x), 1), padding
        return self.attention(x * padding[..., None], torch.zeros(()))


def test_the_sequences_of_a_batch_are_no_rows():
    model, x = Lengths(), torch.randn(2, 61, 8, generator=torch.Generator().manual_seed(0))
    native = model(x)
    with attnpatch.patched(model, sites=["attention"], mode="always", rows=8):
        got = model(x)
        totals = attnpatch.report(model).totals
    assert not any(isinstance(seen, DeferredTensor) for seen in model.seen)
    assert torch.equal(got, native) and totals["by_rows"] == 1 and not totals["materialised"]


class AsksAttention(nn.Module):
    def forward(self, x):
        self.asked = torch.overrides.has_torch_function((x,))
        return x


def test_attention_that_stays_native_is_not_watched():
    """torch's own operators are called only where no mode is."""
    model, x = nn.Sequential(AsksAttention()), torch.zeros(1, 50, 8)
    # Its call is long by its numbers, its attention short by its rows.
    with attnpatch.patched(model, min_tokens=60):
        model(x)
    assert model[0].asked is False


class Encodes(nn.Module):
    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 2, 16, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=True)

    def forward(self, x, padding):
        return self.encoder(x, src_key_padding_mask=padding)


def test_an_encoder_of_torch_stays_on_its_way():
    """It packs what is not padding, unless a mode is there; then padding gets numbers instead of zeros."""
    model = Encodes().eval()
    x, padding = torch.randn(2, 40, 16), torch.zeros(2, 40, dtype=torch.bool)
    padding[1, 30:] = True
    with torch.no_grad():
        native = model(x, padding)
        with attnpatch.patched(model, min_tokens=10, min_free=0, headroom=1.0):
            got = model(x, padding)
    assert not native[1, 30:].any()
    assert torch.equal(got, native)
