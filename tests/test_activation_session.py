"""What goes on inside an active process: which models are patched, what is captured, what is reported."""

import copy
import gc
import os
import pickle
import threading
import weakref

import pytest
import torch
import zoo
from torch import nn
from transformers import (
    BertConfig,
    BertLMHeadModel,
    BertModel,
    EncoderDecoderModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)

import attnpatch
from attnpatch import BlockMap, Blocks, Policy
from attnpatch.activation import session as sessions
from attnpatch.activation.closing import closing_lines
from attnpatch.activation.files import Folder
from attnpatch.activation.session import Session
from attnpatch.activation.settings import Settings
from attnpatch.patching.forward_swap import STATE, put_in, sites_of
from attnpatch.patching.patch import patch_of

LLAMA = LlamaConfig(
    vocab_size=97, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=512,
)  # fmt: skip
BERT = BertConfig(
    vocab_size=97, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4
)
T5 = T5Config(vocab_size=97, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, decoder_start_token_id=0)
IDS = zoo.tokens(40)


@pytest.fixture
def active(monkeypatch, tmp_path):
    """A session that sees every model of this process, as the start-up file would begin it."""

    def begin(**settings):
        session = Session(Settings(**{"quiet": True, **settings}))
        original = PreTrainedModel.post_init

        def post_init(self):
            original(self)
            session.built(self)

        monkeypatch.setattr(PreTrainedModel, "post_init", post_init)
        monkeypatch.setattr(sessions, "_session", session)
        return session

    return begin


@pytest.fixture
def capturing(active, tmp_path):
    return active(capture=str(tmp_path), blocks=16, policy=Policy(mode="never"))


def roots(model):
    """Paths of the modules that are patched as models."""
    return [name for name, module in model.named_modules() if any(site.is_root for site in sites_of(module))]


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def same(file, block_map):
    saved = BlockMap.load(file)
    assert torch.equal(saved.mass, block_map.mass)
    assert (saved.query_labels, saved.layers) == (block_map.query_labels, block_map.layers)


def generate(model, new=5):
    return model.generate(IDS, max_new_tokens=new, min_new_tokens=new, do_sample=False)


# ------------------------------------------------------------------------------------------- what is patched


def test_nested_models_are_one_patch(active):
    session = active(policy=Policy(min_tokens=7))
    model = LlamaForCausalLM(LLAMA)
    assert roots(model) == [""]
    assert patch_of(model).policy == Policy(min_tokens=7)
    assert list(session.patches.values()) == [patch_of(model)]


def test_a_model_of_models_is_one_patch(active):
    session = active()
    encoder, decoder = (
        BertModel(BERT),
        BertLMHeadModel(BertConfig(**{**BERT.to_dict(), "is_decoder": True, "add_cross_attention": True})),
    )
    assert roots(encoder) == roots(decoder) == [""]
    model = EncoderDecoderModel(encoder=encoder, decoder=decoder)
    assert roots(model) == [""]
    assert len(session.patches) == 1
    with torch.no_grad():
        model(input_ids=IDS, decoder_input_ids=IDS)
        encoder(IDS)
    assert attnpatch.report(model).totals["native"] == 2 + 4 + 2


def test_attention_added_after_post_init_is_patched_at_the_first_call(active):
    active(policy=Policy(mode="always"))

    class Longer(LlamaForCausalLM):
        def __init__(self, config):
            super().__init__(config)
            self.more_attention = nn.MultiheadAttention(32, 4, batch_first=True)

        def forward(self, ids):
            hidden = self.model(ids).last_hidden_state
            return self.more_attention(hidden, hidden, hidden)[0]

    model = Longer(LLAMA)
    assert STATE not in vars(model.more_attention)
    with torch.no_grad():
        model(IDS)
    counts = {
        site.name: site.counts["by_rows"]
        for site in attnpatch.report(model).sites
        for site in patch_of(model).sites
    }
    assert counts["more_attention"] == 1


def test_a_model_without_attention_is_noted(active):
    session = active()

    class Plain(PreTrainedModel):
        config_class, _supports_sdpa = LlamaConfig, True

        def __init__(self, config):
            super().__init__(config)
            self.layer = nn.Linear(2, 2)
            self.post_init()

    assert STATE not in vars(Plain(LLAMA))
    assert session.counts == {"without": 1}


