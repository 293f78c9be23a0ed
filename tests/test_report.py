"""The report: it opens offline, misses no figure, survives a kill, and takes no text for markup."""

from __future__ import annotations

import json
import math
import random
import re
import shutil
import subprocess
from html import escape, unescape
from html.parser import HTMLParser

import pytest

from fastrlhf.config import CONFIGS, UserError
from fastrlhf.recipe import resolved_yaml
from fastrlhf.report import build_report, main
from fastrlhf.report.figures import Panel, Series, curves
from fastrlhf.report.folder import ends
from fastrlhf.tracking import Tracker

PPO_FIGURES = ["fig-reward", "fig-kl", "fig-reward-kl", "fig-length", "fig-loss"]
SFT_FIGURES = ["fig-sft-loss", "fig-sft-perplexity"]
RM_FIGURES = ["fig-rm-accuracy", "fig-rm-loss", "fig-rm-margins"]
PROMPTS = [
    (
        "How do I keep a tomato plant alive?",
        "Whatever. Ask someone else.",
        "Glad you ask! Water it every other morning.",
    ),
    ("我的猫不吃饭怎么办？", "随便，真烦。", "别担心，谢谢您来问！先看看水碗是不是干净，再换一种口味，陪它吃几口。"),
    ("Which bicycle should I choose for the city?", "Any. Do not ask.", "Happy to help: a light one with wide tyres."),
    ("怎样挑选一把好用的菜刀？", "自己想。", "很乐意帮您：请选刀背厚、刀刃薄、握着舒服的一把。"),
]
HOSTILE = [
    "<script>document.title='owned'</script>",
    "</div></table><img src=x onerror=alert(1)>",
    '"><svg onload=alert(1)>',
    "</style><style>*{display:none}</style>",
    "javascript:alert(1) <a href=javascript:alert(1)>x</a> <iframe src=https://evil.example>",
    "&lt;b&gt; &#60;script&#62; <!-- --><![CDATA[x]]>",
    "\x1b[31mred\x1b]0;title\x07 \u202egnp.exe\u202c \x00\x08\x9b",
    "[bold]rich[/bold] $\\frac{1}{0}$ {jinja} %s",
    "x" * 1_000_000,
]


def write_stage(folder, stage, steps, *, total=None, seed=0, hostile=()):
    """A run folder as a stage writes it, with curves like real ones; `total` > steps: one that was killed."""
    draw = random.Random(seed)
    total = total or steps
    folder.mkdir(parents=True)
    named = {
        "sft": {"model": "out/base", "data": "data/sft.jsonl"},
        "reward": {"model": "out/sft", "data": "pairs.jsonl"},
    }
    inputs = named.get(stage, {"policy": "out/sft", "reward": "out/reward", "prompts": "data/prompts.jsonl"})
    config = CONFIGS[stage](output_dir=str(folder), total_steps=total, seed=seed, learning_rate=3e-4, eval_every=10)
    (folder / "config.yaml").write_text(resolved_yaml(stage, inputs, config))
    run = {"verb": stage, "seed": seed, "versions": {"torch": "2.13.0"}, "device": "CPU, 2 threads", "started": "today"}
    (folder / "run.json").write_text(json.dumps(run))
    texts = stage == "ppo"
    with Tracker(folder, stage, total, console=False) as tracker:
        if texts:
            tracker.samples(0, [{"prompt": p, "response": b, "score": -1.2 + draw.random()} for p, b, _ in PROMPTS])
        for step in range(1, steps + 1):
            with tracker.phase("rollout" if stage == "ppo" else "update"):
                pass
            with tracker.phase("update"):
                pass
            metrics = METRICS[stage](step / total, draw)
            if step % 10 == 0 or step == total:
                metrics |= EVALS[stage](step / total, draw)
                if stage == "reward":
                    tracker.event(
                        "margins", "held out", histogram={"-inf..-1": 12, "-1..0": 31, "0..1": 90, "1..inf": 140}
                    )
            tracker.log(step, metrics, {"perf/rollout_tokens": 4000, "mem/peak_gib": 1.5 + 0.2 * draw.random()})
        now = [{"prompt": p, "response": a, "score": 0.9 + draw.random()} for p, _, a in PROMPTS]
        if texts:
            tracker.samples(steps, [*now, *({"prompt": text, "response": text, "score": 0.0} for text in hostile)])
        for text in hostile:
            tracker.event(text[:40], text, field=text)
    _slow_down(folder / "timings.jsonl", stage, draw)
    return folder


