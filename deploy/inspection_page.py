"""The page of ``synthward audit inspect``, as a Jinja template."""

from server.report.render import HEAD

PAGE = (
    """
<!doctype html>
<html lang="en">
<head>
"""
    + HEAD
    + """
<title>{{ site }}: closest pairs of the audit</title>
</head>
<body>
<main>
<header>
<p class="kicker">Synthward: for {{ site }} only</p>
<h1>The patients closest to a synthetic image</h1>
<div class="banner bad" role="note"><strong>THIS PAGE SHOWS PATIENTS</strong>
<p>It was made inside {{ site }} and nobody else has it: not the coordinator, not another hospital. Read it on a machine
of the hospital. Do not send it, nor a picture or a figure of it: no noise protects them, and each is about one
person.</p></div>
<p>{% if study %}Study <b>{{ study }}</b> (<code>{{ digest[:16] }}</code>){% else %}Study <code>{{ digest[:16] }}</code>
{%- endif %}, compared on {{ time.strftime("%Y-%m-%d %H:%M") }} UTC: {{ candidates | whole }} synthetic images with
{{ training | count("patient") }} who were trained on and {{ held_out }} who were not.</p>
</header>

<section aria-labelledby="read"><h2 id="read">How to read it</h2>
<p>For each patient the audit looked for the synthetic image that is most like one of the patient's images: mirrored or
upside down, turned a little, smaller or larger, moved, bent, brighter or darker. Below are the
{{ pairs | length }} closest pairs, the closest first. Some pair is always the closest: two heads are alike, and so are
two chests. So look for what is <em>this</em> patient's own: the folds, the vessels, a lesion, an implant.</p>
<ul class="plain">
<li><b>Similarity</b>: 1 is the same picture, about 0 nothing in common.</li>
<li><b>Laid over</b>: the patient's image, turned, scaled, moved and mirrored as it fits the synthetic image best.</li>
<li><b>Score</b>: similarity, less that of the synthetic image to its nearest other synthetic image. Above 0, the
patient is nearer to it than any other synthetic image is.</li>
<li><b>Held out</b>: how many of the {{ held_out }} patients who were never trained on score as high. None of them can
have been memorised, so what they score is chance.</li>
<li><b>Difference</b>: black where both are the same, white where they differ by half of the range of greys or more. A
copy is nearly black all over; of two different people the outlines and the folds remain.</li>
</ul>
<p>If you recognise one of your patients in a synthetic image, tell the coordinator that {{ site }} does not agree to
the release. Do not say about whom or which picture: that would be the disclosure that this page avoids.</p>
</section>

<section aria-labelledby="scores"><h2 id="scores">All scores of this site</h2>
<div class="two">
<figure class="chart">{{ chart | safe }}
<figcaption>When nobody was memorised, both groups look alike. Bars of those trained on far to the right of all others
are patients to look at. With few held-out patients their bars are rough.</figcaption></figure>
<div class="scroll" tabindex="0" role="region" aria-label="Figures"><table class="facts"><tbody>
<tr><th scope="row">Synthetic images that show a patient of this site</th><td>{{ num_shows }} of
{{ candidates | whole }}: one patient stands out as more similar to them than every other patient and every other
synthetic image. The limit is set by the patients held out: at most {{ (100 * plan.filter_drop) | number }} % reach it
by chance</td></tr>
<tr><th scope="row">Decoys</th><td>{{ num_decoys }} more, which this site drops for no reason. So a dropped image does
not by itself give a patient away</td></tr>
<tr><th scope="row">When they are dropped</th><td>Once the verdict is PASS. With any other verdict no image may be
released</td></tr>
<tr><th scope="row">What left the site</th><td>Counts of patients by score, with noise, which cost every patient trained
on ε = {{ plan.epsilon_training | number }} and every one held out ε = {{ plan.epsilon_held_out | number }}; and, for
each image that is dropped, a random number. {% if plan.roster_digest %}Both were masked: the coordinator saw only sums
over all sites. {% else %}In this study nothing is masked: the coordinator saw them as this site's.
{% endif %}Nothing on this page</td></tr>
</tbody></table></div>
</div>
</section>

<section aria-labelledby="pairs"><h2 id="pairs">The closest pairs</h2>
<div class="two">
{% for pair in pairs %}
<article class="pair" id="pair-{{ loop.index }}">
<h3>{{ loop.index }}. Patient {{ pair.patient }}
{%- if pair.num_images > 1 %}, image {{ pair.image }} of {{ pair.num_images }}{% endif %}</h3>
<p>Similarity <b>{{ "%.3f" | format(pair.similarity) }}</b>, score <b>{{ "%.3f" | format(pair.score) }}</b>;
held out as high: {{ pair.held_out_above }} of {{ held_out }}</p>
<div class="grids">
{% for name, picture in pair.pictures %}
<figure><img src="{{ picture }}" alt="Pair {{ loop.index }}: {{ name }}."><figcaption>{{ name }}</figcaption></figure>
{% endfor %}
</div>
<p class="soft">Patient laid over: {{ pair.moved }}. Synthetic image
{{ pair.candidate }}:
<span{% if pair.shows %} class="over"{% endif %}>{{ pair.fate }}.</span></p>
</article>
{% endfor %}
</div>
</section>

<section aria-labelledby="about"><h2 id="about">About this page</h2>
<table class="facts"><tbody>
<tr><th scope="row">File</th><td><code>{{ page_file }}</code>, in the study's folder at this site, readable by its owner
only. It may be deleted at any time: <code>synthward audit inspect</code> makes it again</td></tr>
<tr><th scope="row">Pictures</th><td>64 × 64 pixels, as they were compared; brightness and contrast of the synthetic
image are fitted to the patient's</td></tr>
<tr><th scope="row">Study digest (SHA-256)</th><td><code>{{ digest }}</code></td></tr>
<tr><th scope="row">Plan's digest (SHA-256)</th><td><code>{{ plan.digest }}</code></td></tr>
</tbody></table>
</section>
</main>
</body>
</html>
"""
)
