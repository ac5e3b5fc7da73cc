"""Train the demo's text tower: `python -m trio.demo.training.train_text_tower --work DIR`.

A small text tower, a visual and a text projection are trained as CLIP's are, by a contrast between
scenes and texts, on top of the demo model's vision tower, of which no weight changes. Since it
stands still, its class token is computed once for all training scenes and kept under `--work`. The
result is an ordinary `CLIPModel` checkpoint, `DIR/clip`, with its tokenizer.

A text is true of every scene that shows what it names, of many scenes if it names little: the
contrast of a batch of N scenes with N texts counts each true pair as positive, not the diagonal
alone.
"""

from __future__ import annotations

import trio.passive  # noqa: F401  # isort: skip

import argparse
import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.metrics import roc_auc_score
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPVisionModel,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerFast,
)

from trio.demo import CAPTION_PROMPT, MODEL
from trio.demo.language import MARKS, vocabulary, word_level
from trio.demo.scenes import COLOURS, Scene, Split, listed, make_scene, patch_items
from trio.demo.training.build import PATCH

WIDTH = 64
"""Width of the text tower and of the space that it shares with the image."""
LENGTH = 64
"""Longest text in tokens, start and end included."""
TRAIN_SCENES, HELDOUT_SCENES, PATCH_SCENES = 16_000, 512, 96
STEPS, BATCH, LEARNING_RATE = 1000, 256, 2e-3
LOOK = 8
"""Scenes that the vision tower sees at a time: more are slower on one core."""

TEMPLATES = {
    "digit": (
        "a {digit}", "there is a {digit} .", "is there a {digit} ?", "what color is the {digit} ?",
        "where is the {digit} ?",
    ),
    "color": (
        "a {color} digit", "there is a {color} digit .", "is there a {color} digit ?",
        "which digit is {color} ?", "where is the {color} digit ?",
    ),
    "both": (
        "a {color} {digit}", "there is a {color} {digit} .", "is there a {color} {digit} ?",
        "the {digit} is {color} .", "where is the {color} {digit} ?",
    ),
    "neither": (CAPTION_PROMPT, "how many digits are there ?"),
}  # fmt: skip
"""Phrases and questions by what they name of an object."""
SHARES = (0.4, 0.2, 0.2, 0.15, 0.05)
"""How often a caption and each kind of `TEMPLATES` is drawn; what names nothing teaches little."""

