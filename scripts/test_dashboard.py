"""The dashboard in a real browser; scripts/test-dashboard runs this. One aggregator, two devices, rounds on this machine.

Everything that is checked is read from the page as a person sees it, and compared with what the programs say.
"""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from playwright.sync_api import expect, sync_playwright

ROOT = Path(__file__).resolve().parent.parent
BIN = ROOT / "target/release"
PACKAGE = ROOT / "target/reference/package"
WAIT_MS = 240_000


def free_port(kind):
    with socket.socket(socket.AF_INET, kind) as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def environment():
    kept = {name: value for name, value in os.environ.items() if not name.startswith("COMMONWEAL_")}
    kept.setdefault("ORT_DYLIB_PATH", str(ROOT / "target/runtime/libonnxruntime.so"))
    return kept


def call(*command):
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, env=environment())
    if done.returncode != 0:
        sys.exit(f"{' '.join(map(str, command))}: exit {done.returncode}\n{done.stderr}")
    return [json.loads(line) for line in done.stdout.split("\n") if line.startswith("{")]


class Federation:
    """Real programs in a temporary directory; ended when it is left."""

    def __init__(self, directory):
        self.directory = Path(directory)
        self.state = self.directory / "aggregator"
        self.address = f"127.0.0.1:{free_port(socket.SOCK_DGRAM)}"
        self.admin = f"127.0.0.1:{free_port(socket.SOCK_STREAM)}"
        self.children = []

    def __enter__(self):
        call(BIN / "aggregator", "init", "--dir", self.state, "--package", PACKAGE, "--address", self.address,
             "--listen", self.address, "--admin", self.admin, "--devices", 2, "--quorum", 2, "--over-selection", 1,
             "--steps", 3, "--threads", 1, "--align-prompts", 2, "--align-steps", 1, "--no-evaluate", "--json")
        path = self.state / "aggregator.toml"
        text = path.read_text()
        for name, value in [("reconnect_after_ms", 200), ("reconnect_spread_ms", 100), ("requests_per_second", "1000.0"),
                            ("rows_max", 4), ("wait_ms", 0), ("safe_rate_min", "0.0"), ("safe_rate_drop_max", '"off"'),
                            ("over_refusal_max", "1.0"), ("held_out_loss_max", "1000.0"), ("held_out_loss_rise_max", '"off"')]:
            text, count = re.subn(rf"^{name} = .*$", f"{name} = {value}", text, flags=re.M)
            assert count == 1, f"{name} in aggregator.toml"
        path.write_text(text)
        return self

    def __exit__(self, *_):
        for child in reversed(self.children):
            child.send_signal(signal.SIGTERM)
        for child in self.children:
            try:
                child.wait(60)
            except subprocess.TimeoutExpired:
                child.kill()

    def start(self, name, *command):
        log = open(self.directory / f"{name}.log", "w")
        child = subprocess.Popen([str(part) for part in command], stdout=log, stderr=subprocess.STDOUT, env=environment())
        self.children.append(child)
        return child

    def serve(self):
        child = self.start("aggregator", BIN / "aggregator", "serve", "--dir", self.state, "--json")
        end = time.monotonic() + WAIT_MS / 1000
        while '"listening"' not in (self.directory / "aggregator.log").read_text():
            if child.poll() is not None or time.monotonic() > end:
                sys.exit("the aggregator does not listen:\n" + (self.directory / "aggregator.log").read_text())
            time.sleep(0.2)

    def device(self, number, invitation):
        common = ["--dir", self.directory / f"device-{number}", "--package", PACKAGE, "--threads", 1, "--json"]
        call(BIN / "edge-client", "enroll", invitation, *common)
        rows = self.directory / f"device-{number}.jsonl"
        rows.write_text("".join(json.dumps({"messages": [
            {"role": "user", "content": f"How long do I boil {100 * number + row} eggs?"},
            {"role": "assistant", "content": "In short: boil eggs for 8 minutes. Tip: start in cold water."}]}) + "\n"
            for row in range(8)))
        call(BIN / "edge-client", "add", rows, *common)
        self.start(f"device-{number}", BIN / "edge-client", "run", *common)


def rows(page, table):
    return page.locator(f"#{table} tbody tr")