def test_a_model_made_from_the_class_of_a_patched_one(active):
    """It is patched on its own; calls must be served once."""
    active(policy=Policy(mode="never"))
    first = LlamaForCausalLM(LLAMA)
    second = type(first)(LLAMA)
    attention = type(first.model.layers[0].self_attn)(LLAMA, 0)
    second.model.layers[0].self_attn = attention
    with torch.no_grad():
        second(IDS)
    assert roots(second) == [""]
    assert attnpatch.report(second).totals["native"] == 2
    attnpatch.remove(second)
    assert type(second) is LlamaForCausalLM
    assert type(attention).__bases__ == (nn.Module,)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_report_and_are_captured_for_themselves(capturing, copied, tmp_path):
    model = LlamaForCausalLM(LLAMA).eval()
    if copied is copy.deepcopy:
        model(IDS)
    other = copied(model)
    assert patch_of(other).recorder is None
    del model
    other(IDS)
    assert patch_of(other) in capturing.patches.values()
    assert attnpatch.report(other).totals["captured"] == 2
    assert names(tmp_path)[-1] == ("0002" if copied is copy.deepcopy else "0001") + ".safetensors"


def test_what_somebody_asks_for_comes_first(capturing, tmp_path):
    model = LlamaForCausalLM(LLAMA).eval()
    with attnpatch.capture(model, blocks=Blocks.fixed(8)) as maps:
        model(IDS)
    assert names(tmp_path) == []
    assert maps.block_map.mass.shape[-1] == 5
    with attnpatch.patched(model.model, mode="always"), torch.no_grad():
        model(IDS)
        assert attnpatch.report(model.model).totals["by_rows"] == 2
    attnpatch.apply(model, mode="always")
    model(IDS)
    assert attnpatch.report(model).policy.mode == "always"
    assert names(tmp_path)[-1].startswith("000")


def test_a_failure_of_ours_leaves_the_model_as_it_is(active, monkeypatch, capsys):
    session, calls = active(), []

    def broken(*args):
        calls.append(put_in(*args))
        if len(calls) % 2 == 0:
            raise ZeroDivisionError("ours")

    monkeypatch.setattr("attnpatch.patching.patch.put_in", broken)
    model = LlamaForCausalLM(LLAMA)
    assert not any(STATE in vars(module) for module in model.modules())
    assert session.counts["unpatched"] == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        f"attnpatch: {name} is left as it is: ZeroDivisionError: ours"
        for name in ("LlamaModel", "LlamaForCausalLM")
    ]


# ------------------------------------------------------------------------------------------------ what is captured


def test_one_file_for_one_generate(capturing, tmp_path):
    model = LlamaForCausalLM(LLAMA).eval()
    with attnpatch.capture(model, blocks=Blocks.fixed(16)) as maps, torch.no_grad():
        generate(model, 20)
        model(IDS)
    for _ in range(2):
        generate(model, 20)
    with torch.no_grad():
        model(IDS)
    assert names(tmp_path) == ["0001.safetensors", "0002.safetensors", "0003.safetensors"]
    whole, single = (next(iter(sequence.values())) for sequence in maps.sequences)
    assert whole.mass.shape[-1] == 4 and single.mass.shape[-1] == 3
    same(tmp_path / "0001.safetensors", whole)
    same(tmp_path / "0002.safetensors", whole)
    same(tmp_path / "0003.safetensors", single)
    assert capturing.written == 3


def test_a_sequence_is_written_when_it_begins_and_when_it_ends(capturing, tmp_path, monkeypatch):
    writes = []
    write = Folder.write
    monkeypatch.setattr(Folder, "write", lambda self, *args: writes.append(args[0]) or write(self, *args))
    model = LlamaForCausalLM(LLAMA).eval()
    generate(model, 8)
    assert writes == [1]
    assert BlockMap.load(tmp_path / "0001.safetensors").metadata["tokens"] == 40
    generate(model, 8)
    assert writes == [1, 1, 2]
    assert BlockMap.load(tmp_path / "0001.safetensors").metadata["tokens"] == 47
    capturing.end()
    assert writes == [1, 1, 2, 2]
    recorder = patch_of(model).recorder
    assert [each._inner.sequences for each in recorder._threads.values()] == [[]]


