import json

import pytest
import timm


def test_table_has_a_row_per_model_but_the_miniatures(dcnzoo):
    code, out, err = dcnzoo('list')
    assert (code, err) == (0, [])
    names = [line.split()[0] for line in out.splitlines()[1:]]
    assert {'dcnv4_atto', 'dcnv4_nano', 'dcnv4_tiny', 'dcnv4_small', 'dcnv4_base', 'dcnv4_large'} <= set(names)
    assert not [name for name in names if name.startswith('test_')]
    assert 'resnet50' not in names


@pytest.mark.parametrize('pattern', ('dcnv4_tiny', '4_tin', 'dcn*_tiny', 'DCNv4_Tiny'))
def test_facts(dcnzoo, pattern):
    code, out, _ = dcnzoo('list', pattern, '--json')
    assert code == 0
    (model,) = json.loads(out)
    assert (model['name'], model['params'], model['input_size']) == ('dcnv4_tiny', 29_815_528, [3, 224, 224])
    assert model['macs'] == pytest.approx(4.8e9, rel=0.02)  # as published
    assert model['pretrained'] == ['opengvlab_in1k']


def test_miniatures_are_there_when_asked_for(dcnzoo):
    (model,) = json.loads(dcnzoo('list', 'test_dcnv4', '--json')[1])
    assert model['params'] == sum(p.numel() for p in timm.create_model('test_dcnv4').parameters())


def test_no_match(dcnzoo):
    code, out, err = dcnzoo('list', 'dcnv4_tinny')
    assert (code, out) == (1, '')
    assert len(err) == 1
    assert "'dcnv4_tinny'" in err[0]
    assert 'dcnv4_tiny' in err[0]
