"""Capturing images: what is refused, what is left out and said, and that everything is undone."""

import diffusers
import numpy as np
import pipelines
import pytest
import torch
from dense_images import pipe_of
from pipelines import CASES, NEGATIVE, PROMPT, run
from test_pipelines import snapshots

import attnpatch
from attnpatch import BlockMap, Blocks, errors

SD = CASES["sd15"][1]


def captured(name="sd15", call=None, **options):
    pipe = pipe_of(name)
    with attnpatch.capture(pipe, **options) as maps:
        run(pipe, name, **(call or {}))
    return maps


@pytest.fixture(scope="module")
def plain():
    """Maps of two steps, all averaged."""
    return captured()


# ---------------------------------------------------------------------------------------------------- clear refusals

TILES = Blocks.tiles(8, 8, 2)
BEFORE = [
    ({"steps": 7}, "steps=7 is not accepted.*'mean', 'all', 'last' or a list"),
    ({"steps": "first"}, "steps='first' is not accepted"),
    ({"steps": []}, r"steps=\[\] is not accepted"),
    ({"steps": [True]}, r"steps=\[True\] is not accepted"),
    ({"heads": "first"}, "heads='first' is not accepted"),
    ({"layers": [0]}, "layers of a denoiser.*sites="),
    ({"sites": "*attn7"}, r"no attention site matches '\*attn7'"),
    ({"blocks": Blocks.fixed(8)}, r"Blocks\.fixed\(8\) is not accepted for an image; give Blocks\.tiles"),
    ({"blocks": (Blocks.fixed(8), Blocks.fixed(8))}, "is not accepted for an image"),
    ({"blocks": (TILES,) * 3}, "is not accepted for an image"),
    ({"blocks": "tiles"}, "blocks='tiles' is not accepted"),
    ({"blocks": Blocks.tiles(8, 8, 2, start=4)}, "where the image begins.*leave start out"),
]


@pytest.mark.parametrize(("options", "message"), BEFORE)
def test_refused_before_anything_runs(options, message):
    pipe = pipe_of("sd15")
    before = snapshots(pipe), dict(vars(pipe)), type(pipe)
    with pytest.raises(errors.CaptureError, match=message), attnpatch.capture(pipe, **options):
        raise AssertionError("the block was entered")
    assert (snapshots(pipe), dict(vars(pipe)), type(pipe)) == before


READING = {
    "unknown word": (
        lambda maps: maps.heat_map("dog"),
        r"'dog' is not among the words: 'a', 'red', .*'lamp'$",
    ),
    "number of no word": (lambda maps: maps.heat_map(11), "11 is not among the words"),
    "several kinds": (lambda maps: maps.block_map, r"several kinds.*maps\['self'\] or maps\['cross'\]"),
    "unknown site": (lambda maps: maps["attn7"], "nothing was captured at 'attn7'.*'self', 'cross'"),
    "sites of two kinds": (lambda maps: maps["*mid_block*"], "sites of several kinds match.*'self', 'cross'"),
    "unknown run": (lambda maps: maps.map("cross", run=1), "run=1: 1 runs were captured"),
    "unknown sequence": (lambda maps: maps.heat_map("red", sequence=2), "sequence=2: there are 2"),
    "steps averaged": (
        lambda maps: maps.heat_map("red", step=1),
        "no step 1.*steps were averaged.*steps='all'",
    ),
    "heads averaged": (lambda maps: maps.heat_map("red", head=1), "heads were averaged.*heads='all'"),
    "no such sites": (lambda maps: maps.heat_map("red", sites="*attn1"), "no attention of an image to text"),
}


@pytest.mark.parametrize("case", READING)
def test_refused_when_read(plain, case):
    read, message = READING[case]
    with pytest.raises(errors.CaptureError, match=message) as caught:
        read(plain)
    assert "\n" not in str(caught.value)


def test_steps_and_heads_that_there_are_not():
    with pytest.raises(errors.CaptureError, match=r"steps=\[0, 7\]: there were 2"):
        captured(steps=[0, 7])["cross"]
    with pytest.warns(errors.AttnpatchWarning, match="in no map: unet.*and 7 more in maps.left_out") as said:
        maps = captured(heads=[99])
    assert [each.filename for each in said] == [__file__]  # once, and where it was asked for
    assert len(maps.left_out) == 8
    with pytest.raises(errors.CaptureError, match=r"nothing was captured.*heads=\[99\]: there are 8 heads"):
        maps["cross"]


