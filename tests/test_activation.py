"""Activation by ``ATTNPATCH=1`` and by ``attnpatch run``: real interpreters, a fresh virtual environment, a built wheel."""

import dataclasses
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import sysconfig
import venv

import pytest

from attnpatch.activation import settings
from attnpatch.activation.settings import Settings
from attnpatch.cli.policy_options import OPTIONS
from attnpatch.errors import PolicyError
from attnpatch.policy import TEXTS, Policy

# One worker makes the environment and runs them all.
pytestmark = pytest.mark.xdist_group("activation")

ROOT = pathlib.Path(__file__).parents[1]
SEEN = "import sys; print(*sorted({'attnpatch', 'torch', 'wrapt'} & {name.split('.')[0] for name in sys.modules}))"


class Environment:
    """A virtual environment that sees the packages of this one, but not its start-up files."""

    def __init__(self, folder):
        self.folder = folder
        venv.create(folder, with_pip=False, symlinks=os.name != "nt")
        self.bin = folder / ("Scripts" if os.name == "nt" else "bin")
        self.python = self.bin / "python"
        paths = {"base": str(folder), "platbase": str(folder)}
        self.site = pathlib.Path(sysconfig.get_path("purelib", "venv", paths))
        # A plain line adds a folder without reading the start-up files in it. Read before attnpatch.pth.
        (self.site / "_parent.pth").write_text(sysconfig.get_path("purelib") + "\n")
        self.before = self.files()

    def pip(self, *arguments):
        command = [
            sys.executable,
            "-m",
            "pip",
            "--python",
            str(self.python),
            "--disable-pip-version-check",
            *arguments,
        ]
        subprocess.run(command, check=True, capture_output=True, timeout=120)

    def files(self):
        return {
            str(path.relative_to(self.folder))
            for path in self.folder.rglob("*")
            if path.is_file() and "__pycache__" not in path.parts
        }

    def run(self, *arguments, cwd, command=None, **variables):
        clean = {
            name: value for name, value in os.environ.items() if not name.startswith(("ATTNPATCH", "PYTHON"))
        }
        clean |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "COLUMNS": "100", **variables}
        command = [str(self.python)] if command is None else command
        return subprocess.run(
            [*command, *map(str, arguments)], cwd=cwd, env=clean, capture_output=True, text=True, timeout=240
        )


@pytest.fixture(scope="session")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "-q",
        "-w",
        folder,
        ROOT,
    ]
    subprocess.run(command, check=True, timeout=120)
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="session")
def shared(tmp_path_factory, wheel):
    environment = Environment(tmp_path_factory.mktemp("shared"))
    environment.pip("install", "--no-deps", "--no-index", wheel)
    return environment


@pytest.fixture
def own(tmp_path, wheel):
    environment = Environment(tmp_path / "venv")
    environment.pip("install", "--no-deps", "--no-index", wheel)
    return environment


def lines(text):
    return text.splitlines()


# ------------------------------------------------------------------------------------ when nothing is asked for


@pytest.mark.parametrize(
    ("arguments", "variables"),
    [
        ([], {}),
        ([], {"ATTNPATCH": ""}),
        ([], {"ATTNPATCH": "0"}),
        ([], {"ATTNPATCH": "0", "ATTNPATCH_MIN_FREE": "2gigs", "ATTNPATCH_NONSENSE": "1"}),
        (["-I"], {"ATTNPATCH": "1", "ATTNPATCH_MODE": "x"}),
        (["-E"], {"ATTNPATCH": "1"}),
        (["-S"], {"ATTNPATCH": "1"}),
    ],
)
def test_nothing_happens(shared, tmp_path, arguments, variables):
    done = shared.run(*arguments, "-c", SEEN, cwd=tmp_path, **variables)
    assert (done.returncode, done.stdout, done.stderr) == (0, "\n", "")


def test_active_and_nothing_heavy_is_imported(shared, tmp_path):
    done = shared.run("-c", SEEN, cwd=tmp_path, ATTNPATCH="1", ATTNPATCH_REPORT="1", ATTNPATCH_CAPTURE="maps")
    assert (done.returncode, done.stdout, done.stderr) == (0, "attnpatch wrapt\n", "")
    assert list((tmp_path / "maps").iterdir()) == []


