"""A map is given where all that it rests on is known, and equals the dense one; anything else is left out and says why."""

import copy
import threading

import pytest
import torch
import torch.nn.functional as F
import transformers
import zoo
from torch import nn
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

import attnpatch
from attnpatch import Blocks, errors
from attnpatch.rows.provenance.open_keys import once_for, open_keys

WIDTH = 8


def reduced(probabilities, queries, keys):
    """``[heads, rows, keys]`` probabilities as a plain loop reduces them; ``queries``, ``keys``: positions of each block."""
    mean = probabilities.double().mean(0)
    return torch.tensor([[mean[q][:, k].sum(1).mean().item() for k in keys] for q in queries])


def cuts(count, width=WIDTH):
    return [list(range(start, min(start + width, count))) for start in range(0, count, width)]


def llama(implementation="sdpa", layers=2):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97, hidden_size=32, intermediate_size=64, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, attn_implementation=implementation,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    return model


def tokens(count, seed=1):
    return torch.randint(2, 97, (1, count), generator=torch.Generator().manual_seed(seed))


def dense(ids, layers=2):
    """``[layers, blocks, blocks]`` of a whole sequence, from the eager model's own probabilities."""
    with torch.no_grad():
        seen = llama("eager", layers)(ids, output_attentions=True, use_cache=False).attentions
    return torch.stack([reduced(p[0], cuts(ids.shape[1]), cuts(ids.shape[1])) for p in seen])


def same(found, wanted):
    torch.testing.assert_close(found.double(), wanted.double(), atol=1e-6, rtol=0)


@torch.no_grad()
def captured(model, run, blocks=None, **asked):
    with attnpatch.capture(model, blocks or Blocks.fixed(WIDTH), **asked) as maps:
        run()
    return maps


# ------------------------------------------------------------------------------------------------------ sequences


def assisted(model):
    return model.generate(tokens(40), max_new_tokens=20, do_sample=False, assistant_model=llama(layers=1))


def looked_up(model):
    prompt = torch.cat([tokens(20)] * 3, 1)
    return model.generate(prompt, max_new_tokens=20, do_sample=False, prompt_lookup_num_tokens=4)


def asked_again(count):
    def run(model):
        cache, first, more = DynamicCache(config=model.config), tokens(32), tokens(count, 2)
        model(first, past_key_values=cache)
        cache.crop(-12)
        model(more, past_key_values=cache)
        return torch.cat([first[:, :20], more, more[:, :1]], 1)

    return run


def cut_and_read(model):
    """Cut after the last call: the map is of what is left once it goes on."""
    cache, first = DynamicCache(config=model.config), tokens(30)
    model(first, past_key_values=cache)
    for token in tokens(4, 3)[0]:
        model(token[None, None], past_key_values=cache)
    cache.crop(-3)
    last = tokens(1, 4)
    model(last, past_key_values=cache)
    return torch.cat([first, tokens(4, 3)[:, :1], last, last], 1)


def by_turns(model):
    """Another prompt in between, whose cache is its own."""
    first = model(tokens(24), use_cache=True)
    model(tokens(24, 5), use_cache=True)
    more = tokens(8, 2)
    model(more, past_key_values=first.past_key_values)
    return torch.cat([tokens(24), more, more[:, :1]], 1)


def copied(model):
    """A prefix that was computed once, and two questions after it."""
    prefix = model(tokens(20), use_cache=True).past_key_values
    for seed in (2, 3):
        model(tokens(9, seed), past_key_values=copy.deepcopy(prefix))
    return torch.cat([tokens(20), tokens(9, 3), tokens(1)], 1)


def in_steps(model):
    """A memory of fixed size with places that hold no token yet."""
    return model.generate(tokens(20), max_new_tokens=6, do_sample=False, cache_implementation="static")


