"""Train the demo model: `python -m trio.demo.training.train_model --work DIR`.

Each stage starts from the last one's weights. The vision tower learns digit, colour and cell of
every patch on small scenes; a decoder of `BASE_LAYERS` layers learns to answer from the frozen
tower's features, averaged over 2 x 2 patches, and then from 576 visual tokens; at last both train
on together, the decoder grown to its full depth by stacking layers whose output projections start
at zero. A checkpoint is written every few minutes and the run goes on from it.

Several processes share each step's scenes: on two cores `torchrun --nproc-per-node 2 -m
trio.demo.training.train_model …` with one thread each is faster than one process with two threads.
"""

from __future__ import annotations

import trio.passive  # noqa: F401  # isort: skip

import argparse
import math
import os
import time
from collections import defaultdict
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from transformers import AttentionInterface, LlavaForConditionalGeneration

from trio.demo.scenes import COLOURS, GRID, KINDS
from trio.demo.training.batches import Batch, make_batch
from trio.demo.training.build import LAYERS, new_model, processor

BASE_LAYERS = 6


@dataclass(frozen=True, kw_only=True, slots=True)
class Stage:
    """One stretch of training with settings of its own."""

    name: str
    steps: int
    batch: int
    """Scenes per step."""
    grid: int
    """Cells along a side of the scenes."""
    small_grid: int = 0
    """Cells along a side in every other step: objects then fill more of the image."""
    learning_rate: float
    plain: bool = False
    """White digits on an even ground."""
    crowded: bool = False
    """As many digits as there may be: to know which places hold one then says nothing about where a
    given one is."""
    layers: int = 0
    """Decoder layers; 0 trains the vision tower alone."""
    pool: int = 1
    """Side of the square of patches averaged into one visual token."""
    vision: float = 1.0
    """Weight of the patch loss; 0 freezes the tower."""


_ANSWER = Stage(
    name="answer",
    steps=2200,
    batch=32,
    grid=2,
    learning_rate=2e-3,
    layers=BASE_LAYERS,
    pool=2,
    vision=0,
)
_DEEPEN = Stage(
    name="deepen", steps=400, batch=16, grid=3, learning_rate=7e-4, layers=LAYERS, vision=0.3
)
STAGES = (
    Stage(name="see-plain", steps=350, batch=64, grid=1, learning_rate=1.5e-3, plain=True),
    Stage(name="see-one", steps=800, batch=64, grid=1, learning_rate=1.5e-3),
    Stage(name="see", steps=400, batch=32, grid=2, learning_rate=1e-3),
    _ANSWER,
    replace(_ANSWER, name="place", steps=400, crowded=True),
    replace(_ANSWER, name="answer-again", steps=300, learning_rate=1e-3),
    replace(_ANSWER, name="resolve", steps=200, learning_rate=1e-3, grid=3, pool=1),
    _DEEPEN,
    replace(_DEEPEN, name="settle", steps=720, learning_rate=6e-4, small_grid=2),
)


