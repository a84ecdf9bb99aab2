"""What can be seen of a run: event files read back, figures, the report in HTML and on the terminal."""

from __future__ import annotations

import html.parser
import importlib.util
import json
import shutil
import subprocess
from pathlib import Path

import pytest
from support.files import ROOT, read_jsonl
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from lit_bilevel.cli import main
from lit_bilevel.commands.inspect import main as inspect
from lit_bilevel.inspection.curves import read_curves
from lit_bilevel.inspection.page import escape

FIGURES = ("weights", "kinds", "trajectories", "losses", "refinement", "overview")

QUANTILES = [f"weights_quantile/{q}" for q in ("05", "25", "50", "75", "95")]


@pytest.fixture(scope="module")
def refined(small, tmp_path_factory) -> Path:
    """A finished run of three epochs with refinement."""
    folder = tmp_path_factory.mktemp("refined")
    arguments = [
        "fit",
        "--config=configs/refine.yaml",
        "--trainer.callbacks.every_n_steps=null",  # by epochs instead
        "--trainer.callbacks.choose.init_args.fraction=0.1",  # the others go on moving
        "--trainer.callbacks.start=2",
        "--trainer.callbacks.on_doubt=replace",
        *(f"--data.{name}={path}" for name, path in small.items()),
        "--data.batch_size=16",
        "--trainer.max_epochs=3",
        "--trainer.val_check_interval=4",
        "--trainer.log_every_n_steps=1",
        f"--trainer.default_root_dir={folder}",
    ]
    assert main(arguments) == 0
    return folder


def test_every_promised_tag_is_in_the_event_files(refined):
    tags: dict[str, set[str]] = {}
    plugins: set[str] = set()
    for file in refined.glob("events.*"):
        events = EventAccumulator(str(file)).Reload()
        plugins |= set(events.summary_metadata)
        for kind, names in events.Tags().items():
            tags.setdefault(kind, set()).update(names if isinstance(names, list) else ())
    assert {"weights/distribution"} <= tags["histograms"]
    shown = {"weights/lowest/text_summary", "weights/highest/text_summary", "refine/responses/text_summary"}
    assert shown | {"custom_scalars__config__", "weights/finds_corrupted", "_hparams_/session_start_info"} <= plugins
    if importlib.util.find_spec("matplotlib"):
        assert {f"figures/{name}" for name in FIGURES} <= tags["images"]


def test_the_scalars_have_sane_values(refined):
    curves = read_curves(refined)
    assert [len(curves[name]) for name in QUANTILES] == [3] * 5
    for epoch in range(3):
        values = [curves[name][epoch][1] for name in QUANTILES]
        assert values == sorted(values)
        masses = [curve[epoch][1] for name, curve in curves.items() if name.startswith("weights_share/")]
        assert sum(masses) == pytest.approx(1, abs=1e-5)
        assert 0 <= curves["auroc/all"][epoch][1] <= 1
    assert len(curves["weights/rank_correlation"]) == 2
    assert all(-1 <= value <= 1 for _, value in curves["weights/rank_correlation"])
    assert curves["weights_quantile/50"][-1][0] == len(curves["lower/loss"])
    assert curves["test/loss"][0][0] == 0
    assert curves["test/loss"][0][1] > 0
    assert curves["test/loss"][-1][1] == pytest.approx(json.loads((refined / "metrics.json").read_text())["test/loss"])


def test_tables_say_how_rows_moved(refined):
    text = (refined / "inspection" / "lowest.md").read_text()
    assert text.startswith(
        "| weight | epoch before | places moved | visits | source | truth | id | prompt | response |"
    )
    assert "▲" in text or "▼" in text
    rows = read_jsonl(refined / "inspection" / "rows.jsonl")
    lowest = [row["weight"] for row in rows if row["end"] == "lowest"]
    highest = [row["weight"] for row in rows if row["end"] == "highest"]
    assert lowest == sorted(lowest)
    assert highest == sorted(highest, reverse=True)
    assert lowest[-1] <= highest[-1]


def test_figures_and_the_model_card_are_written(refined):
    if importlib.util.find_spec("matplotlib"):
        names = {path.name for path in (refined / "figures").iterdir()}
        assert names == {f"{name}.png" for name in FIGURES}
    card = (refined / "policy" / "README.md").read_text()
    loss = json.loads((refined / "metrics.json").read_text())["test/loss"]
    before = read_curves(refined)["test/loss"][0][1]
    for part in (
        f"| test/loss | {loss:.4f} |",
        f"| test/loss before the run | {before:.4f} |",
        "`OneStep`",
        "`pool.jsonl` | 90 |",
        "self-refining",
        "refine.responses",
    ):
        assert part in card
    assert str(refined) not in card
    assert str(ROOT) not in card


