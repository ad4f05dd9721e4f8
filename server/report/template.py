"""The page, as a Jinja template. It is Python text and not a file beside it: Flower's bundle carries no templates."""

from server.report.audit_template import AUDIT
from server.report.render import HEAD

_HEAD = (
    """
<!doctype html>
<html lang="en">
<head>
"""
    + HEAD
    + """
<title>{{ study.name }}: run report</title>
</head>
<body>
<main>
<header>
<p class="kicker">Synthward run report</p>
<h1>{{ study.name }}</h1>
<p><span class="status {{ run.status }}">{{ run.status }}</span>
{% if run.status == "running" %}Not finished when this was written, or stopped without notice.{% endif %}
<span class="soft">Started {{ run.started[:16] | replace("T", " ") }} UTC
{%- if run.finished %}, ended {{ run.finished[:16] | replace("T", " ") }} UTC{% endif %}</span></p>
{% if run.error %}
<div class="banner error" role="note"><strong>{{ run.status | capitalize }}: {{ run.error }}</strong>
{% if error_words %}<p>{{ error_words | capitalize }}.</p>{% endif %}</div>
{% endif %}
{% if not run.private %}
<div class="banner bad" role="note"><strong>NOT PRIVATE</strong>
<p>{{ run.notice }}</p>
<p>Patients' images shaped these networks without any protection. Do not share the generator, the synthetic images
or the sites' updates of this run, unless the data were public.</p></div>
{% else %}
<p>{{ run.notice }}</p>
{% endif %}
{% if record_sites %}
<div class="banner warn" role="note">
<strong>The unit is one record (image), not one patient: {{ record_sites | join(", ") }}</strong>
<p>There, the data had no patient ids, so every image counts as a patient of its own. A person with several images is
protected less than the figures below say.</p></div>
{% endif %}
{% if over_target %}
<div class="banner error" role="note"><strong>Over the study's target</strong>
{% for site in over_target %}
<p>{{ site.name }} has spent ε = {{ site.epsilon | epsilon }} at δ = {{ site.delta | number }}; the target is
{{ study.privacy.epsilon | number }}.</p>
{% endfor %}</div>
{% endif %}
<dl class="cards">
<div class="card"><dt>Privacy spent (highest site)</dt>
{% if not run.private %}<dd class="big over">no guarantee</dd><dd>ε is unbounded</dd>
{% elif worst %}<dd class="big">ε = {{ worst.epsilon | epsilon }}</dd>
<dd>at δ = {{ worst.delta | number }} · target {{ study.privacy.epsilon | number }}</dd>
{% else %}<dd class="big">none</dd><dd>no site took part</dd>{% endif %}</div>
<div class="card"><dt>Unit of privacy</dt>
{% if not run.private %}<dd class="big over">none</dd>
{% elif record_sites %}<dd class="big over">one record</dd>
<dd>at {{ record_sites | length }} of {{ run.sites | length }} sites</dd>
{% else %}<dd class="big">one patient</dd><dd>all of their images at a site</dd>{% endif %}</div>
<div class="card"><dt>The coordinator saw</dt>
{% if run.aggregation == "secure" %}<dd class="big">sums only</dd><dd>never one site's update</dd>
{% elif run.aggregation == "plain" %}<dd class="big over">each site's update</dd><dd>aggregation = "plain"</dd>
{% else %}<dd class="big over">not known</dd><dd>aggregation = "{{ run.aggregation }}"</dd>{% endif %}</div>
<div class="card"><dt>Rounds</dt><dd class="big">{{ run.rounds_completed }} of {{ run.phases | sum("rounds") }}</dd>
<dd>{{ run.phases | map(attribute="algorithm") | join(", then ") }}</dd></div>
<div class="card"><dt>Sites</dt><dd class="big">{{ run.sites | length }}</dd>
<dd>{% if refused_sites %}and {{ refused_sites | length }} that took no part{% else %}all that were asked{% endif
%}</dd></div>
<div class="card"><dt>Audit of the images</dt>
{% if audit.outcome %}<dd class="big{{ " over" if audit.outcome != "PASS" }}">{{ audit.outcome }}</dd>
<dd>{{ "up to the limits below" if audit.outcome == "PASS" else "must not be released" }}</dd>
{% else %}<dd class="big">none</dd><dd>must not be released</dd>{% endif %}</div>
<div class="card"><dt>Time</dt>
<dd class="big">{{ total_seconds | seconds if total_seconds is not none else "not recorded" }}</dd><dd>on {{
run.device }}</dd></div>
</dl>
</header>
"""
)

