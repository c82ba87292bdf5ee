"""Block maps of images from the definition: dense float64 probabilities of unpatched pipelines, cut up in plain numpy.

What is text and what is an image, which row of a batch is guidance, and where words stand among the tokens is written
down here for every pipeline, as it stands in the source of diffusers; nothing is asked of attnpatch.
"""

import contextlib
import dataclasses
import functools
import itertools
import math

import numpy as np
import pipelines
import torch
from diffusers.models.attention_processor import AttnProcessor
from torch.overrides import TorchFunctionMode

IMAGE, TEXT = "image", "text"

# ---------------------------------------------------------------------------------------------------------- recording


@dataclasses.dataclass
class Call:
    """One call of a denoiser: float64 ``[batch, heads, q_len, kv_len]`` by the name of the site."""

    timestep: float
    batch: int
    sites: dict


class Doors(TorchFunctionMode):
    """Computes the probabilities of every attention inside a site of the denoiser once more, in float64."""

    def __init__(self):
        super().__init__()
        self.calls, self.inside = [], []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if self.inside and func is torch.nn.functional.scaled_dot_product_attention:
            self.store(*fused_scores(*args, **kwargs))
        elif self.inside and func is torch.baddbmm:
            added, query, key = args
            scores = kwargs["alpha"] * (query.double() @ key.double())
            scores = scores + added.double() if kwargs["beta"] else scores
            self.store(scores.unflatten(0, (self.calls[-1].batch, -1)))
        return func(*args, **kwargs)

    def store(self, scores):
        name, sites = self.inside[-1], self.calls[-1].sites
        if name in sites:  # an image prompt's
            assert scores.shape[-1] != sites[name].shape[-1]
            return
        sites[name] = torch.softmax(scores, dim=-1).numpy()


def fused_scores(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, **_):
    assert not is_causal
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    scores = query.double() @ key.double().transpose(-1, -2) * scale
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attn_mask, -math.inf)
    elif attn_mask is not None:
        scores = scores + attn_mask.double()
    return (scores,)


@contextlib.contextmanager
def recording(denoiser):
    """Yields the list of calls made inside the ``with`` block."""
    doors = Doors()

    def called(module, args, kwargs):
        timestep = kwargs["timestep"] if "timestep" in kwargs else args[1]
        given = {"first": args[0]} if args else kwargs
        image = next(given[name] for name in ("first", "sample", "hidden_states") if name in given)
        doors.calls.append(Call(float(torch.as_tensor(timestep).flatten()[0]), image.shape[0], {}))

    handles = [denoiser.register_forward_pre_hook(called, with_kwargs=True)]
    for name, module in denoiser.named_modules():
        if hasattr(module, "to_q"):
            handles.append(module.register_forward_pre_hook(lambda *_, name=name: doors.inside.append(name)))
            handles.append(module.register_forward_hook(lambda *_: doors.inside.pop() and None))
    try:
        with doors:
            yield doors.calls
    finally:
        for handle in handles:
            handle.remove()


# -------------------------------------------------------------------------------------------------------------- facts


@dataclasses.dataclass(frozen=True)
class Facts:
    """What a pipeline is, read in its source.

    Attributes:
        denoiser: Its component.
        text_tokens: That the denoiser is given.
        first_word: Tokens before the first word: a start token or none.
        joint: Order in the sequence of joint attention.
        apart: Whether guidance is a second call after the prompt's, instead of rows of the batch before it.
        image: Frames, rows and columns of the image as maps have it by default.
        site: Frames, rows and columns of tokens, by the end of a part of a site's name.
    """

    denoiser: str
    text_tokens: int
    first_word: int
    image: tuple
    site: dict
    joint: tuple = ()
    apart: bool = False


