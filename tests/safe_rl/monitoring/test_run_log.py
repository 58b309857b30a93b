"""The log: strict JSON, what is read is what was written, resume leaves no trace."""

import json
import math
import re

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from safe_rl.monitoring import RunLog
from safe_rl.monitoring.run_log import replace_file


def update(step, **values):
    return {"record": "update", "step": step, "reward_mean": step / 3, **values}


HEADER = {"record": "run", "seed": 0, "settings": {"steps": 4}}


def write_run(path, steps):
    log = RunLog(path)
    for step in steps:
        if step == 0:
            log.write(HEADER)
        log.write(update(step, kl_nats_per_token=torch.tensor(0.1) * step))
        if step % 2 == 0:
            samples = [{"prompt": "a\nb", "response": "é\u2028 \ud83d", "reward": math.nan}]
            log.write({"record": "samples", "step": step, "samples": samples})
    return log


def test_each_line_is_strict_json_even_where_values_are_not_finite(tmp_path):
    log = RunLog(tmp_path / "log.jsonl")
    log.write(update(0, a=math.nan, b=torch.tensor(math.inf), c=[-math.inf]))

    def refuse(word):
        raise AssertionError(word)

    line = json.loads(log.path.read_text("ascii"), parse_constant=refuse)
    assert re.fullmatch("[0-9a-f]{64}", line.pop("chain"))
    assert line == {
        "record": "update",
        "step": 0,
        "reward_mean": 0.0,
        "a": "NaN",
        "b": "Infinity",
        "c": ["-Infinity"],
    }


def test_non_finite_values_come_back_as_floats_but_texts_stay_texts(tmp_path):
    log = RunLog(tmp_path / "log.jsonl")
    log.write(update(0, a=math.nan, b=-math.inf))
    log.write({"record": "samples", "step": 0, "samples": [{"response": "NaN"}]})
    first, second = RunLog.read(log.path)
    assert math.isnan(first["a"])
    assert first["b"] == -math.inf
    assert second["samples"] == [{"response": "NaN"}]


def test_tensors_become_plain_numbers_of_their_own_kind(tmp_path):
    log = RunLog(tmp_path / "log.jsonl")
    parameter = torch.tensor(0.5, requires_grad=True)
    record = update(
        1,
        f32=torch.tensor(0.1),
        bf16=torch.tensor(0.5, dtype=torch.bfloat16),
        count=torch.tensor(2**53 + 1),
        flag=torch.tensor(True),
        grad=parameter,
        nested={"x": [torch.tensor(1.5)]},
    )
    written = log.write(record)
    assert written["f32"] == 0.10000000149011612
    assert written["bf16"] == 0.5
    assert written["count"] == 2**53 + 1
    assert written["flag"] is True
    assert written["grad"] == 0.5
    assert written["nested"] == {"x": [1.5]}
    assert RunLog.read(log.path) == [written]
    assert isinstance(record["f32"], torch.Tensor)


def test_number_of_device_transfers_does_not_grow_with_the_keys(tmp_path, monkeypatch):
    calls = []
    to_list = torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda self: calls.append(1) or to_list(self))
    monkeypatch.setattr(torch.Tensor, "item", lambda self: pytest.fail("a transfer per key"))
    RunLog(tmp_path / "log.jsonl").write(
        update(0, **{f"key_{i}": torch.tensor(float(i)) for i in range(20)})
    )
    assert len(calls) == 1


def test_log_and_folder_appear_with_the_first_record(tmp_path):
    log = RunLog(tmp_path / "new" / "log.jsonl")
    assert not log.path.parent.exists()
    log.write(HEADER)
    assert RunLog.read(log.path) == [HEADER]


def test_an_existing_log_is_continued(tmp_path):
    path = tmp_path / "log.jsonl"
    RunLog(path).write(update(0))
    RunLog(path).write(update(1))
    assert [record["step"] for record in RunLog.read(path)] == [0, 1]


@pytest.mark.parametrize("step", range(6))
def test_stopped_and_resumed_log_equals_the_uninterrupted_one_byte_for_byte(tmp_path, step):
    whole = write_run(tmp_path / "whole.jsonl", range(6))
    # Killed after more updates than its last checkpoint holds.
    stopped = write_run(tmp_path / "stopped.jsonl", range(min(step + 2, 6)))
    last = stopped.last_chain()
    count, chain = stopped.after(step)
    assert chain == last
    dropped = stopped.truncate_to(step)
    assert dropped == count > 0
    assert stopped.after(step) == (0, "")
    assert all(record["step"] < step for record in RunLog.read(stopped.path) if "step" in record)
    if step == 0:
        assert RunLog.read(stopped.path) == [HEADER]
        stopped.path.unlink()
    write_run(stopped.path, range(step, 6))
    assert stopped.path.read_bytes() == whole.path.read_bytes()
    assert {path.name for path in tmp_path.iterdir()} == {"whole.jsonl", "stopped.jsonl"}