# ------------------------------------------------------------------------------------------------ strict parsing

BAD = {
    "ATTNPATCH": ("yes", "1 or 0"),
    "ATTNPATCH_MODE": ("sometimes", "auto, always or never"),
    "ATTNPATCH_MIN_TOKENS": ("1_024", "a whole number such as 1024"),
    "ATTNPATCH_MIN_FREE": ("2gigs", "a size such as 2GB, 512MiB or a number of bytes (at least 10000)"),
    "ATTNPATCH_HEADROOM": ("1.5", "a share above 0 and at most 1"),
    "ATTNPATCH_MAX_ALLOCATION": ("0", "above 0, or none"),
    "ATTNPATCH_WORKSPACE": ("0", "above 0, or none"),
    "ATTNPATCH_ROWS": ("0", "a whole number of at least 1, or none"),
    "ATTNPATCH_HEADS": ("-1", "a whole number of at least 1, or none"),
    "ATTNPATCH_RETRY_ON_OOM": ("true", "1 or 0"),
    "ATTNPATCH_FUSE": ("yes", "1 or 0"),
    "ATTNPATCH_REPLACE_KERNELS": ("true", "1 or 0"),
    "ATTNPATCH_REPORT": ("yes", "1 or 0"),
    "ATTNPATCH_CAPTURE": ("script.py", "a folder that can be written to"),
    "ATTNPATCH_BLOCKS": ("0", "a whole number of tokens of at least 1"),
    "ATTNPATCH_MODULES": ("vggt.VGGT", "classes such as package.module:Class, with commas between them"),
    "ATTNPATCH_SITES": ("a..b c", "auto, registered, or paths and patterns such as model.layers.*.self_attn"),
    "ATTNPATCH_QUIET": ("yes", "1 or 0"),
    "ATTNPATCH_FREE_MEMORY": ("lots", "a size such as 2GB"),
    "ATTNPATCH_MIN_FRE": ("8GB", "did you mean ATTNPATCH_MIN_FREE?"),
}
# The two lists above and below cannot drift apart: every variable there is has its bad value.
assert set(BAD) == {"ATTNPATCH", "ATTNPATCH_MIN_FRE", *settings.KNOWN}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_value_stops_with_one_line(shared, tmp_path, name):
    value, accepted = BAD[name]
    (tmp_path / "script.py").write_text("print('ran')")
    done = shared.run("script.py", cwd=tmp_path, **{"ATTNPATCH": "1", name: value})
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = lines(done.stderr)
    assert line.startswith(f"attnpatch: {name}") and accepted in line
    assert value in line or "did you mean" in line


def test_classes_and_sites_are_lists():
    given = {"ATTNPATCH_MODULES": "vggt.models:VGGT, __main__:Net.Inner", "ATTNPATCH_QUIET": "1"}
    for text, sites in {"auto": "auto", "a.*.b,c[01]": ("a.*.b", "c[01]")}.items():
        found = Settings.of_environment({**given, "ATTNPATCH_SITES": text})
        assert found == Settings(modules=("vggt.models:VGGT", "__main__:Net.Inner"), sites=sites, quiet=True)
    for name, text in {"ATTNPATCH_MODULES": "a.b:C,", "ATTNPATCH_SITES": "a,,b"}.items():
        with pytest.raises(PolicyError, match=re.escape(f"{name}={text!r} is not accepted; give ")):
            Settings.of_environment({name: text})


def test_an_empty_value_counts_as_not_set():
    given = dict.fromkeys(settings.KNOWN, "")
    assert Settings.of_environment(given) == Settings()


GOOD = {
    "mode": ("always", "always"),
    "min_tokens": ("0", 0),
    "min_free": ("512MiB", "512MiB"),
    "headroom": (".25", 0.25),
    "max_allocation": ("4GiB", "4GiB"),
    "workspace": ("64MB", "64MB"),
    "rows": ("7", 7),
    "heads": ("2", 2),
    "retry_on_oom": ("0", False),
    "fuse": ("1", True),
    "replace_kernels": ("1", True),
}
# Of fused attention the results are not the same to the last bit.
EXACT = GOOD | {"fuse": ("0", False)}


