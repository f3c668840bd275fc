"""convert() changes what executes and nothing else, and says what it did; revert() undoes it."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from ganvas.nn import ConvBNLeakyReLU, FusedSequential, convert, revert


class _Residual(nn.Module):
    """A block written with attributes, and a Sequential inside."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.norm = nn.BatchNorm2d(channels)
        self.body = nn.Sequential(nn.Conv2d(channels, channels, 1), nn.BatchNorm2d(channels), nn.ReLU())

    def forward(self, x):
        return x + self.body(torch.relu(self.norm(self.conv(x))))


class _OwnBatchNorm(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x) + 1


class _OwnSequential(nn.Sequential):
    def forward(self, x):
        return super().forward(x) + 1


def _model() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.LeakyReLU(0.2),
        _Residual(4),
        nn.Sequential(nn.Conv2d(4, 4, 3), nn.Sequential(nn.BatchNorm2d(4), nn.ReLU())),
        nn.Flatten(),
    )


def _reasons(report) -> dict[str, str]:
    return {layer.name: layer.reason for layer in report.skipped}


def test_nested_sequentials_and_the_model_itself_are_converted():
    model = _model()
    report = convert(model)
    assert type(model[2].body) is type(model[3][1]) is FusedSequential
    assert type(model[3]) is nn.Sequential, "nothing to fuse among its own children alone"
    assert type(model) is nn.Sequential, "traced through its blocks"
    assert report.converted == ("", "2", "2.body", "3", "3.1")
    assert [(run.container, run.names) for run in report.fused] == [
        ("", ("0", "1")),
        ("", ("2.conv", "2.norm")),
        ("", ("2.body.0", "2.body.1", "2.body.2")),
        ("", ("3.0", "3.1.0", "3.1.1")),
    ]
    assert report.fused[1].types == ("Conv2d", "BatchNorm2d", "relu")
    assert report.fused[2].types == ("Conv2d", "BatchNorm2d", "ReLU", "add")
    assert report.fused[3].types == ("Conv2d", "BatchNorm2d", "ReLU")
    assert report.proof is None


def test_objects_parameters_keys_and_hooks_stay():
    model, fired = _model(), []
    model[2].body.register_forward_hook(lambda *_: fired.append("body"))
    modules, parameters, keys = list(model.modules()), list(model.parameters()), list(model.state_dict())
    convert(model)
    assert all(a is b for a, b in zip(model.modules(), modules))
    assert all(a is b for a, b in zip(model.parameters(), parameters))
    assert list(model.state_dict()) == keys
    model(torch.randn(2, 3, 8, 8))
    assert fired == ["body"]


def test_a_converted_model_computes_what_it_did():
    model = _model().double()
    plain = copy.deepcopy(model)
    convert(model)
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    assert torch.equal(model(x), plain(x))


def test_converting_twice_changes_nothing_and_reports_the_same():
    model = _model()
    first, classes = convert(model), [type(module) for module in model.modules()]
    second = convert(model)
    assert [type(module) for module in model.modules()] == classes
    assert second.converted == ()
    assert (second.fused, second.skipped) == (first.fused, first.skipped)


def test_a_module_keeps_its_class():
    model = _model()
    convert(model)
    assert type(model[2]) is _Residual


@pytest.mark.parametrize("name", ["1", "2"])
def test_layers_with_hooks_are_skipped_and_the_others_go_on(name):
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.ReLU()
    )
    model.get_submodule(name).register_forward_hook(lambda *_: None)
    report = convert(model)
    kind = type(model.get_submodule(name)).__name__
    assert _reasons(report) == dict.fromkeys("012", f"the run's {kind} has hooks")
    assert [run.names for run in report.fused] == [("3", "4", "5")]


def test_a_convolution_with_hooks_is_called_and_the_norm_behind_it_fused():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
    model[0].register_forward_pre_hook(lambda *_: None)
    report = convert(model)
    assert _reasons(report) == {"0": "has hooks; called as it is"}
    assert [run.names for run in report.fused] == [("1", "2")]


def test_a_sequential_with_nothing_left_to_fuse_is_not_converted():
    model = nn.Sequential(nn.BatchNorm2d(4), nn.ReLU())
    model[0].register_forward_hook(lambda *_: None)
    assert convert(model).converted == ()
    assert type(model) is nn.Sequential


