"""What long runs show: lines where there is no terminal, and a live picture that leaves the result alone."""

import sys
from pathlib import Path

import matplotlib.image
import pandas as pd
import pytest
import torch

from gbc import progress
from tests.test_training import run, task, toy


def test_without_a_terminal_progress_is_a_few_whole_lines(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: False, raising=False)
    with progress.progress(500, "descent") as bar:
        for _ in range(500):
            bar.update()
            bar.set_postfix(log_loss="-3.2", refresh=False)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2  # the start and the end: no half minute passed
    assert "\r" not in "".join(lines)
    assert lines[-1].startswith("descent: 500 of 500 steps, ")
    assert lines[-1].endswith("log_loss=-3.2")


def test_the_live_picture_shows_the_terms_so_far_and_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    network, homogeneity, _ = toy("even")
    plain = run([network], [homogeneity], task("toy_1"), steps=20)
    monkeypatch.setattr(progress, "EVERY", 0.0)
    live = progress.Live(tmp_path / "toy_1")
    network, homogeneity, _ = toy("even")
    watched = run([network], [homogeneity], task("toy_1"), steps=20, live=live)
    for name, value in plain.generator.state_dict().items():
        assert torch.equal(value, watched.generator.state_dict()[name])
    table = pd.read_csv(tmp_path / "toy_1.csv")
    assert len(table) == 20
    assert table["stationarity"].iloc[-1] == pytest.approx(watched.history["stationarity"].iloc[-1], rel=1e-6)
    assert matplotlib.image.imread(tmp_path / "toy_1.png").std() > 0


@pytest.mark.parametrize("shape", [(2,), (8, 8), (3, 8, 8)])
def test_the_live_picture_takes_points_and_images(tmp_path: Path, shape: tuple[int, ...]):
    rows = [{"step": step, "classifier": t, "stationarity": 1 / (step + 1), "duality": 0.5} for step in range(3) for t in range(2)]
    progress.Live(tmp_path / "live").draw(rows, torch.rand(7, *shape))
    assert matplotlib.image.imread(tmp_path / "live.png").shape[2] == 4
