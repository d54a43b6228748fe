import resource
import signal
from contextlib import contextmanager

import pytest

from simmim.training.metrics import MetricsFile, StepTable


@contextmanager
def files_limited_to(size):
    """The system refuses to write a file beyond so many bytes, as it does on a full disk: half of a line first."""
    before, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (before, hard))
        signal.signal(signal.SIGXFSZ, handler)


def test_rows_are_on_the_disk_as_they_come_and_new_metrics_add_a_column(tmp_path):
    path = tmp_path / "metrics.csv"
    metrics = MetricsFile(path, until_step=0)
    metrics.log_metrics({"train_loss": 0.5, "epoch": 0}, step=1)
    assert path.read_text().splitlines() == ["step,train_loss", "1,0.5"]
    metrics.log_metrics({"val_loss": 0.25}, step=2)
    metrics.log_metrics({"train_loss": 1 / 3}, step=3)
    assert path.read_text().splitlines() == ["step,train_loss,val_loss", "1,0.5,", "2,,0.25", "3,0.333333,"]


def test_a_resumed_run_keeps_the_rows_up_to_its_checkpoint(tmp_path):
    path = tmp_path / "metrics.csv"
    first = MetricsFile(path, until_step=0)
    for step in (10, 20, 30):
        first.log_metrics({"train_loss": step / 10}, step=step)
    MetricsFile(path, until_step=20).log_metrics({"train_loss": 9.0}, step=30)
    assert path.read_text().splitlines() == ["step,train_loss", "10,1", "20,2", "30,9"]


@pytest.mark.parametrize("new_metric", [False, True])
def test_rows_wait_for_room_on_a_full_disk(tmp_path, caplog, new_metric):
    path = tmp_path / "metrics.csv"
    metrics = MetricsFile(path, until_step=0)
    metrics.log_metrics({"train_loss": 0.5}, step=1)
    with files_limited_to(path.stat().st_size + 3):
        metrics.log_metrics({"val_loss" if new_metric else "train_loss": 0.25}, step=2)
        metrics.log_metrics({"train_loss": 0.125}, step=3)
        assert path.read_bytes() == b"step,train_loss\r\n1,0.5\r\n"  # no half of a row
        metrics.finalize("success")
    assert [record.levelname for record in caplog.records] == ["WARNING", "ERROR"]  # not one a step
    assert "metrics.csv cannot be written (File too large): its rows wait in memory" in caplog.messages[0]
    assert "lacks the last 2 rows" in caplog.messages[1] or new_metric
    metrics.log_metrics({"train_loss": 0.0625}, step=4)
    rows = ["1,0.5,", "2,,0.25", "3,0.125,", "4,0.0625,"] if new_metric else ["1,0.5", "2,0.25", "3,0.125", "4,0.0625"]
    assert path.read_text().splitlines()[1:] == rows
    assert [file.name for file in tmp_path.iterdir()] == ["metrics.csv"]


def test_a_table_of_steps_is_continued_where_its_run_is(tmp_path, caplog):
    path = tmp_path / "skipped.csv"
    table = StepTable(path, ["samples"])
    table.begin(0)
    assert not path.exists()
    for step in (3, 12, 12):
        table.add([{"step": step, "samples": f"0:{step} 1:7"}])
    whole = path.read_text()
    path.write_text(whole + "1")  # of step 13
    again = StepTable(path, ["samples"])
    again.begin(12)
    assert path.read_text() == whole
    again.begin(11)
    with files_limited_to(path.stat().st_size + 3):
        again.add([{"step": 12, "samples": "0:1"}])
        again.add([{"step": 13, "samples": "0:2"}])
        assert path.read_text().splitlines() == ["step,samples", "3,0:3 1:7"]
    assert caplog.text.count("its rows wait in memory") == 1
    again.add([{"step": 14, "samples": "0:3"}])
    assert path.read_text().splitlines()[2:] == ["12,0:1", "13,0:2", "14,0:3"]
