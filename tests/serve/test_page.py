"""The page of `uvit serve`, in a real browser: what a person does, and what a person sees."""

import base64
import io
import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from selenium import webdriver
from selenium.webdriver import ActionChains, Keys
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.support.ui import WebDriverWait

from tests.serve.page_server import PageServer
from uvit.images import save_png
from uvit.serve.page import read_page

CONTENT, HEADERS = read_page()
PAGE = CONTENT.decode()
SCRIPT = PAGE.split("<script>")[1].split("</script>")[0]
CHROMIUM, DRIVER = (shutil.which(name) for name in ("chromium", "chromedriver"))
in_browser = pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="needs Debian's chromium and chromium-driver")
SECONDS = 60  # until something is seen, however busy the machine is


# The file


def test_the_page_is_one_file_that_needs_no_other_address() -> None:
    policy = HEADERS["Content-Security-Policy"].split("; ")
    assert "default-src 'none'" in policy and "connect-src 'self'" in policy and "unsafe" not in str(policy)
    body = PAGE.split("<body>")[1].split("<script>")[0]
    assert not re.findall(r"\s(?:style|on\w+)=", body)  # which the policy forbids
    addresses = set(re.findall(r"\w+://[^\s\"'`]+", PAGE))
    assert addresses == {"http://www.w3.org/2000/svg"}  # a name; nothing is fetched from there


def test_everything_that_the_page_says_it_says_in_chinese_too() -> None:
    table = re.search(r"const CHINESE = \{(.*?)\n\};", SCRIPT, re.S)
    assert table is not None
    chinese = dict(re.findall(r'"([^"]+)":\s*"([^"]+)"', table[1]))
    said = set(re.findall(r"data-t(?:\s[^>]*)?>([^<]+)<", PAGE))
    said |= set(re.findall(r'data-(?:label|hint|title)="([^"]+)"', PAGE))
    rest = SCRIPT.replace(table[0], "")
    for call in re.findall(r"\b(?:t|say|announce|trouble|chart)\((.*)", rest) + re.findall(r"(label: .*)", rest):
        said |= {text for text in re.findall(r'"([^"]+)"', call) if re.search(r"[A-Z].* |\{0\}", text)}
    assert len(said) > 90
    assert said <= set(chinese), said - set(chinese)
    for english, translation in chinese.items():
        assert sorted(re.findall(r"\{\d\}", english)) == sorted(re.findall(r"\{\d\}", translation)), english


# The browser


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PageServer]:
    server = PageServer(tmp_path_factory.mktemp("page"))
    yield server
    server.stop()


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    options = webdriver.ChromeOptions()
    options.binary_location = str(CHROMIUM)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    options.set_capability("unhandledPromptBehavior", "accept")
    flags = "--headless=new --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
    flags += " --disable-component-update --disable-sync --disable-dev-shm-usage --lang=en --window-size=1280,1000"
    for flag in [*flags.split(), f"--user-data-dir={tmp_path_factory.mktemp('browser')}"]:
        options.add_argument(flag)
    driver = webdriver.Chrome(options=options, service=Service(str(DRIVER)))
    yield driver
    driver.quit()


