"""Alarms become actions: once, in order, alike on every rank, and the same after a resume."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from safe_rl.checkpoints import load_checkpoint, save_checkpoint
from safe_rl.monitoring.interventions import Interventions, LastGood, finite_on_all_ranks
from safe_rl.monitoring.monitor import ACTIONS, Monitor

WELL = {
    "reward": 0.5,
    "entropy": 2.0,
    "kl": 0.1,
    "kl_threshold": 0.3,
    "value_loss": 0.02,
    "skipped": 0.0,
}
FAULTS = {
    "reward_crash": ({"reward": -5.0}, 3),
    "entropy_collapse": ({"entropy": 0.2}, 3),
    "entropy_surge": ({"entropy": 4.0}, 3),
    "kl_runaway": ({"kl": 2.0}, 3),
    "value_loss_explosion": ({"value_loss": 5.0}, 2),
    "non_finite": ({"skipped": 0.5}, 1),
}


def observe(watch, start, count, **changed):
    return [
        found
        for step in range(start, start + count)
        for found in watch.observe(step, **(WELL | changed))
    ]


@pytest.mark.parametrize("detector", FAULTS)
def test_each_fault_raises_its_own_alarm_and_no_other(detector):
    watch = Interventions(Monitor())
    assert observe(watch, 0, 15) == []
    assert watch.healthy
    fault, updates = FAULTS[detector]
    assert observe(watch, 15, updates - 1, **fault) == []
    (found,) = observe(watch, 15 + updates - 1, 1, **fault)
    assert list(found) == ["record", "step", "detector", "seen", "limit", "action", "reason"]
    assert (found["record"], found["step"]) == ("event", 14 + updates)
    assert (found["detector"], found["action"]) == (detector, ACTIONS[detector][0])
    assert f"{found['limit']:g}" in found["reason"]
    assert not watch.healthy


def test_actions_climb_while_the_fault_stays_and_the_last_one_repeats():
    watch = Interventions(Monitor())
    found = observe(watch, 0, 22, kl=2.0)
    assert [f["step"] for f in found] == [2, 7, 12, 17]
    assert [f["action"] for f in found] == ["tighten_threshold", "roll_back", "stop", "stop"]
    assert watch.threshold_scale == pytest.approx(0.7)
    assert watch.learning_rate_scale == 1.0


def test_factors_change_once_per_update_whatever_number_of_alarms():
    watch = Interventions(Monitor())
    observe(watch, 0, 15)
    found = observe(watch, 15, 3, entropy=4.0, value_loss=5.0)
    assert [f["action"] for f in found] == ["lower_learning_rate"] * 2
    # The value loss at the second of the three, the entropy at the third.
    assert watch.learning_rate_scale == 0.25
    both = Monitor(actions=ACTIONS | {"kl_runaway": ("lower_learning_rate",)})
    watch = Interventions(both)
    observe(watch, 0, 15)
    found = observe(watch, 15, 3, entropy=4.0, kl=2.0)
    assert len(found) == 2
    assert watch.learning_rate_scale == 0.5


def test_a_detector_without_actions_is_logged():
    watch = Interventions(Monitor(actions={}))
    assert [f["action"] for f in observe(watch, 0, 3, kl=2.0)] == ["log"]
    assert watch.threshold_scale == 1.0


def test_a_run_is_not_healthy_at_the_first_sign():
    watch = Interventions(Monitor())
    observe(watch, 0, 2)
    assert observe(watch, 2, 1, kl=2.0) == []
    assert not watch.healthy
    observe(watch, 3, 1)
    assert watch.healthy


def test_after_a_roll_back_alarms_are_over_and_the_next_one_is_the_second():
    watch = Interventions(Monitor())
    observe(watch, 0, 8, kl=2.0)
    watch.rolled_back()
    assert observe(watch, 8, 1) == []
    assert watch.healthy
    assert [f["action"] for f in observe(watch, 9, 3, kl=2.0)] == ["stop"]


def test_a_bad_measurement_holds_its_detector_and_not_the_others():
    watch = Interventions(Monitor())
    observe(watch, 0, 15)
    found = observe(watch, 15, 3, kl=2.0, reward=float("nan"), value_loss=float("inf"))
    assert [f["detector"] for f in found] == ["kl_runaway"]


@pytest.mark.parametrize("cut", [1, 17, 21])
def test_a_resumed_run_decides_as_an_uninterrupted_one(tmp_path, cut):
    def changed(step):
        return {"kl": 2.0} if 15 <= step < 30 else {"entropy": 0.2} if step >= 30 else {}

    def play(watch, steps):
        return [f for step in steps for f in watch.observe(step, **(WELL | changed(step)))]

    whole, first, second = (Interventions(Monitor()) for _ in range(3))
    expected = play(whole, range(40))
    assert len(expected) > 3
    before = play(first, range(cut))
    save_checkpoint(tmp_path / "c.pt", cut, {"watch": first})
    load_checkpoint(tmp_path / "c.pt", {"watch": second})
    assert [*before, *play(second, range(cut, 40))] == expected
    assert second.threshold_scale == whole.threshold_scale


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"actions": {"kl_runway": ("stop",)}}, "must name detectors .* got 'kl_runway'"),
        ({"actions": {"kl_runaway": ("halt",)}}, "must be among .* got 'halt'"),
        ({"learning_rate_factor": 1.0}, r"learning_rate_factor must be within \(0, 1\), got 1.0"),
    ],
)
def test_a_monitor_says_what_is_wrong(arguments, message):
    with pytest.raises(ValueError, match=message):
        Monitor(**arguments)


def test_a_missing_measurement_is_named():
    misspelt = {("kll" if name == "kl" else name): value for name, value in WELL.items()}
    with pytest.raises(TypeError, match="missing: kl, unknown: kll"):
        Interventions(Monitor()).observe(0, **misspelt)


# --- going back ---------------------------------------------------------------------------------


def trained():
    torch.manual_seed(0)
    layer = torch.nn.Linear(3, 2)
    return layer, torch.optim.Adam(layer.parameters(), lr=0.1)


def step(layer, optimizer):
    optimizer.zero_grad()
    layer(torch.ones(3)).square().sum().backward()
    optimizer.step()


def test_going_back_restores_parameters_and_optimizer_again_and_again(tmp_path):
    layer, optimizer = trained()
    step(layer, optimizer)
    good = LastGood({"layer": layer, "optimizer": optimizer}, tmp_path)
    good.keep(1)
    ends = []
    for _ in range(3):
        assert good.restore() == 1
        for _ in range(4):
            step(layer, optimizer)
        ends.append(layer.weight.detach().clone())
    assert torch.equal(ends[0], ends[1])
    assert torch.equal(ends[0], ends[2])


def test_a_checkpoint_says_which_file_it_is_and_holds_none_of_it(tmp_path):
    layer, optimizer = trained()
    good = LastGood({"layer": layer, "optimizer": optimizer}, tmp_path)
    good.keep(0)
    start = layer.weight.detach().clone()
    step(layer, optimizer)
    save_checkpoint(tmp_path / "c.pt", 1, {"good": good})
    assert torch.load(tmp_path / "c.pt")["parts"]["good"] == {"step": 0}
    other, its_optimizer = trained()
    torch.nn.init.zeros_(other.weight)
    resumed = LastGood({"layer": other, "optimizer": its_optimizer}, tmp_path)
    load_checkpoint(tmp_path / "c.pt", {"good": resumed})
    assert resumed.restore() == 0
    assert torch.equal(other.weight, start)


def test_killed_between_two_files_a_run_goes_back_to_what_its_checkpoint_names(tmp_path):
    layer, _ = trained()
    good = LastGood({"layer": layer}, tmp_path)
    good.keep(0)
    save_checkpoint(tmp_path / "c.pt", 0, {"good": good})
    start = layer.weight.detach().clone()
    torch.nn.init.ones_(layer.weight)
    good.keep(5)
    (tmp_path / ".last_good_00000010.pt.tmp").write_bytes(b"half")
    # Killed here: the checkpoint is that of update 0.
    resumed = LastGood({"layer": layer}, tmp_path)
    load_checkpoint(tmp_path / "c.pt", {"good": resumed})
    assert resumed.restore() == 0
    assert torch.equal(layer.weight, start)
    resumed.drop_older()
    assert {path.name for path in tmp_path.iterdir()} == {"c.pt", "last_good_00000000.pt"}


def test_one_rank_writes_and_the_others_read(tmp_path):
    mine, _ = trained()
    layer = torch.nn.Linear(3, 2)
    main = LastGood({"layer": mine}, tmp_path)
    other = LastGood({"layer": layer}, tmp_path, write=False)
    other.keep(4)
    assert not any(tmp_path.iterdir())
    main.keep(4)
    other.drop_older()
    assert other.restore() == 4
    assert torch.equal(layer.weight, mine.weight)
    other.keep(8)
    other.drop_older()
    assert [path.name for path in tmp_path.iterdir()] == ["last_good_00000004.pt"]


def test_a_missing_file_is_named(tmp_path):
    layer, _ = trained()
    good = LastGood({"layer": layer}, tmp_path)
    good.keep(3)
    save_checkpoint(tmp_path / "c.pt", 3, {"good": good})
    good.path.unlink()
    with pytest.raises(FileNotFoundError, match=r"last_good_00000003\.pt"):
        good.restore()
    resumed = LastGood({"layer": layer}, tmp_path)
    with pytest.raises(ValueError, match=r"last_good_00000003\.pt is missing"):
        load_checkpoint(tmp_path / "c.pt", {"good": resumed})
    with pytest.raises(RuntimeError, match="call keep"):
        resumed.restore()


def test_the_file_of_another_update_is_refused(tmp_path):
    layer, _ = trained()
    good = LastGood({"layer": layer}, tmp_path)
    good.keep(3)
    save_checkpoint(good.path, 2, {"layer": layer})
    with pytest.raises(ValueError, match=r"\['layer'\] after 3 updates, got \['layer'\] after 2"):
        good.restore()
    save_checkpoint(good.path, 3, {"critic": layer})
    with pytest.raises(ValueError, match=r"got \['critic'\] after 3"):
        good.restore()


def test_there_must_be_something_to_go_back_to(tmp_path):
    with pytest.raises(RuntimeError, match="call keep"):
        LastGood({}, tmp_path).restore()


# --- finiteness ---------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_one_bad_number_anywhere_is_enough(bad):
    good = torch.tensor(1.0), torch.ones(3)
    assert finite_on_all_ranks(*good)
    assert not finite_on_all_ranks(*good, torch.tensor([0.0, bad]))
    assert not finite_on_all_ranks(torch.tensor(bad), *good)


def test_one_synchronisation_whatever_the_number_of_values(monkeypatch):
    calls = []
    to_bool = torch.Tensor.__bool__
    monkeypatch.setattr(torch.Tensor, "__bool__", lambda self: calls.append(1) or to_bool(self))
    for name in ("item", "tolist", "__float__", "__int__"):
        monkeypatch.setattr(torch.Tensor, name, lambda *_: pytest.fail("another synchronisation"))
    assert finite_on_all_ranks(*[torch.ones(5) for _ in range(7)])
    assert len(calls) == 1


def on_rank(rank: int, folder: str) -> None:
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2
    )
    loss = torch.tensor(float("nan") if rank == 1 else 1.0)
    answers = [finite_on_all_ranks(loss), finite_on_all_ranks(torch.tensor(2.0))]
    torch.save(answers, f"{folder}/rank{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_ranks_skip_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    torch.multiprocessing.spawn(on_rank, args=(str(tmp_path),), nprocs=2)
    for rank in range(2):
        assert torch.load(tmp_path / f"rank{rank}.pt") == [False, True]