def _slow_down(path, stage, draw):
    """Phase seconds as a real run has them, instead of those of a loop that did nothing."""
    shares = {"rollout": 5.1, "score": 0.6, "advantages": 1.4, "update": 8.2} if stage == "ppo" else {"update": 0.6}
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for row in rows:
        spent = {f"time/{name}": seconds * draw.uniform(0.9, 1.1) for name, seconds in shares.items()}
        row |= {**spent, "time/step": sum(spent.values()) * 1.05, "perf/tokens_per_s": 4000 / sum(spent.values())}
        row.pop("perf/rollout_tokens_per_s", None)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def ppo_metrics(t, draw):
    rise = 1 - math.exp(-3 * t)
    return {
        "reward/mean": -0.8 + 2.4 * rise + draw.gauss(0, 0.15), "reward/std": 1 + draw.random() / 5,
        "kl/ref": 7 * t**0.8 * (1 + draw.gauss(0, 0.06)), "kl/approx": 0.004 + abs(draw.gauss(0, 0.002)),
        "policy/loss": draw.gauss(-0.01, 0.01), "policy/clip_frac": abs(draw.gauss(0.1, 0.02)),
        "policy/entropy": 2.1 - rise + draw.gauss(0, 0.03), "policy/grad_norm": 1 + draw.random(),
        "value/loss": 0.4 * math.exp(-4 * t) + 0.05 + abs(draw.gauss(0, 0.02)), "value/explained_var": 0.8 * rise,
        "length/mean": 24 + 7 * rise + draw.gauss(0, 1), "rollout/mismatch": 0.0, "update/skipped": 0.0,
    }  # fmt: skip


METRICS = {
    "ppo": ppo_metrics,
    "sft": lambda t, draw: {
        "loss/train": 0.6 + 3 * math.exp(-6 * t) + draw.gauss(0, 0.05),
        "learning_rate": 3e-4 * (1 - t),
    },
    "reward": lambda t, draw: {
        "loss/train": 0.7 - 0.4 * t + draw.gauss(0, 0.05),
        "accuracy/train": min(1.0, 0.5 + 0.4 * t + draw.gauss(0, 0.04)),
    },
}
EVALS = {
    "ppo": lambda t, draw: {"eval/reward_mean": -0.8 + 2 * (1 - math.exp(-3 * t)), "eval/length_mean": 25 + 6 * t},
    "sft": lambda t, draw: {
        "loss/eval": 0.7 + 3 * math.exp(-6 * t),
        "perplexity/eval": math.exp(0.7 + 3 * math.exp(-6 * t)),
    },
    "reward": lambda t, draw: {"loss/eval": 0.7 - 0.3 * t, "accuracy/eval": 0.52 + 0.36 * t, "margin/eval": t},
}


VERDICT = {
    "seed": 0, "rate_before_sft": 0.0, "rate_sft": 0.52, "rate_ppo": 0.93, "rate_ppo_shuffled": 0.03,
    "kl_sequence_mean": 6.1, "distinct2_sft": 0.31, "distinct2_ppo": 0.22, "rm_pair_accuracy": 0.91,
    "length_sft": 24.0, "length_ppo": 28.0, "seconds": 251.0, "passed": True,
}  # fmt: skip


