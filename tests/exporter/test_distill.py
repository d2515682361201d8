"""Distillation: the module against the reference, losses against formulas, training against plain PyTorch."""

from __future__ import annotations

import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers

from exporter.distill import (
    Settings,
    distill,
    learning_rate,
    matching_blocks,
    steps_of,
    window_order,
)
from exporter.distill_model import Decoder, DistillError, load_weights, named_tensors, with_tensors
from exporter.errors import CheckpointError, FuselageError, OutputError
from exporter.graph import ModelGraph
from exporter.lazy import array, full
from exporter.passes.drop_attention import drop_attention
from exporter.passes.fuse_ffn import fuse_ffn
from exporter.passes.quantize_linears import quantize_linears
from exporter.quantization import QuantizationRecipe
from exporter.read import open_model
from exporter.reference import Reference, apply_linear
from tests.checkpoints import saved_model
from tests.tiny import quantized_graph, tiny_graph

ROOT = Path(__file__).parents[2]
TOKENS = np.random.default_rng(0).integers(0, 320, (24, 16))
CPU = torch.device("cpu")
FP8 = {"dtype": "float8_e4m3fn", "scale": "tensor"}
PER_TOKEN = {"dtype": "int8", "scale": "token"}


def fused(graph: ModelGraph) -> ModelGraph:
    """Without the attentions of layers 2 to 4, and with the FFNs of 2 and 3 fused."""
    return fuse_ffn(drop_attention(graph, [2, 3, 4]), [(2, 3)])


def quantized(graph: ModelGraph) -> ModelGraph:
    recipe = {"weights": FP8, "inputs": PER_TOKEN, "include": ["lm_head"]}
    return quantize_linears(graph, QuantizationRecipe.model_validate(recipe))


def with_quantized_head(graph: ModelGraph) -> ModelGraph:
    recipe = {"weights": FP8, "include": ["lm_head"], "exclude": ["blocks.*"]}
    return quantize_linears(graph, QuantizationRecipe.model_validate(recipe))


def everything(graph: ModelGraph) -> dict[str, np.ndarray]:
    return {name: tensor.numpy() for name, tensor in named_tensors(graph)}


GRAPHS: dict[str, Callable[[], ModelGraph]] = {
    "grouped_queries": lambda: tiny_graph("AF AF AF", num_key_value_heads=[1, 2, 4]),
    "qk_norm": lambda: tiny_graph("AF AF", qk_norm=True, head_dim=24),
    "biases": lambda: tiny_graph("AF F AF", qkv_bias=True, o_bias=True, ffn_bias=True),
    "linears": lambda: tiny_graph("LF AL LL L"),
    "parallel": lambda: tiny_graph("AF (AF F A -) (LF AL) AF"),
    "empty": lambda: tiny_graph("- AF -"),
    "nothing": lambda: tiny_graph("- -"),
    "tied": lambda: tiny_graph("AF", tied=True),
    "window": lambda: tiny_graph("AF AF", sliding_window=3),
    "fused": lambda: fused(tiny_graph("AF AF AF AF AF", intermediate_size=[100, 60])),
    "bfloat16": lambda: tiny_graph("AF F", dtype="bfloat16"),
    "quantized": lambda: quantized(tiny_graph("AF (AF F) LF")),
    "static_inputs": lambda: quantized_graph(tiny_graph("AF (AF F) LF"), "fp8"),
}


def loaded(graph: ModelGraph) -> Decoder:
    decoder = Decoder(graph, torch.float32)
    load_weights(decoder, graph, CPU)
    return decoder


@pytest.mark.parametrize("case", GRAPHS)
@torch.no_grad()
def test_the_module_computes_what_the_reference_does(case: str) -> None:
    graph = GRAPHS[case]()
    tokens = torch.from_numpy(TOKENS[:2])
    decoder = loaded(graph)
    states, residuals = decoder(tokens, range(len(graph.blocks)))
    logits = apply_linear(decoder.head, states)
    expected = Reference(graph)
    torch.testing.assert_close(logits, expected.logits(tokens).clone(), atol=1e-5, rtol=0)
    for found, wanted in zip(residuals, list(expected.residuals(tokens, None))[1:], strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)


