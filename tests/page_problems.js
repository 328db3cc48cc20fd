// Sentences on what cannot be read on a page: what is cut, overflows its card, is small or pale.
() => {
  const problems = [];
  const say = (what, element) => problems.push(`${what}: ${element.textContent.trim().slice(0, 60)}`);
  const isVisible = element => element.getClientRects().length > 0;
  const isOutside = (box, edge) => box.left < edge.left - 1 || box.right > edge.right + 1
    || box.top < edge.top - 1 || box.bottom > edge.bottom + 1;

  const channels = color => color.match(/[\d.]+/g).map(Number);
  const luminance = color => {
    const linear = value => value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4;
    const [red, green, blue] = channels(color).map(value => linear(value / 255));
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue;
  };
  const background = element => {
    const color = getComputedStyle(element).backgroundColor;
    return channels(color)[3] === 0 ? background(element.parentElement) : color;
  };
  const contrast = (color, behind) => {
    const [dark, bright] = [luminance(color), luminance(behind)].sort((a, b) => a - b);
    return (bright + 0.05) / (dark + 0.05);
  };
  const hasText = element =>
    [...element.childNodes].some(node => node.nodeType === Node.TEXT_NODE && node.data.trim());

  document.querySelectorAll("details").forEach(details => details.open = true);
  const root = document.documentElement;
  if (root.scrollWidth > root.clientWidth) problems.push("the page scrolls sideways");
  for (const element of document.querySelectorAll("main *:not(svg *)")) {
    if (!isVisible(element)) continue;
    const style = getComputedStyle(element);
    const scrolls = element.scrollWidth > element.clientWidth + 1;
    if (scrolls && ["hidden", "clip"].includes(style.overflowX)) say("cut", element);
    if (scrolls && style.overflowX === "auto" && (innerWidth > 600 || element.querySelector("svg")))
      say("scrolls sideways", element);
    const card = element.closest("section, main");
    const moves = element.closest(".scroll") && !element.matches(".scroll, svg");
    if (!moves && isOutside(element.getBoundingClientRect(), card.getBoundingClientRect()))
      say("outside its card", element);
    if (hasText(element) && contrast(style.color, background(element)) < 4.5) say("pale", element);
  }
  for (const text of document.querySelectorAll("svg text")) {
    if (!isVisible(text)) continue;
    const svg = text.closest("svg");
    const style = getComputedStyle(text);
    if (isOutside(text.getBoundingClientRect(), svg.getBoundingClientRect())) say("cut", text);
    if (parseFloat(style.fontSize) * svg.getScreenCTM().a < 7) say("small", text);
    const follows = text.closest("[style*='var(']");
    if (follows && contrast(style.fill, background(svg)) < 4.5) say("pale", text);
  }
  return problems;
}