def test_every_field_has_a_written_form():
    fields = [field.name for field in dataclasses.fields(Policy)]
    assert list(TEXTS) == list(OPTIONS) == fields == list(GOOD)
    texts = {field: (f"{field}=", text) for field, (text, _) in GOOD.items()}
    assert Policy.of_texts(texts) == Policy(**{field: value for field, (_, value) in GOOD.items()})
    for field in ("max_allocation", "workspace", "rows", "heads"):
        assert getattr(Policy.of_texts({field: ("", "none")}), field) is None


@pytest.mark.parametrize("text", ["", " 5", "+5", "1e3", "٣", "5\n", "None"])
def test_numbers_are_plain_digits(text):
    for field in ("min_tokens", "rows", "heads"):
        with pytest.raises(
            PolicyError, match=re.escape(f"--x {text!r} is not accepted; give a whole number")
        ):
            Policy.of_texts({field: ("--x ", text)})


# ------------------------------------------------------------------------------------------------------ the routes

SCRIPT = """
import json, sys, torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, pipeline

names = ["<unknown>", "<pad>", "<end>", *(f"w{i}" for i in range(3, 97))]
words = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="<unknown>"))
words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<end>")
config = LlamaConfig(
    vocab_size=97, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=512, attn_implementation="eager", pad_token_id=1, eos_token_id=2,
)
torch.manual_seed(0)
ids = torch.randint(5, 97, (1, 40))
made = {"class": LlamaForCausalLM(config).eval(), "from_config": AutoModelForCausalLM.from_config(config).eval()}
made["class"].save_pretrained("saved")
tokenizer.save_pretrained("saved")
made["from_pretrained"] = AutoModelForCausalLM.from_pretrained("saved")
made["pipeline"] = (pipe := pipeline("text-generation", "saved")).model
results = {}
with torch.no_grad():
    for name, model in made.items():
        results[name] = model(ids).logits.double().sum().item()
    results["text"] = pipe(" ".join(f"w{i}" for i in ids[0].tolist()), max_new_tokens=9, do_sample=False)[0]["generated_text"]
never = LlamaForCausalLM(config)
facts = {"results": results, "modules": sorted(m for m in sys.modules if m.split(".")[0] == "attnpatch")}
if facts["modules"]:
    import attnpatch
    facts["policies"] = {name: repr(attnpatch.report(model).policy) for name, model in made.items()}
    facts["by_rows"] = {name: attnpatch.report(model).totals["by_rows"] for name, model in made.items()}
    with attnpatch.capture(made["class"], blocks=attnpatch.Blocks.fixed(16)) as maps:
        made["class"](ids)
    maps.block_map.save("mine.safetensors")
print(json.dumps(facts))
"""


@pytest.fixture(scope="session")
def routes(shared, tmp_path_factory):
    """The script without activation and with it: facts, stderr, and the folder of the second."""
    found = []
    active = {f"ATTNPATCH_{field.upper()}": text for field, (text, _) in EXACT.items()}
    active |= {
        "ATTNPATCH": "1",
        "ATTNPATCH_REPORT": "1",
        "ATTNPATCH_CAPTURE": "maps",
        "ATTNPATCH_BLOCKS": "16",
    }
    for variables in ({}, active):
        folder = tmp_path_factory.mktemp("routes")
        (folder / "script.py").write_text(SCRIPT)
        done = shared.run("script.py", cwd=folder, **variables)
        assert done.returncode == 0, done.stderr
        found.append((json.loads(done.stdout), done.stderr, folder))
    return found


def test_every_route_is_patched_with_the_policy(routes):
    (plain, _, _), (facts, _, _) = routes
    assert plain["modules"] == []
    expected = repr(Policy(**{field: value for field, (_, value) in EXACT.items()}))
    assert facts["policies"] == dict.fromkeys(
        ("class", "from_config", "from_pretrained", "pipeline"), expected
    )
    assert all(count >= 2 for count in facts["by_rows"].values())


def test_results_are_the_same(routes):
    (plain, _, _), (facts, _, _) = routes
    assert facts["results"] == plain["results"]


