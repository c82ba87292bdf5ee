"""Conversations in tokens: whose each token is, under the chat templates of the well-known families.

The reference is independent of the code: ``rendered`` writes down what each template gives for each message, and
the tokens of a block must decode to exactly that.
"""

import json
import re
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attnpatch.blocks.chat import segmentation
from attnpatch.conversations.tokenized_chat import Truncated, render
from attnpatch.errors import AnalysisError, BlockError

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Headers, trimmed content, a first token (Llama 3).
HEADERS = (
    "{{ bos_token }}{% for m in messages %}<|header|>{{ m.role }}<|/header|>\n\n{{ m.content | trim }}<|eot|>"
    "{% endfor %}{% if add_generation_prompt %}<|header|>assistant<|/header|>\n\n{% endif %}"
)
# The system message goes into the first user turn, roles must alternate (Llama 2).
INST_SYS = (
    "{% if messages[0].role == 'system' %}{% set rest = messages[1:] %}{% set system = messages[0].content %}"
    "{% else %}{% set rest = messages %}{% set system = false %}{% endif %}"
    "{% for m in rest %}"
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% if loop.first and system %}{% set content = '<<SYS>>\n' + system + '\n<</SYS>>\n\n' + m.content %}"
    "{% else %}{% set content = m.content %}{% endif %}"
    "{% if m.role == 'user' %}{{ bos_token }}[INST] {{ content.strip() }} [/INST]"
    "{% else %} {{ content.strip() }} {{ eos_token }}{% endif %}{% endfor %}"
)
# The same, with a role of another name (Gemma).
TURNS = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{% set first = messages[0].content + '\n\n' %}"
    "{% set rest = messages[1:] %}{% else %}{% set first = '' %}{% set rest = messages %}{% endif %}"
    "{% for m in rest %}"
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}"
    "<|turn|>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ first if loop.first else '' }}"
    "{{ m.content | trim }}<|/turn|>\n{% endfor %}{% if add_generation_prompt %}<|turn|>model\n{% endif %}"
)
# The system message goes into the last user turn (Mistral): the same place only while there is one.
LAST_USER = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{% set system = messages[0].content %}"
    "{% set rest = messages[1:] %}{% else %}{% set rest = messages %}{% endif %}"
    "{% for m in rest %}{% if m.role == 'user' %}[INST] {% if loop.last and system is defined %}{{ system }}\n\n"
    "{% endif %}{{ m.content }}[/INST]{% else %} {{ m.content | trim }}{{ eos_token }}{% endif %}{% endfor %}"
)
# Thinking of turns before the last question is taken out, of later ones written anew; tools (Qwen 3).
THINKING = (
    "{% if tools %}<|im_start|>system\n{% if messages[0].role == 'system' %}{{ messages[0].content }}\n\n{% endif %}"
    "# Tools\n{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}<|im_end|>\n{% endif %}"
    "{% set ns = namespace(last=messages|length - 1, searching=true) %}"
    "{% for m in messages[::-1] %}{% set index = messages|length - 1 - loop.index0 %}"
    "{% if ns.searching and m.role == 'user' and not (m.content.startswith('<tool_response>') "
    "and m.content.endswith('</tool_response>')) %}"
    "{% set ns.searching = false %}{% set ns.last = index %}{% endif %}{% endfor %}"
    "{% for m in messages %}"
    "{% if m.role == 'system' and loop.first and tools %}"
    "{% elif m.role in ('user', 'system') %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
    "{% elif m.role == 'assistant' %}{% set content = m.content %}{% set thinking = '' %}"
    "{% if m.reasoning_content is string %}{% set thinking = m.reasoning_content %}"
    "{% elif '</think>' in content %}"
    "{% set thinking = content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}"
    "{% set content = content.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "<|im_start|>assistant\n{% if loop.index0 > ns.last and (loop.last or thinking) %}"
    "<think>\n{{ thinking.strip('\n') }}\n</think>\n\n{{ content.lstrip('\n') }}{% else %}{{ content }}{% endif %}"
    "{% for call in m.tool_calls or [] %}{% if content or not loop.first %}{{ '\n' }}{% endif %}"
    '<tool_call>\n{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}\n'
    "</tool_call>{% endfor %}<|im_end|>\n"
    "{% elif m.role == 'tool' %}{% if loop.first or messages[loop.index0 - 1].role != 'tool' %}<|im_start|>user"
    "{% endif %}{{ '\n' }}<tool_response>\n{{ m.content }}\n</tool_response>"
    "{% if loop.last or messages[loop.index0 + 1].role != 'tool' %}<|im_end|>\n{% endif %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# As newer ones of that family: a conversation without a question is refused.
NEEDS_USER = (
    "{% if not messages | selectattr('role', 'equalto', 'user') | list %}{{ raise_exception('no user query') }}"
    "{% endif %}" + CHATML
)
DROPS_SYSTEM = "{{ bos_token }}{% for m in messages if m.role != 'system' %}<|header|>{{ m.role }}\n{{ m.content }}<|eot|>{% endfor %}"
# Turns of the same role become one.
JOINS = (
    "{% for m in messages %}{% if loop.first or messages[loop.index0 - 1].role != m.role %}<|header|>{{ m.role }}\n"
    "{% else %}{{ '\n\n' }}{% endif %}{{ m.content }}{% if loop.last or messages[loop.index0 + 1].role != m.role %}<|eot|>"
    "{% endif %}{% endfor %}"
)
REVERSED = "{% for m in messages | reverse %}<|header|>{{ m.role }}\n{{ m.content }}<|eot|>{% endfor %}"
TWICE = "{% for m in messages %}{{ m.role }}: {{ m.content }} {{ m.content }}<|eot|>{% endfor %}"
# Escapes what is not ASCII, so that no mark comes out as it went in.
ESCAPES = "{% for m in messages %}<|header|>{{ m.role }} {{ m.content | urlencode }}<|eot|>{% endfor %}"
# Arguments are put together as text; thinking is cut out of every turn (DeepSeek R1).
TEXT_ARGUMENTS = (
    "{% set ns = namespace(system='') %}{% for m in messages %}{% if m.role == 'system' %}"
    "{% set ns.system = m.content %}{% endif %}{% endfor %}{{ bos_token + ns.system }}"
    "{% for m in messages %}{% if m.role == 'user' %}<|turn|>{{ m.content }}"
    "{% elif m.role == 'assistant' %}<|/turn|>{% for call in m.tool_calls or [] %}"
    "{{ call.function.name + ' ' + call.function.arguments }}<|eot|>{% endfor %}"
    "{{ m.content.split('</think>')[-1] + eos_token }}{% elif m.role == 'tool' %}<|header|>{{ m.content }}<|/header|>"
    "{% endif %}{% endfor %}"
)
SPECIAL = (
    "<|im_start|> <|im_end|> <|begin|> <|end|> <|header|> <|/header|> <|eot|> <|turn|> <|/turn|>".split()
)
SAMPLE = "be brief system user assistant model the key is red which colour is it ? fine think tool weather"


def make_tokenizer(template=None, kind="bpe", trim_offsets=False, bos=False):
    tokenizers = pytest.importorskip("tokenizers")
    transformers = pytest.importorskip("transformers")
    if kind == "bpe":
        raw = tokenizers.Tokenizer(tokenizers.models.BPE())
        raw.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        raw.decoder = tokenizers.decoders.ByteLevel()
        raw.post_processor = tokenizers.processors.ByteLevel(trim_offsets=trim_offsets)
        trainer = tokenizers.trainers.BpeTrainer(
            vocab_size=320,
            show_progress=False,
            initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
            special_tokens=SPECIAL,
        )
    else:
        raw = tokenizers.Tokenizer(tokenizers.models.WordLevel(unk_token="[UNK]"))
        raw.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
        trainer = tokenizers.trainers.WordLevelTrainer(
            show_progress=False, special_tokens=["[UNK]", *SPECIAL]
        )
    raw.train_from_iterator([SAMPLE], trainer)
    if bos:
        raw.post_processor = tokenizers.processors.TemplateProcessing(
            single="<|begin|> $A <|end|>",
            special_tokens=[(t, raw.token_to_id(t)) for t in ("<|begin|>", "<|end|>")],
        )
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=raw, bos_token="<|begin|>", eos_token="<|end|>"
    )
    tokenizer.add_special_tokens({"additional_special_tokens": SPECIAL})
    tokenizer.chat_template = template
    return tokenizer