Object = tuple[int, str]
"""Digit and colour."""
FACTS = {
    fact: index
    for index, fact in enumerate(
        [*map(str, range(10)), *COLOURS, *(f"{c} {d}" for c in COLOURS for d in range(10))]
    )
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Seen:
    """N scenes as the vision tower sees them."""

    features: torch.Tensor
    """[N, D] float32: the last layer's class token behind `post_layernorm`."""
    objects: list[list[Object]]
    """What each scene shows, in the order of `COLOURS`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Text:
    words: str
    facts: frozenset[str]
    """What a scene must show for the text to be true of it, or to ask about what it shows."""


def facts_of(objects: Sequence[Object]) -> frozenset[str]:
    return frozenset(
        fact for digit, color in objects for fact in (str(digit), color, f"{color} {digit}")
    )


def caption_of(objects: Sequence[Object]) -> Text:
    return Text(
        words=listed([f"a {color} {digit}" for digit, color in objects]), facts=facts_of(objects)
    )


def about(template: str, asked: Object) -> Text:
    """A text on one object; its facts are what the text names of it."""
    digit, color = asked
    words = template.format(digit=digit, color=color)
    said = set(words.split())
    facts = frozenset(fact for fact in facts_of([asked]) if said.issuperset(fact.split()))
    return Text(words=words, facts=facts)


def draw_text(rng: np.random.Generator, objects: Sequence[Object]) -> Text:
    """A caption of all or some of a scene's objects, or a phrase or question about one of them."""
    kind = rng.choice(["caption", *TEMPLATES], p=SHARES)
    if kind == "caption":
        count = len(objects) if rng.random() < 0.6 else int(rng.integers(1, len(objects) + 1))
        return caption_of([objects[i] for i in sorted(rng.permutation(len(objects))[:count])])
    return about(str(rng.choice(TEMPLATES[kind])), objects[int(rng.integers(len(objects)))])


def truth(objects: Sequence[Sequence[Object]], texts: Sequence[Text]) -> torch.Tensor:
    """[N, T] bool: which text is true of which scene."""
    shown = _many_hot([facts_of(scene) for scene in objects])
    named = _many_hot([text.facts for text in texts])
    return shown @ named.T == named.sum(1)


def _many_hot(rows: Sequence[frozenset[str]]) -> torch.Tensor:
    hot = torch.zeros(len(rows), len(FACTS))
    for row, facts in zip(hot, rows, strict=True):
        row[[FACTS[fact] for fact in facts]] = 1
    return hot


def text_tokenizer() -> PreTrainedTokenizerFast:
    """The demo's words, `</s>` behind each text and moved to the end of the vocabulary.

    `CLIPTextModel` pools at the first `eos_token_id`, but takes the number 2, the demo's, for the
    mark of an old checkpoint and then pools at the highest id. As the last word, `</s>` is both.
    """
    words = [word for word in vocabulary() if word != "</s>"]
    return PreTrainedTokenizerFast(
        tokenizer_object=word_level([*words, "</s>"], "<s> $A </s>"),
        **MARKS,
        padding_side="right",
        model_max_length=LENGTH,
    )


def new_clip(tower: CLIPVisionModel, words: PreTrainedTokenizerFast) -> CLIPModel:
    """A CLIP whose vision tower is `tower`, frozen, and whose text side is random."""
    text = CLIPTextConfig(
        vocab_size=len(words),
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=LENGTH,
        projection_dim=WIDTH,
        bos_token_id=words.bos_token_id,
        eos_token_id=words.eos_token_id,
        pad_token_id=words.pad_token_id,
    )
    clip = CLIPModel(
        CLIPConfig(
            text_config=text.to_dict(),
            vision_config=tower.config.to_dict(),
            projection_dim=WIDTH,
        )
    )
    clip.float().vision_model.load_state_dict(tower.state_dict())
    clip.vision_model.requires_grad_(False)
    return clip


def demo_tower() -> CLIPVisionModel:
    """The demo model's vision tower with its saved weights, computing in float32."""
    return LlavaForConditionalGeneration.from_pretrained(MODEL).float().model.vision_tower


def pixels(scenes: Sequence[Scene]) -> torch.Tensor:
    """[N, 3, side, side] float32 in -1…1."""
    stacked = np.stack([scene.pixels for scene in scenes]).transpose(0, 3, 1, 2)
    return torch.from_numpy(stacked.astype(np.float32) / 127.5 - 1)


@torch.no_grad()
def look(tower: CLIPVisionModel, split: Split, count: int, seed: int) -> Seen:
    """Draw `count` full scenes and keep what the class token tells of them."""
    rng = np.random.default_rng(seed)
    features, objects = [], []
    for start in range(0, count, LOOK):
        scenes = [make_scene(rng, split) for _ in range(min(LOOK, count - start))]
        features.append(tower(pixels(scenes)).pooler_output)
        objects += [[(item.digit, item.color) for item in scene.items] for scene in scenes]
    return Seen(features=torch.cat(features), objects=objects)


def kept(path: Path, tower: CLIPVisionModel, split: Split, count: int, seed: int) -> Seen:
    """`look`, once for each file."""
    if not path.exists():
        seen = look(tower, split, count, seed)
        torch.save({"features": seen.features, "objects": seen.objects}, path)
    return Seen(**torch.load(path, weights_only=True))


def contrast(scores: torch.Tensor, true: torch.Tensor) -> torch.Tensor:
    """Symmetric cross-entropy of scores [N, T], each row's and column's aim shared by its true
    pairs; every row and column of `true` [N, T] needs one."""

    def one_way(scores: torch.Tensor, true: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(scores, true / true.sum(1, keepdim=True))

    return (one_way(scores, true.float()) + one_way(scores.T, true.T.float())) / 2


def image_space(clip: CLIPModel, features: torch.Tensor) -> torch.Tensor:
    """Features [..., D] behind `post_layernorm`, as unit vectors [..., WIDTH]."""
    return F.normalize(clip.visual_projection(features), dim=-1)


def text_space(
    clip: CLIPModel, words: PreTrainedTokenizerFast, texts: Sequence[Text]
) -> torch.Tensor:
    """Pooled texts as unit vectors [T, WIDTH]."""
    batch = words([text.words for text in texts], padding=True, return_tensors="pt")
    pooled = clip.text_model(**batch).pooler_output
    return F.normalize(clip.text_projection(pooled), dim=-1)


def fit(
    clip: CLIPModel,
    words: PreTrainedTokenizerFast,
    seen: Seen,
    *,
    steps: int,
    batch: int,
    seed: int,
) -> list[float]:
    """Train the text side and both projections; the loss of each step."""
    rng = np.random.default_rng(seed)
    trained = [parameter for parameter in clip.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, betas=(0.9, 0.98), weight_decay=0.01)
    losses = []
    for step in range(steps):
        decay = 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / steps))
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * min(1.0, (step + 1) / 50) * decay
        picked = rng.choice(len(seen.objects), batch, replace=False)
        objects = [seen.objects[index] for index in picked]
        texts = [draw_text(rng, scene) for scene in objects]
        image = image_space(clip, seen.features[picked])
        scores = clip.logit_scale.exp() * image @ text_space(clip, words, texts).T
        loss = contrast(scores, truth(objects, texts))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(float(loss.detach()))
        if (step + 1) % 100 == 0:
            print(f"{step + 1}/{steps} loss {np.mean(losses[-100:]):.4f}", flush=True)
    return losses