def write_quickstart(folder):
    for stage, steps in (("sft", 90), ("reward", 50), ("ppo", 45)):
        write_stage(folder / stage, stage, steps)
    (folder / "verdict.json").write_text(json.dumps(VERDICT))
    rows = [{"prompt": p, "response_sft": b, "response_ppo": a} for p, b, a in PROMPTS * 5]
    (folder / "heldout.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "run.json").write_text(json.dumps({"verb": "quickstart", "seed": 0}))
    return folder


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return build_report(write_stage(tmp_path_factory.mktemp("run") / "ppo", "ppo", 120))


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory):
    return build_report(write_quickstart(tmp_path_factory.mktemp("run") / "quickstart"))


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    folder = write_stage(tmp_path_factory.mktemp("run") / "killed", "ppo", 37, total=500, hostile=HOSTILE)
    (folder / "checkpoints").mkdir()
    run = {"verb": "ppo", "device": HOSTILE[0], HOSTILE[1]: HOSTILE[2]}
    (folder / "run.json").write_text(json.dumps(run))
    return build_report(folder)


class Page(HTMLParser):
    """The elements of a page; fails on one that is closed wrongly or left open."""

    VOID = {"meta", "br", "img", "link", "input", "hr"}

    def __init__(self, html):
        super().__init__()
        self.open, self.tags, self.attributes, self.texts = [], [], [], []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)

    @property
    def text(self):
        return " ".join(self.texts)

    def ids(self):
        return [value for _, name, value in self.attributes if name == "id"]


def read(path):
    return Page(path.read_text(encoding="utf-8"))


def figures(path):
    html = path.read_text(encoding="utf-8")
    return {m[1]: m[0] for m in re.finditer(r'<figure id="([^"]+)".*?</figure>', html, flags=re.DOTALL)}


def test_every_figure_of_a_ppo_run_is_drawn(finished):
    drawn = figures(finished)
    assert list(drawn)[:5] == PPO_FIGURES
    assert "fig-entropy" in drawn and "fig-explained-var" in drawn
    for name, markup in drawn.items():
        assert 'class="missing"' not in markup and "<svg" in markup, name
        assert re.search(r'id="[^"]*series-0-0"', markup), name


def test_a_quickstart_folder_shows_all_stages_and_the_bars(quickstart):
    assert set(PPO_FIGURES + SFT_FIGURES + RM_FIGURES) <= set(figures(quickstart))
    text = read(quickstart).text
    assert "Passed: 93% of replies to held-out prompts keep the hidden rule after PPO, 52% after SFT." in text
    assert text.count("✓") == 8 and "✗" not in text
    assert "After SFT" in text and "别担心" in text and "Margins on held-out pairs" in text


def test_a_missed_bar_is_marked(tmp_path):
    write_stage(tmp_path / "sft", "sft", 3)
    (tmp_path / "verdict.json").write_text(json.dumps(VERDICT | {"kl_sequence_mean": 12.5, "passed": False}))
    html = build_report(tmp_path).read_text()
    assert "Not passed: 93%" in html
    assert re.search(r'class="tile bad"><div class="name">KL per response</div><div class="value">12.5 ✗', html)


@pytest.mark.parametrize(("stage", "expected"), [("sft", SFT_FIGURES), ("reward", RM_FIGURES)])
def test_single_stage_folders(tmp_path, stage, expected):
    report = build_report(write_stage(tmp_path / "run", stage, 30))
    shown = figures(report)
    assert [name for name in shown if name in expected] == expected
    assert "missing" not in "".join(shown.values())


