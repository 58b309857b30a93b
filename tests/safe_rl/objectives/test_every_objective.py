"""What holds for every objective."""

import copy
import pickle

import pytest
import torch
from tensordict import TensorDict, lazy_stack
from torch.testing import assert_close

from safe_ops import kl_surrogate_token
from safe_rl import (
    ClippedPolicyLoss,
    GatedKLLoss,
    PPOLoss,
    SAFELoss,
    SoftMinValueLoss,
    TokenKLLoss,
    total_loss,
)
from tests.safe_rl.objectives.batches import LENGTHS, TinyNetwork, make_batch

OBJECTIVES = {
    "clipped_policy": ClippedPolicyLoss,
    "soft_min_value": SoftMinValueLoss,
    "soft_min_value clipped": lambda network=None, **k: SoftMinValueLoss(network, clip=0.2, **k),
    "gated_kl": GatedKLLoss,
    "gated_kl per token": lambda network=None, **k: GatedKLLoss(
        network, surrogate=kl_surrogate_token, **k
    ),
    "token_kl": TokenKLLoss,
    "ppo": PPOLoss,
    "ppo clipped": lambda network=None, **k: PPOLoss(network, value_clip=0.2, **k),
    "safe": SAFELoss,
    "safe with all": lambda network=None, **k: SAFELoss(
        network, value_clip=0.2, token_kl_coef=0.3, **k
    ),
}
every = pytest.mark.parametrize("make", OBJECTIVES.values(), ids=OBJECTIVES)
FRESH = ("log_prob", "entropy", "state_values")


def read_by(loss, batch: TensorDict) -> TensorDict:
    return batch.select(*loss.in_keys, strict=False)


@every
def test_in_keys_are_enough_and_out_keys_are_exact(make):
    loss = make()
    result = loss(read_by(loss, make_batch()))
    assert list(result.keys()) == loss.out_keys
    assert all(value.shape == () for value in result.values())
    assert_close(result.to_dict(), loss(make_batch()).to_dict(), rtol=0, atol=0)


@every
def test_a_missing_key_is_named(make):
    loss = make()
    for key in loss.in_keys:
        if key in loss.may_read:
            assert loss(make_batch().exclude(key)).keys() == loss(make_batch()).keys()
            continue
        with pytest.raises(ValueError, match=f"batch must hold '{key}'"):
            loss(make_batch().exclude(key))


@every
def test_shapes_that_disagree_are_shown(make):
    loss = make()
    for key in loss.in_keys:
        if key in ("response_mask", "response_tokens_mean"):
            continue
        batch = make_batch()
        batch[key] = torch.zeros(len(LENGTHS), 3)
        with pytest.raises(ValueError, match=rf"'{key}' must .*\(4, 3\).*\(4, 5\)"):
            loss(batch)


@every
def test_a_mask_must_be_bool(make):
    batch = make_batch()
    batch["response_mask"] = batch["response_mask"].float()
    with pytest.raises(ValueError, match="must be bool"):
        make()(batch)


@every
def test_dispatch_takes_tensors(make):
    loss, batch = make(), make_batch()
    values = loss(**{key: batch[key] for key in loss.in_keys})
    values = values if isinstance(values, tuple) else (values,)
    for value, expected in zip(values, loss(batch).values(), strict=True):
        assert_close(value, expected, rtol=0, atol=0)


@every
def test_set_keys_reads_elsewhere(make):
    loss = make()
    expected = loss(make_batch())
    moved = make_batch()
    for name in vars(loss.tensor_keys):
        if name in set(moved.keys()):
            loss.set_keys(**{name: ("elsewhere", name)})
            moved.rename_key_(name, ("elsewhere", name))
    assert all(key[0] == "elsewhere" for key in loss.in_keys)
    assert_close(loss(moved).to_dict(), expected.to_dict(), rtol=0, atol=0)


@every
def test_a_misspelt_key_or_argument_is_refused(make):
    with pytest.raises(ValueError, match="is not an accepted tensordict key"):
        make().set_keys(log_probs="x")
    with pytest.raises(TypeError, match="unexpected keyword"):
        make(entropy_coeff=0.1)


@every
def test_twice_the_same_and_the_batch_is_left_alone(make):
    network = TinyNetwork()
    loss, batch = make(network), make_batch(fresh=False)
    before = batch.clone()
    first, second = loss(batch), loss(batch)
    assert network.calls == 2
    assert_close(first.to_dict(), second.to_dict(), rtol=0, atol=0)
    assert set(batch.keys(True, True)) == set(before.keys(True, True))
    assert (batch == before).all()


