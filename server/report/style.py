"""The page's style sheet: light, dark, narrow and on paper. Colours of series hold 3:1 against both backgrounds."""

STYLE = """
:root {
  color-scheme: light dark;
  --back: #ffffff; --panel: #f5f7f9; --text: #1b2129; --soft: #55606c; --rule: #d5dbe1; --link: #0b5a96;
  --good: #0b6b3a; --good-back: #e2f4e9; --bad: #a30f1a; --bad-back: #fdeaea; --warn: #7a4b00; --warn-back: #fff2d6;
  --s0: #0072b2; --s1: #c64f00; --s2: #00805a; --s3: #a0457e; --s4: #7a5c00; --s5: #3c4650; --s6: #9aa4ae;
}
@media (prefers-color-scheme: dark) {
  :root {
    --back: #14181d; --panel: #1d232a; --text: #e6eaee; --soft: #a3aeb9; --rule: #38424d; --link: #7cc0f0;
    --good: #7fdca6; --good-back: #14301f; --bad: #ff9c9c; --bad-back: #3a1519; --warn: #ffcf70; --warn-back: #37290c;
    --s0: #5ab4ea; --s1: #f28e4c; --s2: #3fd0a0; --s3: #e79ac6; --s4: #efc648; --s5: #d3dae1; --s6: #6c7783;
  }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--back); color: var(--text); line-height: 1.5;
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
main { max-width: 1180px; margin: 0 auto; padding: 28px 20px 60px; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 2px 0 6px; overflow-wrap: anywhere; }
h2 { font-size: 1.28rem; margin: 44px 0 10px; padding-top: 14px; border-top: 1px solid var(--rule); }
h3 { font-size: 1rem; margin: 0 0 8px; }
h3.next { margin-top: 26px; }
.figures { margin-top: 30px; }
sup { line-height: 0; }
p { margin: 8px 0; max-width: 78ch; }
.kicker, .soft, figcaption, caption { color: var(--soft); }
.kicker, .soft, figcaption, caption, .legend { font-size: .875rem; }
.kicker { margin: 0; letter-spacing: .02em; }
code, pre { font: .86em/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; overflow-wrap: anywhere; }
pre { background: var(--panel); padding: 14px; border-radius: 8px; white-space: pre-wrap; }
.status { display: inline-block; padding: 1px 12px; border-radius: 99px; font-weight: 600; font-size: .9rem;
  border: 1px solid currentColor; }
.status.completed { color: var(--good); background: var(--good-back); }
.status.failed { color: var(--bad); background: var(--bad-back); }
.status.interrupted, .status.running { color: var(--warn); background: var(--warn-back); }
.banner { border-radius: 8px; padding: 14px 18px; margin: 16px 0; border-left: 10px solid; }
.banner p { max-width: 90ch; margin: 2px 0; }
.banner strong { display: block; font-size: 1.2rem; letter-spacing: .01em; }
.banner.bad { background: #b3121d; color: #ffffff; border-color: #5e060c; }
.banner.bad strong { font-size: 1.7rem; letter-spacing: .05em; }
.banner.warn { background: #ffc33d; color: #241a00; border-color: #a76c00; }
.banner.good { background: #0b6b3a; color: #ffffff; border-color: #043a1e; }
.banner.good strong, .banner.warn strong.outcome { font-size: 1.7rem; letter-spacing: .05em; }
.banner ul { margin: 6px 0 0; padding-left: 1.2em; }
.banner li { max-width: 90ch; margin: 3px 0; }
.banner.error { background: var(--bad-back); color: var(--bad); border-color: var(--bad); }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(145px, 1fr)); gap: 12px; margin: 20px 0 0;
    padding: 0; }
.card { background: var(--panel); border-radius: 8px; padding: 12px 16px; }
.card dt { color: var(--soft); font-size: .875rem; }
.card dd { margin: 0; font-size: .875rem; }
.card dd.big { font-size: 1.3rem; font-weight: 650; line-height: 1.3; font-variant-numeric: tabular-nums; }
.two { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 430px), 1fr)); gap: 26px 32px;
    align-items: start; }
.grids { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 250px), 1fr)); gap: 22px 24px;
    align-items: start; }
.two > *, .grids > * { min-width: 0; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .9375rem; }
caption { text-align: left; padding: 0 0 6px; }
th, td { text-align: left; vertical-align: top; padding: 7px 12px 7px 0; border-bottom: 1px solid var(--rule); }
thead th { font-weight: 600; color: var(--soft); font-size: .84rem; vertical-align: bottom; }
tbody th { font-weight: 600; overflow-wrap: anywhere; min-width: 6rem; }
.facts tbody th { width: 36%; }
.facts th code { overflow-wrap: normal; }
th:last-child, td:last-child { padding-right: 0; }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
tr:last-child > * { border-bottom: 0; }
.over { color: var(--bad); font-weight: 700; }
ul.plain { margin: 0; padding-left: 1.15em; }
ul.plain li { margin: 5px 0; max-width: 74ch; }
.panel { background: var(--panel); border-radius: 8px; padding: 16px 18px; }
figure { margin: 0; }
.chart > svg { display: block; width: 100%; max-width: 640px; height: auto; }
.legend { list-style: none; display: flex; flex-wrap: wrap; gap: 2px 18px; margin: 4px 0 8px; padding: 0; }
.legend li { display: flex; align-items: center; gap: 7px; overflow-wrap: anywhere; }
.key { width: 34px; height: 12px; flex: none; }
.grid { stroke: var(--rule); stroke-width: 1; }
.tick { fill: var(--soft); font-size: 12px; }
.target { stroke: var(--bad); stroke-width: 1.5; stroke-dasharray: 8 4; }
.target-label { fill: var(--bad); font-size: 12px; font-weight: 600; }
.line { fill: none; stroke-width: 2; stroke-linejoin: round; }
.mark { stroke-width: 1.6; }
.line.s0, .mark.s0 { stroke: var(--s0); } .mark.s0, .bar.s0 { fill: var(--s0); }
.line.s1, .mark.s1 { stroke: var(--s1); } .mark.s1, .bar.s1 { fill: var(--s1); }
.line.s2, .mark.s2 { stroke: var(--s2); } .mark.s2 { fill: var(--s2); }
.line.s3, .mark.s3 { stroke: var(--s3); } .mark.s3 { fill: var(--s3); }
.line.s4, .mark.s4 { stroke: var(--s4); } .mark.s4 { fill: none; }
.line.s5, .mark.s5 { stroke: var(--s5); } .mark.s5 { fill: var(--back); }
.line.s6 { stroke: var(--s6); stroke-width: 1; }
.spread { stroke: var(--text); stroke-width: 1.5; }
.floor { stroke: var(--soft); stroke-width: 1; }
.pair { margin: 18px 0 0; }
.pair h3 { margin: 0 0 4px; }
.pair p { margin: 4px 0; }
.pair .grids { grid-template-columns: repeat(4, minmax(0, 160px)); gap: 10px; margin: 10px 0; }
.pair .grids figcaption { margin: 3px 0 0; }
details { margin: 8px 0; }
summary { cursor: pointer; color: var(--link); font-size: .9rem; }
summary:focus-visible, .scroll:focus-visible { outline: 3px solid var(--link); outline-offset: 2px; }
img { display: block; width: 100%; height: auto; image-rendering: auto; background: #000; border-radius: 4px; }
figcaption { margin: 6px 0 0; }
figcaption b { color: var(--text); font-size: 1rem; display: block; }
.strip { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 230px), 1fr)); gap: 14px;
    margin-top: 22px; }
td code { overflow-wrap: normal; }
.facts td code, td.digest code { overflow-wrap: anywhere; }
.whole { white-space: nowrap; }
@media (max-width: 560px) {
  .cards { grid-template-columns: 1fr 1fr; gap: 8px; }
  .wide { width: 800px; }
  main { padding: 18px 14px 40px; }
  h1 { font-size: 1.5rem; }
  .facts, .facts tbody, .facts tr, .facts th, .facts td { display: block; width: auto; }
  .facts tbody th { width: auto; border-bottom: 0; padding-bottom: 0; }
}
@media print {
  :root { color-scheme: light; --back: #fff; --panel: #f2f4f6; --text: #000; --soft: #444; --rule: #bbb; --link: #000;
    --good: #0b6b3a; --good-back: #fff; --bad: #a30f1a; --bad-back: #fff; --warn: #7a4b00; --warn-back: #fff;
    --s0: #0072b2; --s1: #c64f00; --s2: #00805a; --s3: #a0457e; --s4: #7a5c00; --s5: #3c4650; --s6: #9aa4ae; }
  body { font-size: 10.5pt; }
  main { max-width: none; padding: 0; }
  h2 { margin-top: 22px; break-after: avoid; }
  tr, figure, .banner, .card, .panel, .pair { break-inside: avoid; }
  .banner { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
  .scroll { overflow: visible; }
  .two:has(figure), .grids { grid-template-columns: 1fr 1fr; gap: 14px 20px; }
  .audit { break-before: page; font-size: 8.5pt; line-height: 1.32; }
  .audit h2 { margin-top: 0; border: 0; padding: 0; }
  .audit p, .audit li, .audit .banner p { margin: 3px 0; max-width: none; }
  .audit .banner { padding: 8px 12px; margin: 8px 0; }
  .audit h3 { font-size: 9.5pt; margin: 0 0 4px; }
  .audit .banner strong { font-size: 15pt; }
  .audit table, .audit .soft { font-size: 8pt; }
  .audit thead th, .audit figcaption, .audit .legend { font-size: 7pt; margin: 2px 0; }
  .audit .key { width: 20px; }
  .audit summary { font-size: 8pt; }
  .audit .facts tbody th { width: 24%; }
  .audit th, .audit td { padding: 2px 8px 2px 0; }
  .audit .panel { padding: 8px 12px; }
  .audit ul.plain li { margin: 2px 0; }
  .audit .two { grid-template-columns: 1.35fr 1fr; gap: 10px 18px; }
  .audit .two.figures { grid-template-columns: 1fr 1fr 1fr; margin-top: 10px; }
  .audit .figures > div { grid-column: 1 / -1; }
  .audit .figures details { display: none; }
  details::details-content { content-visibility: visible; height: auto; }
}
"""