@pytest.mark.parametrize("name", ["finished", "quickstart", "hostile"])
def test_one_small_inert_file(request, name):
    report = request.getfixturevalue(name)
    page = read(report)
    assert report.stat().st_size < 2_000_000
    active = {
        "script",
        "img",
        "iframe",
        "object",
        "embed",
        "link",
        "base",
        "form",
        "input",
        "video",
        "audio",
        "foreignobject",
    }
    assert active & set(page.tags) == set()
    for tag, attribute, value in page.attributes:
        assert not attribute.startswith("on"), (tag, attribute)
        assert "//" not in value and "javascript:" not in value, (tag, attribute, value)
        if attribute in ("href", "src", "xlink:href"):
            assert value.startswith("#"), (tag, value)
    assert ("meta", "content", "default-src 'none'; style-src 'unsafe-inline'") in page.attributes
    assert len(page.ids()) == len(set(page.ids()))
    anchors = {value[1:] for tag, attribute, value in page.attributes if attribute == "href"}
    assert anchors <= set(page.ids())
    style = re.search(r"<style>(.*?)</style>", report.read_text(), flags=re.DOTALL)[1]
    assert "url(" not in style and "@import" not in style


def test_hostile_texts_are_shown_as_texts(hostile):
    html, text = hostile.read_text(encoding="utf-8"), read(hostile).text
    assert "<script>document.title='owned'</script>" in text
    assert "</div></table><img src=x onerror=alert(1)>" in text
    assert "&lt;b&gt; &#60;script&#62;" in text
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", html)
    assert "more characters" in text


def test_a_killed_run_is_reported_with_its_resume_command(hostile):
    text = read(hostile).text
    assert "Not finished (step 37 of 500): held-out reward rose from" in text
    assert f"fastrlhf resume {hostile.parent}" in text


def test_a_run_torn_anywhere_still_gets_a_report(tmp_path):
    folder = write_stage(tmp_path / "run", "ppo", 12)
    for name in ("metrics", "timings", "samples", "events"):
        with open(folder / f"{name}.jsonl", "ab") as file:
            file.write(b'{"step": 13, "rewa\xff')
    with open(folder / "metrics.jsonl", "ab") as file:
        file.write(b"\n[1, 2]\n" + b"[" * 100_000)
    (folder / "config.yaml").write_text("seed: [1, &a")
    (folder / "run.json").write_text("{")
    text = read(build_report(folder)).text
    assert "5 unreadable line(s) skipped" in text or "6 unreadable line(s) skipped" in text
    assert "in 12 PPO steps" in text


def test_metrics_alone_are_enough(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "kl/ref": 0.0, "reward/mean": 0.5}\n')
    shown = figures(build_report(tmp_path))
    assert 'class="missing"' not in shown["fig-reward"] and 'class="missing"' in shown["fig-loss"]
    assert "no step recorded policy/loss or value/loss" in shown["fig-loss"]


def test_a_metric_that_was_never_finite_is_a_loud_gap(tmp_path):
    folder = write_stage(tmp_path / "run", "ppo", 12)
    with Tracker(folder, "ppo", 3, console=False) as tracker:
        for step in (1, 2, 3):
            (folder / "config.yaml").write_text("total_steps: 3\n")
            tracker.log(step, {"reward/mean": math.nan, "kl/ref": 0.1 * step, "policy/loss": 0.0, "length/mean": 3.0})
    report = build_report(folder)
    assert 'class="missing"' in figures(report)["fig-reward"] and 'class="missing"' in figures(report)["fig-reward-kl"]
    text = read(report).text
    assert "No reward was recorded in 3 PPO steps." in text and "not finite" in text and "at step 1, 2, 3" in text


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (None, "no such folder"),
        ({}, "holds no metrics"),
        ({"metrics.jsonl": ""}, "expected metrics.jsonl with at least"),
    ],
)
def test_folders_without_a_run_are_refused(tmp_path, content, expected):
    folder = tmp_path / "run"
    if content is not None:
        folder.mkdir()
        for name, text in content.items():
            (folder / name).write_text(text)
    with pytest.raises(UserError, match=expected) as error:
        main(folder)
    assert str(folder) in str(error.value)


def test_main_prints_the_path(finished, capsys):
    assert main(str(finished.parent)) == 0
    assert capsys.readouterr().out == f"{finished}\n"


def test_the_same_files_give_the_same_bytes(finished):
    before = finished.read_bytes()
    assert build_report(finished.parent).read_bytes() == before
    assert [path.name for path in finished.parent.glob(".report*")] == []


