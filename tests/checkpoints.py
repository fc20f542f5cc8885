"""Checkpoints as publishers, detectors and attackers make them."""

import io
import os
import pickle
import re

import timm
import torch

import dcnzoo  # noqa: F401  (registers the models)

# From the keys of a dcnv4 model to those of its publishers.
RENAMINGS = (
    (r'^stem\.(norm\d)\.', r'patch_embed.\1.1.'),
    (r'^stem\.', 'patch_embed.'),
    (r'^stages\.(\d)\.downsample\.', lambda match: f'levels.{int(match[1]) - 1}.downsample.'),
    (r'\.downsample\.norm\.', '.downsample.norm.1.'),
    (r'^stages\.', 'levels.'),
    (r'^(levels\.\d(\.blocks\.\d+)?\.norm\d?)\.', r'\1.0.'),
    (r'\.ls(\d)\.gamma', r'.gamma\1'),
    (r'^conv_head\.conv\.', 'conv_head.0.'),
    (r'^conv_head\.bn\.', 'conv_head.1.0.'),
    (r'^head\.fc\.', 'head.'),
)


def weights(name: str = 'test_dcnv4', seed: int = 0, **kwargs) -> dict[str, torch.Tensor]:
    """A state_dict of which every value is random."""
    generator = torch.Generator().manual_seed(seed)
    state_dict = timm.create_model(name, **kwargs).state_dict()
    for key, value in state_dict.items():
        if value.is_floating_point():
            noise = torch.randn(value.shape, generator=generator)
            state_dict[key] = noise.abs() + 0.5 if key.endswith('running_var') else 0.2 * noise
    return state_dict


def published(state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The keys of a dcnv4 model as FlashInternImage's publishers name them."""
    renamed = {}
    for key, value in state_dict.items():
        for pattern, replacement in RENAMINGS:
            key = re.sub(pattern, replacement, key)
        renamed[key] = value
    return renamed


def pickled(content: object, **kwargs) -> bytes:
    """What torch.save writes."""
    buffer = io.BytesIO()
    torch.save(content, buffer, **kwargs)
    return buffer.getvalue()


class Bomb:
    """Makes a file when it is unpickled."""

    def __init__(self, marker):
        self.marker = str(marker)

    def __reduce__(self):
        return open, (self.marker, 'w')


def malicious(marker, state_dict: dict[str, torch.Tensor]) -> dict[str, bytes]:
    """Files that would make the file `marker` if anything unpickled them, by the way in which."""
    bomb = Bomb(marker)
    command = f'import pathlib; pathlib.Path({str(marker)!r}).touch()'
    return {
        'reduce': pickled(bomb),
        'nested in model': pickled({'model': {**state_dict, 'stem.conv1.weight': bomb}}),
        'beside the weights': pickled({'state_dict': state_dict, 'meta': {'hooks': [bomb]}}),
        'global': pickle.PROTO
        + b'\x02'
        + b'cbuiltins\nexec\n('
        + pickle.BINUNICODE
        + len(command).to_bytes(4, 'little')
        + command.encode()
        + b'tR.',
        'plain pickle': pickle.dumps({'model': bomb}),
        'old format of torch': pickled({'model': bomb}, _use_new_zipfile_serialization=False),
    }


def flip(path) -> None:
    """Changes a byte in the middle of a file, whose size stays."""
    with open(path, 'r+b') as file:
        file.seek(os.path.getsize(path) // 2)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 1]))
