"""Tokens that a model writes are the answer's block, whatever the blocks are; and no text is cut inside a character."""

import warnings

import pytest
import test_closings
import torch
from test_analyzer import by_blocks, llama, sharp
from test_rendering import CHATML, INST_SYS, make_tokenizer, said

import attnpatch
from attnpatch.blocks.spec import Blocks
from attnpatch.conversations.answers import answer_of
from attnpatch.conversations.tokenized_chat import render
from attnpatch.errors import BlockError

TALK = [said("user", "the key is red"), said("assistant", "fine"), said("user", "which colour is it ?")]
NEXT = "assistant (next)"
TEMPLATES = {
    "opened": CHATML,
    "nothing opens it": INST_SYS,
    "closed otherwise": test_closings.TEMPLATES["end after the loop"].template,
}
WRITTEN = 5


@pytest.fixture(scope="module", params=TEMPLATES)
def case(request):
    """A tokenizer, a model, what the model is given and what comes of it, and where the messages end in that."""
    tokenizer = make_tokenizer(TEMPLATES[request.param])
    model = sharp(llama(len(tokenizer) + 8))
    ids = tokenizer.apply_chat_template(
        TALK, add_generation_prompt=True, tokenize=True, return_dict=False, return_tensors="pt"
    )
    with torch.no_grad():
        whole = model.generate(ids, max_new_tokens=WRITTEN, min_new_tokens=WRITTEN, do_sample=False)
    # Of the text up to where the next message opens.
    opening = tokenizer.apply_chat_template(TALK, tokenize=False, add_generation_prompt=True)
    texts = {"opened": "<|im_start|>assistant\n", "closed otherwise": "<|turn|>assistant\n"}
    end = len(
        tokenizer(opening.removesuffix(texts.get(request.param, "none")), add_special_tokens=False).input_ids
    )
    return tokenizer, model, ids, whole, end


def dense(model, ids):
    """float64 ``[layers, heads, tokens, tokens]`` of eager attention."""
    model.set_attn_implementation("eager")
    try:
        with torch.no_grad():
            return torch.cat(model(ids, output_attentions=True).attentions).double()
    finally:
        model.set_attn_implementation("sdpa")


