"""Mean maps of many conversations against numpy in float64, and the command that makes them."""

import dataclasses

import chats
import numpy as np
import pytest
import torch
from safetensors import safe_open
from typer.testing import CliRunner

from attnpatch.cli.app import app
from attnpatch.conversations import merge as merging
from attnpatch.conversations.merge import RunningMoments, merge_folder, pooled, role_of
from attnpatch.errors import AnalysisError
from attnpatch.maps.block_map import BlockMap
from attnpatch.viewing.page import write_page

FIVE = ("0 system", "1 user", "2 assistant", "3 user", "4 assistant")
THREE = ("0 user", "1 assistant", "2 user")
# What a block of one role puts on itself, and every token on the system message.
JOINED = ("0 system + 1 user", "2 assistant", "assistant (next)")


def random_map(labels, seed, layers=(0, 1), heads="mean"):
    rng = np.random.default_rng(seed)
    shape = (len(layers), *(() if heads == "mean" else (len(heads),)), len(labels), len(labels))
    mass = np.tril(rng.random(shape) + 0.01)
    mass /= mass.sum(-1, keepdims=True)
    sizes = torch.tensor(rng.integers(1, 40, len(labels)))
    return BlockMap(torch.tensor(mass), layers, labels, labels, sizes, sizes, heads, "row")


def write(folder, maps):
    for number, one in enumerate(maps):
        one.save(folder / f"c{number:03d}.safetensors")
    return folder


@pytest.mark.parametrize("heads", ["mean", (0, 3)])
def test_by_labels(heads, tmp_path):
    maps = [random_map(FIVE, seed, heads=heads) for seed in range(7)]
    others = [random_map(THREE, 50, heads=heads), random_map(FIVE, 51, layers=(1,), heads=heads)]
    merged = merge_folder(write(tmp_path, [*maps, *others]))
    stacked = np.stack([one.mass.double().numpy() for one in maps])
    np.testing.assert_allclose(merged.block_map.mass, stacked.mean(0), atol=1e-7)
    np.testing.assert_allclose(merged.block_map.spread, stacked.std(0, ddof=1), atol=1e-7)
    assert (merged.merged, merged.left_out, merged.damaged) == (7, ("c007", "c008"), ())
    assert merged.block_map.query_labels == FIVE and merged.block_map.heads == heads
    assert merged.block_map.metadata["spread"] == "standard deviation over 7 conversations"
    assert merged.block_map.error is None and merged.block_map.normalization == "none"
    sizes = np.stack([one.query_sizes.numpy() for one in maps]).mean(0).round()
    assert merged.block_map.query_sizes.tolist() == sizes.tolist()


def test_blocks_without_tokens_in_some_conversations(tmp_path):
    """A row that is not there is no row of zeros, and a block that is there once stays."""
    maps = [random_map(THREE, seed) for seed in range(5)]
    sizes = [[3, 0, 9], [1, 0, 0], [2, 0, 4], [5, 1, 0], [4, 0, 0]]
    maps = [
        dataclasses.replace(one, query_sizes=torch.tensor(own), key_sizes=torch.tensor(own))
        for one, own in zip(maps, sizes, strict=True)
    ]
    merged = merge_folder(write(tmp_path, maps)).block_map
    for row in range(3):
        rows = [
            one.mass.double().numpy()[:, row] for one, own in zip(maps, sizes, strict=True) if own[row] > 0
        ]
        np.testing.assert_allclose(merged.mass[:, row], np.mean(rows, 0), atol=1e-7)
        spread = np.std(rows, 0, ddof=1) if len(rows) > 1 else np.full_like(rows[0], np.nan)
        np.testing.assert_allclose(merged.spread[:, row], spread, atol=1e-7)
    assert merged.query_sizes.tolist() == [3, 1, 3] and merged.key_sizes.tolist() == [3, 1, 3]


def test_by_role(tmp_path):
    maps = [random_map(labels, seed) for seed, labels in enumerate([FIVE, THREE, FIVE, THREE, THREE])]
    merged = merge_folder(write(tmp_path, maps), "role")
    roles = ["system", "user", "assistant"]
    expected = np.full((5, 2, 3, 3), np.nan)
    for number, one in enumerate(maps):
        mass, sizes = one.mass.double().numpy(), one.query_sizes.double().numpy()
        for layer in range(2):
            for row, asking in enumerate(roles):
                queries = [i for i, label in enumerate(one.query_labels) if label.endswith(asking)]
                if queries:
                    for column, asked in enumerate(roles):
                        keys = [j for j, label in enumerate(one.key_labels) if label.endswith(asked)]
                        of_tokens = [sizes[i] * sum(mass[layer, i, j] for j in keys) for i in queries]
                        expected[number, layer, row, column] = sum(of_tokens) / sizes[queries].sum()
    np.testing.assert_allclose(merged.block_map.mass, np.nanmean(expected, 0), atol=1e-7)
    np.testing.assert_allclose(merged.block_map.spread, np.nanstd(expected, 0, ddof=1), atol=1e-7)
    assert merged.block_map.query_labels == tuple(roles)
    assert merged.merged == 5 and merged.left_out == ()
    assert merged.block_map.metadata["conversations with the role"] == {
        "system": 2,
        "user": 5,
        "assistant": 5,
    }
    torch.testing.assert_close(merged.block_map.mass.sum(-1), torch.ones(2, 3))


