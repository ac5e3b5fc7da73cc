"""Replay of VisionZip on a CLIP tower: what is seen of one layer, and the tokens made of it.

Shapes: I images of a case, P patches, S tokens of the tower, D its hidden size.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import CLIPVisionConfig, CLIPVisionModel

from tests.conformance.checks import Checks
from tests.conformance.files import Case, Tensors
from trio.encoders.clip_hooks import Watched, hidden_states, watched
from trio.encoders.merging import by_attention
from trio.encoders.visionzip import contextual_groups, visionzip
from trio.errors import UserError

_PREFIX = "vision_model."
"""Of recorded names, where this version of transformers has none."""


def replay(case: Case, recorded: Tensors) -> Checks:
    """Run a recorded case on its own weights and compare every recorded quantity.

    Raises:
        UserError: the case's files or facts cannot be used.
    """
    hidden_ISD, seen = _forward(case, recorded)
    checks = Checks()
    checks.close("hidden_penultimate", hidden_ISD, recorded["hidden_penultimate"])
    checks.close("metric", seen.mean_keys(), recorded["metric"])
    checks.close("cls_attention_sum", seen.class_attention(), recorded["cls_attention_sum"])
    _check_settings(case, checks, *seen.class_attention().shape)
    _check_choice(case, checks, hidden_ISD, seen, recorded)
    return checks


def _tower(case: Case) -> CLIPVisionModel:
    """The case's tower, from its recorded configuration and weights."""
    config, weights = case.model()
    tower = CLIPVisionModel(CLIPVisionConfig(**config))
    named = {name.removeprefix(_PREFIX): tensor for name, tensor in weights.all.items()}
    try:
        missing, unexpected = tower.load_state_dict(named, strict=False)
    except RuntimeError as error:
        what = " ".join(str(error).split())
        raise UserError(f"{weights.path}: does not fit the recorded config ({what})") from error
    if missing or unexpected:
        raise UserError(f"{weights.path}: weights missing {missing}, not known {unexpected}")
    return tower.eval()


def _forward(case: Case, recorded: Tensors) -> tuple[Tensor, Watched]:
    """Hidden states that leave the second-last layer, and the layer, of the case's images."""
    tower, pixels = _tower(case), recorded["pixel_values"]
    layer = tower.config.num_hidden_layers - 2
    with torch.no_grad(), watched(tower, [layer]) as seen:
        (hidden_ISD,) = hidden_states(tower, pixels, [layer])
    return hidden_ISD, seen[layer]


def _check_settings(case: Case, checks: Checks, images: int, patches: int) -> None:
    checks.equal("batch", images, case.fact("batch"))
    checks.equal("num_patches", patches, case.fact("num_patches"))
    checks.equal("top_k", case.fact("dominant") - 1, case.fact("top_k"))
    dominant, contextual = case.fact("dominant"), case.fact("contextual")
    if dominant < 1 or contextual < 1 or dominant + contextual > patches + 1:
        raise UserError(
            f"case {case.name}: {dominant} dominant and {contextual} contextual tokens cannot "
            f"be made of {patches} patches and the class token"
        )


def _check_choice(
    case: Case, checks: Checks, hidden_ISD: Tensor, seen: Watched, recorded: Tensors
) -> None:
    attention_IP, keys_ISE = seen.class_attention(), seen.mean_keys()
    images, patches = attention_IP.shape
    dominant, contextual = case.fact("dominant"), case.fact("contextual")

    # Recorded indices count the class token, as number 0.
    order_IP = by_attention(attention_IP)[:, : dominant - 1]
    checks.equal(
        "all_indices", [[0, *own] for own in (order_IP + 1).tolist()], recorded["all_indices"]
    )

    rest_IP = torch.ones(images, patches, dtype=torch.bool).scatter(1, order_IP, False)
    context = contextual_groups(keys_ISE[:, 1:], rest_IP, [contextual] * images)
    checks.equal(
        "context_target_indices", context.target_IC + 1, recorded["context_target_indices"]
    )
    checks.equal("context_counts", context.group_ICP.sum(dim=2), recorded["context_counts"])
    assigned = [own[:, own.any(dim=0)].int().argmax(dim=0) for own in context.group_ICP]
    checks.equal("context_assignment", assigned, recorded["context_assignment"])

    reduced = visionzip(
        attention_IP, keys_ISE, hidden_ISD, [dominant] * images, [contextual] * images
    )
    sources_IX = reduced.sources_T.view(images, -1)
    kept = [[-1, *sorted(own)] for own in order_IP.tolist()]
    checks.equal("sources", sources_IX[:, :dominant], kept)
    checks.equal("sources", sources_IX[:, dominant:] + 1, recorded["context_target_indices"])
    checks.close(
        "tokens", reduced.tokens_TD.view(images, dominant + contextual, -1), recorded["tokens"]
    )
