"""The report page: every number from the logs, drawn for one run and for many, nothing lost."""

from __future__ import annotations

import json
import math
import re
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from tests.train.tiny_runs import run_flags
from train.cli import configured, main
from train.config import DPOConfig
from train.lock import release
from train.metrics_log import MetricsLog
from train.output_dir import open_output
from train.report.curves import COLOURS, smoothed, style

INPUTS = {"model": "model <1>", "base": "base", "pairs": "pairs.jsonl"}


def make_run(path: Path, *, steps: int = 12, finished: bool = True, **changes) -> Path:
    """A run's directory as training writes it, with metrics that a formula gives."""
    config = configured("dpo", DPOConfig, run_flags(INPUTS, path, **changes))
    output = open_output("dpo", config)
    output.begin(config, {"data": f"{path.name}-0123456789abcdef"})
    release(path)
    with MetricsLog(path) as log:
        for step in range(1, steps + 1):
            metrics = {
                "loss": 0.7 / step,
                "rewards/margins": 0.01 * step,
                "grad_norm": 1 + step % 3,
            }
            metrics |= {"merge/alpha": 1e-3, "tokens_per_second": 100.0, "skipped_steps": 0}
            log.write(step, metrics)
            if step % 4 == 0:
                log.write(step, {"eval_loss": 0.8 / step, "eval_rewards/accuracies": 0.5})
    if finished:
        output.finish({"steps": steps})
    return path


class Tables(HTMLParser):
    """Rows of all tables, as lists of cells."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self._in_cell = False
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        if tag == "tr":
            self.rows.append([])
        self._in_cell = tag in ("td", "th")
        if self._in_cell:
            self.rows[-1].append("")

    def handle_endtag(self, tag):
        self._in_cell = self._in_cell and tag not in ("td", "th")

    def handle_data(self, data):
        if self._in_cell:
            self.rows[-1][-1] += data

    def row(self, name: str) -> list[str]:
        return next(row[1:] for row in self.rows if row[0] == name)


def report(tmp_path: Path, *runs: Path) -> str:
    output = tmp_path / "pages" / "report.html"
    assert main(["report", *map(str, runs), "--output", str(output)]) == 0
    return output.read_text()


def test_two_runs(tmp_path):
    one = make_run(tmp_path / "one")
    two = make_run(tmp_path / "two", steps=8, finished=False, optimizer__alpha=2e-3)
    with (two / "metrics.jsonl").open("a") as file:
        file.write('{"step": 9, "lo')  # being written
    page = report(tmp_path, one, two)
    tables = Tables(page)
    assert tables.row("steps") == ["12", "8"]
    assert [float(cell) for cell in tables.row("loss")] == pytest.approx([0.7 / 12, 0.7 / 8], 1e-4)
    assert [float(cell) for cell in tables.row("eval_loss")] == pytest.approx([0.8 / 12, 0.1], 1e-4)
    assert tables.row("optimizer.alpha") == ["0.001", "0.002"]
    assert tables.row("content of data") == ["one-01234567", "two-01234567"]
    differing = page[page.index("What differs") : page.index("All settings")]
    assert {row[0] for row in Tables(differing).rows} == {
        "setting",
        "optimizer.alpha",
        "content of data",
    }
    assert "8 steps, not finished" in page
    assert "merge/alpha = 0.001" in page  # constant, so not drawn
    assert "model &lt;1&gt;" in page
    assert "model <1>" not in page


def test_page_needs_nothing_else_and_takes_its_colours_from_the_page(tmp_path):
    page = report(tmp_path, make_run(tmp_path / "one"))
    assert not re.findall(r"<(?:script|link|img)\b", page)
    assert not re.findall(r'(?:src|href)="(?!#)', page)
    figures = re.findall(r"<figure>(.*?)</figure>", page, re.DOTALL)
    titles = []
    for figure in figures:
        texts = [
            e.text or "" for e in ET.fromstring(figure).iter("{http://www.w3.org/2000/svg}text")
        ]
        titles += [text for text in texts if text[0].isalpha() and text != "step"]
        assert "currentColor" in figure
        assert "#000000" not in figure
    assert titles == ["loss", "rewards/margins", "grad_norm"]
    assert "What differs" not in page


def test_eight_runs_have_their_own_colours_and_curves(tmp_path):
    runs = [make_run(tmp_path / f"run{i}", optimizer__alpha=i * 1e-3) for i in range(8)]
    page = report(tmp_path, *runs)
    loss = re.findall(r"<figure>(.*?)</figure>", page, re.DOTALL)[0]
    for colour in COLOURS:
        assert loss.count(f"stroke: {colour.lower()}") >= 2  # in training, and held out
    assert Tables(page).row("optimizer.alpha")[7] == "0.007"
    assert len({style(i) for i in range(32)}) == 32


def test_curve_lies_where_the_values_are(tmp_path):
    page = report(tmp_path, make_run(tmp_path / "one", steps=50))
    margins = re.findall(r"<figure>(.*?)</figure>", page, re.DOTALL)[1]
    path = re.search(r'<path d="([^"]*)"[^>]*stroke: #0072b2', margins)
    assert path is not None
    points = np.array(re.findall(r"[ML] ([\d.]+) ([\d.]+)", path[1]), float)
    # rewards/margins rises by the same amount at every step, and y points down in SVG.
    x, y = points[:, 0], points[:, 1]
    assert np.corrcoef(x, y)[0, 1] == pytest.approx(-1, abs=1e-6)


def test_smoothing_is_the_mean_of_a_window():
    rng = np.random.default_rng(0)
    values = rng.normal(size=200)
    values[[3, 120]] = math.nan
    expected = [np.nanmean(values[max(i - 4, 0) : i + 5]) for i in range(200)]
    np.testing.assert_allclose(smoothed(values.tolist()), expected, rtol=1e-12)
    assert math.isnan(smoothed([math.nan] * 100)[50])


def test_names_are_as_long_as_needed(tmp_path):
    runs = [make_run(tmp_path / name / "run") for name in ("adamw", "on_ties")]
    assert "adamw/run, on_ties/run" in report(tmp_path, *runs)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda run: (run / "run.json").unlink(), "holds no run (there is no run.json)"),
        (lambda run: (run / "metrics.jsonl").unlink(), "has not logged a step yet"),
        (lambda run: (run / "metrics.jsonl").write_text("{\n{}"), "line 1 is damaged"),
        (lambda run: (run / "config.yaml").write_text("a: ["), "cannot be read"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path, capsys, damage, message):
    run = make_run(tmp_path / "one")
    damage(run)
    output = tmp_path / "report.html"
    assert main(["report", str(run), "--output", str(output)]) == 2
    assert message in capsys.readouterr().err
    assert not output.exists()


def test_nothing_is_overwritten(tmp_path, capsys):
    run, output = make_run(tmp_path / "one"), tmp_path / "report.html"
    output.write_text("mine")
    assert main(["report", str(run), "--output", str(output)]) == 2
    assert "exists; nothing is overwritten" in capsys.readouterr().err
    assert output.read_text() == "mine"
    assert main(["report", str(run), str(run), "--output", str(tmp_path / "new.html")]) == 2
    assert "is given twice" in capsys.readouterr().err
    assert json.loads((run / "run.json").read_text())["command"] == "dpo"
