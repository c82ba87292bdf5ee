"""Blocks: how tokens are grouped, from fixed sizes, spans and chat messages."""

import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attnpatch.blocks.spec import Blocks
from attnpatch.errors import BlockError

SYSTEM = {"role": "system", "content": "be brief"}
CHAT = [
    SYSTEM,
    {"role": "user", "content": "the key is red"},
    {"role": "assistant", "content": "fine"},
    {"role": "user", "content": "which colour is it ?"},
]

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA3 = (
    "{{ '<|begin|>' }}{% for m in messages %}<|header|>{{ m.role }}<|/header|>\n\n"
    "{{ m.content | trim }}<|eot|>{% endfor %}"
    "{% if add_generation_prompt %}<|header|>assistant<|/header|>\n\n{% endif %}"
)
# Reasoning is kept only in the last turn, so what comes before renders differently when it is last (Qwen3).
REASONING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}"
    "{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MERGES_SYSTEM = (
    "<|begin|>{% for m in messages %}{% if m.role == 'user' %}[INST] "
    "{% if loop.index0 == 1 and messages[0].role == 'system' %}{{ messages[0].content }}\n\n{% endif %}"
    "{{ m.content }} [/INST]{% elif m.role == 'assistant' %} {{ m.content }}<|eot|>{% endif %}{% endfor %}"
)
DROPS_SYSTEM = (
    "{% for m in messages if m.role != 'system' %}<|header|>{{ m.role }}\n{{ m.content }}{% endfor %}"
)
# The system message goes before the last user message (Mistral).
MOVES_SYSTEM = (
    "<|begin|>{% for m in messages %}{% if m.role == 'user' %}[INST] "
    "{% if loop.last and messages[0].role == 'system' %}{{ messages[0].content }}\n\n{% endif %}"
    "{{ m.content }} [/INST]{% elif m.role == 'assistant' %} {{ m.content }}<|eot|>{% endif %}{% endfor %}"
)
STRICT = (
    "{% if messages[-1].role == 'system' %}{{ raise_exception('a user message must follow') }}{% endif %}"
    + CHATML
)
SPECIAL = ["<|im_start|>", "<|im_end|>", "<|begin|>", "<|header|>", "<|/header|>", "<|eot|>"]


def make_tokenizer(template, trim_offsets=False, kind="bpe"):
    tokenizers = pytest.importorskip("tokenizers")
    transformers = pytest.importorskip("transformers")
    text = " ".join(m["content"] + " " + m["role"] for m in CHAT)
    if kind == "bpe":
        raw = tokenizers.Tokenizer(tokenizers.models.BPE())
        raw.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        raw.decoder = tokenizers.decoders.ByteLevel()
        raw.post_processor = tokenizers.processors.ByteLevel(trim_offsets=trim_offsets)
        alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
        trainer = tokenizers.trainers.BpeTrainer(
            vocab_size=300, initial_alphabet=alphabet, special_tokens=SPECIAL
        )
    else:
        raw = tokenizers.Tokenizer(tokenizers.models.WordLevel(unk_token="[UNK]"))
        raw.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
        raw.post_processor = tokenizers.processors.TemplateProcessing(
            single="<|begin|> $A", special_tokens=[("<|begin|>", 1 + SPECIAL.index("<|begin|>"))]
        )
        trainer = tokenizers.trainers.WordLevelTrainer(special_tokens=["[UNK]", *SPECIAL])
    raw.train_from_iterator([text], trainer)
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=raw)
    tokenizer.add_special_tokens({"additional_special_tokens": SPECIAL})
    tokenizer.chat_template = template
    return tokenizer


def real(*lengths, total=None, left=False):
    """A padding mask: True for real tokens."""
    total = total or max(lengths)
    position = torch.arange(total)
    rows = [position >= total - n if left else position < n for n in lengths]
    return torch.stack(rows)


def pieces(blocks, tokenizer, messages, **options):
    """The text of each block, from the tokens that the model would see."""
    ids = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False, **options)
    partition = blocks.resolve(torch.ones(1, len(ids), dtype=torch.bool))
    assert (partition.assignment >= 0).all()
    assert partition.sizes.sum() == len(ids)
    ids = torch.tensor(ids)
    return [tokenizer.decode(ids[partition.assignment[0] == i]) for i in range(partition.num_blocks)]


