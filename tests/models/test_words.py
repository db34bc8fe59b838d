"""What the embedded model doesn't understand is told, and every example uses words that it does."""

from __future__ import annotations

import json
import re
import shutil
import sys

import pytest
from helpers import OTHER_PROMPT, ROOT, SIZE, read_json

from step_skip.models.embedded import warn_of_embedded, word_warnings
from step_skip.models.weights import TINY_DIR, LoadOptions

TINY = LoadOptions("tiny", "cpu", "float32")
SIZES = {"width": 96, "height": 96, "num_frames": 17}


@pytest.mark.parametrize(
    ("prompt", "sizes", "words"),
    [
        (
            "she nods nicely",
            SIZES,
            ['doesn\'t know "nods", "nicely"', "try: moves to the left"],
        ),
        ("she speaks " * 8, SIZES, ["reads 15 words", "has 16", "try:"]),
        ("x y z u v w q", SIZES, ['"x", "y", "z", "u", "v" and 2 others']),
        ("she speaks", SIZES | {"width": 128}, ["trained for 96 x 96 pixels, 17 frames, not 128 x 96"]),
        ("she nods", SIZES | {"num_frames": 33}, ['"nods"', "not 96 x 96 pixels, 33 frames"]),
    ],
)
def test_one_line_says_what_is_not_understood(caplog, prompt, sizes, words):
    warn_of_embedded(TINY, [prompt], sizes)
    [message] = caplog.messages
    assert all(word in message for word in words), message


def test_what_it_was_trained_on_is_not_warned_of(caplog):
    sys.path.insert(0, str(TINY_DIR))
    try:
        import world
    finally:
        sys.path.pop(0)
    wordings = [phrase for kinds in world.WORDINGS.values() for kind in kinds for phrase in kind]
    warn_of_embedded(TINY, ["", *wordings, "The character. Speaks."], SIZES)
    assert not caplog.messages
    motions = read_json(TINY_DIR / "config.json")["motions"]
    known = {phrase: motion for motion, kinds in world.WORDINGS.items() for phrase in kinds[0]}
    assert [known[motion] for motion in motions] == list(world.WORDINGS)  # one of each, all trained on


def test_other_models_are_left_alone(caplog):
    warn_of_embedded(LoadOptions("I2V-480P", "cuda", "bfloat16"), ["She nods nicely."], SIZES)
    assert not caplog.messages


def test_both_scripts_say_so_once(generate, run, image, model_dir, tmp_path):
    folder = shutil.copytree(model_dir, tmp_path / "model")
    config = read_json(folder / "config.json") | {"motions": ["speaks"]}
    (folder / "config.json").write_text(json.dumps(config))
    flags = ("--model_dir", folder)
    made = generate("--image", image, "--prompt", "he nods", "--num_inference_steps", 2, *flags)
    assert made.err.count("may not follow this prompt") == 1
    assert '"nods"; try: speaks' in made.err
    assert f"{SIZE} x {SIZE}" not in made.err
    prompts = ("--prompt", "he nods", "he waves", "he speaks", OTHER_PROMPT)
    sweep = run("infer_from_prior", "--prior_dir", made.path, *flags, "--num_steps", 1, *prompts)
    [line] = [line for line in sweep.err.splitlines() if "may not follow this prompt" in line]
    assert line.startswith("warning: ") and '"waves"' in line and "nods" not in line  # its prior was told of


def test_every_example_uses_words_it_knows():
    texts = [path.read_text() for path in (ROOT / "README.md", ROOT / "Makefile", *ROOT.glob("docs/*.md"))]
    texts += [path.read_text() for path in (*ROOT.glob("*.py"), *ROOT.glob("step_skip/cli/*.py"))]  # --help
    examples = set()
    for text in texts:
        after = re.findall(r'prompt"?[ =:]+((?:"[^"\n]+"[ \\\n]*)+)', text)
        examples |= {prompt for words in after for prompt in re.findall(r'"([^"]+)"', words)}
    examples -= {"..."}
    assert {"she stays still", "she moves to the left", "she speaks", "She tilts her head."} <= examples
    assert word_warnings(TINY_DIR, examples, most=15) == []
