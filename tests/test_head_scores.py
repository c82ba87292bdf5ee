"""Scores of heads: against eager weights summed by plain loops, and on attention whose scores are known."""

import pytest
import torch
import zoo

import attnpatch
from attnpatch import Probes
from attnpatch.capturing.probes import Probe
from attnpatch.errors import CaptureError

LOCAL = 8


def mean(values):
    return sum(values) / len(values)


def scores_of(weights, probe):
    """By name, the score of one head in one sequence, from its weights ``[rows][keys]``."""
    ids, found = probe.ids, {}
    count = len(ids)
    found["previous"] = mean([weights[row][row - 1] for row in range(1, count)])
    found["sink"] = mean([weights[row][0] for row in range(1, count)])
    far = range(LOCAL, count)
    found["local"] = mean([sum(weights[row][row - LOCAL + 1 : row + 1]) for row in far])
    if probe.induction:
        found["induction"] = mean([weights[row][key] for row, key in probe.induction])
    if probe.answer:
        hits = []
        for token in probe.answer:
            row = weights[token - 1]
            strongest = max(range(count), key=lambda key: row[key])
            inside = probe.needle[0] <= strongest < probe.needle[1]
            hits.append(float(inside and ids[strongest] == ids[token]))
        found["retrieval"] = mean(hits)
    return found


def check(scores, attentions, probes, layers):
    """``attentions``: for each probe, of each layer ``[heads, rows, keys]``."""
    for i, layer in enumerate(layers):
        assert scores.layers[i] == layer
        for head in range(attentions[0][i].shape[0]):
            each = [
                scores_of(own[i][head].double().tolist(), probe)
                for own, probe in zip(attentions, probes, strict=True)
            ]
            for name in scores:
                right = mean([found[name] for found in each if name in found])
                assert scores[name][i, head].item() == pytest.approx(right, abs=1e-5), (name, layer, head)


def needle_probe():
    """The answer repeats two of the fact's tokens, and one that is nowhere in it."""
    ids = zoo.tokens(60)[0].tolist()
    ids[10:14] = [90, 91, 92, 93]
    ids[56:59] = [91, 92, 94]
    return Probe(tuple(ids), (), (10, 14), (56, 57))


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "mistral"])
def test_scores_against_eager_weights(name, implementation):
    case = zoo.BY_NAME[name]
    model, dense = case.build(implementation), case.build("eager")
    probes = [
        *Probes.repeated(range(5, 90), count=2, length=23),
        needle_probe(),
        *Probes([list(range(5, 40))]),
    ]
    scores = attnpatch.heads(model, probes)
    with torch.no_grad():
        attentions = [
            [own[0] for own in dense(torch.tensor([probe.ids]), output_attentions=True).attentions]
            for probe in probes
        ]
    assert set(scores) == {"retrieval", "induction", "previous", "sink", "local"}
    check(scores, attentions, probes, [0, 1])
    assert not hasattr(model, "_attnpatch") and not model.training


def test_scores_by_rows_of_a_patched_model():
    """Rows and heads come in several tiles."""
    case = zoo.BY_NAME["llama"]
    model, (probe,) = case.build("eager"), Probes.repeated(range(5, 90), count=1, length=60)
    with torch.no_grad():
        attentions = model(torch.tensor([probe.ids]), output_attentions=True).attentions
    with attnpatch.patched(model, mode="always", rows=16):
        scores = attnpatch.heads(model, [probe])
        assert attnpatch.report(model).totals["by_rows"] == 2
    check(scores, [[own[0] for own in attentions]], [probe], [0, 1])


class Known(torch.nn.Module):
    """One layer of attention whose heads each do one thing, with scores so large that each row has one key.

    Head 0 attends to the token before, head 1 to the first token, head 2 to the token after the last earlier occurrence
    of the row's token (to itself if there is none), head 3 to the last earlier occurrence of the token that comes next
    (it is told), so it copies.
    """

    def __init__(self, is_causal=True):
        super().__init__()
        self.attention = KnownAttention(is_causal)

    def keys_of(self, ids):
        n = len(ids)
        back, sink = [max(0, i - 1) for i in range(n)], [0] * n
        again, copy = list(range(n)), list(range(n))
        for i in range(n):
            for j in range(i):
                if ids[j] == ids[i]:
                    again[i] = j + 1
                if i + 1 < n and ids[j] == ids[i + 1]:
                    copy[i] = j
        return torch.tensor([back, sink, again, copy])

    def forward(self, ids):
        n = ids.shape[1]
        wanted = torch.nn.functional.one_hot(self.keys_of(ids[0].tolist()), n).float()
        own = torch.eye(n)
        return self.attention(torch.cat([*wanted, own], -1)[None])


