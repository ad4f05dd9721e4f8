"""The section about the audit, as a Jinja template: one page that a data protection officer can read."""

AUDIT = """
<section class="audit" aria-labelledby="audit"><h2 id="audit">Audit: were patients memorised?</h2>
{% if not audit.facts %}
{% if audit.trouble %}
<div class="banner error" role="note"><strong>No verdict</strong>
<p>{{ audit.trouble[0] | upper }}{{ audit.trouble[1:] }}. Whatever it says, it does not count.</p></div>
{% endif %}
<p>The synthetic images of this run were not audited for memorised patients. <b class="over">They must not be
released.</b> <code>synthward audit</code> asks the sites to compare them with their patients, once training is
done.</p>
{% else %}
{% set facts = audit.facts %}
{% set verdict = facts.verdict %}
<div class="banner {{ audit.banner }}" role="note"><strong class="outcome">{{ verdict.outcome }}</strong>
<p><b>{{ audit.headline }}</b></p>
<ul>
{% for reason in verdict.reasons %}
<li>{{ reason }}</li>
{% endfor %}
</ul></div>
{% if verdict.outcome == "PASS" and not facts.private %}
<p><b class="over">Training was not private. This verdict alone is no reason to release anything of it:</b> the audit
finds many memorised patients, not a few, and nothing else protects them here.</p>
{% endif %}
{% if facts.candidates %}
<p>Each site compared {{ facts.candidates.audited | whole }} synthetic images with its own patients, at its own place.
If patients were memorised, those who were trained on are closer to the images than those who were held out, on whom
nothing was trained. The sites sent counts only, with noise
{%- if facts.plan.roster_digest %}, and the coordinator saw their sum{% endif %}. The rule was fixed and signed before
training; it gives one verdict, and no second try for this run.</p>
{% if verdict.p is none %}
<p>It cost each patient trained on ε = {{ facts.spent.training | number }} and each held out
ε = {{ facts.spent.held_out | number }} all the same.</p>
{% endif %}
{% else %}
<p>No site was asked: no patient was compared with anything, and it cost nobody anything. Another verdict needs another
training run.</p>
{% endif %}
{% if verdict.p is not none %}
<div class="two">
<div class="scroll" tabindex="0" role="region" aria-label="The verdict's figures">
<table class="facts"><tbody>
<tr><th scope="row">Difference</th><td><b>p {{ "< 0.0001" if verdict.p < 0.0001 else
"= " ~ verdict.p | probability }}</b>: the probability that a release without any memorised patient looks at least
as bad. PASS needs more than {{ audit.level }}; {{ audit.fail_level }} or less is FAIL</td></tr>
<tr><th scope="row">Memorised patients</th><td><b{% if verdict.upper_bound > verdict.allowed_memorised %}
 class="over"{% endif %}>at most {{ verdict.upper_bound | whole }}</b>
of {{ verdict.training_patients | whole }} trained on, with 95 % confidence, counting those nearer than
{{ "%.2f" | format(verdict.upper_bound_edge) }}; allowed are {{ verdict.allowed_memorised | whole }}</td></tr>
<tr><th scope="row">Would be found</th><td>
{%- if verdict.minimum_detectable is none %}<b>Too little:</b> even 200 memorised patients would not have been found
with a probability of {{ (100 * audit.found) | number }} %
{%- else %}<b>{{ verdict.minimum_detectable | whole }}</b> memorised patients or more, with a probability of
{{ (100 * audit.found) | number }} %. Fewer can go unseen{% endif %}</td></tr>
<tr><th scope="row">ε as measured</th><td>
{%- for who, low in [("canaries", verdict.epsilon_lower_canaries), ("patients", verdict.epsilon_lower_patients)] %}
{{ who }}:
{%- if low is none %} none to measure by
{%- elif low == 0 %} no leak seen (ε ≥ 0)
{%- else %} <b{% if verdict.certified_epsilon is not none and low > verdict.certified_epsilon %}
 class="over"{% endif %}>ε ≥ {{ low | number }}</b>{% endif %}{{ "; " if not loop.last }}
{%- endfor %}.
{% if verdict.certified_epsilon is not none %}Certified: ε ≤ {{ verdict.certified_epsilon | number }} at
<span class="whole">δ = {{ verdict.delta | number }}</span>. A measured figure above it would prove the
certificate wrong; one below does not prove it right
{%- else %}<span class="over">Certified: nothing.</span> Training was not private{% endif %}</td></tr>
{% if audit.canaries %}
<tr><th scope="row">Canaries</th><td>{{ (audit.canaries[0][0] + audit.canaries[1][0]) | count("phantom patient") }},
nobody's images: {{ audit.canaries[0][0] }} trained on, of them {{ audit.canaries[0][1] }} nearest to a synthetic
image (highest bin); {{ audit.canaries[1][0] }} left out, of them {{ audit.canaries[1][1] }}</td></tr>
{% endif %}
<tr><th scope="row">Control</th><td>{% if verdict.control_p <= audit.control_level %}<b class="over">failed</b>{% else
%}<b>clean</b>{% endif %}, p = {{ verdict.control_p | probability }}: two halves of the held-out patients were
compared with each other, in the same way. {{ audit.control_level }} or less would mean that the comparison itself is
wrong</td></tr>
<tr><th scope="row">What it cost</th><td>
each of {{ verdict.training_patients | whole }} patients trained on
ε = {{ facts.spent.training | number }}, each of {{ verdict.held_out_patients | whole }} held out
ε = {{ facts.spent.held_out | number }} (who pay for nothing else)
{%- if audit.spent_training is not none %}. With training, at most ε = {{ audit.spent_training | epsilon }} and
{{ audit.spent_held_out | epsilon }} at <span class="whole">δ = {{ audit.spent_delta | number }}</span>{% endif %}.
Numbers of patients are those of the contract</td></tr>
{% if facts.candidates %}
<tr><th scope="row">Images</th><td>{{ facts.candidates.generated | whole }} generated,
{{ (facts.candidates.generated - facts.candidates.audited) | whole }} left out as near-duplicates of others,
<b>{{ facts.candidates.audited | whole }} audited</b>.
{% if facts.filter %}{{ facts.filter.dropped | whole }} dropped by the sites' filter,
<b>{{ facts.filter.kept | whole }} kept</b>: only these may be released
{%- else %}None may be released{% endif %}</td></tr>
{% endif %}
{% if facts.filter %}
<tr><th scope="row">Filter</th><td>Each site drops images that single out one of its patients, and others for no
reason ({{ (100 * facts.plan.decoys) | number }} % over all sites), so that a dropped image does not give a patient
away. One-sided cost, not in the figures above: ε = {{ facts.filter.epsilon_one_sided | number }} for each dropped
image that shows a patient</td></tr>
{% endif %}
</tbody></table></div>
<div class="panel"><h3>What this audit cannot see</h3><ul class="plain">
{% if verdict.minimum_detectable %}
<li>Fewer than {{ verdict.minimum_detectable | whole }} memorised patients: it may find them or not. The sites' filter
looks for single copies, without a promise.</li>
{% else %}
<li>A few memorised patients. The sites' filter looks for single copies, without a promise.</li>
{% endif %}
<li>A likeness of another kind than it looks for: it knows copies that were mirrored, turned by a few degrees, scaled,
moved, bent a little, blurred, or changed in brightness. A lesion of one patient in the head of another may escape
it.</li> <li>Images that are not among those audited: other images of the same generator, and the generator
itself.</li> <li>A patient who was trained on at one site and held out at another: that makes both groups alike and
hides what was memorised.</li>
<li>What was memorised before this study, from whatever images the networks had seen.</li>
<li>What the images say about patients in general, or about a small group of them.</li>
<li>A site that compares with other patients than it trained on, or that miscounts.</li>
</ul>
<p class="soft">It is evidence beside the guarantee above, not instead of it.</p></div>
</div>
{% endif %}
{% if audit.histogram %}
<div class="two figures">
<figure class="chart"><h3>How near patients are</h3>{{ audit.histogram | safe }}
<figcaption>Patients by score, 0: as near as other synthetic images are. Thin lines: 95 % of the noise. Without
memorised patients both colours are alike, and the bars at the far right are about 0.</figcaption></figure>
<figure class="chart"><h3>More than chance explains?</h3>{{ audit.excess | safe }}
<figcaption>All patients from a score upwards, less those expected from the patients held out. A thin line that
reaches 0 means: chance and noise can explain it. Memorised patients would stand at the right.</figcaption></figure>
{% if audit.power %}
<figure class="chart"><h3>What the audit can find</h3>{{ audit.power | safe }}
<figcaption>How often so many memorised patients would have prevented PASS, with this noise and these
patients.</figcaption>
</figure>
{% endif %}
<div><h3>Figures</h3>
<div class="scroll" tabindex="0" role="region" aria-label="Counts by score"><table>
<thead><tr><th scope="col" class="n">Score of<br>at least</th><th scope="col" class="n">Trained<br>on</th>
<th scope="col" class="n">Held<br>out</th><th scope="col" class="n">Expected</th><th scope="col" class="n">Excess</th>
<th scope="col" class="n">Standard<br>deviation</th><th scope="col" class="n">z</th></tr></thead><tbody>
{% for tail in verdict.tails %}
<tr><td class="n">{{ "%.3f" | format(tail.edge) }}</td><td class="n">{{ tail.training }}</td>
<td class="n">{{ tail.held_out }}</td><td class="n">{{ "%.1f" | format(tail.expected) }}</td>
<td class="n">{{ "%.1f" | format(tail.training - tail.expected) }}</td>
<td class="n">{{ "%.1f" | format(tail.stddev) }}</td><td class="n">{{ "%.2f" | format(tail.z) }}</td></tr>
{% endfor %}
</tbody></table></div>
{% if audit.power %}
<details><summary>The power
curve</summary><div class="scroll" tabindex="0" role="region" aria-label="Power curve"><table>
<thead><tr><th scope="col" class="n">Memorised patients</th><th scope="col" class="n">Found, % of
audits</th></tr></thead> <tbody>{% for number, chance in verdict.power_curve %}<tr><td class="n">{{ number }}</td>
<td class="n">{{ "%.1f" | format(100 * chance) }}</td></tr>{% endfor %}</tbody></table></div></details>
{% endif %}
</div>
</div>
{% endif %}
<details><summary>What the verdict is about</summary><table class="facts"><tbody>
<tr><th scope="row">Time</th><td>{{ facts.time[:16] | replace("T", " ") }} UTC</td></tr>
<tr><th scope="row">Plan (SHA-256), from before training</th><td><code>{{ facts.plan_digest }}</code></td></tr>
<tr><th scope="row">Generator (SHA-256)</th><td><code>{{ facts.generator_digest }}</code></td></tr>
{% if facts.candidates %}
<tr><th scope="row">Images (Merkle root)</th><td><code>{{ facts.candidates.root }}</code></td></tr>
{% endif %}
<tr><th scope="row">Signed by</th><td><code>{{ facts.key }}</code>; the signature in <code>audit.json</code>
fits</td></tr>
</tbody></table></details>
{% endif %}
</section>
"""
