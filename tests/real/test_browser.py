"""report.html and the page of an evaluation in headless Chromium, 1280 and 420 pixels wide: no missing or empty figure,
no overflow, no error."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html import escape, unescape

import pytest

from fastrlhf.eval.page import page_of
from fastrlhf.report import build_report
from tests.eval_pages import evaluation
from tests.run_folders import PPO_FIGURES, RM_FIGURES, SFT_FIGURES, write_killed, write_quickstart, write_stage

TIMEOUT_S = 300  # a browser starts in seconds, but not on a machine with two busy cores
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = [pytest.mark.real, pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")]

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
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S)
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


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return build_report(write_stage(tmp_path_factory.mktemp("run") / "ppo", "ppo", 120)).read_text(encoding="utf-8")


def test_every_figure_is_drawn_and_nothing_overflows(finished, tmp_path):
    picture = tmp_path / "shot.png"
    others = [build_report(write(tmp_path / "run" / write.__name__)) for write in (write_quickstart, write_killed)]
    others += [build_report(write_quickstart(tmp_path / "zh"), "zh")]
    reports = [finished, *(report.read_text(encoding="utf-8") for report in others), page_of(evaluation())]
    found, console = probe(reports, tmp_path, f"--screenshot={picture}")
    assert console == []
    assert [view["width"] for view in found] == [1280, 420] * 5
    for view in found:
        assert view["bad"] == [] and view["loads"] == []
    for view in found[:8]:
        assert set(PPO_FIGURES) <= set(view["figures"])
        assert view["title"].endswith("fastrlhf report") or view["title"] == "zh：fastrlhf 报告"
    for view in found[8:]:
        assert view["figures"] == ["fig-eval-reward", "fig-eval-length"]
        assert view["title"].endswith("fastrlhf evaluation")
    assert set(SFT_FIGURES + RM_FIGURES) <= set.intersection(*(set(found[i]["figures"]) for i in (2, 3, 6, 7)))
    assert picture.stat().st_size > 100_000  # a blank page is a tenth of it


def test_the_probe_sees_what_is_broken(finished, tmp_path):
    html = re.sub(r'(<figure id="fig-kl">.*?)<svg.*?</svg>', r"\1", finished, count=1, flags=re.DOTALL)
    html = html.replace('<g id="fig-length-series-0-0"', '<g id="fig-length-series-9-9"></g><g', 1)
    html = html.replace("</main>", '<div style="width:3000px">wide</div><img src="file:///nothing.png"></main>')
    html = html.replace("</body>", "<script>broken(</script></body>")
    found, console = probe([html], tmp_path)
    faults = " ".join(found[0]["bad"])
    assert "fig-kl: no svg" in faults and "fig-length: fig-length-series-9-9 is empty" in faults
    assert re.search(r"page is 30\d\d wide", faults)
    assert console  # the policy refuses the script and the image, and says so