@torch.no_grad()
def retrieval(
    clip: CLIPModel, words: PreTrainedTokenizerFast, seen: Seen, among: int = 64
) -> dict[str, float]:
    """Share of scenes whose own caption is the closest of `among`, and the other way round."""
    image = image_space(clip, seen.features).split(among)
    text = text_space(clip, words, [caption_of(scene) for scene in seen.objects]).split(among)
    scores = torch.stack([left @ right.T for left, right in zip(image, text, strict=True)])
    own = torch.arange(among)
    return {
        "scene to caption": (scores.argmax(2) == own).float().mean().item(),
        "caption to scene": (scores.argmax(1) == own).float().mean().item(),
    }


@torch.no_grad()
def presence(clip: CLIPModel, words: PreTrainedTokenizerFast, seen: Seen) -> dict[str, float]:
    """How well a question's closeness to scenes tells those that show what it names: mean AUC."""
    asked = {
        "digit asked for": [about("is there a {digit} ?", (digit, "red")) for digit in range(10)],
        "color asked for": [about("which digit is {color} ?", (0, color)) for color in COLOURS],
    }
    image = image_space(clip, seen.features)
    result = {}
    for name, texts in asked.items():
        scores = text_space(clip, words, texts) @ image.T
        pairs = zip(truth(seen.objects, texts).T, scores, strict=True)
        result[name] = float(np.mean([roc_auc_score(true, score) for true, score in pairs]))
    return result


@torch.no_grad()
def patches(
    clip: CLIPModel, words: PreTrainedTokenizerFast, *, scenes: int, seed: int
) -> dict[str, float]:
    """How well a patch's cosine with a question tells the patches of the object asked about from
    all others and from those of other objects: mean AUC, below 0.5 where they are less alike.

    Only the second says what the text does: objects differ from the ground in one direction for
    any text, so that untrained projections give anything from 0.1 to 0.9 for the first.
    """
    rng = np.random.default_rng(seed)
    measured: defaultdict[str, list[float]] = defaultdict(list)
    for _ in range(scenes):
        scene = make_scene(rng, "heldout")
        hidden = clip.vision_model(pixels([scene]), output_hidden_states=True).hidden_states
        owner = patch_items(scene, PATCH)
        for layer in (-1, -2):
            space = image_space(clip, clip.vision_model.post_layernorm(hidden[layer][0, 1:]))
            for number, item in enumerate(scene.items):
                for template in ("which digit is {color} ?", "where is the {digit} ?"):
                    text = about(template, (item.digit, item.color))
                    cosine = (space @ text_space(clip, words, [text])[0]).numpy()
                    objects, name = owner >= 0, f"layer {layer}, {template}"
                    measured[f"{name}, all"].append(roc_auc_score(owner == number, cosine))
                    if len(scene.items) > 1:
                        asked = owner[objects] == number
                        auc = roc_auc_score(asked, cosine[objects])
                        measured[f"{name}, other objects"].append(auc)
    return {name: float(np.mean(values)) for name, values in measured.items()}


def export(clip: CLIPModel, words: PreTrainedTokenizerFast, folder: Path) -> None:
    """Save as an ordinary bfloat16 checkpoint with its tokenizer."""
    clip.bfloat16().save_pretrained(folder)
    words.save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--work", type=Path, required=True, help="folder for the features and the result"
    )
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    work, seed = arguments.work, arguments.seed
    work.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)
    tower, words = demo_tower().eval(), text_tokenizer()
    train = kept(work / f"train-{seed}.pt", tower, "train", TRAIN_SCENES, seed)
    heldout = kept(work / "heldout.pt", tower, "heldout", HELDOUT_SCENES, 12345)
    clip = new_clip(tower, words)
    fit(clip, words, train, steps=STEPS, batch=BATCH, seed=seed)
    export(clip, words, work / "clip")
    clip = CLIPModel.from_pretrained(work / "clip").float()
    measured = {
        **retrieval(clip, words, heldout),
        **presence(clip, words, heldout),
        **patches(clip, words, scenes=PATCH_SCENES, seed=12345),
    }
    for name, value in measured.items():
        print(f"{name}: {value:.3f}", flush=True)


if __name__ == "__main__":
    main()