class Heads(nn.Module):
    """Linear probes on patch features and on the class token; used in training only."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.digit = nn.Linear(width, 11)
        self.color = nn.Linear(width, len(COLOURS) + 1)
        self.cell = nn.Linear(width, GRID * GRID)
        self.strokes = nn.Linear(width, 64)
        self.shown = nn.Linear(width, 10 + len(COLOURS))


def question_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: object,
) -> tuple[torch.Tensor, None]:
    """Causal attention among the prefix, masked attention of the text rows over everything.

    Written out in the dtype of its input: with two wide heads that is twice as fast on a CPU with
    bfloat16 as its fused kernel.
    """
    prefix = query.shape[2] - attention_mask.shape[2]
    ahead = torch.ones(prefix, prefix, dtype=torch.bool).triu(1)[None, None]
    query = query * scaling
    seen = _attend(query[:, :, :prefix], key[:, :, :prefix], value[:, :, :prefix], ahead)
    asked = _attend(query[:, :, prefix:], key, value, ~attention_mask)
    return torch.cat([seen, asked], 2).transpose(1, 2), None


def _attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, hidden: torch.Tensor
) -> torch.Tensor:
    """Softmax attention [N, H, Q, D]; no weight where `hidden` [1 or N, 1, Q, K] is set."""
    bias = torch.zeros(hidden.shape, dtype=query.dtype).masked_fill_(hidden, -math.inf)
    bias = bias.expand(*query.shape[:2], -1, -1).flatten(0, 1)
    scores = torch.baddbmm(bias, query.flatten(0, 1), key.flatten(0, 1).transpose(1, 2))
    return (scores.softmax(-1) @ value.flatten(0, 1)).view_as(query)


AttentionInterface.register("scene_questions", question_attention)


def see(model: LlavaForConditionalGeneration, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Patch features [N, P, D] of the second-last layer and the class token [N, D] of the last."""
    tower = model.model.vision_tower
    embeddings = tower.embeddings
    patches = embeddings.patch_embedding(batch.pixels).flatten(2).transpose(1, 2)
    start = embeddings.class_embedding.expand(len(patches), 1, -1)
    hidden = torch.cat([start, patches], 1) + embeddings.position_embedding(batch.patch_positions)
    hidden = tower.pre_layrnorm(hidden)
    for layer in tower.encoder.layers[:-1]:
        hidden = layer(hidden, None)
    last = tower.encoder.layers[-1](hidden, None)
    return hidden[:, 1:], tower.post_layernorm(last[:, 0])


def answer(
    model: LlavaForConditionalGeneration, features: torch.Tensor, batch: Batch, pool: int
) -> torch.Tensor:
    """Logits [N, R, V] behind every text token."""
    decoder = model.model.language_model
    visual = model.model.multi_modal_projector(_pooled(features, pool))
    opening = torch.tensor([1, 5, 8])
    rows, length = batch.tokens.shape
    text = decoder.embed_tokens(batch.tokens)
    before = decoder.embed_tokens(opening).expand(rows, -1, -1)
    prefix = len(opening) + visual.shape[1]
    positions = torch.cat([torch.arange(prefix).expand(rows, -1), prefix + batch.offsets], 1)
    own = batch.segments[:, :, None] == batch.segments[:, None, :]
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    mask = torch.cat([torch.ones(rows, length, prefix, dtype=torch.bool), own & causal], 2)[:, None]
    hidden = torch.cat([before, visual.to(text.dtype), text], 1)
    rotary = decoder.rotary_emb(hidden, position_ids=positions)
    for layer in decoder.layers:
        hidden = layer(
            hidden, attention_mask=mask, position_embeddings=rotary, position_ids=positions
        )
    return model.lm_head(decoder.norm(hidden[:, prefix:]))


def _pooled(features: torch.Tensor, pool: int) -> torch.Tensor:
    if pool == 1:
        return features
    rows, patches, width = features.shape
    side = math.isqrt(patches)
    square = features.transpose(1, 2).reshape(rows, width, side, side)
    return F.avg_pool2d(square.float(), pool).flatten(2).transpose(1, 2)


def patch_loss(
    heads: Heads, features: torch.Tensor, seen: torch.Tensor, batch: Batch
) -> torch.Tensor:
    """What each patch knows of the object it lies in, and the class token of the scene.

    Digit, colour and cell alone leave the tower at chance for thousands of steps: a digit shows
    only in many patches together. Drawing the handwritten sample pays from the first neighbour on.
    """
    logits = heads.digit(features), heads.color(features)
    total = torch.zeros(())
    objects = batch.patch_digit != 10
    for logit, target in zip(logits, (batch.patch_digit, batch.patch_color), strict=True):
        each = F.cross_entropy(logit.flatten(0, 1).float(), target.flatten(), reduction="none")
        each = each.view_as(target)
        total = total + each[objects].mean() + 0.3 * each[~objects].mean()
    drawn = heads.strokes(features[objects]).float()
    total = total + 20 * F.mse_loss(drawn, batch.patch_strokes[objects])
    # Squares, not classes: the background must add nothing where a decoder's attention is broad.
    cells = F.one_hot(batch.patch_cell, GRID * GRID + 1)[..., :-1]
    placed = (heads.cell(features).float() - cells).square().sum(-1)
    total = total + placed[objects].mean() + placed[~objects].mean()
    shown = torch.cat([batch.shown_digits, batch.shown_colors], 1)
    return total + F.binary_cross_entropy_with_logits(heads.shown(seen).float(), shown)