@every
@pytest.mark.parametrize("functional", [False, True])
def test_a_network_gives_what_its_keys_in_the_batch_give(make, functional):
    batch, network = make_batch(fresh=False), TinyNetwork()
    result = make(network, functional=functional)(batch)
    assert_close(result.to_dict(), make()(network(batch.copy())).to_dict(), rtol=0, atol=0)


@every
@pytest.mark.parametrize("functional", [False, True])
def test_gradients_reach_the_parameters_that_the_loss_is_about(make, functional):
    network = TinyNetwork()
    loss = make(network, functional=functional)
    assert loss.functional is functional
    total_loss(loss(make_batch(fresh=False))).backward()
    grads = {name.split(".")[-1]: p.grad for name, p in loss.named_parameters()}
    policy = "log_prob" in loss.fresh
    critic = "state_values" in loss.fresh
    assert (grads["logits"] is not None and bool(grads["logits"].any())) is policy
    assert (grads["values"] is not None and bool(grads["values"].any())) is critic


@every
def test_only_losses_have_gradients_and_only_to_fresh_keys(make):
    batch = make_batch()
    floats = [k for k in batch.keys(True, True) if batch[k].is_floating_point()]
    for key in floats:
        batch[key] = batch[key].clone().requires_grad_()
    loss = make()
    result = loss(batch)
    assert all(value.requires_grad == k.startswith("loss_") for k, value in result.items())
    total_loss(result).backward()
    assert {key for key in floats if batch[key].grad is not None} <= {*loss.fresh}


@every
@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf])
def test_padding_may_hold_anything(make, poison):
    clean, dirty = make_batch(), make_batch()
    padding = ~dirty["response_mask"]
    for key in set(dirty.keys()):
        if key in ("tokens", "response_mask", "response_tokens_mean"):
            continue
        if dirty[key].ndim == 1:
            dirty[key] = dirty[key].unsqueeze(-1).repeat(1, padding.shape[1])
        dirty[key] = dirty[key].clone()
        dirty[key][padding] = poison
    results, grads = [], []
    for batch in (clean, dirty):
        leaves = [batch[key].clone().requires_grad_() for key in FRESH]
        for key, leaf in zip(FRESH, leaves, strict=True):
            batch[key] = leaf
        result = make()(batch)
        results.append(result.detach().to_dict())
        grads.append(torch.autograd.grad(total_loss(result), leaves, materialize_grads=True))
    assert_close(results[1], results[0], rtol=0, atol=0)
    for got, expected in zip(grads[1], grads[0], strict=True):
        assert_close(got, expected, rtol=0, atol=0)
        assert not got[padding].any()


@every
@pytest.mark.parametrize("rows", [1, 2])
def test_shards_and_accumulation_equal_the_full_batch(make, rows):
    batch = make_batch(fresh=False)
    whole, parts = TinyNetwork(), TinyNetwork()
    full = total_loss(make(whole)(batch))
    full.backward()
    pieces = batch.split(rows)
    summed = 0.0
    for piece in pieces:
        share = total_loss(make(parts)(piece)) / len(pieces)
        share.backward()
        summed += share.detach()
    assert_close(summed, full.detach(), rtol=0, atol=1e-12)
    for got, expected in zip(parts.parameters(), whole.parameters(), strict=True):
        got, expected = got.grad, expected.grad
        assert (got is None) == (expected is None)
        if got is not None:
            assert_close(got, expected, rtol=0, atol=1e-12)


@every
def test_without_the_rollouts_count_the_batch_counts_itself(make):
    loss, batch = make(), make_batch()
    expected = loss(batch)
    assert_close(loss(batch.exclude("response_tokens_mean")).to_dict(), expected.to_dict())
    batch["response_tokens_mean"] = 2 * batch["response_tokens_mean"]
    assert_close(total_loss(loss(batch)), total_loss(expected) / 2)


@every
def test_one_number_of_tokens_is_that_of_a_row(make):
    batch = make_batch()
    expected = make()(batch).to_dict()
    loose = {key: value for key, value in batch.items() if key != "tokens"}
    loose["response_tokens_mean"] = loose["response_tokens_mean"][0]
    assert_close(make()(TensorDict(loose, [])).to_dict(), expected)