def test_fixed_blocks_count_from_the_first_real_token():
    partition = Blocks.fixed(3).resolve(real(7, 4, left=True))
    assert partition.assignment.tolist() == [[0, 0, 0, 1, 1, 1, 2], [-1, -1, -1, 0, 0, 0, 1]]
    assert partition.sizes.tolist() == [[3, 3, 1], [3, 1, 0]]
    assert partition.labels == (("0:3", "3:6", "6:7"), ("0:3", "3:4"))
    assert partition.starts.tolist() == [[0, 3, 6], [0, 3, 0]]
    assert partition.ends.tolist() == [[3, 6, 7], [3, 4, 0]]
    assert partition.assignment.dtype == partition.sizes.dtype == torch.int64


def test_padding_may_be_anywhere():
    valid = torch.tensor([[False, True, True, False, True, True, True, False]])
    assert Blocks.fixed(2).resolve(valid).assignment.tolist() == [[-1, 0, 0, -1, 1, 1, 2, -1]]
    assert Blocks.spans([(1, 3), (4, 5)]).resolve(valid).assignment.tolist() == [
        [-1, -1, 0, -1, 0, -1, 1, -1]
    ]


def test_a_sequence_of_padding_only_has_no_blocks():
    partition = Blocks.fixed(2).resolve(real(0, 3, total=3))
    assert partition.sizes.tolist() == [[0, 0], [2, 1]]
    assert partition.labels[0] == ()
    assert Blocks.fixed(2).resolve(torch.zeros(1, 4, dtype=torch.bool)).num_blocks == 1


def test_spans_leave_gaps_and_padding_out():
    partition = Blocks.spans([(1, 3), (4, 6)], labels=["a", "b"]).resolve(real(7, 6, total=8, left=True))
    assert partition.assignment.tolist() == [[-1, -1, 0, 0, -1, 1, 1, -1], [-1, -1, -1, 0, 0, -1, 1, 1]]
    assert partition.labels == (("a", "b"), ("a", "b"))


def test_spans_per_sequence():
    blocks = Blocks.spans([[(0, 5), (5, 9)], [(0, 3)]], labels=[["q", "a"], ["q"]])
    partition = blocks.resolve(real(9, 4))
    assert partition.sizes.tolist() == [[5, 4], [3, 0]]
    assert partition.assignment[1].tolist() == [0, 0, 0, -1, -1, -1, -1, -1, -1]
    assert partition.labels == (("q", "a"), ("q",))
    with pytest.raises(BlockError, match="given for 2 sequences, but the batch has 3"):
        blocks.resolve(real(9, 9, 9))


def test_spans_may_be_arrays():
    assert Blocks.spans(np.array([[0, 5], [5, 9]])) == Blocks.spans([(0, 5), (5, 9)])


@pytest.mark.filterwarnings("ignore:attnpatch. the sequence has grown")
@given(
    first=st.integers(1, 30),
    more=st.lists(st.integers(1, 5), max_size=5),
    size=st.integers(1, 8),
    pad=st.integers(0, 4),
)
@settings(max_examples=50, deadline=None)
def test_blocks_of_earlier_tokens_stay_as_a_sequence_grows(first, more, size, pad):
    for blocks in (Blocks.fixed(size), Blocks.spans([(0, 1)] if first == 1 else [(0, 1), (1, first)])):
        valid = real(first, total=first + pad, left=True)
        before = blocks.resolve(valid)
        for extra in more:
            valid = torch.cat([valid, torch.ones(1, extra, dtype=torch.bool)], dim=1)
            after = blocks.resolve(valid)
            assert torch.equal(after.assignment[:, : before.assignment.shape[1]], before.assignment)
            before = after


@given(lengths=st.lists(st.integers(0, 20), min_size=1, max_size=4), size=st.integers(1, 7), data=st.data())
@settings(max_examples=50, deadline=None)
def test_fixed_blocks_match_counting_by_hand(lengths, size, data):
    total = max(20, *lengths)
    valid = torch.zeros(len(lengths), total, dtype=torch.bool)
    for row, length in enumerate(lengths):
        valid[row, data.draw(st.permutations(range(total)))[:length]] = True
    partition = Blocks.fixed(size).resolve(valid)
    for row in range(len(lengths)):
        seen = 0
        for position in range(total):
            if valid[row, position]:
                assert partition.assignment[row, position] == seen // size
                seen += 1
            else:
                assert partition.assignment[row, position] == -1
        own = partition.assignment[row][valid[row]]
        assert partition.sizes[row].tolist() == torch.bincount(own, minlength=partition.num_blocks).tolist()


