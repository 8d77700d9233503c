"use strict";
// Switches for models and devices, and the numbers of a figure's points under the pointer or by arrow keys. Without this
// script everything is visible and the browser shows the numbers as titles.
(() => {
  const form = document.querySelector(".switches");
  if (form) {
    form.hidden = false;
    form.addEventListener("change", ({ target }) => {
      const name = `data-${target.dataset.hides}`;
      for (const part of document.querySelectorAll(`[${name}]`)) {
        if (part.getAttribute(name) === target.value) part.classList.toggle("off", !target.checked);
      }
    });
  }

  const tip = document.createElement("div");
  tip.className = "tip";
  tip.setAttribute("role", "status");
  document.body.append(tip);
  const reach = 28; // pixels
  let shown = null;

  const hide = () => {
    shown?.classList.remove("shown");
    shown = null;
    tip.textContent = "";
  };
  const show = (mark) => {
    if (mark === shown) return;
    hide();
    shown = mark;
    mark.classList.add("shown");
    tip.textContent = mark.dataset.tip;
    const box = mark.getBoundingClientRect();
    const left = box.left + box.width / 2 - tip.offsetWidth / 2;
    tip.style.left = `${Math.max(4, Math.min(left, document.documentElement.clientWidth - tip.offsetWidth - 4))}px`;
    tip.style.top = `${box.top > tip.offsetHeight + 12 ? box.top - tip.offsetHeight - 8 : box.bottom + 8}px`;
  };
  const distance = (mark, event) => {
    const box = mark.getBoundingClientRect();
    const across = Math.max(box.left - event.clientX, 0, event.clientX - box.right);
    return Math.hypot(across, Math.max(box.top - event.clientY, 0, event.clientY - box.bottom));
  };

  for (const figure of document.querySelectorAll("figure svg")) {
    const marks = [...figure.querySelectorAll(".mark")];
    if (!marks.length) continue;
    for (const mark of marks) {
      const title = mark.querySelector("title");
      mark.dataset.tip = title.textContent;
      title.remove();
    }
    const visible = () => marks.filter((mark) => !mark.closest(".off"));
    figure.tabIndex = 0;
    figure.addEventListener("pointermove", (event) => {
      const [nearest] = visible().map((mark) => [distance(mark, event), mark]).sort((a, b) => a[0] - b[0]);
      if (nearest && nearest[0] <= reach) show(nearest[1]);
      else hide();
    });
    figure.addEventListener("pointerleave", hide);
    figure.addEventListener("blur", hide);
    figure.addEventListener("keydown", (event) => {
      const found = visible();
      const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
      if (event.key === "Escape") hide();
      if (!step || !found.length) return;
      event.preventDefault();
      const at = found.indexOf(shown);
      show(found[at < 0 ? (step > 0 ? 0 : found.length - 1) : (at + step + found.length) % found.length]);
    });
  }
  addEventListener("scroll", hide, { passive: true });
})();
