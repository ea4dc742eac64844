"""In headless Chromium, docs/browser.html answers as Python does.

Needs Chromium, and in SDSER_ORT_WEB the folder `dist` of the npm package onnxruntime-web; is skipped without them.
"""

import json
import os
import re
import shutil
import subprocess
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Timer

import numpy as np
import pytest

import benchmark_edge
import evaluate
import sdser

ROOT = Path(__file__).parents[1]
ORT_WEB = Path(os.environ.get("SDSER_ORT_WEB") or ROOT / "node_modules" / "onnxruntime-web" / "dist")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = "--headless --no-sandbox --disable-gpu --disable-dev-shm-usage --no-first-run --disable-background-networking"
MICROPHONE = "--use-fake-device-for-media-stream --use-fake-ui-for-media-stream"  # one that beeps
OFFLINE = "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"  # the page must not need anything from elsewhere

# Gives the page each file as a user would, or presses its button, and sends back what it shows.
DRIVER = """<meta charset="utf-8"><iframe src="browser.html"></iframe><script>
onload = async () => {
  const page = document.querySelector("iframe").contentDocument, shown = {};
  const [controls, input, button, output] = page.querySelectorAll("fieldset, input, button, output");
  for (const name of NAMES) {
    if (name == "microphone") button.click();
    else {
      const chosen = new DataTransfer();
      chosen.items.add(new File([await (await fetch(name)).blob()], name));
      input.files = chosen.files;
      input.dispatchEvent(new Event("change"));
    }
    while (controls.disabled) await new Promise(resolve => setTimeout(resolve, 20));
    shown[name] = [output.innerText, [...output.querySelectorAll("meter")].map(meter => meter.value)];
  }
  fetch("shown", {method: "POST", body: JSON.stringify(shown)});
};</script>"""


class Handler(SimpleHTTPRequestHandler):
    def do_POST(self):
        self.server.shown = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.shutdown()


def browse(folder, names) -> dict:
    """What the folder's browser.html shows for each name, a file or "microphone": {name: (text, probabilities)}."""
    (folder / "driver.html").write_text(DRIVER.replace("NAMES", json.dumps(names)), "utf-8")
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=folder)) as server:
        flags = [*FLAGS.split(), *MICROPHONE.split(), OFFLINE, f"--user-data-dir={folder / 'profile'}"]
        browser = subprocess.Popen([CHROMIUM, *flags, f"http://127.0.0.1:{server.server_port}/driver.html"])
        server.shown, timer = None, Timer(120, server.shutdown)
        try:
            timer.start()
            server.serve_forever()
        finally:
            timer.cancel()
            browser.kill()
            browser.wait()
        assert server.shown, "no answer from Chromium in 120 s"
        return server.shown


@pytest.mark.skipif(not CHROMIUM or not benchmark_edge.has_onnx(), reason="no Chromium, or no onnx")
@pytest.mark.skipif(not ORT_WEB.is_dir(), reason=f"no {ORT_WEB}; SDSER_ORT_WEB can name another folder")
def test_the_page_answers_as_python_does(tmp_path, wav):
    """The page as it stands, with data/emodb's labels. Resamplers differ, so other rates get a wide tolerance."""
    clips = evaluate.load_corpus(evaluate.DATA / "emodb")
    labels = sorted({clip.label for clip in clips})
    model = sdser.MultiExitSER(labels, str(evaluate.DATA / "hubert-small"), [2], "attention").eval()
    model.heads["2"].classifier.weight.data *= 3  # so that different sounds get different answers
    benchmark_edge.export(model, 2, [("fp32", tmp_path / "model.onnx")])
    page = Path(shutil.copy(ROOT / "docs" / "browser.html", tmp_path)).read_text("utf-8")
    for name in re.findall(r"\bort[\w.-]+\.\w+", page.partition("-->")[0]):
        shutil.copy(ORT_WEB / name, tmp_path)
    a, b = (sdser.load_audio(clip.path)[:20_000].numpy() for clip in clips[:2])
    wav(np.stack([a, b], axis=1), "stereo.wav"), wav(np.repeat(a, 3), "48_khz.wav", 48_000), wav(a[:719], "short.wav")
    shown = browse(tmp_path, ["stereo.wav", "48_khz.wav", "short.wav", "microphone"])
    answers = {name: dict(zip(re.findall("[a-z]+", text), values)) for name, (text, values) in shown.items()}
    for name, clip, tolerance in (("stereo.wav", (a + b) / 2, 1e-3), ("48_khz.wav", a, 0.05)):
        [wanted] = model.classify(clip)
        assert answers[name] == pytest.approx(wanted.probabilities, abs=tolerance)
    assert "0.045" in shown["short.wav"][0] and sum(answers["microphone"].values()) == pytest.approx(1)