_GUARANTEE = """
<section aria-labelledby="guarantee"><h2 id="guarantee">What is guaranteed</h2>
{% if not run.private %}
<p class="over">Nothing. Differential privacy was off: no gradient was clipped, no noise was added, and no bound holds
for any patient.</p>
{% else %}
<p>Adding or removing any one {{ "unit of the table" if record_sites else "patient" }} of a site changes the
probability of any
result of this run by at most the factor e<sup>ε</sup>, plus δ: P(result with) ≤ e<sup>ε</sup> · P(result without) +
δ, and the
same the other way round. At the target, e<sup>ε</sup> = {{ factor }}. This is the worst case over all patients, all
results and all attackers, whatever else they know.</p>
<div class="two">
<div class="scroll" tabindex="0" role="region" aria-label="The guarantee">
<table class="facts"><tbody>
<tr><th scope="row">Privacy unit</th><td>{% if record_sites %}<b class="over">One record (image)</b> at
{{ record_sites | join(", ") }}{% if record_sites | length < run.sites | length %}; one patient elsewhere{% endif %}
{% else %}One patient: all of their images and labels at a site{% endif %}</td></tr>
<tr><th scope="row">Neighbouring relation</th><td>Add or remove one
{{ "unit" if record_sites else "patient" }}</td></tr>
<tr><th scope="row">Target</th><td>ε = {{ study.privacy.epsilon | number }} at δ = {{ study.privacy.delta | number }},
for each site over the whole study</td></tr>
<tr><th scope="row">Mechanism</th><td>Gaussian noise on a sum of one clipped vector a patient, in each
{%- if run.phases | selectattr("algorithm", "ne", "moments") | list %} step over Poisson-drawn patients{% endif %}
{%- if run.phases | map(attribute="algorithm") | unique | list | length > 1
  and "moments" in run.phases | map(attribute="algorithm") %} and each{% endif %}
{%- if "moments" in run.phases | map(attribute="algorithm") %} release over all patients{% endif
%}; composed over all rounds{{ " of all phases" if run.phases | length > 1 }}</td></tr>
{% for phase in run.phases %}
{% set kind = "release" if phase.algorithm == "moments" else "step" %}
<tr><th scope="row">{% if run.phases | length > 1 %}Phase {{ loop.index }}: {{ phase.algorithm }}{% else %}Planned, of
{{ phase.algorithm }}{% endif %}</th>
<td>{{ (phase.rounds * phase.steps) | count(kind) }} in {{ phase.rounds | count("round") }}
{%- if run.phases | length > 1 %}, for {{ (100 * phase.share) | number }} % of ε{% endif %}.
<code>clip_norm</code> {{ phase.clip_norm | number }}, <code>noise_multiplier</code>
{{ phase.noise_multiplier | number }}, <code>sampling_probability</code> {{ phase.sampling_probability | number }}
{%- if kind == "release" %}: all patients{% else %} for each patient at each step{% endif %}</td></tr>
{% endfor %}
<tr><th scope="row">Accounting</th><td>PRV, an upper bound (where a figure says RDP, a looser one). A site charges its
steps before it takes them, and the coordinator's record charges a planned round whenever a site is asked to train: a
crash can over-count and never under-count</td></tr>
</tbody></table></div>
<div class="panel"><h3>What is not protected</h3><ul class="plain">
<li>That a site takes part, and its contracted number of patients.</li>
<li>A patient known at several sites:
{%- if shares_noise %} such a patient counts once for each of them under one noise (group privacy): epsilons add up, and
δ grows with e<sup>ε</sup>
{%- else %} there the sites' epsilons and deltas add up (group privacy){% endif %}
{%- if run.sites | length > 2 %}, at two of them to ε = {{ pair_epsilon | epsilon }}
{%- if shares_noise %} at δ = {{ pair_delta | number }}{% endif %} at most{% endif %}
{%- if run.sites | length > 1 %}, at all {{ run.sites | length }} sites to ε = {{ sum_epsilon | epsilon }} at
δ = {{ sum_delta | number }}{% if sum_delta >= 1 %}, which is no guarantee{% endif %}{% endif %}.</li>
<li>What a site has spent in other studies on the same patients: it comes on top, as the
table of the sites' budgets shows.</li>
{% if shares_noise %}
<li>Against the coordinator together with more than {{ study.privacy.colluding_sites | count("site") }}: in
{{ shares_noise | join(" and ") }} the sites share the noise, and whoever knows more of the shares can take
them away.</li>
{% endif %}
<li>Against someone with access to a site itself: the images are there.</li>
<li>What holds for patients in general: a network may show what a disease looks like, and that is its purpose.</li>
</ul></div>
</div>
{% if large_delta %}
<p class="over">δ is above 1 / (10 × training patients) at {{ large_delta | join(", ") }}: too large for so few
patients.</p>
{% endif %}
{% endif %}
</section>
"""

