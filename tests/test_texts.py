"""Blocks.texts: the documents of a prompt. Positions of tokens are found by hand, from the tokens' own characters."""

import json
import pathlib
import random

import pytest
import torch
import transformers
from test_blocks import CHATML, make_tokenizer

import attnpatch
from attnpatch.blocks.spec import Blocks
from attnpatch.errors import BlockError

DEMO = pathlib.Path(attnpatch.__file__).parent / "demo"
DOCS = ["the key is red", "fine", "which colour is it ?"]


@pytest.fixture(scope="module")
def demo():
    model = transformers.AutoModelForCausalLM.from_pretrained(
        DEMO / "model", attn_implementation="eager", dtype="float32"
    )
    return model.eval(), transformers.AutoTokenizer.from_pretrained(DEMO / "model")


@pytest.fixture(scope="module", params=["bpe", "words"])
def tokenizer(request):
    return make_tokenizer(CHATML, kind=request.param)


def parts(blocks, ids, tokenizer):
    """Label and decoded tokens of each block."""
    (spans,), (labels,) = blocks.spans_by_sequence, blocks.labels_by_sequence
    return {
        label: tokenizer.decode(ids[start:end]).strip()
        for label, (start, end) in zip(labels, spans, strict=True)
    }


# ------------------------------------------------------------------------------------------------------ what is found


def test_texts_of_a_prompt(tokenizer):
    prompt = "be brief the key is red\nfine\nwhich colour is it ? it is"
    ids = tokenizer(prompt)["input_ids"]
    found = parts(Blocks.texts(tokenizer, prompt, DOCS), ids, tokenizer)
    named = {name: text.removeprefix("<|begin|>").strip() for name, text in found.items() if text}
    assert named == {
        "question, before doc 1": "be brief",
        **{f"doc {number}": text for number, text in enumerate(DOCS, 1)},
        "question": "it is",
    }
    assert Blocks.texts(tokenizer, prompt, DOCS).spans_by_sequence[0][-1][1] == len(ids)


def test_order_of_the_prompt_and_labels(tokenizer):
    prompt = "which colour is it ? fine the key is red"
    blocks = Blocks.texts(tokenizer, prompt, DOCS, labels=["a", "b", "c"], rest="more")
    kept = [label for label in blocks.labels_by_sequence[0] if "before" not in label]
    assert kept == ["c", "b", "a"]
    assert "more" not in kept  # nothing is after the last text


@pytest.mark.parametrize("kind", ["text", "ids", "tensor", "messages"])
def test_kinds_of_prompts(kind):
    tokenizer = make_tokenizer(CHATML)
    messages = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "\n".join(DOCS) + "\nis it red"},
    ]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    prompt = {
        "text": tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False),
        "ids": ids,
        "tensor": torch.tensor([ids]),
        "messages": messages,
    }[kind]
    options = {"add_generation_prompt": True} if kind == "messages" else {}
    blocks = Blocks.texts(tokenizer, prompt, DOCS, **options)
    found = parts(blocks, ids, tokenizer)
    assert [found[f"doc {number}"] for number in (1, 2, 3)] == DOCS
    assert found["question"].endswith("assistant") and "is it red" in found["question"]
    # With the texts, as they are in the prompt.
    (texts,) = blocks.texts_by_sequence
    assert "".join(texts) == tokenizer.decode(ids)
    assert texts[1] == DOCS[0]


def test_a_batch():
    tokenizer = make_tokenizer(CHATML)
    prompts = ["fine the key is red", "be brief fine"]
    blocks = Blocks.texts(tokenizer, prompts, [["fine"], ["be brief", "fine"]], labels=[["x"], ["y", "z"]])
    assert blocks.labels_by_sequence == (("x", "question"), ("y", "z"))
    assert blocks.per_sequence
    with pytest.raises(BlockError, match="differ in number"):
        Blocks.texts(tokenizer, prompts, [["fine"]])
    with pytest.raises(BlockError, match="differ in number"):
        Blocks.texts(tokenizer, "fine", [["fine"]])


@pytest.mark.parametrize(
    ("prompt", "texts", "labels"),
    [
        # Given twice and there twice: in order.
        ("fine\nfine", ["fine", "fine"], ["doc 1", "question, before doc 2", "doc 2"]),
        # Inside a longer text it is not there by itself.
        ("it is fine here fine", ["it is fine here", "fine"], ["doc 1", "doc 2"]),
        # The prompt lacks the white space around it.
        ("fine", ["  fine\n"], ["doc 1"]),
    ],
)
def test_texts_that_are_there_several_times(prompt, texts, labels):
    assert list(Blocks.texts(make_tokenizer(CHATML), prompt, texts).labels_by_sequence[0]) == labels