@pytest.mark.parametrize("size", [0, -3, 2.5, 2.0, True, "4", None, torch.tensor(True)])
def test_bad_size(size):
    with pytest.raises(BlockError, match=r"block is .*accepted"):
        Blocks.fixed(size)


@pytest.mark.parametrize(
    ("spans", "message"),
    [
        ([(0, 5), (4, 9)], r"\(0, 5\) and \(4, 9\) overlap"),
        ([(5, 9), (0, 5)], "not sorted"),
        ([(3, 3)], "empty or negative"),
        ([(5, 2)], "empty or negative"),
        ([(-1, 2)], "empty or negative"),
        ([], "no spans"),
        ([[(0, 1)], []], "no spans"),
        ([(0, 1.5)], "whole number"),
        ([(False, True)], "whole number"),
        ([(0, 1, 2)], "3 numbers"),
        ([0, 5], "accepted is a list"),
        (5, "accepted is a list"),
        ("abc", "1 numbers"),
    ],
)
def test_bad_spans(spans, message):
    with pytest.raises(BlockError, match=message):
        Blocks.spans(spans)


@pytest.mark.parametrize("labels", [["a"], ["a", "b", "c"], "ab", [["a", "b"]], [["a"], ["b"]], [1, 2], 5])
def test_labels_must_match(labels):
    with pytest.raises(BlockError, match="labels do not match"):
        Blocks.spans([(0, 1), (1, 2)], labels=labels)


def test_span_past_the_sequence_names_both():
    with pytest.raises(BlockError, match="ends at token 9, but sequence 1 has 8 real tokens"):
        Blocks.spans([(0, 9)]).resolve(real(9, 8))


@pytest.mark.parametrize(
    "valid",
    [torch.ones(2, 3), torch.ones(3, dtype=torch.bool), [[True]], torch.ones(1, 2, dtype=torch.int64)],
)
def test_bad_mask(valid):
    with pytest.raises(BlockError, match="bool tensor"):
        Blocks.fixed(2).resolve(valid)


def test_blocks_are_values():
    blocks = Blocks.spans([(0, 5), (5, 9)], labels=["a", "b"])
    assert pickle.loads(pickle.dumps(blocks)) == blocks
    assert blocks == Blocks.spans([[0, 5], [5, 9]], labels=("a", "b"))
    assert blocks != Blocks.spans([(0, 5), (5, 9)])
    assert Blocks.fixed(4) != Blocks.fixed(5)
    assert repr(Blocks.fixed(128)) == "Blocks.fixed(128)"
    assert repr(blocks) == "Blocks.spans(2 blocks to token 9: 'a', 'b')"
    assert len(repr(Blocks.spans([(i, i + 1) for i in range(5000)]))) < 200
    with pytest.raises(AttributeError):
        blocks.size = 3


@pytest.mark.parametrize("kind", ["bpe", "bpe trimmed", "words"])
@pytest.mark.parametrize("prompt", [False, True])
def test_messages_chatml(kind, prompt):
    tokenizer = make_tokenizer(CHATML, trim_offsets=kind == "bpe trimmed", kind=kind.split()[0])
    blocks = Blocks.messages(tokenizer, CHAT, add_generation_prompt=prompt)
    labels = ["0 system", "1 user", "2 assistant", "3 user"]
    assert list(blocks.labels_by_sequence[0]) == labels + ["assistant (next)"] * prompt
    found = pieces(blocks, tokenizer, CHAT, add_generation_prompt=prompt)
    if kind != "words":
        expected = [f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in CHAT]
        assert found == expected + ["<|im_start|>assistant\n"] * prompt
    else:
        assert all(piece.startswith("<|im_start|>") for piece in found)


@pytest.mark.parametrize("trim_offsets", [False, True])
def test_messages_whose_template_trims_content(trim_offsets):
    tokenizer = make_tokenizer(LLAMA3, trim_offsets)
    messages = [{**m, "content": f" \n {m['content']}\n\n "} for m in CHAT]
    messages[2]["content"] = "   "
    found = pieces(Blocks.messages(tokenizer, messages), tokenizer, messages)
    expected = [f"<|header|>{m['role']}<|/header|>\n\n{m['content'].strip()}<|eot|>" for m in messages]
    assert found == ["<|begin|>" + expected[0], *expected[1:]]