_COMBINED = """
<section aria-labelledby="combined"><h2 id="combined">How the sites' updates were combined</h2>
{% if run.aggregation == "secure" %}
<p><b>Secure aggregation: the coordinator saw only sums.</b> Each site masked its update before it left. The masks fall
away only from the sum over at least {{ study.federation.minimum_sites }} sites, so the coordinator learned that sum
and no one site's own update.</p>
<p>{% if shares_noise %}In {{ shares_noise | join(" and ") }} the guarantee above rests on this: each site adds
a share of the noise, and every sum over at least {{ study.federation.minimum_sites }} sites holds all of it
{%- if study.privacy.colluding_sites %}, even when the coordinator knows the shares of
{{ study.privacy.colluding_sites | count("site") }}{% endif %}. No smaller sum was opened.
{%- if "local" in run.phases | map(attribute="algorithm") %} In local it does not: each update was clipped and noised at
its site before it was masked.{% endif %}
{% elif run.private %}The guarantee above does not rest on this: each update was clipped and noised at its site before
it was masked.{% else %}<span class="over">The sums themselves have no protection: what they show of patients, they
show.</span>{% endif %}
{% if run.sites | length == 2 %}With two sites, either of them can subtract its own update from the sum and so learn
the other's; the coordinator cannot.{% endif %}</p>
{% elif run.aggregation == "plain" %}
<p><b class="over">Plain (aggregation = "plain"): the coordinator saw each site's own update.</b>
{% if run.private %}Each update was clipped and noised at its site before it left, so the guarantee above holds against
the coordinator too; but nothing hid which update was whose.{% else %}Without privacy and without masks, nothing kept
the coordinator from reading patients' data out of them.{% endif %}</p>
{% else %}
<p class="over">Recorded as aggregation = "{{ run.aggregation }}", which this report does not know.</p>
{% endif %}
{% if checks %}
<p>This run was a simulation: whoever has the machine it ran on can read the sites' images and all else there.</p>
{% endif %}
</section>
"""