def test_before_anything_ran():
    with attnpatch.capture(pipe_of("sd15")) as maps:
        assert repr(maps) == "ImageMaps(nothing captured yet)"
        for read in (lambda: maps.heat_map("red"), lambda: maps.block_map, lambda: maps["cross"], maps.keys):
            with pytest.raises(errors.CaptureError, match="nothing was captured: call the pipeline"):
                read()
    assert maps.num_runs == 0


def test_an_image_of_another_shape():
    """Tiles of 7 x 3: no site shows such an image, and each says so."""
    maps = captured(blocks=Blocks.tiles(7, 3, 1))
    assert set(maps.left_out.values()) == {
        "it attends with 64 image tokens, which fit no image of this one's shape"
    }
    with pytest.raises(errors.CaptureError, match=r"nothing was captured.*64 image tokens"):
        maps.keys()


def test_sites_that_differ_do_not_fit_one_map():
    maps = captured("levels")
    with pytest.raises(errors.CaptureError, match=r"differ in heads or in resolution.*own_grid"):
        maps.map("cross", own_grid=True)


# --------------------------------------------------------------------------------------------- texts nobody has said


def embedded(pipe, prompt_embeds, negative_prompt_embeds):
    options = {name: value for name, value in SD.items() if name != "negative_prompt"}
    pipe(
        prompt_embeds=prompt_embeds,
        negative_prompt_embeds=negative_prompt_embeds,
        generator=torch.Generator().manual_seed(0),
        output_type="np",
        **options,
    )


def test_prompt_embeddings(plain):
    """Whose they are is not known: tokens have numbers, and the sequence must be given."""
    pipe = pipe_of("sd15")
    embeddings = pipe.encode_prompt(PROMPT, "cpu", 1, True, NEGATIVE)
    with attnpatch.capture(pipe) as maps:
        embedded(pipe, *embeddings)
    assert [each["role"] for each in maps["cross"].metadata["sequences"]] == ["", ""]
    with pytest.raises(errors.CaptureError, match="not known which is the prompt's; give sequence="):
        maps.heat_map("red")
    with pytest.raises(errors.CaptureError, match="'red' is not among the words: '0', '1', "):
        maps.heat_map("red", sequence=1)
    # With the start token before it, "red" is the third token; the prompt's rows are the last.
    assert np.array_equal(maps.heat_map(2, sequence=1), plain.heat_map("red"))


def test_prompt_embeddings_and_words(plain):
    """The words of both rows may be given, in the order of the batch."""
    pipe = pipe_of("sd15")
    embeddings = pipe.encode_prompt(PROMPT, "cpu", 1, True, NEGATIVE)
    words = Blocks.words(pipe.tokenizer, [NEGATIVE, PROMPT])
    with attnpatch.capture(pipe, blocks=(Blocks.tiles(16, 16, 1), words)) as maps:
        embedded(pipe, *embeddings)
    assert np.array_equal(maps.heat_map("red", sequence=1), plain.heat_map("red"))
    assert np.array_equal(maps.heat_map("photo", sequence=0), plain.heat_map("photo", sequence=1))


def test_embeddings_made_while_capturing(plain):
    pipe = pipe_of("sd15")
    with attnpatch.capture(pipe) as maps:
        embedded(pipe, *pipe.encode_prompt(PROMPT, "cpu", 1, True, NEGATIVE))
    assert np.array_equal(maps.heat_map("red", sequence=1), plain.heat_map("red"))


# ------------------------------------------------------------------------------------------------------------ several


def test_two_calls_are_two_runs(plain):
    pipe = pipe_of("sd15")
    with attnpatch.capture(pipe) as maps:
        run(pipe, "sd15")
        run(pipe, "sd15", num_inference_steps=1)
    assert maps.num_runs == 2
    assert maps.map("cross", run=0) == plain["cross"]
    assert maps.map("cross", run=-2) == plain["cross"]
    last = captured(call={"num_inference_steps": 1})["cross"]
    assert maps.map("cross", run=-1) == last
    assert maps["cross"] == last
    assert last.metadata["timesteps"] == [1.0]
    with pytest.raises(errors.CaptureError, match="run=2: 2 runs were captured"):
        maps.heat_map("red", run=2)