def test_the_report_at_exit(routes):
    said = routes[1][1]
    assert said.count("LlamaForCausalLM: Policy(mode='always', min_tokens=0,") == 4
    assert said.count("model.layers.1.self_attn") == 4
    tail = [line for line in lines(said) if line.startswith("attnpatch: ") and "Policy" not in line]
    maps = routes[1][2] / "maps"
    assert tail == [
        "attnpatch: active; patched LlamaForCausalLM x4 (2 attention modules each)",
        "attnpatch: 1 model built and never called: LlamaForCausalLM",
        f"attnpatch: 5 sequences captured in {maps}",
    ]


def test_the_captured_files(routes):
    from attnpatch import BlockMap

    folder = routes[1][2]
    files = sorted(path.name for path in (folder / "maps").iterdir())
    assert files == [f"000{n}.safetensors" for n in (1, 2, 3, 4, 5)]
    mine, theirs = BlockMap.load(folder / "mine.safetensors"), BlockMap.load(folder / "maps" / files[0])
    assert mine.mass.equal(theirs.mass) and mine.query_labels == theirs.query_labels
    tokens = [BlockMap.load(folder / "maps" / name).metadata["tokens"] for name in files]
    assert tokens == [40, 40, 40, 40, 48]


# ----------------------------------------------------------------------------------------------- installed or not

HOOKED = "import sys; print('attnpatch.activation.session' in sys.modules)"


def test_a_failure_of_ours_does_not_stop_the_interpreter(own, tmp_path):
    for broken in (
        "attnpatch/activation/start.py",
        "attnpatch/policy.py",
        "attnpatch/hosts/building.py",
        "attnpatch",
    ):
        target = own.site / broken
        if target.is_dir():
            shutil.rmtree(target)
        else:
            target.write_text(f"raise ValueError({broken!r}\n + '\\nsecond line')\n")
        done = own.run("-c", "print('ran')", cwd=tmp_path, ATTNPATCH="1")
        assert (done.returncode, done.stdout) == (0, "ran\n")
        (line,) = lines(done.stderr)
        assert line.startswith("attnpatch: not active: ")


def test_a_failure_later_leaves_the_models_as_they_are(own, tmp_path):
    (own.site / "attnpatch/patching/patch.py").write_text("this is no Python\n")
    (tmp_path / "script.py").write_text(
        "from transformers import BertConfig, BertModel\n"
        "model = BertModel(BertConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=2,"
        " intermediate_size=8))\n"
        "print(type(model).__name__, [n for n in vars(model) if 'attnpatch' in n])"
    )
    done = own.run("script.py", cwd=tmp_path, ATTNPATCH="1", ATTNPATCH_REPORT="1")
    assert (done.returncode, done.stdout) == (0, "BertModel []\n")
    first, second = lines(done.stderr)
    assert first.startswith("attnpatch: BertModel is left as it is: SyntaxError")
    assert second.startswith("attnpatch: no report: SyntaxError") or "1 model could not be patched" in second


def test_uninstalled_leaves_nothing(own, tmp_path):
    added = own.files() - own.before
    assert {pathlib.Path(name).name for name in added} >= {
        "attnpatch.pth",
        "attnpatch.start",
        "attnpatch_boot.py",
    }
    assert own.run("-c", HOOKED, cwd=tmp_path, ATTNPATCH="1").stdout == "True\n"
    own.pip("uninstall", "-y", "attnpatch")
    assert own.files() == own.before
    done = own.run("-c", HOOKED, cwd=tmp_path, ATTNPATCH="1")
    assert (done.returncode, done.stdout, done.stderr) == (0, "False\n", "")


def test_editable(tmp_path):
    own = Environment(tmp_path / "venv")
    own.pip("install", "--no-deps", "--no-index", "--no-build-isolation", "-e", ROOT)
    assert own.run("-c", HOOKED, cwd=tmp_path, ATTNPATCH="1").stdout == "True\n"
    assert own.run("-c", SEEN, cwd=tmp_path).stdout == "\n"
    own.pip("uninstall", "-y", "attnpatch")
    assert own.files() == own.before


def test_both_start_up_files_name_the_boot_module(own):
    assert (own.site / "attnpatch.start").read_text() == "attnpatch_boot:start\n"
    (line,) = lines((own.site / "attnpatch.pth").read_text())
    assert line == 'import os; "ATTNPATCH" in os.environ and __import__("attnpatch_boot").start()'


