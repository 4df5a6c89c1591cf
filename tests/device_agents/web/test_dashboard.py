"""The dashboard's page in a real Chromium: what a person sees, presses and is told."""

import pytest

from shoal.device_agents import endpoint
from shoal.device_agents.identity import Identity
from shoal.device_agents.pairing import Code
from shoal.device_agents.trust import Peers

ENTER, ESCAPE, TAB = "\ue007", "\ue00c", "\ue004"
NAMES = "[...document.querySelectorAll('#devices .who')].map(node => node.textContent)"


@pytest.fixture
def board(browser, serving, token):
    """Signed in, with the first snapshot shown."""
    browser.open(serving.url)
    browser.wait("!document.getElementById('login').hidden")
    browser.type("#token", token)
    browser.keys(ENTER)
    browser.wait("document.getElementById('state').textContent == 'Live'")
    return browser


def text(browser, selector: str) -> str:
    return browser.run(f"return document.querySelector({selector!r}).innerText").replace("\xa0", " ")


def test_the_token_signs_in_and_a_wrong_one_is_told(browser, serving, token):
    browser.open(serving.url)
    browser.wait("document.activeElement.id == 'token'")
    browser.type("#token", "not-the-right-token")
    browser.keys(ENTER)
    browser.wait("document.getElementById('denied').textContent.includes('The token is wrong.')")
    browser.type("#token", token)
    browser.click("#login button")
    browser.wait("document.querySelectorAll('#devices li').length == 4")
    assert browser.run("return document.cookie + localStorage.length") == "0"  # no script can read the cookie
    assert browser.run("return document.getElementById('token').value") == ""
    browser.open(serving.url)  # the session outlives a reload
    browser.wait("document.querySelectorAll('#devices li').length == 4")
    browser.click("#out")
    browser.wait("!document.getElementById('login').hidden")
    assert browser.run("return document.querySelectorAll('#devices li').length") == 0
    assert [line for line in browser.log() if "401" not in line] == []  # Chromium itself reports the wrong token


def test_a_link_with_the_token_signs_in_and_leaves_no_trace(browser, serving, token):
    browser.open(f"{serving.url}#token={token}")
    browser.wait("document.getElementById('state').textContent == 'Live'")
    assert browser.run("return location.href") == serving.url
    assert browser.log() == []


def test_a_change_is_shown_without_a_reload(board, serving, stand_in):
    assert text(board, "#name") == "attic" and text(board, "#t-devices") == "3 of 4"
    row = text(board, "#devices li")
    for shown in (
        "camera-front",
        "tcp 192.168.1.31:50112",
        "1.4 ms rtt",
        "mobilenet-tail",
        "mode 3",
        "4 bit",
        "6.9 kB",
    ):
        assert shown in row
    assert "Not connected" in text(board, "#devices li:last-child")
    board.run("document.querySelector('#devices li').marked = true")
    first, *others = stand_in.value["devices"]
    first |= {"name": "<img src=x onerror=alert(1)>", "link": None}
    stand_in.value |= {"devices": [others[1], first, others[0]], "models": [], "rounds": []}
    serving.do(stand_in.change)
    board.wait("document.querySelectorAll('#devices li').length == 3")
    assert board.run(f"return {NAMES}") == ["gate-sensor", "<img src=x onerror=alert(1)>", "camera-yard"]
    assert board.run("return document.querySelectorAll('#devices li')[1].marked")  # kept, not drawn anew
    assert text(board, "#t-devices") == "2 of 3" and text(board, "#no-models") == "No model is stored yet."
    assert board.run("return document.querySelectorAll('#models li, #rounds li').length") == 0
    assert board.log() == []


