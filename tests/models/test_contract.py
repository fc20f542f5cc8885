"""What timm's own test suite asks of a model, and what its users rely on beyond, for every registered model."""

import copy
import math

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.layers import set_scriptable
from timm.models import FeatureInfo, get_notrace_functions, get_notrace_modules
from timm.optim import create_optimizer_v2
from torch.testing import assert_close
from torchvision.models.feature_extraction import NodePathTracer, create_feature_extractor, get_graph_node_names

from .registry import LARGE, MEDIUM, SMALL, create, models, parameter_count

ALL = models()
# The weights of the largest would fill the memory: their options are tested at miniature size.
UP_TO_LARGE = [
    pytest.param(name, marks=pytest.mark.slow) if parameter_count(name) > 120e6 else name for name in models(LARGE)
]
# Of more than 20M parameters they only repeat at length what smaller ones of the architecture show.
UP_TO_MEDIUM = [
    pytest.param(name, marks=pytest.mark.slow) if parameter_count(name) > 20e6 else name for name in models(MEDIUM)
]
UP_TO_SMALL = models(SMALL)
TEST_SIZED = [name for name in ALL if name.startswith('test_')]

SIZE = 64


def images(batch: int = 1, size: int | tuple[int, int] = SIZE, channels: int = 3, seed: int = 0) -> torch.Tensor:
    height, width = (size, size) if isinstance(size, int) else size
    return torch.randn(batch, channels, height, width, generator=torch.Generator().manual_seed(seed))


def assert_same(actual, expected):
    """Equal up to float32 rounding, relative to the largest entry."""
    assert_close(actual, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())


def fx_model(model, train=False):
    """The graph that torch.fx records of a model, as timm's tests make it."""
    tracer_kwargs = dict(
        leaf_modules=get_notrace_modules(), autowrap_functions=get_notrace_functions(), param_shapes_constant=True
    )
    train_nodes, eval_nodes = get_graph_node_names(model, tracer_kwargs=tracer_kwargs)
    train_return_nodes = [train_nodes[-1]]
    if train:
        nodes = list(reversed(NodePathTracer(**tracer_kwargs).trace(model).nodes))
        names = [node.name for node in nodes]
        train_return_nodes = [train_nodes[-names.index(name.name)] for name in nodes[0].all_input_nodes]
    return create_feature_extractor(
        model,
        train_return_nodes=train_return_nodes,
        eval_return_nodes=[eval_nodes[-1]],
        tracer_kwargs=tracer_kwargs,
    )


def only_value(outputs: dict) -> torch.Tensor:
    (value,) = outputs.values()
    return value


@pytest.mark.parametrize('name', UP_TO_LARGE)
@torch.no_grad()
def test_forward(name):
    model = timm.create_model(name).eval()
    outputs = model(images())
    assert outputs.shape == (1, 1000)
    assert outputs.isfinite().all()


@pytest.mark.parametrize('name', UP_TO_MEDIUM)
def test_backward_reaches_every_parameter(name):
    model = create(name, num_classes=42).train()
    outputs = model(images(2))
    assert outputs.shape == (2, 42)
    outputs.square().mean().backward()
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.isfinite().all(), key
        assert parameter.grad.any(), key


@pytest.mark.parametrize('name', UP_TO_LARGE)
def test_backward_from_initialisation(name):
    model = timm.create_model(name, num_classes=42, drop_path_rate=0.1)
    model(images(2, 32)).mean().backward()
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.isfinite().all(), key


@pytest.mark.parametrize('name', UP_TO_MEDIUM)
def test_grad_checkpointing_changes_nothing(name):
    gradients = []
    for enable in (False, True):
        model = create(name)
        model.set_grad_checkpointing(enable)
        x = images().requires_grad_()
        outputs = model(x)
        outputs.square().sum().backward()
        gradients.append((outputs.detach(), x.grad, *(parameter.grad for parameter in model.parameters())))
    for plain, checkpointed in zip(*gradients, strict=True):
        assert_same(checkpointed, plain)