SD = {"denoiser": "unet", "text_tokens": 72, "first_word": 1}
T5 = {"denoiser": "transformer", "text_tokens": 40, "first_word": 0}
# The autoencoder halves an image; the UNet's attention is at its second level, after one more halving.
FACTS = {
    "sd15": Facts(**SD, image=(1, 16, 16), site={"": (1, 8, 8)}),
    "sdxl": Facts(**SD, image=(1, 16, 16), site={"": (1, 8, 8)}),
    # Two CLIPs side by side in features, then as many zeros as a T5 would give; the image comes first.
    "sd3": Facts("transformer", 72 + 256, 1, (1, 16, 16), {"": (1, 16, 16)}, (IMAGE, TEXT)),
    # T5's tokens; the text comes first in both kinds of blocks. Two latents by two are one token.
    "flux": Facts(**T5, image=(1, 8, 8), site={"": (1, 8, 8)}, joint=(TEXT, IMAGE)),
    # Patches of two by two latents.
    "pixart": Facts(**T5, image=(1, 16, 16), site={"": (1, 8, 8)}),
    # 9 frames are 3, an edge an eighth and then a half of it.
    "wan": Facts(**T5, image=(3, 4, 6), site={"": (3, 2, 3)}, apart=True),
    "ltx": Facts(**T5, image=(3, 8, 8), site={"": (3, 8, 8)}),
    # 88 x 56 pixels: latents of 44 x 28, and three levels of the UNet below; 11 rows are halved to 6.
    "levels": Facts(
        **SD,
        image=(1, 44, 28),
        site={
            "down_blocks.1": (1, 22, 14),
            "down_blocks.2": (1, 11, 7),
            "mid_block": (1, 6, 4),
            "up_blocks.1": (1, 11, 7),
            "up_blocks.2": (1, 22, 14),
        },
    ),
}
# Images that are no squares, and guidance of Flux, which is a call of its own.
FACTS["flux wide"] = dataclasses.replace(FACTS["flux"], image=(1, 8, 12), site={"": (1, 8, 12)})
FACTS["flux guided"] = dataclasses.replace(FACTS["flux"], apart=True)
FACTS["pixart high"] = dataclasses.replace(FACTS["pixart"], image=(1, 24, 16), site={"": (1, 12, 8)})
FACTS["sd3 wide"] = dataclasses.replace(FACTS["sd3"], image=(1, 16, 24), site={"": (1, 16, 24)})
# As many tokens of text as of the image.
FACTS["flux even"] = dataclasses.replace(FACTS["flux"], text_tokens=64)
FACTS["pixart even"] = dataclasses.replace(FACTS["pixart"], text_tokens=64)
FACTS["wan even"] = dataclasses.replace(FACTS["wan"], text_tokens=18)
FACTS["sd3 even"] = dataclasses.replace(FACTS["sd3"], text_tokens=16 * 16)
FACTS["ltx wide"] = dataclasses.replace(FACTS["ltx"], image=(3, 8, 16), site={"": (3, 8, 16)})
MORE = {
    "flux wide": ("flux", {"width": 48}),
    "flux guided": ("flux", {"true_cfg_scale": 2.0, "negative_prompt": pipelines.NEGATIVE}),
    "pixart high": ("pixart", {"height": 48}),
    "sd3 wide": ("sd3", {"width": 48}),
    "flux even": ("flux", {"max_sequence_length": 64}),
    "pixart even": ("pixart", {"max_sequence_length": 64}),
    "wan even": ("wan", {"max_sequence_length": 18}),
    "sd3 even": ("sd3", {"max_sequence_length": 16 * 16 - 72}),
    "ltx wide": ("ltx", {"width": 64}),
}
pipelines.MORE.update(
    {
        name: (pipelines.CASES[base][0], {**pipelines.CASES[base][1], **more})
        for name, (base, more) in MORE.items()
    }
)


def levels():
    """Stable Diffusion with attention at three resolutions."""
    pipe = pipelines.stable_diffusion(checked=False)
    pipe.register_modules(
        unet=pipelines.unet(
            block_out_channels=(32,) * 4,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            attention_head_dim=2,
        )
    )
    return pipe


def image_prompt():
    """Stable Diffusion that is given an image beside the text, which attends to it apart."""
    pipe = pipelines.stable_diffusion(checked=False)
    layers, width, generator = {}, 32, torch.Generator().manual_seed(3)
    for name in (name for name in pipe.unet.attn_processors if "attn2" in name):
        inner = pipe.unet.get_submodule(name.removesuffix(".processor")).inner_dim
        for what in ("k", "v"):
            key = f"{1 + 2 * (len(layers) // 2)}.to_{what}_ip.weight"
            layers[key] = torch.randn(inner, width, generator=generator)
    projection = {
        "proj.weight": torch.randn(4 * width, 16, generator=generator),
        "proj.bias": torch.zeros(4 * width),
        "norm.weight": torch.ones(width),
        "norm.bias": torch.zeros(width),
    }
    pipe.unet._load_ip_adapter_weights([{"image_proj": projection, "ip_adapter": layers}])
    return pipe


