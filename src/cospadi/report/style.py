"""Style sheets. The report page: one column, system fonts, light and dark, readable on phones and on paper."""

CSS = """
:root {
  color-scheme: light dark;
  --page: #ffffff; --ink: #1f2328; --muted: #59616a; --faint: #d0d7de; --panel: #f6f8fa;
  --warn: #9a6700; --warn-panel: #fff8c5;
  --c0: #0072b2; --c1: #c75000; --c2: #00805d; --c3: #b5588a;
  --c4: #b87a00; --c5: #2e8fc4; --c6: #7a5195; --c7: #8c6d31;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #0d1117; --ink: #e6edf3; --muted: #9198a1; --faint: #30363d; --panel: #161b22;
    --warn: #e3b341; --warn-panel: #272115;
    --c0: #4aa8e0; --c1: #f08a3c; --c2: #2fc79a; --c3: #e29fc4;
    --c4: #e6b740; --c5: #8ccdf5; --c6: #b795d4; --c7: #c9a86a;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--page); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
}
main { max-width: 66rem; margin: 0 auto; padding: 2rem 1.25rem 4rem; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 .25rem; overflow-wrap: anywhere; }
h2 {
  font-size: 1.15rem; margin: 2.5rem 0 .75rem; padding-bottom: .3rem;
  border-bottom: 1px solid var(--faint);
}
.lead { color: var(--muted); margin: 0 0 1.5rem; overflow-wrap: anywhere; }
.remark { color: var(--muted); font-size: .88rem; margin: 0 0 .5rem; }
.cards {
  display: grid; grid-template-columns: repeat(auto-fit, minmax(13rem, 1fr)); gap: .75rem;
  margin: 0; padding: 0;
}
.cards > div {
  background: var(--panel); border: 1px solid var(--faint); border-radius: .5rem; padding: .75rem 1rem;
}
.cards dt { color: var(--muted); font-size: .85rem; }
.cards dd { margin: 0; }
.cards .value { font-size: 1.2rem; font-weight: 600; font-variant-numeric: tabular-nums; }
.cards .note { color: var(--muted); font-size: .82rem; overflow-wrap: anywhere; }
.facts { display: grid; grid-template-columns: max-content 1fr; gap: .2rem 1.25rem; margin: 0; }
.facts dt { color: var(--muted); }
.facts dd { margin: 0; overflow-wrap: anywhere; }
.facts .note { color: var(--muted); }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .85rem; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .5rem; text-align: left; border-bottom: 1px solid var(--faint); white-space: nowrap; }
th { color: var(--muted); font-weight: 600; }
th:first-child, td:first-child { padding-left: 0; }
th.n, td.n { text-align: right; }
.name {
  font: .76rem/1.35 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace;
  display: block; white-space: normal; overflow-wrap: anywhere; min-width: 14rem;
}
.bar {
  display: inline-block; width: 3rem; height: .5rem; margin-left: .5rem; background: var(--panel);
  border-radius: .2rem; overflow: hidden;
}
.bar i { display: block; height: 100%; background: var(--c0); }
figure { margin: 0 0 1.25rem; overflow-x: auto; }
figure svg { display: block; width: 100%; min-width: 30rem; max-width: 52rem; height: auto; }
figure svg text { font-family: inherit !important; }
pre {
  background: var(--panel); border: 1px solid var(--faint); border-radius: .5rem; padding: .75rem 1rem;
  margin: 0; overflow-x: auto;
  font: .85rem/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace;
}
.warnings {
  background: var(--warn-panel); border-left: .25rem solid var(--warn); border-radius: .25rem;
  margin: 1.25rem 0 0; padding: .6rem 1rem;
}
.warnings li { margin-left: 1rem; overflow-wrap: anywhere; }
.warnings ul { margin: 0; padding: 0; }
summary { cursor: pointer; color: var(--muted); margin-bottom: .5rem; }
@media (max-width: 34rem) {
  main { padding: 1.25rem .9rem 3rem; }
  h1 { font-size: 1.35rem; }
  .cards { grid-template-columns: 1fr 1fr; gap: .5rem; }
  .cards > div { padding: .6rem .7rem; }
  .cards .value { font-size: 1.02rem; }
  .facts { grid-template-columns: 1fr; gap: 0; }
  .facts dd { margin-bottom: .5rem; }
}
@media print {
  main { max-width: none; padding: 0; }
  tr, figure { break-inside: avoid; }
  h2 { break-after: avoid; }
}
"""

FRAGMENT_CSS = """
.cospadi { font: 14px/1.45 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; max-width: 60rem; }
.cospadi .heading { font-weight: 600; margin: 0; overflow-wrap: anywhere; }
.cospadi .remark { opacity: .7; margin: 0; overflow-wrap: anywhere; }
.cospadi .note { opacity: .7; font-size: .88em; overflow-wrap: anywhere; }
.cospadi .cards { display: flex; flex-wrap: wrap; gap: .5rem; margin: .5rem 0; }
.cospadi .cards > div { border: 1px solid rgba(128, 128, 128, .4); border-radius: .4rem; padding: .35rem .7rem; }
.cospadi .cards dt { opacity: .7; font-weight: 400; font-size: .85em; margin: 0; padding: 0; }
.cospadi .cards dd { margin: 0; padding: 0; }
.cospadi .cards .value { font-weight: 600; font-variant-numeric: tabular-nums; }
.cospadi .warnings { border-left: .25rem solid #c58a00; padding: .1rem .7rem; margin: .5rem 0; }
.cospadi .warnings ul { margin: 0; padding: 0 0 0 1rem; }
.cospadi .wide { overflow-x: auto; }
.cospadi table { border-collapse: collapse; font-variant-numeric: tabular-nums; margin: .3rem 0; }
.cospadi th, .cospadi td { text-align: left; padding: .15rem .6rem .15rem 0; background: none; white-space: nowrap; }
.cospadi th.n, .cospadi td.n { text-align: right; }
.cospadi pre { white-space: pre-wrap; margin: .3rem 0; }
.cospadi summary { cursor: pointer; opacity: .7; }
"""
"""Of a fragment in a notebook: it takes ink and paper from the notebook's theme, light or dark."""
