"use strict";
(() => {
  const root = document.documentElement;
  const data = JSON.parse(document.getElementById("data").textContent);
  const dark = matchMedia("(prefers-color-scheme: dark)");

  // --- charts: plotly draws, the theme is the page's ---
  const inks = ["#4c86e0", "#e39a3c", "#3fa97a", "#b06fd0", "#dd6370", "#8a93a2", "#b5a13f", "#4db4c4"];
  const colour = (name) => getComputedStyle(root).getPropertyValue(name).trim();

  function themed(layout) {
    const axis = {
      gridcolor: colour("--line"), linecolor: colour("--line"), zerolinecolor: colour("--line"),
      tickcolor: colour("--line"),
    };
    return {
      ...layout,
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", colorway: inks,
      font: { family: getComputedStyle(document.body).fontFamily, size: 12, color: colour("--soft") },
      hoverlabel: { bgcolor: colour("--sheet"), bordercolor: colour("--line"), font: { color: colour("--ink") } },
      xaxis: { ...layout.xaxis, ...axis }, yaxis: { ...layout.yaxis, ...axis },
    };
  }

  function drawCharts() {
    for (const [key, figure] of Object.entries(data.charts)) {
      const place = document.getElementById("chart-" + key);
      if (place && window.Plotly) {
        Plotly.react(place, figure.data, themed(figure.layout), { displayModeBar: false, responsive: true });
      }
    }
  }

  // --- the gallery ---
  const PER_PAGE = innerWidth < 560 ? 6 : 12;
  const SCALE = 2;  // thumbnails are small: outlines are drawn finer than their pixels
  const NOWHERE = 65535, GONE = 255;
  const VIRIDIS = [[68, 1, 84], [59, 82, 139], [33, 145, 140], [94, 201, 98], [253, 231, 37]];
  const unpack = (text) => Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
  const boxes = data.boxes.map((text) => {
    const bytes = new DataView(unpack(text).buffer);
    return Array.from({ length: bytes.byteLength / 2 }, (_, n) => bytes.getUint16(2 * n, true));
  });
  const view = { filter: "all", order: "row", find: "", page: 0 };

  function made(tag, about = {}, ...inner) {
    const one = document.createElement(tag);
    for (const [name, value] of Object.entries(about)) {
      if (name in one) one[name] = value;
      else one.setAttribute(name, value);
    }
    one.append(...inner.filter((part) => part !== null && part !== undefined));
    return one;
  }

  const kept = (mask, token) => (mask[token >> 3] >> (token & 7)) & 1;

  function heat(score) {
    const at = (score / 254) * (VIRIDIS.length - 1);
    const low = Math.min(Math.floor(at), VIRIDIS.length - 2);
    const mixed = VIRIDIS[low].map((part, n) => Math.round(part + (at - low) * (VIRIDIS[low + 1][n] - part)));
    return `rgba(${mixed.join(",")},0.72)`;
  }

  function place(box, token, width, height) {
    const edges = box.slice(4 * token, 4 * token + 4);
    if (edges.length < 4 || edges.includes(NOWHERE)) return null;
    const [left, top, right, bottom] = edges.map((edge, n) => Math.round((edge / (NOWHERE - 1)) * (n % 2 ? height : width)));
    return [left, top, Math.max(1, right - left), Math.max(1, bottom - top)];
  }

  // The image as the decoder has it at a stage: what no kept token shows is faded.
  function paint(canvas, image, card, number, answer, stage, hot) {
    const width = (canvas.width = image.naturalWidth * SCALE);
    const height = (canvas.height = image.naturalHeight * SCALE);
    const pen = canvas.getContext("2d");
    pen.imageSmoothingQuality = "high";
    pen.drawImage(image, 0, 0, width, height);
    if (!stage || card.boxes === null || !card.tokens) return;
    const box = boxes[card.boxes];
    const first = card.tokens.slice(0, number).reduce((sum, count) => sum + count, 0);
    const scores = hot && answer.scores[stage - 1] ? unpack(answer.scores[stage - 1]) : null;
    const mask = unpack(answer.kept[stage - 1]);
    const veil = made("canvas", { width, height });
    const faded = veil.getContext("2d");
    faded.fillStyle = "rgba(16,17,20,0.8)";
    faded.fillRect(0, 0, width, height);
    const shown = [];
    for (let token = first; token < first + (card.tokens[number] || 0); token++) {
      const where = place(box, token, width, height);
      if (!where) continue;
      if (scores) {
        if (scores[token] === GONE) continue;
        faded.clearRect(...where);
        pen.fillStyle = heat(scores[token]);
        pen.fillRect(...where);
      } else if (kept(mask, token)) {
        faded.clearRect(...where);
      }
      if (kept(mask, token)) shown.push(where);
    }
    pen.drawImage(veil, 0, 0);
    pen.strokeStyle = "rgba(255,255,255,0.55)";
    pen.lineWidth = 1;
    for (const [left, top, wide, high] of shown) {
      if (wide > 5 && high > 5) pen.strokeRect(left + 0.5, top + 0.5, wide - 1, high - 1);
    }
  }

  const stageName = (answer, stage) => {
    if (!stage) return "image";
    if (answer.reduced && stage === 1) return "after the encoder";
    return "after stage " + (stage - (answer.reduced ? 1 : 0));
  };

  function pictured(card) {
    const canvases = card.images.map((one) => {
      const canvas = made("canvas", { role: "img", "aria-label": "image of the row" });
      const image = new Image();
      return { canvas, image, src: one.src };
    });
    const slider = made("input", { type: "range", min: 0, max: 0, step: 1, "aria-label": "stage" });
    const said = made("output");
    const hot = made("input", { type: "checkbox" });
    const hotLabel = made("label", {}, hot, "scores");
    const controls = made("div", { className: "stages" }, slider, hotLabel, said);
    let answer = card.answers[0];

    function draw() {
      const stage = Number(slider.value);
      const scored = Boolean(stage && answer.scores[stage - 1]);
      hotLabel.style.visibility = scored ? "visible" : "hidden";
      const count = stage ? answer.counts[stage - 1] : answer.visual;
      said.textContent = `${stageName(answer, stage)}: ${count} of ${answer.visual} visual tokens`;
      canvases.forEach((one, number) => {
        if (one.image.complete && one.image.naturalWidth) {
          paint(one.canvas, one.image, card, number, answer, stage, scored && hot.checked);
        }
      });
    }
    function show(other) {
      answer = other;
      const stages = card.boxes === null ? 0 : answer.kept.length;
      controls.hidden = !canvases.length || answer.visual === null;
      slider.max = stages;
      slider.value = stages;
      slider.disabled = !stages;
      draw();
    }
    slider.addEventListener("input", draw);
    hot.addEventListener("change", draw);
    for (const one of canvases) {
      one.image.addEventListener("load", draw);
      one.image.src = one.src;
    }
    const pictures = canvases.length
      ? made("div", { className: canvases.length > 1 ? "pictures many" : "pictures" }, ...canvases.map((one) => one.canvas))
      : made("p", { className: "nothing" }, "no image was kept");
    return { pictures, controls, show };
  }

  function answerOf(card, answer, several) {
    const failed = answer.error !== null;
    const score = answer.score;
    const mark = score === null ? null : made("span", { className: score === 1 ? "right" : score === 0 ? "wrong" : "" },
      score === 1 ? " ✓" : score === 0 ? " ✗" : ` ${score.toFixed(2)}`);
    const who = several ? data.names[answer.setting] || "setting " + answer.setting : "answer";
    // The name is what is pressed, so that the text can be selected.
    return made("div", { className: "answer" + (failed ? " failed" : "") + (several ? " one" : "") },
      made(several ? "button" : "span", { className: "who" }, who, mark, answer.finish === "length" ? " · cut" : null),
      made("span", { className: "said" }, failed ? answer.error : answer.response));
  }

  function cardOf(card) {
    const { pictures, controls, show } = pictured(card);
    const several = card.answers.length > 1;
    const list = made("div", { className: "answers" });
    const shown = card.answers.map((answer) => {
      const one = answerOf(card, answer, several);
      if (several) one.addEventListener("click", () => getSelection().isCollapsed && choose(answer));
      list.append(one);
      return one;
    });
    for (const answer of card.answers.filter((one) => one.audit !== null)) {
      list.append(made("div", { className: "answer" }, made("span", { className: "who" }, "unpruned (audit)"),
        made("span", { className: "said" }, answer.audit)));
    }
    const factsOf = (told) => [
      card.id === null ? null : card.id,
      card.images.length && card.images[0].size ? card.images[0].size.join(" × ") + " px" : null,
      told.retention === null ? null : (100 * told.retention).toFixed(1) + " % kept",
      told.output_tokens === null ? null : told.output_tokens + " tokens said",
      told.latency_s === null ? null : told.latency_s.toFixed(2) + " s",
    ].filter((one) => one !== null).join(" · ");
    function choose(answer) {
      shown.forEach((one, n) => {
        const own = one.classList.toggle("chosen", card.answers[n] === answer);
        if (several) one.querySelector(".who").setAttribute("aria-pressed", own);
      });
      show(answer);
      footer.textContent = factsOf(answer);
    }
    const footer = made("footer");
    // The pruned one shows more.
    choose(card.answers.reduce((best, one) => (one.kept.length > best.kept.length ? one : best)));
    return made("article", { className: "card" }, pictures, controls,
      made("div", { className: "text" },
        card.prompt === null ? null : made("p", { className: "prompt" }, card.prompt),
        list,
        card.truth.length ? made("p", { className: "note" }, "right: " + card.truth.join(" | ")) : null,
        footer,
        made("details", {}, made("summary", {}, "run this row again"),
          made("p", { className: "note" }, "In the directory where the run was started, with the input unchanged"
            + (card.id === null ? "." : "; its id is " + card.id + ".")),
          made("pre", {}, data.again.replace("--only-row ROW", "--only-row " + card.row)))));
  }

  // What keeps all is no extreme of pruning.
  const counts = (one, name) => one[name] !== null && !(name === "retention" && data.names.length > 1 && data.names[one.setting] === "unpruned");
  const most = (card, name, sign) => Math.max(...card.answers.map((one) => (counts(one, name) ? sign * one[name] : -Infinity)));
  const filters = {
    all: ["All", () => true],
    sample: ["Sample", (card) => card.sampled],
    disagreement: ["Disagreements", (card) => card.kind === "disagreement"],
    error: ["Errors", (card) => card.answers.some((one) => one.error !== null)],
  };
  const orders = {
    row: ["as in the input", null],
    low: ["lowest retention", (card) => most(card, "retention", -1)],
    high: ["highest retention", (card) => most(card, "retention", 1)],
    long: ["longest answer", (card) => most(card, "output_tokens", 1)],
    slow: ["slowest", (card) => most(card, "latency_s", 1)],
    tokens: ["most visual tokens", (card) => most(card, "visual", 1)],
  };

  function chosen() {
    const words = view.find.trim().toLowerCase();
    const hit = (card) => !words || [card.id, card.prompt, ...card.answers.flatMap((one) => [one.response, one.error, one.audit])]
      .some((text) => text !== null && text.toLowerCase().includes(words));
    const cards = data.cards.filter((card) => filters[view.filter][1](card) && hit(card));
    const by = orders[view.order][1];
    return by ? cards.map((card) => [by(card), card]).sort((a, b) => b[0] - a[0]).map((pair) => pair[1]) : cards;
  }

  function drawGallery() {
    const cards = chosen();
    const pages = Math.max(1, Math.ceil(cards.length / PER_PAGE));
    view.page = Math.min(view.page, pages - 1);
    const from = view.page * PER_PAGE;
    const here = cards.slice(from, from + PER_PAGE);
    document.getElementById("cards").replaceChildren(
      ...(here.length ? here.map(cardOf) : [made("p", { className: "lead" }, "No row is like that.")]));
    const step = (label, by) => {
      const button = made("button", { type: "button", disabled: view.page + by < 0 || view.page + by >= pages }, label);
      button.addEventListener("click", () => {
        view.page += by;
        drawGallery();
        document.getElementById("gallery").scrollIntoView();
      });
      return button;
    };
    document.getElementById("pager").replaceChildren(
      ...(cards.length > PER_PAGE
        ? [step("‹ back", -1), made("span", {}, `${from + 1}–${from + here.length} of ${cards.length}`), step("on ›", 1)]
        : []));
    for (const button of document.querySelectorAll("#filters button")) {
      button.setAttribute("aria-pressed", button.dataset.key === view.filter);
    }
  }

  function startGallery() {
    const bar = document.getElementById("filters");
    for (const [key, [label, fits]] of Object.entries(filters)) {
      const count = data.cards.filter(fits).length;
      if (!count && key !== "all") continue;
      const button = made("button", { type: "button" }, `${label} ${count}`);
      button.dataset.key = key;
      button.addEventListener("click", () => {
        Object.assign(view, { filter: key, page: 0 });
        drawGallery();
      });
      bar.append(button);
    }
    const order = document.getElementById("order");
    for (const [key, [label]] of Object.entries(orders)) order.append(made("option", { value: key }, label));
    order.addEventListener("change", () => {
      Object.assign(view, { order: order.value, page: 0 });
      drawGallery();
    });
    const find = document.getElementById("find");
    find.addEventListener("input", () => {
      Object.assign(view, { find: find.value, page: 0 });
      drawGallery();
    });
    drawGallery();
  }

  document.getElementById("theme").addEventListener("click", () => {
    const now = root.dataset.theme || (dark.matches ? "dark" : "light");
    root.dataset.theme = now === "dark" ? "light" : "dark";
    drawCharts();
  });
  dark.addEventListener("change", drawCharts);
  if (data.cards.length) startGallery();
  drawCharts();
})();