def test_truncating_beyond_the_end_or_without_a_file_changes_nothing(tmp_path):
    log = write_run(tmp_path / "log.jsonl", range(3))
    before = log.path.read_bytes()
    assert log.truncate_to(3) == 0
    assert log.path.read_bytes() == before
    assert RunLog(tmp_path / "none.jsonl").truncate_to(0) == 0
    assert RunLog(tmp_path / "none.jsonl").after(0) == (0, "")
    assert not (tmp_path / "none.jsonl").exists()


@given(cut=st.integers(min_value=0, max_value=400))
@settings(max_examples=40, deadline=None)
def test_log_of_a_run_killed_at_any_byte_is_read_and_continued(tmp_path_factory, cut):
    folder = tmp_path_factory.mktemp("killed")
    log = write_run(folder / "log.jsonl", range(3))
    content = log.path.read_bytes()
    finished = content[:cut].rpartition(b"\n")
    log.path.write_bytes(content[:cut])
    kept = finished[0] + finished[1]
    assert len(RunLog.read(log.path)) == kept.count(b"\n")
    assert log.path.read_bytes() == content[:cut]  # reading changes nothing
    log.write(update(7))
    assert log.path.read_bytes().startswith(kept + b'{"record": "update", "step": 7')
    assert RunLog.read(log.path)[-1] == update(7)


def test_unfinished_last_line_is_dropped_on_resume(tmp_path):
    log = write_run(tmp_path / "log.jsonl", range(2))
    before = log.path.read_bytes()
    with open(log.path, "ab") as file:
        file.write(b'{"record": "upd')
    log.truncate_to(2)
    assert log.path.read_bytes() == before


@pytest.mark.parametrize(
    "bad",
    [
        b"{oops}",
        b"",
        b"[1]",
        b'{"step": 1}',
        b'{"record": "u", "x": NaN}',
        b'{"record": "u", "step": "1"}',
        b"\xff",
    ],
)
def test_malformed_line_is_an_error_with_file_and_line(tmp_path, bad):
    path = tmp_path / "log.jsonl"
    RunLog(path).write(HEADER)
    content = path.read_bytes() + bad + b"\n" + json.dumps(update(1)).encode() + b"\n"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(f"{path}, line 2")):
        RunLog.read(path)
    with pytest.raises(ValueError, match="line 2"):
        RunLog(path).truncate_to(0)
    with pytest.raises(ValueError, match="line 2"):
        RunLog(path).after(0)
    assert path.read_bytes() == content


def test_missing_log_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.jsonl"):
        RunLog.read(tmp_path / "none.jsonl")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"x": torch.zeros(2)}, r"x must be a 0-d tensor, got shape \[2\]"),
        ({"settings": {"path": [object()]}}, r"settings.path\[0\] is a object"),
        ({"settings": {1: 2}}, "settings: keys must be strings, got 1"),
        ({"step": 1.0}, "step must be an int, got 1.0"),
        ({"step": True}, "step must be an int, got True"),
        ({"record": None}, "must have a string under"),
        ({"chain": "ab"}, "chain is written by the log itself, got 'ab'"),
    ],
)
def test_what_json_cannot_hold_is_refused_by_name_and_nothing_is_written(tmp_path, values, message):
    log = RunLog(tmp_path / "log.jsonl")
    with pytest.raises(ValueError, match=message):
        log.write({**update(0), **values})
    assert not log.path.exists()


def test_negative_step_is_refused(tmp_path):
    with pytest.raises(ValueError, match="step must not be negative, got -1"):
        RunLog(tmp_path / "log.jsonl").truncate_to(-1)
    with pytest.raises(ValueError, match="step must not be negative, got -1"):
        RunLog(tmp_path / "log.jsonl").after(-1)


def test_failed_replacement_leaves_the_old_file_and_no_other(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    path.write_bytes(b"old")

    def fail(*_):
        raise OSError("no")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="no"):
        replace_file(path, b"new")
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.txt"]
    assert path.read_bytes() == b"old"
