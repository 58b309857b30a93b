"""The report of a run: one picture and one self-contained page, made from the log alone."""

import base64
import io
import math
import os
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
from matplotlib.figure import Figure

from safe_rl.monitoring.plots import draw_run, series
from safe_rl.monitoring.run_log import LOG_NAME, TIMING_NAME, RunLog, replace_file

Record = dict[str, Any]

SUMMARY_UPDATES = 10
"""The summary compares the means of this many first and last updates."""

# Key, words, unit, and whether the change reads as a factor (what must not grow or shrink too far).
_SUMMARY = (
    ("reward_mean", "reward", "", False),
    ("kl_nats_per_token", "KL to the reference", "nats per token", False),
    ("entropy_nats_per_token", "entropy", "nats per token", False),
    ("ref_perplexity", "perplexity under the reference", "", True),
    ("distinct_bigrams_fraction", "distinct bigrams", "fraction", True),
)
_DPI = 140


class _SummaryRow(NamedTuple):
    name: str
    unit: str
    first: str
    last: str
    change: str


class _SampleRow(NamedTuple):
    prompt: str
    first: Record | None
    last: Record | None


def write_report(run_dir: str | os.PathLike[str]) -> tuple[Path, Path]:
    """Write ``report.html`` and ``report.png`` beside the log of a run, finished or not.

    The page stands alone: pictures and styles are inside it, no script, nothing is fetched. It
    shows the curves, the means of the first and last updates, what the monitor noticed and did,
    each resume with what it cut back and which versions had changed, the first and last samples
    side by side, settings, versions and hashes. What the log lacks is left out; a run without an
    update says so.
    Both files are written to a temporary name and renamed, so an older report is never half gone.

    Args:
        run_dir: Folder of the run, with ``log.jsonl`` and, where there is one, ``timing.jsonl``.

    Returns:
        Paths of the HTML page and of the PNG picture.

    Raises:
        FileNotFoundError: ``run_dir`` has no ``log.jsonl``.
        ValueError: The log has a malformed line; the message gives file and line.

    Example:
        >>> import tempfile
        >>> folder = tempfile.TemporaryDirectory()
        >>> log = RunLog(Path(folder.name) / "log.jsonl")
        >>> _ = log.write({"record": "run", "seed": 0, "settings": {"steps": 5}})
        >>> html_path, png_path = write_report(folder.name)
        >>> "No update was finished" in html_path.read_text("utf-8")
        True
        >>> folder.cleanup()
    """
    run_dir = Path(run_dir)
    records = RunLog.read(run_dir / LOG_NAME)
    timing_path = run_dir / TIMING_NAME
    timings = RunLog.read(timing_path) if timing_path.exists() else []
    header = next((record for record in records if record["record"] == "run"), {})
    settings = header.get("settings") or {}
    updates = [record for record in records if record["record"] == "update"]
    samples = [record for record in records if record["record"] == "samples"]
    events = [record for record in records if record["record"] == "event"]
    resumes = [record for record in records if record["record"] == "resume"]

    title = _title(header)
    figure = draw_run(updates, settings=settings, title=title, events=events)
    picture = _png(figure)
    light = _png(_without_title(figure))
    dark = _png(draw_run(updates, settings=settings, dark=True, events=events))
    template = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    template.filters["number"] = _number
    page = template.from_string(_PAGE).render(
        title=title,
        headline=_headline(updates, settings, events, resumes),
        events=events,
        resumes=resumes,
        count=len(updates),
        averaged=_averaged(updates),
        summary=_summary(updates),
        samples=_sample_rows(samples),
        first_step=samples[0].get("step", "?") if samples else None,
        last_step=samples[-1].get("step", "?") if len(samples) > 1 else None,
        tables=_tables(header, timings, RunLog(run_dir / LOG_NAME).last_chain()),
        light=base64.b64encode(light).decode("ascii"),
        dark=base64.b64encode(dark).decode("ascii"),
    )
    html_path, png_path = run_dir / "report.html", run_dir / "report.png"
    replace_file(png_path, picture)
    # A sampled byte can be half of a character; a lone surrogate has no UTF-8 form.
    replace_file(html_path, page.encode("utf-8", "xmlcharrefreplace"))
    return html_path, png_path


def _png(figure: Figure) -> bytes:
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=_DPI)
    return picture.getvalue()


def _without_title(figure: Figure) -> Figure:
    """Leave the title to the page; the layout is kept, which is the slow part of drawing."""
    figure.set_layout_engine("none")
    figure.suptitle("")
    return figure


def _title(header: Mapping[str, Any]) -> str:
    """Name the run by the parts of its header that tell runs apart."""
    settings = header.get("settings") or {}
    parts = []
    for key in ("algorithm", "model", "seed"):
        value = header.get(key, settings.get(key))
        if value is not None:
            parts.append(f"seed {value}" if key == "seed" else Path(str(value)).name)
    return " · ".join(parts) or "Run"