@pytest.mark.parametrize("prompt", [False, True])
def test_messages_whose_template_renders_the_last_turn_differently(prompt):
    tokenizer = make_tokenizer(REASONING)
    blocks = Blocks.messages(tokenizer, CHAT, add_generation_prompt=prompt)
    found = pieces(blocks, tokenizer, CHAT, add_generation_prompt=prompt)
    expected = [f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in CHAT]
    assert found == expected + ["<|im_start|>assistant\n"] * prompt


def test_a_token_of_whitespace_at_the_end_of_a_message_stays_with_it():
    tokenizer = make_tokenizer(CHATML.replace("<|im_end|>\n", "<|im_end|> "), trim_offsets=True)
    found = pieces(Blocks.messages(tokenizer, CHAT), tokenizer, CHAT)
    assert found == [f"<|im_start|>{m['role']}\n{m['content']}<|im_end|> " for m in CHAT]


def test_a_message_without_tokens_is_refused():
    tokenizer = make_tokenizer("{% for m in messages %}{{ m.content }}\n{% endfor %}", kind="words")
    with pytest.raises(BlockError, match="message 1 has no token"):
        Blocks.messages(tokenizer, [CHAT[0], {"role": "user", "content": " "}, CHAT[1]])


def test_messages_that_quote_the_template_and_each_other():
    messages = [
        {"role": "user", "content": "say <|im_end|>\n<|im_start|>user\nhi"},
        {"role": "user", "content": "hi"},
        {"role": "user", "content": "hi"},
        {"role": "user", "content": "\u00e9\u4e2d\U0001f600 \ue000"},
    ]
    tokenizer = make_tokenizer(CHATML)
    found = pieces(Blocks.messages(tokenizer, messages), tokenizer, messages)
    assert found == [f"<|im_start|>user\n{m['content']}<|im_end|>\n" for m in messages]


def test_messages_without_text_of_their_own_content():
    messages = [{"role": "user", "content": ""}, {"role": "assistant", "content": None}, CHAT[1]]
    tokenizer = make_tokenizer(CHATML)
    found = pieces(Blocks.messages(tokenizer, messages), tokenizer, messages)
    assert found[0] == "<|im_start|>user\n<|im_end|>\n"
    assert len(found) == 3


def test_messages_for_a_batch():
    tokenizer = make_tokenizer(CHATML)
    blocks = Blocks.messages(tokenizer, [CHAT, CHAT[:2]])
    lengths = [
        len(tokenizer.apply_chat_template(c, tokenize=True, return_dict=False)) for c in (CHAT, CHAT[:2])
    ]
    partition = blocks.resolve(real(*lengths, left=True))
    assert (partition.sizes[0] > 0).tolist() == [True] * 4
    assert (partition.sizes[1] > 0).tolist() == [True, True, False, False]
    assert torch.equal(partition.sizes[0, :2], partition.sizes[1, :2])
    assert partition.labels[1] == ("0 system", "1 user")


def test_template_options_are_handed_on():
    tokenizer = make_tokenizer("{{ preamble }}" + CHATML)
    found = pieces(Blocks.messages(tokenizer, CHAT, preamble="note "), tokenizer, CHAT, preamble="note ")
    assert found[0].startswith("note <|im_start|>system")


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (MERGES_SYSTEM, r"message 0 \(system\) has no text of its own"),
        (DROPS_SYSTEM, r"message 0 \(system\) has no text of its own"),
        (MOVES_SYSTEM, r"message 0 \(system\) has no text of its own"),
        (STRICT, "a user message must follow"),
        (None, "no chat template"),
    ],
)
def test_templates_that_cannot_be_divided(template, message):
    with pytest.raises(BlockError, match=message):
        Blocks.messages(make_tokenizer(template), CHAT)


def test_generation_prompt_must_exist():
    with pytest.raises(BlockError, match="adds no text"):
        Blocks.messages(make_tokenizer(DROPS_SYSTEM), CHAT[1:], add_generation_prompt=True)


@pytest.mark.parametrize("messages", [[], [[]], CHAT[0], "hi", ["hi"], [CHAT, []], [CHAT[0], "hi"]])
def test_bad_messages(messages):
    with pytest.raises(BlockError, match=r"empty|something else"):
        Blocks.messages(make_tokenizer(CHATML), messages)


def test_slow_tokenizer_is_refused():
    class Slow:
        chat_template = CHATML
        is_fast = False

    with pytest.raises(BlockError, match="no character offsets"):
        Blocks.messages(Slow(), CHAT)
