"""vitfreeze report: one page about runs, opened in a browser where there is one."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from vitfreeze.cli import main
from vitfreeze.config import ConfigError
from vitfreeze.html_report import write_report
from vitfreeze.html_report.figures import draw_frontier, draw_runs
from vitfreeze.html_report.runs import read_run

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
SETTINGS = [
    "model.size=vit_tiny_test", "model.img_size=32", "batch.global_size=8", "batch.micro_size=8", "run.length=12 steps",
    "optim.warmup=0", "data.workers=0", "run.ds_config=cpu", "run.log_every_steps=1", "run.show_every=0.25",
    "freeze.t_0=0.5", "curriculum.img_size=[[0, 16], [0.25, 32]]",
]  # fmt: skip


def call(*arguments: str) -> int:
    with pytest.raises(SystemExit) as stop:
        main(list(arguments))
    assert isinstance(stop.value.code, int)
    return stop.value.code


@pytest.fixture(scope="module")
def run_folder(demo_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 12 steps that freezes, changes its image size and draws reconstructions."""
    folder = tmp_path_factory.mktemp("report") / "first"
    assert call("pretrain", "paper", *SETTINGS, f"data.train={demo_shards}", f"run.dir={folder}") == 0
    return folder


def test_page_holds_everything_and_asks_for_nothing(run_folder: Path, tmp_path: Path) -> None:
    page = tmp_path / "pages" / "report.html"
    assert call("report", str(run_folder), "-o", str(page)) == 0
    text = page.read_text()
    for words in (
        "loss of each scale", "learning rate", "frozen layers", "image size (pixels)", "images per second",
        "time of a step (ms)", "optimizer state per rank (MiB)", "waiting for data", "Stages: plan and measurement",
        "Freezes", "Skipped samples: 0", "Versions: ", "Reconstructions", "optim.blr", "prefers-color-scheme: dark",
    ):  # fmt: skip
        assert words in text, words
    assert 1 <= text.count('<img alt="reconstructions at step') <= 3
    own = re.sub(r"<script>.*?</script>", "", text, flags=re.DOTALL)
    assert not re.search(r"(?:src|href)=\"(?!data:)", own), "the page asks for a file"


def test_every_curve_stands_on_every_axis(run_folder: Path) -> None:
    run = read_run(run_folder)
    figure, places = draw_runs([run])
    assert len(figure.data) == len(places)
    for trace, place in zip(figure.data, places, strict=True):
        assert list(trace.x) == place["step"]
        for axis in ("step", "hours", "cost"):
            assert len(place[axis]) == len(trace.y)
            assert place[axis] == sorted(place[axis])
    hours = sum(line["step_seconds"] for line in run.metrics) / 3600
    assert run.places(run.metrics)["hours"][-1] == pytest.approx(hours)
    operations = sum(stage.steps * stage.flops_per_image for stage in run.prediction.stages) * 8 / 1e15
    assert run.places(run.metrics)["cost"][-1] == pytest.approx(operations)


def test_several_runs_lie_over_each_other(run_folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "other" / "first"
    shutil.copytree(run_folder, other)
    config = other / "config.yaml"
    config.write_text(config.read_text().replace("t_0: 0.5", "t_0: 0.7"))
    text = write_report([run_folder, other], tmp_path / "both.html").read_text()
    assert "first (2)" in text
    assert "Settings that differ" in text
    assert "<td>freeze.t_0</td><td>0.5</td><td>0.7</td>" in text
    assert "<td>optim.blr</td>" not in text


def make_cell(arm: str, *, cost: float, seed: int = 0, blr: float = 1e-3, reached: float = 0.5) -> dict[str, Any]:
    shared = {"data": "birds", "size": "cpu", "labels": 5000, "judged_on": "held_out"}
    run = {"arm": arm, "words": f"what {arm} is", "seed": seed, "blr": blr}
    return {**shared, **run, "cost": {"pretraining": cost}, "accuracy": {"finetuned": reached}}


def test_study_is_drawn_from_its_cells_beside_those_that_may_be_compared(tmp_path: Path) -> None:
    cells = [make_cell("plain", cost=1.0), make_cell("plain-0.5", cost=0.5, seed=1), make_cell("paper", cost=1.0)]
    judged = {**make_cell("stable", cost=1.0), "labels": 45000, "judged_on": "test"}
    for number, cell in enumerate([*cells, judged]):
        (tmp_path / f"{number}.json").write_text(json.dumps(cell))
    (tmp_path / "claims.json").write_text('["stable"]')
    text = write_report([tmp_path], tmp_path / "study.html").read_text()
    assert "what paper is, seed 0, blr 0.001" in text
    assert text.count("counted cost of pre-training") == 2
    tested = text.index("birds, size cpu: fine-tuned on 45,000 labels, judged on the test set.")
    explored = text.index("birds, size cpu: fine-tuned on 5,000 labels, judged on held-out images.")
    assert tested < text.index("what stable is") < explored < text.index("what paper is")


def test_plain_frontier_takes_the_learning_rate_with_the_best_mean() -> None:
    runs = [(1.0, 0, 1e-3, 0.4), (1.0, 1, 1e-3, 0.6), (1.0, 0, 2e-3, 0.55), (0.5, 0, 1e-3, 0.3)]
    cells = [make_cell("plain", cost=cost, seed=seed, blr=blr, reached=reached) for cost, seed, blr, reached in runs]
    line = draw_frontier(cells).data[1]
    assert list(line.x) == [0.5, 1.0]
    assert list(line.y) == pytest.approx([30.0, 55.0])


def test_bad_reports_get_one_sentence(tmp_path: Path, run_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"'report\.pdf', but its name must end in \.html"):
        write_report([run_folder], Path("report.pdf"))
    with pytest.raises(ConfigError, match=r"nowhere is no folder; a report takes run folders"):
        write_report([tmp_path / "nowhere"], tmp_path / "report.html")
    with pytest.raises(ConfigError, match=r"holds no metrics\.jsonl with a logged step"):
        write_report([tmp_path], tmp_path / "report.html")
    (tmp_path / "cell.json").write_text("{")
    with pytest.raises(ConfigError, match=r"cell\.json cannot be read as JSON"):
        write_report([tmp_path], tmp_path / "report.html")
    monkeypatch.setattr("vitfreeze.html_report.page.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'vitfreeze\[report\]'"):
        write_report([run_folder], tmp_path / "report.html")
    assert not list(tmp_path.glob("*.html"))


@pytest.mark.skipif(BROWSER is None, reason="no Chromium here: the page was NOT opened in a browser")
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_browser_shows_the_page_without_an_error(run_folder: Path, tmp_path: Path, scheme: str) -> None:
    page, shot = write_report([run_folder], tmp_path / "report.html"), tmp_path / "page.png"
    # the figure is asked for its width and for another axis; what the console said is written into the document
    probe = "<script>window.addEventListener('load', () => { choose('hours'); choose('cost');"
    probe += " document.title = document.querySelectorAll('.main-svg').length + ' drawings'; })</script></body>"
    page.write_text(page.read_text().replace("</body>", probe))
    assert BROWSER is not None
    done = subprocess.run(
        [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--hide-scrollbars",
         "--window-size=1200,2400", f"--blink-settings=preferredColorScheme={0 if scheme == 'dark' else 1}",
         f"--user-data-dir={tmp_path / 'profile'}", f"--screenshot={shot}", "--virtual-time-budget=5000",
         page.as_uri()],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    said = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    assert said == []
    assert done.returncode == 0
    assert shot.stat().st_size > 20_000
