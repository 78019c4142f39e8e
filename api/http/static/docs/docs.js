// The OpenAPI document in Swagger UI, from this service alone.

/** Problem documents link to an error code, which moves while the operations above it render. */
function goToAnchor() {
  if (location.hash) document.getElementById(location.hash.slice(1))?.scrollIntoView();
}

window.SwaggerUIBundle({
  url: "/schema/openapi.json",
  domNode: document.getElementById("ui"),
  presets: [window.SwaggerUIBundle.presets.apis, window.SwaggerUIStandalonePreset.slice(1)],
  layout: "BaseLayout",
  // The public validator would receive the document.
  validatorUrl: null,
  docExpansion: "list",
  defaultModelsExpandDepth: 0,
  displayRequestDuration: true,
  persistAuthorization: false,
  onComplete: goToAnchor,
});
