"""What a run leaves behind and what a person sees while it lasts.

`run_log` needs torch alone and is imported here. `report` and `plots` need matplotlib and jinja2,
`progress` needs rich: import those modules by name.
"""

from safe_rl.monitoring.run_log import RunLog
from safe_rl.monitoring.text_metrics import distinct_ngrams

__all__ = ["RunLog", "distinct_ngrams"]
