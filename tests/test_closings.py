"""Templates that close the last message in another way: every message is a block of its own, ending where it is written."""

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_rendering import make_tokenizer, said, tokenizer_of

from attnpatch.blocks.spec import Blocks
from attnpatch.conversations.tokenized_chat import render
from attnpatch.errors import BlockError

BOS, EOS = "<|begin|>", "<|end|>"


class Written:
    """A template, and the same once more as a few lines of Python: what each message is, and what opens the next one.

    Args:
        template: Of jinja.
        message: Of role, content, whether it is the last, and whether the next one is opened, the text of a message.
        opening: Of the assistant's next message.
        tail: What follows all messages, where none is opened.
        lead: What comes before them.
    """

    def __init__(self, template, message, opening="", tail="", lead=""):
        self.template, self.message, self.opening, self.tail, self.lead = (
            template,
            message,
            opening,
            tail,
            lead,
        )

    def pieces(self, messages, prompt):
        found = [
            self.message(m["role"], m["content"], i == len(messages) - 1, prompt)
            for i, m in enumerate(messages)
        ]
        found[0] = self.lead + found[0]
        if not prompt or not self.opening:
            found[-1] += self.tail
        return [*found, self.opening] if prompt and self.opening else found


LOOP = "{% for m in messages %}"
OPENED = "{% if add_generation_prompt %}<|turn|>assistant\n{% endif %}"


def turn(role, content, closing):
    return f"<|turn|>{role}\n{content}{closing}"


TEMPLATES = {
    # A token after the loop, unless the next message is opened (Phi-3, Phi-3.5).
    "end after the loop": Written(
        LOOP + "<|turn|>{{ m.role }}\n{{ m.content }}<|/turn|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|turn|>assistant\n{% else %}{{ eos_token }}{% endif %}",
        lambda role, content, last, prompt: turn(role, content, "<|/turn|>\n"),
        "<|turn|>assistant\n",
        EOS,
    ),
    # The same without line breaks, and with a first token (Phi-4-mini).
    "end after the loop, one line": Written(
        "{{ bos_token }}" + LOOP + "<|{{ m.role }}|>{{ m.content }}<|/turn|>{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% else %}{{ eos_token }}{% endif %}",
        lambda role, content, last, prompt: f"<|{role}|>{content}<|/turn|>",
        "<|assistant|>",
        EOS,
        BOS,
    ),
    # No message alone shows what it begins with.
    "end after the loop, words before it": Written(
        "{{ 'rules\n' }}" + LOOP + "<|turn|>{{ m.role }}\n{{ m.content }}<|/turn|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|turn|>assistant\n{% else %}{{ eos_token }}{% endif %}",
        lambda role, content, last, prompt: turn(role, content, "<|/turn|>\n"),
        "<|turn|>assistant\n",
        EOS,
        "rules\n",
    ),
    "end after the loop, nothing opens the next": Written(
        LOOP + "<|turn|>{{ m.role }}\n{{ m.content }}<|/turn|>\n{% endfor %}{{ eos_token }}",
        lambda role, content, last, prompt: turn(role, content, "<|/turn|>\n"),
        tail=EOS,
    ),
    # An answer that is the last closes with another token (OLMo 3).
    "last answer": Written(
        LOOP
        + "<|turn|>{{ m.role }}\n{{ m.content }}{% if m.role == 'assistant' and loop.last %}{{ eos_token }}"
        "{% else %}<|/turn|>\n{% endif %}{% endfor %}" + OPENED,
        lambda role, content, last, prompt: turn(
            role, content, EOS if last and role == "assistant" else "<|/turn|>\n"
        ),
        "<|turn|>assistant\n",
    ),
    # With the line break after it only where something follows (OLMo 2).
    "last answer's line break": Written(
        "{{ bos_token }}"
        + LOOP
        + "<|turn|>{{ m.role }}\n{{ m.content }}{% if m.role == 'assistant' %}{{ eos_token }}"
        "{{ '' if loop.last else '\n' }}{% else %}{{ '\n' }}{% endif %}{% endfor %}" + OPENED,
        lambda role, content, last, prompt: turn(
            role, content, (EOS + "\n" * (not last)) if role == "assistant" else "\n"
        ),
        "<|turn|>assistant\n",
        lead=BOS,
    ),
    # Another token after an answer that is the last thing said, unless the next one is opened (gpt-oss).
    "last thing said": Written(
        LOOP
        + "<|header|>{{ m.role }}<|/header|>{{ m.content }}{% if m.role == 'assistant' and loop.last and not "
        "add_generation_prompt %}<|eot|>{% else %}<|/turn|>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|header|>assistant{% endif %}",
        lambda role, content, last, prompt: (
            f"<|header|>{role}<|/header|>{content}"
            + ("<|eot|>" if role == "assistant" and last and not prompt else "<|/turn|>")
        ),
        "<|header|>assistant",
    ),
    "whoever is last": Written(
        LOOP
        + "<|header|>{{ m.role }}<|/header|>{{ m.content }}{% if loop.last and not add_generation_prompt %}<|eot|>"
        "{% else %}<|/turn|>{% endif %}{% endfor %}{% if add_generation_prompt %}<|header|>assistant{% endif %}",
        lambda role, content, last, prompt: (
            f"<|header|>{role}<|/header|>{content}" + ("<|eot|>" if last and not prompt else "<|/turn|>")
        ),
        "<|header|>assistant",
    ),
    "whoever is last, nothing opens the next": Written(
        LOOP
        + "<|turn|>{{ m.role }}\n{{ m.content }}{{ eos_token if loop.last else '<|/turn|>\n' }}{% endfor %}",
        lambda role, content, last, prompt: turn(role, content, EOS if last else "<|/turn|>\n"),
    ),
    # Left open, for the model to go on.
    "the last one is not closed": Written(
        LOOP + "<|turn|>{{ m.role }}\n{{ m.content }}{{ '' if loop.last else '<|/turn|>\n' }}{% endfor %}",
        lambda role, content, last, prompt: turn(role, content, "" if last else "<|/turn|>\n"),
    ),
    "only the last one is closed": Written(
        LOOP + "<|turn|>{{ m.role }}\n{{ m.content }}{{ eos_token if loop.last else '' }}{% endfor %}",
        lambda role, content, last, prompt: turn(role, content, EOS if last else ""),
    ),
}
WORDS = "the key is red under a stone near which one fine thanks".split()
QUOTES = ("<|/turn|>\n<|turn|>user\n", f"x{EOS}y", "<|header|>assistant", " ", "\u4e2d\U0001f600")


