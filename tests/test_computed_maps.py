"""Parts, sums and differences of block maps: texts, words and errors stay true of the numbers beside them."""

import numpy as np
import pytest
import torch

import attnpatch
from attnpatch import BlockMap
from attnpatch.conversations.result import Analysis
from attnpatch.errors import AnalysisError, CaptureError

LABELS = ["system", "user", "assistant"]


def drawn(seed=0, *, batch=None, steps=(), labels=LABELS, sizes=None, **more):
    shape = (*((batch,) if batch else ()), *((len(steps),) if steps else ()), 2, len(labels), len(labels))
    mass = torch.rand(shape, generator=torch.Generator().manual_seed(seed)).softmax(-1)
    sizes = torch.full((len(labels),), 2) if sizes is None else torch.tensor(sizes)
    return BlockMap(mass, [0, 3], labels, labels, sizes, sizes, steps=steps, **more)


@pytest.mark.parametrize("choose", ["isel", "sel", "select"])
def test_texts_of_a_sequence_are_its_own(choose):
    whole = drawn(batch=2, metadata={"texts": [["a", "b", "c"], ["A", "B", "C"]], "model": "m"})
    one = getattr(whole, choose)(sequence=1)
    assert one.metadata == {"texts": ["A", "B", "C"], "model": "m"}
    assert {cell.text for cell in one.top()} == {"A", "B"}
    assert {cell.text for cell in one.isel(key=[2, 1]).top(query=0)} == {"B", "C"}
    by_side = drawn(
        batch=2, metadata={"query_texts": [["a"] * 3, ["A"] * 3], "key_texts": [["b"] * 3, ["B"] * 3]}
    )
    assert by_side.isel(sequence=1).metadata == {"query_texts": ["A"] * 3, "key_texts": ["B"] * 3}


@pytest.mark.parametrize(
    "given", [range(2), np.array([0, 1]), torch.tensor([0, 1]), (0, 1), [np.int64(0), 1]]
)
def test_lists_of_any_kind(given):
    one = drawn()
    assert one.isel(layer=given) == one and one.isel(key=given).key_labels == ("system", "user")
    assert one.sel(layer=np.array([3, 0])).layers == (3, 0)


@pytest.mark.parametrize("given", [[], slice(5, 9), [0, 0], [1, 0, 1], np.array([], dtype=int)])
@pytest.mark.parametrize("name", ["layer", "query", "key", "sequence"])
def test_nothing_and_twice_the_same_make_no_part(given, name):
    with pytest.raises(CaptureError, match=f"{name}=.* chooses (nothing|one twice)"):
        drawn(batch=2 if name == "sequence" else None).isel(**{name: given})
    if name in ("query", "key"):
        with pytest.raises(CaptureError, match="chooses one twice"):
            drawn().sel(**{name: ["user", "user"]})


def test_a_part_knows_which_blocks_are_its_own():
    one = drawn()
    for part in (one.isel(query=-1), one.sel(query="assistant", key=["assistant", "user", "system"])):
        assert {cell.key for cell in part.top()} == {"system", "user"}
        assert {cell.key for cell in part.top(own=True)} == set(LABELS)
    assert [cell.key for cell in one.isel(query=[2, 0], key=[2]).top(query="all")] == ["assistant"]
    # The same label is another block.
    twice = drawn(labels=["user", "assistant", "user"]).isel(query=[2], key=[0])
    assert len(twice.top()) == 1
    with pytest.raises(AnalysisError, match="query and key blocks are the same"):
        Analysis(twice).lookback()


def test_a_finding_of_a_part_is_not_its_own_block():
    mass = torch.tensor([[[0.1, 0.2, 0.7]]]).expand(1, 3, 3)
    one = BlockMap(mass, [4], LABELS, LABELS, torch.ones(3).long(), torch.ones(3).long())
    text = " ".join(
        each.get_text() for each in one.isel(query=-1).plot().findobj(lambda each: hasattr(each, "get_text"))
    )
    assert 'assistant attends most to "user"' in text


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda one: one.mean("layer"), "mean over layers"),
        (lambda one: one.isel(layer=1), "layer 3"),
        (lambda one: one.isel(layer=[1, 0]), "mean of 2 layers"),
        (lambda one: one.mean("step"), "mean over steps"),
        (lambda one: one.isel(step=1), "step 6"),
        (lambda one: one, "mean of 2 steps"),
    ],
)
def test_titles_of_means_and_parts(change, words):
    figure = change(drawn(steps=[5, 6])).plot()
    assert any(words in each.get_text() for each in figure.findobj(lambda each: hasattr(each, "get_text")))


