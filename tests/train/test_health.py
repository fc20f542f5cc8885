"""What offsets and modulation of the deformable layers do, measured and logged."""

import csv

import pytest
import timm
import torch

from dcnzoo.train.health import measure_deformation

from .conftest import settings


def test_deformation():
    """Offsets of zero leave the map at its border only; a bias moves all points by as much."""
    model = timm.create_model('test_dcnv4').eval()
    images = torch.randn(2, 3, 64, 96)
    rows = measure_deformation(model, images)
    assert [row['stage'] for row in rows] == ['1/4', '1/8', '1/16', '1/32']
    assert sum(row['layers'] for row in rows) == sum(len(stage.blocks) for stage in model.stages)
    for row, reduction in zip(rows, (4, 8, 16, 32), strict=True):
        height, width = 64 // reduction, 96 // reduction
        inside = (1 - 2 / (3 * height)) * (1 - 2 / (3 * width))
        assert row['outside'] == pytest.approx(1 - inside, abs=1e-6)
        assert (row['offset_mean'], row['offset_max'], row['mask_min'], row['mask_max']) == (0, 0, 0, 0)

    dcn = model.stages[1].blocks[0].dcn
    with torch.no_grad():
        parameters = dcn.offset_mask.bias[: 27 * dcn.group].view(dcn.group, 27)
        parameters[:, 0:18:2], parameters[:, 1:18:2], parameters[:, 18:] = 300.0, 400.0, 0.7
    row = measure_deformation(model, images)[1]
    share = 1 / len(model.stages[1].blocks)
    assert row['offset_max'] == pytest.approx(500 * dcn.offset_scale)
    assert row['offset_mean'] == pytest.approx(500 * dcn.offset_scale * share)
    assert row['mask_max'] == pytest.approx(0.7)
    assert row['outside'] >= share
    assert measure_deformation(timm.create_model('test_convnext').eval(), images) == []


def test_the_deformation_is_logged(photos, tmp_path, train):
    output = tmp_path / 'run'
    arguments = settings(photos, output, schedule__epochs=1, health__every=2, run__trackers='[tensorboard]')
    assert train(arguments)[0] == 0
    with (output / 'health.csv').open() as file:
        rows = list(csv.DictReader(file))
    assert [(row['step'], row['stage']) for row in rows][:5] == [
        ('2', '1/4'),
        ('2', '1/8'),
        ('2', '1/16'),
        ('2', '1/32'),
        ('4', '1/4'),
    ]
    assert float(rows[-1]['offset_max']) > 0
    assert 'Deformable layers' in (output / 'report.html').read_text()
