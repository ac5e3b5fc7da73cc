import copy
import inspect
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlavaForConditionalGeneration
from transformers.cache_utils import DynamicCache

import trio
from tests.patching.prompts import pad, rows, run
from tests.tiny.llava import IMAGE_TOKEN_ID, tiny_llava
from trio.decoder.cache_argument import CACHE, cache_of
from trio.errors import UserError
from trio.patching.cache import ragged_layers

PRUNING = trio.Pruning(schedule="1:20,2:6")
OFF = [trio.Pruning(retention=1), trio.Pruning(schedule="1:5", method="none"), trio.Pruning()]


@pytest.fixture
def model() -> Any:
    return tiny_llava(layers=4)


def anatomy(model: Any) -> dict[str, dict[str, Any]]:
    """Everything that hangs on the model's modules and configs, by identity."""
    parts = {}
    for name, module in model.named_modules():
        parts[name] = dict(vars(module))
        for table in ("_parameters", "_buffers", "_modules", "_forward_hooks"):
            parts[f"{name}/{table}"] = dict(vars(module)[table])
    for config in (model.config, model.config.text_config, model.generation_config):
        parts[f"config {id(config)}"] = copy.deepcopy(vars(config))
    return parts


def assert_untouched(model: Any, before: dict[str, dict[str, Any]]) -> None:
    after = anatomy(model)
    assert after.keys() == before.keys()
    for name, attributes in before.items():
        assert after[name].keys() == attributes.keys(), name
        if name.startswith("config"):
            continue
        changed = [key for key in attributes if after[name][key] is not attributes[key]]
        assert not changed, f"{name}: {changed}"
    configs = [name for name in before if name.startswith("config")]
    for name in configs:
        assert repr(after[name]) == repr(before[name])


@pytest.mark.parametrize("pruning", OFF, ids=str)
def test_without_pruning_everything_is_bit_equal(model: Any, pruning: trio.Pruning) -> None:
    singles = rows(model, [1, 2, 0])
    batches = [singles[0], pad(singles, "left"), pad(singles, "right")]
    everything = {"output_hidden_states": True, "output_attentions": False, "use_cache": False}
    beams = {"num_beams": 3, "num_return_sequences": 2}

    def results() -> list[torch.Tensor]:
        found = [tensor for batch in batches for tensor in run(model, batch)[:2]]
        found += [model.generate(**batch, max_new_tokens=4, **beams) for batch in batches]
        direct = model(**batches[1], labels=batches[1]["input_ids"], **everything)
        return [*found, direct.loss, direct.logits, *direct.hidden_states]

    before = results()
    lookup = run(model, batches[0], prompt_lookup_num_tokens=2, pad_token_id=0)[0]
    trio.patch(model, pruning)
    assert all(map(torch.equal, results(), before))
    assert torch.equal(
        run(model, batches[0], prompt_lookup_num_tokens=2, pad_token_id=0)[0], lookup
    )


def test_unpatch_leaves_no_trace(model: Any) -> None:
    (single,) = rows(model, [1])
    before_tokens, before_logits, _ = run(model, single)
    before, state = anatomy(model), copy.deepcopy(model.state_dict())
    assert trio.patch(model, PRUNING) is model
    pruned = run(model, single)[1]
    trio.patch(model, trio.Pruning(retention=0.9))
    run(model, single, num_beams=2)
    assert trio.unpatch(model) is model
    assert_untouched(model, before)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    after_tokens, after_logits, cache = run(model, single)
    assert torch.equal(after_tokens, before_tokens)
    assert torch.equal(after_logits, before_logits)
    assert not ragged_layers(cache)
    assert not torch.allclose(pruned, before_logits, atol=1e-3)


def test_only_the_instance_changes(model: Any) -> None:
    other = tiny_llava(layers=4)
    (single,) = rows(model, [1])
    wanted = run(other, single)[1]
    classes = {type(module): dict(vars(type(module))) for module in model.modules()}
    trio.patch(model, PRUNING)
    run(model, single)
    assert torch.equal(run(other, single)[1], wanted)
    assert all(dict(vars(kind)) == attributes for kind, attributes in classes.items())
    assert type(model) is LlavaForConditionalGeneration


def test_text_only_calls_run_as_before(model: Any) -> None:
    texts = pad(rows(model, [0, 0]), "left")
    asked = {"output_hidden_states": True, "labels": texts["input_ids"]}
    wanted, direct = run(model, texts), model(**texts, **asked)
    trio.patch(model, PRUNING)
    got = run(model, texts)
    assert torch.equal(got[1], wanted[1])
    assert not ragged_layers(got[2])
    assert torch.equal(model(**texts, **asked).loss, direct.loss)


def through_pickle(model: Any) -> Any:
    """transformers' own output hooks are local functions, so they go first; a call renews them."""
    for module in model.modules():
        module._forward_hooks.clear()
        vars(module).pop("_output_capturing_hooks_installed", None)
    return pickle.loads(pickle.dumps(model))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, through_pickle])
