"""Training a transformed model to do what the original did: distillation on the original's logits.

    loss   = T^2 KL(p_T || q_T) + hidden_weight * H                       mean over the tokens of a step
    p_T, q_T = softmax(logits / T) of the teacher (the original) and the student; T^2 keeps the gradient's size
    H      = mean over matching blocks of |s - t|^2 / |t|^2               s, t the residual streams [D] of a token
Source of the first term: Hinton et al., "Distilling the knowledge in a neural network", arXiv:1503.02531. Blocks of
student and teacher match where the last source layer is the same: a fused block has done what the last of its layers
had.

AdamW (decoupled weight decay, on matrices only), gradients clipped to norm 1, a linear warm-up and then a cosine down
to zero. Weights, gradients and optimizer state are float32; with dtype bfloat16 the products are not. Zero padding of
fused FFNs stays zero: every gradient there has a factor that is zero.

Shape letters: N = windows of text, S = tokens per window, D = hidden_size.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from statistics import mean
from typing import Any, Literal

import numpy as np
import torch
from torch import nn
from torch.distributed.tensor import DTensor

from exporter.distill_loss import head_divergence, hidden_distance
from exporter.distill_model import (
    Decoder,
    DistillError,
    HeldRows,
    Processes,
    held_rows,
    load_rows,
    load_weights,
    shard,
    with_tensors,
)
from exporter.distill_state import SavedRun, find_run, open_step, save_step
from exporter.errors import FuselageError, raise_all
from exporter.graph import CODES, ModelGraph, structure, weights
from exporter.lazy import LazyTensor

BETAS = (0.9, 0.95)
MAX_GRADIENT_NORM = 1.0
MOMENTS = ("exp_avg", "exp_avg_sq")  # of AdamW, as PyTorch names them


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """How to train."""

    steps: int
    batch: int = 8  # windows of a step, over all processes
    accumulate: int = 1  # pieces that a process takes its windows of a step in
    learning_rate: float = 1e-4  # at the end of the warm-up
    warmup: int | None = None  # steps; None: one in twenty
    weight_decay: float = 0.0
    temperature: float = 1.0
    hidden_weight: float = 0.0
    dtype: Literal["float32", "bfloat16"] = "float32"  # of products
    seed: int = 0  # of the order of the windows
    recompute: bool = False  # activations in the backward pass, instead of keeping them

    @property
    def warmup_steps(self) -> int:
        return self.steps // 20 if self.warmup is None else self.warmup


@dataclass(frozen=True, slots=True, kw_only=True)
class Distilled:
    """What came out."""

    graph: ModelGraph  # trained tensors in the dtypes they had; the others are the student's own
    settings: Settings
    losses: list[tuple[float, float]]  # of every step: T^2 KL, nats per token, and H (0 if it is not asked for)

    @property
    def summary(self) -> dict[str, Any]:
        """Steps, and the means of T^2 KL over the first and the last tenth of them; plain JSON data."""
        kl = [loss for loss, _ in self.losses]
        tenth = -(-len(kl) // 10)
        return {"steps": len(kl), "kl_of_first_steps": mean(kl[:tenth]), "kl_of_last_steps": mean(kl[-tenth:])}

    def to_json(self) -> dict[str, Any]:
        """The settings and the loss of every step; plain JSON data."""
        kl, hidden = zip(*self.losses, strict=True)
        return {"settings": asdict(self.settings), "kl": list(kl), "hidden": list(hidden)}


def distill(
    student: ModelGraph,
    teacher: ModelGraph,
    tokens: np.ndarray,
    settings: Settings,
    *,
    blocks: Sequence[int] | None = None,
    processes: Processes | None = None,
    folder: Path | None = None,
    save_every: int = 100,
    identity: Mapping[str, Any] | None = None,
    progress: Callable[[int, int, str], None] | None = None,
) -> Distilled:
    """Train `student` on the logits of `teacher` for tokens int64 [N, S].

    Args:
        blocks: indices in `student.blocks` of what is trained; None: everything.
        processes: from `joined_processes`, entered by all of them; None: this one alone on its CPU.
        folder: where every `save_every` steps the run is saved, and from where it goes on; on a CPU in float32 the
            result is then the same to the last bit. Several processes need one, which all of them see.
        identity: plain JSON data that tells these models from others of the same structure.
        progress: called with (steps done, steps in all, text).

    Returns:
        A graph that reads what was trained from `folder` or, without one, from memory.

    Raises:
        DistillError: student, teacher, tokens and settings do not go together; or the loss is not a number any more.
        CheckpointError, OutputError: see `exporter.distill_state`.
    """
    processes = processes or Processes(0, 1, torch.device("cpu"))
    check_distillation(student, teacher, settings, blocks=blocks, processes=processes.count)
    if processes.count > 1 and folder is None:
        raise DistillError(
            "several processes put their weights together in a folder",
            hint="name a folder that all of them see with --resume",
        )
    key = _key(student, teacher, tokens, settings, blocks, identity)
    saved = None if folder is None else find_run(folder, key)
    trainer = _Trainer(student, teacher, settings, blocks, processes)
    losses: list[tuple[float, float]] = []
    if folder is not None and saved is not None:
        trainer.restore(saved.step, open_step(folder, saved, trainer.shapes))
        losses += saved.losses
    while len(losses) < settings.steps:
        order = window_order(len(tokens), settings, len(losses))
        losses.append(trainer.step(len(losses), tokens[order]))
        if len(losses) % save_every == 0 or len(losses) == settings.steps:
            trainer.check_weights(len(losses))
            if folder is not None:
                saved = SavedRun(key=key, parts=processes.count, losses=losses)
                save_step(folder, saved, trainer.tensors, processes)
        if progress is not None:
            progress(len(losses), settings.steps, f"loss {losses[-1][0]:.4f}")
    trained = trainer.tensors if folder is None or saved is None else open_step(folder, saved, trainer.shapes)
    processes.wait()  # whoever writes the result may then remove the folder
    return Distilled(graph=with_tensors(student, trained), settings=settings, losses=losses)


def check_distillation(
    student: ModelGraph,
    teacher: ModelGraph,
    settings: Settings,
    *,
    blocks: Sequence[int] | None = None,
    processes: int = 1,
) -> None:
    """Raise DistillError where arguments of `distill` do not go together; cheap, for use before long work."""
    raise_all(list(_problems(student, teacher, settings, blocks, processes)))


def matching_blocks(student: ModelGraph, teacher: ModelGraph) -> list[tuple[int, int]]:
    """Pairs of indices in `student.blocks` and `teacher.blocks`: the blocks that end with the same source layer."""
    ends = {max(entry.source_layers): index for index, entry in enumerate(teacher.blocks)}
    lasts = ((index, max(entry.source_layers)) for index, entry in enumerate(student.blocks))
    return [(index, ends[last]) for index, last in lasts if last in ends]


def learning_rate(step: int, settings: Settings) -> float:
    """Of step 0, 1, ...: a linear warm-up to `settings.learning_rate`, then a cosine towards zero."""
    warmup = settings.warmup_steps
    if step < warmup:
        return settings.learning_rate * (step + 1) / warmup
    done = (step - warmup) / (settings.steps - warmup)
    return settings.learning_rate * (1 + math.cos(math.pi * done)) / 2


def steps_of(epochs: float, windows: int, batch: int) -> int:
    """How many steps go over all windows so many times, at least one."""
    return max(1, round(epochs * windows / batch))


def window_order(count: int, settings: Settings, step: int) -> np.ndarray:
    """The windows of a step, int64 [batch]: all `count` of them in random order, then again in another."""
    places = np.arange(step * settings.batch, (step + 1) * settings.batch)
    return np.array([_permutation(count, settings.seed, place // count)[place % count] for place in places.tolist()])


@lru_cache(maxsize=2)
def _permutation(count: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(count)


class _Trainer:
    """Both models, the optimizer, and one step of training."""

    def __init__(
        self,
        student: ModelGraph,
        teacher: ModelGraph,
        settings: Settings,
        blocks: Sequence[int] | None,
        processes: Processes,
    ) -> None:
        self._settings, self._processes = settings, processes
        pairs = matching_blocks(student, teacher) if settings.hidden_weight else []
        self._student_keeps, self._teacher_keeps = [s for s, _ in pairs], [t for _, t in pairs]
        self._dtype = dtype = getattr(torch, settings.dtype)
        # Sharded parameters are cast when they are gathered; whole ones when a product needs them.
        self._autocasts = dtype != torch.float32 and processes.count == 1
        self._student = Decoder(student, torch.float32, recompute=settings.recompute)
        self._student.requires_grad_(blocks is None)
        for index in blocks or ():
            self._student.blocks[index].requires_grad_(True)
        self._teacher = Decoder(teacher, dtype).requires_grad_(False)
        for decoder, graph in ((self._student, student), (self._teacher, teacher)):
            if processes.count > 1:
                shard(decoder, dtype)
            load_weights(decoder, graph, processes.device)
        trained = {name: p for name, p in self._student.named_parameters() if p.requires_grad}
        matrices = {name: p for name, p in trained.items() if p.ndim > 1}
        vectors = {name: p for name, p in trained.items() if p.ndim == 1}
        self._trained = matrices | vectors  # in the optimizer's order
        groups = [
            {"params": list(matrices.values()), "weight_decay": settings.weight_decay},
            {"params": list(vectors.values()), "weight_decay": 0.0},
        ]
        self._optimizer = torch.optim.AdamW(groups, betas=BETAS, fused=True)

    def step(self, number: int, windows: np.ndarray) -> tuple[float, float]:
        """Take step `number` on windows int64 [batch, S]; returns both losses before it, as in `Distilled.losses`.

        Raises:
            DistillError: a loss or the gradient is not finite.
        """
        settings, processes = self._settings, self._processes
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate(number, settings)
        pieces = windows.reshape(settings.accumulate, processes.count, -1, windows.shape[1])[:, processes.rank]
        losses = torch.zeros(2, device=processes.device)
        for piece in pieces:
            kl, hidden = self._losses(torch.from_numpy(piece).to(processes.device))
            loss = (kl + settings.hidden_weight * hidden) / settings.accumulate
            loss.backward()
            losses += torch.stack([kl, hidden]).detach() / settings.accumulate
        norm = nn.utils.clip_grad_norm_(self._trained.values(), MAX_GRADIENT_NORM)
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        kl_value, hidden_value = processes.mean(losses).tolist()
        if not all(math.isfinite(value) for value in (kl_value, hidden_value, norm.item())):
            raise _diverged(number, f"KL {kl_value}, hidden {hidden_value}, gradient norm {norm.item()}")
        self._optimizer.step()
        self._optimizer.zero_grad()
        return kl_value, hidden_value

    def _losses(self, input_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        with torch.no_grad():
            targets, theirs = self._teacher(input_ids, self._teacher_keeps)
        with torch.autocast(input_ids.device.type, torch.bfloat16, enabled=self._autocasts):
            states, ours = self._student(input_ids, self._student_keeps)
        kl = head_divergence(
            self._teacher.head,
            targets,
            self._student.head,
            states,
            temperature=self._settings.temperature,
            dtype=self._dtype,
        )
        distances = [hidden_distance(t, s) for t, s in zip(theirs, ours, strict=True)]
        return kl, torch.stack(distances).mean() if distances else torch.zeros_like(kl)

    def check_weights(self, steps: int) -> None:
        """Raise DistillError if the last of so many steps made a weight infinite or NaN."""
        finite = torch.stack([held_rows(p.detach())[0].isfinite().all() for p in self._trained.values()]).all()
        if self._processes.mean(finite.float()).item() < 1:
            raise _diverged(steps - 1, "weights that are not")

    @property
    def tensors(self) -> Mapping[str, LazyTensor]:
        """Everything that training has changed, as far as this process holds it: weights, and "exp_avg/..."."""
        state = self._optimizer.state
        moments = {f"{m}/{name}": HeldRows(state[p][m]) for m in MOMENTS for name, p in self._trained.items()}
        return {name: HeldRows(p) for name, p in self._trained.items()} | moments

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape of the whole tensor, for all of `tensors`."""
        prefixes = ("", *(f"{moment}/" for moment in MOMENTS))
        return {f"{prefix}{name}": tuple(p.shape) for prefix in prefixes for name, p in self._trained.items()}

    @torch.no_grad()
    def restore(self, step: int, tensors: Mapping[str, LazyTensor]) -> None:
        """Go back to where `step` steps were done."""
        state: dict[int, dict[str, torch.Tensor]] = {}
        for index, (name, parameter) in enumerate(self._trained.items()):
            load_rows(parameter, tensors[name])
            state[index] = {"step": torch.tensor(float(step))}
            for moment in MOMENTS:
                state[index][moment] = torch.empty_like(parameter)
                load_rows(state[index][moment], tensors[f"{moment}/{name}"])
        self._optimizer.load_state_dict({**self._optimizer.state_dict(), "state": state})


