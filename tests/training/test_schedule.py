import pytest
import torch

from simmim.training.schedule import create_schedule, lr_factor

COSINE = {"name": "cosine", "warmup_steps": 10, "total_steps": 110, "final_ratio": 0.05, "milestones": []}


def test_warm_up_rises_linearly_and_reaches_the_peak():
    assert [lr_factor(step, **COSINE) for step in (0, 4, 9)] == pytest.approx([0.1, 0.5, 1.0])


def test_cosine_known_values():
    assert lr_factor(10, **COSINE) == pytest.approx(1.0)
    assert lr_factor(60, **COSINE) == pytest.approx(0.525)  # half way: the mean of both ends
    assert lr_factor(110, **COSINE) == pytest.approx(0.05)
    assert lr_factor(500, **COSINE) == pytest.approx(0.05)


def test_multistep_drops_by_ten_at_each_milestone():
    settings = {**COSINE, "name": "multistep", "milestones": [50, 80]}
    assert [lr_factor(s, **settings) for s in (49, 50, 79, 80)] == pytest.approx([1.0, 0.1, 0.1, 0.01])


def test_without_warm_up_the_first_step_is_at_the_peak():
    assert lr_factor(0, **{**COSINE, "warmup_steps": 0}) == 1.0


def test_the_scheduler_follows_the_function():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2.0)
    schedule = create_schedule(optimizer, **COSINE)
    for step in range(120):
        assert optimizer.param_groups[0]["lr"] == pytest.approx(2.0 * lr_factor(step, **COSINE))
        optimizer.step()
        schedule.step()


def test_an_unknown_schedule_is_refused():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2.0)
    with pytest.raises(ValueError, match=r"schedule\.name=linear is unknown: choose cosine or multistep"):
        create_schedule(optimizer, **{**COSINE, "name": "linear"})
