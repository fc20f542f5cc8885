"""Many processes: sharded weights on a gloo mesh, accelerate's configuration files, and what cannot be had on a CPU."""

import subprocess

import pytest
import timm
import torch
import torch.distributed.checkpoint as dcp
from accelerate.commands.config.config_args import load_config_from_file
from safetensors.torch import load_file
from torch.distributed.checkpoint.state_dict import get_state_dict
from torch.nn.utils import get_total_norm

from dcnzoo.train.errors import TrainError
from dcnzoo.train.launch import on_main

from .conftest import REPOSITORY, settings
from .ranks import Ranks

ACCELERATE = sorted((REPOSITORY / 'configs' / 'accelerate').glob('*.yaml'))


def small():
    torch.manual_seed(0)
    return timm.create_model('test_dcnv4', num_classes=3).eval()  # with what differs between halves of a batch off


def steps(model, optimizer, images, targets):
    """Two updates; returns the norm of the last gradients."""
    for _ in range(2):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(images), targets).backward()
        optimizer.step()
    norm = get_total_norm([parameter.grad for parameter in model.parameters()])
    return norm.full_tensor() if hasattr(norm, 'full_tensor') else norm


def batch():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(4, 3, 32, 32, generator=generator), torch.tensor([0, 1, 2, 0])


def train_sharded(folder):
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    dist.init_process_group('gloo')
    mesh, model = init_device_mesh('cpu', (dist.get_world_size(),)), small()
    for stage in model.stages:
        fully_shard(stage, mesh=mesh)
    fully_shard(model, mesh=mesh)
    assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    images, targets = (part.chunk(dist.get_world_size())[dist.get_rank()] for part in batch())
    norm = steps(model, optimizer, images, targets)
    weights, state = get_state_dict(model, optimizer)
    dcp.save({'model': weights, 'optimizer': state, 'norm': norm}, checkpoint_id=folder / 'checkpoint')
    dist.barrier()


def test_sharded_weights(tmp_path):
    """fully_shard over 2 ranks makes the same updates as one process, and its checkpoint is read by one process."""
    ranks = Ranks(tmp_path / 'logs', 2, (tmp_path,), train_sharded)
    assert ranks.wait() == [0, 0], ranks.text()
    assert len(list((tmp_path / 'checkpoint').glob('*.distcp'))) == 2
    model = small()
    start = {key: value.clone() for key, value in model.state_dict().items()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    norm = steps(model, optimizer, *batch())
    weights, state = get_state_dict(model, optimizer)
    loaded = {
        'model': {key: torch.zeros_like(value) for key, value in weights.items()},
        'optimizer': {
            'state': {
                name: {key: torch.zeros_like(value) for key, value in each.items()}
                for name, each in state['state'].items()
            }
        },
        'norm': torch.zeros(()),
    }
    dcp.load(loaded, checkpoint_id=tmp_path / 'checkpoint')
    torch.testing.assert_close(loaded['norm'], norm, rtol=1e-4, atol=1e-6)
    assert any((weights[key] - start[key]).abs().max() > 1e-2 for key in weights)
    for key, value in weights.items():
        torch.testing.assert_close(loaded['model'][key], value, rtol=1e-4, atol=1e-5)
    for name, each in state['state'].items():
        momentum = loaded['optimizer']['state'][name]['momentum_buffer']
        torch.testing.assert_close(momentum, each['momentum_buffer'], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    ('variable', 'name'), [('ACCELERATE_USE_FSDP', 'FSDP'), ('ACCELERATE_USE_DEEPSPEED', 'DEEPSPEED')]
)
def test_sharding_on_a_cpu_is_refused(photos, tmp_path, train, monkeypatch, variable, name):
    """accelerate would train on whole parameters without a word."""
    monkeypatch.setenv(variable, 'true')
    status, _, errors = train(settings(photos, tmp_path / 'run'))
    message = f'error: {name} was asked for, but accelerate shards on GPUs only; on CPUs use --multi_gpu'
    assert (status, errors) == (1, [message])
    assert not (tmp_path / 'run').exists()


def test_batch_norm_over_processes_needs_gpus(photos, tmp_path, train):
    status, _, errors = train(settings(photos, tmp_path / 'run', model__sync_bn='true'))
    assert (status, errors) == (2, ['error: model.sync_bn needs GPUs'])


def test_accumulation_on_two_ranks_is_the_large_batch(photos, tmp_path):
    """2 ranks with 2 batches of 3 update as 2 ranks with one batch of 6 do; gradients are exchanged once per update."""
    weights = []
    for name, size, accumulate in (('large', 6, 1), ('small', 3, 2)):
        arguments = settings(
            photos, tmp_path / name, model__name='test_convnext', data__batch_size=size, optim__accumulate=accumulate,
            optim__name='sgd', augment__crop_mode='none', schedule__name='none', schedule__epochs=1,
        )  # fmt: skip
        ranks = Ranks(tmp_path / f'{name} logs', 2, arguments)
        assert ranks.wait() == [0, 0], ranks.text()
        weights.append(load_file(tmp_path / name / 'last' / 'model.safetensors'))
    large, small = weights
    for key in large:
        torch.testing.assert_close(small[key], large[key], rtol=1e-4, atol=1e-6)


def raise_on_main(folder):
    from accelerate import Accelerator

    def write():
        raise TrainError('only here')

    accelerator = Accelerator(cpu=True)
    try:
        on_main(accelerator, write)
    except TrainError as error:
        (folder / f'{accelerator.process_index}').write_text(str(error))
    assert on_main(accelerator, lambda: accelerator.process_index) == 0


def test_a_mistake_on_the_main_process_ends_all(tmp_path):
    ranks = Ranks(tmp_path / 'logs', 2, (tmp_path,), raise_on_main)
    assert ranks.wait() == [0, 0], ranks.text()
    assert [(tmp_path / str(rank)).read_text() for rank in range(2)] == ['only here', 'only here']


@pytest.mark.parametrize('path', ACCELERATE, ids=lambda path: path.stem)
def test_accelerate_configurations(path):
    """accelerate takes each, and each says on top how to run it."""
    config = load_config_from_file(str(path))
    assert config.num_processes % 8 == 0
    assert f'accelerate launch --config_file configs/accelerate/{path.name}' in path.read_text()


def test_there_are_accelerate_configurations():
    assert {path.stem for path in ACCELERATE} == {'ddp', 'ddp_nodes', 'fsdp2', 'deepspeed_zero2'}


def test_slurm_example():
    script = REPOSITORY / 'configs' / 'slurm' / 'train.sbatch'
    assert subprocess.run(['bash', '-n', script], check=False).returncode == 0
    assert '--resume auto' in script.read_text()
