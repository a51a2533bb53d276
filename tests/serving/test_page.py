"""The page, in a real browser: needs playwright and a chromium (BDM_CHROMIUM names one elsewhere)."""

import os
import shutil
import time
from pathlib import Path

import pytest
from serving_running import running

CHROMIUM = os.environ.get("BDM_CHROMIUM") or shutil.which("chromium") or ""
SCREENSHOTS = os.environ.get("BDM_SCREENSHOTS")
#: Drops a picture's bytes on the page, as a person drags a file there.
DROP = """
async ([address]) => {
  const content = await (await fetch(address)).blob();
  const transfer = new DataTransfer();
  transfer.items.add(new File([content], 'picture.png', { type: 'image/png' }));
  document.dispatchEvent(new DragEvent('drop', { dataTransfer: transfer, bubbles: true, cancelable: true }));
}
"""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not CHROMIUM, reason="no chromium"),
]


@pytest.fixture
def browser():
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as program:
        chromium = program.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


def opened(browser, site, width=1200, height=900, locale="zh-CN"):
    context = browser.new_context(viewport={"width": width, "height": height}, locale=locale)
    context.set_default_timeout(120_000)
    page = context.new_page()
    page.wrong = []
    page.on("pageerror", lambda error: page.wrong.append(str(error)))
    page.on("console", lambda message: page.wrong.append(message.text) if message.type == "error" else None)
    page.goto(site.address)
    until(page, "document.querySelector('#sampler').options.length > 5")
    return page


def until(page, condition):
    """Wait; the page's own rules forbid playwright's way, which evaluates texts in it."""
    end = time.monotonic() + 120
    while not page.evaluate(condition):
        assert time.monotonic() < end, f"this never came: {condition}"
        page.wait_for_timeout(50)


def shot(page, name):
    if SCREENSHOTS:
        page.screenshot(path=str(Path(SCREENSHOTS) / f"{name}.png"))


def test_the_flow(browser, tmp_path):
    with running(tmp_path, seconds=0.02, page=True) as site:
        site.desk.engine.hold_at = 30
        page = opened(browser, site)
        assert page.locator("#draw").inner_text() == "绘制"
        page.fill("#prompt", "红灯笼，蓝色背景")
        page.fill("#prompt_en", "masterpiece")
        page.fill("#steps", "60")
        page.click("#draw")
        preview = page.locator("#running img:visible").first
        preview.wait_for()
        assert page.locator("#gallery li").count() == 0  # seen before the end
        shot(page, "preview")
        page.click("#cancel")
        until(page, "document.querySelector('#status').textContent === '已取消。'")
        assert site.desk.live == []
        site.desk.engine.hold_at = 0

        page.fill("#steps", "8")
        page.uncheck("#any-seed")
        page.fill("#seed", "77")
        page.fill("#count", "2")
        page.keyboard.press("Control+Enter")
        until(page, "document.querySelectorAll('#gallery li').length === 2")
        page.locator("#gallery button").last.click()
        assert "红灯笼，蓝色背景" in page.locator("#detail-list").inner_text()
        assert "77" in page.locator("#detail-list").inner_text()
        named = page.locator("#detail-list dt").all_inner_texts()
        assert not [name for name in named if name.isascii()]
        shot(page, "detail")
        address = page.locator("#detail-picture").get_attribute("src")
        page.click("#detail-close")

        for field in ("#prompt", "#prompt_en", "#seed", "#steps"):
            page.fill(field, "")
        page.evaluate(DROP, [address])
        until(page, "document.querySelector('#prompt').value === '红灯笼，蓝色背景'")
        values = [page.input_value(field) for field in ("#prompt_en", "#seed", "#steps")]
        assert values == ["masterpiece", "77", "8"]
        shot(page, "restored")

        page.check("#one-box")
        page.fill("#box", "月饼，best quality，绿色背景")
        until(page, "document.querySelector('#prompt').value === '月饼，绿色背景'")
        assert page.input_value("#prompt_en") == "best quality"
        shot(page, "one-box")
        page.click("#language")
        assert page.locator("#draw").inner_text() == "Draw"
        assert page.wrong == []
    with running(tmp_path, page=True) as again:
        page = opened(browser, again, locale="en-US")
        assert page.locator("#gallery li").count() == 2  # kept over the restart
        shot(page, "english")


def test_a_phone_shows_all_of_it(browser, tmp_path):
    with running(tmp_path, page=True) as site:
        page = opened(browser, site, width=360, height=740)
        page.fill("#prompt", "一条很长的提示词，" * 20)
        page.click("#draw")
        until(page, "document.querySelectorAll('#gallery li').length === 1")
        shot(page, "phone")
        assert page.evaluate("document.documentElement.scrollWidth") <= 360
        page.locator("#gallery button").scroll_into_view_if_needed()
        shot(page, "phone-gallery")
        page.locator("#gallery button").click()
        shot(page, "phone-detail")
        box = page.locator("#detail").bounding_box()
        assert box["x"] >= 0
        assert box["x"] + box["width"] <= 360
        assert page.wrong == []


def test_everything_that_can_be_used_has_a_name_and_is_reached_by_key(browser, tmp_path):
    with running(tmp_path, page=True) as site:
        page = opened(browser, site)
        nameless = page.evaluate("""
            () => [...document.querySelectorAll('input, textarea, select, button, a')].filter((one) =>
              !(one.labels?.length && one.labels[0].textContent.trim()) && !one.textContent.trim()
              && !one.getAttribute('aria-label')).map((one) => one.outerHTML)
        """)
        assert nameless == []
        reached = set()
        for _ in range(40):
            page.keyboard.press("Tab")
            reached.add(page.evaluate("document.activeElement.id"))
        assert reached >= {"prompt", "prompt_en", "branch_scale", "steps", "sampler", "draw", "restore-file"}
