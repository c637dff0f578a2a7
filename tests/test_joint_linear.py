"""The small projections of a layer are one product, but where somebody stands before their calls."""

from unittest import mock

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.utils import parametrizations, prune, weight_norm

from lact_kernels.layers import joint_linear as joint
from lact_kernels.layers.joint_linear import can_be_joined, joint_linear
from tests.lact_layer_cases import gradients, make_layer
from tests.ranks import Ranks, mesh_of


class Quantised(torch.Tensor):
    """Stands for a weight that knows no other operation than products."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is torch.cat:
            raise NotImplementedError("cat of a quantised weight")
        return super().__torch_function__(func, types, args, kwargs)


def quantised(linear: nn.Linear) -> nn.Linear:
    linear.weight = nn.Parameter(linear.weight.detach().as_subclass(Quantised))
    return linear


class LoRA(nn.Module):
    def __init__(self, base: nn.Linear):
        super().__init__()
        self.base_layer, self.lora_A = base, nn.Linear(base.in_features, 2, bias=False)
        self.lora_B = nn.Linear(2, base.out_features, bias=False)

    def forward(self, x):
        return self.base_layer(x) + self.lora_B(self.lora_A(x))


class Doubling(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def with_a_forward_of_its_own(linear: nn.Linear) -> nn.Linear:
    forward = linear.forward
    linear.forward = lambda x: 2 * forward(x)
    return linear


def hooked(register: str, *hook):
    def change(linear: nn.Linear) -> nn.Linear:
        getattr(linear, register)(*hook)
        return linear

    return change


CHANGES = {
    "pre-hook": hooked("register_forward_pre_hook", lambda _, inputs: (2 * inputs[0],)),
    "hook": hooked("register_forward_hook", lambda _, inputs, output: 2 * output),
    "backward pre-hook": hooked("register_full_backward_pre_hook", lambda _, grads: None),
    "backward hook": hooked("register_full_backward_hook", lambda *_: None),
    "weight norm": weight_norm,
    "parametrised": parametrizations.weight_norm,
    "pruned": lambda linear: prune.l1_unstructured(linear, "weight", amount=3),
    "LoRA": LoRA,
    "subclass": lambda linear: Doubling(8, 3),
    "own forward": with_a_forward_of_its_own,
    "quantised": quantised,
    "no bias": lambda linear: nn.Linear(8, 3, bias=False),
}


def linears() -> list[nn.Module]:
    return [nn.Linear(8, channels) for channels in (6, 3, 2)]


def results(x, modules, outputs):
    leaves = [x, *(p for module in modules for p in module.parameters() if p.requires_grad)]
    return [*outputs, *torch.autograd.grad(sum(y.square().sum() for y in outputs), leaves)]


def test_joined_products_are_those_of_the_modules():
    x, modules = torch.randn(2, 5, 8, requires_grad=True), linears()
    assert can_be_joined(tuple(modules))
    with mock.patch.object(nn.Linear, "forward", side_effect=AssertionError("was called")):
        joined = results(x, modules, joint_linear(x, *modules))
    for a, b in zip(joined, results(x, modules, [m(x) for m in modules]), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated:FutureWarning")
@pytest.mark.parametrize("place", [0, 1, 2])
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_who_stands_before_a_call_is_not_passed_by(change, place):
    x, modules = torch.randn(2, 5, 8, requires_grad=True), linears()
    modules[place] = change(nn.Linear(8, 3))
    assert not can_be_joined(tuple(modules))
    actual = results(x, modules, joint_linear(x, *modules))
    expected = results(x, modules, [m(x) for m in modules])
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


@pytest.mark.parametrize(
    "register", ["forward_pre", "forward", "full_backward_pre", "full_backward"]
)
def test_hooks_of_all_modules_see_each_call(register):
    x, modules, seen = torch.randn(2, 5, 8, requires_grad=True), linears(), []
    name = f"register_module_{register}_hook"
    handle = getattr(nn.modules.module, name)(lambda module, *_: seen.append(module))
    try:
        results(x, modules, joint_linear(x, *modules))
    finally:
        handle.remove()
    assert {id(m) for m in seen} == {id(m) for m in modules}
    assert can_be_joined(tuple(modules))


def test_what_has_no_joint_product():
    one, two, three = linears()
    assert not can_be_joined((one,))
    assert not can_be_joined((one, two, three.double()))
    assert not can_be_joined((one, two, nn.Linear(8, 2, device="meta")))
    with pytest.raises(RuntimeError, match="dtype"):  # of the module that does not fit, as ever
        joint_linear(torch.randn(1, 5, 8), one, two, three)


def test_hooks_of_a_layers_projections():
    """Each sees its input and changes what the layer gives; without them nothing is called."""
    layer, x = make_layer("paper"), torch.randn(1, 20, 32, dtype=torch.float64)
    y, seen = layer(x), []
    names = ("lr_proj", "momentum_proj.0", "ttt_scale_proj")
    for name in names:
        module = layer.get_submodule(name)
        hooks = [
            module.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0])),
            module.register_forward_hook(lambda _, inputs, output: output + 1),
        ]
        assert (layer(x) - y).abs().max() > 1e-4
        for hook in hooks:
            hook.remove()
        assert torch.equal(layer(x), y)
    assert len(seen) == 3 and all(torch.equal(given, x) for given in seen)


def test_an_adapter_in_place_of_a_projection():
    """As peft has it: of the parameters it adds each gets its gradient, and the layer follows them."""
    layer, x = make_layer("paper", torch.float32), torch.randn(1, 20, 32)
    y = layer(x)
    layer.lr_proj = LoRA(layer.lr_proj)
    assert (layer(x) - y).abs().max() > 1e-4
    layer(x).square().sum().backward()
    assert layer.lr_proj.lora_A.weight.grad.any() and layer.lr_proj.lora_B.weight.grad.any()
    nn.init.zeros_(layer.lr_proj.lora_B.weight)
    torch.testing.assert_close(layer(x), y)


def test_a_compiled_layer_joins_them_too():
    layer, x = make_layer("paper"), torch.randn(2, 20, 32, dtype=torch.float64)
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph

    compiled = torch.compile(layer, backend=backend, fullgraph=True)
    torch.testing.assert_close(compiled(x), layer(x))
    (graph,) = graphs
    products = [
        n for n in graph.graph.nodes if n.target in (torch._C._nn.linear, nn.functional.linear)
    ]
    assert len(products) == 3  # qkv, the three as one, o_proj


def sharded_layer_equals_one_process(parts: tuple[str, ...], joined: bool):
    torch.manual_seed(0)
    mesh = mesh_of(2)
    plain, ours = make_layer("paper"), make_layer("paper")
    ours.load_state_dict(plain.state_dict())
    for part in parts:
        fully_shard(ours.get_submodule(part), mesh=mesh)
    fully_shard(ours, mesh=mesh)
    x = torch.randn(1, 20, 32, dtype=torch.float64, requires_grad=True)
    answers = []

    def asked(modules):
        answers.append(can_be_joined(modules))
        return answers[-1]

    with mock.patch.object(joint, "can_be_joined", asked):
        y = ours(x)
    assert answers == [joined]
    y.square().sum().backward()
    expected = plain(x)
    torch.testing.assert_close(y, expected)
    wanted = gradients(plain, x, expected, 2 * expected.detach())
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad.full_tensor(), wanted[name])


@pytest.mark.parametrize(
    "parts, joined",
    [((), True), (("lr_proj",), False), (("qkv", "momentum_proj.0"), False)],
    ids=str,
)
def test_fully_sharded(ranks: Ranks, parts, joined):
    ranks.run(sharded_layer_equals_one_process, parts, joined)