@every
def test_torchrls_masks_count_too(make):
    batch = make_batch()
    first = torch.tensor([True, False, False, True]).unsqueeze(-1).expand(4, 5)
    expected = make_batch()
    expected["response_mask"] = expected["response_mask"] & first
    expected, unmasked = make()(expected), make()(batch)
    batch["collector", "mask"] = first.unsqueeze(-1)
    loss = make()
    assert_close(loss(batch).to_dict(), expected.to_dict(), rtol=0, atol=0)
    loss.loss_mask_key = None
    assert_close(loss(batch).to_dict(), unmasked.to_dict(), rtol=0, atol=0)


@every
def test_an_empty_batch_of_padding_costs_nothing(make):
    batch = make_batch()
    batch["response_mask"] = torch.zeros_like(batch["response_mask"])
    for given in (batch, batch.exclude("response_tokens_mean")):
        result = make()(given)
        assert all(torch.isfinite(value) for value in result.values())
        assert total_loss(result) == 0


@every
def test_a_response_of_no_tokens_counts_nothing(make):
    """As a row of its own: the sums stay, and only the mean over rows would know of it."""
    batch = make_batch()
    batch["response_mask"][2] = False
    kept = batch[torch.tensor([0, 1, 3])]
    for given in (batch, kept):
        given.pop("response_tokens_mean")
    found, expected = make()(batch), make()(kept)
    assert all(torch.isfinite(value) for value in found.values())
    assert_close(found.to_dict(), expected.to_dict())


@every
def test_reductions(make):
    batch = make_batch()
    mask = batch["response_mask"]
    mean, summed, each = (make(reduction=how)(batch) for how in ("mean", "sum", "none"))
    losses = [key for key in mean.keys() if key.startswith("loss_")]  # noqa: SIM118
    for key in losses:
        assert each[key].shape == mask.shape
        assert not each[key][~mask].any()
        assert_close(each[key].sum(), summed[key])
        assert_close(summed[key] / mask.sum(), mean[key])
    assert_close(summed.exclude(*losses).to_dict(), mean.exclude(*losses).to_dict())
    later = make()
    later.reduction = "none"
    assert_close(later(batch).to_dict(), each.to_dict())
    with pytest.raises(ValueError, match="reduction must be 'mean', 'sum' or 'none', got 'avg'"):
        make(reduction="avg")


@every
def test_out_keys_can_be_selected(make):
    loss = make()
    first = loss.out_keys[0]
    expected = loss(make_batch())[first]
    loss.select_out_keys(first)
    assert list(loss(make_batch()).keys()) == [first]
    assert_close(loss(**{key: make_batch()[key] for key in loss.in_keys}), expected)


STEP_ENTRIES = ("log_prob", "old_log_prob", "ref_log_prob", "entropy", "advantage", "value_target")


def flat(batch: TensorDict) -> TensorDict:
    """The tokens that count, as frames [N] of an environment, without a mask."""
    mask = batch["response_mask"]
    frames = {key: batch[key][mask] for key in (*STEP_ENTRIES, "state_values", "old_state_values")}
    frames["kl_baseline"] = batch["kl_baseline"][mask]
    for key in ("kl_coef", "kl_threshold", "entropy_gate"):
        frames[key] = batch[key][0].expand(int(mask.sum()))
    return TensorDict(frames, [int(mask.sum())])


@every
def test_frames_need_no_mask(make):
    loss, batch = make(), make_batch().exclude("response_tokens_mean")
    sequences = [part for part in (loss, *loss.modules()) if getattr(part, "surrogate", None)]
    if any(part.surrogate is not kl_surrogate_token for part in sequences):
        with pytest.raises(ValueError, match=r"must be \[B, T\], got \(13,\).*kl_surrogate_token"):
            loss(flat(batch))
        for part in sequences:
            part.surrogate = kl_surrogate_token
    assert_close(loss(flat(batch)).to_dict(), loss(batch).to_dict())
    steps = TensorDict({key: torch.stack([v, v]) for key, v in flat(batch).items()}, [2, 13])
    assert_close(loss(steps).to_dict(), loss(batch).to_dict())


def ragged(batch: TensorDict) -> TensorDict:
    """Row by row, each as long as it is: what collectors of language models stack lazily."""
    rows = []
    for row, length in zip(batch.unbind(0), LENGTHS, strict=True):
        cut = {
            key: value[:length] if value.ndim and value.shape[0] == 5 else value
            for key, value in row.items()
            if key != "tokens"
        }
        rows.append(TensorDict(cut, []))
    return lazy_stack(rows)