def _number(value: Any) -> str:
    """Four significant digits, and words for what is not a finite number."""
    if value is None:
        return "–"
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if not math.isfinite(value):
        return "not finite"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _averaged(updates: Sequence[Record]) -> int:
    """How many updates go into each mean: fewer in a short run, so that the two do not overlap."""
    return min(SUMMARY_UPDATES, max(1, len(updates) // 2))


def _means(updates: Sequence[Record], key: str) -> tuple[float | None, float | None]:
    """Mean of the first and of the last updates that logged a finite value, or None."""
    count = _averaged(updates)
    means = []
    for part in (updates[:count], updates[-count:]):
        values = [value for value in series(part, key) or [] if math.isfinite(value)]
        means.append(sum(values) / len(values) if values else None)
    return means[0], means[1]


def _summary(updates: Sequence[Record]) -> list[_SummaryRow]:
    rows = []
    for key, name, unit, as_factor in _SUMMARY:
        if series(updates, key) is None:
            continue
        first, last = _means(updates, key)
        change = "–"
        if first is not None and last is not None:
            if not as_factor:
                change = f"{last - first:+.3f}"
            elif first > 0:
                change = f"× {last / first:.2f}"
        rows.append(_SummaryRow(name, unit, _number(first), _number(last), change))
    return rows


def _headline(
    updates: Sequence[Record],
    settings: Mapping[str, Any],
    events: Sequence[Record],
    resumes: Sequence[Record],
) -> str:
    """The run in a few sentences."""
    if not updates:
        return "No update was finished: the run was stopped before its first record."
    count = _averaged(updates)
    sentences = []
    first, last = _means(updates, "reward_mean")
    if first is not None and last is not None:
        span = f"between the first and last {count} of" if len(updates) > 1 else "in"
        plural = "s" if len(updates) > 1 else ""
        sentences.append(f"Reward {first:.3f} → {last:.3f} {span} {len(updates)} update{plural}.")
    _, kl = _means(updates, "kl_nats_per_token")
    limit = settings.get("threshold_upper")
    if kl is not None:
        against = ""
        if isinstance(limit, int | float):
            against = f", {'under' if kl < limit else 'above'} the upper clamp {limit:g}"
        sentences.append(f"KL {kl:.3f} nats per token at the end{against}.")
    broken = sum(float(update.get("non_finite") or 0) > 0 for update in updates)
    if broken:
        sentences.append(f"{broken} of {len(updates)} updates met values that are not finite.")
    if events:
        kinds = dict.fromkeys(str(event.get("action")).replace("_", " ") for event in events)
        plural = "s" if len(events) > 1 else ""
        sentences.append(f"{len(events)} event{plural}: {', '.join(kinds)}.")
    if resumes:
        plural = "s" if len(resumes) > 1 else ""
        other = ", with other versions" if any(r.get("changed_versions") for r in resumes) else ""
        sentences.append(f"Resumed {len(resumes)} time{plural}{other}.")
    return " ".join(sentences) or f"{len(updates)} updates."


def _sample_rows(samples: Sequence[Record]) -> list[_SampleRow]:
    """Put the first and the last samples of each prompt in one row, in the order of the prompts."""
    by_prompt: dict[str, tuple[list[Record], list[Record]]] = {}
    for place, record in enumerate([*samples[:1], *samples[1:][-1:]]):
        for sample in record.get("samples", []):
            by_prompt.setdefault(str(sample.get("prompt", "")), ([], []))[place].append(sample)
    return [
        _SampleRow(prompt, first, last)
        for prompt, columns in by_prompt.items()
        for first, last in zip_longest(*columns)
    ]


def _tables(
    header: Mapping[str, Any], timings: Sequence[Record], log_hash: str
) -> dict[str, dict[str, Any]]:
    """Small tables of names and values: settings, versions, hashes, time."""
    hashes = _flat(header.get("hashes") or {})
    if log_hash:
        hashes["last line of the log"] = log_hash
    run = {
        key: value
        for key, value in header.items()
        if key not in ("record", "settings", "versions", "hashes")
        and not isinstance(value, dict | list)
    }
    seconds: dict[str, str] = {}
    for key in dict.fromkeys(key for timing in timings for key in timing if "seconds" in key):
        values = [float(timing[key]) for timing in timings if timing.get(key) is not None]
        if values:
            name = key.replace("_", " ")
            seconds[name] = f"{sum(values) / len(values):.3g} per record, {sum(values):.4g} in all"
    tables = {
        "Run": run,
        "Settings": _flat(header.get("settings") or {}),
        "Versions": _flat(header.get("versions") or {}),
        "SHA-256": hashes,
        "Time": seconds,
    }
    return {name: table for name, table in tables.items() if table}


def _flat(nested: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in nested.items():
        if isinstance(value, dict):
            flat.update(_flat(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = value
    return flat


_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{{ title }}</title>
<style>
:root { color-scheme: light dark; --ground: #ffffff; --text: #1c2329; --quiet: #626d77;
  --rule: #e0e5e9; --tint: #f5f7f8; }
@media (prefers-color-scheme: dark) {
  :root { --ground: #14181c; --text: #e6eaed; --quiet: #9aa5ae; --rule: #2c343b; --tint: #1b2126; }
}
body { margin: 0; background: var(--ground); color: var(--text);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", "DejaVu Sans", sans-serif; }
main { max-width: 70rem; margin: 0 auto; padding: 2.5rem 1.25rem 4rem; }
h1 { font-size: 1.6rem; line-height: 1.2; margin: 0 0 .4rem; }
h2 { font-size: 1.1rem; margin: 2.6rem 0 .7rem; }
.headline { font-size: 1.1rem; margin: 0 0 1.6rem; max-width: 46rem; }
.note { color: var(--quiet); font-size: .875rem; margin: .4rem 0 0; }
img { display: block; width: 100%; min-width: 40rem; height: auto; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .92rem; }
th, td { text-align: left; vertical-align: top; padding: .45rem 1.1rem .45rem 0;
  border-bottom: 1px solid var(--rule); }
thead th { color: var(--quiet); font-weight: 600; font-size: .82rem; white-space: nowrap; }
tbody th { font-weight: 500; }
.figures td, .figures thead th:not(:first-child) { text-align: right;
  font-variant-numeric: tabular-nums; }
.samples { width: 100%; min-width: 44rem; table-layout: fixed; }
.samples th:first-child { width: 24%; }
.samples p { margin: 0; white-space: pre-wrap; overflow-wrap: anywhere; }
.reward { color: var(--quiet); font-size: .8rem; font-variant-numeric: tabular-nums; }
.pairs { display: flex; flex-wrap: wrap; gap: 0 3.5rem; align-items: flex-start; }
.pairs td { font-family: ui-monospace, "DejaVu Sans Mono", monospace; font-size: .82rem;
  overflow-wrap: anywhere; max-width: 28rem; }
.pairs th { font-weight: 400; color: var(--quiet); }
</style>
</head>
<body>
<main>
<h1>{{ title }}</h1>
<p class="headline">{{ headline }}</p>
{% if count %}
<div class="wide"><picture>
<source media="(prefers-color-scheme: dark)" srcset="data:image/png;base64,{{ dark }}">
<img src="data:image/png;base64,{{ light }}" alt="Curves of the run. {{ headline }}">
</picture></div>
{% endif %}
{% if summary %}
<h2>Summary</h2>
<div class="wide"><table class="figures">
<thead><tr><th>mean of</th><th>first {{ averaged }}</th><th>last {{ averaged }}</th>
<th>change</th></tr></thead>
<tbody>
{% for row in summary %}
<tr><th>{{ row.name }}{% if row.unit %}, {{ row.unit }}{% endif %}</th>
<td>{{ row.first }}</td><td>{{ row.last }}</td><td>{{ row.change }}</td></tr>
{% endfor %}
</tbody></table></div>
<p class="note">Over updates with a finite value.{% if averaged < 10 %} In a short run, half of the
updates make each mean.{% endif %}</p>
{% endif %}
{% if events %}
<h2>Events</h2>
<div class="wide"><table class="figures">
<thead><tr><th>update</th><th>detector</th><th>seen</th><th>limit</th><th>action</th>
<th>reason</th></tr></thead>
<tbody>
{% for event in events %}
<tr><th>{{ event.step }}</th><td>{{ event.detector }}</td><td>{{ event.seen | number }}</td>
<td>{{ event.limit | number }}</td><td>{{ event.action }}</td><td>{{ event.reason }}</td></tr>
{% endfor %}
</tbody></table></div>
{% endif %}
{% if resumes %}
<h2>Resumes</h2>
<div class="wide"><table>
<thead><tr><th>after updates</th><th>processes</th><th>other versions</th>
<th>lines cut back</th><th>hash of the last of them</th></tr></thead>
<tbody>
{% for resume in resumes %}
<tr><th>{{ resume.updates_done }}</th><td>{{ resume.processes | number }}</td>
<td>{% for name, change in (resume.changed_versions or {}).items() %}
{{ name }} {{ change }}{{ "" if loop.last else ", " }}
{%- else %}none{% endfor %}</td>
<td>{{ resume.records_dropped | number }}</td><td>{{ resume.last_dropped_chain or "–" }}</td></tr>
{% endfor %}
</tbody></table></div>
{% endif %}
{% if samples %}
<h2>Samples</h2>
<div class="wide"><table class="samples">
<thead><tr><th>prompt</th><th>update {{ first_step }}</th>
{% if last_step is not none %}<th>update {{ last_step }}</th>{% endif %}</tr></thead>
<tbody>
{% for row in samples %}
<tr><th><p>{{ row.prompt }}</p></th>
{% for sample in ([row.first, row.last] if last_step is not none else [row.first]) %}
<td>{% if sample %}<p>{{ sample.response or "(empty)" }}</p>
<span class="reward">reward {{ sample.reward | number }}</span>{% else %}–{% endif %}</td>
{% endfor %}
</tr>
{% endfor %}
</tbody></table></div>
{% endif %}
<div class="pairs">
{% for name, table in tables.items() %}
<section><h2>{{ name }}</h2>
<table><tbody>
{% for key, value in table.items() %}
<tr><th>{{ key }}</th><td>{{ value | number }}</td></tr>
{% endfor %}
</tbody></table></section>
{% endfor %}
</div>
</main>
</body>
</html>
"""
