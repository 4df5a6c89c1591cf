"""EfficientNet-Lite0 in three parts (stem, head, tail), for training on a CPU, and pictures of CIFAR-10 for it.

What learns is computed as products of matrices in bf16: norms are folded into weights at each step, and a depthwise
convolution of a small map is one product a channel, of the matrix in which its kernel stands at every place. Outputs
and gradients are the plain layers' to the precision of bf16, in a third of the time. Without gradients the plain layers
run, in fp32, so what is measured is what is exported."""

import sys
from collections import OrderedDict
from functools import cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "data"))
from efficientnet_lite0 import EfficientNetLite0, _same  # noqa: E402

SIDE, PAD = 128, 6  # PAD: pixels of 32 that a picture's mirrored surroundings have


class Stem(nn.Module):
    """Image fp32 [n, 3, 128, 128] to what block 4 gives, [n, 40, 16, 16]."""

    def __init__(self, whole, end):
        super().__init__()
        self.conv, self.norm, self.blocks = whole._conv_stem, whole._bn0, whole._blocks[:end]

    def forward(self, x):
        return self.blocks(F.relu6(self.norm(self.conv(_same(x, 3, 2)))))


class Head(nn.Sequential):
    """Blocks between the stem and the cut."""

    def forward(self, x):
        if not torch.is_grad_enabled():
            return super().forward(x)
        y, side = blocks(self, flat(x), x.shape[2])
        return y.view(-1, side, side, len(x)).permute(3, 0, 1, 2).float()


class Tail(nn.Module):
    """Blocks from the cut on, and the classifier."""

    def __init__(self, whole, begin):
        super().__init__()
        self.blocks, self.conv, self.norm, self.linear = whole._blocks[begin:], whole._conv_head, whole._bn1, whole._fc

    def forward(self, x):
        if not torch.is_grad_enabled():
            return self.linear(F.relu6(self.norm(self.conv(self.blocks(x)))).mean((2, 3)))
        y, _ = blocks(self.blocks, flat(x), x.shape[2])
        y = F.relu6(pointwise(self.conv, self.norm, y))
        return self.linear(y.view(len(y), -1, len(x)).mean(1).t().float())


def parts(weights, classes):
    """The stem (up to block 4), the head (blocks 5 to 7) and the tail, with a classifier of zeros."""
    whole = EfficientNetLite0()
    whole.load_state_dict(torch.load(weights, weights_only=True))
    whole._fc = nn.Linear(1280, classes)
    nn.init.zeros_(whole._fc.weight)
    nn.init.zeros_(whole._fc.bias)
    whole.eval().requires_grad_(False)
    return Stem(whole, 5), Head(OrderedDict(list(whole._blocks.named_children())[5:8])), Tail(whole, 8)


def flat(x):
    """[n, c, h, w] to bf16 [c, h * w * n]."""
    return x.permute(1, 2, 3, 0).reshape(x.shape[1], -1).bfloat16()


def blocks(layers, x, side):
    """Blocks on bf16 [c, side * side * n]; returns the same and its side."""
    for block in layers:
        y = F.relu6(pointwise(block._expand_conv, block._bn0, x))
        weight, bias = folded(block._depthwise_conv, block._bn1)
        out = side // block.stride
        weight = (weight @ spread(block.kernel, side, block.stride)).view(len(weight), out * out, side * side)
        y = torch.baddbmm(bias.bfloat16()[:, None, None], weight.bfloat16(), y.view(len(weight), side * side, -1))
        y = pointwise(block._project_conv, block._bn2, F.relu6(y.view(len(weight), -1)))
        x, side = x + y if block.adds else y, out
    return x, side


def folded(conv, norm):
    """A convolution's weight [out, any] and bias [out] with its norm's statistics in them."""
    scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
    return conv.weight.flatten(1) * scale[:, None], norm.bias - norm.running_mean * scale


def pointwise(conv, norm, x):
    weight, bias = folded(conv, norm)
    return torch.addmm(bias.bfloat16()[:, None], weight.bfloat16(), x)


@cache
@torch.no_grad()
def spread(kernel, side, stride):
    """fp32 [kernel * kernel, out * out * side * side]: where each weight of a kernel stands in the matrix that takes a
    map of side x side to one of out x out."""
    taps = torch.eye(kernel * kernel).view(-1, 1, kernel, kernel)
    places = F.conv2d(_same(torch.eye(side * side).view(-1, 1, side, side), kernel, stride), taps, stride=stride)
    return places.flatten(2).permute(1, 2, 0).flatten(1).contiguous()


def scaled(batch):
    """uint8 [n, h, w, 3] to the network's fp32 [n, 3, h, w]."""
    return (torch.from_numpy(np.ascontiguousarray(batch.transpose(0, 3, 1, 2))).float() - 127) / 128


def enlarged(small, copy=0, at=0):
    """uint8 [n, 32, 32, 3] to [n, 128, 128, 3], bicubically; copy 1 is mirrored, of later ones every second, and these
    are moved by up to 4 pixels of the 32 and cut out 27 to 35 wide, drawn from `copy` and `at`."""
    rng = np.random.default_rng((copy, at))
    around = np.pad(small, ((0, 0), (PAD, PAD), (PAD, PAD), (0, 0)), mode="symmetric")
    found = np.empty((len(small), SIDE, SIDE, 3), np.uint8)
    for row in range(len(small)):
        picture, box = small[row], None
        if copy > 1:
            width = rng.uniform(27, 35)
            left, top = np.clip(PAD + (32 - width) / 2 + rng.uniform(-4, 4, 2), 0, 32 + 2 * PAD - width)
            picture, box = around[row], (left, top, left + width, top + width)
        found[row] = np.asarray(Image.fromarray(picture).resize((SIDE, SIDE), Image.BICUBIC, box=box))
    return found[:, :, ::-1] if copy % 2 else found