pipelines.MORE["image prompt"] = (
    image_prompt,
    {
        **pipelines.SIZE,
        **pipelines.GUIDED,
        "ip_adapter_image_embeds": [torch.linspace(-2, 2, 32).view(2, 1, 16)],
    },
)
FACTS["image prompt"] = FACTS["sd15"]
pipelines.MORE["levels"] = (levels, {**pipelines.GUIDED, "height": 88, "width": 56})


@functools.cache
def pipe_of(name, processor="fused"):
    """One pipeline for all tests, which must leave it as it was."""
    if name in MORE:
        return pipe_of(MORE[name][0], processor)
    pipe = pipelines.build(name)
    if processor == "by hand":
        pipe.unet.set_attn_processor(AttnProcessor())
    elif processor == "half":
        pipe.to(torch.bfloat16)
    return pipe


def sample(pipe, name, prompt=pipelines.PROMPT, **options):
    """The images as numpy, always of the same seed."""
    options = {**{**pipelines.CASES, **pipelines.MORE}[name][1], **options}
    made = pipe(prompt, generator=torch.Generator().manual_seed(0), output_type="np", **options)
    return np.asarray(made[0])


_RECORDED = {}


def recorded(name, processor="fused", **options):
    """Images, and the calls of the denoiser, of an unpatched pipeline."""
    key = name, processor, repr(options)
    if key not in _RECORDED:
        pipe = pipe_of(name, processor)
        with recording(getattr(pipe, FACTS[name].denoiser)) as calls:
            images = sample(pipe, name, **options)
        _RECORDED[key] = images, calls
    return _RECORDED[key]


@dataclasses.dataclass(frozen=True)
class Sequence:
    """One image with one text: where its rows are.

    Attributes:
        role, text: As ``metadata["sequences"]`` has them.
        call: Number of the call within a step.
        row: In the batch.
    """

    role: str
    text: str
    call: int
    row: int


def sequences(name, prompt=pipelines.PROMPT, images=1, negative=pipelines.NEGATIVE):
    """The prompts' images first, then those of guidance; ``negative=None``: there is no guidance.

    Diffusers repeats each prompt for its images, and takes one negative prompt for all.
    """
    prompts = [prompt] if isinstance(prompt, str) else prompt
    texts = [text for text in prompts for _ in range(images)]
    count, apart = len(texts), FACTS[name].apart
    first = count if negative is not None and not apart else 0
    found = [Sequence("prompt", text, 0, first + i) for i, text in enumerate(texts)]
    if negative is not None:
        found += [Sequence("negative", negative, int(apart), i) for i in range(count)]
    return found


# ------------------------------------------------------------------------------------------------- blocks in plain numpy


@dataclasses.dataclass(frozen=True)
class Tiling:
    """Frames, rows and columns of an image in any unit, and the edge of a tile."""

    image: tuple
    tile: int

    def axes(self):
        frames, height, width = self.image
        return (frames, 1), (height, self.tile), (width, self.tile)


def shared(length, step, tokens):
    """``[pieces, tokens]``: parts of an axis, in units that are whole in both cuts, that a piece and a token share."""
    fine = math.lcm(length, tokens)
    place = np.arange(fine)
    piece, token = place * length // fine // step, place * tokens // fine
    table = np.zeros((piece[-1] + 1, tokens))
    np.add.at(table, (piece, token), 1)
    return table


def over_image(tables):
    return functools.reduce(np.kron, tables)


def tiles_of(tiling, grid):
    return over_image([shared(*axis, tokens) for axis, tokens in zip(tiling.axes(), grid, strict=True)])


def cells_of(tiling, grid):
    """``[cells, tokens]`` zeros and ones: along each axis neighbours that lie in one and the same tile are together."""
    tables = []
    for (length, step), tokens in zip(tiling.axes(), grid, strict=True):
        table = shared(length, step, tokens)
        rows = []
        for token in range(tokens):
            mine = set(table[:, token].nonzero()[0])
            before = set(table[:, token - 1].nonzero()[0]) if token else None
            if len(mine) == 1 and mine == before:
                rows[-1][token] = 1
            else:
                rows.append(np.eye(tokens)[token])
        tables.append(np.array(rows))
    return over_image(tables)