_SITES = """
<section aria-labelledby="sites"><h2 id="sites">Sites</h2>
{% if run.sites %}
<div class="scroll" tabindex="0" role="region" aria-label="Sites">
<table class="wide"><caption>Patients are the contracted, public numbers. ε is rounded up.</caption>
<thead><tr><th scope="col">Site</th><th scope="col">ε at δ (accountant)</th><th scope="col">Charged</th>
<th scope="col">Rounds taken part</th><th scope="col" class="n">Patients<br>trained on</th>
<th scope="col" class="n">Patients<br>held out</th><th scope="col">Refusals</th></tr></thead>
<tbody>
{% for site in run.sites %}
<tr><th scope="row">{{ site.name }}{% if site.record_is_patient %} <span class="over">(unit: record)</span>{% endif
%}</th>
<td>{% if site.epsilon is none or not run.private %}<span class="over">not private</span>{% else %}
<span class="whole"><b{% if site in over_target %} class="over"{% endif %}>{{ site.epsilon | epsilon }}</b> at
{{ site.delta | number if site.delta is not none else "?" }}</span> ({{ site.accountant | upper }}){% endif %}</td>
<td>{% for m in site.mechanisms %}{{ m.steps }} steps, noise {{ m.noise_multiplier | number }}, q
{{ m.sampling_probability | number }}{{ "; " if not loop.last }}{% else %}nothing{% endfor %}</td>
<td>{{ site.rounds | length }} of {{ run.rounds_completed }}
{%- if missed[site.name] %}; missed {{ missed[site.name] | rounds }}{% endif %}</td>
<td class="n">{{ site.patients_trained }}</td><td class="n">{{ site.patients_held_out }}</td>
<td>{% for code, count in site.refusals | dictsort %}{{ count }} × <code>{{ code }}</code>, {{ code | code_words }}
{%- if not loop.last %}<br>{% endif %}{% else %}none{% endfor %}</td></tr>
{% endfor %}
</tbody></table></div>
{% else %}
<p>No site took part.</p>
{% endif %}
{% if budgets %}
<h3 class="next">The sites' budgets</h3>
<div class="scroll" tabindex="0" role="region" aria-label="Budgets">
<table class="wide"><caption>Each site's policy holds a budget for each of its patients, over all studies together, and
its ledger what was spent. Other studies count in full here, on whichever of the site's patients. The figures are of
patients that are trained on, the audit included. All ε at the budget's δ.</caption>
<thead><tr><th scope="col">Site</th><th scope="col" class="n">ε spent before,<br>in other studies</th>
<th scope="col" class="n">ε of<br>this study</th><th scope="col" class="n">ε after,<br>all together</th>
<th scope="col" class="n">Budget ε</th><th scope="col" class="n">at δ</th></tr></thead><tbody>
{% for site in budgets %}
<tr><th scope="row">{{ site.name }}</th><td class="n">{{ site.budget.spent_before | epsilon }}</td>
<td class="n">{{ site.budget.spent_here | epsilon }}</td>
<td class="n"><b{% if site.budget.spent_after > site.budget.epsilon %} class="over"{% endif %}>
{{- site.budget.spent_after | epsilon }}</b></td><td class="n">{{ site.budget.epsilon | number }}</td>
<td class="n">{{ site.budget.delta | number }}</td></tr>
{% endfor %}
</tbody></table></div>
{% endif %}
{% if audited %}
<h3 class="next">What the audit cost</h3>
<div class="scroll" tabindex="0" role="region" aria-label="Cost of the audit">
<table class="wide"><caption>The audit of the synthetic images reads patients too, and its answer has a cost beside the
training's. Patients that were trained on paid for both; patients held out paid for the audit alone. ε of a verdict
needs no δ; the others are at the study's.</caption>
<thead><tr><th scope="col">Site</th><th scope="col" class="n">Verdicts</th>
<th scope="col" class="n">ε of a verdict,<br>trained on</th><th scope="col" class="n">ε of training<br>and audit</th>
<th scope="col" class="n">ε of a verdict,<br>held out</th>
<th scope="col" class="n">ε of all verdicts,<br>held out</th></tr></thead><tbody>
{% for site in audited %}
<tr><th scope="row">{{ site.name }}</th><td class="n">{{ site.audits.verdicts }}</td>
<td class="n">{{ site.audits.epsilon_training | number }}</td>
<td class="n">{{ site.audits.spent_training | epsilon }}</td>
<td class="n">{{ site.audits.epsilon_held_out | number }}</td>
<td class="n">{{ site.audits.spent_held_out | epsilon }}</td></tr>
{% endfor %}
</tbody></table></div>
{% endif %}
{% if refused_sites %}
<h3 class="next">Took no part</h3>
<div class="scroll" tabindex="0" role="region" aria-label="Sites that took no part">
<table><thead><tr><th scope="col">Site</th><th scope="col">Code</th><th scope="col">Meaning</th></tr></thead><tbody>
{% for name, code in refused_sites %}
<tr><th scope="row">{{ name }}</th><td><code>{{ code }}</code></td><td>{{ code | code_words }}</td></tr>
{% endfor %}
</tbody></table></div>
{% endif %}
</section>
"""

