"""The order of images that come several times."""

from dcnzoo.train.samples import RepeatedSampler


def test_repeats():
    """Each image three times in an epoch of the same length, every version once, on a rank of its own."""
    sampler = RepeatedSampler(48, repeats=3, seed=0, batch_size=4, processes=3)
    order = list(sampler)
    assert len(order) == len(set(order)) == len(sampler) == 48
    batches = [order[start : start + 4] for start in range(0, 48, 4)]
    for number in range(0, 12, 3):
        images = [sorted(index % 48 for index in batch) for batch in batches[number : number + 3]]
        assert images[0] == images[1] == images[2]
        assert len(set(images[0])) == 4
    sampler.set_epoch(1)
    assert list(sampler) != order