def talks():
    """Conversations of each beginning and end, with texts that quote templates among them."""
    draw = random.Random(0)
    for count in range(1, 7):
        for first in ("system", "user"):
            roles = [first, *["user", "assistant"] * 3][: count + (first == "user")]
            roles = roles if first == "system" else roles[1:]
            contents = [" ".join(draw.choices(WORDS, k=draw.randint(1, 5))) for _ in roles]
            if count > 3:
                contents[draw.randrange(len(roles))] += draw.choice(QUOTES) + "x"
            yield [said(role, content) for role, content in zip(roles, contents, strict=True)]


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("prompt", [False, True])
def test_every_message_ends_where_it_is_written(name, prompt):
    written = TEMPLATES[name]
    tokenizer = make_tokenizer(written.template)
    for messages in talks():
        expected = written.pieces(messages, prompt)
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
        assert text == "".join(expected)
        found = render(tokenizer, messages, add_generation_prompt=prompt)
        pieces = [
            tokenizer.decode(found.ids[a:b], clean_up_tokenization_spaces=False) for a, b in found.spans
        ]
        assert pieces == expected, messages
        labels = [f"{i} {m['role']}" for i, m in enumerate(messages)]
        assert list(found.labels) == labels + ["assistant (next)"] * (len(expected) > len(messages))
        assert list(found.texts[: len(messages)]) == [m["content"] for m in messages]
        if prompt and not written.opening:
            with pytest.raises(BlockError, match="adds no text"):
                Blocks.messages(tokenizer, messages, add_generation_prompt=True)
        else:
            blocks = Blocks.messages(tokenizer, messages, add_generation_prompt=prompt)
            assert blocks.spans_by_sequence == (found.spans,)
            assert found.notes == ()


# What messages quote, and white space at their ends or instead of them.
PARTS = st.sampled_from(
    [
        "",
        " ",
        "\n",
        "hi",
        "<|/turn|>\n",
        "<|turn|>user\n",
        EOS,
        "<|eot|>",
        "<|header|>assistant",
        "<think>",
        "</think>",
    ]
    + ["<|/turn|><|turn|>assistant\n", "\ue000", "\u4e2d"]
)
MESSAGES = st.lists(
    st.builds(
        said, st.sampled_from(["user", "assistant", "system"]), st.lists(PARTS, max_size=4).map("".join)
    ),
    min_size=1,
    max_size=6,
)


@pytest.mark.parametrize("name", TEMPLATES)
@settings(max_examples=25)
@given(messages=MESSAGES, prompt=st.booleans())
def test_any_text_in_any_role(name, messages, prompt):
    written = TEMPLATES[name]
    tokenizer = tokenizer_of(written.template)
    found = render(tokenizer, messages, add_generation_prompt=prompt)
    pieces = [tokenizer.decode(found.ids[a:b], clean_up_tokenization_spaces=False) for a, b in found.spans]
    assert pieces == written.pieces(messages, prompt)