_ROUNDS = """
<section aria-labelledby="rounds"><h2 id="rounds">Over the rounds</h2>
{% if run.phases | length > 1 or run.phases_chosen %}
<div class="scroll" tabindex="0" role="region" aria-label="Phases"><table>
<thead><tr><th scope="col">Phase</th><th scope="col">What happened</th><th scope="col" class="n">Rounds</th>
<th scope="col" class="n">Steps a round</th><th scope="col" class="n">Completed</th></tr></thead><tbody>
{% for phase in phases %}
<tr><th scope="row">{{ loop.index }}: {{ phase.algorithm }}</th><td>{{ phase.algorithm | algorithm_words }}</td>
<td class="n">{{ range(phase.first, phase.last + 1) | rounds }}</td>
<td class="n">{{ "one release" if phase.algorithm == "moments" else phase.steps }}</td>
<td class="n{{ " over" if phase.done <= phase.last - phase.first and run.status != "running" }}">{{ phase.done }} of
{{ phase.last - phase.first + 1 }}</td></tr>
{% endfor %}
</tbody></table></div>
{% if run.phases_chosen %}
<p><b>Why these phases:</b> the study left the choice to Synthward. {{ run.phases_chosen }}</p>
{% endif %}
{% endif %}
{% if not num_rounds %}
<p>No round was completed.</p>
{% else %}
<div class="two">
<figure class="chart"><h3>Privacy spent</h3>
{% if epsilon_chart %}
{{ epsilon_chart | safe }}
<figcaption>Computed from what each site is charged: a planned round each time it is asked to train. A round
that a site missed adds nothing until the next one it took part in; the last point is the site's final
figure.</figcaption>
<details><summary>Figures</summary>
<div class="scroll" tabindex="0" role="region" aria-label="Epsilon over rounds"><table>
<thead><tr><th scope="col">Site</th>{% for round, _ in curves[0][1] %}<th scope="col" class="n">{{ round }}</th>
{%- endfor %}</tr></thead><tbody>
{% for name, points in curves %}<tr><th scope="row">{{ name }}</th>
{%- for _, value in points %}<td class="n">{{ value | epsilon }}</td>{% endfor %}</tr>{% endfor %}
</tbody></table></div></details>
{% elif run.private %}<p>No site has spent anything.</p>
{% else %}<p class="over">Nothing to draw: without differential privacy no ε holds.</p>{% endif %}
</figure>
<figure class="chart"><h3>Losses</h3>
{% if loss_chart %}{{ loss_chart | safe }}{% else %}<p>No finite loss was recorded.</p>{% endif %}
<figcaption>Both are computed on synthetic images only. No patient's image is read for them, so they cost no
privacy.</figcaption>
<details><summary>Figures</summary>
<div class="scroll" tabindex="0" role="region" aria-label="Losses over rounds"><table>
<thead><tr><th scope="col" class="n">Round</th><th scope="col" class="n">Generator</th>
<th scope="col" class="n">Discriminator on synthetic images</th></tr></thead><tbody>
{% for row in loss_table %}<tr>{% for value in row %}<td class="n">{{ value if value is not none else "–" }}</td>
{%- endfor %}</tr>{% endfor %}
</tbody></table></div></details>
</figure>
</div>
{% if fact_rows %}
<h3 class="next">Rounds of moments</h3>
<div class="scroll" tabindex="0" role="region" aria-label="Rounds of moments"><table>
<caption>Computed from the {{ "noisy " if run.private }}sums and synthetic images
{%- if run.private %} only, so none of it costs privacy{% endif %}.</caption>
<thead><tr><th scope="col">Round</th>{% for name in fact_names %}
<th scope="col" class="n">{{ name | fact_words | capitalize }}</th>
{%- endfor %}</tr></thead><tbody>
{% for round, values in fact_rows %}<tr><th scope="row">{{ round }}</th>
{%- for value in values %}<td class="n">{{ value | fact }}</td>{% endfor %}</tr>{% endfor %}
</tbody></table></div>
{% endif %}
{% endif %}
</section>
"""

