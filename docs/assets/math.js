// pymdownx.arithmatex leaves TeX between \( \) or \[ \]; KaTeX sets it.
for (const element of document.querySelectorAll(".arithmatex")) {
  const tex = element.textContent.trim();
  katex.render(tex.slice(2, -2), element, { displayMode: tex.startsWith("\\[") });
}