@pytest.mark.parametrize('name', ALL)
def test_default_cfg(name):
    with torch.device('meta'):
        model = timm.create_model(name)
    cfg = model.default_cfg
    keys = model.state_dict().keys()
    assert cfg['classifier'] + '.weight' in keys
    assert cfg['first_conv'] + '.weight' in keys
    assert tuple(cfg['pool_size']) == tuple(math.ceil(size / 32) for size in cfg['input_size'][1:])
    assert model.get_classifier() is model.get_submodule(cfg['classifier'])
    assert cfg['crop_pct'] in (0.875, 1.0) and cfg['interpolation'] == 'bicubic'
    assert cfg['paper_ids'] and cfg['architecture'] == name


@pytest.mark.parametrize('name', UP_TO_MEDIUM)
@torch.no_grad()
def test_feature_map_pooling_and_head(name):
    model = create(name)
    x = images()
    features = model.forward_features(x)
    assert features.shape[:2] == (1, model.num_features)
    side = math.ceil(SIZE / model.feature_info[-1]['reduction'])
    assert features.shape[2:] == (side, side)
    pooled = model.forward_head(features, pre_logits=True)
    assert pooled.shape == (1, model.head_hidden_size)
    assert_same(model.forward_head(features), model(x))

    model.reset_classifier(0)
    assert model.num_classes == 0
    assert_same(model(x), pooled)

    model.reset_classifier(7)
    assert model.num_classes == 7
    assert model(x).shape == (1, 7)

    model.reset_classifier(0, '')
    unpooled = model(x)
    assert unpooled.shape == (1, model.head_hidden_size, side, side)
    assert_same(unpooled, model.forward_head(features))
    if model.head_hidden_size == model.num_features:
        assert_same(unpooled, features)

    model = timm.create_model(name, num_classes=0, global_pool='').eval()
    assert model(x).shape == unpooled.shape


@pytest.mark.parametrize('name', UP_TO_SMALL)
@pytest.mark.parametrize('global_pool', ['avg', 'max', 'avgmax', 'catavgmax'])
@torch.no_grad()
def test_global_pool(name, global_pool):
    model = timm.create_model(name, global_pool=global_pool, num_classes=5).eval()
    assert model(images()).shape == (1, 5)
    pooled = model.forward_head(model.forward_features(images()), pre_logits=True)
    model.reset_classifier(0)
    assert torch.equal(model(images()), pooled)
    assert pooled.shape == (1, model.head_hidden_size)


@pytest.mark.parametrize('name', UP_TO_MEDIUM)
@pytest.mark.parametrize('in_chans', [1, 4])
@torch.no_grad()
def test_in_chans(name, in_chans):
    model = timm.create_model(name, in_chans=in_chans, num_classes=3).eval()
    assert model.in_chans == in_chans
    assert model(images(channels=in_chans)).shape == (1, 3)


@pytest.mark.parametrize('name', UP_TO_MEDIUM)
@pytest.mark.filterwarnings('ignore:.*torch.jit')
@torch.no_grad()
def test_torchscript(name):
    with set_scriptable(True):
        model = create(name)
    scripted = torch.jit.script(model)
    for size in (SIZE, (48, 80)):
        assert_same(scripted(images(size=size)), model(images(size=size)))


@pytest.mark.parametrize('name', UP_TO_MEDIUM)
@torch.no_grad()
def test_fx_forward(name):
    model = create(name)
    traced = fx_model(model)
    for size in (SIZE, (48, 80)):
        assert torch.equal(only_value(traced(images(size=size))), model(images(size=size)))


@pytest.mark.parametrize('name', UP_TO_MEDIUM)
def test_fx_backward(name):
    model = fx_model(create(name, num_classes=42).train(), train=True)
    outputs = torch.cat(tuple(model(images(2)).values()))
    assert outputs.shape == (2, 42)
    outputs.square().mean().backward()
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None, key


