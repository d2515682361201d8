"use strict";
// The raw data is in the page; the links only turn it into files.
for (const link of document.querySelectorAll("a[data-source]")) {
  const text = document.getElementById(link.dataset.source).textContent;
  link.href = URL.createObjectURL(new Blob([text], { type: "application/json" }));
}
