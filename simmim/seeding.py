"""One rule for all randomness: a choice about a sample depends on (seed, epoch, index) and on nothing else.

So neither the number of workers or devices, nor the batch size, nor an interruption changes what a sample is.
"""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch


def derive_seed(*parts: int | str) -> int:
    """A 63-bit seed that is a function of the parts alone; near-by parts give unrelated seeds."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest) >> 1


def generator_from(*parts: int | str) -> torch.Generator:
    """A CPU generator seeded by the parts."""
    return torch.Generator().manual_seed(derive_seed(*parts))


@contextmanager
def torch_random_from(*parts: int | str) -> Iterator[None]:
    """Within the block PyTorch's global CPU generator starts from the parts; afterwards it is as it was.

    For library transforms that take no generator.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(derive_seed(*parts))
        yield