@pytest.mark.parametrize("case", ["parallel", "fused", "tied", "biases"])
def test_tensors_go_back_to_the_places_they_came_from(case: str) -> None:
    graph = GRAPHS[case]()
    decoder = loaded(graph)
    names = dict(decoder.named_parameters())
    changed = with_tensors(graph, {name: array(p.detach().numpy() + 1) for name, p in names.items()})
    before, after = everything(graph), everything(changed)
    assert set(names) == set(before) == set(after)
    for name, values in before.items():
        np.testing.assert_array_equal(after[name], values + 1)


def test_blocks_match_that_end_with_the_same_layer() -> None:
    graph = tiny_graph("AF AF AF AF AF AF")
    assert matching_blocks(fused(graph), graph) == [(0, 0), (1, 1), (2, 3), (3, 4), (4, 5)]
    assert matching_blocks(graph, fused(graph)) == [(0, 0), (1, 1), (3, 2), (4, 3), (5, 4)]


def test_learning_rate_warms_up_and_falls_along_a_cosine() -> None:
    settings = Settings(steps=12, warmup=4, learning_rate=2.0)
    rates = [learning_rate(step, settings) for step in range(12)]
    assert rates[:5] == [0.5, 1.0, 1.5, 2.0, 2.0]
    assert rates[8] == pytest.approx(1.0)
    assert rates[11] == pytest.approx(1 + math.cos(math.pi * 7 / 8))
    assert Settings(steps=60).warmup_steps == 3


def test_windows_come_in_random_order_and_every_epoch_once() -> None:
    settings = Settings(steps=7, batch=6)
    stream = np.concatenate([window_order(14, settings, step) for step in range(7)])
    epochs = stream.reshape(3, 14).tolist()
    assert all(sorted(epoch) == list(range(14)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in [*epochs, range(14)]}) == 4
    assert not np.array_equal(stream[:6], window_order(14, replace(settings, seed=1), 0))
    assert (steps_of(1.0, 14, 6), steps_of(3.0, 14, 6), steps_of(0.01, 14, 6)) == (2, 7, 1)


