from itertools import chain

from simmim.data.sampler import SampleStream


def stream(**changes):
    settings = {"size": 10, "batch_size": 4, "num_batches": 15, "seed": 0, **changes}
    return SampleStream(settings.pop("size"), settings.pop("batch_size"), **settings)


def test_every_epoch_draws_every_image_once_and_none_is_dropped():
    keys = list(chain.from_iterable(stream()))
    assert len(keys) == 60
    for epoch in range(6):
        assert sorted(index for e, index in keys if e == epoch) == list(range(10))
    assert [epoch for epoch, _ in keys] == sorted(epoch for epoch, _ in keys)


def test_epochs_and_seeds_differ_in_order():
    keys = list(chain.from_iterable(stream()))
    first, second = ([index for e, index in keys if e == epoch] for epoch in (0, 1))
    assert first != second
    assert list(stream()) == list(stream())
    assert list(stream()) != list(stream(seed=1))


def test_starting_later_gives_the_rest_of_the_same_stream():
    whole = list(stream())
    for start in (1, 7, 14):
        assert list(stream(start=start)) == whole[start:]
        assert len(stream(start=start)) == 15


def test_a_global_batch_does_not_depend_on_the_number_of_devices():
    alone = list(stream(batch_size=8, num_batches=6))
    shared = [list(stream(batch_size=2, num_batches=6, rank=rank, world_size=4)) for rank in range(4)]
    assert [list(chain.from_iterable(batches)) for batches in zip(*shared, strict=True)] == alone


def test_accumulated_small_batches_are_the_large_batch():
    large, small = list(stream(batch_size=8, num_batches=6)), list(stream(batch_size=2, num_batches=24))
    assert [list(chain.from_iterable(small[at : at + 4])) for at in range(0, 24, 4)] == large


def test_a_source_smaller_than_a_batch():
    keys = list(chain.from_iterable(stream(size=3, batch_size=8, num_batches=3)))
    assert sorted(keys) == [(epoch, index) for epoch in range(8) for index in range(3)]
