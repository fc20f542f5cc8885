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
    recorded = x.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
    return _Linear.apply(x, weight, bias) if recorded and torch.is_grad_enabled() else _product(x, weight, bias)


def batched_linear(x: Tensor, weight: Tensor) -> Tensor:
    """Computes `x @ weight.transpose(1, 2)` by oneDNN, where `gains` says so and no gradients are asked for.

    Args:
        x: Inputs, (N, rows, in_features).
        weight: A weight for each, (N, out_features, in_features), contiguous or transposed.

    Returns:
        The outputs, (N, rows, out_features).
    """
    if x.shape[0] == 1:
        return _product(x, weight[0])
    return torch.stack([_product(*pair) for pair in zip(x.unbind(), weight.unbind(), strict=True)])


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
    # The last: while a graph is recorded, a size that is compared with something is no longer free.
    return ONEDNN_IS_WIDER and torch.backends.mkldnn.enabled and is_plain_call(x, weight) and products >= _WORTH_IT


def is_plain_call(x: Tensor, weight: Tensor) -> bool:
    """Whether float32 tensors on a CPU are computed with at once, with nobody who looks on or changes what happens."""
    return (
        not torch.compiler.is_compiling()
        and type(x) in _PLAIN
        and type(weight) in _PLAIN
        and x.dtype is torch.float32
        and weight.dtype is torch.float32
        and x.is_cpu
        and weight.is_cpu
        and not torch.is_autocast_enabled('cpu')
        and not torch._C._are_functorch_transforms_active()
        and not torch._C._len_torch_dispatch_stack()
        and forward_ad._current_level < 0
    )


def _onednn_is_wider() -> bool:
    return (
        torch.backends.mkldnn.is_available()
        and torch.backends.cpu.get_cpu_capability() == 'AVX512'
        and hasattr(torch.ops.mkldnn, '_linear_pointwise')
    )


ONEDNN_IS_WIDER = _onednn_is_wider()
_linear_pointwise = torch.ops.mkldnn._linear_pointwise.default if ONEDNN_IS_WIDER else None


def _product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`x @ weight.T + bias`; the weight may be a transposed view."""
    return _linear_pointwise(x, weight, bias, 'none', [], '')


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
            grad_weight = grad_rows.t() @ rows if again else _weight_gradient(rows, grad_rows)
        if ctx.needs_input_grad[2]:
            grad_bias = grad_rows.sum(0)
        return grad_x, grad_weight, grad_bias


def _weight_gradient(x: Tensor, grad: Tensor) -> Tensor:
    """`grad.T @ x`, with the smaller one first, for oneDNN copies that."""
    if x.shape[1] <= grad.shape[1]:
        return _product(x.t(), grad.t()).t()
    return _product(grad.t(), x.t())