def test_pairing_shows_code_and_countdown_until_it_is_used(board, serving, stand_in):
    board.click("#pair")
    board.wait("document.getElementById('p-code').textContent == '4071-2386'")
    assert text(board, "#p-command") == "shoal pair 192.168.1.20:4707 4071-2386"
    assert text(board, "#p-tries") == "3 tries left"
    assert board.run("return document.querySelector('#p-qr path').getAttribute('d').length") > 1000
    assert board.run("return getComputedStyle(document.getElementById('p-qr')).backgroundColor") == "rgb(255, 255, 255)"
    board.wait("/1:5[0-8] left/.test(document.getElementById('p-left').textContent)")
    stand_in.value["pairing"]["tries_left"] = 1
    serving.do(stand_in.change)
    board.wait("document.getElementById('p-tries').textContent == '1 try left'")
    board.keys(ESCAPE)  # hides it: the window stays open, and the button says so
    board.wait("/Pairing 1:/.test(document.getElementById('pair').textContent)")
    board.click("#pair")
    serving.do(stand_in.end_window, "used", "camera-attic")
    board.wait("document.getElementById('p-title').textContent == 'camera-attic is paired'")
    assert not board.run(
        "return document.body.innerHTML.includes('4071-2386') && !document.getElementById('p-open').hidden"
    )
    board.click("#p-close")
    assert stand_in.calls == [("open",)]
    board.click("#pair")
    board.wait(
        "document.getElementById('p-code').textContent == '4071-2386' && !document.getElementById('p-open').hidden"
    )
    board.click("#p-stop")
    board.wait("document.getElementById('p-title').textContent == 'Pairing was stopped'")
    board.click("#p-again")
    board.wait("!document.getElementById('p-open').hidden && document.getElementById('p-left').textContent")
    serving.do(stand_in.end_window, "locked")
    board.wait("document.getElementById('p-title').textContent == 'Pairing is locked'")
    assert stand_in.calls == [("open",), ("open",), ("close",), ("open",)]
    assert board.log() == []


def test_a_window_that_runs_out_is_told_even_when_the_edge_is_slow_to_say_so(board, serving, stand_in):
    board.click("#pair")
    board.wait("document.getElementById('p-code').textContent == '4071-2386'")
    stand_in.value["pairing"]["closes_at"] = stand_in.value["pairing"]["opened_at"] + 1
    serving.do(stand_in.change)
    board.wait("document.getElementById('p-title').textContent == 'The code has expired'")
    assert text(board, "#pair") == "Pair a device"


def test_renaming_and_revoking_by_keyboard(board, stand_in):
    board.run("document.querySelector('#devices li button').focus()")
    assert board.run("return document.activeElement.getAttribute('aria-label')") == "Rename camera-front"
    board.keys(ENTER)
    board.wait("document.activeElement.id == 'r-name'")
    board.type("#r-name", "taken")
    board.keys(ENTER)
    board.wait("document.querySelector('#d-rename .wrong').textContent.includes('The name is taken.')")
    board.type("#r-name", "porch")
    board.keys(ENTER)
    board.wait(f"!document.getElementById('d-rename').open && {NAMES}[0] == 'porch'")
    assert board.run("return document.activeElement.getAttribute('aria-label')") == "Rename porch"
    board.keys(TAB, ENTER)
    board.wait("document.getElementById('d-revoke').open")
    assert text(board, "#d-revoke-title") == "Revoke porch?"
    assert board.run("return document.activeElement.textContent") == "Cancel"  # Enter alone does not revoke
    board.keys(TAB, ENTER)
    board.wait(f"!document.getElementById('d-revoke').open && !{NAMES}.includes('porch')")
    assert [call[0] for call in stand_in.calls] == ["rename", "rename", "revoke"]