@every
def test_lazily_stacked_ragged_batches(make):
    loss, batch = make(), make_batch()
    expected = loss(batch).to_dict()
    assert_close(loss(ragged(batch)).to_dict(), expected)
    one = lazy_stack([row.unsqueeze(0) for row in ragged(batch).unbind(0)])
    assert one.batch_size == (4, 1)
    assert_close(loss(one).to_dict(), expected)
    moved = ragged(batch)
    for name in vars(loss.tensor_keys):
        if moved.get(name, None, as_list=True) is not None:
            moved.rename_key_(name, ("elsewhere", name))
            loss.set_keys(**{name: ("elsewhere", name)})
    assert_close(loss(moved).to_dict(), expected)


@every
def test_a_ragged_batch_with_an_empty_response(make):
    loss, batch = make(), make_batch()
    batch["response_mask"][1] = False
    batch.pop("response_tokens_mean")
    rows = list(ragged(batch).unbind(0))
    rows[1] = TensorDict(
        {key: value[:0] if value.ndim else value for key, value in rows[1].items()}, []
    )
    assert_close(loss(lazy_stack(rows)).to_dict(), loss(batch).to_dict())


@every
def test_trajectories_as_batch_dimensions_need_no_mask(make):
    """Environments' trajectories of unequal length: [T] each, so the lengths say what counts."""
    loss, batch = make(), make_batch().exclude("response_tokens_mean")
    rows = []
    for row in ragged(batch).unbind(0):
        length = int(row["response_mask"].sum())
        steps = {key: v if v.ndim else v.expand(length) for key, v in row.items()}
        rows.append(TensorDict(steps, [length]).exclude("response_mask"))
    assert_close(loss(lazy_stack(rows)).to_dict(), loss(batch).to_dict())


@every
def test_bf16_is_computed_in_float32(make):
    half = make_batch(dtype=torch.bfloat16)
    widened = make_batch(dtype=torch.bfloat16)
    for key in set(widened.keys()):
        if key != "tokens" and widened[key].is_floating_point():
            widened[key] = widened[key].float()
    result = make()(half)
    assert all(value.dtype == torch.float32 for value in result.values())
    assert_close(result.to_dict(), make()(widened).to_dict(), rtol=0, atol=0)


@every
def test_float64_stays(make):
    assert all(value.dtype == torch.float64 for value in make()(make_batch()).values())


@every
def test_state_dict_holds_the_network_once_and_the_coefficients(make):
    loss = make(TinyNetwork())
    names = list(loss.state_dict())
    assert sum(name.endswith("logits") for name in names) == 1
    other = make(TinyNetwork())
    with torch.no_grad():
        other.network.logits.zero_()
    other.load_state_dict(loss.state_dict())
    batch = make_batch(fresh=False)
    assert_close(other(batch).to_dict(), loss(batch).to_dict(), rtol=0, atol=0)


@every
def test_copies_and_pickles(make):
    loss, batch = make(), make_batch()
    for twin in (copy.deepcopy(loss), pickle.loads(pickle.dumps(loss))):
        assert_close(twin(batch).to_dict(), loss(batch).to_dict(), rtol=0, atol=0)


@every
def test_torchrls_layout_with_a_dimension_of_one(make):
    """TorchRL's collectors of language models give batches [B, 1]."""
    batch = make_batch()
    expected = make()(batch).to_dict()
    nested = TensorDict({k: v.unsqueeze(1) for k, v in batch.items() if k != "tokens"}, [4, 1])
    assert_close(make()(nested).to_dict(), expected)


@every
def test_a_network_must_write_what_the_loss_reads(make):
    network = TinyNetwork()
    loss = make(network)
    name = loss.fresh[0]
    loss.set_keys(**{name: "other"})
    with pytest.raises(ValueError, match=rf"network must write 'other'.*set_keys\({name}="):
        loss(make_batch(fresh=False))


@every
def test_one_graph_under_compile(make):
    torch._dynamo.reset()
    loss, graphs = make(), []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(loss, fullgraph=True, backend=backend)
    for scale in (1.0, 2.0, 3.0):
        batch = make_batch(dtype=torch.float32)
        for key in ("kl_coef", "kl_threshold", "response_tokens_mean"):
            batch[key] = scale * batch[key]
        leaves = [batch[key].requires_grad_() for key in FRESH]
        given = read_by(loss, batch)
        results = [compiled(given), loss(given)]
        assert_close(results[0].to_dict(), results[1].to_dict())
        gradients = [
            torch.autograd.grad(total_loss(result), leaves, materialize_grads=True)
            for result in results
        ]
        assert_close(*gradients)
    assert len(graphs) == 1
