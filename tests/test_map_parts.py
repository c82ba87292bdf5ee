"""Parts, rankings, sums and conversions of block maps. The oracles are loops over ``to_numpy()`` and plain lists."""

import itertools

import numpy as np
import pytest
import torch
from test_block_map import VARIANTS, make_map, ragged

import attnpatch
from attnpatch import BlockMap, Blocks
from attnpatch.errors import CaptureError

LABELS = ["system", "user", "assistant", "user (2)"]
TEXTS = ["Be kind.", "The code is 4711.", "Noted.", "What is the code?"]


def drawn(seed):
    return torch.rand(3, 4, 4, generator=torch.Generator().manual_seed(seed))


def conversation(mass=None, **more):
    mass = drawn(4).tril() if mass is None else mass
    sizes = torch.tensor([5, 9, 3, 8])
    return BlockMap(
        mass / mass.sum(-1, keepdim=True), [0, 2, 5], LABELS, LABELS,
        **{"query_sizes": sizes, "key_sizes": sizes, "metadata": {"model": "tiny", "texts": TEXTS}, **more},
    )  # fmt: skip


@pytest.mark.parametrize("kind", VARIANTS)
def test_dims_name_every_dimension(kind):
    one = make_map(**VARIANTS[kind])
    assert len(one.dims) == one.mass.ndim
    sizes = dict(zip(one.dims, one.mass.shape, strict=True))
    assert sizes["layer"] == 2 and sizes["query"] == 3 and sizes["key"] == 4
    assert sizes.get("head", 1) == VARIANTS[kind].get("num_heads", 1)
    assert sizes.get("step", 1) == VARIANTS[kind].get("num_steps", 1)


@pytest.mark.parametrize("kind", VARIANTS)
def test_parts_by_position_are_those_of_numpy(kind):
    one, whole = make_map(**VARIANTS[kind]), make_map(**VARIANTS[kind]).to_numpy()
    for name, places in itertools.product(("step", "layer", "head"), ([0], [-1], [1, 0])):
        if name in one.dims:
            taken = np.take(whole, places, axis=one.dims.index(name))
            assert np.array_equal(one.isel(**{name: places}).to_numpy(), taken)
    if "sequence" in one.dims:
        assert np.array_equal(one.isel(sequence=-1, query=[2, 0]).to_numpy(), whole[-1][..., [2, 0], :])
    else:
        assert np.array_equal(one.isel(key=slice(1, 3), query=0).to_numpy(), whole[..., :1, 1:3])


def test_parts_by_label():
    one = conversation()
    part = one.sel(layer=[5, 0], query="user (2)", key=["assistant", "user"])
    assert (part.layers, part.query_labels, part.key_labels) == ((5, 0), ("user (2)",), ("assistant", "user"))
    assert part.query_sizes.tolist() == [8] and part.key_sizes.tolist() == [3, 9]
    assert part.to_numpy().tolist() == one.to_numpy()[[2, 0]][:, 3:][..., [2, 1]].tolist()
    assert part.metadata["key_texts"] == ["Noted.", "The code is 4711."]
    assert part.metadata["query_texts"] == ["What is the code?"] and "texts" not in part.metadata
    assert part.top(1)[0].text in part.metadata["key_texts"]


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ({"layer": 1}, "no layer 1 in this map; there are 0, 2, 5"),
        ({"query": "nobody"}, "no query block 'nobody' in this map; there are 'system'"),
        ({"head": 0}, "no dimension 'head'; it has layer, query, key; heads were averaged"),
        ({"token": 0}, "no dimension 'token'"),
    ],
)
def test_labels_that_are_not_there(wanted, message):
    with pytest.raises(CaptureError, match=message):
        conversation().sel(**wanted)


@pytest.mark.parametrize("place", [4, -5, True, "user", 1.0])
def test_positions_that_are_not_there(place):
    with pytest.raises(CaptureError, match=f"no key block at {place!r}; there are 4"):
        conversation().isel(key=place)


def test_a_part_is_not_normalised_anew():
    one = conversation()
    for normalization, side in (("row", "key"), ("column", "query")):
        with pytest.raises(CaptureError, match=f"normalised by {normalization}, and the other {side} blocks"):
            one.normalize(normalization).isel(**{side: 0})
        assert one.normalize(normalization).isel(**{side: [0, 1, 2, 3]}).normalization == normalization
    assert one.normalize("row").isel(query=0).values.sum(-1).flatten().tolist() == pytest.approx([1, 1, 1])
    with pytest.raises(CaptureError, match="choose a sequence first"):
        ragged().sel(query="a")