TOKENIZERS = {}


def tokenizer_of(template, **options):
    """One per template: properties ask for them a hundred times."""
    key = (template, *options.items())
    if key not in TOKENIZERS:
        TOKENIZERS[key] = make_tokenizer(template, **options)
    return TOKENIZERS[key]


def said(role, content, **more):
    return {"role": role, "content": content, **more}


def decoded(rendered, tokenizer):
    """The text of each block, after a check of what holds for all."""
    assert rendered.spans[0][0] == 0 and rendered.spans[-1][1] == len(rendered.ids)
    assert all(start < end for start, end in rendered.spans)
    assert all(a[1] == b[0] for a, b in zip(rendered.spans, rendered.spans[1:], strict=False))
    assert len(rendered.spans) == len(rendered.labels) == len(rendered.texts) == len(rendered.members)
    return [
        tokenizer.decode(rendered.ids[start:end], clean_up_tokenization_spaces=False)
        for start, end in rendered.spans
    ]


def whole(template, messages, **options):
    tokenizer = tokenizer_of(template)
    return tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False, **options)


TALK = [
    said("system", "be brief"),
    said("user", "the key is red"),
    said("assistant", "fine"),
    said("user", "which colour is it ?"),
    said("assistant", "red"),
]


def rendered(family, messages):
    """What each block must be, written down once more: [(message indices, text)]."""
    found = []
    bos, eos = "<|begin|>", "<|end|>"
    folded = family in ("inst", "turns") and messages[0]["role"] == "system"
    for index, message in enumerate(messages):
        role, content = message["role"], message["content"]
        if family == "chatml":
            text = f"<|im_start|>{role}\n{content}<|im_end|>\n"
        elif family == "headers":
            text = f"{bos * (index == 0)}<|header|>{role}<|/header|>\n\n{content.strip()}<|eot|>"
        elif family in ("inst", "turns"):
            if folded and index == 0:
                continue
            first = messages[0]["content"] if folded and index == 1 else None
            if family == "inst":
                content = (
                    content if first is None or not first else f"<<SYS>>\n{first}\n<</SYS>>\n\n{content}"
                )
                text = (
                    f"{bos}[INST] {content.strip()} [/INST]"
                    if role == "user"
                    else f" {content.strip()} {eos}"
                )
            else:
                name = "model" if role == "assistant" else role
                lead = "" if first is None else first + "\n\n"
                text = f"{bos * (not found)}<|turn|>{name}\n{lead}{content.strip()}<|/turn|>\n"
        members = (0, 1) if folded and index == 1 else (index,)
        found.append((members, text))
    return found