def answer_loss(logits: torch.Tensor, batch: Batch) -> torch.Tensor:
    each = F.cross_entropy(
        logits.flatten(0, 1).float(), batch.targets.flatten(), reduction="none", ignore_index=-100
    )
    weights = batch.weights.flatten() * (batch.targets.flatten() != -100)
    return (each * weights).sum() / weights.sum()


def grow(model: LlavaForConditionalGeneration, layers: int) -> LlavaForConditionalGeneration:
    """Stack new decoder layers on top; they start as identities, so the answers stay."""
    present = len(model.model.language_model.layers)
    if present == layers:
        return model
    larger = new_model(processor().tokenizer, layers)
    missing = larger.load_state_dict(model.state_dict(), strict=False)
    assert not missing.unexpected_keys
    with torch.no_grad():
        for layer in larger.model.language_model.layers[present:]:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
    return larger


class Trainer:
    """Runs the stages, with one checkpoint file that holds everything needed to go on."""

    def __init__(
        self,
        work: Path,
        seed: int,
        stages: tuple[Stage, ...],
        *,
        save_every: int = 200,
        scenes_evaluated: int = 128,
    ) -> None:
        self.work, self.seed, self.stages = work, seed, stages
        self.save_every, self.scenes_evaluated = save_every, scenes_evaluated
        self.tokenizer = processor().tokenizer
        self.rank, self.processes = 0, 1
        if dist.is_torchelastic_launched():
            dist.init_process_group("gloo")
            self.rank, self.processes = dist.get_rank(), dist.get_world_size()
        torch.manual_seed(seed)
        self.stage, self.step = 0, 0
        self.model = new_model(self.tokenizer, BASE_LAYERS)
        self.heads = Heads(128)
        work.mkdir(parents=True, exist_ok=True)
        saved = self._load()
        self._enter_stage()
        if saved:
            self.optimizer.load_state_dict(saved)

    def run(self) -> None:
        while self.stage < len(self.stages):
            self._run_stage(self.stages[self.stage])
            self.stage, self.step = self.stage + 1, 0
            if self.stage < len(self.stages):
                self._enter_stage()
            self._save()
        if self.rank == 0:
            export(self.model, self.work / "model")

    def _enter_stage(self) -> None:
        if self.stage >= len(self.stages):
            return
        stage = self.stages[self.stage]
        if stage.layers:
            self.model = grow(self.model, stage.layers)
        self.model.model.language_model.config._attn_implementation = "scene_questions"
        tower = self.model.model.vision_tower.requires_grad_(stage.vision > 0)
        trained = [*tower.parameters(), *self.heads.parameters()] if stage.vision else []
        if stage.layers:
            trained += [
                parameter
                for name, parameter in self.model.named_parameters()
                if "vision_tower" not in name
            ]
        self.optimizer = torch.optim.AdamW(trained, betas=(0.9, 0.98), weight_decay=0.01)
        self.trained = trained

    def _run_stage(self, stage: Stage) -> None:
        started, seen = time.monotonic(), 0
        while self.step < stage.steps:
            loss = self._train_step(stage)
            self.step += 1
            seen += stage.batch
            if self.step % 50 == 0 and self.rank == 0:
                rate = seen / (time.monotonic() - started)
                print(
                    f"{stage.name} {self.step}/{stage.steps} loss {loss:.4f} {rate:.1f} scenes/s",
                    flush=True,
                )
            if (self.step % self.save_every == 0 or self.step == stage.steps) and self.rank == 0:
                print(stage.name, self.step, self.evaluate(stage), flush=True)
                self._save()

    def _train_step(self, stage: Stage) -> float:
        rng = np.random.default_rng((self.seed, self.stage, self.step, self.rank))
        size = stage.batch // self.processes
        grid = stage.small_grid if stage.small_grid and self.step % 2 else stage.grid
        batch = make_batch(rng, self.tokenizer, "train", size, grid, stage.plain, stage.crowded)
        warm = min(1.0, (self.step + 1) / 50)
        decay = 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * self.step / stage.steps))
        for group in self.optimizer.param_groups:
            group["lr"] = stage.learning_rate * warm * decay
        with torch.autocast("cpu", torch.bfloat16):
            loss = self._loss(stage, batch)
        loss.backward()
        if self.processes > 1:
            self._average_gradients()
        nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())

    def _average_gradients(self) -> None:
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.trained]
        flat = nn.utils.parameters_to_vector(gradients)
        dist.all_reduce(flat)
        nn.utils.vector_to_parameters(flat / self.processes, gradients)
        for parameter, gradient in zip(self.trained, gradients, strict=True):
            parameter.grad = gradient

    def _loss(self, stage: Stage, batch: Batch) -> torch.Tensor:
        with torch.set_grad_enabled(stage.vision > 0):
            features, seen = see(self.model, batch)
        loss = torch.zeros(())
        if stage.vision:
            loss = loss + stage.vision * patch_loss(self.heads, features, seen, batch)
        if stage.layers:
            loss = loss + answer_loss(answer(self.model, features, batch, stage.pool), batch)
        return loss

    @torch.no_grad()
    def evaluate(self, stage: Stage) -> dict[str, float]:
        """Share right on held-out scenes: patches by digit and colour, answers by kind."""
        totals: defaultdict[str, list[float]] = defaultdict(list)
        rng = np.random.default_rng(12345)
        size = min(32, self.scenes_evaluated)
        for _ in range(self.scenes_evaluated // size):
            batch = make_batch(rng, self.tokenizer, "heldout", size, stage.grid, stage.plain)
            with torch.autocast("cpu", torch.bfloat16):
                features, _ = see(self.model, batch)
                objects = batch.patch_digit != 10
                digit = self.heads.digit(features).argmax(-1) == batch.patch_digit
                color = self.heads.color(features).argmax(-1) == batch.patch_color
                totals["patch digit"].append(digit[objects].float().mean().item())
                totals["patch color"].append(color[objects].float().mean().item())
                if stage.layers:
                    logits = answer(self.model, features, batch, stage.pool)
                    _count_answers(totals, logits.argmax(-1), batch)
        return {name: round(float(np.mean(values)), 3) for name, values in totals.items()}

    def _save(self) -> None:
        if self.rank:
            return
        state = {
            "model": self.model.state_dict(),
            "heads": self.heads.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "layers": len(self.model.model.language_model.layers),
            "stage": self.stage,
            "step": self.step,
        }
        temporary = self.work / "checkpoint.pt.tmp"
        torch.save(state, temporary)
        os.replace(temporary, self.work / "checkpoint.pt")

    def _load(self) -> dict | None:
        path = self.work / "checkpoint.pt"
        if not path.exists():
            return None
        state = torch.load(path, weights_only=True)
        self.model = grow(self.model, state["layers"])
        self.model.load_state_dict(state["model"])
        self.heads.load_state_dict(state["heads"])
        self.stage, self.step = state["stage"], state["step"]
        print(f"going on at stage {self.stage}, step {self.step}", flush=True)
        return state["optimizer"] if self.step else None


def _count_answers(totals: dict[str, list[float]], guess: torch.Tensor, batch: Batch) -> None:
    """An answer is right when each of its tokens and its end are."""
    wrong = (guess != batch.targets) & (batch.targets != -100)
    for row in range(len(wrong)):
        segments = batch.segments[row]
        for segment in range(int(segments.max()) + 1):
            inside = segments == segment
            kind = KINDS[int(batch.kinds[row][inside][0])]
            totals[kind].append(float(not wrong[row][inside].any()))


def export(model: LlavaForConditionalGeneration, folder: Path) -> None:
    """Save as an ordinary bfloat16 checkpoint with its processor."""
    model.model.language_model.config._attn_implementation = "sdpa"
    model.bfloat16().save_pretrained(folder)
    processor().save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--work", type=Path, required=True, help="folder for checkpoints and the result"
    )
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    for stage in STAGES:
        print(asdict(stage), flush=True)
    Trainer(arguments.work, arguments.seed, STAGES).run()


if __name__ == "__main__":
    main()