def test_several_words(plain):
    """Words of a list, or of a string with spaces: the mean of their heat maps."""
    expected = (plain.heat_map("blue") + plain.heat_map("table")) / 2
    for words in ("blue table", ["blue", "Table"], [5, "table"]):
        np.testing.assert_allclose(plain.heat_map(words), expected, atol=1e-7)
    assert plain.words() == list(dict.fromkeys(PROMPT.split()))
    assert plain.words(sequence=1) == NEGATIVE.split()
    assert plain.heat_map("red", size=(32, 48)).shape == (32, 48)


def test_saved_with_steps(tmp_path):
    one = captured(steps="all", heads="all")["cross"]
    assert one.mass.shape == (2, 2, 4, 8, 256, 11) and one.steps == (0, 1)
    path = one.save(tmp_path / "map.safetensors")
    assert BlockMap.load(path) == one


def test_a_list_of_steps_is_in_its_order():
    every, some = captured(steps="all")["cross"], captured(steps=[-1, 0])["cross"]
    assert some.steps == (1, 0)
    assert torch.equal(some.mass, every.mass[:, [1, 0]])


# ------------------------------------------------------------------------------------------------------------- undone


class Stopped(Exception):
    pass


def stop(*_):
    raise Stopped


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("name", ["sd15", "flux"])
def test_everything_is_undone(name, fails):
    """Classes, attributes and hooks of the pipeline and of all its modules; also when the pipeline fails inside."""
    pipe = pipe_of(name)

    def state():
        hooks = [dict(m._forward_hooks) for part in pipelines.modules(pipe).values() for m in part.modules()]
        # A run leaves numbers of its own on the pipeline.
        return snapshots(pipe), set(vars(pipe)), type(pipe), hooks

    run(pipe, name)
    before = state()
    with attnpatch.capture(pipe) as maps:
        assert type(pipe).__name__ == before[2].__name__ and isinstance(pipe, before[2])
        if fails:
            with pytest.raises(Stopped):
                run(pipe, name, callback_on_step_end=stop)
        else:
            run(pipe, name)
    assert state() == before
    # The first step had been made.
    assert maps.heat_map("red").max() > 0
    with pytest.raises(Stopped), attnpatch.capture(pipe):
        run(pipe, name, callback_on_step_end=stop)
    assert state() == before


def test_what_a_pipeline_refuses_it_still_refuses():
    pipe = pipe_of("sd15")
    with attnpatch.capture(pipe) as maps:
        with pytest.raises(ValueError, match="height"):
            run(pipe, "sd15", height=33)
        with pytest.raises(TypeError, match="flavour"):
            pipe_of("flux")(PROMPT, flavour=3)
        run(pipe, "sd15")
    assert maps.num_runs == 1


def test_captured_once_at_a_time():
    pipe = pipe_of("sd15")
    with (
        attnpatch.capture(pipe),
        pytest.raises(errors.PatchError, match="captured already"),
        attnpatch.capture(pipe),
    ):
        raise AssertionError("the block was entered")


# ---------------------------------------------------------------------------------------------------- other pipelines