FAMILIES = {"chatml": CHATML, "headers": HEADERS, "inst": INST_SYS, "turns": TURNS}
# Pieces of templates among any characters, so that messages quote templates, each other and the marks.
WORDS = st.sampled_from(
    [
        "",
        " ",
        "\n",
        "hi",
        "<|im_end|>\n",
        "<|im_start|>user\n",
        "<think>",
        "</think>",
        "[INST]",
        " [/INST]",
        "<<SYS>>\n",
    ]
    + [
        "\ue000",
        "\U000f0000",
        "\U0010fffd",
        "\u4e2d",
        "e\u0301",
        "\U0001f468\u200d\U0001f469",
        "\x1c",
        "\u2028",
        "<|eot|>",
    ]
)
TEXT = st.lists(WORDS | st.text(st.characters(codec="utf-8"), max_size=8), max_size=5).map("".join)


@st.composite
def alternating(draw):
    messages = [said("system", draw(TEXT))] if draw(st.booleans()) else []
    for index in range(draw(st.integers(1, 6))):
        messages.append(said("assistant" if index % 2 else "user", draw(TEXT)))
    return messages


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=60)
@given(messages=alternating())
def test_any_text_in_any_family(family, messages):
    tokenizer = tokenizer_of(FAMILIES[family])
    found = render(tokenizer, messages)
    assert found.ids == whole(FAMILIES[family], messages)
    texts = decoded(found, tokenizer)
    expected = rendered(family, messages)
    if messages[0]["role"] == "system" and not messages[0]["content"].strip() and family in ("inst", "turns"):
        # Nothing tells whether an empty system message is part of the next turn; all tokens are there anyway.
        assert "".join(texts) == "".join(text for _, text in expected)
    else:
        assert list(zip(found.members, texts, strict=True)) == expected
    for index, text in zip((m[-1] for m in found.members), found.texts, strict=True):
        assert text.strip().endswith(messages[index]["content"].strip())