def border_tokenizer():
    """Tokens that join the end of a text with what follows it."""
    tokenizers = pytest.importorskip("tokenizers")
    words = [
        "[UNK]",
        "red",
        ".</",
        "doc",
        ">",
        "The",
        ">The",
        "key",
        "keyring",
        "ring",
        " ",
        "<",
        ".",
        "/",
        " (",
        ")",
    ]
    raw = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({word: i for i, word in enumerate(words)}, "[UNK]")
    )
    pattern = r"\.</| \(|>The|keyring|\w+|\s|."
    raw.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated")
    return transformers.PreTrainedTokenizerFast(tokenizer_object=raw)


@pytest.mark.parametrize(
    ("prompt", "text", "tokens"),
    [
        ("<doc>The red.</doc>", "The red.", slice(2, 6)),  # ">The" has the text's letters; ".</" begins in it
        ("<doc>red</doc>", "red", slice(3, 4)),
        ("key red", "red", slice(2, 3)),
        ("key (red)", "(red)", slice(1, 4)),  # " (" is the text's, because white space is nobody's
    ],
)
def test_a_token_on_a_border(prompt, text, tokens):
    tokenizer = border_tokenizer()
    blocks = Blocks.texts(tokenizer, prompt, [text])
    place = blocks.labels_by_sequence[0].index("doc 1")
    assert slice(*blocks.spans_by_sequence[0][place]) == tokens


CORPUS = [
    "The fog over Ghent was so thick that I could not see the tram.",
    "Rosa's team is called Cheerful Crystal Kettle.",
    "Please note: locker 77 46 54!",
    "A (very) odd <doc>one</doc>.",
]


def trained(kind):
    """A tokenizer of a common kind, trained on the documents."""
    tk = pytest.importorskip("tokenizers")
    more = {"special_tokens": ["<s>", "</s>", "<unk>"]}
    if kind.startswith("bytes"):
        raw, trainer = tk.Tokenizer(tk.models.BPE()), tk.trainers.BpeTrainer(vocab_size=600, **more)
        raw.pre_tokenizer, raw.decoder = (
            tk.pre_tokenizers.ByteLevel(add_prefix_space=False),
            tk.decoders.ByteLevel(),
        )
        raw.post_processor = tk.processors.ByteLevel(trim_offsets=kind == "bytes, trimmed")
        trainer.initial_alphabet = tk.pre_tokenizers.ByteLevel.alphabet()
    elif kind == "sentencepiece":
        raw = tk.Tokenizer(tk.models.Unigram())
        raw.normalizer = tk.normalizers.NFKC()
        raw.pre_tokenizer, raw.decoder = tk.pre_tokenizers.Metaspace(), tk.decoders.Metaspace()
        trainer = tk.trainers.UnigramTrainer(vocab_size=200, unk_token="<unk>", show_progress=False, **more)
    else:
        raw = tk.Tokenizer(tk.models.WordPiece(unk_token="<unk>"))
        raw.normalizer, raw.pre_tokenizer = (
            tk.normalizers.BertNormalizer(),
            tk.pre_tokenizers.BertPreTokenizer(),
        )
        raw.decoder = tk.decoders.WordPiece()
        trainer = tk.trainers.WordPieceTrainer(vocab_size=300, show_progress=False, **more)
    raw.train_from_iterator(CORPUS, trainer)
    if not kind.startswith("bytes"):
        raw.post_processor = tk.processors.TemplateProcessing(
            single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
        )
    return transformers.PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>")


def letters(text):
    return "".join(letter for letter in text.lower() if letter.isalnum())


@pytest.mark.parametrize("kind", ["bytes", "bytes, trimmed", "sentencepiece", "wordpiece"])
def test_tokens_of_a_block_spell_its_text(kind):
    """Whatever the tokenizer, and whatever is between the texts: the decoded tokens have the text's letters."""
    tokenizer, choose = trained(kind), random.Random(0)
    for _ in range(60):
        docs = choose.sample(CORPUS, choose.randint(1, 3))
        between = choose.choice([" ", "\n", "\n\n", " | ", "</d><d>", ""])
        prompt = (
            choose.choice(["", "Read: ", "<d>"])
            + between.join(docs)
            + choose.choice(["", " Who?", "</d>Who"])
        )
        order = choose.sample(docs, len(docs))
        blocks, ids = Blocks.texts(tokenizer, prompt, order), tokenizer(prompt)["input_ids"]
        (spans,), (labels,) = blocks.spans_by_sequence, blocks.labels_by_sequence
        assert [token for start, end in spans for token in ids[start:end]] == ids
        found = {
            label: tokenizer.decode(ids[start:end]) for label, (start, end) in zip(labels, spans, strict=True)
        }
        for number, doc in enumerate(order, 1):
            assert letters(found[f"doc {number}"]) == letters(doc), prompt


