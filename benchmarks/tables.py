"""The tables of README and docs that are made of measured results: written into the pages, and checked by a test.

    python benchmarks/tables.py

A page has a table between two comments, ``<!-- results: NAME -->`` and ``<!-- end -->``; `TABLES` says what NAME is
made of, a file of ``benchmarks/results``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))
_MARKED = re.compile(r"(<!-- results: (\S+) -->\n)(.*?)(<!-- end -->)", re.DOTALL)


def read(name: str) -> dict[str, Any]:
    """A file of results."""
    found: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text())
    return found


def markdown(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A table in Markdown."""
    head = list(head)
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _methods(name: str, of: Callable[[str, dict[str, Any]], bool] = lambda name, row: True) -> list[Any]:
    """Names and rows of a file of `compare.py`, by bits."""
    rows = [(method, row) for method, row in read(name)["methods"].items() if of(method, row)]
    return sorted(rows, key=lambda pair: -pair[1]["bits_without_codebooks"])


def _found(row: dict[str, Any]) -> str:
    return " / ".join(f"{task['found']:.0%}" for task in row["tasks"].values())


def _count(row: dict[str, Any]) -> str:
    """Answers found, of all tasks together."""
    scores = row["tasks"].values()
    return f"{sum(round(s['found'] * s['answers']) for s in scores)} of {sum(s['answers'] for s in scores)}"


def _answers(row: dict[str, Any]) -> str:
    return ", ".join(f"{name} {task['answers']}" for name, task in row["tasks"].items())


def _kl(row: dict[str, Any], digits: int = 3) -> str:
    if row["kl"] < 1e-6:
        return "0"
    return f"{row['kl']:.{digits}f} ({row['kl_low']:.{digits}f}-{row['kl_high']:.{digits}f})"


def compared(name: str) -> str:
    """All methods, with everything that was measured."""
    rows = _methods(name)
    head = ["method", "bits", "with codebooks", "perplexity", "KL (95%)", "KL p99", "same token"]
    return markdown(
        [*head, f"found: {_answers(rows[0][1])}", "nats"],
        (
            (
                method,
                f"{row['bits_without_codebooks']:.2f}",
                f"{row['bits']:.2f}",
                f"{row['ppl']:.2f}",
                _kl(row),
                f"{row['kl_p99']:.2f}",
                f"{row['agreement']:.0%}",
                _found(row),
                f"{row['answer_nll']:.2f}",
            )
            for method, row in rows
        ),
    )


def longer(name: str) -> str:
    """All methods on longer texts."""
    rows = _methods(name)
    head = ["method", "bits", "perplexity", "KL (95%)", f"found: {_answers(rows[0][1])}", "nats"]
    return markdown(
        [*head, "KL where answers come"],
        (
            (
                method,
                f"{row['bits_without_codebooks']:.2f}",
                f"{row['ppl']:.2f}",
                _kl(row),
                _found(row),
                f"{row['answer_nll']:.2f}",
                f"{max(row['answer_kl'], 0):.3f}",
            )
            for method, row in rows
        ),
    )


def groups(name: str) -> str:
    """Quality by group size."""

    def size(method: str) -> int:
        found = re.search(r"groups of (\d+)", method)
        return int(found[1]) if found else 8

    ours = _methods(
        name, lambda method, row: row["family"] in ("gsrq", "groups") and row["bits_without_codebooks"] < 1.1
    )
    by_size = {size(method): {} for method, _ in ours}
    for method, row in ours:
        by_size[size(method)][round(row["bits_without_codebooks"], 2)] = row
    speed = read("speed")["rows"]
    lines = []
    for one, rows in sorted(by_size.items()):
        row = rows[1.0]
        attended = [
            f"{x['over_sdpa']:.1f}"
            for x in speed
            if x.get("what") == f"gsrq groups of {one}, 1" and (x["model"], x["context"]) == ("SmolLM2-135M", 32768)
        ]
        encoded = [f"{x['encode_share']:.0%}" for x in speed if x["section"] == "prefill" and x["group_size"] == one]
        quality = (_kl(row), f"{_count(row)}, {row['answer_nll']:.2f}", f"{row['bits']:.2f}")
        lines.append((str(one), *quality, *(attended or ["not measured"]), *(encoded or ["not measured"])))
    head = ["group size", "KL (95%)", "answers found, nats", "bits with codebooks, at 128k tokens"]
    return markdown([*head, "attention at 32k, times SDPA", "encoding, share of a prefill"], lines)


