"""Base class of model families: what engine and patch need of a vision-language model.

Shapes: N visual tokens of one image, D hidden size of the decoder, T packed tokens, A axes of its
positions.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import AutoProcessor

from trio.decoder.decoder import Decoder
from trio.decoder.gpu import sent, without_cudnn
from trio.decoder.unchanged import Unchanged
from trio.errors import UserError
from trio.families.coordinates import WHOLE, Frame
from trio.families.hub_defaults import defaults_of
from trio.families.pixel_tables import finished
from trio.pruning.flops import DecoderShape
from trio.pruning.options import Pruning
from trio.pruning.pruning_config import PruningDefaults
from trio.pruning.schedule import AFTER_ENCODER, LLAVA, ScheduleShape, shape_of

if TYPE_CHECKING:
    from PIL.Image import Image

Inputs = Mapping[str, Any]
"""What an image processor made of some images, as the model takes it."""
Span = tuple[int, int]


Join = Callable[[Tensor], Tensor]
"""From patch tokens of a vision tower, ahead of the projector, to the space that it shares with its
text tower, `[..., P]`."""


@dataclass(frozen=True, slots=True)
class Joint:
    """What the encoder makes of one image, in the space that it shares with its text tower."""

    tokens: Tensor
    """`[M, P]`, patches, tile after tile; after a reduction what is left of them."""
    grids: tuple[tuple[int, int], ...] | None
    """Rows and columns of patches of each tile; None where the tokens stand in no grid."""
    places: Tensor
    """`[N]`, on the CPU, for each visual token of the image its row of `tokens`; -1 for what is no
    patch, as newlines."""


@dataclass(frozen=True, slots=True)
class Layout:
    """How the visual tokens of one image stand in its picture, without a reduction."""

    grids: tuple[tuple[int, int], ...]
    """Rows and columns of its parts, as a view of the whole and one in tiles."""
    places: Tensor
    """`[N]`, on the CPU, for each visual token its place, counted over the grids row by row; -1 for
    what shows no place, as newlines."""


@dataclass(frozen=True, slots=True)
class Features:
    """What the encoder makes of one image."""

    tokens: Tensor
    """`[N, D]`, that stand in the decoder's input."""
    injected: tuple[Tensor, ...] = ()
    """`[N, D]` each; the i-th is added to the hidden states of these tokens that leave layer i of
    the decoder (DeepStack, arXiv 2406.04334). All images of a model have as many."""
    sources: tuple[int | None, ...] = ()
    """After a reduction in the encoder, for each token the one that it stands for, as an index into
    all that the image has without it; None for the tower's class token. Empty where nothing was
    reduced."""
    joint: Joint | None = None
    """The same image as texts see it, if that was asked for."""

    def __len__(self) -> int:
        return len(self.tokens)

    def to(self, like: Tensor) -> Features:
        """On the device of a tensor and in its dtype."""
        injected = tuple(layer.to(like) for layer in self.injected)
        return replace(self, tokens=self.tokens.to(like), injected=injected)