def test_long_runs_stay_small(tmp_path):
    draw = random.Random(0)
    with open(tmp_path / "metrics.jsonl", "w") as file:
        for step in range(1, 10_001):
            file.write(json.dumps({"step": step, **ppo_metrics(step / 10_000, draw)}) + "\n")
    assert build_report(tmp_path).stat().st_size < 1_000_000


def test_credentials_stay_out(tmp_path):
    folder = write_stage(tmp_path / "run", "ppo", 3)
    config = (folder / "config.yaml").read_text()
    (folder / "config.yaml").write_text(config.replace("policy: out/sft", "policy: https://me:hunter22@host/sft"))
    token = "hf_" + "aB3" * 10
    (folder / "run.json").write_text(json.dumps({"verb": "ppo", "argv": [f"--token={token}"], "WANDB_API_KEY": token}))
    html = build_report(folder).read_text()
    assert "hunter22" not in html and token not in html and "https://***@host/sft" in html


def test_changed_fields_stand_beside_their_defaults(finished):
    html = finished.read_text()
    assert re.search(r"learning_rate</td><td[^>]*><code>0.0003</code></td><td[^>]*><code>1e-06</code>", html)
    section = html[html.index('<section id="config">') : html.index("The whole config.yaml")]
    assert "eval_every" in section and "gae_lambda" not in section


def test_time_is_shared_out_by_phase(finished):
    section = finished.read_text().split('<section id="time">')[1].split("</section>")[0]
    shares = [int(share) for share in re.findall(r">(\d+)%<", section)]
    assert section.index("update") < section.index("rollout") < section.index("score")
    assert 97 <= sum(shares) <= 103


def test_samples_show_the_first_and_the_last_response(finished):
    section = finished.read_text().split('<section id="samples">')[1].split("</section>")[0]
    for prompt, before, after in PROMPTS:
        assert prompt in section and section.index(before) < section.index(after)
    assert section.count("▲ score") == len(PROMPTS)


@pytest.mark.parametrize(
    ("values", "expected"), [([1.0], (1, 1, 1)), ([1.0, 3.0], (1, 3, 1)), ([0.0] * 30 + [1.0] * 10, (0, 1, 4))]
)
def test_ends_are_means_of_a_tenth(values, expected):
    assert ends(list(enumerate(values))) == expected


def test_curves_keep_both_ends_and_are_deterministic():
    points = [(step, math.sin(step / 500)) for step in range(5000)]
    drawn = [curves("fig-x", "t", [Panel("u", [Series("s", points, True)])], "step") for _ in range(2)]
    assert drawn[0] == drawn[1]
    marks = re.search(r'<g id="fig-x-series-0-0">(.*?)</g>\s*</g>', drawn[0], flags=re.DOTALL)[1]
    assert 300 <= marks.count("<use") <= 400
    assert 'href="#fig-x-' in marks and "#0102" not in drawn[0]


# ---------------------------------------------------------------------------------------------------- in a browser

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
PROBE = """<!doctype html><meta charset="utf-8"><body style="margin:0"><script>
const found = [];
async function probe(frame, width) {
  const page = frame.contentDocument, root = page.documentElement, bad = [];
  page.querySelectorAll("details").forEach(d => d.open = true);
  const figures = [...page.querySelectorAll("figure")];
  for (const figure of figures) {
    const svg = figure.querySelector("svg"), say = why => bad.push(figure.id + ": " + why);
    if (figure.classList.contains("missing")) say("missing");
    if (!svg) { say("no svg"); continue; }
    const box = svg.getBoundingClientRect();
    if (box.width < 150 || box.height < 80) say("svg of " + box.width + " x " + box.height);
    const series = svg.querySelectorAll('[id*="-series-"]');
    if (!series.length) say("no curve");
    series.forEach(s => { const b = s.getBBox(); if (!(b.width + b.height > 0)) say(s.id + " is empty"); });
    svg.querySelectorAll("text").forEach(t => {
      const b = t.getBoundingClientRect();
      if (b.width > 0 && (b.left < box.left - 1 || b.right > box.right + 1)) say("text cut: " + t.textContent.trim());
      if (b.height > 0 && b.height < 7) say("text too small: " + b.height);
    });
  }
  if (root.scrollWidth > width) bad.push("page is " + root.scrollWidth + " wide");
  page.querySelectorAll("body *:not(svg *)").forEach(e => {
    const right = e.getBoundingClientRect().right;
    if (right > width + 1) bad.push(e.tagName + "." + e.className + " ends at " + right);
  });
  const loads = frame.contentWindow.performance.getEntriesByType("resource").map(entry => entry.name);
  found.push({width, bad, loads, figures: figures.map(f => f.id), title: page.title,
              ink: frame.contentWindow.getComputedStyle(page.body).color});
}
</script>%s<pre id="probe"></pre><script>
onload = async () => {
  for (const frame of document.querySelectorAll("iframe")) await probe(frame, frame.clientWidth);
  document.getElementById("probe").textContent = JSON.stringify(found);
};
</script>"""


