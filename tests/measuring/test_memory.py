"""Peak memory of real processes."""

import pytest

from simmim.measuring.memory import peak_memory
from simmim.measuring.networks import OURS, Runner
from tests.measuring.test_networks import WORK


def test_memory_of_a_step_grows_with_the_batch_and_its_state_does_not() -> None:
    small, large = (peak_memory(OURS, WORK.changed(batch_size=batch)) for batch in (8, 64))
    parameters = sum(parameter.numel() for parameter in Runner(OURS, WORK).network.parameters())
    assert small["state"] == large["state"] == pytest.approx(3 * 4 * parameters / 1e6, rel=0.01)
    least = 64 * 16**2 * 24 * 4 * 12 * 2 / 1e6  # what two blocks of the first stage keep, 12 values a channel
    assert large["step"] > least
    assert 4 * small["step"] < large["step"] < 16 * small["step"]


def test_a_process_that_fails_says_why() -> None:
    with pytest.raises(ValueError, match=r"the step of lightly at 128x128 px failed: .*peers=lightly is unknown"):
        peak_memory("lightly", WORK)
