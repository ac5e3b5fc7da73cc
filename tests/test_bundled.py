"""The bundled model by its name, the prompts it knows, and its images as files."""

import logging
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import trio
from trio import bundled
from trio.demo.scenes import COLOURS, make_scene, questions
from trio.engine.loading import load_outline, load_processor
from trio.errors import UserError


def test_every_question_of_the_training_is_known_and_nothing_else() -> None:
    rng = np.random.default_rng(3)
    asked = {q.prompt for _ in range(200) for q in questions(rng, make_scene(rng, "train"))}
    assert len(asked) == 2 + len(COLOURS) + 3 * 10
    assert not bundled.unknown_prompts(asked)
    assert tuple(COLOURS) == bundled.COLORS


@pytest.mark.parametrize(
    ("prompt", "known"),
    [
        ("Describe the image in one sentence.", True),
        ("  describe this PHOTO .", True),
        ("What colour is the 7?", True),
        ("Describe the image", False),
        ("What is this?", False),
        ("is there a 12 ?", False),
        ("what is there ?", False),
        ("", False),
    ],
)
def test_prompts_are_told_apart_as_the_model_reads_them(prompt: str, known: bool) -> None:
    assert bundled.unknown_prompts([prompt, prompt]) == ([] if known else [prompt])
    line = bundled.prompts_notice([prompt, "Describe the image."])
    assert (line is None) if known else line is not None and "\n" not in line
    assert known or all(each in str(line) for each in bundled.PROMPTS)


def test_the_name_means_the_bundled_model_also_beside_a_directory_of_that_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("demo").mkdir()
    with pytest.warns(UserWarning, match=r"comes with the package; .* give \./demo"):
        engine = trio.Engine.from_pretrained("demo", device="cpu")
    assert engine.memory_plan.request_bytes > 0
    assert load_outline("demo")[0].config.text_config.vocab_size == 56
    assert load_processor("demo").tokenizer.name_or_path == str(bundled.MODEL)
    with pytest.raises(UserError, match=r"no config\.json"):
        trio.Engine.from_pretrained("./demo")


def test_the_engine_says_once_that_a_prompt_was_not_taught(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.WARNING, logger="trio"):
        engine = trio.Engine.from_pretrained("demo", device="cpu")
        image = Image.new("RGB", (192, 192))
        for prompt in ("Is there a 7?", "What is this?", "Who is this?"):
            engine.submit(trio.Request(prompt=prompt, images=(image,)))
    (line,) = [text for text in caplog.messages if "was not taught" in text]
    assert "'What is this?'" in line


def test_images_are_written_as_files_under_their_names(tmp_path: Path) -> None:
    files = bundled.write_images(tmp_path / "new", 3)
    assert [file.name for file in files] == [f"scene-000{n}.jpg" for n in range(3)]
    assert {Image.open(file).size for file in files} == {(192, 192)}
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be written"):
        bundled.write_images(tmp_path / "file")
