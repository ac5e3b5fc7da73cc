"""What the items of --compare stand for."""

import pytest

from trio.errors import UserError
from trio.job.comparing.compared import compared, read_compared, settings_compared
from trio.job.settings import made_of
from trio.pruning.options import Pruning

BASE = Pruning(retention=0.5, method="cdpruner", method_options="a=1", fill_up="reference", seed=7)


@pytest.mark.parametrize(
    ("item", "name", "chosen"),
    [
        ("1", "unpruned", ("none", "none", 1.0)),
        ("1.0", "unpruned", ("none", "none", 1.0)),
        ("given", "cdpruner 1/2", ("none", "cdpruner", 0.5)),
        ("1/3", "cdpruner 1/3", ("none", "cdpruner", 1 / 3)),
        ("0.1234567", "cdpruner 0.1235", ("none", "cdpruner", 0.1234567)),
        ("fastv:1/9", "fastv 1/9", ("none", "fastv", 1 / 9)),
        ("cdpruner:1/9", "cdpruner 1/9", ("none", "cdpruner", 1 / 9)),
        ("visionzip:0.25", "visionzip 1/4", ("visionzip", "none", 0.25)),
        ("visionzip+trio:1/9", "visionzip + trio 1/9", ("visionzip", "trio", 1 / 9)),
        ("none+fastv:1/9", "fastv 1/9", ("none", "fastv", 1 / 9)),
        (
            "tests.pruning.longest:Longest:1/4",
            "tests.pruning.longest:Longest 1/4",
            ("none", "tests.pruning.longest:Longest", 0.25),
        ),
    ],
)
def test_an_item(item: str, name: str, chosen: tuple[str, str, float]) -> None:
    found = compared(item, BASE)
    pruning = found.pruning
    assert (found.name, (pruning.encoder, pruning.method, pruning.retention)) == (name, chosen)
    assert (pruning.fill_up, pruning.seed, pruning.schedule) == ("reference", 7, None)
    assert pruning.active == (name != "unpruned")
    kept = item in {"given", "1/3", "0.1234567"}
    assert (pruning.method_options is not None) == kept, "options are those of one method"


@pytest.mark.parametrize(
    ("item", "says"),
    [
        ("", "'': expected a number"),
        ("fastv", "'fastv': expected a number, got 'fastv'; write RETENTION, METHOD:RETENTION"),
        ("0", "'0': "),
        ("1.5", "'1.5': "),
        ("-1/9", "'-1/9': "),
        ("fastv:", "'fastv:': "),
        ("fastv:1", "'fastv:1': at retention 1 nothing is chosen; write 1"),
        ("fast:1/9", "method must be one of trio, none"),
        ("zip+trio:1/9", "'zip+trio:1/9': encoders are "),
        ("none:1/9", "'none:1/9': encoders are "),
        (":1/9", "method must be one of trio, none"),
    ],
)
def test_what_is_no_item(item: str, says: str) -> None:
    with pytest.raises(UserError) as raised:
        compared(item, BASE)
    assert str(raised.value).startswith(says) and "\n" not in str(raised.value)


def test_settings_keep_their_order() -> None:
    found = settings_compared(["1/9", "given", "1"], BASE)
    assert [one.name for one in found] == ["cdpruner 1/9", "cdpruner 1/2", "unpruned"]


@pytest.mark.parametrize(
    ("items", "says"),
    [
        (["1"], "compare 1"),
        (["1/9", "1/3"], "compare 1"),
        (["1", "1"], "unpruned stands twice"),
        (["1", "1/3", "2/6"], "cdpruner 1/3 stands twice"),
        (["1", "1/2", "given"], "cdpruner 1/2 stands twice"),
    ],
)
def test_what_is_no_comparison(items: list[str], says: str) -> None:
    with pytest.raises(UserError, match=says):
        settings_compared(items, BASE)


@pytest.mark.parametrize("value", ["1, 1/3,given", ["1", "1/3", "given"], [1, "1/3", "given"]])
def test_text_and_lists_say_the_same(value: object) -> None:
    assert read_compared(value) == ("1", "1/3", "given")


@pytest.mark.parametrize(
    ("flags", "names"),
    [
        ({"retention": 1 / 9}, ["unpruned", "trio 1/2", "trio 1/9"]),
        ({"method": "fastv", "retention": 1 / 2}, ["unpruned", "trio 1/2", "fastv 1/2"]),
    ],
)
def test_items_clash_only_as_the_other_flags_have_it(
    flags: dict[str, object], names: list[str]
) -> None:
    items = read_compared("1,trio:1/2,given")
    assert [one.name for one in made_of(compare=items, **flags).compared] == names
    with pytest.raises(UserError, match="trio 1/2 stands twice"):
        _ = made_of(compare=read_compared("1,1/2,trio:1/2")).compared


@pytest.mark.parametrize("value", ["", "1", "1/9", "1,,1/9", 3, {"a": 1}, [], "1,1.0"])
def test_values_that_compare_nothing(value: object) -> None:
    with pytest.raises(UserError):
        read_compared(value)


@pytest.mark.parametrize("base", [Pruning(), Pruning(method="fastv"), Pruning(encoder="visionzip")])
def test_given_whose_retention_is_open_prunes(base: Pruning) -> None:
    found = settings_compared(["1", "given"], base)
    assert [one.name for one in found] == ["unpruned", base.name] and found[1].pruning is base


def test_given_that_prunes_nothing_is_the_unpruned_model() -> None:
    for base in (Pruning(retention=1.0), Pruning(method="none")):
        assert settings_compared(["given", "trio:1/9"], base)[0].name == "unpruned"
        with pytest.raises(UserError, match="unpruned stands twice"):
            settings_compared(["1", "given"], base)


def test_a_retention_that_nothing_chooses_by_is_refused() -> None:
    with pytest.raises(UserError, match="method none chooses nothing"):
        settings_compared(["1", "1/9"], Pruning(method="none"))


@pytest.mark.parametrize(
    ("base", "item"),
    [
        (Pruning(schedule="0:9", method="divprune", proxy_layer="previous"), "1"),
        (Pruning(schedule="0:9", method="divprune", proxy_layer="previous"), "fastv:1/9"),
        (Pruning(schedule="0:96,16:32", encoder="visionzip"), "divprune:1/9"),
        (Pruning(schedule="1:9"), "visionzip+trio:1/9"),
    ],
)
def test_a_given_schedule_binds_no_other_item(base: Pruning, item: str) -> None:
    assert compared("given", base).name == f"{base.name} {base.schedule}"
    assert compared(item, base).pruning.schedule is None


def test_a_number_is_read_as_papers_write_it() -> None:
    names = [compared(item, BASE).name for item in ("2/9", "0.3333333333", "0.64", "1/64", "1/65")]
    shares = [name.removeprefix("cdpruner ") for name in names]
    assert shares == ["2/9", "1/3", "16/25", "1/64", "0.01538"]


def test_one_setting_without_a_comparison() -> None:
    (one,) = made_of(retention=0.25, seed=3).compared
    assert (one.name, one.pruning) == ("trio", Pruning(retention=0.25, seed=3))
