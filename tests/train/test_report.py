"""The report page: what it shows of runs, and that it stands alone."""

from __future__ import annotations

import json
import math
import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser

import numpy as np
import pytest

from train.cli import main
from train.config import UserError
from train.report.page import page
from train.report.plots import draw, metric_order, running_mean
from train.report.runs import differing_settings, read_runs


def write_run(directory, number, steps=200, name="on_dare"):
    directory.mkdir(parents=True)
    settings = {"optimizer.name": name, "optimizer.alpha": number / 10, "trainer.seed": 0}
    record = {
        "command": "dpo",
        "settings": {**settings, "output_dir": str(directory)},
        "inputs": {},
    }
    (directory / "run.json").write_text(json.dumps(record))
    rng = np.random.default_rng(number)
    rows = []
    for step in range(1, steps + 1):
        decay = math.exp(-step / 60 / (1 + number / 4))
        row = {"step": step, "loss": 0.69 * decay + 0.05 * rng.normal(), "grad_norm": 1 + decay}
        row |= {
            "rewards/margins": 1 - decay + 0.1 * rng.normal(),
            "rewards/accuracies": 1 - decay / 2,
        }
        row |= {"merge/kept": 0.5 + 0.01 * rng.normal()}
        if step % 50 == 0:
            row["eval_loss"] = 0.7 * decay
        rows.append(json.dumps(row))
    (directory / "metrics.jsonl").write_text("\n".join(rows) + "\n")
    return str(directory)


class Text(HTMLParser):
    """Cells of all tables, row by row, and addresses of anything outside the page."""

    def __init__(self):
        super().__init__()
        self.rows, self.outside, self.inside = [], [], False

    def handle_starttag(self, tag, attrs):
        if tag == "tr":
            self.rows.append([])
        self.inside = tag in ("td", "th") or (self.inside and tag not in ("svg", "h2"))
        self.outside += [v for k, v in attrs if k in ("src", "href") and not v.startswith("#")]
        self.outside += [tag] if tag in ("script", "link") else []

    def handle_endtag(self, tag):
        self.inside = self.inside and tag not in ("td", "th")

    def handle_data(self, data):
        if self.inside and self.rows:
            self.rows[-1].append(data)


@pytest.mark.parametrize("count", [1, 8])
def test_a_page_that_stands_alone(tmp_path, count):
    runs = [write_run(tmp_path / f"run{i}", i) for i in range(count)]
    assert main(["report", *runs, "--output", str(tmp_path / "report.html")]) == 0
    text = (tmp_path / "report.html").read_text()
    parsed = Text()
    parsed.feed(text)
    assert parsed.outside == []
    rows = {row[0]: row[1:] for row in parsed.rows if len(row) == count + 1}
    for number, run in enumerate(read_runs(runs)):
        assert float(rows["loss"][number]) == pytest.approx(run.last("loss"), rel=1e-4)
        assert rows["steps"][number] == "200"
    assert ("trainer.seed" in rows) == (count == 1)  # with several, only what differs
    assert len(re.findall("<figure>", text)) == 6
    assert main(["report", *runs, "--output", str(tmp_path / "report.html")]) == 2


def test_one_image(tmp_path):
    runs = read_runs([write_run(tmp_path / f"r{i}", i) for i in range(3)])
    assert metric_order(runs)[:4] == ["loss", "rewards/margins", "rewards/accuracies", "grad_norm"]
    image = draw("eval_loss", runs)
    ElementTree.fromstring(image)
    assert "currentColor" in image
    assert image.lower().count("stroke: #") >= 3


def test_names_settings_and_damage(tmp_path):
    a, b = write_run(tmp_path / "x" / "run", 1), write_run(tmp_path / "y" / "run", 2)
    runs = read_runs([a, b])
    assert [run.name for run in runs] == ["x/run", "y/run"]
    assert differing_settings(runs) == {"optimizer.alpha": [0.1, 0.2]}
    file = tmp_path / "x" / "run" / "metrics.jsonl"
    whole = file.read_text()
    file.write_text(whole + '{"step": 201, "lo')
    assert read_runs([a])[0].curves["loss"][0][-1] == 200
    file.write_text('{"step\n' + whole)
    with pytest.raises(UserError, match="line 1"):
        read_runs([a])
    with pytest.raises(UserError, match="no run"):
        read_runs([str(tmp_path / "none")])
    with pytest.raises(UserError, match="twice"):
        read_runs([b, b])


def test_text_is_escaped(tmp_path):
    run = read_runs([write_run(tmp_path / "r", 1, steps=3, name="<b>&")])
    assert "<b>&" not in page(run)
    assert "&lt;b&gt;&amp;" in page(run)


def test_running_mean_passes_over_nan():
    assert running_mean([1.0, math.nan, 3.0], 1) == [1.0, 2.0, 3.0]
