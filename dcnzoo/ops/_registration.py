"""What an operator with kernels needs beside them: backends, shapes of its outputs, autograd, vmap, autocast."""

import importlib
from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import reference
from ._library import library, missing, operator, warn_slow


def register(name: str, tensors: int, fake: Callable[..., Tensor]) -> None:
    """Registers `name` and `name_backward`, whose schemas are in `_library`, and their Triton twins.

    The operator takes its differentiable tensors first, batched along their first dimension, then what is plain. Its
    backward takes the output's gradient before and `deterministic` behind them, and returns a gradient for each tensor,
    of its shape and dtype. Functions of both names are in `reference` and in `_triton_{name}`.

    Args:
        name: The operator.
        tensors: How many tensors it takes.
        fake: Makes an output from the arguments without computing it.
    """
    for backend in (None, 'triton'):
        _register_one(name, backend, tensors, fake)

    def serve_slowly(*arguments):
        warn_slow(arguments[0].device.type)
        return getattr(reference, name)(*arguments)

    def triton(function: str):
        # Importing the module imports the compiler, so only at first use.
        return lambda *arguments: getattr(importlib.import_module(f'{__package__}._triton_{name}'), function)(
            *arguments
        )

    library.impl(name, serve_slowly, 'CompositeExplicitAutograd')
    library.impl(f'{name}_backward', _reference_backward(name), 'CompositeExplicitAutograd')
    for function in (name, f'{name}_backward'):
        library.impl(f'{function}_triton', triton(function), 'CompositeExplicitAutograd')
        for device in ('cuda', 'xpu'):
            if missing('native', device) and not missing('triton', device):
                library.impl(function, triton(function), device.upper())


def _reference_backward(name: str) -> Callable[..., tuple]:
    return lambda *arguments: getattr(reference, f'{name}_backward')(*arguments[:-1])  # it is deterministic as it is


def _register_one(name: str, backend: str | None, tensors: int, fake: Callable[..., Tensor]) -> None:
    forward_op, backward_op = operator(name, backend), operator(f'{name}_backward', backend)

    def backward(operands, plain, grad_output):
        return backward_op(grad_output, *operands, *plain, torch.are_deterministic_algorithms_enabled())

    def fake_backward(grad_output, *arguments):
        return tuple(tensor.new_empty(tensor.shape) for tensor in arguments[:tensors])

    def double_backward(operands, plain, *grads):
        """Second derivatives are rare enough to be left to the reference."""
        with torch.enable_grad():
            inputs = tuple(tensor.detach().requires_grad_() for tensor in operands)
            grad_output, *operands = inputs
            output = getattr(reference, name)(*operands, *plain[:-1])
            first = torch.autograd.grad(output, operands, grad_output, create_graph=True)
        return torch.autograd.grad(first, inputs, grads, allow_unused=True)

    torch.library.register_fake(forward_op, fake, lib=library)
    torch.library.register_fake(backward_op, fake_backward, lib=library)
    _register_autograd(forward_op, tensors, backward, getattr(reference, name))
    _register_autograd(backward_op, tensors + 1, double_backward, _reference_backward(name))
    torch.library.register_vmap(forward_op, _vmap_rule(forward_op, tensors), lib=library)
    torch.library.register_vmap(backward_op, _vmap_rule(backward_op, tensors + 1), lib=library)
    for key in ('AutocastCPU', 'AutocastCUDA', 'AutocastXPU', 'AutocastMPS'):
        # Autocast leaves the operands as they come: the kernels compute in float32 for half types anyway.
        for op in (forward_op, backward_op):
            library.impl(op, torch.library.fallthrough_kernel, key)


def _register_autograd(
    op: torch._ops.OpOverload, tensors: int, backward: Callable[..., tuple], composition: Callable
) -> None:
    """Does what `torch.library.register_autograd` does, for operators without defaults or lists of tensors.

    That one looks through the whole schema at every call, which takes as long as the operator on a map of 7 x 7 pixels.

    Args:
        op: An operator that takes its tensors first.
        tensors: How many tensors it takes.
        backward: Computes their gradients from them, from the other arguments and from the outputs' gradients.
        composition: Computes the same as the operator, for derivatives in forward mode.
    """

    def redispatch(keyset, *arguments):
        with torch._C._AutoDispatchBelowAutograd():
            return op.redispatch(keyset & torch._C._after_autograd_keyset, *arguments)

    def record(ctx, keyset, *arguments):
        ctx.save_for_backward(*arguments[:tensors])
        ctx.plain = arguments[tensors:]
        return redispatch(keyset, *arguments)

    def propagate(ctx, *grads):
        return None, *backward(ctx.saved_tensors, ctx.plain, *grads), *(None for _ in ctx.plain)

    # With the operator's name for profilers and error messages.
    methods = {'forward': staticmethod(record), 'backward': staticmethod(propagate)}
    function = type(op._opname, (torch.autograd.Function,), methods)

    def differentiate(keyset, *arguments):
        if forward_ad._current_level >= 0 and any(map(_has_tangent, arguments[:tensors])):
            return composition(*arguments)
        recorded = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in arguments[:tensors])
        return (function.apply if recorded else redispatch)(keyset, *arguments)

    library.impl(op, differentiate, 'Autograd', with_keyset=True)


def _has_tangent(tensor: Tensor) -> bool:
    return forward_ad.unpack_dual(tensor).tangent is not None


def _lead(tensor: Tensor, dim: int | None, size: int) -> Tensor:
    """Moves a vmapped dimension to the front, or adds one for an operand that has none."""
    return tensor.expand(size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)


def _vmap_rule(op: torch._ops.OpOverload, tensors: int):
    def rule(info, in_dims, *arguments):
        leading = [_lead(*pair, info.batch_size) for pair in zip(arguments[:tensors], in_dims[:tensors], strict=True)]
        result = op(*(tensor.flatten(0, 1) for tensor in leading), *arguments[tensors:])
        batches = leading[0].shape[:2]
        if isinstance(result, Tensor):
            return result.unflatten(0, batches), 0
        return tuple(part.unflatten(0, batches) for part in result), (0,) * len(result)

    return rule