# ----------------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("prompt", "texts", "said"),
    [
        ("the key is red", ["blue"], r"'doc 1' is not in the prompt \('blue'\)"),
        ("fine fine", ["fine"], "'doc 1' is 2 times in the prompt and 1 times in the texts"),
        ("fine", ["fine", "fine"], "'doc 1' is 1 times in the prompt and 2 times in the texts"),
        ("the key is red", ["the key is", "key"], "'doc 2' is only inside another text"),
        ("the key is red", ["the key is", "is red"], "'doc 1' and 'doc 2' overlap"),
        ("the key is red", ["the key is red", ""], "'doc 2' is empty"),
        ("the key", [], "at least one"),
        ("the key", "the key", "accepted is a list of strings"),
        ("the key", ["key", 3], "not a string"),
        (["the", 3], ["key"], "accepted is a string, chat messages, or token ids"),
        ([], ["key"], "accepted is a string, chat messages, or token ids"),
    ],
)
def test_what_is_refused(prompt, texts, said):
    with pytest.raises(BlockError, match=said) as error:
        Blocks.texts(make_tokenizer(CHATML), prompt, texts)
    assert "\n" not in str(error.value)


def test_borders_inside_words_are_refused():
    tokenizer = border_tokenizer()
    for text in ("key", "ring"):
        with pytest.raises(BlockError, match="inside token 0, 'keyring'"):
            Blocks.texts(tokenizer, "keyring red", [text])
    with pytest.raises(BlockError, match="'doc 1' has no token of its own"):
        Blocks.texts(tokenizer, "red.</", ["</"])


def test_tokenizers_and_options_that_do_not_fit():
    tokenizer = make_tokenizer(None)
    with pytest.raises(BlockError, match="no chat template"):
        Blocks.texts(tokenizer, [{"role": "user", "content": "fine"}], ["fine"])
    with pytest.raises(BlockError, match="labels is"):
        Blocks.texts(tokenizer, "fine", ["fine"], labels=["a", "b"])
    with pytest.raises(BlockError, match="a label for each"):
        Blocks.texts(tokenizer, "fine", ["fine"], rest="")
    ids = tokenizer("be brief fine")["input_ids"]
    with pytest.raises(BlockError, match="not for token ids"):
        Blocks.texts(tokenizer, ids, ["fine"], add_special_tokens=False)
    apart = [tokenizer.convert_tokens_to_ids(letter) for letter in "fine"]  # no tokenizer's choice
    with pytest.raises(BlockError, match="not what the tokenizer makes of their text"):
        Blocks.texts(tokenizer, [*ids, *apart], ["be brief"])
    tokenizer.pad_token = "<|eot|>"
    with pytest.raises(BlockError, match="padding"):
        Blocks.texts(tokenizer, [tokenizer.pad_token_id, *ids], ["fine"])


def test_a_slow_tokenizer_is_refused(tmp_path):
    (tmp_path / "vocab.txt").write_text("\n".join(["[UNK]", "fine", "[PAD]", "[CLS]", "[SEP]", "[MASK]"]))
    slow = transformers.models.bert_japanese.BertJapaneseTokenizer(
        str(tmp_path / "vocab.txt"), word_tokenizer_type="basic", subword_tokenizer_type="wordpiece"
    )
    assert not slow.is_fast
    with pytest.raises(BlockError, match="no character offsets"):
        Blocks.texts(slow, "fine", ["fine"])


# ------------------------------------------------------------------------------------------- maps, with their texts


def dense(model, ids, **inputs):
    """The mean over heads of the model's own probabilities, one per layer."""
    with torch.no_grad():
        found = model(ids, output_attentions=True, use_cache=False, **inputs).attentions
    return [one.double().mean(1) for one in found]


def rag(count=4):
    messages = json.loads((DEMO / "conversation.json").read_text())["messages"]
    docs = [messages[index]["content"] for index in range(3, 3 + 2 * count, 2)]
    question = "What is the name of Petra's team?"
    return [{"role": "user", "content": f"{' '.join(docs)} {question}"}], docs


def by_hand(tokenizer, ids, docs):
    """The block of each token: texts are spelled from tokens, one after the other."""
    spelled = [tokenizer.decode([token]) for token in ids]
    ends = [sum(map(len, spelled[: place + 1])) for place in range(len(ids))]
    text = "".join(spelled)
    block = []
    for token, end in zip(spelled, ends, strict=True):
        first = end - len(token.lstrip() or token)
        hit = [k for k, doc in enumerate(docs) if text.index(doc) <= first < text.index(doc) + len(doc)]
        block.append(hit[0] if hit else ("before" if first < text.index(docs[0]) else "after"))
    return block