def test_a_control_net_is_not_captured(plain):
    torch.manual_seed(0)
    net = diffusers.ControlNetModel(
        block_out_channels=(32, 64), layers_per_block=1, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        cross_attention_dim=32, conditioning_embedding_out_channels=(16, 32), attention_head_dim=8,
    )  # fmt: skip
    parts = {**pipe_of("sd15").components, "safety_checker": None, "feature_extractor": None}
    pipe = diffusers.StableDiffusionControlNetPipeline(
        **{name: part for name, part in parts.items() if name != "image_encoder"},
        controlnet=net.eval(), requires_safety_checker=False,
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    options = {name: value for name, value in SD.items() if name not in pipelines.SIZE}
    with attnpatch.capture(pipe) as maps:
        pipe(PROMPT, image=pipelines.image(), output_type="np", **options)
    assert maps.sites == plain.sites
    assert maps.left_out == {}
    assert maps.heat_map("red").shape == (16, 16)


def test_frames_as_rows_of_a_batch_are_left_out():
    """AnimateDiff: its frames, and each place over time, are not the sequences that maps would show."""
    torch.manual_seed(0)
    adapter = diffusers.MotionAdapter(
        block_out_channels=(32, 64), motion_layers_per_block=1, motion_norm_num_groups=2,
        motion_num_attention_heads=1,
    )  # fmt: skip
    parts = pipe_of("sd15").components
    pipe = diffusers.AnimateDiffPipeline(
        vae=parts["vae"], text_encoder=parts["text_encoder"], tokenizer=parts["tokenizer"],
        unet=pipelines.unet().eval(), motion_adapter=adapter.eval(), scheduler=parts["scheduler"],
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    with attnpatch.capture(pipe) as maps:
        pipe(
            PROMPT,
            num_frames=2,
            output_type="np",
            guidance_scale=1.0,
            num_inference_steps=1,
            **pipelines.SIZE,
        )
    temporal = [site for site in maps.left_out if "motion_modules" in site]
    assert len(temporal) == 14
    assert all("attends in" in why for why in maps.left_out.values())
    with pytest.raises(errors.CaptureError, match="nothing was captured"):
        maps.keys()


def test_attention_of_some_rows_of_a_batch_is_left_out():
    """Perturbed attention guidance: one of two rows attends, whose heads are not those of two images."""
    parts = {**pipe_of("sd15").components, "safety_checker": None, "feature_extractor": None}
    pipe = diffusers.StableDiffusionPAGPipeline(
        **parts, requires_safety_checker=False, pag_applied_layers=["mid"]
    )
    pipe.set_progress_bar_config(disable=True)
    processors = dict(pipe.unet.attn_processors)
    with attnpatch.capture(pipe) as maps:
        pipe(PROMPT, guidance_scale=1.0, num_inference_steps=1, output_type="np", **pipelines.SIZE)
    pipe.unet.set_attn_processor(processors)
    assert len(maps.sites) == 7
    (site,) = maps.left_out
    assert site == "unet.mid_block.attentions.0.transformer_blocks.0.attn1"
    assert maps.left_out[site] == "it attends in 8 pieces (sequences x heads), but the denoiser has 16"


def test_attention_in_slices_of_heads_is_left_out():
    """Whose heads are which does not show; what is not sliced would be mixed with it."""
    pipe = pipe_of("sd15", "by hand")
    processors = dict(pipe.unet.attn_processors)
    pipe.unet.set_attention_slice("auto")
    with attnpatch.capture(pipe) as maps:
        run(pipe, "sd15")
    pipe.unet.set_attn_processor(processors)
    assert set(maps.left_out.values()) == {
        "it attends in 4 pieces (sequences x heads), but the denoiser has 16"
    }
    assert len(maps.left_out) == 8


def test_an_image_without_text():
    """A UNet of its own: the image to itself."""
    torch.manual_seed(0)
    unet = diffusers.UNet2DModel(
        sample_size=16, layers_per_block=1, block_out_channels=(32, 64), attention_head_dim=8,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    ).eval()  # fmt: skip
    with torch.no_grad(), attnpatch.capture(unet, blocks=Blocks.tiles(16, 16, 4), heads="all") as maps:
        unet(torch.randn(2, 3, 16, 16), 10)
    assert maps.keys() == ["self"]
    assert maps.left_out == {}
    assert maps.block_map.mass.shape == (2, 4, 8, 16, 16)
    np.testing.assert_allclose(maps.block_map.unassigned_mass, 0, atol=1e-6)


def test_a_pipeline_of_transformers():
    """One model, which is captured as it would be by itself."""
    import transformers

    config = transformers.GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=64)
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(config).eval()
    pipe = transformers.pipeline(
        "text-generation", model=model, tokenizer=pipelines.tokenizer(), device="cpu"
    )

    def text():
        return pipe(PROMPT, max_new_tokens=4, do_sample=False)

    native = text()
    with attnpatch.capture(pipe, blocks=Blocks.fixed(8)) as maps:
        assert text() == native
    with attnpatch.capture(model, blocks=Blocks.fixed(8)) as expected:
        text()
    assert torch.equal(maps.block_map.mass, expected.block_map.mass)
    assert maps.block_map.mass.shape[-2:] == (2, 2)


def test_a_last_image_that_is_left_out_does_not_show_the_one_before():
    pipe = pipe_of("sd15")
    with (
        pytest.warns(errors.AttnpatchWarning, match="in no map"),
        attnpatch.capture(pipe, blocks=Blocks.tiles(8, 8, 1)) as maps,
    ):
        pipe(PROMPT, **SD)
        assert maps.keys() == ["self"]
        pipe(PROMPT, **SD | {"height": 3 * SD["height"]})
    for read in (maps.keys, lambda: maps["self"], lambda: maps.block_map):
        with pytest.raises(errors.CaptureError, match="the last image has no map; run=0 is an earlier one"):
            read()
    assert maps.num_runs == 1 and maps.map("self", run=0).mass.shape[-1] == 64