@pytest.mark.parametrize('name', UP_TO_MEDIUM)
@pytest.mark.filterwarnings('ignore:.*torch.jit')
@torch.no_grad()
def test_fx_torchscript(name):
    with set_scriptable(True):
        model = create(name)
    scripted = torch.jit.script(fx_model(model))
    assert_same(only_value(scripted(images())), model(images()))


@pytest.mark.parametrize('name', UP_TO_MEDIUM)
@pytest.mark.parametrize('feature_cls', ['list', 'dict', 'getter', 'hook', 'fx'])
@torch.no_grad()
def test_features_only(name, feature_cls):
    full = create(name)
    model = timm.create_model(name, features_only=True, feature_cls=feature_cls)
    model.eval()
    outputs = model(images(size=96))
    outputs = list(outputs.values()) if isinstance(outputs, dict) else outputs
    assert model.feature_info.channels() == [info['num_chs'] for info in full.feature_info]
    assert model.feature_info.reduction() == [info['reduction'] for info in full.feature_info]
    for channels, reduction, output in zip(
        model.feature_info.channels(), model.feature_info.reduction(), outputs, strict=True
    ):
        assert output.shape == (1, channels, math.ceil(96 / reduction), math.ceil(96 / reduction))
        assert output.isfinite().all()


@pytest.mark.parametrize('name', TEST_SIZED)
@pytest.mark.parametrize('feature_cls', ['list', 'dict', 'getter'])
@pytest.mark.parametrize('out_indices', [(0,), (1, 3), (-1,), (-2, -1), (2,), 2])
@torch.no_grad()
def test_pretrained_features_at_any_indices(name, feature_cls, out_indices, tmp_path):
    full = create(name)
    path = tmp_path / 'model.safetensors'
    save_file(full.state_dict(), path)
    model = timm.create_model(
        name,
        pretrained=True,
        pretrained_cfg_overlay=dict(file=str(path)),
        features_only=True,
        feature_cls=feature_cls,
        out_indices=out_indices,
    ).eval()
    outputs = model(images())
    outputs = list(outputs.values()) if isinstance(outputs, dict) else outputs
    _, every = full.forward_intermediates(images())
    wanted = every[-out_indices:] if isinstance(out_indices, int) else [every[i] for i in out_indices]
    for output, expected in zip(outputs, wanted, strict=True):
        assert torch.equal(output, expected)


@pytest.mark.parametrize('name', UP_TO_MEDIUM)
@torch.no_grad()
def test_forward_intermediates(name):
    model = create(name)
    info = FeatureInfo(model.feature_info, len(model.feature_info))
    x = images(size=96)
    output, intermediates = model.forward_intermediates(x)
    assert len(intermediates) == len(info.channels())
    for channels, reduction, feature in zip(info.channels(), info.reduction(), intermediates, strict=True):
        assert feature.shape == (1, channels, math.ceil(96 / reduction), math.ceil(96 / reduction))
    assert_same(output, model.forward_features(x))

    only = model.forward_intermediates(x, indices=[1], intermediates_only=True, output_fmt='NHWC')
    assert len(only) == 1
    assert torch.equal(only[0].permute(0, 3, 1, 2), intermediates[1])

    last, early = model.forward_intermediates(x, indices=[0, 1], stop_early=True)
    assert torch.equal(last, intermediates[1])
    assert [feature.shape for feature in early] == [feature.shape for feature in intermediates[:2]]

    with pytest.raises(ValueError, match='output_fmt'):
        model.forward_intermediates(x, output_fmt='NLC')


@pytest.mark.parametrize('name', TEST_SIZED)
@pytest.mark.parametrize('indices', [1, [0, 2], [0]])
@pytest.mark.parametrize('prune_norm', [False, True])
@torch.no_grad()
def test_prune_intermediate_layers(name, indices, prune_norm):
    model = create(name)
    before = sum(parameter.numel() for parameter in model.parameters())
    expected = model.forward_intermediates(images(), indices=indices, intermediates_only=True)
    kept = model.prune_intermediate_layers(indices, prune_norm=prune_norm)
    assert sum(parameter.numel() for parameter in model.parameters()) < before
    outputs = model.forward_intermediates(images(), indices=kept, intermediates_only=True)
    for output, wanted in zip(outputs, expected, strict=True):
        assert torch.equal(output, wanted)
    features = model(images())
    assert features.shape[1] == model.num_features == model.head_hidden_size
    model.reset_classifier(3, 'avg')
    assert model(images()).shape == (1, 3)


