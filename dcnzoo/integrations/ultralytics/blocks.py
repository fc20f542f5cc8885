"""DCNv4 and dynamic convolution as blocks of YOLO models.

Names, arguments and state_dict keys are those of the hand-patched copies of ultralytics that circulate, so that their
YAML files and checkpoints fit. All blocks take and give (N, C, H, W) maps, of any width, contiguous or channels_last.
"""

import copy
import math
from collections.abc import Callable, Mapping

import timm
import torch
from timm.data import resolve_model_data_config
from torch import Tensor, nn
from ultralytics.nn.modules import Conv

from ... import layers
from ...layers._geometry import pair


class DynamicConv(layers.DynamicConv2d):
    """Dynamic convolution with the arguments of a YAML row; neither normalisation nor activation follow.

    Args:
        c1: Channels of the input.
        c2: Channels of the output.
        k: Size of the kernels.
        s: Stride.
        p: Padding in pixels; '' or None for as much as keeps the size at stride 1.
        d: Dilation.
        g: Number of groups of channels.
        bias: Whether every expert has a bias.
        num_experts: Number of kernels to mix.
    """

    def __init__(self, c1, c2, k=1, s=1, p='', d=1, g=1, bias=False, num_experts=4):
        super().__init__(c1, c2, k, s, '' if p is None else p, d, g, bias, num_experts)


