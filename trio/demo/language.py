"""The words of the scenes' language, their tokenizer and chat template."""

from __future__ import annotations

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from trio.demo.scenes import CELL_NAMES, COLOURS

SPECIAL = ("<pad>", "<s>", "</s>", "<unk>", "<image>")
WORDS = (
    "user assistant system : , . ? which what where is there are how many digits digit color the "
    "a an and describe image"
)
PARAPHRASES = {
    r"\s+in one sentence\b": "",
    r"\b(photo|photograph|picture)\b": "image",
    r"\bdescribe this\b": "describe the",
    r"\bcolour\b": "color",
}
"""Ways to say in other words what the language can say; what they mean here is the same."""
MARKS = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ message['role'].upper() }}: "
    "{% if message['content'] is string %}{{ message['content'] }} "
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>\n{% else %}{{ part['text'] }} {% endif %}"
    "{% endfor %}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


def vocabulary() -> list[str]:
    """The words of the scenes' language behind the special ones; the index is the id."""
    words = [*WORDS.split(), *map(str, range(10)), *COLOURS, "yes", "no", *CELL_NAMES]
    return list(dict.fromkeys([*SPECIAL, *words]))


def tokenizer() -> PreTrainedTokenizerFast:
    """A word-level tokenizer of the scenes' language; other words become `<unk>`."""
    return PreTrainedTokenizerFast(
        tokenizer_object=word_level(vocabulary(), "<s> $A"),
        **MARKS,
        extra_special_tokens={"image_token": "<image>"},
        padding_side="left",
        model_max_length=2048,
    )


def word_level(words: list[str], template: str) -> Tokenizer:
    """`words` numbered in their order; a text $A with the marks of `template` around it."""
    numbered = {word: index for index, word in enumerate(words)}
    backend = Tokenizer(models.WordLevel(numbered, unk_token="<unk>"))
    plainer = [normalizers.Replace(Regex(said), meant) for said, meant in PARAPHRASES.items()]
    backend.normalizer = normalizers.Sequence([normalizers.Lowercase(), *plainer])
    # A place such as "top-left" is one token: two tokens would need two lookups for one answer.
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\w-]+|[^\w\s-]+"), "removed", invert=True)
    backend.decoder = decoders.WordPiece(prefix="##", cleanup=True)
    marks = [(mark, numbered[mark]) for mark in template.split() if mark in numbered]
    backend.post_processor = processors.TemplateProcessing(single=template, special_tokens=marks)
    return backend
