// Shows a sentence where one of the page's scripts could not be loaded or run. No module: it must
// run in browsers, and on lines, where the others do not.
addEventListener(
  "error",
  function (event) {
    var loading = document.querySelector("[data-t=loading]");
    var failed = event.target === window || event.target.tagName === "SCRIPT";
    // A page that has drawn itself tells its failures in its own words.
    if (!failed || !loading || loading.hidden || !/…$/.test(loading.textContent)) return;
    loading.textContent = /^ko/.test(navigator.language)
      ? "페이지를 다 불러오지 못했습니다. 새로고침해 주세요."
      : "This page did not load completely. Reload it to try again.";
    loading.setAttribute("role", "alert");
  },
  true,
);