def test_pooling_of_tokens_is_what_blocks_of_roles_would_have_captured():
    """From single tokens: the mean over all query tokens of a role, each as heavy as the others."""
    rng = np.random.default_rng(3)
    rows = np.tril(rng.random((12, 12)) + 0.1)
    rows /= rows.sum(-1, keepdims=True)
    spans, labels = [(0, 1), (1, 6), (6, 9), (9, 12)], ["0 system", "1 user", "2 assistant", "3 user"]
    mass = [[rows[a:b, c:d].sum(1).mean() for c, d in spans] for a, b in spans]
    sizes = torch.tensor([b - a for a, b in spans])
    found, tokens = pooled(
        BlockMap(torch.tensor([mass]), [0], labels, labels, sizes, sizes), ["system", "user"]
    )
    user = [1, 2, 3, 4, 5, 9, 10, 11]
    assert tokens.tolist() == [1, 8]
    assert float(found[0, 1, 1]) == pytest.approx(rows[np.ix_(user, user)].sum(1).mean(), abs=1e-6)
    assert float(found[0, 1, 0]) == pytest.approx(rows[user, 0].mean(), abs=1e-6)


def test_roles_of_blocks():
    assert [role_of(label) for label in JOINED] == ["system + user", "assistant", "assistant"]
    assert role_of("3 user + 4 user") == "user"
    assert [role_of(label) for label in ("0:128", "key", "", "12", "a + b")] == [None] * 5


def test_one_conversation_has_no_spread(tmp_path):
    merged = merge_folder(write(tmp_path, [random_map(FIVE, 0)]))
    assert merged.block_map.spread.isnan().all()
    assert merged.block_map.metadata["spread"] == "standard deviation over 1 conversation"


def test_spread_of_large_numbers_keeps_its_digits():
    spread = RunningMoments()
    for value in (1e8, 1e8 + 1, 1e8 + 2):
        spread.add(torch.tensor([value], dtype=torch.float64))
    assert float(spread.deviation) == pytest.approx(1.0, abs=1e-6)


def test_what_cannot_be_merged(tmp_path):
    with pytest.raises(AnalysisError, match="is not a folder"):
        merge_folder(tmp_path / "nowhere")
    with pytest.raises(AnalysisError, match="holds no results"):
        merge_folder(tmp_path)
    with pytest.raises(AnalysisError, match="by='size' is not accepted"):
        merge_folder(tmp_path, "size")
    write(tmp_path, [random_map(("0:128", "128:256"), 0)])
    with pytest.raises(AnalysisError, match="has the block '0:128', which is not a message"):
        merge_folder(tmp_path, "role")


def test_maps_of_gradients_and_of_probabilities_are_not_merged(tmp_path):
    maps = [random_map(FIVE, seed) for seed in range(5)]
    gradients = [
        dataclasses.replace(one, mass=one.mass - 0.2, metadata={"weighting": "gradient"}) for one in maps[:3]
    ]
    merged = merge_folder(write(tmp_path, [*gradients, *maps[3:]]))
    assert merged.merged == 3 and merged.block_map.is_signed
    assert merged.block_map.metadata["weighting"] == "gradient"
    np.testing.assert_allclose(merged.block_map.mass, np.mean([one.mass for one in gradients], 0), atol=1e-6)


def test_maps_of_other_numbers_are_not_merged_with_attention(tmp_path):
    """Twice the attention of a conversation is not the attention of another; a mean of such maps says what it is."""
    mass, names, sizes = torch.eye(2)[None], ["0 user", "1 user"], torch.ones(2, dtype=torch.int64)
    one = BlockMap(mass, [0], names, names, sizes, sizes)
    for number in range(3):
        one.save(tmp_path / f"{number}.safetensors")
    for number in range(2):
        (2 * one).save(tmp_path / f"twice {number}.safetensors")
    for by in ("labels", "role"):
        merged = merge_folder(tmp_path, by)
        assert merged.left_out == ("twice 0", "twice 1") and "numbers" not in merged.block_map.metadata
        assert float(merged.block_map.mass.max()) == 1
    for number in range(3):
        (tmp_path / f"{number}.safetensors").unlink()
    assert merge_folder(tmp_path).block_map.metadata["numbers"] == (2 * one).metadata["numbers"]