def test_blocks_of_messages_hold_what_is_generated(case):
    tokenizer, model, ids, whole, end = case
    blocks = Blocks.messages(tokenizer, TALK)
    with attnpatch.capture(model, blocks) as maps, torch.no_grad():
        model.generate(ids, max_new_tokens=WRITTEN, min_new_tokens=WRITTEN, do_sample=False)
    found = maps.block_map
    assert found.query_labels == ("0 user", "1 assistant", "2 user", NEXT)
    rows = whole.shape[1] - 1
    assert found.query_sizes.sum() == rows and found.query_sizes[-1] == rows - end
    ends = found.query_sizes.cumsum(0).tolist()
    expected = by_blocks(dense(model, whole[:, :-1]), list(zip([0, *ends[:-1]], ends, strict=True)))
    torch.testing.assert_close(found.mass.double(), expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(found.mass.sum(-1), torch.ones(3, 4), rtol=0, atol=1e-5)


def test_each_conversation_of_a_batch_has_its_answer():
    tokenizer = make_tokenizer(CHATML)
    model = sharp(llama(len(tokenizer) + 8))
    talks = [TALK, TALK[:1]]
    tokenizer.padding_side, tokenizer.pad_token = "left", "<|eot|>"
    given = tokenizer.apply_chat_template(
        talks, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
    )
    more = {"max_new_tokens": WRITTEN, "min_new_tokens": WRITTEN, "do_sample": False, "pad_token_id": 0}
    with attnpatch.capture(model, Blocks.messages(tokenizer, talks)) as maps, torch.no_grad():
        model.generate(**given, **more)
    for row, talk in enumerate(talks):
        alone = tokenizer.apply_chat_template(
            talk, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        one = maps.block_map.select(sequence=row)
        with attnpatch.capture(model, Blocks.messages(tokenizer, talk)) as single, torch.no_grad():
            model.generate(**alone, **more)
        assert one.query_labels == single.block_map.query_labels
        assert one.query_labels[-1] == NEXT and len(one.query_labels) == len(talk) + 1
        assert one.query_sizes.tolist() == single.block_map.query_sizes.tolist()
        torch.testing.assert_close(one.mass, single.block_map.mass, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["messages", "words", 7])
@pytest.mark.parametrize("count", [1, WRITTEN])
def test_the_analyzer_s_blocks_hold_what_is_generated(case, kind, count):
    tokenizer, model, ids, whole, end = case
    analyzer = attnpatch.BlockAttentionAnalyzer(model=model, tokenizer=tokenizer, blocks=kind)
    found = analyzer.analyze_generation(
        TALK, "none", max_new_tokens=count, generate={"min_new_tokens": count}
    ).block_map
    rows = ids.shape[1] + count - 1
    assert found.query_sizes.sum() == rows
    torch.testing.assert_close(found.mass.sum(-1), torch.ones_like(found.mass[..., 0]), rtol=0, atol=1e-5)
    texts = found.metadata["texts"]
    assert len(texts) == len(found.query_labels)
    answer = tokenizer.decode(whole[0, ids.shape[1] : ids.shape[1] + count], skip_special_tokens=True)
    if kind == 7:
        shown = tokenizer.decode(whole[0, :rows], clean_up_tokenization_spaces=False)
        assert "".join(texts).rstrip("\ufffd") == shown.rstrip("\ufffd")
        return
    begin = end if kind == "messages" else ids.shape[1]
    assert (found.query_labels[-1] == NEXT) == (begin < rows)
    if begin < rows:
        assert found.query_sizes[-1] == rows - begin and texts[-1] == answer.rstrip("\ufffd")


def valid(length, total=None):
    return torch.arange(total or length)[None] < length


def test_a_block_for_what_comes_after_is_there_when_it_comes():
    blocks = Blocks.spans([(0, 3), (3, 5)], ["a", "b"], after="more")
    assert blocks.resolve(valid(5, 7)).labels == (("a", "b"),)
    longer = blocks.resolve(valid(8))
    assert longer.labels == (("a", "b", "more"),) and longer.sizes.tolist() == [[3, 2, 3]]
    assert longer.assignment.tolist() == [[0, 0, 0, 1, 1, 2, 2, 2]]
    each = Blocks.spans([[(0, 3)], [(0, 5)]], [["a"], ["b"]], after="more").resolve(
        torch.ones(2, 5, dtype=torch.bool)
    )
    assert each.labels == (("a", "more"), ("b",)) and each.sizes.tolist() == [[3, 2], [5, 0]]
    ahead = Blocks.spans([(0, 3), (3, 5)], ["a", "b"], ahead=True, after="more")
    assert [ahead.resolve(valid(n)).sizes.tolist() for n in (2, 5, 6)] == [[[2]], [[3, 2]], [[3, 2, 1]]]
    with pytest.raises(BlockError, match="ends at token 5"):
        blocks.resolve(valid(4))
    for wrong in ({"after": 3}, {"after": "more", "grows": True}):
        with pytest.raises(BlockError, match="accepted is one of them"):
            Blocks.spans([(0, 3)], **wrong)


@pytest.mark.parametrize("kind", ["spans", "words", "tokens"])
def test_tokens_that_are_generated_into_no_block_are_said_once(kind):
    tokenizer = make_tokenizer(CHATML)
    model = sharp(llama(len(tokenizer) + 8))
    ids = tokenizer("the key is red", return_tensors="pt", add_special_tokens=False).input_ids
    made = {
        "spans": lambda **more: Blocks.spans([(0, 2), (2, ids.shape[1])], **more),
        "words": lambda: Blocks.words(tokenizer, "the key is red", add_special_tokens=False),
        "tokens": lambda: Blocks.tokens(tokenizer, "the key is red", add_special_tokens=False),
    }[kind]

    def said_of(blocks, **more):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            with attnpatch.capture(model, blocks) as maps, torch.no_grad():
                for _ in range(2):
                    model.generate(ids, max_new_tokens=4, min_new_tokens=4, do_sample=False)
        assert len(maps.sequences) == 2
        return [str(one.message) for one in caught if "in no block" in str(one.message)]

    (line,) = said_of(made())
    assert "Blocks.messages" in line and "after='answer'" in line
    if kind == "spans":
        assert said_of(made(after="answer")) == said_of(made(grows=True)) == []
    # Prompts of several lengths, and what stands behind the last word from the first call on, are nothing new.
    blocks = made()
    for length in (ids.shape[1] + 3, ids.shape[1] + 3, ids.shape[1]):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            blocks.resolve(valid(length))
    assert blocks == made() and hash(blocks) == hash(made())


ODD = "a\U0001f468\u200d\U0001f469 \u4e2d\u6587e\u0301 \u00e9t\u00e9 x\ufffdy"


@pytest.mark.parametrize("trim_offsets", [False, True])
@pytest.mark.parametrize("template", [CHATML, None])
def test_no_label_or_text_is_cut_inside_a_character(template, trim_offsets):
    tokenizer = make_tokenizer(template, trim_offsets=trim_offsets, bos=template is None)
    messages = [said("user", ODD), said("assistant", ODD + ODD)]
    rendered = render(tokenizer, messages)
    # Most of these characters take several tokens.
    assert len(rendered.ids) > len("".join(rendered.tokens)) - 20
    shown = tokenizer.decode(rendered.ids, clean_up_tokenization_spaces=False)
    model = sharp(llama(len(tokenizer) + 8))
    for kind in ("words", *range(1, 8)):
        analyzer = attnpatch.BlockAttentionAnalyzer(model=model, tokenizer=tokenizer, blocks=kind)
        found = analyzer.analyze_conversation(messages).block_map
        texts = found.metadata["texts"]
        if kind == "words":
            assert list(found.query_labels) == texts
            assert {"\u4e2d\u6587e\u0301", "\u00e9t\u00e9"} <= {*texts}
        # Those that the text has itself are no cuts.
        assert "".join(texts).count("\ufffd") == 3
        if kind != "words":
            assert "".join(texts).replace("<|end|>", "") == shown.replace("<|end|>", "")


def test_an_answer_that_ends_inside_a_character_leaves_it_out_and_says_so():
    tokenizer = make_tokenizer(CHATML)
    ids = tokenizer("fine \u4e2d", add_special_tokens=False).input_ids
    whole, cut = answer_of(tokenizer, ids), answer_of(tokenizer, ids[:-1])
    assert (whole.text, whole.notes, "".join(whole.tokens)) == ("fine \u4e2d", (), "fine \u4e2d")
    assert cut.text == "fine " and "inside a character" in cut.notes[0]
    assert "".join(cut.tokens) == "fine " and len(cut.tokens) == len(ids) - 1