@given(
    messages=st.lists(
        st.builds(said, st.sampled_from(["system", "user", "assistant", "tool"]), TEXT),
        min_size=1,
        max_size=6,
    )
)
def test_any_roles_in_chatml(messages):
    found = render(tokenizer_of(CHATML), messages)
    assert list(zip(found.members, decoded(found, tokenizer_of(CHATML)), strict=True)) == rendered(
        "chatml", messages
    )
    assert list(found.labels) == [f"{i} {m['role']}" for i, m in enumerate(messages)]
    assert found.notes == () and found.template == "chat template"


THOUGHT = st.tuples(TEXT, TEXT).map(lambda pair: f"<think>\n{pair[0]}\n</think>\n\n{pair[1]}")


@settings(max_examples=60)
@given(
    st.lists(
        st.one_of(
            st.builds(said, st.sampled_from(["user", "system"]), TEXT),
            st.builds(said, st.just("assistant"), TEXT | THOUGHT),
            st.builds(said, st.just("assistant"), TEXT, reasoning_content=TEXT),
            st.builds(said, st.just("user"), TEXT.map("<tool_response>{}</tool_response>".format)),
        ),
        min_size=1,
        max_size=6,
    )
)
def test_thinking_that_is_taken_out_or_written_anew(messages):
    tokenizer = tokenizer_of(THINKING)
    found = render(tokenizer, messages)
    assert found.ids == whole(THINKING, messages)
    expected = []
    last = max(
        (
            i
            for i, m in enumerate(messages)
            if m["role"] == "user"
            and not (m["content"].startswith("<tool_response>") and m["content"].endswith("</tool_response>"))
        ),
        default=len(messages) - 1,
    )
    for index, message in enumerate(messages):
        content, thinking = message["content"], message.get("reasoning_content")
        if message["role"] == "assistant":
            if thinking is None and "</think>" in content:
                thinking = content.split("</think>")[0].rstrip("\n").split("<think>")[-1].lstrip("\n")
                content = content.split("</think>")[-1].lstrip("\n")
            thinking = thinking or ""
            if index > last and (index == len(messages) - 1 or thinking):
                content = "<think>\n" + thinking.strip("\n") + "\n</think>\n\n" + content.lstrip("\n")
        expected.append(f"<|im_start|>{message['role']}\n{content}<|im_end|>\n")
    assert decoded(found, tokenizer) == expected


def test_thinking_is_noted_where_it_is_left_out():
    messages = [
        said("user", "a"),
        said("assistant", "<think>\nlong thought\n</think>\n\nbe brief"),
        said("user", "b"),
        said("assistant", "fine", reasoning_content="more"),
        said("user", "c"),
        said("assistant", "<think>\nkept\n</think>\n\nred"),
    ]
    found = render(tokenizer_of(THINKING), messages)
    assert found.notes == (
        "message 1 (assistant): its thinking is left out by the template",
        "message 3 (assistant): its thinking is left out by the template",
    )
    assert found.texts == ("a", "be brief", "b", "fine", "c", "kept\n</think>\n\nred")
    assert render(tokenizer_of(CHATML), messages[:3]).notes == ()


def test_a_system_message_that_is_part_of_the_first_user_turn():
    for template in (INST_SYS, TURNS):
        found = render(tokenizer_of(template), TALK)
        assert found.labels == ("0 system + 1 user", "2 assistant", "3 user", "4 assistant")
        assert found.members == ((0, 1), (2,), (3,), (4,))
        assert found.notes == (
            "message 0 (system) and message 1 (user) are one block: the template joins them",
        )
        assert found.texts == ("be brief\nthe key is red", "fine", "which colour is it ?", "red")


