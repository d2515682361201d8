"""The dependency matrix against brute force: one transformers model per removed part, with hooks."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers

from exporter.analysis import dependency
from exporter.analysis.dependency import Kind, dependency_from_json, measure_dependency
from exporter.dtypes import FLOAT32
from exporter.errors import CheckpointError, OutputError, PlanError
from exporter.graph import Linear, ModelGraph
from exporter.hidden_states import remove_states
from exporter.lazy import LazyTensor, array, full
from exporter.passes.parallelize_blocks import parallelize_blocks
from exporter.read import open_model
from exporter.reference import Reference
from tests.checkpoints import saved_model
from tests.tiny import tiny_graph

LAYERS = 5
FAMILIES = {"llama": ("Llama", {"num_hidden_layers": LAYERS}), "qwen3": ("Qwen3", {"num_hidden_layers": LAYERS})}
DEMO_MODEL = Path(__file__).parents[3] / "demo" / "model"
MODULES: dict[Kind, str] = {"block": "", "attention": "self_attn", "ffn": "mlp"}


@contextlib.contextmanager
def removed(model: transformers.PreTrainedModel, kind: Kind, layer: int) -> Iterator[None]:
    """The model without a part: a block passes its input on, a sublayer adds nothing."""
    module = model.model.layers[layer]

    def skip(_: object, args: tuple, kwargs: dict, output: object) -> object:
        given = args[0] if args else kwargs["hidden_states"]
        if kind == "attention":
            return (torch.zeros_like(output[0]), *output[1:])
        result = given if kind == "block" else torch.zeros_like(given)
        return (result, *output[1:]) if isinstance(output, tuple) else result

    target = module.get_submodule(MODULES[kind])
    handle = target.register_forward_hook(skip, with_kwargs=True)
    yield
    handle.remove()


def contributions(model: transformers.PreTrainedModel, tokens: torch.Tensor) -> tuple[dict, torch.Tensor]:
    """(kind, layer) -> what it adds, and the last hidden state before the final norm."""
    found, handles = {}, []

    def keep(kind: Kind, layer: int):
        def hook(_: object, args: tuple, kwargs: dict, output: object) -> None:
            result = output[0] if isinstance(output, tuple) else output
            given = args[0] if args else kwargs["hidden_states"]
            found[kind, layer] = result - given if kind == "block" else result

        return hook

    for layer, module in enumerate(model.model.layers):
        for kind, name in MODULES.items():
            target = module.get_submodule(name)
            handles.append(target.register_forward_hook(keep(kind, layer), with_kwargs=True))
    last = []
    handles.append(model.model.norm.register_forward_pre_hook(lambda _, args: last.append(args[0])))
    logits = model(tokens).logits
    for handle in handles:
        handle.remove()
    return {**found, "logits": logits}, last[0]


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return (1 - F.cosine_similarity(a.double(), b.double(), dim=-1)).mean().item()


@pytest.mark.parametrize("case", [*FAMILIES, "demo"])
@torch.inference_mode()
def test_everything_equals_brute_force(case: str, tmp_path: Path) -> None:
    if case == "demo":
        folder = DEMO_MODEL
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    else:
        folder, model = tmp_path, saved_model(tmp_path, *FAMILIES[case])
    layers = model.config.num_hidden_layers
    tokens = torch.randint(0, 307, (6, 19), generator=torch.Generator().manual_seed(2))
    graph = open_model(folder, need_weights=True).graph
    measured = measure_dependency(graph, tokens.numpy(), kl=True, batch=4)

    base, last = contributions(model, tokens)
    for kind in MODULES:
        for i in range(layers):
            with removed(model, kind, i):
                variant, variant_last = contributions(model, tokens)
            for j in range(i + 1, layers):
                expected = distance(base[kind, j], variant[kind, j])
                assert measured.matrices[kind][i, j] == pytest.approx(expected, abs=1e-5)
            assert measured.importance[kind][i] == pytest.approx(distance(last, variant_last), abs=1e-5)
            p, q = (F.log_softmax(logits.double(), -1) for logits in (base["logits"], variant["logits"]))
            expected_kl = (p.exp() * (p - q)).sum(-1).mean().item()
            assert measured.kl[kind][i] == pytest.approx(expected_kl, rel=1e-3, abs=1e-5)
        assert np.isnan(measured.matrices[kind][np.tril_indices(layers)]).all()
        assert np.nanmax(measured.matrices[kind]) > 1e-3  # else the tolerance means nothing


@torch.inference_mode()
def test_the_curves_equal_brute_force(tmp_path: Path) -> None:
    model = saved_model(tmp_path, *FAMILIES["llama"])
    tokens = torch.randint(0, 307, (3, 11), generator=torch.Generator().manual_seed(2))
    hidden = list(model(tokens, output_hidden_states=True).hidden_states[:-1])
    hidden.append(contributions(model, tokens)[1])
    measured = measure_dependency(open_model(tmp_path, need_weights=True).graph, tokens.numpy(), importance=False)
    for layer, (x, y) in enumerate(pairwise(hidden)):
        assert measured.distance_of_output[layer] == pytest.approx(distance(x, y), abs=1e-5)
        assert measured.distance_of_contribution[layer] == pytest.approx(distance(x, y - x), abs=1e-5)
        ratio = ((y - x).norm(dim=-1) / x.norm(dim=-1)).mean().item()
        assert measured.relative_contribution[layer] == pytest.approx(ratio, rel=1e-4)


TOKENS = np.arange(40).reshape(4, 10)


@pytest.mark.parametrize("scale", [1e-6, 1e-9, 1e-12])
def test_dependencies_do_not_go_by_the_size_of_contributions(scale: float) -> None:
    graph = tiny_graph("AF AF AF")
    block = graph.flat_blocks[2]
    whole = measure_dependency(graph, TOKENS, importance=False).matrices
    for kind, output in (("attention", "o_proj"), ("ffn", "down_proj")):
        sublayer = getattr(block, kind)
        weight = scale * getattr(sublayer, output).weight.numpy()
        quiet = replace(block, **{kind: replace(sublayer, **{output: Linear(weight=array(weight))})})
        changed = replace(graph, blocks=(*graph.blocks[:2], quiet))
        found = measure_dependency(changed, TOKENS, importance=False).matrices[kind]
        np.testing.assert_allclose(found[:2, 2], whole[kind][:2, 2], rtol=1e-4)


@torch.inference_mode()
def test_zeros_have_no_ratio_and_depend_on_nothing() -> None:
    """Of a token whose embedding is zero, as that of padding is, and of a block whose output matrices are."""
    graph = tiny_graph("AF AF AF")
    embedding = graph.embedding.numpy()
    embedding[5] = 0
    block = graph.flat_blocks[2]
    silent = replace(
        block,
        attention=replace(block.attention, o_proj=Linear(weight=full((64, 64), 0.0, FLOAT32))),
        ffn=replace(block.ffn, down_proj=Linear(weight=full((64, 256), 0.0, FLOAT32))),
    )
    graph = replace(graph, embedding=array(embedding), blocks=(*graph.blocks[:2], silent))
    measured = measure_dependency(graph, TOKENS)
    for layer, (x, y) in enumerate(pairwise(Reference(graph).residuals(torch.from_numpy(TOKENS), None))):
        ratios = (y - x).norm(dim=-1) / x.norm(dim=-1)
        expected = ratios[ratios.isfinite()].mean().item()
        assert measured.relative_contribution[layer] == pytest.approx(expected, rel=1e-4)
    for matrix in measured.matrices.values():
        assert matrix[0, 1] > 1e-3
        assert matrix[0, 2] == matrix[1, 2] == 0
    assert {kind: curve[2] for kind, curve in measured.importance.items()} == dict.fromkeys(dependency.KINDS, 0)
    nothing_but_padding = measure_dependency(graph, np.full((1, 4), 5))
    assert np.isnan(nothing_but_padding.relative_contribution[0])


class Counted(LazyTensor):
    """A tensor that counts the rows read from it."""

    __slots__ = ("count", "source")

    def __init__(self, source: LazyTensor) -> None:
        super().__init__(source.shape, source.dtype)
        self.source, self.count = source, 0

    def rows(self, start: int, stop: int) -> np.ndarray:
        self.count += stop - start
        return self.source.rows(start, stop)


def counted(graph: ModelGraph) -> tuple[ModelGraph, list[list[Counted]]]:
    """The graph with counting FFN weights, and the counters of every block."""
    counters, blocks = [], []
    for block in graph.flat_blocks:
        names = ("gate_proj", "up_proj", "down_proj")
        weights = {name: Counted(getattr(block.ffn, name).weight) for name in names}
        linears = {name: replace(getattr(block.ffn, name), weight=weight) for name, weight in weights.items()}
        blocks.append(replace(block, ffn=replace(block.ffn, **linears)))
        counters.append(list(weights.values()))
    return replace(graph, blocks=tuple(blocks)), counters


@pytest.mark.parametrize(("importance", "passes"), [(True, [1, 1, 1, 1, 1]), (False, [1, 1, 1, 0, 0])])
def test_every_weight_is_read_once(importance: bool, passes: list[int]) -> None:
    graph, counters = counted(tiny_graph("AF AF F AF AF"))
    measure_dependency(graph, TOKENS, blocks=(1, 2), importance=importance)
    assert [[c.count / c.shape[0] for c in block] for block in counters] == [[n] * 3 for n in passes]


def same(one: dependency.Dependency, other: dependency.Dependency) -> None:
    assert one.to_json() == other.to_json()


def test_files_memory_and_batch_give_the_same(tmp_path: Path) -> None:
    graph = tiny_graph("AF F A - LF AF")
    in_memory = measure_dependency(graph, TOKENS, kl=True, batch=4)
    same(in_memory, measure_dependency(graph, TOKENS, kl=True, batch=4, budget_bytes=0))
    same(in_memory, measure_dependency(graph, TOKENS, kl=True, batch=4, work=tmp_path / "work"))
    seen: list[int] = []
    again = measure_dependency(
        graph, TOKENS, kl=True, batch=4, work=tmp_path / "work", progress=lambda done, _: seen.append(done)
    )
    same(in_memory, again)
    assert seen == [6]  # nothing was left to be measured
    remove_states(tmp_path / "work")
    assert list(tmp_path.iterdir()) == []
    one_by_one = measure_dependency(graph, TOKENS, kl=True, batch=1)
    for kind, matrix in in_memory.matrices.items():
        np.testing.assert_allclose(one_by_one.matrices[kind], matrix, atol=1e-6)


def test_logits_are_taken_a_few_tokens_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    graph = tiny_graph("AF F")
    whole = measure_dependency(graph, TOKENS, kl=True)
    sizes, head = [], Reference.head

    def spy(self: Reference, hidden: torch.Tensor) -> torch.Tensor:
        sizes.append(len(hidden))
        return head(self, hidden)

    monkeypatch.setattr(Reference, "head", spy)
    monkeypatch.setattr(dependency, "LOGITS_TOGETHER", 7 * graph.vocab_size)
    pieces = measure_dependency(graph, TOKENS, kl=True)
    assert max(sizes) == 7
    for kind, values in whole.kl.items():
        np.testing.assert_allclose(pieces.kl[kind], values, rtol=1e-5)


def test_a_range_is_the_matching_part_of_the_whole() -> None:
    graph = tiny_graph("AF AF F AF AF")
    whole = measure_dependency(graph, TOKENS, kl=True)
    part = measure_dependency(graph, TOKENS, blocks=(1, 3), importance=False, kl=True)
    for kind in dependency.KINDS:
        np.testing.assert_allclose(part.matrices[kind], whole.matrices[kind][1:4, 1:4], atol=1e-9)
        np.testing.assert_allclose(part.importance[kind], whole.importance[kind][1:4], atol=1e-9)
        np.testing.assert_allclose(part.kl[kind], whole.kl[kind][1:4], atol=1e-9)


@pytest.mark.parametrize("stop", [0, 2])
def test_an_interrupted_measurement_goes_on_where_it_stopped(stop: int, tmp_path: Path) -> None:
    graph = tiny_graph("AF AF F AF")
    undisturbed = measure_dependency(graph, TOKENS)

    def interrupt(done: int, _: int) -> None:
        if done == stop:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measure_dependency(graph, TOKENS, work=tmp_path, progress=interrupt)
    with pytest.raises(OutputError, match="another measurement"):
        measure_dependency(graph, TOKENS + 1, work=tmp_path)
    with pytest.raises(OutputError, match="another measurement"):
        measure_dependency(graph, TOKENS, work=tmp_path, identity={"model": "another"})
    resumed_graph, counters = counted(graph)
    same(undisturbed, measure_dependency(resumed_graph, TOKENS, work=tmp_path))
    assert [block[0].count > 0 for block in counters] == [index >= stop for index in range(4)]


def test_parallel_groups_are_removed_as_one() -> None:
    graph = parallelize_blocks(tiny_graph("AF AF AF AF"), [(1, 2)])
    measured = measure_dependency(graph, TOKENS)
    assert np.isfinite(measured.matrices["block"][1, 2])
    assert np.isnan(measured.matrices["attention"][1, 2])


def test_json_round_trip() -> None:
    measured = measure_dependency(tiny_graph("AF F A"), TOKENS, kl=True)
    back = dependency_from_json(measured.to_json())
    same(measured, back)
    assert (back.first, back.last) == (0, 2)
    for kind in dependency.KINDS:
        np.testing.assert_array_equal(back.matrices[kind], measured.matrices[kind])  # with NaN where JSON has null


def test_a_range_that_is_not_in_the_model_is_refused() -> None:
    with pytest.raises(PlanError, match=r"expected 0 to 1, found \(1, 2\)"):
        measure_dependency(tiny_graph("AF AF"), TOKENS, blocks=(1, 2))


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("model.embed_tokens.weight", "model.embed_tokens.weight: "),
        ("model.layers.3.mlp.up_proj.weight", r"model.layers.3.mlp.up_proj.weight \(block 3\): "),
        ("model.norm.weight", "model.norm.weight: "),
        ("lm_head.weight", "lm_head.weight: "),
    ],
)
def test_a_weight_that_is_not_finite_is_named(name: str, said: str, tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    saved_model(tmp_path, *FAMILIES["llama"])
    weights = load_file(tmp_path / "model.safetensors")
    weights[name].flat[5] = np.nan
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=f"{said}weight is NaN or infinite"):
        measure_dependency(open_model(tmp_path, need_weights=True).graph, TOKENS, kl=True)


def test_logits_beyond_float32_are_refused() -> None:
    graph = tiny_graph("AF AF")
    weight = np.full((graph.vocab_size, 64), 3e38, np.float32)
    with pytest.raises(CheckpointError, match="logits are NaN or infinite, and the weights of the final norm and lm_h"):
        measure_dependency(replace(graph, lm_head=Linear(weight=array(weight))), TOKENS, kl=True)


def test_arrays_in_memory_have_no_name_but_are_found() -> None:
    graph = tiny_graph("AF AF")
    block = graph.flat_blocks[1]
    broken = replace(block.ffn, norm=replace(block.ffn.norm, weight=array(np.full(64, np.inf, np.float32))))
    graph = replace(graph, blocks=(graph.blocks[0], replace(block, ffn=broken)))
    with pytest.raises(CheckpointError, match="block 1: weight is NaN or infinite"):
        measure_dependency(graph, TOKENS)