def _diverged(step: int, found: str) -> DistillError:
    return DistillError(
        f"training diverged in step {step + 1}",
        expected="finite losses, gradients and weights",
        found=found,
        hint="try a lower --lr or a longer --warmup, and see that the models' own weights are finite",
    )


def _problems(
    student: ModelGraph,
    teacher: ModelGraph,
    settings: Settings,
    blocks: Sequence[int] | None,
    processes: int,
) -> Iterator[FuselageError]:
    """Everything that does not go together; no tensor is read."""
    if student.vocab_size != teacher.vocab_size:
        yield DistillError(
            "student and teacher have different vocabularies", expected=teacher.vocab_size, found=student.vocab_size
        )
    quantized = next((index for index, entry in enumerate(student.blocks) if _is_quantized(entry)), None)
    if quantized is not None or _is_quantized(student.lm_head):
        yield DistillError(
            "a quantized model cannot be trained", block=quantized, hint="distill first, then quantize the result"
        )
    pieces = settings.accumulate * processes
    if settings.batch % pieces:
        yield DistillError(
            f"the windows of a step do not divide into {settings.accumulate} pieces for each of {processes} processes",
            expected=f"a multiple of {pieces}",
            found=settings.batch,
        )
    if settings.warmup_steps >= settings.steps:
        yield DistillError(
            "the warm-up leaves no steps to train",
            expected=f"less than {settings.steps} steps",
            found=settings.warmup_steps,
        )
    if blocks is not None and all(student.blocks[index].is_empty for index in blocks):
        yield DistillError("the chosen blocks are empty: there is nothing to train", found=f"blocks {list(blocks)}")
    if settings.hidden_weight and student.hidden_size != teacher.hidden_size:
        yield DistillError(
            "residual streams of different sizes cannot be compared",
            expected=teacher.hidden_size,
            found=student.hidden_size,
        )
    if settings.hidden_weight and not matching_blocks(student, teacher):
        yield DistillError("no block of the student ends with a layer that one of the teacher's ends with")


def _is_quantized(part: Any) -> bool:
    return any(tensor.dtype in CODES for tensor in weights(part))


def _key(
    student: ModelGraph,
    teacher: ModelGraph,
    tokens: np.ndarray,
    settings: Settings,
    blocks: Sequence[int] | None,
    identity: Mapping[str, Any] | None,
) -> str:
    """What a saved run belongs to: all that its result depends on."""
    how = {name: value for name, value in asdict(settings).items() if name not in ("accumulate", "recompute")}
    text = hashlib.sha256(tokens.tobytes()).hexdigest()
    described = [how, text, tokens.shape, blocks and list(blocks), structure(student), structure(teacher), identity]
    return hashlib.sha256(json.dumps(described).encode()).hexdigest()
