"""Built as HunyuanVideo's attention: flash-attn with a private function beside it, or nothing at all."""

import torch
import torch.nn.functional as F
from torch import nn

try:
    import flash_attn
    from flash_attn.flash_attn_interface import _flash_attn_forward, flash_attn_varlen_func
except ImportError:
    flash_attn = flash_attn_varlen_func = _flash_attn_forward = None


def starts_of(text_mask, image_length):
    """Each sequence is followed by its padding, as a sequence of its own."""
    longest = text_mask.shape[1] + image_length
    found = [0]
    for i, used in enumerate(text_mask.sum(1).tolist()):
        found += [i * longest + used + image_length, (i + 1) * longest]
    return torch.tensor(found, dtype=torch.int32)


class DoubleStream(nn.Module):
    def __init__(self, width=32, heads=4):
        super().__init__()
        self.heads = heads
        self.image, self.text, self.out = (nn.Linear(width, n * width) for n in (3, 3, 1))

    def forward(self, image, text, text_mask):
        streams = [
            one(x).unflatten(2, (3, self.heads, -1)) for one, x in ((self.image, image), (self.text, text))
        ]
        q, k, v = torch.cat(streams, 1).unbind(2)
        batch, length = q.shape[:2]
        starts = starts_of(text_mask, image.shape[1])
        x = flash_attn_varlen_func(*(x.flatten(0, 1) for x in (q, k, v)), starts, starts, length, length)
        return self.out(x.view(batch, length, -1))


torch.manual_seed(0)
model = DoubleStream()
image, text = torch.randn(2, 40, 32), torch.randn(2, 8, 32)
mask = torch.arange(8)[None] < torch.tensor([[8], [3]])
with torch.no_grad():
    out = model(image, text, mask)
    model = model.double()
    q, k, v = (
        torch.cat([model.image(image.double()), model.text(text.double())], 1)
        .unflatten(2, (3, 4, -1))
        .unbind(2)
    )
    used = F.pad(mask, (40, 0), value=True)
    same = used[:, None, :, None] == used[:, None, None, :]
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    weights = (q @ k.transpose(-1, -2) / 8**0.5).masked_fill(~same, -torch.inf).softmax(-1)
    expected = model.out((weights @ v).transpose(1, 2).flatten(2))
print("wrong by", float((out - expected).abs().max()))
try:
    _flash_attn_forward(q, k, v)
except NotImplementedError as error:
    print("refused:", error)
