"""What a new user may give by mistake is refused in one line that names it, what is accepted and the way out."""

import pytest
import torch
from test_analyzer import CHATML, MESSAGES, llama
from test_blocks import make_tokenizer

import attnpatch
from attnpatch import BlockMap, Blocks
from attnpatch.capturing.head_scores import HeadScores
from attnpatch.capturing.picture_overlay import picture_heat
from attnpatch.errors import AttnpatchError

BLOCK_MAP = BlockMap(
    torch.ones(1, 1, 1),
    layers=(0,),
    query_labels=("a",),
    key_labels=("a",),
    query_sizes=torch.ones(1),
    key_sizes=torch.ones(1),
)
MISTAKES = {
    "a model in the place of its name": (
        lambda folder, model, tokenizer: attnpatch.BlockAttentionAnalyzer(model, tokenizer),
        "model_name_or_path is LlamaForCausalLM; give a folder or a name on the hub, and a loaded model as model=",
    ),
    "a picture in no folder": (
        lambda folder, model, tokenizer: BLOCK_MAP.plot(folder / "no" / "map.png"),
        "there is no folder .*no; make it, or choose another path",
    ),
    "maps into a file": (lambda folder, model, tokenizer: saved_into_a_file(folder, model), "it is a file; give a folder"),
    "no number of heads": (
        lambda folder, model, tokenizer: HeadScores({"sink": torch.ones(1, 2)}, [0], {}).top("sink", "x"),
        "k='x' is not accepted; give a number of heads, 1 or more",
    ),
    "heat of no map": (
        lambda folder, model, tokenizer: picture_heat("map.safetensors", "image 1"),
        "block_map is str; accepted is a block map",
    ),
    "a misspelt option of texts": (
        lambda folder, model, tokenizer: Blocks.texts(tokenizer, "one two", ["two"], label=["b"]),
        "there is no option 'label'; did you mean 'labels'",
    ),
    "a misspelt option of messages": (
        lambda folder, model, tokenizer: Blocks.messages(tokenizer, MESSAGES, add_generation_promt=True),
        "there is no option 'add_generation_promt'; did you mean 'add_generation_prompt'",
    ),
}  # fmt: skip


def saved_into_a_file(folder, model):
    (folder / "file").write_text("mine")
    with torch.no_grad(), attnpatch.capture(model, Blocks.fixed(4)) as maps:
        model(torch.arange(8)[None])
    try:
        maps.save(folder / "file")
    finally:
        assert (folder / "file").read_text() == "mine"


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_one_line(mistake, tmp_path):
    tokenizer = make_tokenizer(CHATML)
    call, says = MISTAKES[mistake]
    with pytest.raises(AttnpatchError, match=says) as error:
        call(tmp_path, llama(len(tokenizer) + 8), tokenizer)
    assert "\n" not in str(error.value)


def test_a_template_may_have_options_of_its_own():
    blocks = Blocks.messages(make_tokenizer(CHATML), MESSAGES, style="brief", documents=[])
    assert blocks == Blocks.messages(make_tokenizer(CHATML), MESSAGES)