def test_iteration_is_over_layers():
    one = conversation()
    assert len(one) == 3
    assert [each.layers for each in one] == [(0,), (2,), (5,)]
    assert np.array_equal(np.concatenate([each.to_numpy() for each in one]), one.to_numpy())


@pytest.mark.parametrize("dim", ["layer", "head", "step"])
def test_means(dim):
    one = make_map(num_heads=3, num_steps=2, batch=2)
    expected = one.to_numpy().mean(one.dims.index(dim))
    np.testing.assert_allclose(one.mean(dim).to_numpy().reshape(expected.shape), expected, rtol=1e-6)


@pytest.mark.parametrize("dim", ["query", "sequence", "word", "head"])
def test_means_that_mean_nothing(dim):
    with pytest.raises(CaptureError, match=r"no mean over|no dimension"):
        conversation().mean(dim)


@pytest.mark.parametrize("kind", VARIANTS)
def test_ranking_beside_a_loop(kind):
    one = make_map(**VARIANTS[kind])
    values, dims = one.to_numpy(), one.dims
    best = {}
    for place in np.ndindex(values.shape):
        at = dict(zip(dims, place, strict=True))
        pair = at.get("sequence"), at["query"], at["key"]
        if pair not in best or values[place] > best[pair][0]:
            best[pair] = values[place], at
    wanted = sorted(best.values(), key=lambda each: -each[0])[:7]
    found = one.top(7, query="all")
    assert [cell.mass for cell in found] == pytest.approx([value for value, _ in wanted])
    for cell, (_, at) in zip(found, wanted, strict=True):
        assert (cell.layer, cell.query, cell.key) == (at["layer"], f"q{at['query']}", f"k{at['key']}")
        assert (cell.head, cell.step, cell.sequence) == (at.get("head"), at.get("step"), at.get("sequence"))


def test_ranking_shows_texts_and_says_what_it_leaves_out():
    mass = torch.zeros(3, 4, 4)
    mass[:, torch.arange(4), torch.arange(4)] = 1
    mass[1, 3] = torch.tensor([0.1, 0.6, 0.1, 0.2])
    one = conversation(mass)
    first = one.top(5)[0]
    assert (first.layer, first.query, first.key, first.text) == (2, "user (2)", "user", "The code is 4711.")
    assert first.mass == pytest.approx(0.6)
    assert [cell.key for cell in one.top(5)] == ["user", "system", "assistant"]
    assert "user (2)" in [cell.key for cell in one.top(5, own=True)]
    assert [cell.query for cell in one.top(9, query="assistant", own=True)] == ["assistant"]
    table = str(one.top(2)).splitlines()
    assert table[0].split() == ["layer", "query", "key", "text", "mass"] and "The code is 4711." in table[1]
    assert "<td>The code is 4711.</td>" in one.top(1)._repr_html_()
    assert one.top(2).to_dataframe()["text"].tolist() == ["The code is 4711.", "Be kind."]
    assert len(one.top(3)[:2]) == 2


def test_ranking_of_an_answer_that_was_not_generated():
    one = conversation(query_sizes=torch.tensor([5, 9, 3, 0]))
    assert {cell.query for cell in one.top(9)} == {"assistant"}


@pytest.mark.parametrize("given", [{"n": 0}, {"n": 1.5}, {"query": "x"}, {"query": 9}, {"query": True}])
def test_rankings_that_cannot_be_made(given):
    with pytest.raises(CaptureError, match="accepted is a number"):
        conversation().top(**given)


