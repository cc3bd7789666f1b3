r"""Draw the perplexities of a committed comparison against bytes.

    python benchmarks/plot.py benchmarks/results/llama_29m_compare.json docs/images/llama_29m.png \
        --methods "auto;auto16;auto16 refined;pursuit;sparsegpt;compot;rocket;cospadi;svd_llm;gptq;rtn"

gives the README's plot. A line is the rows of one `method`; those above `--most` are left out, since one far method
would press all others together.
"""

import argparse
import json
from pathlib import Path

from cospadi.report.figures import save
from cospadi.report.plots import quality_against_bytes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--methods", required=True, help="with semicolons or commas: a name may hold commas itself")
    parser.add_argument("--text", default="wikitext2_raw_test.txt")
    parser.add_argument("--most", type=float, default=500.0)
    options = parser.parse_args()
    data = json.loads(options.results.read_text(encoding="utf-8"))
    names = options.methods.split(";" if ";" in options.methods else ",")
    unknown = set(names) - {row["method"] for row in data["rows"]}
    if unknown:
        parser.error(f"no such rows: {', '.join(sorted(unknown))}")
    rows = [
        row | {"perplexity": row["perplexity"][options.text]}
        for row in data["rows"]
        if row["method"] in names and row["perplexity"].get(options.text, options.most + 1) <= options.most
    ]
    whole = max(row["bytes"] / row["keep_actual"] for row in data["rows"])
    save(quality_against_bytes(rows, {"perplexity": data["dense"][options.text], "bytes": round(whole)}), options.out)


if __name__ == "__main__":
    main()