def test_the_edge_goes_and_comes_back(board, serving, stand_in):
    serving.stop()
    board.wait("!document.getElementById('gone').hidden")
    assert "The edge does not answer" in text(board, "#gone") and text(board, "#state") == "Offline"
    assert "camera-front" in text(board, "#devices")  # the last that was known stays
    assert board.run("return document.getElementById('pair').disabled")
    stand_in.value["devices"][0]["name"] = "after"
    stand_in.value["started_at"] += 100
    serving.start()
    board.wait(f"document.getElementById('gone').hidden && {NAMES}[0] == 'after'")
    assert text(board, "#state") == "Live" and not board.run("return document.getElementById('pair').disabled")
    assert [line for line in board.log() if "Failed to load resource" not in line] == []


def test_a_session_that_ended_asks_for_the_token_again(board, serving):
    board.devtools("Network.clearBrowserCookies", {})
    serving.stop()
    serving.start()
    board.wait("!document.getElementById('login').hidden")
    assert board.run("return document.getElementById('board').hidden")
    assert board.run("return document.querySelectorAll('#devices li').length") == 0  # nothing stays in the page


# Controls that are hidden, too small for a finger, or beyond the right edge
UNFIT = """
const shown = [...document.querySelectorAll('button')].filter(button => button.offsetParent);
const boxes = shown.map(button => button.getBoundingClientRect());
return boxes.filter(box => box.height < 40 || box.width < 40 || box.left < 0 || box.right > innerWidth).length;
"""
# Elements wider than the window, or than the open dialog
WIDE = """
const roots = [document.documentElement, document.body, ...document.querySelectorAll('dialog[open]')];
return roots.filter(root => root.scrollWidth > Math.min(innerWidth, root.clientWidth)).map(root => root.tagName);
"""


def test_no_width_scrolls_sideways_and_every_control_can_be_hit(board, serving, stand_in):
    stand_in.value["name"] = "an-edge-with-a-name-that-goes-on-and-on-without-a-space-in-it"
    stand_in.value["devices"][0]["name"] = "W" * 64
    serving.do(stand_in.change)
    board.wait("document.getElementById('name').textContent.startsWith('an-edge')")
    for width in (320, 390, 768, 1280):
        board.screen(width, 844)
        assert board.run(WIDE) == [] and board.run(UNFIT) == 0, width
    board.click("#pair")
    board.wait("document.getElementById('p-code').textContent == '4071-2386'")
    for width in (320, 390, 1280):
        board.screen(width, 844)
        assert board.run(WIDE) == [] and board.run(UNFIT) == 0, width


# Text whose contrast with what is behind it is under WCAG 2's 4.5 to 1
POOR = """
const parse = text => {
  const [r, g, b, a = 1] = text.match(/[\\d.]+/g).map(Number);
  return text.startsWith('color(') ? [r * 255, g * 255, b * 255, a] : [r, g, b, a];
};
const linear = value => (value /= 255) <= .04045 ? value / 12.92 : ((value + .055) / 1.055) ** 2.4;
const light = ([r, g, b]) => .2126 * linear(r) + .7152 * linear(g) + .0722 * linear(b);
const behind = node => {
  const layers = [];
  for (; node && layers.at(-1)?.[3] !== 1; node = node.parentElement)
    layers.push(parse(getComputedStyle(node).backgroundColor));
  const over = (below, [r, g, b, a]) => [r, g, b].map((value, i) => value * a + below[i] * (1 - a));
  return layers.reverse().reduce(over, [255, 255, 255]);
};
const poor = new Set(), walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
while (walk.nextNode()) {
  const node = walk.currentNode.parentElement, text = walk.currentNode.data.trim();
  if (!text || !node.checkVisibility() || node.closest('script, style, noscript')) continue;
  const [dark, bright] = [light(parse(getComputedStyle(node).color)), light(behind(node))].sort((a, b) => a - b);
  if ((bright + .05) / (dark + .05) < 4.5) poor.add(text);
}
return [...poor];
"""


