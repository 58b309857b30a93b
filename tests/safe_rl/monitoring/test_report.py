"""The report: complete without any other file, harmless whatever a model said, honest."""

import math
import re
import subprocess
import sys
from html.parser import HTMLParser

import pytest

from safe_rl.monitoring import RunLog
from safe_rl.monitoring.plots import draw_run, series
from safe_rl.monitoring.report import write_report

SETTINGS = {"steps": 30, "threshold_lower": 0.05, "threshold_upper": 0.5, "lora": {"rank": 16}}
HOSTILE = '<script>alert(1)</script> & "quoted" <img src=https://example.org/x.png> \ud83d'


def update(step, **values):
    record = {
        "record": "update",
        "step": step,
        "reward_mean": step / 10,
        "reward_std": 0.3,
        "kl_nats_per_token": 0.01 * step,
        "kl_threshold_nats_per_token": 0.1,
        "entropy_nats_per_token": 2.0,
        "entropy_gate": 0.9,
        "phase": "warm_up" if step < 5 else "climbing",
        "loss_value": 3.0 * 0.7**step,
        "explained_variance": 0.5,
        "ref_perplexity": 10.0 + step,
        "distinct_bigrams_fraction": 0.9,
        "non_finite": 0,
    }
    return {**record, **values}


def samples(step, response):
    entries = [{"prompt": "<b>Say</b> hello", "response": response, "reward": 0.5}]
    return {"record": "samples", "step": step, "samples": entries}


def write_log(folder, *records):
    log = RunLog(folder / "log.jsonl")
    header = {"record": "run", "algorithm": "safe", "model": "/models/SmolLM2", "seed": 3}
    log.write({**header, "settings": SETTINGS, "versions": {"torch": "2.13.0"}})
    for record in records:
        log.write(record)


def panels(updates, **options):
    return [axes.get_label() for axes in draw_run(updates, **options).axes]


