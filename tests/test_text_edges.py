"""Maps of text at the edges of what can be asked for."""

import json
import shutil

import pytest
import torch
import transformers
from test_known_facts import captured, dense, llama, same, tokens

from attnpatch import errors
from attnpatch.hosts.transformers.loading import load_model, load_tokenizer

DAMAGED = {
    "half a file": ("model.safetensors", lambda old: old[:1000]),
    "zeros": ("model.safetensors", lambda old: bytes(64)),
    "a list": ("config.json", lambda old: b"[]"),
    "no heads": (
        "config.json",
        lambda old: json.dumps({**json.loads(old), "num_attention_heads": 0}).encode(),
    ),
    "no such width": (
        "config.json",
        lambda old: json.dumps({**json.loads(old), "hidden_size": "x"}).encode(),
    ),
    "a list of tokens": ("tokenizer.json", lambda old: b"[]"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_files_are_one_line_whatever_the_host_raises(name, chat_model, tmp_path):
    file, change = DAMAGED[name]
    folder = tmp_path / "model"
    shutil.copytree(chat_model, folder)
    (folder / file).write_bytes(change((folder / file).read_bytes()))
    load = load_tokenizer if file == "tokenizer.json" else load_model
    with pytest.raises(errors.AnalysisError, match=r"loads|can(not)? be loaded") as raised:
        load(str(folder))
    assert len(str(raised.value).splitlines()) == 1


def test_more_rows_of_a_sample_than_any_block_has_are_all_of_them():
    """And no memory for rows that are not there."""
    model, ids = llama(), tokens(21)
    found = captured(model, lambda: model(ids), sample_rows=10**12).block_map
    same(found.mass, dense(ids))
    assert float(found.error.abs().max()) == 0


def test_a_model_without_attention_is_said_to_have_none():
    torch.manual_seed(0)
    sizes = {"vocab_size": 97, "hidden_size": 32, "state_size": 4, "num_hidden_layers": 1}
    model = transformers.MambaForCausalLM(transformers.MambaConfig(**sizes)).eval()
    maps = captured(model, lambda: model(tokens(8)))
    with pytest.raises(errors.CaptureError, match="no attention was seen in MambaForCausalLM"):
        _ = maps.block_map
    with pytest.raises(errors.CaptureError, match="call the model inside"):
        _ = captured(llama(), lambda: torch.zeros(1)).block_map