def test_differences():
    a, b = conversation(drawn(1)), conversation(drawn(2))
    found = (b - a).to_numpy()
    assert np.array_equal(found, b.to_numpy() - a.to_numpy()) and (b - a).is_signed and (a - a).is_signed
    assert np.array_equal((a + b).to_numpy(), a.to_numpy() + b.to_numpy())
    np.testing.assert_allclose(((a + b) / 2).to_numpy(), (a.to_numpy() + b.to_numpy()) / 2, rtol=1e-6)
    assert np.array_equal((-a).to_numpy(), -a.to_numpy()) and np.array_equal(
        (2 * a).to_numpy(), (a * 2).to_numpy()
    )
    assert not (a + b).is_signed and (-a).is_signed
    column = (b.normalize("column") - a.normalize("column")).to_numpy()
    assert np.array_equal(column, b.normalize("column").to_numpy() - a.normalize("column").to_numpy())
    for one in (b - a, a + b):
        with pytest.raises(CaptureError, match="unassigned_mass needs probabilities, and this map holds the"):
            one.unassigned_mass  # noqa: B018
    assert "difference of attention mass" in repr((b - a).metadata)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (conversation().isel(layer=[0, 1]), "differ in layers"),
        (conversation().isel(key=[0, 1]), "differ in key blocks"),
        (conversation().normalize("row"), "normalise both alike"),
    ],
)
def test_differences_of_maps_that_do_not_fit(other, message):
    with pytest.raises(CaptureError, match=message):
        conversation() - other
    with pytest.raises(TypeError):
        conversation() - 1


def test_errors_of_differences():
    mass, error = torch.rand(3, 4, 4), torch.full((3, 4, 4), 3e-3)
    a, b = conversation(mass, error=error), conversation(mass, error=error / 3 * 4)
    assert torch.allclose((a - b).error, torch.full((3, 4, 4), 5e-3))
    assert torch.equal((a - conversation(mass)).error, error)
    assert (a.normalize("row") - b.normalize("row")).error.isnan().all()


def test_compare_matches_blocks_by_label_then_by_position():
    a, b = conversation(drawn(1)), conversation(drawn(2))
    assert np.array_equal(attnpatch.compare(a, b).to_numpy(), b.to_numpy() - a.to_numpy())
    less = b.isel(query=[0, 1, 3], key=[0, 1, 3])
    found = attnpatch.compare(a, less)
    assert found.key_labels == ("system", "user", "user (2)")
    expected = b.to_numpy()[:, [0, 1, 3]][..., [0, 1, 3]] - a.to_numpy()[:, [0, 1, 3]][..., [0, 1, 3]]
    assert np.array_equal(found.to_numpy(), expected)
    assert "in one only: - assistant" in " ".join(map(str, found.metadata["compared"]))
    renamed = BlockMap(b.mass, b.layers, list("wxyz"), list("wxyz"), b.query_sizes, b.key_sizes)
    found = attnpatch.compare(a, renamed)
    assert np.array_equal(found.to_numpy(), b.to_numpy() - a.to_numpy()) and found.key_labels == tuple(LABELS)
    change = b.to_numpy() - a.to_numpy()
    change[:, range(4), range(4)] = 0
    assert found.is_signed and abs(found.top(1, query="all")[0].mass) == pytest.approx(np.abs(change).max())


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (
            conversation().isel(layer=[0, 1]),
            r"differ in their layers \(0, 2, 5 and 0, 2\); .* map.mean\('layer'\)",
        ),
        (make_map(3, batch=2), "second map is a batch"),
        (make_map(3, queries=5, keys=5, layers=[0, 2, 5]), "4 and 5 query blocks and share no label"),
    ],
)
def test_maps_that_cannot_be_compared(other, message):
    with pytest.raises(CaptureError, match=message):
        attnpatch.compare(conversation(), other)


@pytest.mark.parametrize("kind", VARIANTS)
def test_xarray(kind):
    one = make_map(**VARIANTS[kind]).normalize("row")
    found = one.to_xarray()
    assert found.dims == one.dims and np.array_equal(found.values, one.to_numpy())
    assert found.attrs["normalization"] == "row"
    if "sequence" in one.dims:
        assert found.isel(sequence=1)["key_label"].values.tolist() == ["k0", "k1", "k2", "k3"]
    else:
        assert np.array_equal(found.sel(key="k2").values, one.to_numpy()[..., 2])
    assert ragged().to_xarray()["query_label"].values.tolist() == [["a", "b", "c"], ["d", "e", ""]]


def weights(batch=2, layers=3, heads=4, queries=10, keys=10, start=0):
    torch.manual_seed(7)
    scores = torch.randn(layers, batch, heads, queries, keys)
    hidden = torch.arange(keys) > (torch.arange(queries) + start)[:, None]
    return tuple(scores.masked_fill(hidden, -torch.inf).softmax(-1))