@pytest.mark.parametrize(
    ("norm", "reason"),
    [
        (_OwnBatchNorm(4), "its type is not exactly BatchNorm1d or BatchNorm2d, so its forward may be its own"),
        (nn.SyncBatchNorm(4), "its type is not exactly BatchNorm1d or BatchNorm2d, so its forward may be its own"),
        (nn.LazyBatchNorm2d(), "it is not initialised before its first input: run the model once, then convert"),
        (parametrizations.weight_norm(nn.BatchNorm2d(4), dim=None), "it is parametrized"),
    ],
    ids=["subclass", "SyncBatchNorm", "lazy", "parametrized"],
)
def test_norms_of_other_types_are_skipped_with_the_reason(norm, reason):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), norm, nn.ReLU(), nn.Linear(4, 4), nn.ReLU())
    report = convert(model)
    assert _reasons(report) == {"1": reason}
    assert [run.names for run in report.fused] == [("3", "4")]


def test_a_parametrized_convolution_is_skipped_and_the_norm_behind_it_fused():
    model = nn.Sequential(parametrizations.spectral_norm(nn.Conv2d(3, 4, 3)), nn.BatchNorm2d(4), nn.ReLU())
    report = convert(model, torch.randn(4, 3, 8, 8))
    assert _reasons(report) == {"0": "it is parametrized"}
    assert [run.names for run in report.fused] == [("1", "2")]


def test_a_forward_set_on_the_instance_stays():
    patched = nn.Sequential(nn.BatchNorm2d(4), nn.ReLU())
    patched.forward = lambda x: x
    patched_fused = FusedSequential(nn.BatchNorm2d(4), nn.ReLU())
    patched_fused.forward = lambda x: x
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), patched, patched_fused)
    reasons = _reasons(convert(model, torch.randn(4, 3, 6, 6)))
    assert type(patched) is nn.Sequential
    assert "forward" in patched_fused.__dict__
    assert reasons["2.0"] == "its parent's forward is its own (Sequential)"
    assert reasons["3.0"] == "its parent's forward is its own (FusedSequential)"


def test_a_sequential_with_a_forward_of_its_own_is_traced():
    own = _OwnSequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
    report = convert(own, torch.randn(4, 3, 6, 6))
    assert type(own) is _OwnSequential
    assert [run.names for run in report.fused] == [("0", "1", "2")]


def test_norms_in_a_module_list_belong_to_the_forward_that_calls_them():
    model = nn.ModuleList([nn.BatchNorm2d(4)])
    assert _reasons(convert(model)) == {"0": "its parent's forward is its own (ModuleList)"}


def test_a_shared_sequential_is_converted_once():
    block = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.ReLU())
    report = convert(nn.Sequential(block, block))
    assert report.converted == ("", "0")
    assert [run.names for run in report.fused] == [("0.0", "0.1", "0.2")] * 2


def test_the_report_reads_as_a_table():
    model = _model()
    model[2].norm.register_forward_hook(lambda *_: None)
    text = str(convert(model))
    assert "3 runs fused, 2 layers skipped" in text
    assert "2.body.0, 2.body.1, 2.body.2  Conv2d + BatchNorm2d + ReLU" in text
    assert "skipped: the run's BatchNorm2d has hooks\n  2.conv  Conv2d\n  2.norm  BatchNorm2d" in text


def test_a_model_with_nothing_to_fuse_is_reported_as_such():
    report = convert(nn.Linear(2, 2))
    assert (report.converted, report.fused, report.skipped) == ((), (), ())
    assert str(report) == "0 runs fused, 0 layers skipped"


def test_revert_makes_plain_torch_of_everything():
    model = nn.Sequential(_model(), ConvBNLeakyReLU(4, 4, 1), FusedSequential(nn.ReLU()))
    modules, keys = list(model.modules()), list(model.state_dict())
    plain_classes = [nn.Sequential if isinstance(module, nn.Sequential) else type(module) for module in modules]
    convert(model)
    assert revert(model) is model
    assert all(a is b for a, b in zip(model.modules(), modules))
    assert [type(module) for module in model.modules()] == plain_classes
    assert list(model.state_dict()) == keys


def test_reverting_leaves_no_attribute_behind():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.ReLU())
    attributes = set(model.__dict__)
    convert(model)
    model(torch.randn(3, 4))
    revert(model)
    assert set(model.__dict__) == attributes


def test_a_fused_subclass_with_a_forward_of_its_own_stays():
    class Own(FusedSequential):
        def forward(self, x):
            return super().forward(x) + 1

    model = Own(nn.Linear(4, 4), nn.ReLU())
    assert type(revert(model)) is Own
    assert _reasons(convert(model)) == dict.fromkeys("01", "its parent's forward is its own (Own)")


@pytest.mark.parametrize("function", [convert, revert])
def test_something_that_is_no_module_is_refused(function):
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module; got list"):
        function([nn.ReLU()])