def test_a_copy_is_patched_by_itself(model: Any, duplicate: Callable[[Any], Any]) -> None:
    (single,) = rows(model, [1])
    before, patched = duplicate(model), duplicate(trio.patch(model, PRUNING))
    after = duplicate(trio.unpatch(model))
    unpruned, pruned = run(model, single)[1], run(trio.patch(model, PRUNING), single)[1]
    assert torch.equal(run(before, single)[1], unpruned)
    assert torch.equal(run(after, single)[1], unpruned)
    assert torch.equal(run(patched, single)[1], pruned)
    with torch.no_grad():
        patched.lm_head.weight.zero_()
        model.lm_head.weight.mul_(2.0)
    assert run(patched, single)[1].abs().max() == 0
    torch.testing.assert_close(run(model, single)[1][:, 0], 2 * pruned[:, 0])
    trio.unpatch(patched)
    torch.testing.assert_close(run(model, single)[1][:, 0], 2 * pruned[:, 0])


def test_a_patched_model_is_saved_like_any_other(model: Any, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "plain")
    trio.patch(model, PRUNING)
    run(model, rows(model, [1])[0])
    model.save_pretrained(tmp_path / "patched")
    names = sorted(path.name for path in (tmp_path / "plain").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "patched").iterdir())
    for name in names:
        read = [(tmp_path / kind / name).read_bytes() for kind in ("plain", "patched")]
        assert read[0] == read[1], name


def test_a_hook_on_the_instance_stays(model: Any) -> None:
    """accelerate puts its hooks where we put ours: into `forward` of the instance."""
    (single,) = rows(model, [1])
    wanted = run(trio.patch(model, PRUNING), single)[1]
    trio.unpatch(model)
    calls = []
    inner = model.forward

    def hooked(*args: Any, **kwargs: Any) -> Any:
        calls.append(kwargs)
        return inner(*args, **kwargs)

    hooked.__wrapped__ = inner  # type: ignore[attr-defined]
    model.forward = hooked
    trio.patch(model, PRUNING)
    assert torch.equal(run(model, single)[1], wanted)
    assert len(calls) == 6
    trio.unpatch(model)
    assert model.forward is hooked
    trio.patch(model, PRUNING)
    model.generate = lambda **kwargs: None
    with pytest.raises(UserError, match="put over"):
        trio.unpatch(model)


def test_signatures_stay(model: Any) -> None:
    before = [inspect.signature(method) for method in (model.forward, model.generate)]
    trio.patch(model, PRUNING)
    assert [inspect.signature(method) for method in (model.forward, model.generate)] == before


def test_torch_compile_runs_the_patched_model(model: Any) -> None:
    (single,) = rows(model, [1])
    trio.patch(model, PRUNING)
    wanted = model(**single, logits_to_keep=1).logits
    compiled = torch.compile(model, backend="eager")
    torch.testing.assert_close(compiled(**single, logits_to_keep=1).logits, wanted)


def test_direct_calls_decode_as_generate_does(model: Any) -> None:
    (single,) = rows(model, [1])
    trio.patch(model, PRUNING)
    tokens, logits, _ = run(model, single)
    out = model(single["input_ids"], single["pixel_values"], logits_to_keep=1)
    for step in range(4):
        assert out.logits.shape == (1, 1, 80)
        torch.testing.assert_close(out.logits[:, 0], logits[:, step])
        out = model(tokens[:, step, None], **{CACHE: cache_of(out)})
    flat = model(**single, logits_to_keep=1, return_dict=False)
    torch.testing.assert_close(flat[0][:, 0], logits[:, 0])


REFUSED: dict[str, dict[str, Any]] = {
    "labels": {"labels": torch.zeros(1, 5).long()},
    "logits_to_keep": {"logits_to_keep": 0},
    "use_cache": {"use_cache": False},
    "output_attentions": {"output_attentions": True},
    "output_hidden_states": {"output_hidden_states": True},
    "attention_mask": {"attention_mask": torch.ones(1, 1, 5, 5)},
    "position_ids": {"position_ids": torch.full((1, 1), 7)},
}


@pytest.mark.parametrize("named", REFUSED)
def test_calls_that_cannot_be_pruned_say_so(model: Any, named: str) -> None:
    (single,) = rows(model, [1])
    trio.patch(model, PRUNING)
    call: dict[str, Any] = {**single, "logits_to_keep": 1, **REFUSED[named]}
    with pytest.raises(UserError, match=f"{named}.*unpatch"):
        model(**call)
    trio.unpatch(model)


def test_generate_options_that_cannot_be_pruned_say_so(model: Any) -> None:
    (single,) = rows(model, [1])
    trio.patch(model, PRUNING)
    embeds = model.get_input_embeddings()(single["input_ids"])
    options: dict[str, dict[str, Any]] = {
        "DynamicCache": {"cache_implementation": "static"},
        "prefill_chunk_size": {"prefill_chunk_size": 16},
        "prompt_lookup_num_tokens": {"prompt_lookup_num_tokens": 2},
        "use_cache": {"use_cache": False},
        "inputs_embeds": {"inputs_embeds": embeds},
        "output_attentions": {"output_attentions": True, "return_dict_in_generate": True},
    }
    for named, option in options.items():
        with pytest.raises(UserError, match=named):
            model.generate(**single, max_new_tokens=8, do_sample=False, **option)
    model.generation_config.prefill_chunk_size = 16
    with pytest.raises(UserError, match="prefill_chunk_size"):
        model.generate(**single)


