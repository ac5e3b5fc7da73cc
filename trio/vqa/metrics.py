"""Scores of visual question answering, as published evaluators compute them.

Pure functions over texts. The row functions score one answer; `aggregate` gives the figures of a
data set. Names, rules and quirks: trio/vqa/README.md.
"""

from trio.vqa.aggregates import aggregate
from trio.vqa.boxes import box_iou, parse_box
from trio.vqa.caption_scores import bleu, cider, rouge_l
from trio.vqa.caption_tokens import caption_tokens
from trio.vqa.choices import choice_letter, yes_no
from trio.vqa.intervals import wilson_interval
from trio.vqa.objects import objects_in
from trio.vqa.open_answers import (
    anls,
    exact_match,
    normalize_answer,
    ocrbench,
    relaxed_accuracy,
    vqa_accuracy,
)

__all__ = [
    "aggregate",
    "anls",
    "bleu",
    "box_iou",
    "caption_tokens",
    "choice_letter",
    "cider",
    "exact_match",
    "normalize_answer",
    "objects_in",
    "ocrbench",
    "parse_box",
    "relaxed_accuracy",
    "rouge_l",
    "vqa_accuracy",
    "wilson_interval",
    "yes_no",
]
