from simmim.training.metrics import MetricsFile


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
