"""Constructors: torch's checks, our checks, and the signatures."""

from __future__ import annotations

import inspect
import math
import re

import pytest
import torch
from cases import CLASSES

import fusedopt
from fusedopt.core import backends

OURS = ("max_grad_norm", "nonfinite", "backend")


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        *[("max_grad_norm", value, ValueError) for value in (0, 0.0, -1, math.nan, -math.inf)],
        *[("max_grad_norm", value, TypeError) for value in ("1", True, [1.0], 1j)],
        *[("nonfinite", value, ValueError) for value in ("", "Skip", "ignore", True, 0, [])],
    ],
    ids=str,
)
def test_bad_arguments_of_ours(name, value, error):
    optimizer = fusedopt.FusedAdam([torch.zeros(1)], max_grad_norm=2.0, nonfinite="raise")
    with pytest.raises(error, match=f"{name}.*expected"):
        fusedopt.FusedAdam([torch.zeros(1)], **{name: value})
    before = getattr(optimizer, name)
    with pytest.raises(error, match=f"{name}.*expected"):
        setattr(optimizer, name, value)
    assert getattr(optimizer, name) == before


@pytest.mark.parametrize("value", ["", "CPU", "mps", torch.device("cpu"), False, ["cpu"]], ids=str)
def test_bad_backend(value):
    with pytest.raises(
        ValueError, match=r"Invalid backend value.*'cuda', 'cpu', 'reference' or None"
    ):
        fusedopt.FusedAdam([torch.zeros(1)], backend=value)


def test_backend_that_is_not_there():
    if (reason := backends.why_missing("cuda")) is None:
        pytest.skip("CUDA is there")
    with pytest.raises(RuntimeError, match=re.escape(reason)):
        fusedopt.FusedAdam([torch.zeros(1)], backend="cuda")


BAD_FOR_TORCH = [
    {"lr": -1},
    {"lr": math.nan},
    {"eps": -1e-8},
    {"weight_decay": -0.1},
    {"betas": (1.0, 0.9)},
    {"betas": (0.9, -0.1)},
    {"betas": (0.9, 1.0)},
    {"alpha": -0.1},
    {"momentum": -0.5},
    {"lr": torch.tensor(0.1), "foreach": True},
    {"lr": torch.tensor([0.1, 0.2])},
    {"betas": (torch.tensor(0.9), torch.tensor(0.99)), "foreach": True},
    {"betas": (torch.tensor(0.9), 0.99)},
    {"betas": (0.9, torch.tensor([0.9, 0.99]))},
    {"fused": True, "foreach": True},
    {"decoupled_weight_decay": True},
    {"fused": True},
    {"nesterov": True},
    {"nesterov": True, "momentum": 0.9, "dampening": 0.5},
    {"momentum_decay": -0.1},
]


def outcome_of(make):
    try:
        make()
    except Exception as error:
        return type(error), str(error)
    return None


@pytest.mark.parametrize("kwargs", BAD_FOR_TORCH, ids=str)
@pytest.mark.parametrize("case", CLASSES, ids=str)
def test_arguments_are_refused_as_torch_refuses_them(case, kwargs):
    expected = outcome_of(lambda: case.twin([torch.zeros(1)], **kwargs))
    actual = outcome_of(lambda: case.cls([torch.zeros(1)], **kwargs))
    if expected is not None:
        expected = (
            expected[0],
            expected[1].replace(case.twin.__init__.__qualname__, case.cls.__init__.__qualname__),
        )
    assert actual == expected


@pytest.mark.parametrize("case", CLASSES, ids=str)
def test_differentiable(case):
    with pytest.raises(RuntimeError, match="differentiable=True is not supported"):
        case.cls([torch.zeros(1)], differentiable=True)
    optimizer = case.cls([torch.zeros(1)])
    optimizer.param_groups[0]["differentiable"] = True
    with pytest.raises(RuntimeError, match="differentiable=True is not supported"):
        optimizer.step()


@pytest.mark.parametrize("params", [[], torch.zeros(3), [[torch.zeros(1)]], [3.0]], ids=str)
def test_parameters_are_refused_as_torch_refuses_them(params):
    expected = outcome_of(lambda: torch.optim.Adam(params))
    assert expected is not None and outcome_of(lambda: fusedopt.FusedAdam(params)) == expected


@pytest.mark.parametrize("case", CLASSES, ids=str)
def test_signature_is_that_of_torch_and_ours(case):
    actual = dict(inspect.signature(case.cls).parameters)
    ours = {name: actual.pop(name) for name in OURS}
    twin = inspect.signature(case.twin).parameters
    assert list(actual)[: len(twin)] == list(twin)
    for name, parameter in twin.items():
        assert (actual[name].default, actual[name].kind) == (parameter.default, parameter.kind), (
            name
        )
    for parameter in ours.values():
        assert (parameter.default, parameter.kind) == (None, inspect.Parameter.KEYWORD_ONLY)


@pytest.mark.parametrize("case", CLASSES, ids=str)
def test_docstring_explains_every_argument(case):
    text = inspect.getdoc(case.cls)
    assert text is not None
    args = text[text.index("Args:") :]
    explained = re.findall(r"^    ([a-z0-9_, ]+):", args, re.MULTILINE)
    names = [name for line in explained for name in line.split(", ")]
    assert sorted(names) == sorted(inspect.signature(case.cls).parameters)


LIMITS = [
    ("fusedopt.clip.Percentile", {"percentile": 90}, fusedopt.clip.Percentile(90)),
    ("fusedopt.clip.ZScore", {"warmup": 3}, fusedopt.clip.ZScore(warmup=3)),
    ("fusedopt.clip.PerTensor", {}, fusedopt.clip.PerTensor()),
    ("fusedopt.clip.Unit", {"max_norm": 2.0}, fusedopt.clip.Unit(max_norm=2.0)),
]


@pytest.mark.parametrize(("path", "options", "limit"), LIMITS, ids=str)
@pytest.mark.parametrize("case", CLASSES, ids=str)
def test_limits_on_a_command_line(case, path, options, limit):
    """LightningCLI reads configurations with jsonargparse."""
    jsonargparse = pytest.importorskip("jsonargparse")
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(case.cls, "optimizer", skip={"params"})
    arguments = [f"--optimizer.max_grad_norm={path}"] + [
        f"--optimizer.max_grad_norm.init_args.{name}={value}" for name, value in options.items()
    ]
    parsed = parser.parse_args(arguments).optimizer.max_grad_norm
    assert parsed.class_path == path
    assert type(limit)(**vars(parsed.init_args)) == limit
    for value, expected in (("0.5", 0.5), ("null", None)):
        parsed = parser.parse_args([f"--optimizer.max_grad_norm={value}"])
        assert parsed.optimizer.max_grad_norm == expected


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"lr": "1e-3"}, "lr is '1e-3'; expected one number"),  # as YAML reads it
        ({"lr": None}, "lr is None; expected one number"),
        ({"weight_decay": 1j}, r"weight_decay is 1j; expected one number"),
        ({"eps": [1e-8]}, r"eps is \[1e-08\]; expected one number"),
        ({"betas": 0.9}, "betas is 0.9; expected 2 numbers"),
        ({"betas": (0.9, "0.99")}, r"betas is \(0.9, '0.99'\); expected 2 numbers"),
    ],
    ids=str,
)
def test_options_that_are_no_numbers_are_refused_by_name(options, told):
    with pytest.raises((TypeError, ValueError), match=f"^{told}$"):
        fusedopt.FusedAdamW([torch.zeros(1)], **options)
