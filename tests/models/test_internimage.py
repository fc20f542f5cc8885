"""The internimage models: published sizes, weights and outputs, and the options of the largest at miniature size."""

import copy
import pickle
import re

import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from timm.models import get_pretrained_cfg
from timm.optim import create_optimizer_v2
from torch.testing import assert_close

from dcnzoo.layers import DCNv3
from dcnzoo.models.internimage import checkpoint_filter_fn
from dcnzoo.ops import dcnv4, use_backend

from .golden import KEYS, OUTPUTS, relative_error
from .golden.fill import fill, image
from .registry import create, parameter_count


def as_safetensors(state_dict: dict) -> dict:
    """The published keys of a pickle as those of the safetensors files."""
    return {'model.' + key.replace('gamma', 'layer_scale'): value for key, value in state_dict.items()}


@pytest.mark.parametrize(
    ('name', 'count'),
    [
        ('internimage_tiny', 29_918_424),
        ('internimage_small', 50_079_880),
        ('internimage_base', 97_461_832),
        ('internimage_large', 223_334_810),
        ('internimage_xlarge', 334_819_780),
        ('internimage_huge', 1_089_636_760),
        ('internimage_giant', 3_076_373_352),
    ],
)
def test_published_parameter_counts(name, count):
    assert parameter_count(name) == count
    assert parameter_count('test_internimage') < 0.5e6


@pytest.mark.parametrize(('layout', 'dtype'), [('pickle', torch.float64), ('safetensors', torch.float32)])
@torch.no_grad()
def test_golden_outputs(published, tmp_path, layout, dtype):
    overlay = published('internimage_tiny')
    if layout == 'safetensors':
        overlay = dict(file=str(tmp_path / 'model.safetensors'))
        save_file(as_safetensors(fill(KEYS['internimage_tiny'])), overlay['file'])
    model = timm.create_model('internimage_tiny', pretrained=True, pretrained_cfg_overlay=overlay, dtype=dtype).eval()
    logits = model(image(13, (2, 3, 224, 224)).to(dtype))
    assert relative_error(logits, OUTPUTS['internimage_tiny.logits']) < (1e-6 if dtype == torch.float64 else 1e-4)


@pytest.mark.parametrize('name', ['internimage_tiny', 'internimage_huge', 'internimage_giant'])
@pytest.mark.parametrize('layout', ['pickle', 'safetensors'])
def test_published_keys_map_onto_the_models(name, layout):
    with torch.device('meta'):
        model = timm.create_model(name)
        state_dict = {key: torch.empty(shape) for key, shape in KEYS[name].items()}
    file = {'model': state_dict} if layout == 'pickle' else as_safetensors(state_dict)
    mapped = checkpoint_filter_fn(file, model)
    assert len(mapped) == len(state_dict)
    assert {key: value.shape for key, value in mapped.items()} == {
        key: value.shape for key, value in model.state_dict().items()
    }
    assert checkpoint_filter_fn(model.state_dict(), model).keys() == model.state_dict().keys()


@pytest.mark.parametrize('layout', ['pickle', 'safetensors'])
def test_published_layer_scales_load(layout):
    """There is no published layout with them among the golden ones; they lie where those of the dcnv4 models do."""
    with torch.device('meta'):
        model = timm.create_model('internimage_small')
    state_dict = dict.fromkeys(
        ['patch_embed.conv1.weight', 'levels.2.blocks.20.gamma1', 'levels.2.blocks.20.gamma2', 'levels.0.norm.0.bias']
    )
    mapped = checkpoint_filter_fn(as_safetensors(state_dict) if layout == 'safetensors' else state_dict, model)
    assert set(mapped) == {
        'stem.conv1.weight',
        'stages.2.blocks.20.ls1.gamma',
        'stages.2.blocks.20.ls2.gamma',
        'stages.0.norm.bias',
    }
    assert set(mapped) - set(model.state_dict()) == {'stages.0.norm.bias'}  # which post-norm models lack


