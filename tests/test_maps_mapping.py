"""What a capture gives: a mapping that is saved and read again; and what ``attnpatch.load`` reads."""

import numpy as np
import pytest
import torch
from test_known_facts import tokens
from transformers import LlamaConfig, LlamaForCausalLM, T5Config, T5ForConditionalGeneration

import attnpatch
from attnpatch import Blocks
from attnpatch.errors import AttnpatchWarning, BlockMapFileError, CaptureError

SIZES = {"vocab_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2, "hidden_size": 32}


@pytest.fixture(scope="module")
def llama():
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES, intermediate_size=32)).eval()


@pytest.fixture(scope="module")
def of_t5():
    torch.manual_seed(0)
    model = T5ForConditionalGeneration(
        T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=32, num_layers=2, num_heads=4)
    ).eval()
    with attnpatch.capture(model, Blocks.fixed(4)) as maps, torch.no_grad():
        model(input_ids=tokens(12) % 64, decoder_input_ids=tokens(8) % 64)
    return maps


def test_maps_are_a_mapping(of_t5):
    assert len(of_t5) == 3 == len(list(of_t5)) and dict(of_t5.items()).keys() == set(of_t5)
    for sites, one in of_t5.items():
        assert sites in of_t5 and of_t5[sites] == one
    assert "nothing" not in of_t5 and [one.layers for one in of_t5.values()] == [(0, 1)] * 3
    with pytest.raises(CaptureError, match="several kinds of attention"):
        of_t5.top(3)
    assert of_t5._repr_png_() is None


def test_maps_are_saved_and_loaded(of_t5, tmp_path):
    files = of_t5.save(tmp_path / "new" / "folder")
    assert len(files) == 3 and all(file.parent == tmp_path / "new" / "folder" for file in files)
    found = attnpatch.load(tmp_path / "new" / "folder")
    assert sorted(found) == sorted(file.stem for file in files)
    for one in of_t5.values():
        assert one in found.values()
    assert attnpatch.load(files[0]) in of_t5.values()


def test_sequences_by_number(llama, tmp_path):
    with attnpatch.capture(llama, Blocks.fixed(4)) as maps, torch.no_grad():
        assert len(maps) == 0 and maps and "model.layers.*.self_attn" not in maps
        for length in (8, 12, 16):
            llama(tokens(length) % 64)
    (sites,) = maps
    assert [maps[i][sites].key_sizes.sum().item() for i in (0, 1, -1)] == [8, 12, 16]
    assert maps[-1][sites] == maps.block_map == maps[sites]
    with pytest.raises(CaptureError, match="there is no sequence 3; 3 were captured"):
        maps[3]
    assert [file.name[:5] for file in maps.save(tmp_path)] == ["0000-", "0001-", "0002-"]
    assert maps.top(3).to_dataframe()["query"].unique().tolist() == ["12:16"]
    assert maps._repr_png_().startswith(b"\x89PNG")


def test_a_map_is_made_once(llama):
    with attnpatch.capture(llama, Blocks.fixed(4)) as maps, torch.no_grad():
        llama(tokens(8) % 64)
        first = maps.block_map
        llama(tokens(12) % 64)
        assert maps.block_map != first  # it changes while the model runs
    assert maps.block_map is maps.block_map


def test_nothing_to_save(llama, tmp_path):
    with attnpatch.capture(llama, Blocks.fixed(4)) as maps:
        pass
    with pytest.raises(CaptureError, match="nothing was captured: call the model inside"):
        maps.save(tmp_path / "folder")
    assert not (tmp_path / "folder").exists()


def test_options_of_capture_have_names(llama):
    with pytest.raises(TypeError), attnpatch.capture(llama, Blocks.fixed(4), "all"):
        pass


@pytest.mark.parametrize("content", [None, b"", b"{}", "folder"])
def test_what_cannot_be_loaded(content, tmp_path):
    path = tmp_path / "map.safetensors"
    if content == "folder":
        path.mkdir()
    elif content is not None:
        path.write_bytes(content)
    with pytest.raises(BlockMapFileError, match=r"map\.safetensors"):
        attnpatch.load(path)


def test_an_analysis_is_loaded_as_one(llama, tmp_path):
    from attnpatch.conversations.result import Analysis

    with attnpatch.capture(llama, Blocks.fixed(4)) as maps, torch.no_grad():
        llama(tokens(8) % 64)
    Analysis(maps.block_map, notes=("a note",)).save(tmp_path / "analysis.safetensors")
    found = attnpatch.load(tmp_path / "analysis.safetensors")
    assert (
        isinstance(found, Analysis) and list(found.notes) == ["a note"] and found.block_map == maps.block_map
    )


def test_a_last_sequence_that_is_left_out_does_not_show_the_one_before(llama):
    """Beams are in no map: with the map of the call before, they would seem to have one."""
    beams = {"max_new_tokens": 3, "num_beams": 2, "do_sample": False, "pad_token_id": 0}
    with (
        pytest.warns(AttnpatchWarning, match="in no map"),
        torch.no_grad(),
        attnpatch.capture(llama, Blocks.fixed(4), measures=("entropy",)) as maps,
    ):
        llama(tokens(12) % 64)
        (sites,) = maps
        llama.generate(tokens(8) % 64, **beams)
    for read in (lambda: maps.block_map, lambda: maps[sites], maps.keys, maps.top, maps.measured):
        with pytest.raises(
            CaptureError, match=r"the last sequence has no map; maps\.sequences has the earlier"
        ):
            read()
    assert maps.sequences[0][sites].key_sizes.sum() == 12


def test_a_folder_with_a_damaged_file_says_so(tmp_path):
    mass = torch.ones(1, 1, 1)
    attnpatch.BlockMap(mass, [0], ["a"], ["a"], torch.ones(1).long(), torch.ones(1).long()).save(
        tmp_path / "whole.safetensors"
    )
    (tmp_path / "damaged.safetensors").write_bytes(b"nothing")
    with pytest.warns(AttnpatchWarning, match=r"skipped damaged\.safetensors"):
        assert list(attnpatch.load(tmp_path)) == ["whole"]


def test_numbers_of_numpy_are_sequences_and_truth_is_none(of_t5):
    assert of_t5[np.int64(0)].keys() == of_t5[0].keys()
    for key in (True, None, slice(0, 1)):
        with pytest.raises(CaptureError, match="accepted are a kind of sites and the number of a sequence"):
            of_t5[key]