@pytest.mark.parametrize("tied", [False, True])
def test_training_is_what_plain_pytorch_does_with_transformers(tied: bool, tmp_path: Path) -> None:
    student = saved_model(tmp_path / "student", "Llama", {"tie_word_embeddings": tied})
    teacher = saved_model(tmp_path / "teacher", "Llama", {"tie_word_embeddings": tied})
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    teacher.save_pretrained(tmp_path / "teacher")
    graphs = [open_model(tmp_path / name, need_weights=True).graph for name in ("student", "teacher")]
    settings = Settings(
        steps=4, batch=6, warmup=2, learning_rate=1e-3, weight_decay=1.0, temperature=2.0, hidden_weight=0.5
    )
    tokens = TOKENS % 307
    found = distill(*graphs, tokens, settings)

    groups = [
        {"params": [p for p in student.parameters() if p.ndim == 2], "weight_decay": 1.0},
        {"params": [p for p in student.parameters() if p.ndim == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95))
    order = np.random.default_rng([0, 0]).permutation(24)
    for step, rate in enumerate([0.5e-3, 1e-3, 1e-3, 0.5e-3]):
        batch = torch.from_numpy(tokens[order[6 * step : 6 * step + 6]])
        with torch.no_grad():
            wanted = teacher.model(batch, output_hidden_states=True)
            targets = F.softmax(teacher.lm_head(wanted.last_hidden_state) / 2, -1)
        ours = student.model(batch, output_hidden_states=True)
        logits = student.lm_head(ours.last_hidden_state)
        kl = 4 * (targets * (targets.log() - F.log_softmax(logits / 2, -1))).sum(-1).mean()
        # What transformers calls the last hidden state is normed already: its blocks' outputs end one earlier.
        pairs = list(zip(ours.hidden_states[1:-1], wanted.hidden_states[1:-1], strict=True))
        last = [residual_before_norm(model, batch) for model in (student, teacher)]
        distances = [((s - t) ** 2).sum(-1) / (t**2).sum(-1) for s, t in [*pairs, tuple(last)]]
        hidden = torch.stack(distances).mean()
        assert found.losses[step] == pytest.approx((kl.item(), hidden.item()), rel=1e-3)
        optimizer.zero_grad()
        (kl + 0.5 * hidden).backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
    student.save_pretrained(tmp_path / "expected")
    expected = open_model(tmp_path / "expected", need_weights=True).graph
    assert_same_updates(found.graph, expected, graphs[0], 2e-3)


def assert_same_updates(found: ModelGraph, expected: ModelGraph, start: ModelGraph, tolerance: float) -> None:
    """Every tensor has moved as expected, up to `tolerance` of the way.

    Not element by element: where a gradient is nearly zero, Adam makes its rounding as large as any other step.
    """
    before, after, wanted = everything(start), everything(found), everything(expected)
    assert after.keys() == wanted.keys()
    for name, values in wanted.items():
        moved = np.linalg.norm(values - before[name])
        assert np.linalg.norm(after[name] - values) <= tolerance * moved, name


def residual_before_norm(model: transformers.PreTrainedModel, batch: torch.Tensor) -> torch.Tensor:
    seen: list[torch.Tensor] = []
    hook = model.model.norm.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    model.model(batch)
    hook.remove()
    return seen[0]


def kl_of(teacher: ModelGraph, student: ModelGraph, tokens: torch.Tensor) -> float:
    """KL(p || q) in nats, mean over tokens."""
    log_p, log_q = (F.log_softmax(Reference(graph).logits(tokens), -1) for graph in (teacher, student))
    return (log_p.exp() * (log_p - log_q)).sum(-1).mean().item()


TEACHER = tiny_graph("AF AF AF AF AF AF", intermediate_size=[100, 60], vocab_size=320)
STUDENT = fused(TEACHER)
SETTINGS = Settings(steps=6, batch=4, learning_rate=2e-3, weight_decay=0.1)


def test_training_recovers_what_dropping_and_fusing_cost() -> None:
    found = distill(STUDENT, TEACHER, TOKENS, Settings(steps=50, learning_rate=3e-3))
    assert len(found.losses) == 50
    assert found.losses[-1][0] < 0.2 * found.losses[0][0]
    tokens = torch.from_numpy(TOKENS)
    before, after = (kl_of(TEACHER, graph, tokens) for graph in (STUDENT, found.graph))
    assert after < 0.2 * before


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_padding_stays_zero_and_everything_else_moves(dtype: str) -> None:
    trained = distill(STUDENT, TEACHER, TOKENS, replace(SETTINGS, dtype=dtype, hidden_weight=1.0)).graph
    wide = trained.blocks[2].ffn
    assert (wide.intermediate_size, wide.padding) == (256, 96)
    assert not wide.gate_proj.weight.numpy()[160:].any()
    assert not wide.up_proj.weight.numpy()[160:].any()
    assert not wide.down_proj.weight.numpy()[:, 160:].any()
    before = everything(STUDENT)
    assert all((values != before[name]).any() for name, values in everything(trained).items())


def test_only_chosen_blocks_move_and_the_others_stay_the_very_same_tensors() -> None:
    trained = distill(STUDENT, TEACHER, TOKENS, SETTINGS, blocks=[2, 3]).graph
    before = dict(named_tensors(STUDENT))
    for name, tensor in named_tensors(trained):
        if name.startswith(("blocks.2.", "blocks.3.")):
            assert (tensor.numpy() != before[name].numpy()).any(), name
        else:
            assert tensor is before[name]


def test_tensors_keep_the_dtypes_they_are_stored_in_and_ties() -> None:
    teacher = tiny_graph("AF AF", dtype="bfloat16", tied=True)
    trained = distill(drop_attention(teacher, [1]), teacher, TOKENS, SETTINGS).graph
    assert {tensor.dtype.name for _, tensor in named_tensors(trained)} == {"bfloat16"}
    assert trained.lm_head is None


@pytest.mark.parametrize(
    ("changes", "tolerance"),
    [
        pytest.param({"accumulate": 4}, 2e-3, id="pieces"),
        pytest.param({"recompute": True}, 1e-9, id="recomputed"),
        pytest.param({"dtype": "bfloat16"}, 0.5, id="bfloat16"),
    ],
)
def test_options_that_change_the_cost_do_not_change_the_result(changes: dict, tolerance: float) -> None:
    # One block alone has gradients below the norm they are clipped to, so a wrong factor would show.
    expected = distill(STUDENT, TEACHER, TOKENS, SETTINGS, blocks=[2])
    found = distill(STUDENT, TEACHER, TOKENS, replace(SETTINGS, **changes), blocks=[2])
    np.testing.assert_allclose(found.losses, expected.losses, rtol=min(tolerance, 0.02))
    assert_same_updates(found.graph, expected.graph, STUDENT, tolerance)


def test_bfloat16_is_the_dtype_of_products_and_not_of_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    linear, seen = F.linear, set()

    def watched(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        y = linear(x, weight, bias)
        seen.add((weight.dtype, y.dtype, y.requires_grad))
        return y

    monkeypatch.setattr(F, "linear", watched)
    distill(STUDENT, TEACHER, TOKENS, replace(SETTINGS, steps=1, dtype="bfloat16"))
    bfloat16 = torch.bfloat16
    assert seen == {(bfloat16, bfloat16, False), (torch.float32, bfloat16, True)}  # teacher and student


def test_a_quantized_teacher_teaches() -> None:
    teacher = quantized(TEACHER)
    found = distill(STUDENT, teacher, TOKENS, Settings(steps=1, batch=24, warmup=0))
    assert found.losses[0][0] == pytest.approx(kl_of(teacher, STUDENT, torch.from_numpy(TOKENS)), rel=1e-4)


class Killed(Exception):
    pass


def interrupt(after: int) -> Callable[[int, int, str], None]:
    def progress(done: int, total: int, text: str) -> None:
        if done == after:
            raise Killed

    return progress


@pytest.mark.parametrize("blocks", [None, [2, 4]])
def test_a_resumed_run_gives_the_same_bits(blocks: list[int] | None, tmp_path: Path) -> None:
    settings = replace(SETTINGS, steps=9, hidden_weight=0.3)
    expected = distill(STUDENT, TEACHER, TOKENS, settings, blocks=blocks)
    folder = tmp_path / "state"
    for after in (5, 7):
        with pytest.raises(Killed):
            distill(
                STUDENT,
                TEACHER,
                TOKENS,
                settings,
                blocks=blocks,
                folder=folder,
                save_every=2,
                progress=interrupt(after),
            )
        assert [path.name for path in folder.glob("step-*")] == [f"step-{after - 1}"]
    found = distill(STUDENT, TEACHER, TOKENS, settings, blocks=blocks, folder=folder, save_every=2)
    assert found.losses == expected.losses
    before = everything(expected.graph)
    for name, values in everything(found.graph).items():
        np.testing.assert_array_equal(values, before[name])


# Two processes that torchrun started train every case of SPLIT, and the first of them saves what came out.
SPLIT_SCRIPT = """
import sys
sys.path.insert(0, {root!r})
from pathlib import Path
import numpy as np
from exporter.distill import distill
from exporter.distill_model import joined_processes
from tests.exporter.test_distill import SPLIT, STUDENT, TEACHER, TOKENS, everything

with joined_processes("cpu") as processes:
    for case, (settings, blocks, _) in SPLIT.items():
        folder = Path({work!r}, case)
        found = distill(STUDENT, TEACHER, TOKENS, settings, blocks=blocks, processes=processes, folder=folder)
        if processes.rank == 0:
            np.savez(f"{{folder}}.npz", losses=found.losses, **everything(found.graph))
"""

SHORT = replace(SETTINGS, steps=3)
SPLIT: dict[str, tuple[Settings, list[int] | None, float]] = {
    "everything": (SHORT, None, 2e-3),
    "pieces": (replace(SHORT, accumulate=2, hidden_weight=0.5), None, 2e-3),
    "blocks": (replace(SHORT, recompute=True), [2, 3], 2e-3),
    "bfloat16": (replace(SHORT, dtype="bfloat16"), None, 0.5),
}


def test_two_processes_train_what_one_does(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SPLIT_SCRIPT.format(root=str(ROOT), work=str(tmp_path)))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    ran = subprocess.run(torchrun, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    for case, (settings, blocks, tolerance) in SPLIT.items():
        expected = distill(STUDENT, TEACHER, TOKENS, settings, blocks=blocks)
        found = dict(np.load(tmp_path / f"{case}.npz"))
        np.testing.assert_allclose(found.pop("losses"), expected.losses, rtol=min(tolerance, 0.02), err_msg=case)
        tensors = {name: array(values) for name, values in found.items()}
        assert_same_updates(with_tensors(STUDENT, tensors), expected.graph, STUDENT, tolerance)
        assert len(list((tmp_path / case / "step-3").iterdir())) == 2


OTHER = {
    "settings": {"settings": replace(SETTINGS, seed=1)},
    "text": {"tokens": TOKENS[:20]},
    "teacher": {"teacher": STUDENT},
    "blocks": {"blocks": [2]},
    "weights": {"identity": {"model": "another"}},
}


@pytest.mark.parametrize("case", OTHER)
def test_the_saved_state_of_another_run_is_refused(case: str, tmp_path: Path) -> None:
    call = {"student": STUDENT, "teacher": TEACHER, "tokens": TOKENS, "settings": SETTINGS, "folder": tmp_path}
    distill(**call)
    with pytest.raises(CheckpointError, match="another run"):
        distill(**{**call, **OTHER[case]})
    distill(**call)


def test_a_damaged_or_foreign_state_is_refused(tmp_path: Path) -> None:
    call = {"student": STUDENT, "teacher": TEACHER, "tokens": TOKENS, "settings": SETTINGS}
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(OutputError, match=r"something else: found notes\.txt"):
        distill(**call, folder=tmp_path)
    folder = tmp_path / "state"
    distill(**call, folder=folder)
    run = (folder / "run.json").read_text()
    (folder / "run.json").write_text(run.replace('"parts": 1', '"parts": 2'))
    with pytest.raises(CheckpointError, match="part-1: no such folder"):
        distill(**call, folder=folder)
    shutil.copytree(folder / "step-6" / "part-0", folder / "step-6" / "part-1")
    with pytest.raises(CheckpointError, match=r"step-6: embedding: rows are missing or too many: expected"):
        distill(**call, folder=folder)
    (folder / "run.json").write_text(run.replace('"parts": 1', '"parts": 0'))
    with pytest.raises(CheckpointError, match=r"run.json: malformed \(\('parts',\)"):
        distill(**call, folder=folder)
    (folder / "run.json").write_text(run)
    state = folder / "step-6" / "part-0" / "state.safetensors"
    state.write_bytes(state.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="altered"):
        distill(**call, folder=folder)


REFUSED: dict[str, tuple[dict, str]] = {
    "vocabulary": ({"teacher": tiny_graph("AF", vocab_size=321)}, "different vocabularies: expected 321, found 320"),
    "quantized": ({"student": quantized(TEACHER)}, "block 0: a quantized model cannot be trained"),
    "quantized_head": ({"student": with_quantized_head(TEACHER)}, "a quantized model cannot be trained"),
    "uneven": ({"settings": replace(SETTINGS, accumulate=3)}, "expected a multiple of 3, found 4"),
    "warmup": ({"settings": replace(SETTINGS, warmup=6)}, "leaves no steps"),
    "nothing": ({"student": tiny_graph("AF - AF"), "blocks": [1]}, "nothing to train"),
    "sizes": (
        {"teacher": tiny_graph("AF", hidden_size=32), "settings": replace(SETTINGS, hidden_weight=1.0)},
        "different sizes cannot be compared: expected 32, found 64",
    ),
    "no_common_ends": (
        {"student": fuse_ffn(tiny_graph("F F"), [(0, 1)]), "teacher": tiny_graph("AF")}
        | {"settings": replace(SETTINGS, hidden_weight=1.0)},
        "no block of the student ends with a layer",
    ),
    "diverged": ({"settings": replace(SETTINGS, learning_rate=1e30)}, "diverged in step 2"),
    "rate": ({"settings": replace(SETTINGS, steps=1, learning_rate=math.nan)}, "found weights that are not"),
    "not_finite": (
        {"student": replace(TEACHER, norm=replace(TEACHER.norm, weight=full((64,), math.nan, TEACHER.dtype)))},
        "diverged in step 1: expected finite losses, gradients and weights, found KL nan",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_distilled_is_refused_and_leaves_nothing(case: str, tmp_path: Path) -> None:
    changes, message = REFUSED[case]
    call = {
        "student": STUDENT,
        "teacher": TEACHER,
        "tokens": TOKENS,
        "settings": SETTINGS,
        "folder": tmp_path / "state",
    }
    with pytest.raises(DistillError) as caught:
        distill(**{**call, **changes})
    assert message in str(caught.value)
    assert isinstance(caught.value, FuselageError)
    assert not list(tmp_path.iterdir())