@pytest.mark.parametrize(
    ('tag', 'file', 'size', 'num_classes'),
    [
        ('internimage_tiny.opengvlab_in1k', 'internimage_t_1k_224', 224, 1000),
        ('internimage_small.opengvlab_in1k', 'internimage_s_1k_224', 224, 1000),
        ('internimage_base.opengvlab_in1k', 'internimage_b_1k_224', 224, 1000),
        ('internimage_large.opengvlab_in22k_ft_in1k_384', 'internimage_l_22kto1k_384', 384, 1000),
        ('internimage_large.opengvlab_in22k_384', 'internimage_l_22k_192to384.pth', 384, 21841),
        ('internimage_xlarge.opengvlab_in22k_ft_in1k_384', 'internimage_xl_22kto1k_384', 384, 1000),
        ('internimage_xlarge.opengvlab_in22k_384', 'internimage_xl_22k_192to384.pth', 384, 21841),
        ('internimage_huge.opengvlab_joint_in22k_ft_in1k_640', 'internimage_h_22kto1k_640', 640, 1000),
        ('internimage_huge.opengvlab_joint_in22k_384', 'internimage_h_jointto22k_384.pth', 384, 21841),
        ('internimage_giant.opengvlab_joint_in22k_ft_in1k_512', 'internimage_g_22kto1k_512', 512, 1000),
        ('internimage_giant.opengvlab_joint_in22k_384', 'internimage_g_pretrainto22k_384.pth', 384, 21841),
    ],
)
def test_published_tags(tag, file, size, num_classes):
    cfg = get_pretrained_cfg(tag)
    address = f'InternImage/{file}' if file.endswith('.pth') else f'{file}/model.safetensors'
    assert f'{cfg.hf_hub_id}/{cfg.hf_hub_filename}' == f'OpenGVLab/{address}'
    assert cfg.license == 'mit' and cfg.origin_url
    assert cfg.input_size == (3, size, size) and cfg.pool_size == (size // 32, size // 32)
    assert tag in timm.list_pretrained()
    with torch.device('meta'):
        model = timm.create_model(tag)
    assert model.num_classes == model.head.fc.out_features == num_classes


def test_miniature_without_weights_says_so():
    with pytest.raises(RuntimeError, match='No pretrained weights exist for test_internimage'):
        timm.create_model('test_internimage', pretrained=True)


def test_initialisation_is_the_published():
    block = timm.create_model('test_internimage').stages[0].blocks[0]
    for prediction in (block.dcn.offset, block.dcn.mask):
        assert not prediction.weight.any() and not prediction.bias.any()
    assert abs(block.mlp.fc1.weight.std().item() - 0.02) < 5e-3
    bound = (6 / (16 + 16)) ** 0.5
    assert 0.9 * bound < block.dcn.input_proj.weight.abs().max() <= bound


MINIATURE = dict(channels=16, depths=(1, 2, 3, 1), groups=(1, 2, 4, 8), num_classes=7)
LARGEST = {
    'internimage_huge': dict(level2_post_norm_block_ids=(0, 2)),
    'internimage_giant': dict(level2_post_norm_block_ids=(1, 2)),
    'internimage_large': dict(layer_scale=0.5),
}


def published_keys(name: str, norms: int) -> set[str]:
    """The keys of a published model that a miniature of it has too."""
    keys = KEYS.get(name)
    if keys is None:  # large: those of dcnv4_small, which shares its options, and of the operator of tiny
        keys = {key for key in KEYS['dcnv4_small'] if '.dcn.' not in key}
        keys |= {key.replace('fc2.weight', 'fc2.bias') for key in keys}
        keys |= {key for key in KEYS['internimage_tiny'] if '.dcn.' in key}
    counts = {f'levels.{i}.blocks': depth for i, depth in enumerate(MINIATURE['depths'])}
    counts['levels.2.post_norms'] = norms
    numbered = {key: re.match(r'(levels\.\d+\.(?:blocks|post_norms))\.(\d+)\.', key) for key in keys}
    return {key for key, match in numbered.items() if not match or int(match[2]) < counts[match[1]]}


def published_weights(name: str, model: torch.nn.Module, norms: int) -> dict[str, torch.Tensor]:
    """Weights for a miniature in the published layout, with the shapes of the miniature's own."""
    keys = published_keys(name, norms)
    own = checkpoint_filter_fn(dict(zip(keys, keys, strict=True)), model)
    shapes = {key: list(value.shape) for key, value in model.state_dict().items()}
    assert own.keys() == shapes.keys()
    return fill({key: shapes[name] for name, key in own.items()})


def published_network(weights: dict[str, torch.Tensor], x: torch.Tensor, options: dict) -> torch.Tensor:
    """The published definition of the networks, written down with its own keys."""

    def linear(x, key):
        return F.linear(x, weights[f'{key}.weight'], weights.get(f'{key}.bias'))

    def norm(x, key):
        return F.layer_norm(x, x.shape[-1:], weights[f'{key}.weight'], weights[f'{key}.bias'], 1e-6)

    def conv(x, key, **kwargs):
        x = F.conv2d(x.permute(0, 3, 1, 2), weights[f'{key}.weight'], weights.get(f'{key}.bias'), **kwargs)
        return x.permute(0, 2, 3, 1)

    def operator(x, key, groups):
        value = linear(x, f'{key}.input_proj')
        kernel = weights[f'{key}.dw_conv.0.weight'].shape[-1]
        h = conv(x, f'{key}.dw_conv.0', padding=kernel // 2, groups=x.shape[-1])
        h = F.gelu(norm(h, f'{key}.dw_conv.1.1'))
        offset = linear(h, f'{key}.offset').unflatten(-1, (groups, -1))
        mask = linear(h, f'{key}.mask').unflatten(-1, (groups, -1)).softmax(-1)
        with use_backend('reference'):
            packed = torch.cat((offset, mask), -1).flatten(-2)
            out = dcnv4(value, packed, groups=groups, offset_scale=options.get('offset_scale', 1.0))
        if f'{key}.center_feature_scale_proj_weight' in weights:
            gate = F.linear(
                h, weights[f'{key}.center_feature_scale_proj_weight'], weights[f'{key}.center_feature_scale_proj_bias']
            ).sigmoid()
            gate = gate.repeat_interleave(x.shape[-1] // groups, -1)
            out = out * (1 - gate) + value * gate
        return linear(out, f'{key}.output_proj')

    def block(x, key, groups):
        def mlp(x):
            return linear(F.gelu(linear(x, f'{key}.mlp.fc1')), f'{key}.mlp.fc2')

        for i, branch in ((1, lambda x: operator(x, f'{key}.dcn', groups)), (2, mlp)):
            if f'{key}.res_post_norm{i}.0.weight' in weights:
                x = x + norm(branch(norm(x, f'{key}.norm{i}.0')), f'{key}.res_post_norm{i}.0')
            elif options.get('post_norm'):
                x = x + weights.get(f'{key}.gamma{i}', 1) * norm(branch(x), f'{key}.norm{i}.0')
        return x

    x = conv(x.permute(0, 2, 3, 1), 'patch_embed.conv1', stride=2, padding=1)
    x = conv(F.gelu(norm(x, 'patch_embed.norm1.1')), 'patch_embed.conv2', stride=2, padding=1)
    x = norm(x, 'patch_embed.norm2.1')
    stages = []
    for i, (depth, groups) in enumerate(zip(MINIATURE['depths'], MINIATURE['groups'], strict=True)):
        for j in range(depth):
            x = block(x, f'levels.{i}.blocks.{j}', groups)
            if i == 2 and j in (ids := options.get('level2_post_norm_block_ids', ())):
                x = norm(x, f'levels.2.post_norms.{ids.index(j)}.0')
        if f'levels.{i}.norm.0.weight' in weights:
            x = norm(x, f'levels.{i}.norm.0')
        stages.append(x)
        if i < 3:
            x = conv(x, f'levels.{i}.downsample.conv', stride=2, padding=1)
            x = norm(x, f'levels.{i}.downsample.norm.1')
    if 'dcnv3_head_x3.weight' not in weights:
        x = conv(x, 'conv_head.0').permute(0, 3, 1, 2)
        statistics = (weights[f'conv_head.1.0.{name}'] for name in ('running_mean', 'running_var', 'weight', 'bias'))
        return linear(F.gelu(F.batch_norm(x, *statistics)).mean((2, 3)), 'head')
    coarse = F.pixel_shuffle(conv(stages[3], 'dcnv3_head_x4.0').permute(0, 3, 1, 2), 2).permute(0, 2, 3, 1)
    tokens = (coarse + conv(stages[2], 'dcnv3_head_x3')).flatten(1, 2)
    heads = {}
    for name, source in (('q', tokens.mean(1, keepdim=True)), ('k', tokens), ('v', tokens)):
        key = f'clip_projector.cross_dcn.{name}'
        projected = F.linear(norm(source, f'clip_projector.norm1_{name}.0'), weights[f'{key}.weight'])
        heads[name] = (projected + weights[f'{key}_bias']).unflatten(-1, (16, 64)).transpose(1, 2)
    attention = (heads['q'] @ heads['k'].transpose(-2, -1) / 8).softmax(-1)
    pooled = linear((attention @ heads['v']).transpose(1, 2).flatten(1), 'clip_projector.cross_dcn.proj')
    return linear(norm(pooled, 'fc_norm.0'), 'head')


@pytest.mark.parametrize('name', LARGEST)
@torch.no_grad()
def test_options_of_the_largest_in_a_published_file(name, tmp_path):
    """Every option, from a file in the published layout to the logits, against the definition with the same keys."""
    options = MINIATURE | LARGEST[name]
    with torch.device('meta'):
        miniature = timm.create_model(name, **options)
    weights = published_weights(name, miniature, len(options.get('level2_post_norm_block_ids', ())))
    path = tmp_path / 'published.pth'
    torch.save({'model': weights}, path)
    model = timm.create_model(
        name,
        pretrained=True,
        pretrained_cfg_overlay=dict(file=str(path), num_classes=7),
        dtype=torch.float64,
        **options,
    ).eval()
    published = dict(internimage_giant=dict(post_norm=True), internimage_large=dict(post_norm=True, offset_scale=2.0))
    x = image(0, (2, 3, 64, 96))
    assert_close(model(x), published_network(weights, x, options | published.get(name, {})))


@pytest.mark.parametrize('name', LARGEST)
@pytest.mark.filterwarnings('ignore:.*torch.jit')
def test_options_of_the_largest_in_use(name):
    model = create(name, **MINIATURE, **LARGEST[name])
    x = image(0, (2, 3, 72, 88)).float()
    expected = model(x)
    assert expected.shape == (2, 7)
    tolerance = dict(rtol=1e-4, atol=1e-4 * expected.abs().max().item())
    assert_close(torch.jit.script(model)(x), expected, **tolerance)
    assert_close(torch.fx.symbolic_trace(model)(x), expected, **tolerance)
    features, _ = model.forward_intermediates(x)
    assert_close(model.forward_head(features), expected, **tolerance)
    model.set_grad_checkpointing()
    checkpointed = model(x)
    assert_close(checkpointed, expected, **tolerance)
    checkpointed.square().mean().backward()
    for key, parameter in model.named_parameters():
        # A pooling of keys by attention does not feel a shift that all keys share.
        assert parameter.grad is not None and (parameter.grad.any() or key == 'head.global_pool.k.bias'), key
    model.reset_classifier(0, '')
    assert model(x).shape == features.shape


@torch.no_grad()
def test_arguments_of_the_architecture():
    model = create(
        'internimage_giant',
        **MINIATURE | dict(depths=(1, 1, 1), groups=(1, 2, 4), level2_post_norm_block_ids=()),
        mlp_ratio=2.0,
        offset_scale=0.5,
        layer_scale=0.1,
        post_norm=False,
        res_post_norm=True,
        center_feature_scale=False,
        dw_kernel_size=7,
        dcn_output_bias=False,
        mlp_fc2_bias=False,
        use_clip_projector=False,
        act_layer='silu',
        output_stride=16,
    )
    block = model.stages[2].blocks[0]
    assert isinstance(block.dcn, DCNv3)
    assert block.dcn.output_proj.bias is None and block.mlp.fc2.bias is None
    assert block.dcn.dw_conv[0].kernel_size == (7, 7) and block.dcn.offset_scale == 0.5
    assert block.mlp.fc1.out_features == 128 and block.ls1.gamma.shape == (64,)
    assert model(image(0, (1, 3, 64, 64)).float()).isfinite().all()


@pytest.mark.parametrize('name', ['internimage_small', 'internimage_huge', 'dcnv4_tiny'])
def test_layer_decay_is_the_published(name):
    """Each block has the rate of the next times the decay, the last 1; what is between blocks has that of the next."""
    with torch.device('meta'):
        model = timm.create_model(name)
    optimizer = create_optimizer_v2(model, opt='adamw', lr=1e-3, weight_decay=0.05, layer_decay=0.9)
    scale = {parameter: group['lr_scale'] for group in optimizer.param_groups for parameter in group['params']}
    depths = [len(stage.blocks) for stage in model.stages]
    block_scale = {(i, j): 0.9 ** (sum(depths[i:]) - 1 - j) for i, depth in enumerate(depths) for j in range(depth)}
    for key, parameter in model.named_parameters():
        block, norm = re.match(r'stages\.(\d)\.blocks\.(\d+)', key), re.match(r'stages\.(\d)\.norm', key)
        if key.startswith('stem'):
            expected = block_scale[0, 0]
        elif block:
            expected = block_scale[int(block[1]), int(block[2])]
        elif norm:
            expected = block_scale.get((int(norm[1]) + 1, 0), 1)
        else:
            down = re.match(r'stages\.(\d)\.downsample', key)
            expected = block_scale[int(down[1]), 0] if down else 1
        assert scale[parameter] == pytest.approx(expected), key


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (dict(in_chans=0), 'in_chans must be an int of at least 1, got 0'),
        (dict(num_classes='5'), "num_classes must be an int of at least 0, got '5'"),
        (dict(channels=16.0), 'channels must be an int of at least 2, got 16.0'),
        (dict(depths=3), 'depths must be positive, one number per stage, got 3'),
        (dict(depths=(1, 1, 0, 1)), r'depths must be positive, one number per stage, got \(1, 1, 0, 1\)'),
        (dict(depths=(1, 1)), r'depths and groups must be equally long, got \(1, 1\) and'),
        (dict(groups=(3, 3, 3, 3)), 'group must divide the 16 channels, got 3'),
        (dict(mlp_ratio=-1), 'mlp_ratio must be positive, got -1'),
        (dict(drop_path_rate=1.5), r'drop_path_rate must be in \[0, 1\), got 1.5'),
        (dict(post_norm=True, res_post_norm=True), 'post_norm and res_post_norm exclude each other'),
        (dict(level2_post_norm_block_ids=(3,)), 'level2_post_norm_block_ids must be blocks of the third stage'),
        (dict(level2_post_norm_block_ids=1), 'level2_post_norm_block_ids must be blocks of the third stage, got 1'),
        (dict(dw_kernel_size=-1), 'dw_kernel_size must be a positive odd int or None, got -1'),
        (dict(act_layer='nope'), "act_layer must be a class or a name that timm knows, got 'nope'"),
        (dict(use_clip_projector=True, output_stride=16), 'use_clip_projector needs output_stride 32, got 16'),
        (dict(use_clip_projector=True, depths=(1,), groups=(1,)), 'use_clip_projector needs two stages or more'),
        (dict(use_clip_projector=True, global_pool='max'), "global_pool of a clip projector must be 'avg' or '', got"),
        (dict(use_clip_projector=True, global_pool=''), 'num_classes must be 0 without the attention pooling, got 7'),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        timm.create_model('internimage_large', **MINIATURE | options, device='meta')


@torch.no_grad()
def test_heads_of_the_clip_projector():
    """Without classes there is the pooled vector, without pooling the fused map, which nothing can classify."""
    x = image(0, (2, 3, 64, 64)).float()
    model = create('internimage_giant', **MINIATURE)
    features = model.forward_features(x)
    assert model.head_hidden_size == 768 and features.shape == (2, model.num_features, 4, 4)
    pooled = model.forward_head(features, pre_logits=True)
    model.reset_classifier(0)
    assert torch.equal(model(x), pooled)
    model.reset_classifier(0, '')
    assert torch.equal(model(x), features) and model.head_hidden_size == model.num_features
    for arguments, message in (
        ((5,), 'num_classes must be 0 without the attention pooling, got 5'),
        ((5, 'avg'), "global_pool 'avg' asks for the attention pooling that was taken away"),
    ):
        with pytest.raises(ValueError, match=message):
            model.reset_classifier(*arguments)
    without_classes = timm.create_model('internimage_giant', **MINIATURE | dict(num_classes=0)).eval()
    assert without_classes(x).shape == (2, 768)
    maps = timm.create_model('internimage_giant', **MINIATURE, features_only=True, out_indices=(1, 3)).eval()(x)
    assert [feature.shape for feature in maps] == [(2, 32, 8, 8), (2, 128, 2, 2)]


@torch.no_grad()
def test_copies_and_empty_batches():
    """Of an ordinary size, of one pixel, of none: what samplers and data parallelism hand over."""
    model = create('internimage_giant', **MINIATURE)
    x = image(0, (1, 3, 33, 47)).float()
    expected = model(x)
    assert torch.equal(copy.deepcopy(model)(x), expected)
    assert torch.equal(pickle.loads(pickle.dumps(model))(x), expected)
    assert model(x[:, :, :1, :1]).isfinite().all() and model(x[:0]).shape == (0, 7)
