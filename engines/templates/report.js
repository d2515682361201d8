"use strict";
// The data is in the page; the links only turn it into files.
for (const link of document.querySelectorAll("a[data-source]")) {
  const text = document.getElementById(link.dataset.source).textContent;
  const isTable = link.dataset.source === "table";
  const type = isTable ? "text/csv" : "application/json";
  link.href = URL.createObjectURL(new Blob([isTable ? JSON.parse(text) : text], { type }));
}