def test_numbers_of_two_kinds_are_named_both():
    mass, gradient = drawn(), drawn(1, metadata={"weighting": "gradient"})
    for one in (mass - gradient, mass + gradient, attnpatch.compare(mass, gradient)):
        assert "attention mass" in one.metadata["numbers"] and "gradient" in one.metadata["numbers"]
        assert one.is_signed and not one.is_of_gradient
    assert (mass + (drawn(2) - mass)).is_signed
    models = [drawn(seed, metadata={"model": name}) for seed, name in enumerate("ab")]
    assert (models[0] - models[1]).metadata["model"] == "a - b"
    assert attnpatch.compare(*models).metadata["model"] == "b - a"


@pytest.mark.parametrize("number", [0, float("nan"), float("inf"), True, np.bool_(True), "2"])
def test_numbers_that_scale_no_map(number):
    with pytest.raises((CaptureError, TypeError), match=r"accepted is a finite number|unsupported operand"):
        drawn() / number
    with pytest.raises((CaptureError, TypeError), match=r"accepted is a finite number|can't multiply"):
        drawn() * (number or float("inf"))


@pytest.mark.parametrize("number", [2, np.int64(2), np.float32(2), np.float64(2)])
def test_numbers_of_numpy_scale_a_map(number):
    one = drawn()
    assert torch.equal((one * number).mass, one.mass * 2) and torch.equal((one / number).mass, one.mass / 2)


def test_errors_of_the_same_sample_do_not_cancel():
    sample = {"sample_rows": 2, "seed": 0}
    one = drawn(error=torch.full((2, 3, 3), 0.3), metadata=sample)
    assert torch.allclose((one + one).error, torch.tensor(0.6))
    other = drawn(1, error=torch.full((2, 3, 3), 0.4), metadata={**sample, "seed": 1})
    assert torch.allclose((one - other).error, torch.tensor(0.5))


def test_computed_numbers_have_no_lookback():
    for one in (drawn() + drawn(1), 2 * drawn(), drawn() - drawn(1)):
        with pytest.raises(AnalysisError, match="needs probabilities"):
            Analysis(one).lookback()


def test_ranking_of_any_number():
    one = drawn(sizes=[2, 2, 0])
    assert one.top(np.int64(1), query=np.int64(1)) == one.top(1, query=1) or len(one.top(np.int64(1))) == 1
    assert one.top(1)[0].query == "user" and one.top(1, query=-2)[0].query == "system"
    with pytest.raises(CaptureError, match="no query block -3"):
        one.top(query=-3)
    ragged = BlockMap(
        torch.rand(2, 1, 3, 3), [0], [LABELS, LABELS[:2]], [LABELS, LABELS[:2]],
        torch.tensor([[1, 1, 1], [1, 1, 0]]), torch.tensor([[1, 1, 1], [1, 1, 0]]),
    )  # fmt: skip
    assert {cell.sequence for cell in ragged.top(query="assistant")} == {0}
    assert {cell.sequence for cell in ragged.top(query=2)} == {0}
    with pytest.raises(CaptureError, match="no query block 'nobody'"):
        ragged.top(query="nobody")


def test_blocks_by_position_have_the_texts_of_their_labels():
    one = drawn(labels=["a", "b", "c"])
    other = drawn(1, metadata={"texts": ["Else.", "Other.", "New."]})
    assert {cell.text for cell in attnpatch.compare(one, other).top(query="all")} <= {"a", "b", "c"}
    with pytest.raises(CaptureError, match="the second map is Analysis"):
        attnpatch.compare(one, Analysis(one))
