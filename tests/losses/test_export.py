"""The ensemble outside eager mode: torch.export, ONNX Runtime, torch.compile, with any batch size."""

import onnxruntime
import pytest
import torch
from compilers import TAKES_OWN_LAYERS
from families import FAMILIES, NEW_TORCH, build, inputs_of
from torch import nn

from lgla_losses import GroupConvExperts, split_backbone

NAMES = ("torchvision-resnet18", "timm-vit_tiny_patch16_224", "transformers-bert")
EXPORTED = [pytest.param(family, id=family.id) for family in FAMILIES if family.id in NAMES]
ONE_FAST = [
    pytest.param(*case.values, id=case.id, marks=[pytest.mark.slow] if case is not EXPORTED[0] else [])
    for case in EXPORTED
]


pytestmark = pytest.mark.skipif(not NEW_TORCH, reason="2.6 exports independent experts of networks alone")


class Ensemble(nn.Module):
    def __init__(self, trunk, experts):
        super().__init__()
        self.trunk, self.experts = trunk, experts

    def forward(self, *inputs):
        return self.experts(self.trunk(*inputs)).ensemble()


def ensemble(family, layout):
    trunk, stage = split_backbone(build(family).eval(), family.at)
    return Ensemble(trunk, GroupConvExperts(stage, 3, 7, reset=False, layout=layout)).eval()


def larger(inputs):
    return tuple(torch.cat([value, value[:2]]) for value in inputs)


@pytest.mark.parametrize("layout", ["grouped", "independent"])
@pytest.mark.parametrize("family", EXPORTED)
def test_the_exported_ensemble_takes_any_batch_size(family, layout):
    network, inputs = ensemble(family, layout), inputs_of(family, torch.float32)
    dynamic = {"inputs": tuple({0: torch.export.Dim.DYNAMIC} for _ in inputs)}
    program = torch.export.export(network, inputs, dynamic_shapes=dynamic)
    for batch in (inputs, larger(inputs)):
        torch.testing.assert_close(program.module()(*batch), network(*batch))


# The exporter's own dependencies deprecate what it uses.
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.slow
@pytest.mark.parametrize("layout", ["grouped", "independent"])
@pytest.mark.parametrize("family", EXPORTED)
def test_onnx_runtime_gives_the_same(family, layout, tmp_path):
    network, inputs = ensemble(family, layout), inputs_of(family, torch.float32)
    dynamic = {"inputs": tuple({0: torch.export.Dim.DYNAMIC} for _ in inputs)}
    program = torch.export.export(network, inputs, dynamic_shapes=dynamic)
    torch.onnx.export(program, dynamo=True, verbose=False).save(tmp_path / "ensemble.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "ensemble.onnx")
    names = [node.name for node in session.get_inputs()]
    for batch in (inputs, larger(inputs)):
        (logits,) = session.run(None, {n: v.numpy() for n, v in zip(names, batch, strict=True)})
        torch.testing.assert_close(torch.from_numpy(logits), network(*batch).detach(), rtol=1e-4, atol=1e-4)


# A break costs no correctness: test_stacking.py compiles grouped experts on older versions as well.
GROUPED = pytest.param(
    "grouped", marks=pytest.mark.skipif(not TAKES_OWN_LAYERS, reason="before 2.12 the graph breaks")
)


@pytest.mark.parametrize("layout", [GROUPED, pytest.param("independent", marks=pytest.mark.slow)])
@pytest.mark.parametrize("family", ONE_FAST)
def test_a_compiled_ensemble_is_one_graph_for_all_batch_sizes(family, layout):
    network, inputs = ensemble(family, layout), inputs_of(family, torch.float32)
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(network, backend=backend, fullgraph=True, dynamic=True)
    for batch in (inputs, larger(inputs)):
        torch.testing.assert_close(compiled(*batch), network(*batch))
    assert len(graphs) == 1
