"""The page that a run leaves."""

import torch


def test_reports(trained):
    """One page with the curves in it, the configuration, and where it ran."""
    page = (trained / 'report.html').read_text()
    assert 'data:image/png;base64,' in page
    assert 'batch_size: 8' in page
    assert 'val_top1' in page
    assert torch.__version__ in page
