"""Reads decoding rules from `generation_config.json`; says which are not followed. No torch.

`generation_config.json` holds rules, which change the logits of every answer; cuts, which narrow
what is drawn from; and what this engine does not do, which is named. A sampling's own setting wins
over the file's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from trio.engine.request import Sampling
from trio.errors import UserError

FILE = "generation_config.json"
RULES: dict[str, Any] = {
    "sequence_bias": (),
    "encoder_repetition_penalty": 1.0,
    "repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0,
    "bad_words_ids": (),
    "min_length": 0,
    "min_new_tokens": 0,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "remove_invalid_values": False,
    "exponential_decay_length_penalty": (),
    "suppress_tokens": (),
    "begin_suppress_tokens": (),
}
"""What is applied to the logits of every answer, in the order of `generate`, and when it is off."""
CUTS: dict[str, Any] = {"top_k": 0, "top_p": 1.0, "min_p": 0.0}
"""What narrows a draw and may be set for each request, and when it is off."""
OTHER_CUTS: dict[str, Any] = {
    "top_h": None,
    "typical_p": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
}
"""What narrows a draw and stands in the file alone, and when it is off."""
SET_BY_SAMPLING = ("repetition_penalty", "no_repeat_ngram_size", *CUTS)
_UNFOLLOWED: dict[str, Any] = {
    "num_beams": 1,
    "num_return_sequences": 1,
    "guidance_scale": 1.0,
    "max_new_tokens": None,
    "max_length": None,
    "max_time": None,
    "stop_strings": None,
    "penalty_alpha": None,
    "dola_layers": None,
    "constraints": None,
    "force_words_ids": None,
    "token_healing": False,
    "watermarking_config": None,
    "assistant_early_exit": None,
    "prompt_lookup_num_tokens": None,
    "use_mtp": False,
}
"""What changes answers, or how they are computed, and is not done here, and when it is off."""
_OF_BEAMS: dict[str, Any] = {
    "early_stopping": False,
    "length_penalty": 1.0,
    "num_beam_groups": 1,
    "diversity_penalty": 0.0,
}
"""As above, but only where there are beams."""
_WITHOUT_EFFECT = (
    *("do_sample", "temperature", "renormalize_logits"),
    *("eos_token_id", "bos_token_id", "pad_token_id", "decoder_start_token_id"),
    *("use_cache", "cache_implementation", "cache_config", "max_cache_len", "low_memory"),
    *("prefill_chunk_size", "compile_config", "disable_compile", "continuous_batching_config"),
    *("output_attentions", "output_hidden_states", "output_scores", "output_logits"),
    *("return_dict_in_generate", "transformers_version", "is_assistant", "num_assistant_tokens"),
    *("num_assistant_tokens_schedule", "assistant_confidence_threshold", "assistant_lookbehind"),
    *("assistant_ensemble_weight", "max_matching_ngram_size", "speculation_type"),
    "target_lookbehind",
)
"""What changes no greedy answer by itself; do_sample and its temperature are told by hand."""
_KNOWN = frozenset({*RULES, *CUTS, *OTHER_CUTS, *_UNFOLLOWED, *_OF_BEAMS, *_WITHOUT_EFFECT})


@dataclass(frozen=True, kw_only=True, slots=True)
class Rules:
    """A checkpoint's decoding."""

    values: Mapping[str, Any]
    """The rules and cuts that its file sets, without those that are off."""
    unfollowed: tuple[str, ...] = ()
    """What else the file asks for and the engine does not do, each in a few words."""

    @classmethod
    def read(cls, config: Mapping[str, Any]) -> Rules:
        """Of the content of a generation config.

        Raises:
            UserError: a value of a rule that makes no sense.
        """
        ours, told = _set(config, RULES | CUTS | OTHER_CUTS), _unfollowed(config)
        if "min_new_tokens" in ours:
            ours.pop("min_length", None)
        for name in SET_BY_SAMPLING:
            own: dict[str, Any] = {name: ours.get(name)}
            try:
                Sampling(**own)
            except UserError as error:
                if name not in CUTS:  # which greedy answers can do without
                    raise UserError(f"{FILE}: {error}; correct it there") from error
                told.append(str(error))
                del ours[name]
        return cls(values=ours, unfollowed=tuple(told))

    @classmethod
    def of(cls, model: Any) -> Rules:
        """Of a model of transformers."""
        config = getattr(model, "generation_config", None)
        return cls.read({} if config is None else dict(vars(config)))

    def settle(self, sampling: Sampling) -> Sampling:
        """The sampling with nothing left to the checkpoint; cuts only where it draws."""
        off = RULES | CUTS
        names = SET_BY_SAMPLING if sampling.temperature > 0 else SET_BY_SAMPLING[:2]
        left = [name for name in names if getattr(sampling, name) is None]
        return replace(sampling, **{name: self.values.get(name, off[name]) for name in left})

    def for_logits(self, sampling: Sampling) -> dict[str, Any]:
        """What changes the logits of an answer with this settled sampling."""
        merged = {**self.values, **{name: getattr(sampling, name) for name in SET_BY_SAMPLING[:2]}}
        return _set(merged, RULES)

    def for_draws(self, sampling: Sampling) -> dict[str, Any]:
        """What narrows its draws beside the sampling's own cuts."""
        return _set(self.values, OTHER_CUTS) if sampling.temperature > 0 else {}

    @property
    def notice(self) -> str | None:
        """One line about what is not followed; None where that is nothing."""
        return f"{FILE}: not followed: {'; '.join(self.unfollowed)}" if self.unfollowed else None

    def describe(self, sampling: Sampling) -> str:
        """One line: how answers with this sampling are decoded."""
        settled = self.settle(sampling)
        active = self.for_logits(settled) | self.for_draws(settled)
        drawn = f"drawn at temperature {settled.temperature:g}" if settled.temperature else "greedy"
        if settled.temperature:
            active |= _set({name: getattr(settled, name) for name in CUTS}, CUTS)
        whose = {
            name: "given" if getattr(sampling, name, None) is not None else FILE for name in active
        }
        return ", ".join([drawn, *(f"{n} {_short(v)} ({whose[n]})" for n, v in active.items())])


def _set(config: Mapping[str, Any], off: Mapping[str, Any]) -> dict[str, Any]:
    """Those of a config's values that are not off, in the order of `off`."""
    found = {name: config.get(name) for name in off}
    return {
        name: value
        for name, value in found.items()
        if value is not None and not _is_off(value, off[name])
    }


def _is_off(value: Any, off: Any) -> bool:
    return not value if off == () else bool(value == off)


def _unfollowed(config: Mapping[str, Any]) -> list[str]:
    beams = config.get("num_beams") not in (None, 1)
    asked = _set(config, _UNFOLLOWED | (_OF_BEAMS if beams else {}))
    # Of a file that was made from a model's config, what is unknown is that model's own.
    strange = set() if config.get("_from_model_config") else set(config) - _KNOWN
    asked |= {n: config[n] for n in sorted(strange) if config[n] and not n.startswith("_")}
    told = [f"{name} {_short(value)}{_INSTEAD.get(name, '')}" for name, value in asked.items()]
    if config.get("do_sample"):
        temperature = config.get("temperature")
        shown = "" if temperature is None else f" with temperature {_short(temperature)}"
        told.append(f"do_sample{shown} (answers are greedy unless a temperature above 0 is given)")
    return told


_INSTEAD = dict.fromkeys(
    ("max_new_tokens", "max_length"), " (an answer's length is Sampling's or --max-new-tokens)"
)


def _short(value: Any) -> str:
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
