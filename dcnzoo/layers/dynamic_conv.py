"""Dynamic convolution: kernels mixed from a bank of experts, with shares predicted from the input."""

import math
from collections import OrderedDict

import torch
from torch import Tensor, nn

from ..ops import dynamic_conv2d
from ..ops._dynamic_conv import pad_same, routed_conv2d, serves_routed, symmetric_padding
from ._geometry import check_groups, check_map, check_positive, pair

torch.fx.wrap('check_map')
torch.fx.wrap('pad_same')


class CondConv2d(nn.Module):
    """A bank of expert kernels, mixed per sample by shares given from outside.

    Arguments, parameters and results are those of timm's CondConv2d; the algorithm is `dcnzoo.ops.dynamic_conv2d`.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        kernel_size: Size of the kernels, an int or a (height, width) pair like stride, padding and dilation.
        stride: Step of the output grid in pixels of the input.
        padding: Rows and columns of zeros around the input; or 'same' for as many as give ceil(H / stride) rows, an
            odd one below; or '' for as many on both sides, which is the same for odd kernels and stride 1; or 'valid'
            for none.
        dilation: Distance of the kernel's taps in pixels.
        groups: Number of groups of channels that are convolved apart.
        bias: Whether every expert has a bias too.
        num_experts: Number of kernels in the bank.
        device: Device of the parameters.
        dtype: Dtype of the parameters.

    Raises:
        TypeError: A size is neither an int nor a pair of ints.
        ValueError: A number is out of range, or `groups` does not divide the channels.
    """

    same_padding: torch.jit.Final[bool]

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int] = 3,
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] | str = '',
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = False,
        num_experts: int = 4,
        device=None,
        dtype=None,
    ):
        dd = {'device': device, 'dtype': dtype}
        super().__init__()
        check_positive(in_channels=in_channels, out_channels=out_channels, groups=groups, num_experts=num_experts)
        check_groups(in_channels, out_channels, groups)
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.kernel_size = pair('kernel_size', kernel_size, 1)
        self.stride = pair('stride', stride, 1)
        self.dilation = pair('dilation', dilation, 1)
        self.groups = groups
        self.num_experts = num_experts
        self.padding, self.same_padding = self._resolve(padding)
        self.weight_shape = (out_channels, in_channels // groups, *self.kernel_size)
        # Flattened: a parameter of 5 dimensions could not be converted to channels_last with its module.
        self.weight = nn.Parameter(torch.empty(num_experts, math.prod(self.weight_shape), **dd))
        if bias:
            self.bias = nn.Parameter(torch.empty(num_experts, out_channels, **dd))
        else:
            self.register_parameter('bias', None)
        self.reset_parameters()

    def _resolve(self, padding: int | tuple[int, int] | str) -> tuple[tuple[int, int], bool]:
        """Padding in pixels, and whether the input's size decides about more."""
        if not isinstance(padding, str):
            return pair('padding', padding, 0), False
        symmetric = symmetric_padding(self.kernel_size, self.stride, self.dilation)
        if padding == '':
            return symmetric, False
        if padding == 'valid':
            return (0, 0), False
        if padding != 'same':
            raise ValueError(f"padding must be an int, a pair of ints, 'same', 'valid' or '', got {padding!r}")
        spans = [distance * (size - 1) for distance, size in zip(self.dilation, self.kernel_size, strict=True)]
        if self.stride == (1, 1) and all(span % 2 == 0 for span in spans):
            return symmetric, False
        return (0, 0), True

    def reset_parameters(self) -> None:
        """Initialises every expert as `torch.nn.Conv2d` does its one kernel."""
        for expert in range(self.num_experts):
            nn.init.kaiming_uniform_(self.weight[expert].view(self.weight_shape), a=math.sqrt(5))
        if self.bias is not None:
            bound = 1 / math.sqrt(math.prod(self.weight_shape[1:]))
            nn.init.uniform_(self.bias, -bound, bound)

    def _load_from_state_dict(self, state_dict, prefix, *args):
        # Others keep the same numbers as (E, Cout, C / groups, kh, kw), or with E and Cout as one dimension.
        key = prefix + 'weight'
        stored = state_dict.get(key)
        out_channels, *kernel = self.weight_shape
        if stored is not None and tuple(stored.shape) in (
            (self.num_experts, *self.weight_shape),
            (self.num_experts * out_channels, *kernel),
        ):
            state_dict[key] = stored.reshape(self.num_experts, -1)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        return (
            f'{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}, '
            f'padding={"same" if self.same_padding else self.padding}, dilation={self.dilation}, '
            f'groups={self.groups}, bias={self.bias is not None}, num_experts={self.num_experts}'
        )

    def forward(self, x: Tensor, routing_weights: Tensor) -> Tensor:
        """Convolves (N, in_channels, H, W) with kernels mixed by (N, num_experts)."""
        if self.same_padding:
            x = pad_same(x, self.kernel_size, self.stride, self.dilation)
        return dynamic_conv2d(
            x,
            self.weight,
            routing_weights,
            self.bias,
            kernel_size=self.kernel_size,
            stride=self.stride,
            padding=self.padding,
            dilation=self.dilation,
            groups=self.groups,
        )


class DynamicConv2d(nn.Module):
    """Dynamic convolution of ParameterNet, `arXiv 2306.14525 <https://arxiv.org/abs/2306.14525>`_.

    The input's global average decides how much of each expert goes into the kernel that the sample is convolved with:
    many parameters, hardly more arithmetic than one convolution. A linear layer and a sigmoid are what was published as
    code and what the models' weights fit; the paper's text has two layers, the hidden one as wide as the input, and a
    softmax.

    There is no freezing the kernels for deployment, they are another for every input. Only a single expert leaves a
    plain convolution, see `fuse`.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        kernel_size: Size of the kernels, an int or a (height, width) pair like stride, padding and dilation.
        stride: Step of the output grid in pixels of the input.
        padding: Rows and columns of zeros around the input; or 'same' for as many as give ceil(H / stride) rows, an
            odd one below; or '' for as many on both sides, which is the same for odd kernels and stride 1; or 'valid'
            for none.
        dilation: Distance of the kernel's taps in pixels.
        groups: Number of groups of channels that are convolved apart.
        bias: Whether every expert has a bias too.
        num_experts: Number of kernels in the bank.
        routing: What predicts the experts' shares from the average, 'linear' or 'mlp' for two layers.
        routing_activation: 'sigmoid', each share apart, or 'softmax', shares that sum to 1.
        temperature: Divides the logits of the shares: the higher, the more equal they are. May be changed at any time.
        device: Device of the parameters.
        dtype: Dtype of the parameters.

    Raises:
        TypeError: A size is neither an int nor a pair of ints.
        ValueError: A number or name is out of range, or `groups` does not divide the channels.
    """

    softmax: torch.jit.Final[bool]

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int] = 3,
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] | str = '',
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = False,
        num_experts: int = 4,
        routing: str = 'linear',
        routing_activation: str = 'sigmoid',
        temperature: float = 1.0,
        device=None,
        dtype=None,
    ):
        dd = {'device': device, 'dtype': dtype}
        super().__init__()
        if routing not in ('linear', 'mlp'):
            raise ValueError(f"routing must be 'linear' or 'mlp', got {routing!r}")
        if routing_activation not in ('sigmoid', 'softmax'):
            raise ValueError(f"routing_activation must be 'sigmoid' or 'softmax', got {routing_activation!r}")
        if not temperature > 0:
            raise ValueError(f'temperature must be positive, got {temperature!r}')
        self.softmax = routing_activation == 'softmax'
        self.temperature = float(temperature)
        cond_conv = CondConv2d(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, num_experts, **dd
        )
        self.routing = nn.Linear(in_channels, num_experts, **dd)
        if routing == 'mlp':
            hidden = nn.Linear(in_channels, in_channels, **dd)
            self.routing = nn.Sequential(OrderedDict(fc1=hidden, act=nn.ReLU(), fc2=self.routing))
        self.cond_conv = cond_conv

    def extra_repr(self) -> str:
        return f'routing_activation={"softmax" if self.softmax else "sigmoid"}, temperature={self.temperature}'

    def shares(self, x: Tensor) -> Tensor:
        """Predicts the experts' shares: (N, in_channels, H, W) -> (N, num_experts)."""
        check_map(x, 'N, C, H, W', self.cond_conv.in_channels)
        logits = self.routing(x.mean((2, 3)))
        if self.temperature != 1.0:
            logits = logits / self.temperature
        return logits.softmax(1) if self.softmax else logits.sigmoid()

    def forward(self, x: Tensor) -> Tensor:
        """Maps (N, in_channels, H, W) to (N, out_channels, Ho, Wo), Ho and Wo as for any convolution.

        Raises:
            ValueError: The input has another shape, or is too small for the kernel.
        """
        if torch.jit.is_scripting():
            return self.cond_conv(x, self.shares(x))
        else:
            return self._forward(x)

    @torch.jit.unused
    def _forward(self, x: Tensor) -> Tensor:
        bank, routing = self.cond_conv, self.routing
        # A subclass, or a function set on the instance, may predict them otherwise.
        as_published = getattr(self.shares, '__func__', None) is DynamicConv2d.shares
        if not (as_published and _are_plain(bank, routing)):
            return bank(x, self.shares(x))
        check_map(x, 'N, C, H, W', bank.in_channels)
        served = serves_routed(x, bank.weight, bank.kernel_size, bank.stride, bank.padding, bank.groups)
        if not (served and _fit(bank, routing)):
            return bank(x, self.shares(x))
        return routed_conv2d(
            x,
            bank.weight,
            (routing.weight, routing.bias),
            self.temperature,
            self.softmax,
            bank.kernel_size,
            bank.stride,
            bank.padding,
            bank.dilation,
            bank.groups,
        )

    def fuse(self) -> nn.Module:
        """What computes the same with a plain convolution, where there is but one expert; otherwise the module itself.

        timm's `reparameterize_model` calls this. The one expert's share under a sigmoid still depends on the input, and
        stays as a gate behind the convolution; under a softmax it is 1 and nothing stays.
        """
        bank = self.cond_conv
        if bank.num_experts > 1:
            return self
        conv = nn.Conv2d(
            bank.in_channels,
            bank.out_channels,
            bank.kernel_size,
            bank.stride,
            bank.padding,
            bank.dilation,
            bank.groups,
            bank.bias is not None,
            device=bank.weight.device,
            dtype=bank.weight.dtype,
        )
        with torch.no_grad():
            conv.weight.copy_(bank.weight.view(bank.weight_shape))
            if bank.bias is not None:
                conv.bias.copy_(bank.bias[0])
        plain = self.softmax and not bank.same_padding
        return conv if plain else GatedConv2d(conv, self).train(self.training)


