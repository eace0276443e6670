// A click on a heading sorts the table by that column; a second click turns it round.
for (const head of document.querySelectorAll("th")) {
  head.addEventListener("click", () => {
    const table = head.closest("table"), body = table.tBodies[0], place = head.cellIndex;
    const down = head.getAttribute("aria-sort") !== "descending";
    for (const other of table.querySelectorAll("th")) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    const key = (row) => {
      const cell = row.cells[place];
      return "v" in cell.dataset ? Number(cell.dataset.v) : cell.textContent;
    };
    const isNone = (row) => row.cells[place].textContent === "-";
    const rows = [...body.rows].sort((a, b) => {
      if (isNone(a) || isNone(b)) return isNone(a) - isNone(b); // what was not run stays below
      const [x, y] = [key(a), key(b)];
      const order = typeof x === "number" && typeof y === "number" ? x - y : String(x).localeCompare(String(y));
      return down ? -order : order;
    });
    body.append(...rows);
  });
}
