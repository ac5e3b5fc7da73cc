"""Right or wrong."""

import pytest

from trio.job.output.scoring import exact_match, is_caption, normalise, object_share, objects

CAPTION = "a red 7 , a blue 3 and a green 5"


@pytest.mark.parametrize(
    ("response", "answer", "right"),
    [
        ("7", "7", True),
        (" Yes. ", "yes", True),
        ("The top  left!", "top left", True),
        ("a red 7, a blue 3 and a green 5 .", CAPTION, True),
        ("a blue 3 , a red 7 and a green 5", CAPTION, False),
        ("3.14", "314", False),
        ("3.14.", "3.14", True),
        ("", "no", False),
        ("no", "not", False),
        ("a.", "A", True),
        ("", "A", False),
        ("the", "A", False),
    ],
)
def test_exact_match(response: str, answer: str, right: bool) -> None:
    assert exact_match(response, ["something else", answer]) is right


def test_normalise_keeps_articles_inside_words() -> None:
    assert normalise("The theatre, an area") == "theatre area"


@pytest.mark.parametrize(
    ("response", "share"),
    [
        (CAPTION, 1.0),
        ("a green 5 , a red 7 and a blue 3", 1.0),
        ("a red 7 and a blue 3", 2 / 3),
        ("a red 7 , a blue 3 , a green 5 and a red 7", 3 / 4),
        ("a blue 7 and a red 3", 0.0),
        ("", 0.0),
    ],
)
def test_object_share(response: str, share: float) -> None:
    assert object_share(response, [CAPTION]) == pytest.approx(share)


def test_the_best_answer_counts() -> None:
    assert object_share("a cat", ["a dog", "a cat and a dog"]) == 0.5
    assert object_share("a cat", []) == 0.0


def test_objects_lose_articles_and_keep_counts() -> None:
    assert objects("A red 7, the red 7 and an old hat.") == {"red 7": 2, "old hat": 1}


def test_captions_are_told_from_short_answers() -> None:
    assert is_caption([CAPTION]) and is_caption(["a purple 1"])
    assert not any(is_caption([a]) for a in ("7", "yes", "top left", "white", "bottom"))