class Person:
    """Someone with a browser before the page."""

    def __init__(self, driver: Any, url: str):
        self.driver, self.url = driver, url

    def open(self, view: str = "") -> "Person":
        self.driver.get("about:blank")  # a new load, also where only the part behind # differs
        self.driver.get(f"{self.url}/{view}")
        self.until(lambda: self.js("return models.size > 0 || !$('key').hidden"))
        return self

    def js(self, script: str, *values: Any) -> Any:
        return self.driver.execute_script(script, *values)

    def until(self, condition: Callable[[], Any]) -> Any:
        return WebDriverWait(self.driver, SECONDS, poll_frequency=0.05).until(lambda _: condition())

    def see(self, *texts: str) -> None:
        """Wait until all texts are on the page."""
        for text in texts:
            self.until(lambda text=text: text in self.js("return document.body.innerText"))

    def find(self, selector: str) -> Any:
        return self.driver.find_element("css selector", selector)

    def click(self, selector: str) -> None:
        self.js("arguments[0].scrollIntoView({block: 'center'})", self.find(selector))
        self.find(selector).click()

    def choose(self, select: Any, value: str) -> None:
        self.js("arguments[0].value = arguments[1]; arguments[0].dispatchEvent(new Event('change'))", select, value)

    def fill(self, **fields: Any) -> None:
        for name, value in fields.items():
            field = self.find(f"[name={name}]")
            if field.tag_name == "select":
                self.choose(field, value)
            else:
                field.clear()
                field.send_keys(str(value))

    def value(self, name: str) -> str:
        return str(self.js("return fields[arguments[0]].value", name))

    def images(self) -> list[Any]:
        """The finished tiles, the newest group first."""
        return list(self.driver.find_elements("css selector", ".tile:enabled"))

    def wait_for_images(self, count: int) -> list[Any]:
        self.until(lambda: len(self.images()) == count and not self.js("return document.querySelector('progress')"))
        return self.images()

    def generate(self, count: int = 1, **fields: Any) -> list[Any]:
        """Fill in the form and press the button: the tiles of the new images."""
        before = len(self.images())
        self.fill(**fields)
        self.click("#form > .primary")
        return self.wait_for_images(before + count)[:count]

    def seed(self, tile: Any) -> str:
        return str(tile.find_element("css selector", "span").text.removeprefix("seed "))

    def pixels(self, tile: Any) -> np.ndarray:
        """(H, W, 3) of the PNG that the page keeps for a tile."""
        script = """
            const done = arguments[1], reader = new FileReader();
            reader.onload = () => done(reader.result.split(",")[1]);
            reader.readAsDataURL(records.get(arguments[0]).blob);"""
        png = base64.b64decode(self.driver.execute_async_script(script, tile))
        with Image.open(io.BytesIO(png)) as image:
            return np.asarray(image.convert("RGB"))

    def drop(self, path: Path, selector: str) -> None:
        script = """
            const bytes = Uint8Array.from(atob(arguments[1]), (letter) => letter.charCodeAt(0));
            const dataTransfer = new DataTransfer();
            dataTransfer.items.add(new File([bytes], arguments[2], {type: "image/png"}));
            for (const type of ["dragenter", "dragover", "drop"])
                arguments[0].dispatchEvent(new DragEvent(type, {dataTransfer, bubbles: true, cancelable: true}));"""
        self.js(script, self.find(selector), base64.b64encode(path.read_bytes()).decode(), path.name)

    def keys(self, *keys: str) -> None:
        ActionChains(self.driver).send_keys(*keys).perform()

    def control(self, key: str) -> None:
        ActionChains(self.driver).key_down(Keys.CONTROL).send_keys(key).key_up(Keys.CONTROL).perform()


@pytest.fixture
def person(chromium: Any, server: PageServer) -> Iterator[Person]:
    """A person with an empty gallery, who speaks English. In the end the browser has nothing to complain of."""
    person = Person(chromium, server.served.url).open()
    clear = "localStorage.clear(); sessionStorage.clear(); stored('readwrite', (all) => all.clear()).then(arguments[0])"
    chromium.execute_async_script(clear)
    chromium.get_log("browser")
    yield person.open()
    expected = ("401 (", "429 (", "400 (", "503 (", "ERR_CONNECTION_REFUSED", "ERR_INCOMPLETE_CHUNKED_ENCODING")
    expected += ("ERR_CONNECTION_RESET", "ERR_EMPTY_RESPONSE", "[DOM] Password forms")
    messages = [entry["message"] for entry in chromium.get_log("browser")]
    assert not [message for message in messages if not any(text in message for text in expected)]


@in_browser
def test_no_other_script_runs(person: Person) -> None:
    (tile,) = person.generate(prompt="<img src=x onerror='window.ran = 1'>", num_inference_steps=1)
    tile.click()
    person.js("document.body.append(make('script', {textContent: 'window.ran = 1'}))")
    assert person.js("return window.ran") is None
    messages = [entry["message"] for entry in person.driver.get_log("browser")]
    assert len([message for message in messages if "Content Security Policy" in message]) == 1  # the one above


# Images


@in_browser
def test_a_prompt_becomes_the_servers_image_and_stays(person: Person, server: PageServer) -> None:
    assert not person.images()
    person.see("No images yet.")
    (tile,) = person.generate(prompt="a red square", num_inference_steps=3, guidance_scale=2, seed=7)
    alone = server.generate(prompt="a red square", num_inference_steps=3, guidance_scale=2, seed=7)
    assert np.array_equal(person.pixels(tile), alone)
    tile.click()
    person.see("num_inference_steps", "guidance_scale", "a red square")
    person.click("#close")

    person.open()  # the gallery survives a reload, and so does the form
    (tile,) = person.wait_for_images(1)
    assert np.array_equal(person.pixels(tile), alone)
    assert (person.value("prompt"), person.value("num_inference_steps")) == ("a red square", "3")

    person.fill(prompt="something else", num_inference_steps=2, seed=1)
    person.images()[0].click()
    person.click("#use")
    assert [person.value(name) for name in ("prompt", "num_inference_steps", "seed")] == ["a red square", "3", "7"]
    person.images()[0].click()
    person.click("#delete")  # and the question is answered with yes
    person.until(lambda: not person.images())
    person.open()
    assert not person.images()