class KnownAttention(torch.nn.Module):
    """Its tokens hold the place of the key that each head is to attend to, and their own place."""

    def __init__(self, is_causal):
        super().__init__()
        self.is_causal = is_causal

    def forward(self, x):
        n = x.shape[1]
        query = 1000.0 * x[..., : 4 * n].unflatten(-1, (4, n)).transpose(1, 2)
        key = x[..., None, 4 * n :].transpose(1, 2).expand(-1, 4, -1, -1)
        return torch.nn.functional.scaled_dot_product_attention(query, key, key, is_causal=self.is_causal)


def test_heads_that_do_one_thing():
    ids = [7, *range(20, 60), 3, *range(20, 24), 9]  # the answer, 20 to 23, is copied from the fact, 15 to 39
    needle = Probe(tuple(ids), (), (0, 20), (42, 43, 44, 45))
    scores = attnpatch.heads(Known().eval(), [*Probes.repeated(range(100), count=2, length=30), needle])
    expected = {"previous": 0, "sink": 1, "induction": 2, "retrieval": 3}
    for name, head in expected.items():
        assert scores.top(name, 1)[0][:2] == (0, head)
        assert scores[name][0, head].item() == pytest.approx(1.0)
    # Head 1 attends to a token of the fact, but to another one.
    assert scores["retrieval"][0, :2].tolist() == [0, 0]
    assert scores["local"][0, 0].item() == pytest.approx(1.0)
    # In the middle of the answer the induction head copies, too; before its first token it cannot know.
    assert scores["retrieval"][0, 2].item() == pytest.approx(0.75)
    assert "retrieval" in repr(scores) and "0.3 1.00" in repr(scores)


def test_strongest_key_outside_the_fact_is_no_retrieval():
    """The same tokens stand in a second place, later than the fact: the head copies from there."""
    ids = [7, *range(20, 40), 5, *range(20, 24), 3, *range(20, 24), 9]
    needle = Probe(tuple(ids), (), (1, 20), (27, 28, 29, 30))
    scores = attnpatch.heads(Known().eval(), [needle])
    assert scores["retrieval"][0].tolist() == [0, 0, 0, 0]
    with pytest.raises(CaptureError, match=r"add Probes\.repeated"):
        scores["induction"]


# ------------------------------------------------------------------------------------------------------ what is refused


def test_attention_to_later_tokens_is_refused():
    with pytest.raises(CaptureError, match="attends to later tokens"):
        attnpatch.heads(LooksAhead().eval(), [list(range(10, 50))])


class LooksAhead(Known):
    def __init__(self):
        super().__init__(is_causal=False)

    def keys_of(self, ids):
        return torch.tensor([[len(ids) - 1] * len(ids)] * 4)


def test_a_layer_that_runs_twice_is_refused():
    class Twice(Known):
        def forward(self, ids):
            super().forward(ids)
            return super().forward(ids)

    with pytest.raises(CaptureError, match="several times"):
        attnpatch.heads(Twice().eval(), [list(range(10, 50))])


def test_layers_and_training_mode():
    model = zoo.BY_NAME["llama"].build("sdpa")
    scores = attnpatch.heads(model, [list(range(10, 40))], layers=[1])
    assert scores.layers == [1] and scores["sink"].shape == (1, 4)
    with pytest.raises(CaptureError, match="training mode"):
        attnpatch.heads(model.train(), [[5, 6, 7]])


def test_options_are_checked():
    model = zoo.BY_NAME["llama"].build("sdpa")
    with pytest.raises(CaptureError, match="at least one sequence"):
        attnpatch.heads(model, [])
    for probe in ([5], ["a", "b"], torch.zeros(2, 3)):
        with pytest.raises(CaptureError, match="at least two token ids"):
            attnpatch.heads(model, [probe])
    with pytest.raises(CaptureError, match="1 or more"):
        attnpatch.heads(model, [[5, 6]], local=0)
    scores = attnpatch.heads(model, [list(range(5, 12))])
    with pytest.raises(CaptureError, match="no sequence measures 'local'"):
        scores["local"]
    with pytest.raises(CaptureError, match="there is no score 'copy'"):
        scores["copy"]


