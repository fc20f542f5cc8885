"""The operator on a GPU: what the tests on the host cannot see. `tests/ops` checks its properties on a GPU, too."""

import pytest
import torch

from dcnzoo.ops import available_backends, dcnv4, deform_attn, use_backend
from tests.ops import attention
from tests.ops.cases import CASES, TOLERANCE, Case, answer, check, error, run

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason='this machine has no GPU that torch can use'),
]
BACKENDS = ['native', 'triton'] if torch.cuda.is_available() else ['native']
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
STAGE = Case('stage_1', batch=4, height=56, width=56, channels=64, arguments={'groups': 4}, tail=4)


@pytest.fixture(params=BACKENDS)
def backend(request):
    if request.param not in available_backends('cuda'):
        pytest.skip(f'the {request.param} backend is not available on GPUs here')
    with use_backend(request.param):
        yield request.param


def expected(case, operands):
    """The float64 answer, computed on the CPU from the operands' own numbers, on the GPU."""
    return [tensor.cuda() for tensor in answer(case.geometry, *(operand.cpu() for operand in operands))]


@pytest.fixture
def poisoned():
    """Fills the memory that the next calls will be given with NaN, so that an element left unwritten shows."""
    blocks = [torch.full((2**k,), float('nan'), device='cuda') for k in range(8, 26) for _ in range(2)]
    torch.cuda.synchronize()
    del blocks


@pytest.mark.parametrize('deterministic', [False, True], ids=['default', 'deterministic'])
@pytest.mark.parametrize('dtype', DTYPES, ids=str)
@pytest.mark.parametrize('case', [*CASES, STAGE], ids=lambda case: case.name)
def test_output_and_gradients(backend, poisoned, case, dtype, deterministic):
    operands = case.operands(dtype, 'cuda')
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(deterministic)
    try:
        check(run(case.geometry, *operands), expected(case, operands), dtype)
    finally:
        torch.use_deterministic_algorithms(before)


def test_deterministic_gradients_repeat_bit_by_bit():
    operands = STAGE.operands(torch.float16, 'cuda')
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        first, *others = (run(STAGE.geometry, *operands) for _ in range(5))
    finally:
        torch.use_deterministic_algorithms(before)
    assert all(torch.equal(one, two) for other in others for one, two in zip(first, other, strict=True))


@pytest.mark.parametrize('dtype', [torch.float16, torch.float32], ids=str)
def test_other_stream_and_graph(backend, dtype):
    value, offset_mask, grad_output = STAGE.operands(dtype, 'cuda')
    operands = value.requires_grad_(), offset_mask.requires_grad_()
    wanted = run(STAGE.geometry, value, offset_mask, grad_output)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            output = dcnv4(*operands, **STAGE.geometry)
            results = output, *torch.autograd.grad(output, operands, grad_output)
    torch.cuda.current_stream().wait_stream(side)
    for actual, reference in zip(results, wanted, strict=True):
        assert error(actual, reference) <= TOLERANCE[dtype]

    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = dcnv4(*operands, **STAGE.geometry)
        results = output, *torch.autograd.grad(output, operands, grad_output)
    with torch.no_grad():
        fresh = STAGE.operands(dtype, 'cuda', seed=1)
        for target, source in zip((*operands, grad_output), fresh, strict=True):
            target.copy_(source)
    graph.replay()
    for actual, reference in zip(results, run(STAGE.geometry, *fresh), strict=True):
        assert error(actual, reference) <= TOLERANCE[dtype]


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason='needs two GPUs')
def test_other_device(backend):
    operands = STAGE.operands(torch.float16, 'cuda:1')
    results = run(STAGE.geometry, *operands)
    assert all(result.device == operands[0].device for result in results)
    check([result.cuda(0) for result in results], expected(STAGE, operands), torch.float16)


def test_tensors_on_different_devices_without_the_checks_in_python():
    """The registered operator, as TorchScript calls it."""
    if 'native' not in available_backends('cuda'):
        pytest.skip('the CUDA library was not built')
    value, offset_mask, grad_output = Case('plain').operands(torch.float32, 'cuda')
    arguments = 2, 3, 3, 1, 1, 1, 1, 1, 1, 1.0, False, False
    with pytest.raises(RuntimeError, match='all tensors must be on the same device, got cuda:0 and one that is not'):
        torch.ops.dcnzoo.dcnv4(value, offset_mask.cpu(), *arguments)
    with pytest.raises(RuntimeError, match='all tensors must be on the same device'):
        torch.ops.dcnzoo.dcnv4_backward(grad_output.cpu(), value, offset_mask, *arguments, False)


@pytest.mark.slow
def test_more_elements_than_fit_32_bits(backend):
    """One of the last images of a batch of 2^31 + elements agrees with the same image alone."""
    shape = (2**31 // (64 * 64 * 64) + 2, 64, 64, 64)
    if torch.cuda.mem_get_info()[0] < 16e9:
        pytest.skip('needs 16 GB of free GPU memory')
    value = torch.randn(shape[1:], device='cuda', dtype=torch.float16).expand(shape)
    offset_mask = torch.randn(1, 64, 64, 32, device='cuda', dtype=torch.float16).expand(shape[0], -1, -1, -1)
    output = dcnv4(value, offset_mask, groups=1)
    assert output.numel() > 2**31
    alone = dcnv4(value[:1].contiguous(), offset_mask[:1].contiguous(), groups=1)
    assert torch.equal(output[-1:], alone) and torch.equal(output[:1], alone)


@pytest.mark.parametrize('deterministic', [False, True], ids=['default', 'deterministic'])
@pytest.mark.parametrize('dtype', DTYPES, ids=str)
@pytest.mark.parametrize('case', attention.CASES, ids=lambda case: case.name)
def test_attention(backend, poisoned, case, dtype, deterministic):
    operands = case.operands(dtype, 'cuda')
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(deterministic)
    try:
        results = attention.run(case.shapes, *operands)
    finally:
        torch.use_deterministic_algorithms(before)
    answer = attention.answer(case.shapes, *(operand.cpu() for operand in operands))
    attention.check([result.cpu() for result in results], answer, dtype)


def test_attention_in_a_graph_wants_no_host(backend):
    """Sizes given as pairs are not read back, so that a call can be captured; Triton reads them from the GPU."""
    if backend == 'triton':
        pytest.skip('it copies the sizes to the GPU')
    case = attention.Case('plain')
    operands = case.operands(torch.float16, 'cuda')[:3]
    expected = deform_attn(operands[0], case.shapes, *operands[1:])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = deform_attn(operands[0], case.shapes, *operands[1:])
    output.zero_()
    graph.replay()
    assert torch.equal(output, expected)