class Page(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags, self.links, self.cells, self.text = set(), [], [], ""
        self._in_cell = False
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.links += [v for k, v in attrs if k in ("src", "srcset", "href", "data", "action")]
        if tag in ("td", "th"):
            self.cells.append("")
            self._in_cell = True

    def handle_endtag(self, tag):
        if tag in ("td", "th"):
            self._in_cell = False

    def handle_data(self, data):
        self.text += data
        if self._in_cell:
            self.cells[-1] += data


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    """A run of 30 updates with a hostile model and one broken update."""
    folder = tmp_path_factory.mktemp("run")
    updates = [update(step) for step in range(30)]
    updates[4] = update(4, reward_mean=math.nan, loss_value=math.inf, non_finite=1)
    write_log(folder, samples(0, HOSTILE), *updates[:20], samples(10, "half way"), *updates[20:],
              samples(29, "at the end"))  # fmt: skip
    timing = RunLog(folder / "timing.jsonl")
    for step in range(4):
        timing.write({"record": "timing", "step": step, "sampling_seconds": 2.0})
    return folder, *write_report(folder)


def test_report_leaves_a_page_and_a_picture_and_nothing_temporary(full):
    folder, html_path, png_path = full
    assert (html_path.name, png_path.name) == ("report.html", "report.png")
    assert png_path.read_bytes().startswith(b"\x89PNG")
    names = {path.name for path in folder.iterdir()}
    assert names == {"log.jsonl", "timing.jsonl", "report.html", "report.png"}


def test_page_is_self_contained_and_has_no_script(full):
    text = full[1].read_text("utf-8")
    page = Page(text)
    assert page.links
    assert all(link.startswith("data:image/png;base64,") for link in page.links)
    outside = re.sub(r"data:image/png;base64,[A-Za-z0-9+/=]+", "", text)
    assert "url(" not in outside
    assert "@import" not in outside
    # The one address in the text is what the model said, escaped.
    assert re.findall(r"https?://", outside) == ["https://"]
    assert page.tags.isdisjoint({"script", "link", "iframe", "object", "embed", "b"})


def test_samples_are_shown_literally_first_beside_last(full):
    page = Page(full[1].read_text("utf-8"))
    start = page.cells.index("<b>Say</b> hello")
    first, last = page.cells[start + 1 : start + 3]
    assert first.startswith('<script>alert(1)</script> & "quoted" <img src=https://example.org/x.')
    assert last.startswith("at the end")
    assert "half way" not in page.text


def test_summary_compares_first_and_last_ten_updates(full):
    page = Page(full[1].read_text("utf-8"))
    rows = {page.cells[i]: page.cells[i + 1 : i + 4] for i in range(len(page.cells) - 3)}
    assert rows["mean of"] == ["first 10", "last 10", "change"]
    assert rows["reward"] == ["0.4556", "2.45", "+1.994"]  # update 4 has no finite reward
    assert rows["KL to the reference, nats per token"] == ["0.045", "0.245", "+0.200"]
    assert rows["perplexity under the reference"] == ["14.5", "34.5", "× 2.38"]
    assert rows["distinct bigrams, fraction"] == ["0.9", "0.9", "× 1.00"]


def test_page_names_run_settings_versions_time_and_broken_updates(full):
    page = Page(full[1].read_text("utf-8"))
    for words in (
        "safe · SmolLM2 · seed 3",
        "under the upper clamp 0.5",
        "1 of 30 updates met values that are not finite",
        "lora.rank",
        "2.13.0",
        "2 per record, 8 in all",
    ):
        assert words in page.text


def test_all_panels_are_drawn_with_phases_and_clamps(full):
    updates = [update(step) for step in range(30)]
    figure = draw_run(updates, settings=SETTINGS, title="t")
    names = [axes.get_label() for axes in figure.axes]
    assert names == [
        "phases", "Reward",
        "phases", "KL to the reference policy",
        "phases", "Entropy", "entropy gate",
        "phases", "Value loss", "explained variance of the returns",
        "phases", "Text", "distinct bigrams, fraction",
    ]  # fmt: skip
    kl = figure.axes[names.index("KL to the reference policy")]
    assert {text.get_text() for text in kl.texts} >= {"lower clamp 0.05", "upper clamp 0.5"}
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["warm up", "climbing"]
    strip = figure.axes[0].patches
    assert [strip[4].get_facecolor() == strip[k].get_facecolor() for k in (0, 5)] == [True, False]


def test_curves_show_the_logged_values_and_a_gap_where_not_finite():
    updates = [update(s, kl_nats_per_token=v) for s, v in ((4, 0.1), (5, math.inf), (6, 0.3))]
    figure = draw_run(updates)
    names = [axes.get_label() for axes in figure.axes]
    curve = figure.axes[names.index("KL to the reference policy")].lines[0]
    assert list(curve.get_xdata()) == [4, 5, 6]
    assert [None if math.isnan(y) else y for y in curve.get_ydata()] == [0.1, None, 0.3]


def test_absent_measurements_take_their_panel_or_curve_with_them():
    assert panels([{"step": 0, "reward_mean": 1.0}]) == ["Reward"]
    ppo = [{"step": s, "kl_nats_per_token": 0.1, "kl_reward_coef": 0.05} for s in range(3)]
    assert panels(ppo, settings={"steps": 3}) == ["KL to the reference policy", "KL coefficient"]
    assert panels([{"step": 0, "explained_variance": 0.1}]) == ["explained variance of the returns"]
    assert panels([{"step": 0, "unknown": 1.0}]) == []


def test_a_key_that_begins_late_is_a_gap_not_a_loss():
    assert series([{"a": None}, {"a": 2}], "a")[1] == 2.0
    assert math.isnan(series([{}, {"a": 2}], "a")[0])


def test_a_curve_without_any_finite_value_says_so():
    axes = draw_run([update(0, reward_mean=math.nan)]).axes[1]
    assert axes.get_label() == "Reward"
    assert "not finite" in [text.get_text() for text in axes.texts]


def test_report_of_a_single_update(tmp_path):
    write_log(tmp_path, samples(0, "only"), update(0))
    html_path, png_path = write_report(tmp_path)
    page = Page(html_path.read_text("utf-8"))
    assert "in 1 update." in page.text
    assert "first 1" in page.text
    assert "only" in page.text
    assert png_path.stat().st_size > 10_000


def test_report_of_a_run_stopped_before_its_first_update_says_so(tmp_path):
    write_log(tmp_path)
    html_path, png_path = write_report(tmp_path)
    page = Page(html_path.read_text("utf-8"))
    assert "No update was finished" in page.text
    assert "threshold_upper" in page.text
    assert "img" not in page.tags
    assert png_path.read_bytes().startswith(b"\x89PNG")
    assert [t.get_text() for t in draw_run([]).texts] == ["No update was finished."]


def test_report_of_an_empty_log_and_of_a_half_written_line(tmp_path):
    (tmp_path / "log.jsonl").write_bytes(b'{"record": "ru')
    html_path, _ = write_report(tmp_path)
    assert "No update was finished" in html_path.read_text("utf-8")


def test_unreadable_log_is_an_error_that_keeps_the_old_report(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"log\.jsonl"):
        write_report(tmp_path)
    (tmp_path / "report.html").write_text("old")
    (tmp_path / "log.jsonl").write_bytes(b"oops\n")
    with pytest.raises(ValueError, match=r"log\.jsonl, line 1"):
        write_report(tmp_path)
    assert (tmp_path / "report.html").read_text() == "old"


def test_run_log_needs_neither_matplotlib_nor_rich_nor_jinja2_and_plots_no_pyplot():
    # Whatever torch and the package import by themselves is not ours, hence the difference.
    code = (
        "import sys, torch, safe_rl; before = set(sys.modules); import safe_rl.monitoring.run_log; "
        "print(sorted((set(sys.modules) - before) & {'matplotlib', 'rich', 'jinja2'})); "
        "import safe_rl.monitoring.report; print('matplotlib.pyplot' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.splitlines() == ["[]", "False"], result.stderr


def event(step, **changed):
    return {
        "record": "event",
        "step": step,
        "detector": "kl_runaway",
        "seen": 4.25,
        "limit": 3.0,
        "action": "tighten_threshold",
        "reason": "KL 4.25 times its <threshold>, limit 3",
        **changed,
    }


def test_events_are_a_table_a_sentence_and_a_line_through_each_panel(tmp_path):
    events = [event(1), event(2, action="roll_back", seen=math.inf)]
    write_log(tmp_path, update(0), update(1), events[0], update(2), events[1])
    page = Page(write_report(tmp_path)[0].read_text("utf-8"))
    assert "2 events: tighten threshold, roll back." in page.text
    start = page.cells.index("kl_runaway")
    reason = "KL 4.25 times its <threshold>, limit 3"
    assert page.cells[start + 1 : start + 5] == ["4.25", "3", "tighten_threshold", reason]
    assert page.cells[start - 1] == "1"
    assert "not finite" in page.cells
    figure = draw_run([update(step) for step in range(3)], events=events)
    for axes in figure.axes:
        if axes.get_label() != "phases":
            marks = [ln.get_xdata()[0] for ln in axes.lines if str(ln.get_label()).startswith("_")]
            assert marks == [1.0, 2.0]
    assert "event" in [text.get_text() for text in figure.legends[0].get_texts()]


def test_each_resume_is_a_row_and_a_sentence(tmp_path):
    resume = {
        "record": "resume",
        "updates_done": 1,
        "processes": 2,
        "changed_versions": {"gguf": "0.1 -> <b>", "torch": "2.12 -> 2.13"},
        "records_dropped": 3,
        "last_dropped_chain": "cd" * 32,
    }
    same = resume | {"changed_versions": {}, "records_dropped": 0, "last_dropped_chain": ""}
    write_log(tmp_path, update(0), resume, update(1), same)
    page = Page(write_report(tmp_path)[0].read_text("utf-8"))
    assert "Resumed 2 times, with other versions." in page.text
    start = page.cells.index("other versions") + 3
    assert [cell.strip() for cell in page.cells[start : start + 10]] == [
        "1", "2", "gguf 0.1 -> <b>, torch 2.12 -> 2.13", "3", "cd" * 32,
        "1", "2", "none", "0", "–",
    ]  # fmt: skip


def test_a_page_without_resumes_has_no_table_of_them(full):
    assert "other versions" not in Page(full[1].read_text("utf-8")).cells


def test_a_page_without_events_has_no_table_of_them(full):
    assert "detector" not in Page(full[1].read_text("utf-8")).cells


def test_hashes_and_the_last_hash_of_the_log_are_shown(tmp_path):
    log = RunLog(tmp_path / "log.jsonl")
    log.write({"record": "run", "hashes": {"prompts": "ab" * 32}})
    log.write(update(0))
    page = Page(write_report(tmp_path)[0].read_text("utf-8"))
    assert "ab" * 32 in page.cells
    assert len(log.last_chain()) == 64
    assert log.last_chain() in page.cells


@pytest.mark.parametrize(("factor", "scale"), [(1.1, "linear"), (10.0, "log")])
def test_an_event_does_not_decide_whether_an_axis_is_logarithmic(factor, scale):
    figure = draw_run([update(s, loss_value=factor**s) for s in range(3)], events=[event(1)])
    (axes,) = [axes for axes in figure.axes if axes.get_label() == "Value loss"]
    assert axes.get_yscale() == scale


def test_title_and_unit_of_a_panel_do_not_overlap():
    for phase in ({}, {"phase": "climbing"}):
        figure = draw_run([{"step": 0, "reward_mean": 0.5, **phase}])
        figure.draw_without_rendering()
        texts = {"Reward": figure.axes[0]._left_title, "unit": figure.axes[-1].texts[0]}
        boxes = {name: text.get_window_extent() for name, text in texts.items()}
        assert boxes["Reward"].y0 >= boxes["unit"].y1