# --------------------------------------------------------------------------------------------------- attnpatch run

ECHO = """
import argparse, json, multiprocessing, os, sys

def child(queue):
    queue.put(["attnpatch.activation.session" in sys.modules, __name__])

if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--min-free")
    parser.add_argument("--fail")
    parser.add_argument("--spawn", action="store_true")
    parser.add_argument("rest", nargs="*")
    options = parser.parse_args()
    said = {"prog": parser.prog, "argv": sys.argv, "file": __file__, "path": sys.path[0], "main": __name__,
            "spec": getattr(__spec__, "name", None), "active": "attnpatch.activation.session" in sys.modules,
            "boot on path": any("attnpatch" in p and p.endswith("boot") for p in sys.path)}
    if said["active"]:
        session = sys.modules["attnpatch.activation.session"]._session
        said["policy"] = repr(session.settings.policy)
        said["settings"] = [getattr(session.settings, name) for name in ("report", "blocks", "modules", "sites", "quiet")]
    if options.spawn:
        context = multiprocessing.get_context("spawn")
        queue = context.SimpleQueue()
        process = context.Process(target=child, args=(queue,))
        process.start()
        said["child"] = queue.get()
        process.join()
    print(json.dumps(said))
    if options.fail == "raise":
        raise ValueError("mine")
    if options.fail:
        sys.exit(int(options.fail))
"""


@pytest.fixture(params=["start-up file", "no start-up file"])
def runner(request, shared, tmp_path):
    """Runs the console script: as installed, and as from a checkout in an environment without it."""
    (tmp_path / "echo.py").write_text(ECHO)
    if request.param == "start-up file":
        environment, command = shared, [str(shared.bin / "attnpatch")]
    else:
        environment = Environment(tmp_path / "venv")
        code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from attnpatch.__main__ import main; main()"
        command = [str(environment.python), "-c", code]
    return lambda *arguments, **variables: environment.run(
        *arguments, cwd=tmp_path, command=command, **variables
    )


def test_run_is_as_without(runner, shared, tmp_path):
    arguments = ["echo.py", "--min-free", "3", "--spawn", "--", "-m", "--report"]
    options = [f"{OPTIONS[field]}={text}" for field, (text, _) in GOOD.items()]
    own = [
        "--report",
        "--capture",
        "maps",
        "--blocks",
        "32",
        "--modules",
        "a.b:Net,c:D",
        "--sites",
        "layers.*.attn, x",
        "--quiet",
    ]
    done = runner("run", *options, *own, *arguments)
    plain = json.loads(shared.run(*arguments, cwd=tmp_path).stdout)
    said = json.loads(done.stdout)
    assert said.pop("policy") == repr(Policy(**{field: value for field, (_, value) in GOOD.items()}))
    assert said.pop("settings") == [True, 32, ["a.b:Net", "c:D"], ["layers.*.attn", "x"], True]
    assert (said.pop("active"), plain.pop("active")) == (True, False)
    assert (said.pop("child"), plain.pop("child")) == ([True, "__mp_main__"], [False, "__mp_main__"])
    assert said == plain
    assert plain["argv"] == ["echo.py", "--min-free", "3", "--spawn", "--", "-m", "--report"]
    assert (done.returncode, done.stderr) == (0, "")


def test_run_ends_as_the_script_ends(runner, shared, tmp_path):
    assert runner("run", "echo.py", "--fail", "7").returncode == 7
    done, plain = (
        runner("run", "echo.py", "--fail", "raise"),
        shared.run("echo.py", "--fail", "raise", cwd=tmp_path),
    )
    assert (done.returncode, done.stderr) == (plain.returncode, plain.stderr)
    assert done.returncode == 1 and "ValueError: mine" in done.stderr
    wrong, plain = runner("run", "echo.py", "--nonsense"), shared.run("echo.py", "--nonsense", cwd=tmp_path)
    assert (wrong.returncode, wrong.stderr) == (plain.returncode, plain.stderr) and wrong.returncode == 2