def test_map_of_an_answer_over_documents(demo):
    """The model's own softmax, summed by a loop; generated tokens are the last block."""
    model, tokenizer = demo
    messages, docs = rag()
    given = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    blocks = Blocks.texts(tokenizer, messages, docs, add_generation_prompt=True)
    with attnpatch.capture(model, blocks=blocks) as maps, torch.no_grad():
        whole = model.generate(**given, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    prompt = given["input_ids"][0].tolist()
    # The last token that generate returns was never given to the model.
    place = [*by_hand(tokenizer, prompt, docs), *["answer"] * 3]
    names = ["before", *range(len(docs)), "after", "answer"]
    found = maps.block_map
    assert found.query_labels == (
        "question, before doc 1", *(f"doc {k + 1}" for k in range(len(docs))), "question", "answer",
    )  # fmt: skip
    for layer, weights in enumerate(dense(model, whole[:, :-1])):
        for i, query in enumerate(names):
            rows = [t for t, name in enumerate(place) if name == query]
            for j, key in enumerate(names):
                columns = [t for t, name in enumerate(place) if name == key]
                expected = sum(float(weights[0, r, c]) for r in rows for c in columns) / len(rows)
                assert abs(float(found.mass[layer, i, j]) - expected) < 1e-5
    assert found.metadata["texts"][1:-2] == docs
    assert found.metadata["texts"][-1] == "answer"
    assert found.metadata["texts"][-2] == " What is the name of Petra's team?<|end|><|assistant|>"


def test_texts_of_messages_and_words(demo, tmp_path):
    model, tokenizer = demo
    messages = [{"role": "user", "content": "Good morning!"}, {"role": "assistant", "content": "Noted."}]
    given = tokenizer.apply_chat_template(messages, return_tensors="pt", return_dict=True)
    for generated, more in ((0, []), (2, ["assistant (next)"])):
        with attnpatch.capture(model, blocks=Blocks.messages(tokenizer, messages)) as maps, torch.no_grad():
            if generated:
                model.generate(
                    **given, max_new_tokens=generated + 1, min_new_tokens=generated + 1, do_sample=False
                )
            else:
                model(**given)
        assert maps.block_map.metadata["texts"] == ["Good morning!", "Noted.", *more]
        # Saved, and in the page.
        maps.block_map.save(tmp_path / "map.safetensors")
        assert attnpatch.BlockMap.load(tmp_path / "map.safetensors") == maps.block_map
    text = "The fog over Ghent"
    with (
        attnpatch.capture(model, blocks=Blocks.words(tokenizer, text)) as maps,
        torch.no_grad(),
    ):
        model(**tokenizer(text, return_tensors="pt"))
    assert maps.block_map.metadata["texts"] == text.split()


def test_texts_of_a_batch(demo):
    """One list per sequence, also if the sequences have different numbers of blocks; padding is in none."""
    model, tokenizer = demo
    prompts = ["The fog over Ghent was thick.", "Good morning!"]
    tokenizer.padding_side = "left"
    given = tokenizer(prompts, return_tensors="pt", padding=True)
    texts = [["The fog", "was thick."], ["morning!"]]
    with (
        attnpatch.capture(model, blocks=Blocks.texts(tokenizer, prompts, texts)) as maps,
        torch.no_grad(),
    ):
        model(**given)
    assert maps.block_map.metadata["texts"] == [
        ["The fog", " over Ghent ", "was thick."],
        ["Good ", "morning!"],
    ]
    assert [len(labels) for labels in maps.block_map.query_labels] == [3, 2]


def test_texts_of_each_side(demo):
    """Blocks of queries and keys that differ have their texts apart, if they are known."""
    model, tokenizer = demo
    text = "The fog over Ghent"
    words, fixed = Blocks.words(tokenizer, text), Blocks.fixed(3)
    texts = Blocks.texts(tokenizer, text, ["fog", "over"])
    for blocks, expected in (
        (fixed, {}),
        ((words, fixed), {"query_texts": text.split()}),
        ((fixed, words), {"key_texts": text.split()}),
        ((words, texts), {"query_texts": text.split(), "key_texts": ["The ", "fog", "over", " Ghent"]}),
        ((words, words), {"texts": text.split()}),
    ):
        with attnpatch.capture(model, blocks=blocks) as maps, torch.no_grad():
            model(**tokenizer(text, return_tensors="pt"))
        metadata = maps.block_map.metadata
        assert {name: metadata[name] for name in metadata if "texts" in name} == expected