def test_the_spread_is_called_one_everywhere(tmp_path):
    pytest.importorskip("matplotlib")
    one = merge_folder(write(tmp_path, [random_map(FIVE, seed) for seed in range(7)])).block_map
    again = BlockMap.load(one.save(tmp_path / "merged.safetensors"))
    assert again == one and again.error is None
    spread = "spread (standard deviation over 7 conversations)"
    averaged = one.select(layer="mean")
    # Not the standard error of a mean: layers of one conversation go together.
    torch.testing.assert_close(averaged.spread, one.spread.mean(0, keepdim=True))
    for drawn, largest in ((one.plot(), averaged.spread.max()), (one.plot(layer=1), one.spread[1].max())):
        assert f"{spread} up to {largest:.2g}" in drawn.get_suptitle().replace("\n", " ")
        label = drawn.axes[1].get_ylabel()
        assert "\u00b1: spread" in label
        assert "error" not in drawn.get_suptitle() + label and "sampled" not in drawn.get_suptitle()
    page = write_page({"merged": one}, tmp_path / "page.html").read_text(encoding="utf-8")
    assert '"spread":"standard deviation over 7 conversations"' in page


def test_a_merged_file_that_calls_its_spread_an_error_is_read(tmp_path):
    """As files were that 0.1.0 wrote."""
    one = merge_folder(write(tmp_path, [random_map(FIVE, seed) for seed in range(3)])).block_map
    path = dataclasses.replace(one, error=one.spread, spread=None).save(tmp_path / "merged.safetensors")
    with safe_open(path, framework="pt") as file:
        assert "error" in file.keys() and "spread" not in file.keys()  # noqa: SIM118
    assert BlockMap.load(path) == one


# ---------------------------------------------------------------------------------------------- the command


def merge(*arguments):
    return CliRunner(env={"COLUMNS": "200"}).invoke(app, ["merge", *map(str, arguments)])


def test_command(chat_model, tmp_path):
    mixed, out = chats.write_mixed(tmp_path / "mixed.jsonl"), tmp_path / "out"
    usual = ["--model", chat_model, "--json", mixed, "--out", out, "--single-pass", "--no-pictures"]
    assert CliRunner().invoke(app, ["analyze", *map(str, usual)]).exit_code == 3
    by_labels = merge(out)
    assert by_labels.exit_code == 0, by_labels.output
    assert "6 conversations merged, 1 left out" in by_labels.stdout
    assert "spread (standard deviation over 6 conversations)" in by_labels.stdout
    for role in ("0 system", "4 assistant"):
        assert role in by_labels.stdout
    by_role = merge(out, "--by", "role", "--out", out / "roles.safetensors")
    assert "7 conversations merged, 0 left out" in by_role.stdout
    assert (out / "merged" / "labels.png").exists() and (out / "roles.png").exists()
    assert BlockMap.load(out / "roles.safetensors").query_labels == ("system", "user", "assistant")
    # What a merge wrote is no conversation.
    assert "7 conversations merged" in merge(out, "--by", "role").stdout


def test_a_damaged_file_is_one_line_and_the_others_are_merged(tmp_path):
    write(tmp_path, [random_map(FIVE, seed) for seed in range(3)])
    path = tmp_path / "c001.safetensors"
    path.write_bytes(path.read_bytes()[:-5])
    (tmp_path / "other.safetensors").write_text("mine")
    result = merge(tmp_path)
    assert result.exit_code == 3
    assert "2 conversations merged, 0 left out" in result.stdout
    assert [line.split(":")[0] for line in result.stderr.splitlines()] == [
        "c001.safetensors",
        "other.safetensors",
    ]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["nowhere"], "nowhere is not a folder"),
        (["."], "holds no results"),
        (["maps", "--out", "map.png"], "--out map.png: give the name of a .safetensors file"),
        (["maps", "--out", "nowhere/map.safetensors"], "nowhere/map.safetensors"),
        (["words", "--by", "role"], "which is not a message"),
    ],
)
def test_command_errors_are_one_line(arguments, says, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "maps").mkdir(), (tmp_path / "words").mkdir()
    write(tmp_path / "maps", [random_map(FIVE, 0)])
    write(tmp_path / "words", [random_map(("the", "key"), 0)])
    result = merge(*arguments)
    assert result.exit_code == (2 if "--out map.png" in says else 1) and says in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_without_matplotlib_there_is_no_picture_and_it_is_said(tmp_path, monkeypatch):
    from attnpatch.errors import MissingExtraError

    def absent(*args, **options):
        raise MissingExtraError("pictures need matplotlib")

    write(tmp_path, [random_map(FIVE, 0)])
    monkeypatch.setattr(merging.BlockMap, "plot", absent)
    result = merge(tmp_path)
    assert result.exit_code == 0 and "note: no picture: pictures need matplotlib" in result.stderr