@pytest.mark.parametrize(
    "run", [assisted, looked_up, asked_again(24), asked_again(4), cut_and_read, by_turns, copied, in_steps]
)
def test_rows_follow_the_cache(run):
    model = llama()
    ids = []
    maps = captured(model, lambda: ids.append(run(model)))
    found = maps.sequences if run is by_turns else [{"": maps.block_map}]
    if run is by_turns:
        assert [next(iter(one.values())).mass.shape[-1] for one in found] == [4, 3]
    same(next(iter(found[0].values())).mass, dense(ids[0][:, :-1]))
    assert not maps.left_out


def test_beams_are_refused_in_one_line():
    model = llama()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "q_proj" in name or "k_proj" in name:
                weight.mul_(8)
    with pytest.warns(errors.AttnpatchWarning, match="beam search"):
        maps = captured(model, lambda: model.generate(tokens(20), max_new_tokens=12, num_beams=4))
    with pytest.raises(errors.CaptureError, match="beam search"):
        _ = maps.block_map


class TwoTexts(nn.Module):
    """A bi-encoder: one encoder, called twice."""

    def __init__(self):
        super().__init__()
        self.encoder = bert()

    def forward(self, first, second):
        return [self.encoder(ids).last_hidden_state[:, 0] for ids in (first, second)]


def bert(**more):
    torch.manual_seed(0)
    small = {
        "vocab_size": 97,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 64,
    }
    config = transformers.BertConfig(**small, attn_implementation="eager", **more)
    return transformers.BertModel(config, add_pooling_layer=False).eval()


def test_one_encoder_called_twice_is_two_sequences():
    model, first, second = TwoTexts(), tokens(24), tokens(16, 2)
    maps = captured(model, lambda: model(first, second))
    assert len(maps.sequences) == 2
    for one, ids in zip(maps.sequences, (first, second), strict=True):
        (found,) = one.values()
        with torch.no_grad():
            seen = model.encoder(ids, output_attentions=True).attentions
        same(found.mass, torch.stack([reduced(p[0], cuts(ids.shape[1]), cuts(ids.shape[1])) for p in seen]))


# -------------------------------------------------------------------------------------------------------- threads


def test_another_request_inside_my_call_is_not_mine():
    model, mine, failed = llama(), tokens(32), []

    def request():
        try:
            with torch.no_grad():
                model(tokens(24, 7))
        except Exception as error:
            failed.append(error)

    def between(*_):
        if threading.current_thread() is threading.main_thread():
            thread = threading.Thread(target=request)
            thread.start()
            thread.join()

    hook = model.model.layers[1].register_forward_pre_hook(between)
    maps = captured(model, lambda: model(mine))
    hook.remove()
    assert not failed
    assert len(maps.sequences) == 1
    same(maps.block_map.mass, dense(mine))


def test_a_thread_that_my_thread_starts_between_calls_is_mine():
    model, out = llama(), []

    def run():
        def generate():
            out.append(model.generate(tokens(20), max_new_tokens=6, do_sample=False))

        thread = threading.Thread(target=generate)
        thread.start()
        thread.join()

    maps = captured(model, run)
    same(maps.block_map.mass, dense(out[0][:, :-1]))
    assert threading.Thread.start.__module__ == "threading"