def test_encoder_and_decoder_of_one_generate_are_one_number(capturing, tmp_path):
    model = T5ForConditionalGeneration(T5).eval()
    with attnpatch.capture(model, blocks=Blocks.fixed(16)) as maps:
        generate(model)
    for _ in range(2):
        generate(model)
    capturing.end()
    groups = [
        "decoder.block._.layer.0.SelfAttention",
        "decoder.block._.layer.1.EncDecAttention",
        "encoder.block._.layer.0.SelfAttention",
    ]
    assert names(tmp_path) == [f"{n:04d}-{group}.safetensors" for n in (1, 2) for group in groups]
    for group, file in zip(sorted(maps.keys()), names(tmp_path)[3:], strict=True):
        same(tmp_path / file, maps[group])


class Windows(PreTrainedModel):
    """Attention in windows that span the batch, which no map over a sequence can show."""

    config_class, _supports_sdpa = LlamaConfig, True

    def __init__(self, config):
        super().__init__(config)
        self.attention = WindowAttention()
        self.post_init()

    def forward(self, x):
        return self.attention(x)


class WindowAttention(nn.Module):
    def forward(self, x):
        windows = x.reshape(-1, 16, x.shape[-1])
        return (torch.softmax(windows @ windows.mT, -1) @ windows).reshape(x.shape)


def test_what_cannot_be_captured_does_not_stop_the_script(capturing, tmp_path, capsys):
    model, x = Windows(LLAMA), zoo.floats(2, 24, 8)
    native = WindowAttention()(x)
    for _ in range(3):
        assert torch.equal(model(x), native)
    assert names(tmp_path) == []
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(
        "attnpatch: a call of Windows is not captured: CaptureError: no attention could be mapped. attention: it moves, picks, joins"
    )
    assert capturing.counts["not captured"] == 3
    assert list(closing_lines(capturing))[-1] == (
        f"attnpatch: 0 sequences captured in {tmp_path}, 3 could not be captured"
    )


def test_after_a_failure_the_next_sequence_is_captured(capturing, tmp_path, monkeypatch):
    """In a part (the encoder, which generate calls on its own), in the whole, and in a call that goes on."""
    from attnpatch.recording.text.observer import TextObserver

    model = T5ForConditionalGeneration(T5).eval()
    observe, fails = TextObserver.observe, []

    def failing(self, probabilities, passing):
        if fails and fails[0] in self.name and (len(fails) == 1 or self.past):
            raise ZeroDivisionError
        observe(self, probabilities, passing)

    monkeypatch.setattr(TextObserver, "observe", failing)
    for n, what in enumerate((["encoder"], ["EncDec"], ["decoder", "later"]), 1):
        fails[:] = what
        generate(model)
        fails.clear()
        before = set(names(tmp_path))
        generate(model)
        capturing.end()
        added = set(names(tmp_path)) - before
        assert capturing.counts["not captured"] == n
        assert len(added) == 3 and len({name[:4] for name in added}) == 1
        last = BlockMap.load(tmp_path / max(added))
        assert last.metadata["tokens"] == 40
        decoder = BlockMap.load(tmp_path / min(added))
        assert decoder.metadata["tokens"] == 5 and decoder.query_sizes.sum() == 5
    assert not list(tmp_path.glob(".*"))


def test_a_call_that_raises_is_not_captured(capturing, tmp_path):
    model = LlamaForCausalLM(LLAMA).eval()
    with pytest.raises(IndexError):
        model(torch.tensor([[10**6]]))
    try:
        raise ZeroDivisionError
    except ZeroDivisionError:
        # An exception that was there before is not the call's.
        model(IDS)
    assert names(tmp_path) == ["0001.safetensors"]
    assert capturing.counts["not captured"] == 0


def test_an_exception_from_before_a_call_is_not_kept(capturing):
    """Its traceback holds the frame that was left, and so the model."""

    def handling():
        model = LlamaForCausalLM(LLAMA).eval()
        try:
            raise ZeroDivisionError
        except ZeroDivisionError:
            model(IDS)
        return weakref.ref(model)

    alive = handling()
    gc.collect()
    assert alive() is None