_SAMPLES = """
<section aria-labelledby="samples"><h2 id="samples">Synthetic images, before and after the patients' data</h2>
{% if grids %}
<p>Every image here came out of the generator; none was taken from a patient.
{% if not run.private %}<b class="over">Without differential privacy a generator can repeat patients' images.</b>
{% endif %}
All grids use the same latents, so that they compare image by image.
{% if study.image.labels %}Rows are grouped by label, from the top: {{ study.image.labels | join(", ") }}.
{% endif %}</p>
<div class="grids">
{% for grid in grids %}
<figure><img src="{{ grid.image }}" alt="Grid of synthetic images: {{ grid.title }}. {{ grid.caption }}.">
<figcaption><b>{{ grid.title }}</b>{{ grid.caption }}
{%- if grid.epsilon is not none %}; <span class="whole">ε = {{ grid.epsilon | epsilon }}</span> spent by
then{{ " at most" if run.sites | length > 1 }}{% endif %}
{%- if not run.private and not loop.first %}, <span class="over">without privacy</span>{% endif
%}</figcaption></figure>
{% endfor %}
{% if grids | length == 1 and not run.rounds_completed %}
<p>No round was completed, so there is nothing after it.</p>
{% endif %}
</div>
{% if strip %}
<div class="strip">
{% for title, image in strip %}
<figure><img src="{{ image }}" alt="Grid of synthetic images after {{ title }}."><figcaption>{{ title }}</figcaption>
</figure>
{% endfor %}
</div>
{% endif %}
{% else %}
<p>This run's folder holds no sample images.</p>
{% endif %}
</section>
"""

_DATA = """
<section aria-labelledby="data"><h2 id="data">What each site refused in its own data</h2>
{% if checks %}
<p>Read from the sites' folders, because this run was a simulation on one machine. In a real federation these counts
stay at the site: they depend on single patients and no noise protects them. Take that into account before you pass this
page on.</p>
<div class="scroll" tabindex="0" role="region" aria-label="Refused data by site">
<table class="wide"><thead><tr><th scope="col">Site</th><th scope="col" class="n">Patients<br>accepted</th>
<th scope="col" class="n">Images<br>accepted</th><th scope="col" class="n">Refused</th><th scope="col">Refused, by
code</th>
<th scope="col" class="n">Notes</th></tr></thead><tbody>
{% for name, check in checks %}
<tr><th scope="row">{{ name }}</th>
{% if check %}
<td class="n">{{ check.accepted_patients }}</td><td class="n">{{ check.accepted_records }}</td>
<td class="n">{{ check.refused.values() | sum }}</td>
<td>{% for code, count in check.refused | dictsort %}{{ count }} × <code>{{ code }}</code>, {{ code | code_words }}
{%- if not loop.last %}<br>{% endif %}{% else %}none{% endfor %}</td><td class="n">{{ check.notes }}</td>
{% else %}<td colspan="5">its data-check.json cannot be read</td>{% endif %}</tr>
{% endfor %}
</tbody></table></div>
{% else %}
<p>This stays at the site: what a site accepts and refuses depends on single patients, so it is not sent to the
coordinator. <code>synthward data check</code> shows it there.</p>
{% endif %}
</section>
"""