def test_every_request_of_a_server_has_a_capture_of_its_own():
    model, barrier, found = llama(), threading.Barrier(2), {}

    def request(seed):
        with torch.no_grad(), attnpatch.capture(model, Blocks.fixed(WIDTH)) as maps:
            barrier.wait(20)
            model(tokens(16 + 8 * seed, seed))
            barrier.wait(20)
        found[seed] = maps

    threads = [threading.Thread(target=request, args=(seed,)) for seed in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for seed in (1, 2):
        assert len(found[seed].sequences) == 1
        same(found[seed].block_map.mass, dense(tokens(16 + 8 * seed, seed)))
    assert "_attnpatch" not in vars(model.model.layers[0].self_attn)


# -------------------------------------------------------------------------------------------------------- padding


class Holder(nn.Module):
    def __init__(self, hand):
        super().__init__()
        self.bert, self.hand = bert(), hand

    def forward(self, *given, **named):
        return self.hand(self.bert, *given, **named)


PADDED = tokens(24).repeat(2, 1)
REAL = torch.ones(2, 24, dtype=torch.long)
REAL[0, 18:] = 0


@pytest.mark.parametrize(
    ("hand", "given"),
    [
        (lambda bert, f: bert(f["input_ids"], attention_mask=f["attention_mask"]),
         [{"input_ids": PADDED * REAL, "attention_mask": REAL}]),
        (lambda bert, x, real: bert(x, attention_mask=real), [PADDED * REAL, REAL]),
        (lambda bert, x: bert(x, attention_mask=(x != 0).long()), [PADDED * REAL]),
    ],
    ids=["a dict", "other names", "a mask made inside"],
)  # fmt: skip
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_padding_is_what_attention_is_closed_to(hand, given, implementation):
    model = Holder(hand)
    with torch.no_grad():
        seen = model.bert(PADDED * REAL, attention_mask=REAL, output_attentions=True).attentions
    model.bert.set_attn_implementation(implementation)
    found = captured(model, lambda: model(*given)).block_map
    same(found.mass[0], torch.stack([reduced(p[0], cuts(18), cuts(18)) for p in seen]))
    same(found.mass[1], torch.stack([reduced(p[1], cuts(24), cuts(24)) for p in seen]))


def test_a_mask_that_contradicts_the_models_leaves_its_site_out_only():
    """One layer hides what the model calls a token."""
    model = bert()
    layer = model.encoder.layer[1].attention.self

    def hide(module, given, named):
        hidden = torch.zeros(1, 1, 24, 24)
        hidden[..., 20:] = torch.finfo(torch.float32).min
        return (given[0], hidden, *given[2:]), {k: v for k, v in named.items() if k != "attention_mask"}

    layer.register_forward_pre_hook(hide, with_kwargs=True)
    ids = tokens(24)
    with pytest.warns(errors.AttnpatchWarning, match="contradict"):
        maps = captured(model, lambda: model(ids, attention_mask=torch.ones_like(ids)))
    assert maps.block_map.layers == (0,)
    assert list(maps.left_out) == ["encoder.layer.1.attention.self"]
    assert "encoder.layer.1" in repr(maps)


# ---------------------------------------------------------------------------------------------- queries and keys


def attend(q, k):
    return (q @ k.transpose(-1, -2)).softmax(-1) @ k


def probabilities(q, k):
    return (q @ k.transpose(-1, -2)).softmax(-1)


class Attention(nn.Module):
    """Attention of one's own, computed by a function."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *given):
        return self.function(*given)


class Whole(nn.Module):
    """A model whose only site calls a function."""

    def __init__(self, function):
        super().__init__()
        self.attention = Attention(function)

    def forward(self, *given):
        return self.attention(*given)


def floats(*shape):
    return zoo.floats(*shape)


def grid(x):
    b, _, h, w = x.shape
    p = torch.einsum("bchw,bcij->bhwij", x, x).reshape(b, h, w, h * w).softmax(-1).reshape(b, h, w, h, w)
    return torch.einsum("bhwij,bcij->bchw", p, x)


def heads_after_rows(q, k):
    p = torch.einsum("bshc,btc->bsht", q.unflatten(-1, (4, 8)), k).softmax(-1)
    return torch.einsum("bsht,btc->bshc", p, k).flatten(2)


def heads_before_batch(x):
    q = x.unflatten(-1, (4, 8)).permute(2, 0, 1, 3).flatten(0, 1)
    return attend(q, q)


def with_a_key_of_its_own(x):
    keys = torch.cat([x, torch.zeros(x.shape[0], 1, x.shape[2])], 1)
    return attend(x, keys)


def tokens_first(q, k):
    return attend(q.transpose(0, 1), k.transpose(0, 1)).transpose(0, 1)


def feature_map(x, image):
    return attend(x, image.flatten(2).transpose(1, 2))


def of_tokens_first(q, k):
    return probabilities(q.transpose(0, 1), k.transpose(0, 1))


def turned(x):
    """Some of the channels are written over, as rotary positions do."""
    q = x.clone()
    q[..., :8] = 2 * q[..., :8]
    q[:, 1:] = 3 * q[:, 1:]
    return attend(q, F.pad(x, (0, 4))[..., :16])


def turned_probabilities(x):
    scale = torch.ones(24, 16)
    scale[:, :8] *= 2
    scale[1:] *= 3
    return probabilities(x * scale, x)


def one_key_head(x):
    k = x[:, None, :, :8].expand(-1, 4, -1, -1)
    return attend(x.unflatten(-1, (4, 8)).transpose(1, 2), k).transpose(1, 2).flatten(2)


def shared_key_heads(x):
    heads = x.unflatten(-1, (4, 8)).transpose(1, 2)
    return attend(heads, heads[:, :2].repeat_interleave(2, 1)).transpose(1, 2).flatten(2)


def shared_probabilities(x):
    heads = x.unflatten(-1, (4, 8)).transpose(1, 2)
    return probabilities(heads, torch.stack([heads[:, i // 2] for i in range(4)], 1))


def largest(x):
    """Only some keys stay open, chosen by their scores: the others are no padding."""
    scores = x @ x.mT
    values, index = scores.topk(6, -1)
    return torch.full_like(scores, -torch.inf).scatter_(-1, index, values).softmax(-1) @ x


def largest_probabilities(x):
    scores = x @ x.mT
    least = scores.sort(-1, descending=True).values[..., 5:6]
    return scores.where(scores >= least, -torch.inf).softmax(-1)


EARLIER = torch.ones(24, 24, dtype=torch.bool).tril()


def positive(x):
    """A causal mask, and of the rest only scores above 0: at scores of 0 that would close every key."""
    scores = (x @ x.mT).masked_fill(~EARLIER, -1e9)
    return scores.masked_fill(scores <= 0, -1e9).softmax(-1) @ x


def positive_probabilities(x):
    scores = x @ x.mT
    return scores.where(EARLIER & (scores > 0), -torch.inf).softmax(-1)


LAYER = floats(16, 16)


def written_by_halves(x):
    """As positions are put into queries: every other channel of a tensor that holds nothing yet."""
    given, made = x @ LAYER, torch.empty_like(x)
    made[..., 0::2], made[..., 1::2] = given[..., 1::2], given[..., 0::2]
    return attend(made, x)


def repeated_heads(x):
    heads = x.unflatten(-1, (4, 8)).transpose(1, 2)
    keys = heads[:, :2].unsqueeze(2).repeat(1, 1, 2, 1, 1).flatten(1, 2)
    return attend(heads, keys).transpose(1, 2).flatten(2)


def repeated_probabilities(x):
    heads = x.unflatten(-1, (4, 8)).transpose(1, 2)
    return probabilities(heads, heads[:, [0, 0, 1, 1]])


def joined(x, y):
    both = torch.cat([y, x], 1)
    return attend(both, both)


MAPPED = {
    "written by halves": (written_by_halves, [floats(1, 24, 16)],
        lambda x: probabilities((x @ LAYER).unflatten(-1, (8, 2)).flip(-1).flatten(2), x)),
    "key heads that are repeated": (repeated_heads, [floats(2, 24, 32)], repeated_probabilities),
    "one key head by an index": (
        lambda x: attend(x.unflatten(-1, (4, 8)).transpose(1, 2), x.unflatten(-1, (4, 8))[..., [1], :].transpose(1, 2)),
        [floats(2, 24, 32)],
        lambda x: probabilities(x.unflatten(-1, (4, 8)).transpose(1, 2), x[:, None, :, 8:16])),
    "queries of two inputs, of two sequences": (joined, [floats(2, 8, 16), floats(2, 24, 16)],
        lambda x, y: probabilities(torch.cat([y, x], 1), torch.cat([y, x], 1))),
    "positive scores": (positive, [floats(1, 24, 16)], positive_probabilities),
    "key heads that are shared": (shared_key_heads, [floats(2, 24, 32)], shared_probabilities),
    "the largest scores": (largest, [floats(1, 24, 16)], largest_probabilities),
    "written over in place": (turned, [floats(1, 24, 16)], turned_probabilities),
    "one key head for all": (one_key_head, [floats(2, 24, 32)],
        lambda x: probabilities(x.unflatten(-1, (4, 8)).transpose(1, 2), x[:, None, :, :8])),
    "rows in two dimensions": (grid, [floats(1, 16, 4, 8)],
        lambda x: probabilities(x.flatten(2).mT, x.flatten(2).mT)),
    "heads after rows": (heads_after_rows, [floats(1, 24, 32), floats(1, 24, 8)],
        lambda q, k: probabilities(q.unflatten(-1, (4, 8)).transpose(1, 2)[0], k)[None].flatten(0, 1)[None]),
    "heads before the batch": (heads_before_batch, [floats(2, 24, 32)],
        lambda x: probabilities(*[x.unflatten(-1, (4, 8)).transpose(1, 2)] * 2)),
    "functions with nothing to do": (
        lambda x: attend(x.contiguous(), F.dropout(x.to(torch.float32), training=False)), [floats(1, 24, 16)],
        lambda x: probabilities(x, x)),
    "a key of its own": (with_a_key_of_its_own, [floats(1, 24, 16)],
        lambda x: probabilities(x, torch.cat([x, torch.zeros(1, 1, 16)], 1))[..., :-1]),
    "tokens first": (tokens_first, [floats(24, 2, 16), floats(40, 2, 16)], of_tokens_first),
    "keys of a feature map": (feature_map, [floats(1, 24, 16), floats(1, 16, 5, 8)],
        lambda x, image: probabilities(x, image.flatten(2).mT)),
}  # fmt: skip


@pytest.mark.parametrize("name", MAPPED)
def test_what_is_followed_is_mapped(name):
    function, given, oracle = MAPPED[name]
    net = Whole(function)
    with attnpatch.patched(net, sites=["attention"], mode="never"):
        maps = captured(net, lambda: net(*given))
    found = maps.block_map.mass[..., 0, :, :]
    wanted = oracle(*given)
    wanted = wanted if wanted.dim() == 4 else wanted[:, None]
    wanted = torch.stack([reduced(p, cuts(p.shape[1]), cuts(p.shape[2])) for p in wanted])
    same(found.reshape(wanted.shape), wanted)


def windows(x):
    return attend(x.view(4, 8, 16), x.view(4, 8, 16)).view(1, 32, 16)


def chunks(x):
    return torch.cat([attend(q, x) for q in x.split(8, 1)], 1)


def slots(x):
    p = (x @ x.mT).softmax(1)
    return (p / p.sum(-1, keepdim=True)) @ x


def sorted_rows(x):
    order = x.sum(-1).argsort(1)
    picked = torch.gather(x, 1, order[..., None].expand_as(x))
    return attend(picked, picked)


def written(write):
    """Attention to a copy of the tokens that something was written into."""

    def function(x):
        keys = x.clone()
        write(keys, x)
        return attend(x, keys)

    return function


def shifted(keys, x):
    keys[:, 1:] = x[:, :-1]


def shifted_by_a_view(keys, x):
    keys[:, 1:].copy_(x[:, :-1])


def in_memory_of_the_tokens(function, *more):
    """Attention to what a function of torch writes into a copy of the tokens (``out=``)."""

    def write(x):
        keys = x.clone()
        function(x, *more, out=keys)
        return attend(x, keys)

    return write


def in_place(x):
    return attend(x, x.clone().cumsum_(1))


def turned_in_place(x):
    keys = x[0].clone()
    keys.t_()
    return attend(x, keys[None])


def other_values(x):
    keys = x.clone()
    keys.data = x.flip(1)
    return attend(x, keys)


def flipped(keys, x):
    keys[:] = x.flip(1)


def by_numpy(keys, x):
    keys[:] = torch.from_numpy(x.numpy()[:, ::-1].copy())


def half_written(x):
    keys = torch.zeros_like(x)
    keys[:, :16] = x[:, 16:]
    return attend(x, keys)


ORDER = torch.randperm(32, generator=torch.Generator().manual_seed(0))


def in_another_order(keys, x):
    keys[:, ORDER] = x


KEPT = floats(1, 8, 16)
LEARNED, MIXING = floats(32, 16), floats(32, 32)
REFUSED = {
    "windows": (windows, [floats(1, 32, 16)], "windows"),
    "rolled": (lambda x: attend(x.roll(4, 1), x.roll(4, 1)), [floats(1, 32, 16)], "moved"),
    "sorted": (sorted_rows, [floats(1, 32, 16)], "sorted"),
    "chunks of queries": (chunks, [floats(1, 32, 16)], "chunks"),
    "channels": (lambda x: attend(x.mT, x.mT).mT, [floats(1, 32, 16)], "channels"),
    "rows of an image": (lambda x: attend(x, x), [floats(1, 4, 8, 16)], "rows of an image"),
    "pooled keys": (lambda x: attend(x, x[:, ::4]), [floats(1, 32, 16)], "8 of 32"),
    "averaged keys": (lambda x: attend(x, x.view(1, 8, 4, 16).mean(2)), [floats(1, 32, 16)], None),
    "keys from two inputs": (lambda x, y: attend(y, torch.cat([x, y], 1)), [floats(1, 32, 16), floats(1, 8, 16)], "several"),
    "rows that sum to 2": (lambda x: (2 * probabilities(x, x)) @ x, [floats(1, 32, 16)], "sum to 2"),
    "picked by an index": (lambda x: attend(x, x[:, ORDER]), [floats(1, 32, 16)], "computed inside"),
    "written in another order": (written(in_another_order), [floats(1, 32, 16)], "computed inside"),
    "copied in another order": (
        written(lambda keys, x: keys.index_copy_(1, ORDER, x)), [floats(1, 32, 16)], "computed inside"),
    "shifted by a write": (written(shifted), [floats(1, 32, 16)], "computed inside"),
    "shifted by a write to a view": (written(shifted_by_a_view), [floats(1, 32, 16)], "computed inside"),
    "written in reverse": (written(flipped), [floats(1, 32, 16)], "computed inside"),
    "written by numpy": (written(by_numpy), [floats(1, 32, 16)], "computed inside"),
    "other values": (other_values, [floats(1, 32, 16)], "computed inside"),
    "picked into memory of the tokens": (
        in_memory_of_the_tokens(torch.index_select, 1, ORDER), [floats(1, 32, 16)], "computed inside"),
    "summed up in place": (in_place, [floats(1, 32, 16)], "computed inside"),
    "channels and tokens turned in place": (turned_in_place, [floats(1, 16, 16)], "computed inside"),
    "a part of tokens that lie twice": (
        lambda x: attend(x, x.expand(2, 32, 16).reshape(1, 64, 16)[:, 10:42]), [floats(1, 32, 16)], "computed inside"),
    "shifted by padding": (lambda x: attend(x, F.pad(x, (0, 0, 1, -1))), [floats(1, 32, 16)], "computed inside"),
    "some twice": (
        lambda x: attend(x, x.repeat_interleave(torch.tensor([2, 0] * 16), 1)), [floats(1, 32, 16)], "computed inside"),
    "tokens mixed": (lambda x: attend(x, MIXING @ x), [floats(1, 32, 16)], "computed inside"),
    "learned, in the shape of the input": (
        lambda x: attend(LEARNED.expand_as(x), x), [floats(1, 32, 16)], "attnpatch cannot follow"),
    "kept, in the shape of the input": (
        lambda x: attend(x, LEARNED[None]), [floats(1, 32, 16)], "attnpatch cannot follow"),
    "by numpy": (
        lambda x: attend(x, torch.from_numpy(x.numpy()[:, ::-1].copy())), [floats(1, 32, 16)], "attnpatch cannot follow"),
    "keys of the first sequence": (lambda x: attend(x, x[:1].expand(2, -1, -1)), [floats(2, 32, 16)], "other sequences"),
    "keys of the next sequence": (lambda x: attend(x, x.flip(0)), [floats(2, 32, 16)], "other sequences"),
    "keys of picked sequences": (lambda x: attend(x, x[[0, 0]]), [floats(2, 32, 16)], "other sequences"),
    "keys of the first sequence, fused": (
        lambda x: F.scaled_dot_product_attention(x, x[:1].expand(2, -1, -1), x), [floats(2, 32, 16)], "other sequences"),
    "in another order, with positions": (
        lambda x, c: attend(x * c, x[:, ORDER] * c), [floats(1, 32, 16), floats(1, 32, 16)], "computed inside"),
    "projected and moved, with positions": (
        lambda x, c: attend(x * c, (x @ LAYER).roll(4, 1) * c), [floats(1, 32, 16), floats(1, 32, 16)], "computed inside"),
    "turned both ways": (lambda x: attend(x, x.flip(1, 2)), [floats(1, 32, 16)], "computed inside"),
    "rolled as one row": (lambda x: attend(x, x.roll(16)), [floats(1, 32, 16)], "computed inside"),
    "half of it written": (half_written, [floats(1, 32, 16)], "16 of 32"),
    "pooled queries": (lambda x: attend(x.mean(1, keepdim=True), x), [floats(1, 32, 16)], None),
    "keys that it keeps": (lambda x: attend(x, torch.cat([KEPT, x], 1)), [floats(1, 32, 16)], "keeps"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_known_is_left_out_and_says_why(name):
    function, given, words = REFUSED[name]
    net = Whole(function)
    with torch.no_grad():
        native = net(*given)
    with attnpatch.patched(net, sites=["attention"], mode="never"), pytest.warns(errors.AttnpatchWarning):
        results = []
        maps = captured(net, lambda: results.append(net(*given)))
    assert torch.equal(results[0], native)
    with pytest.raises(errors.CaptureError, match=words):
        _ = maps.block_map


def test_a_module_called_piece_by_piece_is_left_out():
    class Pieces(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = Attention(lambda x: attend(x, x))

        def forward(self, x):
            return torch.cat([self.attention(part) for part in x.split(8, 1)], 1)

    net = Pieces()
    with (
        attnpatch.patched(net, sites=["attention"], mode="never"),
        pytest.warns(errors.AttnpatchWarning, match="part of the sequence"),
    ):
        maps = captured(net, lambda: net(floats(2, 32, 16)))
    assert not maps.sequences


class ProjectionOfAttention(nn.Module):
    """No attention, whatever it is called."""

    def __init__(self):
        super().__init__()
        self.to_k = nn.Linear(16, 16)

    def forward(self, x):
        return self.to_k(x)


class SelfAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.project = ProjectionOfAttention()

    def forward(self, x):
        return attend(x, self.project(x))


def test_a_part_that_is_called_attention_hides_no_attention_around_it():
    model, x = nn.Sequential(SelfAttention()), floats(1, 24, 16)
    maps = captured(model, lambda: model(x))
    assert not maps.left_out
    with torch.no_grad():
        same(maps["*"].mass[0], reduced(probabilities(x, model[0].project(x)), cuts(24), cuts(24)))


class TwoAttentions(nn.Module):
    def forward(self, x, y):
        return attend(x, x) + attend(x, y)


def test_two_attentions_of_one_module_are_two_maps():
    model = nn.ModuleDict({"attention": TwoAttentions()})
    model.forward = lambda x, y: model["attention"](x, y)
    x, y = floats(1, 24, 16), floats(1, 40, 16)
    with attnpatch.patched(model, sites=["attention"], mode="never"):
        maps = captured(model, lambda: model(x, y))
    assert maps.keys() == ["attention", "attention:1"]
    same(maps["attention"].mass[0], reduced(probabilities(x, x), cuts(24), cuts(24)))
    same(maps["attention:1"].mass[0], reduced(probabilities(x, y), cuts(24), cuts(40)))


def test_mixed_weights_are_mapped_as_what_they_are_and_say_so():
    def differential(x):
        return (probabilities(x, x) - 0.3 * probabilities(x, 0.5 * x)) @ x

    net, x = Whole(differential), floats(1, 24, 16)
    with attnpatch.patched(net, sites=["attention"], mode="never"):
        found = captured(net, lambda: net(x)).block_map
    same(found.mass[0], reduced(probabilities(x, x) - 0.3 * probabilities(x, 0.5 * x), cuts(24), cuts(24)))
    assert "mixed" in found.metadata["notes"][0]


def test_heads_that_are_mixed_are_mapped_and_say_so():
    mixing = floats(4, 4)

    def talking(x):
        q = x.unflatten(-1, (4, 8)).transpose(1, 2)
        return torch.einsum("gh,bhij->bgij", mixing, probabilities(q, q)).matmul(q).transpose(1, 2).flatten(2)

    net, x = Whole(talking), floats(1, 24, 32)
    with attnpatch.patched(net, sites=["attention"], mode="never"):
        found = captured(net, lambda: net(x)).block_map
    q = x.unflatten(-1, (4, 8)).transpose(1, 2)[0]
    mixed = torch.stack([sum(mixing[g, h] * probabilities(q[h], q[h]) for h in range(4)) for g in range(4)])
    same(found.mass[0], reduced(mixed, cuts(24), cuts(24)))
    assert "mixed" in found.metadata["notes"][0]


# Of six tokens who looks at whom, which are padding, and what is found.
CAUSAL = torch.ones(6, 6, dtype=torch.bool).tril()
EVERY = torch.ones(6, 6, dtype=torch.bool)


def padded(mask, gone, how="closed"):
    """The mask with padding, whose rows a host leaves closed or opens to everything."""
    mask = mask.clone()
    mask[:, gone] = False
    if how != "as others":
        mask[gone] = how == "open"
    return mask


MASKS = {
    "causal": (CAUSAL, []),
    "everything": (EVERY, []),
    "padding in front, closed": (padded(CAUSAL, [0, 1]), [0, 1]),
    "padding in front, opened": (padded(CAUSAL, [0, 1], "open"), [0, 1]),
    "padding at the end": (padded(EVERY, [4, 5], "as others"), [4, 5]),
    "padding at the end, causal": (padded(CAUSAL, [4, 5], "as others"), [4, 5]),
    "a hole": (padded(EVERY, [2], "as others"), [2]),
    "a window": (CAUSAL & ~CAUSAL.tril(-2), []),
    "nothing but padding": (padded(EVERY, [0, 1, 2, 3, 4, 5]), [0, 1, 2, 3, 4, 5]),
}


@pytest.mark.parametrize("kind", ["boolean", "added"])
@pytest.mark.parametrize("name", MASKS)
def test_padding_is_read_from_a_mask(name, kind):
    mask, gone = MASKS[name]
    if kind == "added":
        mask = torch.zeros(6, 6).masked_fill(~mask, torch.finfo(torch.float32).min)
    (found,) = open_keys(lambda _, low, high: mask[low:high], 1, 6, 6, 0).tolist()
    assert found == [i not in gone for i in range(6)]


def test_tokens_that_do_not_look_at_themselves_say_nothing_of_padding():
    hidden = CAUSAL.tril(-1)
    assert not open_keys(lambda _, low, high: hidden[low:high], 1, 6, 6, 0).numel()


def test_a_mask_is_looked_at_once_for_all_layers():
    """And once more after it was written to."""
    mask, looks = torch.ones(4, 4), []

    def look():
        looks.append(mask.clone())
        return looks[-1]

    for _ in range(3):
        once_for(mask, "key", look)
    assert len(looks) == 1
    mask[0] = 0
    assert once_for(mask, "key", look) is looks[1]