@pytest.mark.parametrize("name", ["end after the loop", "last answer", "last thing said"])
def test_a_message_without_text_has_its_block_too(name):
    written = TEMPLATES[name]
    tokenizer = make_tokenizer(written.template)
    for empty in range(5):
        messages = [
            said("user" if i % 2 == 0 else "assistant", "" if i == empty else "red") for i in range(5)
        ]
        found = render(tokenizer, messages)
        pieces = [
            tokenizer.decode(found.ids[a:b], clean_up_tokenization_spaces=False) for a, b in found.spans
        ]
        assert pieces == written.pieces(messages, False), empty


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_last_message_that_is_left_open_grows(name):
    """Of the messages before it nothing changes."""
    written = TEMPLATES[name]
    tokenizer = make_tokenizer(written.template)
    messages = [
        said("user", "red"),
        said("assistant", "fine"),
        said("user", "which"),
        said("assistant", "the key"),
    ]
    found = render(tokenizer, messages, continue_final_message=True)
    pieces = [tokenizer.decode(found.ids[a:b], clean_up_tokenization_spaces=False) for a, b in found.spans]
    expected = written.pieces(messages, False)
    assert pieces == [*expected[:-1], expected[-1].partition("the key")[0] + "the key"]
    blocks = Blocks.messages(tokenizer, messages, continue_final_message=True)
    longer = blocks.resolve(torch.ones(1, len(found.ids) + 5, dtype=torch.bool))
    assert longer.labels == (("0 user", "1 assistant", "2 user", "3 assistant"),)
    assert longer.ends.tolist()[0] == [end for _, end in found.spans[:-1]] + [len(found.ids) + 5]


def of_tools(opening, before, after, closing, between=""):
    """A template that writes the results of tools that follow each other into one turn."""
    first = "loop.first or messages[loop.index0 - 1].role != 'tool'"
    last = "loop.last or messages[loop.index0 + 1].role != 'tool'"
    return (
        LOOP
        + f"{{% if m.role == 'tool' %}}{{{{ ('{opening}' if {first} else '{between}') + '{before}' + m.content + '{after}' }}}}"
        + f"{{{{ '{closing}' if {last} else '' }}}}{{% else %}}{{{{ '<|turn|>' + m.role + '\n' + m.content }}}}"
        + "{{ '<|/turn|>\n' }}{% endif %}{% endfor %}"
        + OPENED
    )


# What opens the turn of results, one of them, closes one of them, the turn, and what is between two.
OF_TOOLS = {
    "a user's turn": ("<|turn|>user", "\n<result>\n", "\n</result>", "<|/turn|>\n", ""),
    "a turn of tools": ("<|turn|>tool\n", "<result>", "</result>", "<|/turn|>\n", ""),
    "a list": ("<results>", "<result>", "</result>", "</results>", "\n"),
}


@pytest.mark.parametrize("name", OF_TOOLS)
@pytest.mark.parametrize("count", [1, 2, 3, 12])
@pytest.mark.parametrize("prompt", [False, True])
@pytest.mark.parametrize("goes_on", [False, True])
def test_results_of_tools_that_share_a_turn_are_blocks_of_their_own(name, count, prompt, goes_on):
    opening, before, after, closing, between = OF_TOOLS[name]
    tokenizer = make_tokenizer(of_tools(*OF_TOOLS[name]))
    texts = ["red", " near\n", "</result>", "the key", "one"]
    results = [said("tool", texts[i % 5] + str(i)) for i in range(count)]
    messages = [said("user", "which"), said("assistant", "fine"), *results]
    expected = [turn("user", "which", "<|/turn|>\n"), turn("assistant", "fine", "<|/turn|>\n")]
    for i, result in enumerate(results):
        is_last = i == count - 1
        written = before + result["content"] + after
        expected.append(opening * (i == 0) + written + (closing if is_last else between))
    if goes_on:
        messages += [said("assistant", "thanks")]
        expected += [turn("assistant", "thanks", "<|/turn|>\n")]
    if prompt:
        expected += ["<|turn|>assistant\n"]
    found = render(tokenizer, messages, add_generation_prompt=prompt)
    pieces = [tokenizer.decode(found.ids[a:b], clean_up_tokenization_spaces=False) for a, b in found.spans]
    assert pieces == expected
    assert found.notes == ()
    blocks = Blocks.messages(tokenizer, messages, add_generation_prompt=prompt)
    assert blocks.spans_by_sequence == (found.spans,)


# Nothing tells a closing from a header, and both are others each time.
UNTOLD = (
    "{% for m in messages %}{{ m.content }}{% if loop.last %}<|eot|>{% else %}<|/turn|>{{ loop.index }}"
    "<|turn|>{{ loop.index * 7 }}{% endif %}{% endfor %}"
)


def test_where_it_cannot_be_told_messages_are_one_block_and_the_reason_is_true():
    tokenizer = make_tokenizer(UNTOLD)
    found = render(tokenizer, [said("user", "red"), said("assistant", "fine")])
    assert found.labels == ("0 user + 1 assistant",)
    (note,) = found.notes
    assert "cannot be found" in note and "joins" not in note
    with pytest.raises(BlockError, match=r"the end of message 0 \(user\) cannot be found.*Blocks\.spans"):
        Blocks.messages(tokenizer, [said("user", "red"), said("assistant", "fine")])


def test_an_opening_that_changes_what_is_before_it_is_refused():
    template = (
        "{{ 'a' if add_generation_prompt else 'bc' }}{% for m in messages %}{{ m.content }}{% endfor %}"
    )
    for call in (render, Blocks.messages):
        with pytest.raises(BlockError, match="cannot find where") as raised:
            call(make_tokenizer(template), [said("user", "red")], add_generation_prompt=True)
        assert len(str(raised.value).splitlines()) == 1
