"""torch.distributed.checkpoint in one process: its state_dicts and its files."""

from __future__ import annotations

import copy

import pytest
import torch
from cases import assert_same_bits, set_grads, tensors_of
from limited import SCALES, run

import fusedopt
from fusedopt.clip import Percentile, PerTensor, ZScore

dcp = pytest.importorskip("torch.distributed.checkpoint")
dcp_state_dict = pytest.importorskip("torch.distributed.checkpoint.state_dict")

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*torch.distributed is:UserWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]
LIMITS = [Percentile(80, window=5, warmup=3), ZScore(warmup=2), PerTensor(warmup=2)]


def make(limit, *, named=False, backwards=False, cls=fusedopt.FusedAdamW):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 1))
    params = list(model.named_parameters() if named else model.parameters())
    options = {} if limit is None else {"max_grad_norm": limit}
    return model, cls(params[::-1] if backwards else params, lr=0.01, **options)


def trained(limit, **options):
    model, optimizer = make(limit, **options)
    run(optimizer, list(model.parameters()), SCALES[:6])
    return model, optimizer


def go_on_alike(models, optimizers):
    for model, optimizer in zip(models, optimizers):
        run(optimizer, list(model.parameters()), SCALES[6:])
    assert_same_bits(*({**m.state_dict()} for m in models))


@pytest.mark.parametrize("full", [False, True], ids=["plain", "full"])
@pytest.mark.parametrize("backwards", [False, True], ids=["same order", "other order"])
@pytest.mark.parametrize("limit", LIMITS, ids=str)
def test_a_state_dict_has_what_a_limit_has_learned(limit, backwards, full):
    model, optimizer = trained(limit, named=backwards)
    options = dcp_state_dict.StateDictOptions(full_state_dict=full)
    saved = dcp_state_dict.get_optimizer_state_dict(model, optimizer, options=options)
    other, again = make(limit, named=backwards, backwards=backwards)
    other.load_state_dict(model.state_dict())
    dcp_state_dict.set_optimizer_state_dict(other, again, copy.deepcopy(saved), options=options)
    if backwards:
        assert again.param_groups[0]["param_names"] == list(dict(other.named_parameters()))[::-1]
    go_on_alike((model, other), (optimizer, again))


@pytest.mark.parametrize("limit", LIMITS, ids=str)
def test_files_have_what_a_limit_has_learned(limit, tmp_path):
    model, optimizer = trained(limit)
    saved = {"opt": dcp_state_dict.get_optimizer_state_dict(model, optimizer)}
    dcp.save(saved, checkpoint_id=tmp_path)
    other, again = make(limit)
    other.load_state_dict(model.state_dict())
    read = {"opt": dcp_state_dict.get_optimizer_state_dict(other, again)}
    dcp.load(read, checkpoint_id=tmp_path)
    dcp_state_dict.set_optimizer_state_dict(other, again, read["opt"])
    other.load_state_dict(model.state_dict())
    go_on_alike((model, other), (optimizer, again))


def test_files_of_torchs_optimizer_are_read(tmp_path):
    """Which asks that, without a limit that learns, a checkpoint has torch's keys and no others."""
    model, twin = make(None, cls=torch.optim.AdamW)
    set_grads(list(model.parameters()), 0)
    twin.step()
    saved = {"opt": dcp_state_dict.get_optimizer_state_dict(model, twin)}
    dcp.save(saved, checkpoint_id=tmp_path)
    other, optimizer = make(None)
    read = {"opt": dcp_state_dict.get_optimizer_state_dict(other, optimizer)}
    dcp.load(read, checkpoint_id=tmp_path)
    dcp_state_dict.set_optimizer_state_dict(other, optimizer, read["opt"])
    other.load_state_dict(model.state_dict())
    assert_same_bits(tensors_of(optimizer), tensors_of(twin))
    assert read["opt"]["param_groups"][0].keys() == saved["opt"]["param_groups"][0].keys()


def test_torchs_optimizer_reads_ours():
    model, optimizer = trained(ZScore(warmup=2))
    other, twin = make(None, cls=torch.optim.AdamW)
    saved = dcp_state_dict.get_optimizer_state_dict(model, optimizer)
    dcp_state_dict.set_optimizer_state_dict(other, twin, copy.deepcopy(saved))
    other.load_state_dict(model.state_dict())
    assert_same_bits(tensors_of(optimizer), tensors_of(twin))
    set_grads(list(other.parameters()), 0)
    twin.step()
