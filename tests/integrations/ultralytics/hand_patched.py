"""Saves checkpoints of a hand-patched ultralytics, with blocks written anew: python hand_patched.py FOLDER.

Run in a process of its own, that has nothing of dcnzoo: FOLDER/NAME.pt is the model, FOLDER/NAME.answer.pt an input
with the model's maps for it.
"""

import math
import sys
import types
from pathlib import Path

import torch
import torch.nn.functional as F
import yaml
from torch import nn
from ultralytics.nn import tasks
from ultralytics.nn.modules import C2f, C3k2, Conv
from ultralytics.nn.modules.block import C3k
from ultralytics.utils import ROOT


class DCNv4(nn.Module):
    def __init__(self, channels, group=4):
        super().__init__()
        self.group = group
        self.offset_mask = nn.Linear(channels, math.ceil(group * 9 * 3 / 8) * 8)
        self.value_proj = nn.Linear(channels, channels)
        self.output_proj = nn.Linear(channels, channels)
        nn.init.normal_(self.offset_mask.bias)  # published as zero, where all kernels are plain ones

    def forward(self, x):
        n, c, h, w = x.shape
        x = x.permute(0, 2, 3, 1)
        values = self.value_proj(x).permute(0, 3, 1, 2).reshape(n * self.group, -1, h, w)
        predicted = self.offset_mask(x)[..., : self.group * 27].reshape(n, h, w, self.group, 27)
        predicted = predicted.permute(0, 3, 1, 2, 4).flatten(0, 1)
        rows, columns = torch.meshgrid(torch.arange(h), torch.arange(w), indexing='ij')
        total = 0
        for point in range(9):
            px = columns + point // 3 - 1 + predicted[..., 2 * point]
            py = rows + point % 3 - 1 + predicted[..., 2 * point + 1]
            grid = torch.stack([(2 * px + 1) / w - 1, (2 * py + 1) / h - 1], -1)
            total += F.grid_sample(values, grid, align_corners=False) * predicted[..., 18 + point].unsqueeze(1)
        return self.output_proj(total.reshape(n, c, h, w).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Bottleneck_DCNv4(nn.Module):
    def __init__(self, c, shortcut):
        super().__init__()
        self.cv1 = Conv(c, c, 3)
        self.cv2 = DCNv4(c)
        self.add = shortcut

    def forward(self, x):
        out = self.cv2(self.cv1(x))
        return x + out if self.add else out


class C2f_DCNv4(C2f):
    def __init__(self, c1, c2, n=1, shortcut=False, g=1, e=0.5):
        super().__init__(c1, c2, n, shortcut, g, e)
        self.m = nn.ModuleList(Bottleneck_DCNv4(self.c, shortcut) for _ in range(n))


class CondConv2d(nn.Module):
    def __init__(self, c1, c2, k, s, g, num_experts):
        super().__init__()
        self.shape, self.s, self.g = (c2, c1 // g, k, k), s, g
        self.weight = nn.Parameter(torch.randn(num_experts, math.prod(self.shape)) / math.prod(self.shape[1:]) ** 0.5)

    def forward(self, x, shares):
        kernels = (shares @ self.weight).unflatten(1, self.shape)
        samples = [
            F.conv2d(sample[None], kernel, None, self.s, self.shape[-1] // 2, 1, self.g)
            for sample, kernel in zip(x, kernels, strict=True)
        ]
        return torch.cat(samples)


class DynamicConv(nn.Module):
    def __init__(self, c1, c2, k=1, s=1, g=1, num_experts=4):
        super().__init__()
        self.routing = nn.Linear(c1, num_experts)
        self.cond_conv = CondConv2d(c1, c2, k, s, g, num_experts)

    def forward(self, x):
        return self.cond_conv(x, torch.sigmoid(self.routing(x.mean((2, 3)))))


class GhostModule(nn.Module):
    def __init__(self, c):
        super().__init__()
        half = math.ceil(c / 2)
        self.c = c
        self.primary_conv = nn.Sequential(DynamicConv(c, half), nn.BatchNorm2d(half), nn.ReLU())
        self.cheap_operation = nn.Sequential(DynamicConv(half, half, 3, g=half), nn.BatchNorm2d(half), nn.ReLU())

    def forward(self, x):
        first = self.primary_conv(x)
        return torch.cat([first, self.cheap_operation(first)], 1)[:, : self.c]


class C2f_GhostModule_DynamicConv(C2f):
    def __init__(self, c1, c2, n=1, shortcut=False, g=1, e=0.5):
        super().__init__(c1, c2, n, shortcut, g, e)
        self.m = nn.ModuleList(GhostModule(self.c) for _ in range(n))


class Bottleneck_DynamicConv(nn.Module):
    def __init__(self, c, e):
        super().__init__()
        self.cv1 = Conv(c, int(c * e), 3)
        self.cv2 = DynamicConv(int(c * e), c, 3)

    def forward(self, x):
        return x + self.cv2(self.cv1(x))


class C3k_DynamicConv(C3k):
    def __init__(self, c, n):
        super().__init__(c, c, n)
        self.m = nn.Sequential(*(Bottleneck_DynamicConv(int(c * 0.5), 1.0) for _ in range(n)))


class C3k2_DynamicConv(C3k2):
    def __init__(self, c1, c2, n=1, c3k=False, e=0.5):
        super().__init__(c1, c2, n, c3k, e)
        self.m = nn.ModuleList(
            C3k_DynamicConv(self.c, 2) if c3k else Bottleneck_DynamicConv(self.c, 0.5) for _ in range(n)
        )


PLACES = {
    'ultralytics.nn.modules.block': (C2f_DCNv4, C2f_GhostModule_DynamicConv),
    'ultralytics.nn.modules.dcnv4': (DCNv4, Bottleneck_DCNv4),
    'ultralytics.nn.Addmodules.DynamicConv': (
        CondConv2d,
        DynamicConv,
        GhostModule,
        Bottleneck_DynamicConv,
        C3k_DynamicConv,
        C3k2_DynamicConv,
    ),
}


def like_c2f(block):
    return lambda stock: block(channels(stock.cv1), channels(stock.cv2, 'out'), len(stock.m), stock.m[0].add)


def like_c3k2(stock):
    e = stock.c / channels(stock.cv2, 'out')
    return C3k2_DynamicConv(
        channels(stock.cv1), channels(stock.cv2, 'out'), len(stock.m), isinstance(stock.m[0], C3k), e
    )


def like_conv(stock):
    return DynamicConv(channels(stock), channels(stock, 'out'), 3, 2)


def channels(convolution, side='in'):
    return getattr(convolution.conv, f'{side}_channels')


# What is replaced in which file, in which rows, by what, and what the file calls that.
PATCHES = {
    'dcnv4': ('yolov8', 'C2f', (4, 6, 8, 12, 15), like_c2f(C2f_DCNv4), 'C2f_DCNv4'),
    'down': ('yolov8', 'Conv', (1, 3, 5, 7, 16, 19), like_conv, 'DynamicConv'),
    'ghost': ('yolov8', 'C2f', (2, 4, 6, 8, 12), like_c2f(C2f_GhostModule_DynamicConv), 'C2f_DynamicConv'),
    'c3k2': ('yolo11', 'C3k2', (2, 4, 6, 8, 13, 22), like_c3k2, 'C3k2_DynamicConv'),
}


def patched(base, old, places, build, new):
    """A model with some rows replaced, as an edited `parse_model` would have made it."""
    (path,) = (ROOT / 'cfg' / 'models').rglob(f'{base}.yaml')
    model = tasks.DetectionModel({**yaml.safe_load(path.read_text()), 'scale': 'n'}, nc=3, verbose=False)
    rows = model.yaml['backbone'] + model.yaml['head']
    for place in places:
        stock = model.model[place]
        assert rows[place][2] == type(stock).__name__ == old
        rows[place][2] = new
        model.model[place] = block = build(stock)
        block.i, block.f, block.type, block.np = stock.i, stock.f, new, sum(p.numel() for p in block.parameters())
    tasks.initialize_weights(model)
    for norm in (module for module in model.modules() if isinstance(module, nn.BatchNorm2d)):
        nn.init.uniform_(norm.weight, 1, 2)
        nn.init.normal_(norm.bias, std=0.2)
        nn.init.uniform_(norm.running_var, 0.2, 1)
    return model.eval()


def main(folder):
    assert not any(name.startswith('dcnzoo') for name in sys.modules)
    for place, classes in PLACES.items():
        module = sys.modules.setdefault(place, types.ModuleType(place))
        for kind in classes:
            kind.__module__ = place
            setattr(module, kind.__name__, kind)
    for name, patch in PATCHES.items():
        torch.manual_seed(0)
        model = patched(*patch)
        torch.save({'epoch': -1, 'model': model.half(), 'ema': None, 'train_args': {}}, folder / f'{name}.pt')
        x = torch.rand(2, 3, 64, 96)
        with torch.no_grad():
            torch.save((x, model.float()(x)[0]), folder / f'{name}.answer.pt')


if __name__ == '__main__':
    main(Path(sys.argv[1]))