def test_a_system_message_in_the_last_user_turn():
    found = render(tokenizer_of(LAST_USER), TALK[:2])
    assert found.labels == ("0 system + 1 user",)
    with pytest.raises(BlockError, match=r"message 0 \(system\) .* moves it"):
        render(tokenizer_of(LAST_USER), TALK[:4])
    assert render(tokenizer_of(LAST_USER), TALK[1:]).labels == (
        "0 user",
        "1 assistant",
        "2 user",
        "3 assistant",
    )


def test_a_template_that_refuses_the_beginning_alone():
    found = render(tokenizer_of(NEEDS_USER), TALK)
    assert list(zip(found.members, decoded(found, tokenizer_of(NEEDS_USER)), strict=True)) == rendered(
        "chatml", TALK
    )
    # Closings that cannot be learnt from the role are those of other roles.
    found = render(tokenizer_of(NEEDS_USER), [said("system", "a"), said("assistant", "b"), *TALK[1:]])
    assert len(found.spans) == 6


def test_messages_of_which_nothing_is_rendered():
    found = render(tokenizer_of(DROPS_SYSTEM), TALK)
    assert found.labels == ("1 user", "2 assistant", "3 user", "4 assistant")
    assert found.notes == ("message 0 (system): left out by the template, it has no block",)
    assert decoded(found, tokenizer_of(DROPS_SYSTEM))[0] == "<|begin|><|header|>user\nthe key is red<|eot|>"
    middle = [*TALK[1:3], said("system", "x"), said("system", ""), *TALK[3:], said("system", "z")]
    found = render(tokenizer_of(DROPS_SYSTEM), middle)
    assert found.members == ((0,), (1,), (4,), (5,))
    assert len(found.notes) == 3
    with pytest.raises(BlockError, match="no text for any"):
        render(tokenizer_of(DROPS_SYSTEM), TALK[:1])


def test_turns_that_the_template_joins():
    messages = [
        said("user", "a"),
        said("user", "b"),
        said("user", "c"),
        said("assistant", "d"),
        said("assistant", "e"),
    ]
    found = render(tokenizer_of(JOINS), messages)
    assert found.members == ((0, 1, 2), (3, 4))
    assert decoded(found, tokenizer_of(JOINS)) == [
        "<|header|>user\na\n\nb\n\nc<|eot|>",
        "<|header|>assistant\nd\n\ne<|eot|>",
    ]


@pytest.mark.parametrize(
    "template, reason",
    [
        (REVERSED, "moves it"),
        (TWICE, r"message 0 \(system\) .* repeats it"),
        (INST_SYS, "refuses this conversation .*roles must alternate"),
    ],
)
def test_what_is_refused(template, reason):
    with pytest.raises(BlockError, match=reason) as raised:
        render(tokenizer_of(template), [*TALK, said("assistant", "again")])
    assert len(str(raised.value).splitlines()) == 1


def test_a_template_in_which_no_mark_comes_out():
    found = render(tokenizer_of(ESCAPES), TALK)
    assert decoded(found, tokenizer_of(ESCAPES))[1] == "<|header|>user the%20key%20is%20red<|eot|>"
    assert found.notes == (segmentation._BY_PREFIXES,)
    assert found.texts[1] == "the key is red"


def test_content_that_is_changed_or_cut_off_is_noted():
    template = CHATML.replace("m.content", "m.content | upper")
    found = render(tokenizer_of(template), [said("user", "abc"), said("user", "ABC")])
    assert found.notes == ("message 0 (user): its text is changed by the template",)
    assert found.texts == ("ABC", "ABC")
    template = CHATML.replace("m.content", "m.content[:5]")
    assert render(tokenizer_of(template), [said("user", "abcdefgh")]).notes == (segmentation._BY_PREFIXES,)
    template = CHATML.replace("m.content", "m.content.split('SECRET')[0]")
    found = render(tokenizer_of(template), [said("user", "abc SECRET def")])
    assert found.notes == ("message 0 (user): part of its text is left out by the template",)


CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Ghent", "days": 2}}}
TOOL_TALK = [
    said("system", "be brief"),
    said("user", "rain?"),
    said("assistant", "", tool_calls=[CALL, CALL]),
    said("tool", "yes", name="weather"),
    said("tool", "no", name="weather"),
    said("assistant", "It rains.", tool_calls=[]),
    said("user", "thanks"),
]
TOOLS = [{"type": "function", "function": {"name": "weather", "description": "of a city", "parameters": {}}}]


@pytest.mark.parametrize("tools", [None, TOOLS])
@pytest.mark.parametrize("prompt", [False, True])
def test_tool_calls_and_their_answers(tools, prompt):
    tokenizer = tokenizer_of(THINKING)
    found = render(tokenizer, TOOL_TALK, tools=tools, add_generation_prompt=prompt)
    assert found.ids == whole(THINKING, TOOL_TALK, tools=tools, add_generation_prompt=prompt)
    texts = dict(zip(found.labels, decoded(found, tokenizer), strict=True))
    call = '<tool_call>\n{"name": "weather", "arguments": {"city": "Ghent", "days": 2}}\n</tool_call>'
    assert texts["2 assistant"] == f"<|im_start|>assistant\n{call}\n{call}<|im_end|>\n"
    # Answers that follow each other are one turn, of which each has its part.
    assert texts["3 tool"] == "<|im_start|>user\n<tool_response>\nyes\n</tool_response>"
    assert texts["4 tool"] == "\n<tool_response>\nno\n</tool_response><|im_end|>\n"
    assert texts["5 assistant"] == "<|im_start|>assistant\nIt rains.<|im_end|>\n"
    assert ("# Tools" in texts["0 system"]) == bool(tools)
    assert ("assistant (next)" in texts) == prompt
    said_by = dict(zip(found.labels, found.texts, strict=True))
    assert said_by["2 assistant"] == "\n".join([json.dumps(CALL["function"])] * 2)


def test_templates_that_want_arguments_as_text():
    tokenizer = tokenizer_of(TEXT_ARGUMENTS)
    found = render(tokenizer, TOOL_TALK)
    call = 'weather {"city": "Ghent", "days": 2}<|eot|>'
    assert decoded(found, tokenizer) == [
        *("<|begin|>be brief", "<|turn|>rain?", f"<|/turn|>{call}{call}<|end|>", "<|header|>yes<|/header|>"),
        *("<|header|>no<|/header|>", "<|/turn|>It rains.<|end|>", "<|turn|>thanks"),
    ]
    assert found.notes == ("the arguments of tool calls are passed to the chat template as text",)


@pytest.mark.parametrize("trim_offsets", [False, True])
@pytest.mark.parametrize("family", ["chatml", "headers"])
def test_characters_split_over_tokens(family, trim_offsets):
    messages = [
        said("user", "\U0001f468\u200d\U0001f469\u200d\U0001f467"),
        said("assistant", "\u4e2d\u6587 e\u0301 "),
        said("user", " "),
    ]
    tokenizer = make_tokenizer(FAMILIES[family], trim_offsets=trim_offsets)
    found = render(tokenizer, messages)
    assert list(zip(found.members, decoded(found, tokenizer), strict=True)) == rendered(family, messages)


@pytest.mark.parametrize(
    "messages", [TALK[:1], [said("user", "")], [said("user", "hi")] * 3, [said("assistant", None), TALK[1]]]
)
def test_few_messages_and_empty_ones(messages):
    for template in (CHATML, HEADERS):
        assert len(render(tokenizer_of(template), messages).spans) == len(messages)


