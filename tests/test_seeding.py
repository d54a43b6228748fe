import torch

from simmim.seeding import derive_seed, torch_random_from


def test_seeds_are_stable_and_tell_their_parts_apart():
    assert derive_seed(0, "mask", 1, 23) == 1721149363277335990  # on every machine, in every version
    parts = [(0, 1, 23), (0, 12, 3), (1, 0, 23), ("0", "1", "24")]
    assert len({derive_seed(*p) for p in parts}) == len(parts)


def test_the_block_is_seeded_and_leaves_the_generator_as_it_was():
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    with torch_random_from(1, "x"):
        first = torch.rand(1)
    assert torch.equal(torch.rand(2), expected)
    with torch_random_from(1, "x"):
        assert torch.equal(torch.rand(1), first)
