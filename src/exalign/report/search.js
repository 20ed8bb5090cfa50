const field = document.getElementById("search");
const samples = [...document.querySelectorAll("#samples details")];
const texts = samples.map((sample) =>
  [...sample.querySelectorAll(".prompt, .answer .text")].map((part) => part.textContent).join("\n").toLowerCase(),
);
field.addEventListener("input", () => {
  const words = field.value.toLowerCase().split(/\s+/).filter(Boolean);
  samples.forEach((sample, i) => {
    sample.hidden = !words.every((word) => texts[i].includes(word));
  });
  const left = samples.filter((sample) => !sample.hidden).length;
  document.getElementById("found").textContent = words.length ? `${left} of ${samples.length}` : "";
});
field.parentElement.hidden = false;