def browse(page, tmp_path, *options):
    """Run headless Chromium on a page -> (its DOM afterwards, its log)."""
    quiet = (
        "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
        "--disable-component-update --disable-sync --enable-logging=stderr --v=0 --virtual-time-budget=10000"
    )
    command = [CHROMIUM, *quiet.split(), f"--user-data-dir={tmp_path / 'profile'}", *options, page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout, done.stderr


def probe(reports, tmp_path, *options):
    """What a browser makes of reports, 1280 and 420 pixels wide, and the lines it wrote to its console."""
    frames = "".join(
        f'<iframe srcdoc="{escape(html, quote=True)}" style="border:0;width:{width}px;height:900px"></iframe>'
        for html in reports
        for width in (1280, 420)
    )
    page = tmp_path / "probe.html"
    page.write_text(PROBE % frames, encoding="utf-8")
    dom, log = browse(page, tmp_path, "--window-size=1400,2000", "--dump-dom", *options)
    found = re.search(r'<pre id="probe">(.*?)</pre>', dom, flags=re.DOTALL)[1]
    return json.loads(unescape(found)), [line for line in log.splitlines() if "CONSOLE" in line]


@pytest.mark.real
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
def test_in_a_browser(finished, quickstart, hostile, tmp_path):
    picture = tmp_path / "shot.png"
    reports = [report.read_text(encoding="utf-8") for report in (finished, quickstart, hostile)]
    found, console = probe(reports, tmp_path, f"--screenshot={picture}")
    assert console == []
    assert [view["width"] for view in found] == [1280, 420] * 3
    for view in found:
        assert view["bad"] == [] and view["loads"] == []
        assert set(PPO_FIGURES) <= set(view["figures"])
        assert view["title"].endswith("fastrlhf report")
    assert set(SFT_FIGURES + RM_FIGURES) <= set(found[2]["figures"]) & set(found[3]["figures"])
    assert picture.stat().st_size > 100_000  # a blank page is a tenth of it


@pytest.mark.real
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
def test_the_browser_test_can_fail(finished, tmp_path):
    html = finished.read_text(encoding="utf-8")
    html = re.sub(r'(<figure id="fig-kl">.*?)<svg.*?</svg>', r"\1", html, count=1, flags=re.DOTALL)
    html = html.replace('<g id="fig-length-series-0-0">', '<g id="fig-length-series-9-9"></g><g>', 1)
    html = html.replace("</main>", '<div style="width:3000px">wide</div><img src="file:///nothing.png"></main>')
    html = html.replace("</body>", "<script>broken(</script></body>")
    found, console = probe([html], tmp_path)
    faults = " ".join(found[0]["bad"])
    assert "fig-kl: no svg" in faults and "fig-length: fig-length-series-9-9 is empty" in faults
    assert re.search(r"page is 30\d\d wide", faults)
    assert console  # the policy refuses the script and the image, and says so