def test_run_a_module(runner, shared, tmp_path):
    done = runner("run", "--mode", "never", "-m", "echo", "--min-free", "3", "-m")
    plain = shared.run("-m", "echo", "--min-free", "3", "-m", cwd=tmp_path)
    assert done.stderr == plain.stderr and done.returncode == plain.returncode == 2
    said = json.loads(runner("run", "-mecho", "--min-free", "3").stdout)
    plain = json.loads(shared.run("-m", "echo", "--min-free", "3", cwd=tmp_path).stdout)
    assert said.pop("active") and not plain.pop("active")
    assert {name: said[name] for name in plain} == plain


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["nosuch.py"], 1, "attnpatch: there is no script nosuch.py"),
        ([], 2, "attnpatch: nothing to run; give a script"),
        (
            ["--min-free", "2gigs", "echo.py"],
            2,
            "attnpatch: --min-free '2gigs' is not accepted; give a size such as 2GB",
        ),
        (
            ["--capture", "maps", "--blocks=0", "echo.py"],
            2,
            "attnpatch: --blocks '0' is not accepted; give a whole number of tokens",
        ),
        (["--modules=Net", "echo.py"], 2, "attnpatch: --modules 'Net' is not accepted; give classes such as"),
        (
            ["--sites", "a b", "echo.py"],
            2,
            "attnpatch: --sites 'a b' is not accepted; give auto, registered, or",
        ),
        (["--capture", "echo.py", "echo.py"], 2, "attnpatch: --capture 'echo.py' is not accepted"),
    ],
)
def test_run_refuses_in_one_line(shared, tmp_path, arguments, code, says):
    (tmp_path / "echo.py").write_text(ECHO)
    done = shared.run("run", *arguments, cwd=tmp_path, command=[str(shared.bin / "attnpatch")])
    assert (done.returncode, done.stdout) == (code, "")
    (line,) = lines(done.stderr)
    assert line.startswith(says)


def test_a_sitecustomize_that_is_hidden_is_loaded(tmp_path, shared):
    """Without the start-up file PYTHONPATH leads to a module of that name; the user's own still runs."""
    environment = Environment(tmp_path / "venv")
    (environment.site / "sitecustomize.py").write_text("here = 'mine'\n")
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from attnpatch.__main__ import main; main()"
    (tmp_path / "s.py").write_text(
        "import sitecustomize, sys\nprint(sitecustomize.here, 'attnpatch.activation.session' in sys.modules)"
    )
    done = environment.run("run", "s.py", cwd=tmp_path, command=[str(environment.python), "-c", code])
    assert (done.stdout, done.stderr) == ("mine True\n", "")


# -------------------------------------------------------------------------------------------------------- the doctor


def test_doctor_when_all_is_well(shared, tmp_path):
    done = shared.run(
        "doctor",
        cwd=tmp_path,
        command=[str(shared.bin / "attnpatch")],
        ATTNPATCH="1",
        ATTNPATCH_MIN_FREE="8GB",
    )
    assert done.returncode == 0, done.stdout
    text = done.stdout
    for part in ("torch 2.", "transformers 5.", "wrapt", "GB free of", "in " + str(shared.site)[:40], "this process is active",
                 "becomes active with ATTNPATCH=1", "min_free='8GB'", "cpu float32", "flash", "nothing is wrong"):  # fmt: skip
        assert part in text, text
    assert len(lines(text)) <= 40 and max(map(len, lines(text))) <= 100


def test_doctor_names_what_is_wrong_and_how_to_fix_it(own, tmp_path):
    (own.site / "attnpatch.pth").unlink()
    metadata = own.site / "wrapt-1.2.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: wrapt\nVersion: 1.2\n")
    done = own.run(
        "doctor", cwd=tmp_path, command=[str(own.bin / "attnpatch")], ATTNPATCH_ROWS="5", ATTNPATCH_BLOCKS="5"
    )
    assert done.returncode == 1
    text = " ".join(done.stdout.split())
    for part in (
        "wrong wrapt 1.2 is older than 1.16 fix pip install",
        "wrong the start-up file is not installed, so ATTNPATCH=1 does nothing fix pip install attnpatch",
        "wrong ATTNPATCH_BLOCKS, ATTNPATCH_ROWS without ATTNPATCH=1: nothing happens fix set ATTNPATCH=1",
        "ATTNPATCH_BLOCKS without ATTNPATCH_CAPTURE",
    ):
        assert part in text, done.stdout
