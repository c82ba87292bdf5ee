"""Pipelines run end to end, patched and unpatched: the same images, and nothing left behind."""

from collections import Counter

import numpy as np
import pytest
import torch
from torch import nn

pytest.importorskip("diffusers")

import diffusers
import pipelines
from pipelines import CASES, build, modules, run
from test_undo import snapshot

import attnpatch
from attnpatch import Blocks, Policy, errors
from attnpatch.patching.forward_swap import STATE
from attnpatch.patching.patch import patch_of

ROWS = {"mode": "always", "rows": 7}


def snapshots(pipe):
    return {name: snapshot(part) for name, part in modules(pipe).items()}


def by_rows(pipe):
    """Calls that went by rows, per component."""
    counts = Counter()
    for site in attnpatch.report(pipe).sites:
        counts[site.name.partition(".")[0]] += site.counts["by_rows"]
    return {name for name, count in counts.items() if count}


def is_untouched(pipe):
    return not any(STATE in vars(module) for part in modules(pipe).values() for module in part.modules())


# --------------------------------------------------------------------------------------------------- the same images


@pytest.mark.parametrize("name", CASES)
def test_images_are_identical(name):
    pipe = build(name)
    native = run(pipe, name)
    assert native.std() > 0.01
    before = snapshots(pipe)
    with attnpatch.patched(pipe, **ROWS):
        assert np.array_equal(run(pipe, name), native)
        parts = by_rows(pipe)
        totals = attnpatch.report(pipe).totals
    assert snapshots(pipe) == before
    # The video autoencoder of LTX has no attention.
    assert parts == set(modules(pipe)) - ({"vae"} if name == "ltx" else set())
    assert totals["materialised"] == 0


@pytest.mark.parametrize("name", ["sd15", "flux", "wan"])
def test_images_are_identical_in_half_precision(name):
    pipe = build(name).to(torch.bfloat16)
    several = {"num_videos_per_prompt" if name == "wan" else "num_images_per_prompt": 2}
    native = run(pipe, name, **several)
    with attnpatch.patched(pipe, **ROWS):
        again = run(pipe, name, **several)
    assert native.std() > 0.01 and np.array_equal(again, native)


@pytest.mark.parametrize("name", ["sd15", "sd3"])
def test_causal_text_encoders_are_left_to_the_fused_kernel(name):
    pipe = build(name, text="sdpa")
    native = run(pipe, name)
    with attnpatch.patched(pipe, min_tokens=8, min_free="900GB"):
        assert np.array_equal(run(pipe, name), native)
        assert attnpatch.report(pipe).totals["fused"] > 0
    with attnpatch.patched(pipe, **ROWS):
        # By force: one rounding apart (7e-7 per call in float32), carried through two steps.
        np.testing.assert_allclose(run(pipe, name), native, rtol=0, atol=1e-5)


# ---------------------------------------------------------------------------------------- one policy for all its parts


def test_one_policy_and_one_report():
    pipe = build("sd15")
    assert attnpatch.apply(pipe, **ROWS) is pipe
    assert {patch_of(part).policy for part in modules(pipe).values()} == {Policy(**ROWS)}
    attnpatch.apply(pipe, min_free="8GB")
    assert {patch_of(part).policy for part in modules(pipe).values()} == {Policy(min_free="8GB")}
    with attnpatch.patched(pipe, **ROWS):
        run(pipe, "sd15")
        assert attnpatch.report(pipe).policy == Policy(**ROWS)
    assert attnpatch.report(pipe).policy == Policy(min_free="8GB")
    report = attnpatch.report(pipe)
    names = [site.name for site in report.sites]
    assert "unet.mid_block.attentions.0.transformer_blocks.0.attn1" in names
    assert "text_encoder.encoder.layers.0.self_attn" in names
    single = [attnpatch.report(part).totals for part in modules(pipe).values()]
    assert report.totals == {name: sum(each[name] for each in single) for name in report.totals}
    assert str(report).startswith("StableDiffusionPipeline: Policy(") and "vae.decoder" in str(report)
    assert attnpatch.remove(pipe) is pipe
    assert is_untouched(pipe)
    with pytest.raises(errors.PatchError, match="StableDiffusionPipeline is not patched"):
        attnpatch.report(pipe)
    with pytest.raises(errors.PatchError, match="StableDiffusionPipeline is not patched"):
        attnpatch.remove(pipe)