class Adapter(ABC):
    """A vision tower, a projector and a LLaMA-type decoder; changes nothing of the model."""

    text_models: tuple[str, ...]
    """Types of text decoder that the family comes with."""
    default_position_ids = "renumber"
    """What `Pruning.position_ids` None stands for: what the published code does."""
    schedule_shape: ScheduleShape = LLAVA
    """How a retention is spread over the layers, unless the settings say it."""
    processor_class: Any = AutoProcessor
    """Whose `from_pretrained` loads the model's processor."""
    largest_image: tuple[int, int]
    """Width and height, in pixels, of an image that gives as many visual tokens as any can; where
    the model itself sets no bound, of one of a usual size."""
    max_visual_tokens: int
    """No image gives more; a video may."""
    encoders: tuple[str, ...] = ()
    """Reductions in the tower (`Pruning.encoder`) that this model can have."""
    clip_tower: Any = None
    """The vision tower, where it is CLIP's, whose text tower shares a space with it."""
    video_token_id: int | None = None
    """Stands for the tokens of a video in a prompt; None where the family has no videos."""

    def __init__(self, model: Any) -> None:
        text = model.config.text_config.model_type
        if text not in self.text_models:
            raise UserError(
                f"{type(model).__name__} over a {text!r} text decoder is not supported; supported "
                f"are {', '.join(self.text_models)}"
            )
        self.model = model
        self.decoder = self._decoder()
        self._unchanged = Unchanged(model, self.decoder.model, self.decoder.lm_head)
        self.image_token_id: int = model.config.image_token_id

    def _decoder(self) -> Decoder:
        """The text decoder of `self.model` and its output head."""
        text = getattr(getattr(self.model, "model", None), "language_model", None)
        head = getattr(self.model, "lm_head", None)
        if text is None or head is None:
            raise UserError(
                f"a {type(self.model).__name__} is not supported: it has no model.language_model "
                "or no lm_head; give the whole ...ForConditionalGeneration"
            )
        return Decoder(text, head)

    def check_unchanged(self) -> None:
        """Raise UserError if the text decoder or its head has become another since: an adapter put
        on, a quantisation, a module replaced, a hook. Called before every prefill."""
        self._unchanged.check()

    @property
    def planned_visual_tokens(self) -> int:
        """Of `largest_image`."""
        return self.max_visual_tokens

    @staticmethod
    def process_images(processor: Any, images: Sequence[Image], **options: Any) -> list[Inputs]:
        """What the model's processor makes of the RGB images of one prompt.

        Args:
            options: of the processor's call, as `do_normalize=False`.

        Returns:
            For each image its tensors, as `encode_images` takes them, and as `input_ids [1, N]` its
            placeholder in the text.
        """
        return [
            processor(
                images=[image],
                text=[processor.image_token],
                add_special_tokens=False,
                return_tensors="pt",
                **options,
            )
            for image in images
        ]

    @abstractmethod
    def visual_tokens(self, inputs: Inputs) -> list[int]:
        """Visual tokens that the model will make of each image, told without running it."""

    @abstractmethod
    def coordinates(self, inputs: Inputs) -> list[Tensor]:
        """Where in its picture each visual token of each image lies, told without running the
        model: `[N, 2]` on the CPU, as of `trio.families.coordinates`."""

    @staticmethod
    def frame(processor: Any, size: tuple[int, int]) -> Frame | None:
        """What the model's processor makes the model's pictures of, where `boxes` are in a part of
        an image, or in more than it: the rectangle in the image that they count from.

        Args:
            size: the image's width and height.

        Returns:
            None where that is unknown.
        """
        return WHOLE

    def boxes(self, inputs: Inputs) -> list[Tensor]:
        """What each visual token of each image shows, told without running the model: left, top,
        right, bottom, `[N, 4]` on the CPU, in widths and heights of `frame`. NaN for what shows no
        place, as newlines, and for all where the adapter does not say it."""
        return [torch.full((count, 4), torch.nan) for count in self.visual_tokens(inputs)]

    def layouts(self, inputs: Inputs) -> list[Layout]:
        """How the visual tokens of each image stand, told without running the model; asked only by
        methods that need `instruction`."""
        raise NotImplementedError(f"{type(self).__name__}.layouts")

    def video_tokens(self, inputs: Inputs) -> list[int]:
        """Visual tokens that the model will make of each video in a call of it, told without
        running it; asked only where there is a `video_token_id`."""
        raise NotImplementedError(f"{type(self).__name__}.video_tokens")

    @abstractmethod
    def check_inputs(self, inputs: Inputs) -> None:
        """Raise UserError unless the model can take these, of one image."""

    @abstractmethod
    def vision_flops(self, inputs: Inputs) -> int:
        """FLOPs of tower and projector for these images."""

    def reduced_flops(self, inputs: Inputs, encoder: str, keep: int) -> int:
        """FLOPs of tower, reduction and projector for one image of which so many tokens are left;
        asked only for what is in `encoders`."""
        raise NotImplementedError(f"{type(self).__name__}.reduced_flops")

    @abstractmethod
    def _features(self, inputs: Sequence[Inputs]) -> Sequence[Features]:
        """The model's features of images, one in each of `inputs`, in one pass."""

    def _reduced(
        self, inputs: Sequence[Inputs], encoder: str, keeps: Sequence[int], join: Join | None
    ) -> Sequence[Features]:
        """As `_features`, reduced in the tower, or with `Features.joint`, or both; asked only for
        what is in `encoders`, and for `join` where there is a `clip_tower`."""
        raise NotImplementedError(f"{type(self).__name__}._reduced")

    def encode_images(
        self,
        inputs: Sequence[Inputs],
        encoder: str = "none",
        keeps: Sequence[int] = (),
        join: Join | None = None,
    ) -> list[Features]:
        """Visual features, all images in one pass of the tower.

        Args:
            inputs: for each image what `process_images` made of it; pixels may still be uint8, as
                of `trio.families.pixel_tables`.
            encoder: what reduces them in the tower, one of `encoders`, or `none`.
            keeps: for each image the tokens that are to be left; ignored with `none`.
            join: as of the text tower that belongs to `clip_tower`, for `Features.joint`.

        Returns:
            For each image its features in the decoder's dtype and on its device.
        """
        with torch.no_grad(), without_cudnn(self.decoder.device):
            inputs = finished(inputs, self.decoder.device)
            if encoder == "none" and join is None:
                features = self._features(inputs)
            else:
                features = self._reduced(inputs, encoder, keeps, join)
        like = torch.empty(0, dtype=self.decoder.dtype, device=self.decoder.device)
        return [image.to(like) for image in features]

    def injected(self, call: Mapping[str, Any]) -> Sequence[Tensor]:
        """`Features.injected` of all images and videos of a batch, in a call of the model's text
        decoder.

        Returns:
            `[V, D]` each, where V counts the batch's visual tokens, row by row.
        """
        return ()

    def positions(
        self, lengths: Sequence[int], spans: Sequence[Sequence[Span]], inputs: Sequence[Inputs]
    ) -> Tensor | None:
        """Where the tokens of packed prompts with images stand.

        `patch` asks where positions have one axis; those on several it takes from the model, which
        knows videos too.

        Args:
            lengths: tokens of each prompt.
            spans: visual spans of each, in its own coordinates.
            inputs: what the processor made of their images, in order.

        Returns:
            `[A, T]`, on the CPU; None where they are just 0, 1, 2, ... in each prompt.
        """
        return None

    def spans(self, input_ids: Sequence[int] | Tensor, features: Sequence[int]) -> list[Span]:
        """Where each image's placeholder tokens stand in a prompt.

        Args:
            input_ids: the prompt's tokens `[S]`, without padding.
            features: feature count of each of the prompt's images. Placeholders of neighbouring
                images are told apart by it.

        Raises:
            UserError: placeholders and features do not match, with both numbers.
        """
        places = _places(input_ids, self.image_token_id)
        if len(places) != sum(features):
            raise UserError(
                f"prompt has {len(places)} image placeholder tokens but its {len(features)} images "
                f"give {sum(features)} features; use the model's own processor, and one <image> "
                "per image"
            )
        spans = []
        for count, runs in zip(features, _runs(places, features), strict=True):
            if len(runs) > 1:
                raise UserError(
                    f"the {count} placeholder tokens of an image at position {runs[0][0]} are not "
                    "side by side"
                )
            spans += runs
        return spans

    def video_spans(self, input_ids: Sequence[int] | Tensor, features: Sequence[int]) -> list[Span]:
        """Where videos' placeholder tokens stand in a prompt: one span of each video, or several
        where something stands between its frames, as their times do in some families.

        Args:
            input_ids: the prompt's tokens `[S]`, without padding.
            features: feature count of each of the prompt's videos.

        Raises:
            UserError: placeholders and features do not match, with both numbers.
        """
        assert self.video_token_id is not None
        places = _places(input_ids, self.video_token_id)
        if len(places) != sum(features):
            raise UserError(
                f"prompt has {len(places)} video placeholder tokens but its {len(features)} videos "
                f"give {sum(features)} features; use the model's own processor"
            )
        return [span for runs in _runs(places, features) for span in runs]

    def embed(self, input_ids: Tensor, features: Sequence[Features]) -> Tensor:
        """Decoder input of packed prompts.

        Args:
            input_ids: `[T]`, prompts back to back, on the host: what is looked up here is then no
                reason to wait for a device.
            features: visual features of all their images in order.

        Returns:
            `[T, D]`: text embeddings, with features in the place of placeholders.

        Raises:
            UserError: placeholders and features do not match, with both numbers.
        """
        is_image_T = input_ids.cpu() == self.image_token_id
        place_N = is_image_T.nonzero()[:, 0]
        count = sum(len(image) for image in features)
        if len(place_N) != count:
            raise UserError(
                f"prompts have {len(place_N)} image placeholder tokens but their images give "
                f"{count} features"
            )
        both = torch.cat((input_ids.cpu().masked_fill(is_image_T, 0), place_N))
        ids_T, place_N = sent(both, self.decoder.device).split([len(input_ids), count])
        embeds_TD = self.decoder.embed(ids_T)
        if not features:
            return embeds_TD
        packed_ND = torch.cat([image.tokens for image in features]).to(embeds_TD)
        return embeds_TD.index_copy_(0, place_N, packed_ND)

    def shape(self) -> DecoderShape:
        """The decoder's size, for counting its cost."""
        text = self.model.config.text_config
        return DecoderShape.of_config(text, normed_keys=self.decoder.normed_keys)

    @cached_property
    def pruning_defaults(self) -> PruningDefaults:
        """Of the model's checkpoint.

        Raises:
            UserError: its file is broken.
        """
        return defaults_of(self.model)

    def settle(self, pruning: Pruning) -> Pruning:
        """The settings with the checkpoint's defaults, else the family's and those built in, where
        they leave something open.

        Raises:
            UserError: an image of this model cannot be pruned as they say.
        """
        if pruning.encoder not in ("none", *self.encoders):
            there = ", ".join(("none", *self.encoders))
            raise UserError(
                f"encoder {pruning.encoder} is not available for this {type(self.model).__name__}; "
                f"there is: {there}"
            )
        pruning = self.pruning_defaults.fill(pruning)
        usual = self.schedule_shape if pruning.encoder == "none" else AFTER_ENCODER
        settled = replace(
            pruning,
            encoder=pruning.encoder if pruning.active else "none",
            position_ids=pruning.position_ids or self.default_position_ids,
            schedule_shape=shape_of(pruning.schedule_shape, usual),
        )
        settled.stages(self.max_visual_tokens, self.decoder.num_layers)
        return settled