def reduced(one, query_of, key_of):
    """``[batch, heads, query blocks, key blocks]`` by a loop; -1: in no block."""
    batch, heads = one.shape[:2]
    found = np.zeros((batch, heads, max(query_of) + 1, max(key_of) + 1))
    for i, query in enumerate(query_of):
        for j, key in enumerate(key_of):
            if query >= 0 and key >= 0:
                found[:, :, query, key] += one[:, :, i, j].double().numpy()
    return found / np.array([list(query_of).count(i) for i in range(max(query_of) + 1)])[:, None]


def test_a_map_of_weights_that_one_has():
    given = weights()
    blocks = [0] * 4 + [1] * 4 + [2] * 2
    found = BlockMap.from_attentions(given, Blocks.fixed(4), heads="all", metadata={"model": "mine"})
    expected = np.stack([reduced(one, blocks, blocks) for one in given], 1)
    np.testing.assert_allclose(found.to_numpy(), expected, atol=1e-6)
    mean = BlockMap.from_attentions(list(given), Blocks.fixed(4), layers=[1, 5, 9])
    np.testing.assert_allclose(mean.to_numpy(), expected.mean(2), atol=1e-6)
    assert mean.layers == (1, 5, 9) and found.metadata == {"model": "mine", "tokens": 10, "num_layers": 3}
    assert found.key_sizes.tolist() == [[4, 4, 2]] * 2


def test_a_map_of_the_weights_of_a_generation():
    prompt, *steps = (
        weights(queries=7, keys=7),
        *(weights(queries=1, keys=8 + i, start=7 + i) for i in range(3)),
    )
    found = BlockMap.from_attentions((prompt, *steps), Blocks.fixed(5), heads="all")
    whole = []
    for layer in range(3):
        rows = torch.zeros(2, 4, 10, 10)
        rows[:, :, :7, :7] = prompt[layer]
        for i, step in enumerate(steps):
            rows[:, :, 7 + i, : 8 + i] = step[layer][:, :, 0]
        whole.append(reduced(rows, [0] * 5 + [1] * 5, [0] * 5 + [1] * 5))
    np.testing.assert_allclose(found.to_numpy(), np.stack(whole, 1), atol=1e-6)


def test_a_map_of_weights_with_padding_and_of_cross_attention():
    mask = torch.ones(2, 10)
    mask[:, :3] = 0
    found = BlockMap.from_attentions(weights(), Blocks.fixed(4), attention_mask=mask)
    blocks = [-1] * 3 + [0] * 4 + [1] * 3
    np.testing.assert_allclose(
        found.to_numpy(), np.stack([reduced(one, blocks, blocks).mean(1) for one in weights()], 1), atol=1e-6
    )
    cross = weights(queries=4, keys=10, start=9)
    found = BlockMap.from_attentions(cross, (Blocks.fixed(2), Blocks.fixed(4)), attention_mask=mask)
    expected = np.stack([reduced(one, [0, 0, 1, 1], blocks).mean(1) for one in cross], 1)
    np.testing.assert_allclose(found.to_numpy(), expected, atol=1e-6)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ((None, None), "the attention weights are None: under SDPA"),
        ([], "attentions is list"),
        ((torch.rand(4, 10, 10),), "one layer's weights are"),
        ((*weights(), torch.rand(2, 3, 10, 10)), "layer 3 has weights of"),
        (weights(queries=4, start=9), None),
        ("weights", "attentions is str"),
    ],
)
def test_weights_that_make_no_map(given, message):
    if message is None:
        assert BlockMap.from_attentions(given, Blocks.fixed(4)).query_sizes.sum(-1).tolist() == [4, 4]
        return
    with pytest.raises(CaptureError, match=message):
        BlockMap.from_attentions(given, Blocks.fixed(4))
    with pytest.raises(CaptureError, match="attention_mask is"):
        BlockMap.from_attentions(weights(), Blocks.fixed(4), attention_mask=torch.ones(2, 9))


def test_a_picture_in_axes_of_yours(tmp_path):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4))
    left, right = figure.subplots(1, 2)
    assert conversation().plot(ax=left) is figure and conversation().plot(ax=right, layer=2) is figure
    assert right.get_title().startswith("tiny, layer 2") and len(right.images) == 1
    assert conversation().plot(tmp_path / "one.png").stat().st_size > 1000