# ------------------------------------------------------------------------------------------------------------ sequences


@pytest.fixture(scope="module")
def demo():
    from pathlib import Path

    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = Path(attnpatch.__file__).parent / "demo" / "model"
    return AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)


MESSAGES = [
    {"role": "system", "content": "Chat with the user."},
    {"role": "user", "content": "Marta's boat is called Quiet Copper Lantern."},
    {"role": "assistant", "content": "Noted."},
    {"role": "user", "content": "What is Marta's boat called?"},
]


def test_repeated_tokens(demo):
    _, tokenizer = demo
    (probe,) = Probes.repeated(tokenizer, count=1, length=20, seed=3)
    assert len(probe.ids) == 40 and probe.ids[:20] == probe.ids[20:] and len(set(probe.ids)) == 20
    assert not set(probe.ids) & set(tokenizer.all_special_ids)
    assert probe.induction == tuple((20 + i, i + 1) for i in range(20))
    for row, key in probe.induction:
        assert probe.ids[key - 1] == probe.ids[row]
    (again,), (other,) = (Probes.repeated(tokenizer, 1, 20, seed) for seed in (3, 4))
    assert again == probe != other
    with pytest.raises(CaptureError, match="the number of tokens"):
        Probes.repeated(range(10), length=11)


def test_a_conversation_and_its_fact(demo):
    model, tokenizer = demo
    (probe,) = Probes.conversations(tokenizer, [(MESSAGES, 1, "Quiet Copper Lantern")])
    whole = [*MESSAGES, {"role": "assistant", "content": "Quiet Copper Lantern"}]
    assert list(probe.ids) == tokenizer.apply_chat_template(whole, return_dict=True)["input_ids"]
    assert "Marta's boat is called Quiet Copper Lantern." in tokenizer.decode(probe.ids[slice(*probe.needle)])
    assert "Noted" not in tokenizer.decode(probe.ids[slice(*probe.needle)])
    assert tokenizer.decode([probe.ids[token] for token in probe.answer]).split() == [
        "Quiet",
        "Copper",
        "Lantern",
    ]
    assert min(probe.answer) > probe.needle[1]
    scores = attnpatch.heads(model, Probes.conversations(tokenizer, [(MESSAGES, 1, "Quiet Copper Lantern")]))
    assert {one.layer for one in scores.top("retrieval", 4)} == {3}
    with pytest.raises(CaptureError, match="no token of the answer"):
        Probes.conversations(tokenizer, [(MESSAGES, 2, "Quiet Copper Lantern")])
    with pytest.raises(CaptureError, match="there is no message 4"):
        Probes.conversations(tokenizer, [(MESSAGES, 4, "Quiet")])


def test_a_text_and_the_place_of_its_answer(demo):
    _, tokenizer = demo
    text = "Marta's boat is called Quiet Copper Lantern. Noted. What is Marta's boat called?"
    start = text.index("Quiet")
    (probe,) = Probes.needles(tokenizer, [(text, (start, start + 20))])
    fact = tokenizer.decode(probe.ids[slice(*probe.needle)]).split()
    assert (
        fact
        == tokenizer.decode([probe.ids[token] for token in probe.answer]).split()
        == text[start : start + 20].split()
    )
    assert max(probe.answer) == len(probe.ids) - 1
    with pytest.raises(CaptureError, match="is not in a text"):
        Probes.needles(tokenizer, [(text, (start, 400))])
    assert repr(Probes([probe]) + Probes.repeated(tokenizer, 2, 10)).endswith(
        "2 for induction, 1 for retrieval)"
    )


# --------------------------------------------------------------------------------------------------------------- result


def test_table_and_picture(tmp_path):
    model = zoo.BY_NAME["llama"].build("sdpa")
    scores = attnpatch.heads(model, Probes.repeated(range(5, 90), 1, 20))
    frame = scores.to_dataframe()
    assert list(frame.columns) == ["layer", "head", "induction", "previous", "sink", "local"]
    assert len(frame) == 8
    one = frame[(frame["layer"] == 1) & (frame["head"] == 2)]
    assert one["sink"].item() == scores["sink"][1, 2].item()
    assert scores.plot(tmp_path / "heads.png").stat().st_size > 5000
    assert [panel.get_xlabel() for panel in scores.plot().axes[:4]] == ["head"] * 4