class DCNv4(layers.DCNv4):
    """`dcnzoo.layers.DCNv4` on (N, C, H, W) maps, in 4 groups where the width allows."""

    def __init__(self, channels: int, group: int | None = None):
        super().__init__(channels, group=group or math.gcd(channels, 4))

    def forward(self, x: Tensor) -> Tensor:
        """Maps (N, C, H, W) to (N, C, Ho, Wo)."""
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class DCNv4Conv(nn.Module):
    """`dcnzoo.layers.DCNv4Conv2d` in place of a plain Conv row, with normalisation and activation behind it.

    Args:
        c1: Channels of the input.
        c2: Channels of the output.
        k: Size of the sampling grid, an int or a (height, width) pair like s, p and d.
        s: Stride.
        p: Padding in pixels; None for as much as keeps the size at stride 1.
        g: Number of groups of channels that the projections keep apart.
        d: Dilation.
        act: True for the activation of ultralytics' Conv, a module for that one, else none.
    """

    def __init__(self, c1, c2, k=3, s=1, p=None, g=1, d=1, act=True):
        super().__init__()
        k, d = pair('k', k, 1), pair('d', d, 1)
        if p is None:
            p = [distance * (size - 1) // 2 for size, distance in zip(k, d, strict=True)]
        self.conv = layers.DCNv4Conv2d(c1, c2, k, s, p, d, g, bias=False)
        self.bn = nn.BatchNorm2d(c2)
        self.act = Conv.default_act if act is True else act if isinstance(act, nn.Module) else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Maps (N, c1, H, W) to (N, c2, Ho, Wo)."""
        return self.act(self.bn(self.conv(x)))


class Bottleneck_DCNv4(nn.Module):
    """A convolution and a DCNv4, with a shortcut where the channels agree."""

    def __init__(self, c1, c2, shortcut=True, g=1, k=3):
        super().__init__()
        self.cv1 = Conv(c1, c2, k)
        self.cv2 = DCNv4(c2, group=_groups(g))
        self.add = shortcut and c1 == c2

    def forward(self, x: Tensor) -> Tensor:
        """Maps (N, c1, H, W) to (N, c2, H, W)."""
        out = self.cv2(self.cv1(x))
        return x + out if self.add else out


class Bottleneck_DynamicConv(nn.Module):
    """A convolution to e * c2 channels and a dynamic one back, with a shortcut where the channels agree."""

    def __init__(self, c1, c2, shortcut=True, g=1, k=3, e=0.5):
        super().__init__()
        hidden = int(c2 * e)
        self.cv1 = Conv(c1, hidden, k)
        self.cv2 = DynamicConv(hidden, c2, 3, g=_groups(g) or 1)
        self.add = shortcut and c1 == c2

    def forward(self, x: Tensor) -> Tensor:
        """Maps (N, c1, H, W) to (N, c2, H, W)."""
        out = self.cv2(self.cv1(x))
        return x + out if self.add else out


class GhostModule_DynamicConv(nn.Module):
    """Half of the channels by a 1x1 dynamic convolution, the others from those by a depthwise 3x3 one."""

    def __init__(self, c1, c2):
        super().__init__()
        primary = math.ceil(c2 / 2)
        self.c2 = c2
        self.primary_conv = nn.Sequential(DynamicConv(c1, primary), nn.BatchNorm2d(primary), nn.ReLU(inplace=True))
        self.cheap_operation = nn.Sequential(
            DynamicConv(primary, primary, 3, g=primary), nn.BatchNorm2d(primary), nn.ReLU(inplace=True)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Maps (N, c1, H, W) to (N, c2, H, W)."""
        primary = self.primary_conv(x)
        return torch.cat([primary, self.cheap_operation(primary)], 1)[:, : self.c2]


class _C2fLayout(nn.Module):
    """YOLOv8's C2f around any block: one half of the channels goes through n of them, all results are joined."""

    def __init__(self, c1: int, c2: int, n: int, e: float, block: Callable[[int], nn.Module]):
        super().__init__()
        self.c = int(c2 * e)
        self.cv1 = Conv(c1, 2 * self.c, 1)
        self.cv2 = Conv((2 + n) * self.c, c2, 1)
        self.m = nn.ModuleList(block(self.c) for _ in range(n))

    def forward(self, x: Tensor) -> Tensor:
        """Maps (N, c1, H, W) to (N, c2, H, W)."""
        maps = list(self.cv1(x).chunk(2, 1))
        for block in self.m:
            maps.append(block(maps[-1]))
        return self.cv2(torch.cat(maps, 1))


class _C3Layout(nn.Module):
    """YOLOv5's C3 around any block: a chain of n of them beside a 1x1 convolution, joined."""

    def __init__(self, c1: int, c2: int, n: int, e: float, block: Callable[[int], nn.Module]):
        super().__init__()
        hidden = int(c2 * e)
        self.cv1 = Conv(c1, hidden, 1)
        self.cv2 = Conv(c1, hidden, 1)
        self.cv3 = Conv(2 * hidden, c2, 1)
        self.m = nn.Sequential(*(block(hidden) for _ in range(n)))

    def forward(self, x: Tensor) -> Tensor:
        """Maps (N, c1, H, W) to (N, c2, H, W)."""
        return self.cv3(torch.cat([self.m(self.cv1(x)), self.cv2(x)], 1))


class C2f_DCNv4(_C2fLayout):
    """C2f whose bottlenecks end in DCNv4; g is its number of groups, 1 for the usual 4."""

    def __init__(self, c1, c2, n=1, shortcut=False, g=1, e=0.5):
        super().__init__(c1, c2, n, e, lambda c: Bottleneck_DCNv4(c, c, shortcut, g))


class C2f_GhostModule_DynamicConv(_C2fLayout):
    """C2f of dynamic ghost modules. They have neither shortcut nor groups: both arguments are there for YAML files."""

    def __init__(self, c1, c2, n=1, shortcut=False, g=1, e=0.5):
        super().__init__(c1, c2, n, e, lambda c: GhostModule_DynamicConv(c, c))


class C3k_DCNv4(_C3Layout):
    """YOLO11's C3k whose bottlenecks end in DCNv4; g is its number of groups, 1 for the usual 4."""

    def __init__(self, c1, c2, n=1, shortcut=True, g=1, e=0.5, k=3):
        super().__init__(c1, c2, n, e, lambda c: Bottleneck_DCNv4(c, c, shortcut, g, k))


class C3k_DynamicConv(_C3Layout):
    """YOLO11's C3k whose bottlenecks end in a dynamic convolution of g groups."""

    def __init__(self, c1, c2, n=1, shortcut=True, g=1, e=0.5, k=3):
        super().__init__(c1, c2, n, e, lambda c: Bottleneck_DynamicConv(c, c, shortcut, g, k, e=1.0))


class C3k2_DCNv4(_C2fLayout):
    """YOLO11's C3k2 whose bottlenecks end in DCNv4; g is its number of groups, 1 for the usual 4."""

    def __init__(self, c1, c2, n=1, c3k=False, e=0.5, g=1, shortcut=True):
        def block(c: int) -> nn.Module:
            return C3k_DCNv4(c, c, 2, shortcut, g) if c3k else Bottleneck_DCNv4(c, c, shortcut, g)

        super().__init__(c1, c2, n, e, block)


class C3k2_DynamicConv(_C2fLayout):
    """YOLO11's C3k2 whose bottlenecks end in a dynamic convolution of g groups."""

    def __init__(self, c1, c2, n=1, c3k=False, e=0.5, g=1, shortcut=True):
        def block(c: int) -> nn.Module:
            return C3k_DynamicConv(c, c, 2, shortcut, g) if c3k else Bottleneck_DynamicConv(c, c, shortcut, g)

        super().__init__(c1, c2, n, e, block)


class TimmBackbone(nn.Module):
    """A timm model as the whole backbone: its maps at strides 8, 16 and 32, for `Index` rows to pick from.

    Images come as YOLO's, from 0 to 1, and are normalised as the model's weights ask for.

    Args:
        name: A name of timm's registry, 'dcnv4_tiny' for instance.
        pretrained: Fetch the model's published weights.

    Raises:
        ValueError: There is no such model, or its last three maps are not at those strides.
    """

    loaded = False  # whether it comes out of a checkpoint, with its weights

    def __init__(self, name: str, pretrained: bool = False):
        super().__init__()
        if not timm.is_model(name):
            raise ValueError(f'timm has no model {name!r}')
        self.m = timm.create_model(name, pretrained=pretrained, features_only=True, out_indices=(-3, -2, -1))
        strides = self.m.feature_info.reduction()
        if strides != [8, 16, 32]:
            raise ValueError(f'{name} has its last maps at strides {strides}, not 8, 16, 32')
        data = resolve_model_data_config(self.m)
        for key in ('mean', 'std'):
            self.register_buffer(key, torch.tensor(data[key]).view(1, -1, 1, 1), persistent=False)

    @property
    def channels(self) -> list[int]:
        """Channels of the three maps."""
        return self.m.feature_info.channels()

    def forward(self, x: Tensor) -> list[Tensor]:
        """Maps images (N, 3, H, W) to three maps (N, C_i, H / stride_i, W / stride_i)."""
        if x.shape[1] != 3:
            raise ValueError(f'a timm backbone takes images of 3 channels, got {x.shape[1]}')
        return self.m((x - self.mean) / self.std)

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        self.loaded = True

    def __deepcopy__(self, memo: dict) -> 'TimmBackbone':
        # Not by way of __setstate__: a copy is no more out of a checkpoint than the original.
        copied = memo[id(self)] = type(self).__new__(type(self))
        copied.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return copied


def without_fetching(config: Mapping) -> dict:
    """The configuration of a model whose weights are at hand: no backbone asks for the published ones."""
    settled = dict(config)
    for section in ('backbone', 'head'):
        settled[section] = [
            [*place, name, args[:2] if name == 'TimmBackbone' else args] for *place, name, args in config[section]
        ]
    return settled


def _groups(g: int) -> int | None:
    """The number of groups a row asks for, None where it leaves the choice."""
    if isinstance(g, bool) or not isinstance(g, int):
        raise ValueError(f'g must be a positive int, got {g!r}')
    return None if g == 1 else g