@pytest.mark.parametrize('name', TEST_SIZED)
def test_pruning_leaves_what_the_maps_need_and_nothing_else(name):
    model, x = create(name), images(2)
    with torch.no_grad():
        expected = model(x)
        _, maps = model.forward_intermediates(x)
        whole = copy.deepcopy(model)
        whole.prune_intermediate_layers(1, prune_head=False)
        assert torch.equal(whole(x), expected)
    for index, feature in enumerate(maps):
        pruned = copy.deepcopy(model)
        pruned.prune_intermediate_layers([index])
        with torch.no_grad():
            assert torch.equal(pruned.forward_features(x), feature)
        pruned.train().forward_features(x).sum().backward()
        assert not [key for key, parameter in pruned.named_parameters() if parameter.grad is None]


@pytest.mark.parametrize('name', TEST_SIZED)
@pytest.mark.parametrize('feature_cls', ['list', 'getter'])
@pytest.mark.filterwarnings('ignore:.*torch.jit')
@torch.no_grad()
def test_features_only_torchscript(name, feature_cls):
    model = timm.create_model(name, features_only=True, feature_cls=feature_cls, out_indices=(0, 2)).eval()
    scripted = torch.jit.script(model)
    for output, expected in zip(scripted(images()), model(images()), strict=True):
        assert_same(output, expected)


@pytest.mark.parametrize('name', TEST_SIZED)
def test_features_only_grad_checkpointing(name):
    gradients = []
    for enable in (False, True):
        torch.manual_seed(0)
        model = timm.create_model(name, features_only=True).train()
        model.set_grad_checkpointing(enable)
        sum(feature.square().mean() for feature in model(images(2))).backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for plain, checkpointed in zip(*gradients, strict=True):
        assert_same(checkpointed, plain)


@pytest.mark.parametrize('name', UP_TO_SMALL)
@pytest.mark.parametrize('size', [(64, 96), (97, 61), (33, 32), 32, 17, (5, 40), 1])
@torch.no_grad()
def test_any_input_size(name, size):
    model = create(name)
    height, width = (size, size) if isinstance(size, int) else size
    intermediates = model.forward_intermediates(images(size=size), intermediates_only=True)
    for info, feature in zip(model.feature_info, intermediates, strict=True):
        assert feature.shape[2:] == (math.ceil(height / info['reduction']), math.ceil(width / info['reduction']))
    assert model(images(size=size)).isfinite().all()