_TIMINGS = """
<section aria-labelledby="timings"><h2 id="timings">Time</h2>
<div class="two">
<div>
<table><caption>Of the whole run</caption><thead><tr><th scope="col">Part</th>
<th scope="col" class="n">Time</th></tr></thead>
<tbody>
{% for name, value in run.seconds.items() %}
<tr><th scope="row">{{ name.replace("_", " ") }}</th><td class="n">{{ value | seconds }}</td></tr>
{% else %}<tr><td colspan="2">not recorded</td></tr>
{% endfor %}
</tbody></table>
{% if round_seconds %}
<br><table><caption>Of {{ num_rounds }} rounds
{%- if overhead is not none %}; the server's own work is {{ "%.1f" | format(100 * overhead) }} % of them{% endif
%}</caption>
<thead><tr><th scope="col">Part</th><th scope="col" class="n">Sum</th><th scope="col" class="n">Median round</th>
<th scope="col" class="n">Longest round</th></tr></thead><tbody>
{% for label, total, middle, longest in round_seconds %}
<tr><th scope="row">{{ label }}</th><td class="n">{{ total | seconds }}</td><td class="n">{{ middle | seconds }}</td>
<td class="n">{{ longest | seconds }}</td></tr>
{% endfor %}
</tbody></table>
{% endif %}
</div>
{% if timing_chart %}<figure class="chart">{{ timing_chart | safe }}</figure>{% endif %}
</div>
</section>
"""

_ABOUT = """
<section aria-labelledby="about"><h2 id="about">How it was made</h2>
<table class="facts"><tbody>
<tr><th scope="row">Study digest (SHA-256)</th><td><code>{{ run.study_digest }}</code></td></tr>
<tr><th scope="row">Device</th><td>{{ run.device }}</td></tr>
<tr><th scope="row">Versions</th><td>{% for name, version in run.versions.items() %}{{ name }} {{ version }}
{%- if not loop.last %}, {% endif %}{% endfor %}</td></tr>
<tr><th scope="row">Start of the networks</th><td>{% if run.warm_start %}{{ run.warm_start.source }}
{%- if run.warm_start.from_cache %}, from the cache{% endif %}; SHA-256 <code>{{ run.warm_start.digest }}</code>
{%- else %}untrained, seed {{ study.seed }}{% endif %}</td></tr>
</tbody></table>
{% if run.sites %}
<details><summary>The sites' commitments to which patients they hold out</summary>
<div class="scroll" tabindex="0" role="region" aria-label="Commitments"><table><thead><tr><th scope="col">Site</th>
<th scope="col">SHA-256 of the key that splits its patients</th></tr></thead><tbody>
{% for site in run.sites %}
<tr><th scope="row">{{ site.name }}</th><td class="digest"><code>{{ site.holdout_commitment }}</code></td></tr>
{% endfor %}
</tbody></table></div></details>
{% endif %}
<details><summary>The whole study, as TOML</summary><pre>{{ toml }}</pre></details>
</section>
</main>
</body>
</html>
"""

PAGE = (_HEAD + _GUARANTEE + AUDIT + _COMBINED + _SITES + _ROUNDS + _SAMPLES + _DATA + _TIMINGS + _ABOUT).lstrip()