def _are_plain(bank: CondConv2d, routing: nn.Module) -> bool:
    """Whether calls of the two do nothing but one convolution and one linear map, so that their parameters say all."""
    return (
        type(routing) is nn.Linear
        and type(bank) is CondConv2d
        and bank.bias is None
        and not bank.same_padding
        and not (routing._forward_hooks or routing._forward_pre_hooks)
        and not (bank._forward_hooks or bank._forward_pre_hooks)
        and not nn.modules.module._has_any_global_hook()
        and 'forward' not in vars(routing)  # where accelerate, for one, puts its own
        and 'forward' not in vars(bank)
    )


def _fit(bank: CondConv2d, routing: nn.Linear) -> bool:
    """Whether neither was given parameters of another shape or dtype, which are answered with an error elsewhere."""
    return (
        routing.weight.shape == (bank.num_experts, bank.in_channels)
        and routing.weight.dtype == bank.weight.dtype
        and bank.weight.numel() == bank.num_experts * math.prod(bank.weight_shape)
    )


class GatedConv2d(nn.Module):
    """A `DynamicConv2d` of one expert as a plain convolution, whose output is scaled per sample.

    Args:
        conv: The expert.
        dynamic: The module that it stands for; its routing is taken over.
    """

    gated: torch.jit.Final[bool]
    same_padding: torch.jit.Final[bool]

    def __init__(self, conv: nn.Conv2d, dynamic: DynamicConv2d):
        super().__init__()
        self.conv = conv
        self.gated = not dynamic.softmax
        self.routing = dynamic.routing if self.gated else nn.Identity()
        self.temperature = dynamic.temperature
        self.same_padding = dynamic.cond_conv.same_padding
        self.kernel_size = dynamic.cond_conv.kernel_size
        self.stride = dynamic.cond_conv.stride
        self.dilation = dynamic.cond_conv.dilation

    def forward(self, x: Tensor) -> Tensor:
        """Maps (N, in_channels, H, W) to (N, out_channels, Ho, Wo)."""
        check_map(x, 'N, C, H, W', self.conv.in_channels)
        padded = pad_same(x, self.kernel_size, self.stride, self.dilation) if self.same_padding else x
        out = self.conv(padded)
        if self.gated:
            gate = (self.routing(x.mean((2, 3))) / self.temperature).sigmoid()
            out = out * gate.view(-1, 1, 1, 1)
        return out
