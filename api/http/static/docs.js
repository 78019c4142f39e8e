// The OpenAPI document through Swagger UI, from this service alone.

/** Problem documents link to an error code, which moves as the operations above it are drawn. */
function goToAnchor() {
  if (location.hash) document.getElementById(location.hash.slice(1))?.scrollIntoView();
}

window.SwaggerUIBundle({
  url: "/schema/openapi.json",
  domNode: document.getElementById("ui"),
  presets: [window.SwaggerUIBundle.presets.apis, window.SwaggerUIStandalonePreset.slice(1)],
  layout: "BaseLayout",
  // The public validator would be sent the document.
  validatorUrl: null,
  docExpansion: "list",
  defaultModelsExpandDepth: 0,
  displayRequestDuration: true,
  persistAuthorization: false,
  onComplete: goToAnchor,
});