class ImageOnly:
    """Comes before a class of processors: those without their part for videos, which cannot do
    without torchvision."""

    @classmethod
    def get_attributes(cls) -> list[str]:
        own: Any = super()
        return [name for name in own.get_attributes() if name != "video_processor"]


def _places(input_ids: Sequence[int] | Tensor, token_id: int) -> list[int]:
    tokens = input_ids.tolist() if isinstance(input_ids, Tensor) else input_ids
    return [place for place, token in enumerate(tokens) if token == token_id]


def _runs(places: Sequence[int], counts: Sequence[int]) -> list[list[Span]]:
    """So many of the places for each count, those side by side as one span."""
    left = iter(places)
    found: list[list[Span]] = []
    for count in counts:
        runs: list[Span] = []
        for place in islice(left, count):
            if runs and runs[-1][1] == place:
                runs[-1] = (runs[-1][0], place + 1)
            else:
                runs.append((place, place + 1))
        found.append(runs)
    return found


def joined(features: Sequence[Features]) -> list[Tensor]:
    """`Features.injected` of many images one behind another, `[V, D]` each."""
    layers = zip(*(image.injected for image in features), strict=True)
    return [torch.cat(layer) for layer in layers]


def check_pixels(inputs: Inputs, shape: list[int]) -> None:
    """Raise UserError unless an image's `pixel_values` are of the shape that the model takes."""
    given = list(tensor_of(inputs, "pixel_values").shape)
    if given != shape:
        raise UserError(
            f"pixel_values of an image have shape {given}, and the model takes {shape}; use the "
            "model's own processor"
        )


def tensor_of(inputs: Inputs, name: str) -> Tensor:
    """One of the tensors; a UserError if it is not there."""
    tensor = inputs.get(name)
    if tensor is None:
        kind = "videos" if "video" in name else "images"
        raise UserError(
            f"{kind} without {name}; pass on all that the model's own processor returns"
        )
    return tensor