class _Page(html.parser.HTMLParser):
    """Collects tags and attributes, and checks that tags are closed."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.open: list[str] = []
        self.values: list[str] = []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.values += [value or "" for _, value in attrs]
        if tag not in ("meta", "rect", "line", "polyline", "circle"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.values += [value or "" for _, value in attrs]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_report_is_one_file_without_a_network(refined, tmp_path, capsys):
    assert inspect(["inspect", str(refined), "--output", str(tmp_path / "page.html")]) == 0
    printed = capsys.readouterr().out
    for part in ("test/loss", "effective size", "lowest weights", "refined:"):
        assert part in printed
    text = (tmp_path / "page.html").read_text()
    page = _Page()
    page.feed(text)
    assert not page.open
    assert not {"script", "link", "img", "iframe"} & set(page.tags)
    assert not [value for value in page.values if "//" in value]
    assert page.tags.count("svg") >= 6
    for part in ("Results", "Sources", "Lowest weights", "Highest weights", "Refinement", "Curves"):
        assert f"<h2>{part}</h2>" in text


CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def opened(page: Path, folder: Path) -> tuple[list[str], list[str]]:
    """What headless Chromium says on the console about a page, and which addresses the page asks a network for."""
    command = [
        str(CHROMIUM),
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--no-first-run",
        "--window-size=1280,2000",
    ]
    command += ["--host-resolver-rules=MAP * ~NOTFOUND", f"--user-data-dir={folder / 'profile'}"]  # it reaches nobody
    command += [
        f"--log-net-log={folder / 'net.json'}",
        "--enable-logging=stderr",
        f"--screenshot={folder / 'page.png'}",
    ]
    done = subprocess.run([*command, page.as_uri()], capture_output=True, text=True, timeout=120, check=True)
    log = json.loads((folder / "net.json").read_text())
    start = log["constants"]["logEventTypes"]["URL_REQUEST_START_JOB"]
    asked = [event["params"] for event in log["events"] if event["type"] == start and "url" in event.get("params", {})]
    # what the browser asks for itself has no origin
    network = [one["url"] for one in asked if one["initiator"] != "not an origin" and one["url"].startswith("http")]
    return [line for line in done.stderr.splitlines() if "CONSOLE" in line], network


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")
def test_the_report_opens_in_a_browser_without_an_error_or_a_request(refined, tmp_path):
    inspect(["inspect", str(refined), "--output", str(tmp_path / "page.html")])
    assert opened(tmp_path / "page.html", tmp_path) == ([], [])
    assert (tmp_path / "page.png").stat().st_size > 20_000  # not an empty sheet
    bad = "<img src='http://127.0.0.1:9/x.png'><script>console.error('seen')</script>"
    (tmp_path / "bad.html").write_text(bad)  # what is looked for would be found
    said, asked = opened(tmp_path / "bad.html", tmp_path)
    assert any("seen" in line for line in said)
    assert asked == ["http://127.0.0.1:9/x.png"]


def test_text_from_the_data_cannot_be_markup(refined, tmp_path):
    run = tmp_path / "run"
    (run / "inspection").mkdir(parents=True)
    (run / "weights.parquet").write_bytes((refined / "weights.parquet").read_bytes())
    row = {"id": "<b>", "end": "lowest", "weight": 0.1, "before": 1.0, "visits": 1, "source": "</td>"}
    row |= {"moved": -2, "prompt": "<script>alert(1)</script>", "response": "\x1b[31m\ud800 & \"'"}
    (run / "inspection" / "rows.jsonl").write_text(json.dumps(row) + "\n")
    assert inspect(["inspect", str(run)]) == 0
    text = (run / "inspect.html").read_text()
    assert "<script" not in text
    assert "&lt;script&gt;" in text
    assert "\x1b" not in text
    assert escape("a" * 2000).endswith(" …")


def test_a_run_that_is_writing_its_responses_can_be_looked_at(refined, tmp_path, capsys):
    shutil.copytree(refined / "inspection", tmp_path / "inspection")
    whole = (refined / "responses.jsonl").read_text()
    (tmp_path / "responses.jsonl").write_text(whole[: -len(whole.splitlines()[-1]) // 2])
    assert inspect(["inspect", str(tmp_path)]) == 0
    assert "refined:" in capsys.readouterr().out
    (tmp_path / "responses.jsonl").unlink()
    assert inspect(["inspect", str(tmp_path)]) == 0


def test_inspect_refuses_what_is_no_run(tmp_path, capsys):
    assert inspect(["inspect", str(tmp_path / "nowhere")]) == 2
    assert inspect(["inspect", str(tmp_path)]) == 2
    assert capsys.readouterr().err.count("\n") == 2


def test_settings_and_final_metrics_are_in_the_tab_hparams_and_in_files(refined):
    found = {}
    for file in refined.glob("events.*"):
        events = EventAccumulator(str(file)).Reload()
        for name, metadata in events.summary_metadata.items():
            if name == "_hparams_/session_start_info":
                content = HParamsPluginData.FromString(metadata.plugin_data.content)
                found = dict(content.session_start_info.hparams)
    settings = json.loads((refined / "inspection" / "settings.json").read_text())
    assert set(found) == set(settings)
    assert found["solver"].string_value == settings["solver"] == "OneStep"
    assert found["optimizer.lr"].number_value == settings["optimizer.lr"] == 2e-3
    final = json.loads((refined / "metrics.json").read_text())
    curves = read_curves(refined)  # where the tab takes the metrics from
    for name in ("test/loss", "auroc/all"):
        assert curves[name][-1][1] == pytest.approx(final[name], abs=1e-6)


def test_answers_of_a_round_are_shown_and_on_file(refined):
    texts = {}
    for file in refined.glob("events.*"):
        events = EventAccumulator(str(file)).Reload()
        if "refine/responses/text_summary" in events.Tags()["tensors"]:
            for event in events.Tensors("refine/responses/text_summary"):
                texts[event.step] = event.tensor_proto.string_val[0].decode()
    rounds = {record["round"] for record in read_jsonl(refined / "responses.jsonl")}
    assert len(texts) == len(rounds) >= 1
    assert all(
        text.startswith("| id | question | offline answer | its weight | new answers (agreement) | counts now |")
        for text in texts.values()
    )