@in_browser
def test_again_keeps_the_seed_and_vary_changes_it(person: Person) -> None:
    tiles = person.generate(2, prompt="two cats", num_inference_steps=2, n=2)
    first, second = map(person.seed, tiles)
    assert int(second) == int(first) + 1 and person.value("seed") == ""  # random, and stays random
    before = person.pixels(tiles[0])
    person.click("#again")
    tiles = person.wait_for_images(4)
    assert person.seed(tiles[0]) == first == person.value("seed")
    assert np.array_equal(person.pixels(tiles[0]), before)
    person.click("#vary")
    tiles = person.wait_for_images(6)
    assert person.seed(tiles[0]) == person.value("seed") != first
    assert not np.array_equal(person.pixels(tiles[0]), before)
    (tile,) = person.generate(1, n=1, seed=2**63 - 1)  # more than a number of JavaScript holds
    assert person.seed(tile) == str(2**63 - 1)


@in_browser
def test_two_models_side_by_side_start_from_the_same_seeds(person: Person, server: PageServer) -> None:
    checkpoint = f"{server.run}@checkpoint-2"
    fields = {"prompt": "a cat", "num_inference_steps": 2, "guidance_scale": 2}
    tiles = person.generate(4, n=2, seed=3, beside=checkpoint, **fields)
    rows = [row.get_attribute("data-model") for row in person.driver.find_elements("css selector", ".row")]
    assert rows == [server.run, checkpoint]
    assert [person.seed(tile) for tile in tiles] == ["3", "4", "3", "4"]
    for tile, (model, seed) in zip(tiles, [(model, seed) for model in rows for seed in (3, 4)], strict=True):
        alone = server.generate(model=model, seed=seed, **fields)
        assert np.array_equal(person.pixels(tile), alone)


@in_browser
def test_a_dropped_png_gives_its_settings_back(person: Person, server: PageServer, tmp_path: Path) -> None:
    fields = {
        "seed": 12,
        "negative_prompt": "blue",
        "num_inference_steps": 4,
        "guidance_scale": 4.5,
        "scheduler": "ddim",
    }
    answer = server.served.generate("一个红色的圆", guidance_interval=[100, 900], **fields).json()
    (tmp_path / "ours.png").write_bytes(base64.b64decode(answer["data"][0]["b64_json"]))
    person.drop(tmp_path / "ours.png", "#gallery")
    person.until(lambda: person.value("prompt") == "一个红色的圆")
    expected = {name: str(value) for name, value in fields.items()} | {"lowest": "100", "highest": "900"}
    assert {name: person.value(name) for name in expected} == expected
    text = {"prompt": "a cat", "seed": "3", "num_inference_steps": "9", "scheduler": "dpmsolver++"}
    save_png(Image.new("RGB", (8, 8)), tmp_path / "sampled.png", text)  # as `uvit sample` does
    person.drop(tmp_path / "sampled.png", "#form")
    person.until(lambda: person.value("prompt") == "a cat")
    assert (person.value("num_inference_steps"), person.value("negative_prompt")) == ("9", "")
    Image.new("RGB", (8, 8)).save(tmp_path / "other.png")
    person.drop(tmp_path / "other.png", "#gallery")
    person.see("other.png: has no settings of uvit")
    assert person.value("prompt") == "a cat"


