"""The linear map of a layer, on a CPU by oneDNN where PyTorch would ask MKL for it.

MKL takes its AVX2 kernels on processors that are not Intel's. oneDNN, which is in PyTorch as well, looks at the
instruction set alone: with AVX-512 it is twice as fast there. PyTorch offers that for float32 to its compiler only, as
`mkldnn::_linear_pointwise`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.overrides import handle_torch_function, has_torch_function

# Below this many multiplications what oneDNN needs to prepare outweighs what it gains.
_WORTH_IT = 1 << 20
_PLAIN = (Tensor, nn.Parameter)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Computes `x @ weight.T + bias`, as `torch.nn.functional.linear` does.

    Args:
        x: Input, (..., in_features).
        weight: Weight, (out_features, in_features).
        bias: Bias, (out_features,), or None.

    Returns:
        The output, (..., out_features).
    """
    if torch.jit.is_scripting():
        return F.linear(x, weight, bias)
    else:
        return _linear(x, weight, bias)


def _linear(x, weight, bias):
    if has_torch_function((x, weight)):  # an fx graph keeps the call, and with it the choice
        return handle_torch_function(linear, (x, weight), x, weight, bias)
    if torch.jit.is_tracing() or not _fits(x, weight, bias):
        return F.linear(x, weight, bias)
    if not gains(x, weight, x.numel() * weight.shape[0]):
        return F.linear(x, weight, bias)
    if torch.is_grad_enabled() and (
        x.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
    ):
        return _Linear.apply(x, weight, bias)
    return _product(x, weight, bias)


def _fits(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether the shapes are what the layers of a network have; PyTorch knows the rest, and the errors."""
    return (
        x.ndim > 1
        and weight.ndim == 2
        and x.shape[-1] == weight.shape[1]
        and (bias is None or bias.shape == weight.shape[:1])
    )


def gains(x: Tensor, weight: Tensor, products: int) -> bool:
    """Whether oneDNN would multiply faster: an eager call of plain float32 tensors, large enough, on such a processor.

    Args:
        x: One operand.
        weight: The other.
        products: Multiplications of numbers in one product of matrices.
    """
    return (
        _GAINS
        and not torch.compiler.is_compiling()
        and products >= _WORTH_IT
        and type(x) in _PLAIN
        and type(weight) in _PLAIN
        and x.dtype is torch.float32
        and weight.dtype is torch.float32
        and x.is_cpu
        and weight.is_cpu
        and torch.backends.mkldnn.enabled
        and not torch.is_autocast_enabled('cpu')
        and not torch._C._are_functorch_transforms_active()
        and not torch._C._len_torch_dispatch_stack()
        and forward_ad._current_level < 0
    )


def _cpu_gains() -> bool:
    return (
        torch.backends.mkldnn.is_available()
        and torch.backends.cpu.get_cpu_capability() == 'AVX512'
        and hasattr(torch.ops.mkldnn, '_linear_pointwise')
    )


_GAINS = _cpu_gains()


def _product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`x @ weight.T + bias`; the weight may be a transposed view."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, 'none', [], '')


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        return _product(x, weight, bias)

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        rows, grad_rows = x.reshape(-1, x.shape[-1]), grad.reshape(-1, grad.shape[-1])
        grad_x = grad_weight = grad_bias = None
        again = torch.is_grad_enabled()  # to be differentiated once more
        if ctx.needs_input_grad[0]:
            grad_x = grad @ weight if again else _product(grad, weight.t())
        if ctx.needs_input_grad[1]:
            if again:
                grad_weight = grad_rows.t() @ rows
            elif rows.shape[1] <= grad_rows.shape[1]:  # the first operand is copied
                grad_weight = _product(rows.t(), grad_rows.t()).t()
            else:
                grad_weight = _product(grad_rows.t(), rows.t())
        if ctx.needs_input_grad[2]:
            grad_bias = grad_rows.sum(0)
        return grad_x, grad_weight, grad_bias