def test_text_stands_out_and_every_control_has_a_name(board):
    titled = "document.getElementById(document.querySelector('dialog[open]').getAttribute('aria-labelledby')).innerText"
    for dark in (False, True):
        board.screen(1280, 900, dark=dark)
        assert board.run("return matchMedia('(prefers-color-scheme: dark)').matches") is dark
        assert board.run(POOR) == []
        for opener in ("#pair", "#devices li button", "#devices li button[title=Revoke]"):
            board.click(opener)
            board.wait("document.querySelector('dialog[open]')")
            board.wait("!document.getElementById('d-pair').open || document.getElementById('p-left').textContent")
            assert board.run(POOR) == [] and board.run(f"return {titled}")
            board.keys(ESCAPE)
            board.wait("!document.querySelector('dialog[open]')")
    board.run("document.getElementById('t-devices').style.color = '#445'")  # the check itself sees what is poor
    assert board.run(POOR) == ["3 of 4"]
    board.devtools("Accessibility.enable", {})
    nodes = board.devtools("Accessibility.getFullAXTree", {})["nodes"]
    controls = ("button", "textbox", "image", "link")
    found = [node for node in nodes if not node["ignored"] and node["role"]["value"] in controls]
    names = [node.get("name", {}).get("value") for node in found]
    assert len(names) >= 12 and all(names) and "Revoke greenhouse" in names
    assert any(name.startswith("Median latency of the last 5 min") for name in names)


# In a task of its own: what a driver runs itself is exempt from the page's policy
FOREIGN = """
setTimeout(() => {
  const stopped = [];
  const attempt = (name, run) => { try { run(); } catch { stopped.push(name); } };
  const script = document.createElement('script');
  attempt('script', () => { script.text = 'window.foreign = 1'; document.body.append(script); });
  attempt('html', () => { document.body.innerHTML = '<b>x</b>'; });
  attempt('eval', () => (0, eval)('window.foreign = 1'));
  attempt('timeout', () => setTimeout('window.foreign = 1'));
  fetch('http://127.0.0.1:1/').catch(() => { stopped.push('fetch'); window.stopped = stopped; });
});
"""


def test_nothing_foreign_runs_and_nothing_is_fetched_from_elsewhere(board, serving):
    board.run(FOREIGN)
    board.wait("window.stopped")
    assert board.run("return window.stopped") == ["script", "html", "eval", "timeout", "fetch"]
    assert board.run("return window.foreign ?? 0") == 0
    lines = board.log()
    assert lines and all("Content Security Policy" in line or "Trusted" in line for line in lines)
    fetched = board.run("return performance.getEntriesByType('resource').map(entry => new URL(entry.name).origin)")
    assert set(fetched) <= {serving.url.rstrip("/"), "http://127.0.0.1:1"}


def test_a_real_edge_pairs_a_real_device_and_shows_it(browser, real, token, tmp_path):
    browser.open(f"{real.url}#token={token}")
    browser.wait("document.getElementById('no-devices').innerText.includes('No device is paired yet.')")
    browser.click("#pair-first")
    browser.wait("document.getElementById('p-command').innerText.startsWith('shoal pair 127.0.0.1:')")
    _, _, address, code = text(browser, "#p-command").split()
    identity, peers = Identity.open(tmp_path / "device", "porch"), Peers.open(tmp_path / "device" / "peers")
    real.do(endpoint.pair, address, Code.parse(code), identity, peers, 10.0)
    browser.wait("document.getElementById('p-title').innerText == 'porch is paired'")
    browser.click("#p-close")
    assert text(browser, "#t-devices") == "0 of 1" and "Not connected" in text(browser, "#devices")
    connection = real.do(endpoint.dial, address, identity, peers, 10.0)
    browser.wait("document.getElementById('t-devices').innerText == '1 of 1'")
    assert "tcp 127.0.0.1:" in text(browser, "#devices")
    browser.click("#devices button[title=Revoke]")
    browser.wait("document.getElementById('d-revoke').open")
    browser.click("#d-revoke .danger")
    browser.wait("!document.getElementById('no-devices').hidden")
    real.do(connection.closed)
    assert browser.log() == []