@dataclasses.dataclass(frozen=True)
class Blocks:
    """The blocks of one side: words, tiles or both; ``own_grid`` leaves cells."""

    words: bool
    tiling: Tiling | None
    own_grid: bool = False

    @property
    def kinds(self):
        return {kind for kind, shown in ((TEXT, self.words), (IMAGE, self.tiling is not None)) if shown}


def grid_of(facts, site):
    return next(grid for part, grid in facts.site.items() if part in site)


def segments_of(name, site, is_query):
    """What the tokens on one side of a site are, in order, and how many."""
    facts = FACTS[name]
    counts = {IMAGE: math.prod(grid_of(facts, site)), TEXT: facts.text_tokens}
    if site.endswith(".attn"):
        order = facts.joint
    elif site.endswith(".attn2") and not facts.joint and not is_query:
        order = (TEXT,)
    else:
        order = (IMAGE,)
    return [(kind, counts[kind]) for kind in order]


@functools.cache
def operator(name, site, length, blocks, words, is_query):
    """``[blocks, tokens]``: what brings rows (means) or columns (sums) of probabilities to blocks."""
    facts, tables, start = FACTS[name], {}, 0
    for kind, count in segments_of(name, site, is_query):
        if kind == TEXT and blocks.words:
            table = np.eye(count)[facts.first_word : facts.first_word + words]
        elif kind == IMAGE and blocks.tiling is not None:
            table = (cells_of if blocks.own_grid else tiles_of)(blocks.tiling, grid_of(facts, site))
            # A tile is the mean over its area; a token's mass is spread evenly over its own.
            table = table / table.sum(1 if is_query else 0, keepdims=True)
        else:
            table = np.zeros((0, count))
        tables[kind] = np.pad(table, ((0, 0), (start, length - start - count)))
        start += count
    assert start == length
    return np.concatenate([tables[kind] for kind in (TEXT, IMAGE) if kind in tables])


def dense_map(name, calls, found, sites, query, key, heads="mean", steps="mean"):
    """``[sequences, (steps,) layers, (heads,) query blocks, key blocks]`` float64, NaN where no block is.

    Args:
        name: Of the pipeline.
        calls: Of its denoiser.
        found: Sequences.
        sites: Names without the component's.
        query, key: ``Blocks`` of either side.
        heads, steps: As ``capture`` takes them.
    """
    per_step = max(each.call for each in found) + 1
    of_steps = [calls[i : i + per_step] for i in range(0, len(calls), per_step)]
    per_sequence = []
    for sequence in found:
        layers = []
        for site in sites:
            whole = np.stack([step[sequence.call].sites[site][sequence.row] for step in of_steps])
            # [steps, heads, q_len, kv_len]
            whole = whole.mean(1) if heads == "mean" else whole if heads == "all" else whole[:, heads]
            whole = whole.mean(0) if steps == "mean" else whole if steps == "all" else whole[steps]
            rows = operator(name, site, whole.shape[-2], query, len(sequence.text.split()), True)
            columns = operator(name, site, whole.shape[-1], key, len(sequence.text.split()), False)
            layers.append(rows @ whole @ columns.T)
        per_sequence.append(np.stack(layers, 0 if steps == "mean" else 1))
    height, width = (max(each.shape[axis] for each in per_sequence) for axis in (-2, -1))
    result = np.full((len(found), *per_sequence[0].shape[:-2], height, width), np.nan)
    for row, values in zip(result, per_sequence, strict=True):
        row[..., : values.shape[-2], : values.shape[-1]] = values
    return result[0] if len(found) == 1 else result


def labels_of(name, site, is_query, blocks, sequence):
    """Labels of the blocks of one side, words first, and how many tokens each has."""
    kinds = {kind for kind, _ in segments_of(name, site, is_query)}
    labels = sequence.text.split() if TEXT in kinds and blocks.words else []
    sizes = [1] * len(labels)
    if IMAGE in kinds and blocks.tiling is not None:
        pieces = []
        for length_, step in blocks.tiling.axes():
            edges = [*range(0, length_, step), length_]
            pieces.append([high - low for low, high in itertools.pairwise(edges)])
        for frame, depth in enumerate(pieces[0]):
            for row, height in enumerate(pieces[1]):
                for column, width in enumerate(pieces[2]):
                    before = f"f{frame}" if len(pieces[0]) > 1 else ""
                    labels.append(f"{before}r{row}c{column}")
                    sizes.append(depth * height * width)
    return labels, sizes