def windows(name: str) -> str:
    """One codec with other numbers of exact tokens."""
    rows = []
    for method, row in read(name)["methods"].items():
        exact = re.search(r"(\d+ \+ \d+) exact", method)
        if exact:
            quality = (f"{row['ppl']:.2f}", _kl(row, 4), f"{row['agreement']:.0%}", f"{row['answer_kl']:.3f}")
            rows.append((exact[1], f"{row['bits']:.2f}", *quality))
    full = next(iter(read(name)["methods"].values()))["ppl_full"]
    head = ["sinks + recent tokens", "bits with codebooks, at 128k tokens", "perplexity", "KL (95%)", "same token"]
    return markdown([*head, "KL where answers come"], [("full precision", "", f"{full:.2f}", "0", "100%", "0"), *rows])


def attention(name: str) -> str:
    """Decode attention of one layer, times the fastest SDPA of the same run."""
    rows = [row for row in read(name)["rows"] if row["section"] == "attention"]
    contexts = sorted({row["context"] for row in rows})
    shown = ("gsrq", "flex_attention", "matmuls")
    lines = []
    for model in dict.fromkeys(row["model"] for row in rows):
        for what in dict.fromkeys(row["what"] for row in rows if row["what"].startswith(shown)):
            found = {row["context"]: row["over_sdpa"] for row in rows if (row["model"], row["what"]) == (model, what)}
            lines.append((model, what, *(f"{found[x]:.1f}" for x in contexts)))
    return markdown(["shapes of", "what", *(f"{x // 1024}k" for x in contexts)], lines)


def queries(name: str) -> str:
    """Attention of several query tokens, and of a batch, times the fastest SDPA of the same run."""
    rows = [row for row in read(name)["rows"] if row["section"] == "queries"]
    kinds = list(dict.fromkeys((row["batch"], row["queries"]) for row in rows))
    lines = []
    for shapes in dict.fromkeys((row["model"], row["what"]) for row in rows):
        found = {(x["batch"], x["queries"]): x["over_sdpa"] for x in rows if (x["model"], x["what"]) == shapes}
        lines.append((", ".join(shapes), *(f"{found[kind]:.2f}" for kind in kinds)))
    heads = (f"{batch} rows, 1 query" if batch > 1 else f"{several} queries" for batch, several in kinds)
    return markdown(["shapes of", *heads], lines)


def generate(name: str) -> str:
    """Milliseconds per token of a whole model, and times its full precision of the same run."""
    rows = [row for row in read(name)["rows"] if row["section"] == "generate"]
    contexts = sorted({row["context"] for row in rows})
    lines = []
    for what in dict.fromkeys(row["what"] for row in rows):
        found = {row["context"]: row for row in rows if row["what"] == what}
        cells = (
            f"{found[x]['ms_per_token']:.0f} ({found[x]['over_full']:.2f})" if x in found else "" for x in contexts
        )
        lines.append((what, *cells))
    return markdown(["cache", *(f"{x // 1024}k" if x >= 1024 else str(x) for x in contexts)], lines)


def prefill(name: str) -> str:
    """What encoding adds to a prefill of 2048 tokens, and appending to a decode step."""
    rows = [row for row in read(name)["rows"] if row["section"] == "prefill"]
    return markdown(
        [
            "group size",
            "full precision",
            "with encoding",
            "all vectors encoded by themselves",
            "share",
            "appending, a token",
        ],
        (
            (
                str(row["group_size"]),
                f"{row['full_s']:.2f} s",
                f"{row['gsrq_s']:.2f} s",
                f"{row['encode_s']:.3f} s",
                f"{row['encode_share']:.1%}",
                f"{row['append_ms_per_token']:.2f} ms",
            )
            for row in rows
        ),
    )


_OURS = {"GSRQ 2 bit": "2 bits", "GSRQ 1 bit": "1 bit", "GSRQ 0.5 bit": "0.5 bit"}
_SHOWN = {
    "full precision": "full precision",
    **_OURS,
    "QuantizedCache, quanto int4": "transformers' `QuantizedCache`, quanto int4 (4.5 bits)",
    "KIVI 2 bit": "KIVI, 3.0 bits (our reading)",
    "GSRQ, the paper's 1 bit": "the paper's GSRQ, 1 bit (our reading)",
}


def _short(row: dict[str, Any]) -> tuple[str, str, str]:
    return f"{row['ppl']:.2f}", f"{max(row['kl'], 0):.3f}", _count(row)


def short(name: str, shown: Iterable[str] = _SHOWN) -> str:
    """Quality of a few methods, as far as they were measured."""
    methods = read(name)["methods"]
    rows = ((_SHOWN[method], *_short(methods[method])) for method in shown if method in methods)
    return markdown(["", "perplexity", "KL, nats", "answers found"], rows)


