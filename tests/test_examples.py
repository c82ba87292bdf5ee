"""Every way in has a script, and each runs as it stands, in a fresh process."""

import pathlib
import re

import fresh
import pytest

EXAMPLES = pathlib.Path(__file__).parents[1] / "examples"
# The script, and what it is to print.
SAID = {
    "one_line": ["by_rows", "same to the last bit: True"],
    "context_manager": ["BlockMap", "share of the last block"],
    "your_own_module": ["recognised: softmax of a product", "asked for", "same to the last bit: True"],
    "environment_variable": ["logits (1, 1500, 512)", "by_rows"],
    "last_token": ["forward pass", "one row of weights", "never held", "of 2048 tokens"],
    "retrieval_heads": ["retrieval heads (score at least 0.5): 3.0, 3.1, 3.2, 3.3", "4 others removed"],
    "where_it_looks": ["of 20 answers are right", "the strongest tile of layer 1 lies on the square"],
    "heat_maps": ["4 held-out captions", "all words of a shape", "dit_steps.png", "unet_steps.png"],
}


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    "name",
    [
        # These take most of a minute; ``test_shapes`` looks at what the models of ``heat_maps`` draw.
        pytest.param(
            name,
            marks=[pytest.mark.long] if name in ("heat_maps", "retrieval_heads", "where_it_looks") else [],
        )
        for name in SAID
    ],
)
def test_example(name, tmp_path):
    done = fresh.run(EXAMPLES / f"{name}.py", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for words in SAID[name]:
        assert words in done.stdout, done.stdout
    assert "same to the last bit: False" not in done.stdout
    # One answer differs between processors.
    for right, asked in re.findall(r"(\d+) of (\d+) answers are right", done.stdout):
        assert int(right) >= int(asked) - 1
