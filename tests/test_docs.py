"""Links in the documents lead somewhere, and what they quote is so."""

from __future__ import annotations

import ast
import importlib.util
import json
import re
from pathlib import Path

import pytest
import torch
import transformers
from safetensors import safe_open

from tests.conftest import TINY, Words, cached, tiny_llama
from torchgsrq import Codebooks, GSRQCache, GSRQConfig
from torchgsrq.measure import embedded
from torchgsrq.ops import use_kernels

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])


def anchors(page):
    """Of its headings, as code hosts make them."""
    titles = re.findall(r"^#+ (.*)$", page.read_text(), re.M)
    return {re.sub(r"[^a-z0-9 -]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if target.startswith("http"):
            continue
        path, _, anchor = target.partition("#")
        found = (page.parent / path).resolve() if path else page
        assert found.exists(), target
        assert not anchor or anchor in anchors(found), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_name_scripts_that_exist(page):
    for script in re.findall(r"python (benchmarks/\w+\.py)", page.read_text()):
        assert (ROOT / script).exists(), script


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_tables_are_those_of_their_results(page):
    """What benchmarks/tables.py writes between its marks, from benchmarks/results."""
    spec = importlib.util.spec_from_file_location("tables", ROOT / "benchmarks" / "tables.py")
    tables = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tables)
    text = page.read_text()
    assert tables.filled(text) == text, "run python benchmarks/tables.py"


def blocks(page):
    """Its blocks of Python."""
    return re.findall(r"^```python\n(.*?)^```", page.read_text(), re.M | re.S)


@torch.no_grad()
def test_readme_runs_from_top_to_bottom(monkeypatch, tmp_path):
    """On tiny models, for those that it names."""
    use_kernels()  # else they would be built for the folder below
    monkeypatch.setattr("torchgsrq.learning.calibrate.OWN_TOKENS", 512)
    monkeypatch.setenv("TORCHGSRQ_CACHE", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    words = Words()
    monkeypatch.setattr(words, "decode", lambda ids: f"{len(ids)} tokens", raising=False)
    prompt = {"input_ids": torch.arange(3, 43)[None], "attention_mask": torch.ones(1, 40, dtype=torch.long)}
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", lambda _: tiny_llama())
    monkeypatch.setattr(embedded, "load_model", lambda: (tiny_llama(), words))
    monkeypatch.setattr(embedded, "document", lambda: "amber birch cedar " * 200)
    code = "\n".join(blocks(ROOT / "README.md")).replace("model.generate(...)", "model.generate(**prompt)")
    code = code.replace("cache=cache, max", "**cached(cache), max")  # by its older name, in older versions
    code = code.replace('prompt = tokenizer(text[60_000:68_000], return_tensors="pt")', "")
    exec(compile(code, "README.md", "exec"), {"torch": torch, "prompt": prompt, "cached": cached})
    assert (tmp_path / "prompt.safetensors").exists() and "cache = new_cache(model).load" in code
    assert "prompt = tokenizer(text" not in code and "**cached(cache)" in code


def test_counts_of_families_are_those_of_the_table():
    rows = re.findall(r"^\| [\w.-]+ \| \w+ \| ([^:;|]*)", (ROOT / "docs" / "models.md").read_text(), re.M)
    decoded = sum("decoded" in row for row in rows)
    whole, part = (
        sum(bool(re.match(what, row)) and "decoded" not in row for row in rows) for what in ("quantized", r"\d+ of")
    )
    readme = (ROOT / "README.md").read_text().replace("\n", " ")
    assert f"{whole} are quantized whole" in readme and f"{part} in their full-attention layers" in readme
    assert f"and {decoded} whose attention cannot read codes" in readme


def strings_of_source():
    """Every string of the library, those with values in them with ``...`` for each value."""
    found = set()
    for file in [*(ROOT / "torchgsrq").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")]:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.JoinedStr):
                found.add("".join(x.value if isinstance(x, ast.Constant) else "..." for x in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.add(re.sub(r"%[.\d]*[sdg]", "...", node.value))
    return found


def test_quoted_messages_are_those_of_the_source():
    """A heading of docs/errors.md in backticks is a part of a message."""
    headings = re.findall(r"^### (.*)$", (ROOT / "docs" / "errors.md").read_text(), re.M)
    strings = strings_of_source()
    assert len(headings) > 20
    for heading in headings:
        quoted = re.fullmatch("`([^`]+)`", heading)
        assert quoted and any(quoted[1] in said for said in strings), heading


def test_formats_are_those_of_files(tmp_path):
    books = Codebooks({}, {})
    books.save(tmp_path / "books")
    with safe_open(tmp_path / "books", framework="pt") as file:
        headers = [file.metadata()]
    data = GSRQCache(books, GSRQConfig(), transformers.LlamaConfig(**TINY)).dumps()
    headers.append(json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"])
    formats = ["`{format}`, version {version}".format(**header) for header in headers]
    assert f"| format | {' | '.join(formats)} |" in (ROOT / "docs" / "reference" / "files.md").read_text()


def test_divergences_beside_other_methods_are_those_measured():
    methods = json.loads((ROOT / "benchmarks" / "results" / "compare.json").read_text())["methods"]
    page = (ROOT / "docs" / "coming-from.md").read_text()
    for label, method in {
        "`QuantizedCache`, quanto int4": "QuantizedCache, quanto int4",
        "`QuantizedCache`, quanto int2": "QuantizedCache, quanto int2",
        "KIVI, 2 bit": "KIVI 2 bit",
        "`torchgsrq`, 2 bits": "GSRQ 2 bit",
        "`torchgsrq`, 1 bit": "GSRQ 1 bit",
    }.items():
        (said,) = re.findall(rf"^\| {re.escape(label)} \|.*\| ([\d.]+)[^|]*\|$", page, re.M)
        assert said == f"{methods[method]['kl']:.3f}", label
    one, kivi = (f"{methods[name]['kl']:.3f}" for name in ("GSRQ 1 bit", "KIVI 2 bit"))
    assert f"KL divergence is {kivi} at 3 bits (our reading of KIVI), and {one} at 1 bit here" in page


@pytest.fixture
def hooks():
    """docs/hooks.py, which mkdocs runs."""
    spec = importlib.util.spec_from_file_location("hooks", ROOT / "docs" / "hooks.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_script_becomes_a_page(hooks, tmp_path, monkeypatch):
    monkeypatch.setattr(hooks, "TUTORIALS", tmp_path)
    for name in ("a.png", "b.png"):
        (tmp_path / name).touch()
    script = '# %% [markdown]\n# # Title\n#\n# Words and `code`.\n\n# %%\nx = 1  # one\nsave("a.png", "c.png")\n\n# %%\nsave("b.png")\n'
    script += "# %% [markdown]\n# - ![shown](b.png)\n"
    assert hooks.title(script) == "Title"
    assert hooks.tutorial_page(script) == (
        '# Title\n\nWords and `code`.\n\n```python\nx = 1  # one\nsave("a.png", "c.png")\n```\n\n![a.png](a.png)\n\n'
        '```python\nsave("b.png")\n```\n\n- ![shown](b.png)\n'
    )


def test_links_of_the_site(hooks):
    script = hooks.scripts()[0]
    page = f"tutorials/{script.stem}.md"
    for link, place in {
        f"[a](../tutorials/{script.name})": f"[a]({page})",
        "[all](../tutorials)": f"[all]({page})",
        "[b](../CONTRIBUTING.md#how-to-add)": "[b](CONTRIBUTING.md#how-to-add)",
        "![c](memory.png), [guide](guide.md#memory)": "![c](memory.png), [guide](guide.md#memory)",
        "[`recommend.py`](../torchgsrq/measure/recommend.py) says": "`recommend.py` says",
        "[d](https://example.org/x) books[0](x), [e](#memory)": "[d](https://example.org/x) books[0](x), [e](#memory)",
        "[f](missing.md)": "[f](missing.md)",
    }.items():
        assert hooks.site_links(link, ROOT / "docs", "guide.md") == place
    assert hooks.site_links("[guide](../docs/guide.md)", ROOT / "tutorials", page) == "[guide](../guide.md)"


def test_every_page_is_in_the_navigation():
    nav = (ROOT / "mkdocs.yml").read_text()
    for page in (ROOT / "docs").rglob("*.md"):
        name = page.relative_to(ROOT / "docs")
        assert f": {name}\n" in nav, name


# Private words of this project, and what the field says.
WORDS = {
    r"hands|handed|hand the|at hand": "passes, returns; available, current",
    r"deals?(?! with)|dealt": "allocates, assigns",
    r"told|tells (it|them)": "passed, stated, reported",
    r"speakers?": "the field's own term",
    r"come back with|comes back with|came back with|gives? (nothing )?back": "returns",
    r"turned by": "rotated by",
    r"(be|is|was|were) had": "is available, exists",
    r"said to (be|hold|have)": "should be; has in the metadata",
    r"is no (file|folder|dict)|(is|are) no multiple": "is not a file",
    r"if need be": "if necessary",
    r"(which|what|who) else (is|are|was|were|has|have)": "the other ... are",
    r"that there (is|are|was|were) not": "that does not exist",
    r"what (it|they) lacks? (the|a|it|they)": "subject, verb, object: the model writes the rest",
}
PROSE = [*PAGES, *(p for top in ("torchgsrq", "kernels", "tutorials", "benchmarks") for p in (ROOT / top).rglob("*.*"))]


def test_words_are_those_of_the_field():
    """In documents, docstrings, comments and messages; phrases are found across line ends too."""
    found = []
    for file in PROSE:
        if file.suffix in (".md", ".py", ".cpp", ".h"):
            text = re.sub(r"""(\s*f?["']\s*\n\s*f?["']|\s*\n[\s#/>*-]*)""", " ", file.read_text())
            for pattern, instead in WORDS.items():
                for said in re.finditer(rf"\b({pattern})\b", text, re.I):
                    around = text[max(said.start() - 40, 0) : said.end() + 20]
                    found.append(f"{file.relative_to(ROOT)}: ...{around}...: {instead}")
    assert not found, "\n".join(found)
