// Shows a sentence if one of the page's scripts fails to load or run. Not a module: it must run in
// browsers, and on connections, on which the others fail.
addEventListener(
  "error",
  function (event) {
    var loading = document.querySelector("[data-t=loading]");
    var failed = event.target === window || event.target.tagName === "SCRIPT";
    // A page that has rendered shows its failures itself.
    if (!failed || !loading || loading.hidden || !/…$/.test(loading.textContent)) return;
    loading.textContent = /^ko/.test(navigator.language)
      ? "페이지를 다 불러오지 못했습니다. 새로고침해 주세요."
      : "This page did not load completely. Reload it to try again.";
    loading.setAttribute("role", "alert");
  },
  true,
);