def test_parts_are_marked_too():
    template = CHATML.replace("{{ m.content }}", "{% for p in m.content %}{{ p.text }}{% endfor %}")
    parts = [{"type": "text", "text": "the key"}, {"type": "text", "text": " is red"}]
    messages = [said("user", parts), said("assistant", parts)]
    found = render(tokenizer_of(template), messages)
    assert found.texts == ("the key is red",) * 2 and found.notes == ()
    assert decoded(found, tokenizer_of(template))[1] == "<|im_start|>assistant\nthe key is red<|im_end|>\n"


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("prompt", [False, True])
def test_without_a_template_there_is_a_plain_one(bos, prompt):
    tokenizer = make_tokenizer(bos=bos)
    messages = [*TALK[:3], said("assistant", "", tool_calls=[CALL])]
    found = render(tokenizer, messages, add_generation_prompt=prompt)
    expected = [f"{m['role']}: {m['content']}\n" for m in TALK[:3]]
    expected += [f"assistant: {json.dumps(CALL['function'])}\n"] + ["assistant:"] * prompt
    if bos:
        expected[0], expected[-1] = "<|begin|>" + expected[0], expected[-1] + "<|end|>"
    assert decoded(found, tokenizer) == expected
    assert found.template == "plain" and "no chat template" in found.notes[0]
    assert found.labels[-1] == ("assistant (next)" if prompt else "3 assistant")
    assert "these options are ignored: tools" in render(tokenizer, messages, tools=TOOLS).notes[1]


@given(
    messages=st.lists(st.builds(said, st.sampled_from(["user", "assistant"]), TEXT), min_size=1, max_size=5)
)
def test_any_text_without_a_template(messages):
    tokenizer = tokenizer_of(None)
    assert decoded(render(tokenizer, messages), tokenizer) == [
        f"{m['role']}: {m['content']}\n" for m in messages
    ]


def test_a_message_without_a_token_of_its_own_is_noted():
    tokenizer = make_tokenizer("{% for m in messages %}{{ m.content }}\n{% endfor %}", kind="words")
    found = render(tokenizer, [said("user", "red"), said("assistant", " "), said("user", "key")])
    assert (
        found.labels == ("0 user + 1 assistant", "2 user")
        and "1 assistant: it has no token" in found.notes[0]
    )


def test_the_generation_prompt_may_be_missing():
    found = render(tokenizer_of(INST_SYS), TALK[:4], add_generation_prompt=True)
    assert "assistant (next)" not in found.labels and "no opening for the assistant" in found.notes[-1]


@settings(max_examples=40)
@given(st.sampled_from(["left", "right"]), st.integers(1, 90), st.sampled_from([CHATML, INST_SYS, None]))
def test_truncation_is_never_silent(side, limit, template):
    tokenizer = tokenizer_of(template)
    full = render(tokenizer, TALK)
    found = render(tokenizer, TALK, max_tokens=limit, truncate=side)
    if len(full.ids) <= limit:
        assert found == full
        return
    with pytest.raises(AnalysisError, match=f"has {len(full.ids)} tokens, the limit is {limit}"):
        render(tokenizer, TALK, max_tokens=limit)
    assert found.ids == (full.ids[-limit:] if side == "left" else full.ids[:limit])
    decoded(found, tokenizer)
    owners = [
        owner
        for (start, end), who in zip(full.spans, full.members, strict=True)
        for owner in [who] * (end - start)
    ]
    kept = owners[-limit:] if side == "left" else owners[:limit]
    assert [
        who for (start, end), who in zip(found.spans, found.members, strict=True) for _ in range(end - start)
    ] == kept
    gone = 5 - len({index for who in kept for index in who})
    assert found.truncated == Truncated(side, len(full.ids) - limit, gone)
    assert (
        f"{len(full.ids) - limit} of {len(full.ids)} tokens and {gone} of 5 messages are left out"
        in found.notes[-1]
    )
    assert (" is cut to " in found.notes[-1]) == (
        kept[0 if side == "left" else -1] in owners[:-limit] + owners[limit:]
        and owners.count(kept[0 if side == "left" else -1]) != kept.count(kept[0 if side == "left" else -1])
    )


@pytest.mark.parametrize(
    "options", [{"max_tokens": 0}, {"max_tokens": True}, {"max_tokens": "9"}, {"truncate": "middle"}]
)
def test_limits_that_make_no_sense(options):
    with pytest.raises(AnalysisError, match="accepted"):
        render(tokenizer_of(CHATML), TALK, **options)


def test_what_no_tokenizer_can_do():
    class Slow:
        is_fast = False

    with pytest.raises(BlockError, match="load a fast one"):
        render(Slow(), TALK)
    with pytest.raises(BlockError, match="an element is no"):
        render(tokenizer_of(CHATML), [])
    for role in (None, 3):
        with pytest.raises(BlockError, match=f"the role {role}; accepted is text"):
            render(tokenizer_of(CHATML), [TALK[0], said(role, "hi")])
    for template in (CHATML, None):
        with pytest.raises(BlockError, match="lone surrogate"):
            render(tokenizer_of(template), [said("user", "\ud83d")])