@pytest.mark.parametrize('name', UP_TO_MEDIUM)
@pytest.mark.parametrize('output_stride', [8, 16])
@torch.no_grad()
def test_output_stride(name, output_stride):
    model = create(name, output_stride=output_stride)
    reductions = [info['reduction'] for info in create(name).feature_info]
    assert reductions in ([4, 8, 16, 32], [2, 4, 8, 16, 32])
    assert [info['reduction'] for info in model.feature_info] == [min(stride, output_stride) for stride in reductions]
    features = model.forward_intermediates(images(), intermediates_only=True)
    for info, feature in zip(model.feature_info, features, strict=True):
        assert feature.shape[2:] == (SIZE // info['reduction'],) * 2
    with pytest.raises(ValueError, match='output_stride must be 8, 16 or 32, got 4'):
        timm.create_model(name, output_stride=4)


@pytest.mark.parametrize('name', TEST_SIZED)
@pytest.mark.parametrize('output_stride', [8, 16])
@torch.no_grad()
def test_features_only_output_stride(name, output_stride):
    model = timm.create_model(name, features_only=True, output_stride=output_stride).eval()
    reductions = model.feature_info.reduction()
    assert max(reductions) == output_stride
    sizes = [tuple(feature.shape[2:]) for feature in model(images(size=(64, 96)))]
    assert sizes == [(64 // reduction, 96 // reduction) for reduction in reductions]


@pytest.mark.parametrize('rate', ['drop_rate', 'drop_path_rate'])
@pytest.mark.parametrize('name', UP_TO_SMALL)
@torch.no_grad()
def test_dropout_and_stochastic_depth(name, rate):
    model = create(name, **{rate: 0.5})
    expected = model(images())
    assert_same(model(images()), expected)
    model.train()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eval()
    torch.manual_seed(0)
    first, second = model(images()), model(images())
    assert not torch.allclose(first, second)


@pytest.mark.parametrize('name', UP_TO_MEDIUM)
@torch.no_grad()
def test_channels_last(name):
    model = create(name)
    expected = model(images(2))
    assert_same(model(images(2).to(memory_format=torch.channels_last)), expected)
    model.to(memory_format=torch.channels_last)
    assert_same(model(images(2).to(memory_format=torch.channels_last)), expected)


@pytest.mark.parametrize('name', UP_TO_SMALL)
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_autocast(name, dtype):
    model = create(name)
    expected = model(images(2))
    with torch.autocast('cpu', dtype=dtype):
        outputs = model(images(2))
    assert outputs.dtype == dtype
    assert (outputs.float() - expected).norm() < 0.05 * expected.norm()
    model.train()
    with torch.autocast('cpu', dtype=dtype):
        loss = model(images(2)).float().square().mean()
    loss.backward()
    for key, parameter in model.named_parameters():
        assert parameter.grad.dtype == torch.float32 and parameter.grad.isfinite().all(), key


@pytest.mark.parametrize('name', UP_TO_SMALL)
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16, torch.float64])
@torch.no_grad()
def test_dtype(name, dtype):
    expected = create(name)(images())
    outputs = create(name).to(dtype)(images().to(dtype))
    assert outputs.dtype == dtype
    tolerance = {torch.bfloat16: 0.05, torch.float16: 0.01, torch.float64: 1e-5}[dtype]
    assert (outputs.double() - expected).norm() < tolerance * expected.norm()

    model = timm.create_model(name, dtype=dtype).eval()
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    model.reset_classifier(2, 'max')
    assert model(images().to(dtype)).dtype == dtype


@pytest.mark.parametrize('name', ALL)
def test_meta_construction(name):
    with torch.device('meta'):
        model = timm.create_model(name, drop_path_rate=0.2)
        assert model(torch.empty(2, 3, 64, 64)).shape == (2, 1000)
    assert {tensor.device.type for tensor in (*model.parameters(), *model.buffers())} == {'meta'}
    other = timm.create_model(name, device='meta', dtype=torch.bfloat16)
    assert {parameter.device.type for parameter in other.parameters()} == {'meta'}
    other.reset_classifier(3)
    assert other.get_classifier().weight.device.type == 'meta'


@pytest.mark.parametrize('name', TEST_SIZED)
def test_reset_classifier_keeps_the_model_s_state(name):
    model = timm.create_model(name, device='meta', dtype=torch.float64).eval().requires_grad_(False)
    model.reset_classifier(0)
    model.reset_classifier(0, '')
    assert not [key for key, parameter in model.named_parameters() if parameter.requires_grad]
    model.reset_classifier(2)
    weight = model.get_classifier().weight
    assert (weight.device.type, weight.dtype) == ('meta', torch.float64)
    assert not [key for key, module in model.named_modules() if module.training]


@pytest.mark.parametrize('name', TEST_SIZED)
def test_unknown_arguments_are_errors(name):
    with pytest.raises(TypeError, match='no_such_argument'):
        timm.create_model(name, no_such_argument=1)


@pytest.mark.parametrize('name', ALL)
@pytest.mark.parametrize('coarse', [False, True])
def test_group_matcher(name, coarse):
    with torch.device('meta'):
        model = timm.create_model(name)
    layers = timm.models.group_parameters(model, model.group_matcher(coarse=coarse), reverse=True)
    assert layers.keys() == dict(model.named_parameters()).keys()

    # From image to classifier the layers' numbers never fall.
    order = [layers[key] for key, _ in model.named_parameters()]
    assert order == sorted(order)
    assert layers[model.default_cfg['first_conv'] + '.weight'] == 0
    last = max(layers.values())
    assert layers[model.default_cfg['classifier'] + '.weight'] == last
    stages = model.stages if hasattr(model, 'stages') else model.blocks
    blocks = len(stages) if coarse else sum(len(getattr(stage, 'blocks', stage)) for stage in stages)
    assert last in (
        blocks - 1,
        blocks + 1,
    )  # stem and classifier are layers of their own, or part of the first and last


@pytest.mark.parametrize('name', UP_TO_SMALL)
def test_layer_decay_and_weight_decay_groups(name):
    model = timm.create_model(name)
    optimizer = create_optimizer_v2(model, opt='adamw', lr=1e-3, weight_decay=0.05, layer_decay=0.7)
    scale = {parameter: group['lr_scale'] for group in optimizer.param_groups for parameter in group['params']}
    assert set(scale) == set(model.parameters())
    assert scale[model.get_classifier().weight] == 1
    assert scale[model.get_parameter(model.default_cfg['first_conv'] + '.weight')] == min(scale.values()) < 0.5
    for group in optimizer.param_groups:
        if group['weight_decay'] > 0:
            assert all(parameter.ndim > 1 for parameter in group['params'])
    assert model.no_weight_decay() <= dict(model.named_parameters()).keys()


@pytest.mark.parametrize('name', TEST_SIZED)
@pytest.mark.parametrize('backend', ['eager', 'aot_eager'])
def test_compile_fullgraph(name, backend):
    torch._dynamo.reset()
    model = create(name)
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    x = images(2).requires_grad_()
    expected = model(x)
    outputs = compiled(x)
    assert_same(outputs, expected)
    (gradient,) = torch.autograd.grad(outputs.square().sum(), x)
    assert_same(gradient, torch.autograd.grad(expected.square().sum(), x)[0])


@pytest.mark.parametrize('name', TEST_SIZED)
@torch.no_grad()
def test_compile_with_changing_sizes(name):
    torch._dynamo.reset()
    model = create(name)
    compiled = torch.compile(model, fullgraph=True, backend='eager', dynamic=True)
    torch._dynamo.utils.counters.clear()
    for batch, size in ((2, (64, 96)), (3, (96, 160)), (4, (128, 64))):
        assert_same(compiled(images(batch, size)), model(images(batch, size)))
    assert torch._dynamo.utils.counters['stats']['unique_graphs'] == 1


@pytest.mark.slow
@pytest.mark.parametrize('name', TEST_SIZED)
def test_compile_inductor(name):
    torch._dynamo.reset()
    model = create(name)
    compiled = torch.compile(model, fullgraph=True)
    x = images(2).requires_grad_()
    expected = model(x)
    outputs = compiled(x)
    assert_same(outputs, expected)
    (gradient,) = torch.autograd.grad(outputs.square().sum(), x)
    assert_same(gradient, torch.autograd.grad(expected.square().sum(), x)[0])


@pytest.mark.parametrize('name', TEST_SIZED)
@torch.no_grad()
def test_export(name):
    model = create(name)
    batch = torch.export.Dim('batch', min=1, max=16)
    program = torch.export.export(model, (images(2),), dynamic_shapes=({0: batch},))
    for size in (1, 2, 5):
        assert_same(program.module()(images(size)), model(images(size)))


@pytest.mark.parametrize('name', UP_TO_MEDIUM)
def test_state_dict_round_trip_through_safetensors(name, tmp_path):
    model = create(name)
    path = tmp_path / 'model.safetensors'
    save_file(model.state_dict(), path)
    other = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=dict(file=str(path))).eval()
    for (key, value), loaded in zip(model.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(value, loaded), key