def look(page, federation, out):
    url = call(BIN / "aggregator", "dashboard", "--dir", federation.state, "--json")[0]["url"]
    base, token = url.split("#token=")

    # Without the token nothing is shown, and a wrong one is refused.
    page.goto(base)
    expect(page.locator("#door")).to_be_visible()
    expect(page.locator("#main")).to_be_hidden()
    page.get_by_label("Admin token").fill("0" * 64)
    page.keyboard.press("Enter")
    expect(page.locator("#refused")).to_have_text("This is not the token.")

    # With it behind the #: the page opens, and the address forgets it.
    page.goto("about:blank")
    page.goto(url)
    expect(page.locator("#main")).to_be_visible()
    assert token not in page.url, page.url
    expect(page.locator("#health")).to_have_text("ready")
    expect(page.locator("#phases li[aria-current]")).to_have_text("waiting")
    expect(rows(page, "releases-table").first.locator("td").nth(2)).to_have_text("init")
    page.reload()
    expect(page.locator("#main")).to_be_visible()
    # By keyboard alone: the first stop is the way to the content.
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "To the content"

    invitations = call(BIN / "aggregator", "token", "--dir", federation.state, "--count", 3, "--json")[0]["invitations"]
    for number, invitation in enumerate(invitations[:2], 1):
        federation.device(number, invitation)
    expect(page.locator("#devices-table tbody td.good")).to_have_count(2, timeout=WAIT_MS)

    # A round happens while the page looks on.
    expect(page.locator("#rounds-table tbody td.good", has_text="published").first).to_be_visible(timeout=WAIT_MS)
    told = [record for record in call(BIN / "aggregator", "rounds", "--dir", federation.state, "--json") if record["round"] == 1][0]
    cells = page.locator("#rounds-table tbody tr", has=page.locator("td:first-child", has_text=re.compile("^1$"))).first.locator("td")
    assert told["outcome"] == cells.nth(2).inner_text(), told
    assert cells.nth(4).inner_text() == f"{told['updates']}/{told['selected']}", told
    assert cells.nth(5).inner_text() == f"{100 * told['safe_rate']:.1f} %", told
    assert cells.nth(7).inner_text() == f"{told['held_out_loss']:.4f}", told
    for stage in ["merge", "align", "evaluate"]:
        assert stage in cells.nth(8).inner_text(), cells.nth(8).inner_text()
    expect(page.locator("#gates tbody tr", has_text="safe rate").locator("td").last).to_have_text("passed")
    expect(page.locator("#rounds-table tbody td.good", has_text="published").nth(2)).to_be_visible(timeout=WAIT_MS)
    expect(page.locator("#plot circle.loss").nth(2)).to_be_attached()
    # Nothing is tried on a share of the devices here, and the page says so.
    expect(page.locator("#trials-text")).to_contain_text("release.canary_share is 0")
    expect(rows(page, "trials-table")).to_have_count(0)

    # A device that is revoked is shown so, without a reload; its refusals come among the events.
    first = call(BIN / "aggregator", "devices", "--dir", federation.state, "--json")[0]["device"]
    call(BIN / "aggregator", "revoke", first, "--dir", federation.state)
    row = page.locator("#devices-table tbody tr", has_text=first)
    expect(row.locator("td").nth(1)).to_have_text("revoked", timeout=WAIT_MS)
    page.get_by_label("refusals only").check()
    expect(page.locator("#events-list li").first).to_contain_text("revoked", timeout=WAIT_MS)
    page.get_by_label("refusals only").uncheck()
    page.get_by_label("Show").select_option("revoked")
    expect(rows(page, "devices-table")).to_have_count(1)
    page.get_by_label("Show").select_option("")

    page.evaluate("document.activeElement.blur(); scrollTo(0, 0)")
    out.mkdir(parents=True, exist_ok=True)
    for scheme in ["light", "dark"]:
        page.emulate_media(color_scheme=scheme)
        page.screenshot(path=out / f"dashboard-{scheme}.png", full_page=False)
    page.set_viewport_size({"width": 390, "height": 844})
    width = page.evaluate("document.documentElement.scrollWidth")
    assert width <= 390, f"the page is {width} wide on a phone of 390"
    page.screenshot(path=out / "dashboard-phone.png")

    page.get_by_role("button", name="Forget the token").click()
    expect(page.locator("#door")).to_be_visible()
    assert page.evaluate("sessionStorage.length") == 0


def main():
    out = Path(sys.argv[1])
    with tempfile.TemporaryDirectory() as directory, Federation(directory) as federation, sync_playwright() as playwright:
        federation.serve()
        browser = playwright.chromium.launch(executable_path=os.environ["COMMONWEAL_CHROMIUM"], args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1200, "height": 1000}, locale="en-GB", timezone_id="UTC")
        faults = []
        page.on("pageerror", lambda error: faults.append(str(error)))
        # What the policy of the page blocks is told on the console; a refusal of the token is told there too.
        page.on("console", lambda message: faults.append(message.text)
                if message.type == "error" and "401" not in message.text else None)
        look(page, federation, out)
        assert not faults, faults
        browser.close()
    print(f"the dashboard shows what happens; screenshots in {out}")


if __name__ == "__main__":
    main()
