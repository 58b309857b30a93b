"""The log as an audit trail: what was changed in it shows, and where."""

import hashlib
import json
import re
import subprocess
import sys

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from safe_rl.monitoring import RunLog
from safe_rl.monitoring.audit import audit_log, file_sha256, frozen_sha256, main


def write_log(path, count=5):
    log = RunLog(path)
    log.write({"record": "run", "seed": 0})
    for step in range(count - 1):
        log.write({"record": "update", "step": step, "reward_mean": step / 7, "text": "é\n}"})
    return log


def bad_line(path):
    with pytest.raises(ValueError, match=re.escape(str(path))) as error:
        audit_log(path)
    return int(re.search(r"line (\d+)", str(error.value))[1])


def test_the_chain_is_what_it_says(tmp_path):
    """Computed again from the definition, with nothing of the module."""
    log = write_log(tmp_path / "log.jsonl")
    chain = "0" * 64
    for line in log.path.read_text("ascii").splitlines():
        record = json.loads(line)
        found = record.pop("chain")
        chain = hashlib.sha256((chain + json.dumps(record)).encode()).hexdigest()
        assert found == chain
    assert audit_log(log.path) == (5, chain, False)


@pytest.mark.parametrize("number", [1, 3, 5])
def test_an_edited_line_is_named(tmp_path, number):
    path = write_log(tmp_path / "log.jsonl").path
    lines = path.read_bytes().split(b"\n")
    lines[number - 1] = lines[number - 1].replace(b'"record"', b'"rekord"')
    path.write_bytes(b"\n".join(lines))
    assert bad_line(path) == number


@pytest.mark.parametrize("number", [1, 3, 4])
def test_a_missing_line_shows_where_it_was(tmp_path, number):
    path = write_log(tmp_path / "log.jsonl").path
    lines = path.read_bytes().split(b"\n")
    del lines[number - 1]
    path.write_bytes(b"\n".join(lines))
    assert bad_line(path) == number


def test_added_and_swapped_lines_are_named(tmp_path):
    path = write_log(tmp_path / "log.jsonl").path
    lines = path.read_bytes().split(b"\n")
    for changed in (
        [*lines[:2], b'{"record": "event"}', *lines[2:]],
        [*lines[:2], lines[1], *lines[2:]],
        [*lines[:2], lines[3], lines[2], *lines[4:]],
        [*lines[:2], b"", *lines[2:]],
    ):
        path.write_bytes(b"\n".join(changed))
        assert bad_line(path) == 3


def test_a_log_cut_at_its_end_shows_by_its_last_hash_alone(tmp_path):
    path = write_log(tmp_path / "log.jsonl").path
    whole = audit_log(path)
    path.write_bytes(b"\n".join(path.read_bytes().split(b"\n")[:3]) + b"\n")
    cut = audit_log(path)
    assert cut.records == 3
    assert cut.chain != whole.chain


@given(place=st.integers(min_value=0), byte=st.integers(min_value=0, max_value=255))
@settings(max_examples=60, deadline=None)
def test_any_changed_byte_shows(tmp_path_factory, place, byte):
    path = write_log(tmp_path_factory.mktemp("audit") / "log.jsonl", 3).path
    content = bytearray(path.read_bytes())
    place %= len(content) - 1  # the last newline: without it the line is unfinished
    changed = content[place] != byte
    content[place] = byte
    path.write_bytes(content)
    if changed:
        assert bad_line(path) >= 1
    else:
        assert audit_log(path).records == 3


def test_an_unfinished_last_line_is_no_fault(tmp_path):
    log = write_log(tmp_path / "log.jsonl")
    content = log.path.read_bytes()
    log.path.write_bytes(content + b'{"record": "upd')
    assert audit_log(log.path)[::2] == (5, True)
    log.write({"record": "update", "step": 4})
    assert audit_log(log.path)[::2] == (6, False)


def test_the_chain_survives_a_cut_back_with_a_record_that_stays_behind_it(tmp_path):
    log = write_log(tmp_path / "log.jsonl")
    dropped = log.last_chain()
    log.write({"record": "note", "text": "no step"})
    assert log.after(1) == (3, dropped)
    assert log.truncate_to(1) == 3
    assert audit_log(log.path).records == 3
    log.write({"record": "update", "step": 1})
    assert audit_log(log.path).records == 4


def test_a_line_without_hash_is_named_and_not_blamed_on_the_next(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_bytes(b'{"record": "run"}\n')
    RunLog(path).write({"record": "update", "step": 0})
    with pytest.raises(ValueError, match="line 1 has no hash"):
        audit_log(path)


def test_the_command_prints_the_verdict(tmp_path, capsys):
    path = write_log(tmp_path / "log.jsonl").path
    assert main([str(path)]) == 0
    assert capsys.readouterr().out == f"whole: 5 records; last hash {audit_log(path).chain}\n"
    path.write_bytes(path.read_bytes().replace(b'"step": 2', b'"step": 7'))
    assert main([str(path)]) == 1
    assert "line 4 does not follow" in capsys.readouterr().err
    assert main([str(tmp_path / "none.jsonl")]) == 1
    assert "none.jsonl" in capsys.readouterr().err


@pytest.mark.slow
def test_the_command_runs_as_a_module(tmp_path):
    path = write_log(tmp_path / "log.jsonl").path
    command = [sys.executable, "-W", "error", "-m", "safe_rl.monitoring.audit", str(path)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")


def test_hash_of_a_file(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_bytes(b"abc")
    assert file_sha256(path).startswith("ba7816bf 8f01cfea".replace(" ", ""))  # FIPS 180-2


def test_hash_of_the_frozen_weights_reads_names_values_and_dtypes_and_no_adapter():
    def model(*, dtype=torch.float32, value=1.0):
        layer = torch.nn.Linear(2, 3).to(dtype).requires_grad_(False)
        torch.nn.init.constant_(layer.weight, value)
        torch.nn.init.zeros_(layer.bias)
        return torch.nn.ModuleDict({"base": layer, "adapter": torch.nn.Linear(2, 2)})

    same = frozen_sha256(model())
    assert frozen_sha256(model()) == same  # the adapters differ
    assert frozen_sha256(model(value=1.5)) != same
    assert frozen_sha256(model(dtype=torch.bfloat16)) != same
    renamed = torch.nn.ModuleDict({"other": model()["base"]})
    assert frozen_sha256(renamed) != same
