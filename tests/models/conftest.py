"""Files of weights as the publishers make them."""

import pytest
import torch

from .golden import KEYS
from .golden.fill import fill


@pytest.fixture(scope='session')
def published(tmp_path_factory):
    """Makes timm load a pickle of {'model': state_dict} with weights in the published key layout of a model."""
    folder = tmp_path_factory.mktemp('published')

    def overlay(name: str) -> dict[str, str]:
        path = folder / f'{name}.pth'
        if not path.exists():
            torch.save({'model': fill(KEYS[name])}, path)
        return dict(file=str(path))

    return overlay