def test_caches_that_do_not_fit_the_call(model: Any) -> None:
    one, text = rows(model, [1, 0])
    two = pad([one, one], "left")
    unpruned = DynamicCache()
    run(model, text, cache=unpruned)
    trio.patch(model, PRUNING)
    longer = {**one, "input_ids": torch.cat([text["input_ids"], one["input_ids"]], dim=1)}
    longer["attention_mask"] = torch.ones_like(longer["input_ids"])
    with pytest.raises(UserError, match="filled cache"):
        run(model, longer, cache=unpruned)
    cache = run(model, one)[2]
    with pytest.raises(UserError, match="holds 1 rows and the call brings 2"):
        model(torch.ones(2, 1).long(), **{CACHE: cache})
    trio.unpatch(model)
    with pytest.raises(UserError, match="pruned prompt"):
        model(torch.ones(1, 1).long(), **{CACHE: cache})
    assert run(model, two)[0].shape == (2, 6)


def test_a_failed_prefill_leaves_the_cache_empty(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    (single,) = rows(model, [1])
    trio.patch(model, PRUNING)
    wanted = run(model, single)[1]
    config = vars(model.config.text_config).copy()
    cache = DynamicCache()

    def broken(*args: Any) -> None:
        raise RuntimeError("no memory")

    with monkeypatch.context() as patched:
        patched.setattr(model.model.language_model.layers[2].mlp, "forward", broken)
        with pytest.raises(RuntimeError, match="no memory"):
            run(model, single, cache=cache)
    assert cache.get_seq_length() == 0
    assert not ragged_layers(cache)
    assert vars(model.config.text_config) == config
    assert torch.equal(run(model, single, cache=cache)[1], wanted)


def test_wrong_models_and_settings_say_so(model: Any) -> None:
    (single,) = rows(model, [1])
    before = anatomy(model)
    with pytest.raises(UserError, match="not patched"):
        trio.unpatch(model)
    with pytest.raises(UserError, match="not supported"):
        trio.patch(model.model.language_model, PRUNING)
    with pytest.raises(UserError, match="not supported"):
        trio.patch(torch.nn.Linear(2, 2), PRUNING)
    with pytest.raises(UserError, match=r"trio\.Pruning"):
        trio.patch(model, 0.1)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"eadp .* trio\.Engine"):
        trio.patch(model, trio.Pruning(retention=0.3, method="eadp"))
    for wrong in (trio.Pruning(retention=0.01), trio.Pruning(schedule="9:5")):
        with pytest.raises(UserError):
            trio.patch(model, wrong)
    assert_untouched(model, before)
    trio.patch(model, PRUNING)
    wanted = run(model, single)[1]
    with pytest.raises(UserError, match="out of reach"):
        trio.patch(model, trio.Pruning(retention=0.01))
    assert torch.equal(run(model, single)[1], wanted)
    trio.unpatch(model)
    with pytest.raises(UserError, match="not patched"):
        trio.unpatch(model)


def test_a_row_of_padding_alone(model: Any) -> None:
    batch = pad(rows(model, [1, 0]), "left")
    batch["attention_mask"][1] = 0
    trio.patch(model, PRUNING)
    with pytest.raises(UserError, match=r"row 1 .* padding"):
        run(model, batch)


def test_embeddings_that_hold_images_are_refused_and_those_of_text_are_not(model: Any) -> None:
    """Right away as in a chat that goes on; padding may be anything."""
    one, text = rows(model, [1, 0])
    table = model.get_input_embeddings()
    embeds = table(text["input_ids"])
    wanted = run(model, text)
    trio.patch(model, PRUNING)
    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    padded = torch.cat([torch.full_like(embeds[:, :2], 0.5), embeds], dim=1)
    mask = torch.ones(padded.shape[:2]).long().index_fill(1, torch.arange(2), 0)
    for given in (
        {"inputs_embeds": embeds},
        {"inputs_embeds": embeds, "input_ids": text["input_ids"]},
        {"inputs_embeds": padded, "attention_mask": mask},
    ):
        got = model.generate(**given, **options)
        assert torch.equal(got[:, -6:], wanted[0])

    merged = table(one["input_ids"]).masked_fill((one["input_ids"] == IMAGE_TOKEN_ID)[..., None], 1)
    for call in (model, model.generate):
        with pytest.raises(UserError, match=r"inputs_embeds with 64 vectors.*unpatch"):
            call(inputs_embeds=merged)
    with pytest.raises(UserError, match="inputs_embeds beside input_ids with placeholders"):
        model.generate(inputs_embeds=merged, input_ids=one["input_ids"])
    filled = run(model, one)[2]
    with pytest.raises(UserError, match="inputs_embeds with 64 vectors"):
        model(inputs_embeds=merged, **{CACHE: filled})
    trio.patch(model, trio.Pruning())
    assert model(inputs_embeds=merged).logits.shape[1] == merged.shape[1]