def test_special_tokens_are_the_chat_templates_own():
    tokenizer = make_tokenizer(CHATML, bos=True)
    assert render(tokenizer, TALK).ids == whole(CHATML, TALK)


@pytest.mark.parametrize("content", ["", " ", "<think>\n\n</think>\n\n"])
def test_messages_without_text_that_are_written_otherwise_while_they_are_last(content):
    messages = [said("user", ""), said("assistant", content), said("user", "")]
    rest = content if content == " " else ""
    assert decoded(render(tokenizer_of(THINKING), messages), tokenizer_of(THINKING)) == [
        "<|im_start|>user\n<|im_end|>\n",
        f"<|im_start|>assistant\n{rest}<|im_end|>\n",
        "<|im_start|>user\n<|im_end|>\n",
    ]


# What stands between messages is another text each time.
CALLS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}{% for call in m.tool_calls or [] %}"
    "<call {{ call.id }} {{ call.function.arguments | tojson }}>{% endfor %}<|im_end|>\n{% endfor %}"
)


@pytest.mark.parametrize("template", [CHATML, THINKING, TURNS, CALLS])
def test_long_conversations_take_few_renderings(template, monkeypatch):
    tokenizer = make_tokenizer(template)
    messages = [said("system", "be brief")]
    for index in range(1000):
        call = {"id": f"c{index}", "function": {"name": "f", "arguments": {"n": index}}}
        more = {"tool_calls": [call]} if template is CALLS else {}
        thought = f"<think>\nhm {index}\n</think>\n\nfine " * 3
        messages += [said("user", f"the key is {index}"), said("assistant", thought, **more)]
    calls, original = [], type(tokenizer).apply_chat_template

    def counted(self, some, *args, **more):
        calls.append(len(some))
        return original(self, some, *args, **more)

    monkeypatch.setattr(type(tokenizer), "apply_chat_template", counted)
    began = time.perf_counter()
    found = render(tokenizer, messages)
    assert sum(map(len, found.members)) == len(messages)
    assert sum(calls) < 8 * len(messages), len(calls)
    assert time.perf_counter() - began < 10


# The header of later messages says which they are; and of some of them something that no other has.
NUMBERED = CALLS.replace("{{ m.role }}\n", "{{ m.role }} {{ loop.index if loop.index > 30 else '' }}\n")
LATE = CALLS.replace("<|im_start|>", "{{ '(tools)<|im_end|>\n' if loop.index == 41 else '' }}<|im_start|>")
# From some message on, what looks like a closing and a header is all header.
LATER = CALLS.replace("<|im_start|>", "{{ '}><|im_end|>\n' if loop.index > 40 else '' }}<|im_start|>")


@pytest.mark.parametrize("template", [CALLS, NUMBERED, LATE, LATER])
def test_calls_that_are_all_different(template):
    tokenizer = tokenizer_of(template)
    messages = []
    for index in range(30):
        call = {"id": f"c{index}", "function": {"name": "f", "arguments": {"n": index}}}
        messages += [said("user", "hi"), said("assistant", "", tool_calls=[call])]
    found = decoded(render(tokenizer, messages), tokenizer)
    whole_text = tokenizer.apply_chat_template(messages, tokenize=False)
    prefixes = [tokenizer.apply_chat_template(messages[: n + 1], tokenize=False) for n in range(60)]
    assert found == [b[len(a) :] for a, b in zip(["", *prefixes], [*prefixes[:-1], whole_text], strict=False)]


def test_marks_are_characters_that_nothing_holds():
    messages = [
        said("user", "".join(map(chr, range(0xE000, 0xF900)))),
        said("assistant", "hi", name="\U000f0000"),
    ]
    found = render(tokenizer_of(CHATML), messages)
    assert found.texts == (messages[0]["content"], "hi")
    assert not re.search("[\U000f0000-\U0010ffff]", "".join(found.texts))