def test_a_component_patched_on_its_own():
    pipe = build("sd15")
    attnpatch.apply(pipe.unet, min_free="8GB")
    with attnpatch.patched(pipe, **ROWS):
        assert patch_of(pipe.unet).policy == Policy(**ROWS)
    assert patch_of(pipe.unet).policy == Policy(min_free="8GB")
    assert patch_of(pipe.vae) is None
    assert {site.name.partition(".")[0] for site in attnpatch.report(pipe).sites} == {"unet"}
    attnpatch.apply(pipe)
    attnpatch.apply(pipe.vae, mode="never")
    report = attnpatch.report(pipe)
    assert report.policy is None and "components have different policies" in str(report)
    attnpatch.remove(pipe)
    assert is_untouched(pipe)


def test_a_part_of_a_component_patched_on_its_own():
    pipe = build("sd15")
    attnpatch.apply(pipe.unet.mid_block)
    with pytest.raises(errors.PatchError, match="unet: 'mid_block' is patched already"):
        attnpatch.apply(pipe)
    # All or nothing.
    assert [name for name, part in modules(pipe).items() if patch_of(part) is not None] == []
    attnpatch.remove(pipe)
    assert is_untouched(pipe)


def test_pipelines_that_share_components():
    pipe = build("sd15")
    other = diffusers.StableDiffusionImg2ImgPipeline(**pipe.components)
    attnpatch.apply(pipe, **ROWS)
    run(other, "img2img")
    assert attnpatch.report(other).totals["by_rows"] > 0
    attnpatch.remove(other)
    assert is_untouched(pipe)


def test_an_exception_inside_patched_leaves_nothing():
    pipe = build("sd15")
    before = snapshots(pipe)
    with pytest.raises(ZeroDivisionError), attnpatch.patched(pipe):
        raise ZeroDivisionError
    assert snapshots(pipe) == before


class Pipe:
    """As diffusers' pipelines look from outside."""

    def __init__(self, **components):
        self.components = components


def test_a_pipeline_without_attention():
    pipe = Pipe(unet=nn.Linear(2, 2), scheduler=object(), vae=None)
    with pytest.raises(errors.PatchError, match=r"no component of this Pipe has an attention .*\(unet\)"):
        attnpatch.apply(pipe)
    for nothing in (Pipe(), Pipe(scheduler=object()), object(), "pipe", None):
        with pytest.raises(errors.PatchError, match=r"expected a torch\.nn\.Module or a pipeline"):
            attnpatch.apply(nothing)


def test_a_module_under_two_names_is_patched_once():
    attention = nn.MultiheadAttention(8, 2)
    pipe = attnpatch.apply(Pipe(one=attention, two=attention))
    assert len(attnpatch.report(pipe).sites) == 1
    attnpatch.remove(pipe)
    assert STATE not in vars(attention)


def test_capture_names_the_blocks_to_give_and_explain_the_component():
    pipe = build("flux")
    with pytest.raises(
        errors.CaptureError, match=r"Blocks\.fixed\(8\) is not accepted for an image; give Blocks\.tiles"
    ):
        attnpatch.capture(pipe, blocks=Blocks.fixed(8)).__enter__()
    with pytest.raises(errors.PatchError, match=r"pipe\.transformer"):
        attnpatch.explain(pipe, seq_len=8)


def test_a_component_of_a_patched_pipeline_is_captured():
    """Which word each tile of the picture looks at: Flux puts the text before the image."""
    pipe = build("flux")
    native = run(pipe, "flux")
    attnpatch.apply(pipe, **ROWS)
    tiles = Blocks.tiles(8, 8, 4, start=40)
    words = Blocks.words(pipe.tokenizer_2, pipelines.PROMPT)
    with attnpatch.capture(pipe.transformer, blocks=(tiles, words), layers=[0]) as maps:
        assert np.array_equal(run(pipe, "flux"), native)
    for found in maps.sequences[-1].values():
        assert found.query_labels == ("r0c0", "r0c1", "r1c0", "r1c1")
        assert found.key_labels == tuple(pipelines.PROMPT.split())
        assert found.mass.shape == (1, 4, 11) and bool((found.mass > 0).all())
    attnpatch.remove(pipe)


def test_a_pipeline_of_transformers():
    import transformers

    config = transformers.GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=64)
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(config).eval()
    pipe = transformers.pipeline(
        "text-generation", model=model, tokenizer=pipelines.tokenizer(), device="cpu"
    )

    def text():
        return pipe(pipelines.PROMPT, max_new_tokens=4, do_sample=False)

    native = text()
    with attnpatch.patched(pipe, **ROWS):
        assert text() == native
        assert "model.transformer.h.0.attn" in {site.name for site in attnpatch.report(pipe).sites}
    assert is_untouched(Pipe(model=model))
