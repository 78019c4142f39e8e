// Idempotency keys: one for each intent.

/** Pages on plain http other than localhost have no crypto.randomUUID. */
export function newKey() {
  return crypto.randomUUID?.() ?? crypto.getRandomValues(new Uint32Array(4)).join("-");
}
