"""The text side of a CLIP checkpoint, for a model whose vision tower was taken from it.

EADP (arXiv 2607.02484) compares visual tokens with the prompt in CLIP's joint space. A LLaVA
checkpoint has the vision tower alone; the text tower and the projections of both into that space
lie in the CLIP checkpoint that the tower came from, and mean nothing for another tower.

As in the public code of EADP: patch tokens are the hidden states that the model itself selects,
through the tower's last norm and the visual projection; text tokens are the text tower's last
hidden states, normed, through the text projection; a text as a whole is its end token.

Shapes: N patch tokens, D hidden size of the vision tower, P size of the joint space, M chunks of a
text, L tokens the text tower takes at most.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, CLIPModel

from trio.decoder.weights import check_unquantised
from trio.errors import UserError, explaining
from trio.pruning.method import Text

_SIZES = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "image_size",
    "patch_size",
)
_TOLERANCE = 0.01
_CURE = (
    "give the CLIP checkpoint that the vision tower was taken from, for LLaVA-1.5 "
    "openai/clip-vit-large-patch14-336"
)


class TextTower:
    """Text tower, and the projections of patch and text tokens into the joint space."""

    def __init__(self, clip: Any, tokenizer: Any) -> None:
        """clip: a `CLIPModel` on its device; its vision layers are not kept."""
        self._text_model = clip.text_model
        self._text_projection = clip.text_projection
        self._norm = clip.vision_model.post_layernorm
        self._visual_projection = clip.visual_projection
        self._tokenizer = tokenizer
        self._context = clip.config.text_config.max_position_embeddings

    @classmethod
    def load(
        cls,
        source: str,
        vision_tower: Any,
        *,
        device: str | torch.device,
        dtype: torch.dtype,
        revision: str | None = None,
        tolerance: float = _TOLERANCE,
    ) -> TextTower:
        """The text side that belongs to a vision tower.

        Args:
            source: directory or hub id of a CLIP checkpoint, with safetensors.
            vision_tower: `CLIPVisionModel` of the model whose tokens are pruned.
            device: where text is embedded and patch tokens are projected.
            dtype: of that.
            revision: of a hub id.
            tolerance: largest difference of a weight matrix from the tower's, as a share of its
                norm. Rounding to bfloat16 makes 0.002; a tower that was trained on has more.

        Raises:
            UserError: nothing usable there, or it does not belong to the tower.
        """
        revision = revision or "main"
        config = _config(source, revision)
        _check_sizes(source, config.vision_config, vision_tower)
        tokenizer = _tokenizer(source, config.text_config, revision)
        clip = _model(source, config, dtype, revision)
        _check_weights(source, clip.vision_model, vision_tower, tolerance)
        return cls(clip.to(device).eval(), tokenizer)

    @torch.no_grad()
    def project(self, hidden_ND: Tensor) -> Tensor:
        """Patch tokens in the joint space, `[N, P]`, in the dtype of the projections.

        Args:
            hidden_ND: as the model selects them of its vision tower, ahead of its projector.
        """
        weight = self._visual_projection.weight
        return self._visual_projection(self._norm(hidden_ND.to(weight.device, weight.dtype)))

    @torch.no_grad()
    def embed(self, texts: Sequence[str]) -> list[Text]:
        """Texts in the joint space.

        The mask is the paper's, whose dense scores leave out the end token, as that is the text as
        a whole; and padding, and the begin token, which sees no other and is the same in every
        text. The public code counts all three: there take no mask. It also cuts a long text
        without a begin and an end for every chunk, so that what it pools of most chunks is their
        first token; here each chunk is a text of its own.

        Every chunk is padded to the context of the text tower, with token 0 as in the public code,
        so that no text's embedding depends on what else is embedded.
        """
        if not texts:
            return []
        chunks = [self._chunks(text) for text in texts]
        ids = [own for of_text in chunks for own in of_text]
        length_M = torch.tensor([len(own) for own in ids])
        place_L = torch.arange(self._context)
        there_ML = place_L < length_M[:, None]
        mask_CL = (place_L > 0) & (place_L < length_M[:, None] - 1)
        ids_ML = torch.zeros(there_ML.shape, dtype=torch.long)
        ids_ML[there_ML] = torch.tensor([token for own in ids for token in own])
        device = self._text_projection.weight.device
        hidden_MLH = self._text_model(
            input_ids=ids_ML.to(device), attention_mask=there_ML.long().to(device)
        ).last_hidden_state
        tokens_CLP = self._text_projection(hidden_MLH)
        pooled_CP = tokens_CLP[torch.arange(len(ids)), length_M - 1]
        bounds = pairwise(accumulate((len(of_text) for of_text in chunks), initial=0))
        return [
            Text(tokens_CLP[first:last], mask_CL[first:last], pooled_CP[first:last])
            for first, last in bounds
        ]

    def flops(self, text: str, tokens: int) -> int:
        """Multiplications with additions of embedding a text and projecting so many patch tokens;
        the comparison of the two is small beside that."""
        layers = self._text_model.encoder.layers
        weights = sum(weight.numel() for weight in layers.parameters() if weight.ndim == 2)
        width, space = self._text_projection.in_features, self._text_projection.out_features
        attention = 2 * self._context * width * len(layers)
        chunk = self._context * (weights + attention + width * space)
        projection = self._visual_projection.in_features * self._visual_projection.out_features
        return len(self._chunks(text)) * chunk + tokens * projection

    def _chunks(self, text: str) -> list[list[int]]:
        """Token ids, each chunk between the tokens of begin and end."""
        tokenizer = self._tokenizer
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        room = self._context - 2
        pieces = [ids[first : first + room] for first in range(0, max(1, len(ids)), room)]
        return [[tokenizer.bos_token_id, *own, tokenizer.eos_token_id] for own in pieces]


def _explaining(what: str, source: str) -> AbstractContextManager[None]:
    return explaining(f"{what} of the text tower {source!r}", cure=f"; {_CURE}")


def _config(source: str, revision: str) -> Any:
    with _explaining("config.json", source):
        config = AutoConfig.from_pretrained(source, trust_remote_code=False, revision=revision)
    if config.model_type != "clip":
        raise UserError(
            f"the text tower {source!r} is a {config.model_type!r} checkpoint and no 'clip'; "
            f"{_CURE}"
        )
    check_unquantised(config, repr(source))
    return config


def _check_sizes(source: str, config: Any, vision_tower: Any) -> None:
    own = vision_tower.config
    if own.model_type != config.model_type:
        raise UserError(
            f"no text tower goes with a {own.model_type!r} vision tower, only with one of CLIP; "
            "choose a pruning method without a text tower"
        )
    other = [
        f"{name} {getattr(config, name)} instead of {getattr(own, name)}"
        for name in _SIZES
        if getattr(config, name) != getattr(own, name)
    ]
    if other:
        raise UserError(
            f"the text tower {source!r} belongs to another vision tower than the model's: "
            f"{', '.join(other)}; {_CURE}"
        )


def _tokenizer(source: str, config: Any, revision: str) -> Any:
    with _explaining("the tokenizer", source):
        tokenizer = AutoTokenizer.from_pretrained(
            source, trust_remote_code=False, revision=revision
        )
    # Without its files transformers makes a tokenizer that knows special tokens only.
    words = len(tokenizer) - len(tokenizer.all_special_ids)
    named = tokenizer.bos_token_id is not None and tokenizer.eos_token_id is not None
    if words < 1 or not named or len(tokenizer) > config.vocab_size:
        raise UserError(
            f"the tokenizer of the text tower {source!r} is missing or another's: it knows "
            f"{len(tokenizer)} tokens and the tower {config.vocab_size}; save it beside the weights"
        )
    return tokenizer


def _model(source: str, config: Any, dtype: torch.dtype, revision: str) -> Any:
    with _explaining("the weights", source):
        found: Any = CLIPModel.from_pretrained(
            source,
            config=config,
            dtype=dtype,
            use_safetensors=True,
            output_loading_info=True,
            revision=revision,
        )
    clip, info = found
    missing = sorted(info["missing_keys"])
    if missing:
        raise UserError(
            f"the text tower {source!r} is incomplete: its weights lack {missing[0]} and "
            f"{len(missing) - 1} more; {_CURE}"
        )
    return clip


def _check_weights(source: str, own: Any, vision_tower: Any, tolerance: float) -> None:
    middle = len(own.encoder.layers) // 2
    for name in (
        "embeddings.patch_embedding.weight",
        "embeddings.position_embedding.weight",
        f"encoder.layers.{middle}.self_attn.q_proj.weight",
        f"encoder.layers.{middle}.mlp.fc1.weight",
    ):
        theirs = vision_tower.get_parameter(name).detach()
        mine = own.get_parameter(name).detach().to(theirs.device).float()
        apart = float((mine - theirs.float()).norm() / mine.norm())
        if not apart <= tolerance:  # also true of NaN
            raise UserError(
                f"the text tower {source!r} belongs to another vision tower than the model's: "
                f"{name} differs by {apart:.3f} of its norm, more than {tolerance}; {_CURE}"
            )