def overview() -> str:
    """The README's: quality, attention of one layer and `generate` at 32k tokens."""
    methods, speed = read("compare")["methods"], read("speed")["rows"]

    def faster(section: str, what: str, field: str) -> str:
        found = [
            row[field]
            for row in speed
            if (row["section"], row.get("what"), row.get("context")) == (section, what, 32768)
            and row.get("model", "SmolLM2-135M") == "SmolLM2-135M"
        ]
        return f"{found[0]:.1f}" if found else ""

    lines = []
    for name, label in _SHOWN.items():
        times = ("1", "1") if name == "full precision" else ("", "")
        if name in _OURS:
            bits = name.split()[1]
            of_model = faster("generate", "gsrq groups of 8", "over_full") if bits == "1" else ""
            times = (faster("attention", f"gsrq groups of 8, {bits}", "over_sdpa"), of_model)
        lines.append((label, *_short(methods[name]), *times))
    return markdown(["", "perplexity", "KL, nats", "answers found", "attention", "`generate`"], lines)


def served(name: str) -> str:
    """Runs of `serve.py`, an engine beside the other of its type."""
    runs, rows = read(name)["runs"], []
    runs = [{"shared": False} | x for x in runs]
    fields = ("space_gib", "prompt", "requests", "new", "shared")
    keys = list(dict.fromkeys(tuple(x[name] for name in fields) for x in runs))
    engines = [x for x in ("float32", "codes", "bfloat16", "codes-bf16") if any(run["engine"] == x for run in runs)]
    for key in keys:
        of: dict[str, Any] = {}  # the fastest run of each
        for x in runs:
            if tuple(x[name] for name in fields) == key:
                of[x["engine"]] = min(x, of.get(x["engine"], x), key=lambda run: run["seconds"])
        space, prompt, requests, new, shared = key
        row = [f"{space:g}", f"{requests}", f"{prompt}" + (", shared" if shared else ""), f"{new}"]
        for engine in engines:
            x = of.get(engine)
            row.append("" if x is None else f"{x['tokens_s']:.1f}")
            row.append("" if x is None or x["decode_s"] is None else f"{x['decode_s']:.1f}")
            row.append("" if x is None else f"{x['first_token_s']:.2f}")
            row.append("" if x is None else f"{x['preemptions']:g}")
        rows.append(row)
    head = ["cache, GiB", "requests", "prompt", "new"]
    head += [f"{e}: {what}" for e in engines for what in ("tokens/s", "decode/s", "first token, s", "preempted")]
    return markdown(head, rows)


def served_quality(name: str) -> str:
    """Perplexity in an engine, of `serve.py`."""
    rows = [[x["engine"], f"{x['tokens']}", f"{x['perplexity']:.2f}"] for x in read(name)["quality"]]
    return markdown(["cache", "tokens", "perplexity"], rows)


def held(name: str) -> str:
    """Tokens that fit a GiB, of `serve.py`."""
    facts = read(name)["capacity"]
    rows = []
    for length in sorted({x["longest"] for x in facts}):
        of = {x["engine"]: x["tokens_per_gib"] for x in facts if x["longest"] == length}
        rows.append([f"{length}", f"{of['float32']:,}", f"{of['codes']:,}", f"{of['codes'] / of['float32']:.1f}"])
    return markdown(["`max_model_len`", "float32", "codes, 1 bit", "times"], rows)


TABLES: dict[str, Callable[[], str]] = {
    "overview": overview,
    "second": lambda: short("qwen"),
    "compare": lambda: compared("compare"),
    "bits": lambda: short("compare", ("full precision", *_OURS)),
    "groups": lambda: groups("compare"),
    "longer-2k": lambda: longer("smollm2-2k"),
    "longer-4k": lambda: longer("smollm2-4k"),
    "windows": lambda: windows("windows"),
    "qwen": lambda: compared("qwen"),
    "attention": lambda: attention("speed"),
    "queries": lambda: queries("speed"),
    "generate": lambda: generate("speed"),
    "prefill": lambda: prefill("speed"),
    "serve": lambda: served("serve"),
    "serve-capacity": lambda: held("serve"),
    "serve-quality": lambda: served_quality("serve"),
}


def filled(page: str) -> str:
    """A page with its tables as the results have them now.

    Raises:
        KeyError: it names a table that does not exist.
    """
    return _MARKED.sub(lambda found: f"{found[1]}\n{TABLES[found[2]]()}\n{found[4]}", page)


def main() -> None:
    """The command."""
    for path in PAGES:
        page = path.read_text(encoding="utf-8")
        if (made := filled(page)) != page:
            path.write_text(made, encoding="utf-8")
            print(f"written: {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
