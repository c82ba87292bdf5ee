"""The environment variables: runs a script that does not mention attnpatch, unchanged.

    python examples/environment_variable.py

This file runs ``ATTNPATCH=1 ATTNPATCH_MIN_FREE=900GB ATTNPATCH_REPORT=1 python script.py``. If attnpatch is on the path
but not installed, there is no start-up file that reads the variables; then it runs ``attnpatch run script.py``, which
does the same.
"""

import importlib.util
import os
import pathlib
import subprocess
import sys
import tempfile

SCRIPT = """
import torch
from transformers import LlamaConfig, LlamaForCausalLM

torch.manual_seed(0)
model = LlamaForCausalLM(LlamaConfig(
    vocab_size=512, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
    attn_implementation="eager",
)).eval()
with torch.no_grad():
    print("logits", tuple(model(torch.randint(0, 512, (1, 1500))).logits.shape))
"""

with tempfile.TemporaryDirectory() as folder:
    script = pathlib.Path(folder, "script.py")
    script.write_text(SCRIPT)
    variables = {"ATTNPATCH": "1", "ATTNPATCH_MIN_FREE": "900GB", "ATTNPATCH_REPORT": "1"}
    is_installed = importlib.util.find_spec("attnpatch_boot") is not None
    launcher = [] if is_installed else ["-m", "attnpatch", "run"]
    done = subprocess.run(
        [sys.executable, *launcher, str(script)],
        env=os.environ | variables,
        capture_output=True,
        text=True,
        check=True,
    )
print(done.stdout + done.stderr)