@in_browser
def test_a_painted_mask_is_repainted_and_the_rest_stays(person: Person, server: PageServer, tmp_path: Path) -> None:
    side = server.side
    before = np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8)
    Image.fromarray(before).save(tmp_path / "start.png")
    person.drop(tmp_path / "start.png", "#start_details")
    person.until(lambda: person.find("#mask").is_displayed())
    mask = person.find("#mask")
    person.js("arguments[0].scrollIntoView({block: 'center'})", mask)
    width = mask.size["width"]
    for x in range(-width // 2 + 2, 0, width // 8):  # the left half
        mouse = ActionChains(person.driver, duration=0).move_to_element_with_offset(mask, x, -width // 2 + 2)
        mouse.click_and_hold().move_by_offset(0, width - 6).release().perform()
    painted = person.js("return [...brush.getImageData(0, 0, canvas.width, canvas.height).data]")
    painted = np.array(painted).reshape(side, side, 4)[..., 3] > 0
    assert painted[:, : side // 4].all() and not painted[:, -side // 4 :].any()
    (tile,) = person.generate(prompt="a blue square", num_inference_steps=3, seed=1)
    after = person.pixels(tile)
    assert np.array_equal(after[~painted], before[~painted])
    assert not np.array_equal(after[painted], before[painted])
    person.click("#clear_mask")
    assert not person.js("return isPainted()")

    tile.click()  # its settings include the image and the mask
    person.click("#use")
    person.until(lambda: person.js("return isPainted()"))
    again = person.js("return [...brush.getImageData(0, 0, canvas.width, canvas.height).data]")
    assert np.array_equal(np.array(again).reshape(side, side, 4)[..., 3] > 0, painted)


# Without a mouse, in another language, on a phone, in the dark


@in_browser
def test_a_keyboard_is_enough(person: Person, tmp_path: Path) -> None:
    def focused() -> Any:
        return person.driver.switch_to.active_element

    def tab_to(selector: str) -> None:
        for _ in range(60):
            person.keys(Keys.TAB)
            if person.js("return document.activeElement.matches(arguments[0])", selector):
                assert focused().value_of_css_property("outline-style") == "solid"  # and is seen to be there
                return
        raise AssertionError(f"{selector} is not reached by Tab")

    tab_to("#prompt")
    person.keys("a red square")
    tab_to("#num_inference_steps")
    person.control("a")
    person.keys("2")
    person.control(Keys.ENTER)
    person.wait_for_images(1)
    tab_to(".tile")
    person.keys(Keys.ENTER)
    person.until(lambda: person.js("return $('viewer').open"))
    tab_to("#start_from")
    person.keys(Keys.ENTER)
    person.until(lambda: person.js("return document.activeElement.id") == "mask")
    person.keys(Keys.ARROW_LEFT, Keys.ARROW_LEFT, Keys.SPACE)
    share = person.js("return paintedShare()")
    assert 0 < share < 0.1
    person.keys("e", Keys.SPACE)
    assert person.js("return paintedShare()") == 0
    person.keys("e", Keys.SPACE)
    person.control(Keys.ENTER)
    person.wait_for_images(2)


NAMELESS = """
    return [...document.querySelectorAll("input, select, textarea, button, summary, canvas[tabindex], a[href]")].filter(
        (each) => each.checkVisibility() && !(each.labels?.length || each.getAttribute("aria-label") || each.innerText
            || each.querySelector("img[alt]"))).map((each) => each.outerHTML)"""

# The text with the lowest contrast to what is behind it, as the Web Content Accessibility Guidelines compute it.
CONTRAST = """
    const pen = new OffscreenCanvas(1, 1).getContext("2d", {willReadFrequently: true});
    const rgba = (colour) => { pen.clearRect(0, 0, 1, 1); pen.fillStyle = colour; pen.fillRect(0, 0, 1, 1);
        return [...pen.getImageData(0, 0, 1, 1).data]; };
    const light = (colour) => rgba(colour).slice(0, 3).map((level) => level / 255)
        .map((c) => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4)
        .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
    const ground = (each) => getComputedStyle(each).backgroundColor;
    const covers = (each) => each === document.body || rgba(ground(each))[3] > 0;
    const behind = (each) => covers(each) ? ground(each) : behind(each.parentElement);
    let worst = [99, ""];
    for (const each of document.querySelectorAll("body *")) {
        const text = [...each.childNodes].some((node) => node.nodeType === 3 && node.data.trim());
        if (!text && !each.matches("input, select")) continue;
        if (!each.checkVisibility() || each.matches(":disabled, :disabled *, script, option, .unseen")) continue;
        const style = getComputedStyle(each), colour = each.closest("svg") ? style.fill : style.color;
        const [low, high] = [light(colour), light(behind(each))].sort((a, b) => a - b);
        const ratio = (high + 0.05) / (low + 0.05);
        if (ratio < worst[0]) worst = [ratio, each.outerHTML];
    }
    return worst;"""


@in_browser
def test_names_contrast_and_width(person: Person) -> None:
    person.generate(prompt="a red square with a very, very long description " * 5, num_inference_steps=1)
    person.find("summary").click()
    person.images()[0].click()
    person.click("#start_from")
    try:
        for view in ("#generate", "#training"):
            person.js("location.hash = arguments[0]", view)
            person.until(lambda view=view: person.find(view).is_displayed())
            if view == "#training":
                person.until(lambda: person.js("return document.querySelector('#charts svg')"))
            for theme in ("light", "dark"):
                person.choose(person.find("#theme"), theme)
                ratio, element = person.js(CONTRAST)
                assert ratio >= 4.5, (view, theme, element)
            assert person.js(NAMELESS) == []
            for width in (360, 1280):
                metrics = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 500}
                person.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
                assert person.js("return document.documentElement.scrollWidth") <= width, (view, width)
    finally:
        person.driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


@in_browser
def test_the_language_can_be_chosen_and_is_remembered(person: Person) -> None:
    assert person.js("return document.documentElement.lang") == "en"
    person.generate(prompt="a red square", num_inference_steps=1, seed=5)
    person.choose(person.find("#language"), "zh")
    person.see("提示词", "反向提示词", "采样步数", "引导系数", "种子 5")
    person.open()
    person.see("提示词", "种子 5")
    assert person.js("return document.documentElement.lang") == "zh-CN"
    page = person.js("return document.body.innerText.replace(/English|dpmsolver\\S*|uvit|PNG/g, '')")
    assert "Prompt" not in page and "Seed" not in page


# Trouble


@in_browser
def test_a_refusal_is_shown_in_the_servers_words(person: Person, server: PageServer) -> None:
    sentence = server.refusal(prompt="a cat", guidance_interval=[900, 100])
    person.fill(prompt="a cat", lowest=900, highest=100)
    person.click("#form > .primary")
    person.see(sentence, "Try again", "Dismiss")
    person.js("[...document.querySelectorAll('.group button')].at(-1).click()")
    assert not person.js("return document.querySelector('.group')")


@in_browser
def test_a_full_queue_is_waited_for_and_a_request_can_be_cancelled(person: Person, server: PageServer) -> None:
    def running() -> int:
        return len(person.driver.find_elements("css selector", "progress"))

    person.js("const wait = setTimeout; window.setTimeout = (call, time) => wait(call, Math.min(time, 300))")
    with server.full_queue():
        person.fill(prompt="a cat", num_inference_steps=2, seed=0)
        person.click("#form > .primary")
        person.see("the queue is full", "Trying again in")
        person.click("#form > .primary")
        person.until(lambda: running() == 2)
        person.js("document.querySelector('.group button').click()")  # cancels the newer one
        person.until(lambda: running() == 1)
    person.wait_for_images(1)


@in_browser
def test_time_left(person: Person) -> None:
    found = person.js("return [7, 2467, 20467, 470467].map(durationOf)")
    assert found == ["00:07", "41:07", "5:41:07", "130:41:07"]


# Training


@in_browser
def test_a_training_run_is_watched_and_sampled_from(person: Person, server: PageServer) -> None:
    person.open("#training")
    person.see(f"step {server.step} of", "Learning rate", "Gradient norm", "Checkpoints")
    person.until(lambda: person.find("#preview").is_displayed() and person.js("return $('preview').naturalWidth"))
    server.train()  # goes on
    person.see(f"step {server.step} of", f"step {server.step}\nSample from it")
    loss = json.loads((server.run_folder / "logs" / "metrics.jsonl").read_text().splitlines()[-1])["loss"]
    person.see(f"step {server.step}: loss {float(f'{loss:.3g}'):g}")
    assert person.js("return document.querySelectorAll('#charts svg').length") >= 5
    person.until(lambda: person.find("#preview_number").text == str(server.step))

    person.find("#charts svg").send_keys(Keys.ARROW_LEFT)  # a chart is read with the keyboard
    assert f"step {server.step}:" not in person.find("#charts output").text
    person.js("[...document.querySelectorAll('#checkpoints button')][0].click()")
    person.until(lambda: person.value("model") == f"{server.run}@checkpoint-{server.step}")
    person.generate(prompt="a red square", num_inference_steps=2)


@in_browser
def test_a_stopped_server_is_waited_for_and_a_key_is_asked_for(person: Person, server: PageServer) -> None:
    """The last test of this file: the server has a key from here on."""
    (tile,) = person.generate(prompt="a cat", num_inference_steps=2, seed=0)
    before = person.pixels(tile)
    server.stop()
    person.see("The server does not answer.")
    person.click("#form > .primary")
    person.see("The images follow when it is back.")
    server.start(api_key="secret")
    person.until(lambda: person.find("#key").is_displayed())
    person.find("#api_key").send_keys("secret", Keys.ENTER)
    tiles = person.wait_for_images(2)  # the gallery is still there, and what was asked for has come
    assert all(np.array_equal(person.pixels(tile), before) for tile in tiles)
    person.open()  # the key is remembered in this tab
    person.wait_for_images(2)
    assert not person.find("#key").is_displayed()
