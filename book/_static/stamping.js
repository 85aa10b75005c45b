/* The animation of stamps: plays the frames that convt_lab/figures_scatter.py has put on the page.

   Nothing is computed here. The page comes with the last frame, which stays where there is no
   script, and in print. It plays by itself once, when it first comes into view, unless the reader
   prefers reduced motion. */
"use strict";

(() => {
  const BEAT = 1400; // milliseconds from one stamp to the next

  function element(tag, attributes = {}, ...children) {
    const made = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
    made.append(...children);
    return made;
  }

  function enliven(root) {
    const frames = JSON.parse(root.dataset.frames);
    const last = frames.length - 1;
    const cells = (name) => [...root.querySelectorAll(`[data-grid=${name}] .stamping-cell`)];
    const [input, output] = [cells("input"), cells("output")];
    const words = root.querySelector(".stamping-words");
    const button = element("button", { type: "button" }, "Play");
    const slider = element("input", {
      type: "range",
      min: 0,
      max: last,
      value: last,
      "aria-label": "stamps; the arrow keys step",
    });
    let at = last;
    let beat = null;

    function show(n) {
      at = n;
      const { pixel, sums, added, met, words: said } = frames[n];
      input.forEach((cell, i) => cell.classList.toggle("is-chosen", i === pixel));
      output.forEach((cell, i) => {
        cell.classList.toggle("is-new", i in added);
        cell.classList.toggle("is-sum", met.includes(i));
        cell.replaceChildren(sums[i] === null ? "" : String(sums[i]));
        if (i in added) cell.append(element("br"), element("small", {}, `+${added[i]}`));
      });
      words.textContent = said;
      slider.value = n;
      slider.setAttribute("aria-valuetext", said);
    }

    function stop() {
      clearInterval(beat);
      beat = null;
      button.textContent = "Play";
    }

    function play() {
      if (at === last) show(0);
      button.textContent = "Pause";
      beat = setInterval(() => {
        show(at + 1);
        if (at === last) stop();
      }, BEAT);
    }

    button.addEventListener("click", () => {
      watcher.disconnect();
      if (beat === null) play();
      else stop();
    });
    slider.addEventListener("input", () => {
      watcher.disconnect();
      stop();
      show(Number(slider.value));
    });
    window.addEventListener("beforeprint", () => {
      watcher.disconnect();
      stop();
      show(last);
    });
    const watcher = new IntersectionObserver(
      (seen) => {
        if (!seen.some((one) => one.isIntersecting)) return;
        watcher.disconnect();
        play();
      },
      { threshold: 0.8 },
    );

    slider.setAttribute("aria-valuetext", frames[last].words);
    words.before(element("div", { class: "stamping-controls" }, button, slider));
    if (!matchMedia("(prefers-reduced-motion: reduce)").matches) watcher.observe(root);
  }

  document.addEventListener("DOMContentLoaded", () => {
    document.querySelectorAll(".stamping").forEach(enliven);
  });
})();