def test_memory_does_not_grow_with_calls_or_models(capturing, tmp_path):
    for _ in range(3):
        model = LlamaForCausalLM(LLAMA).eval()
        for _ in range(3):
            model(IDS)
            assert len(patch_of(model).recorder._threads[threading.current_thread()]._inner.sequences) == 1
    del model
    gc.collect()
    assert not capturing.patches
    ((patch, number),) = capturing.gone.values()
    assert number == 3 and patch.recorder is None
    assert sum(site.counts["captured"] for site in patch.sites) == 18
    lines = "\n".join(closing_lines(capturing))
    assert "3 models of this kind, added up" in lines
    capturing.end()
    assert len(names(tmp_path)) == 9


def test_two_threads_at_once(capturing, tmp_path, capsys):
    model = LlamaForCausalLM(LLAMA).eval()
    inside, go_on = threading.Event(), threading.Event()

    def wait(*args):
        if threading.current_thread() is not threading.main_thread():
            inside.set()
            go_on.wait(20)

    model.model.layers[0].register_forward_hook(wait)
    thread = threading.Thread(target=model, args=(IDS,))
    thread.start()
    assert inside.wait(20)
    model(IDS[:, :20])
    go_on.set()
    thread.join()
    tokens = [BlockMap.load(tmp_path / name).metadata["tokens"] for name in names(tmp_path)]
    assert tokens == [20, 40]
    assert not capsys.readouterr().err


def test_a_forked_child_writes_files_of_its_own(capturing, tmp_path, monkeypatch):
    """The number of the sequence that was going on is the parent's."""
    model = LlamaForCausalLM(LLAMA).eval()
    with torch.no_grad():
        cache = model(IDS, use_cache=True).past_key_values
        monkeypatch.setattr(os, "getpid", lambda: -1)
        model(IDS[:, :1], past_key_values=cache)
        model(IDS[:, :1], past_key_values=cache)
    assert [BlockMap.load(tmp_path / name).metadata["tokens"] for name in names(tmp_path)] == [40, 41]


def test_numbers_go_on_after_files_that_are_there(tmp_path):
    for name in (
        "0007.safetensors",
        "0009-decoder.safetensors",
        "12345.png",
        "notes.txt",
        ".0003.x.tmp",
        "2024",
    ):
        (tmp_path / name).write_text("")
    (tmp_path / ".12346.claim").write_text("")
    assert Folder(str(tmp_path)).claim() == 12347


def test_no_number_is_given_twice(tmp_path, monkeypatch):
    """Also to processes that listed the folder at the same time."""
    monkeypatch.setattr(Folder, "_taken", lambda self, claims=True: set())
    assert [Folder(str(tmp_path)).claim() for _ in range(3)] == [1, 2, 3]


def test_a_number_finished_by_another_process_meanwhile_is_not_taken_again(tmp_path, monkeypatch):
    folder = Folder(str(tmp_path))
    taken = Folder._taken

    def late(self, claims=True):
        found = taken(self, claims)
        if claims:
            (tmp_path / "0001.safetensors").write_text("theirs")
        return found

    monkeypatch.setattr(Folder, "_taken", late)
    assert folder.claim() == 2


def test_a_folder_that_cannot_be_written_any_more(capturing, tmp_path, capsys):
    model = LlamaForCausalLM(LLAMA).eval()
    tmp_path.rmdir()
    tmp_path.write_text("a file now")
    model(IDS)
    assert "a call of LlamaForCausalLM is not captured" in capsys.readouterr().err
    tmp_path.unlink()
    tmp_path.mkdir()
    model(IDS)
    assert names(tmp_path) == ["0001.safetensors"]


# ------------------------------------------------------------------------------------------------ what is reported


def test_report_keeps_no_model_alive_and_names_those_never_called(active):
    session = active()
    used, idle = LlamaForCausalLM(LLAMA), BertModel(BERT)
    gone = BertModel(BERT)
    with torch.no_grad():
        used(IDS)
    del gone
    gc.collect()
    lines = "\n".join(closing_lines(session))
    assert lines.count("LlamaForCausalLM: Policy(") == 1
    assert "2 models built and never called: BertModel x2" in lines
    del used, idle
    gc.collect()
    assert not session.patches
